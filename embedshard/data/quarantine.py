"""What happens to a bad row, beyond losing its weight: it is counted, recorded, and too many of them stop the run.

Rows are decoded ahead of training, some of them several times. So what is wrong with a batch is counted when its step was
done, from what the batch carries, and of a row that was set aside only its number is kept: when the record is written, its
value is read again.

A record holds a row once, when it is trained for the first time. Its parts end at checkpoints, so those of steps that a
restart rolls back can be taken away.
"""

from __future__ import annotations

__all__ = ["BadRowCounts", "Quarantine", "Tally", "example_of", "most_allowed", "record", "too_many", "write_record"]

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.columns import Columns, Flat
from embedshard.errors import DataError
from embedshard.storage import Location, PathOrUri, locate, reaching

if TYPE_CHECKING:
    from embedshard.data.batch import Batch
    from embedshard.data.decode import Decoder
    from embedshard.data.source import Source

IntArray = npt.NDArray[np.int64]

_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row_group": pa.int64(),
        "row": pa.int64(),
        "column": pa.string(),
        "value": pa.string(),
        "reason": pa.string(),
        "step": pa.int64(),
        "epoch": pa.int64(),
    }
)


# -------------------------------------------------------------------------------------------------------------- counts
@dataclass
class BadRowCounts:
    """What was wrong with the rows of a set.

    Attributes:
        by_reason: rows that were set aside, by the first thing that is wrong with each, as in `item_id: unknown id`.
        oov: ids that looked up the row for unknown ids, by feature.
        ids: ids that were looked up, by feature, of those features.
        null: nulls that counted as no id, by feature.
    """

    by_reason: dict[str, int] = field(default_factory=dict)
    oov: dict[str, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    null: dict[str, int] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        """Rows that were set aside."""
        return sum(self.by_reason.values())

    @property
    def oov_share(self) -> float:
        """Share of unknown ids among those that were looked up, of the features that allow them."""
        return sum(self.oov.values()) / max(sum(self.ids.values()), 1)

    def to_json(self, rows: int) -> dict[str, Any]:
        """Returns what a result says of a set of so many rows."""
        return {"rows": rows, "quarantined": self.quarantined, **asdict(self)}


class Tally:
    """Counts what is wrong with decoded rows: a vector of numbers, which ranks can sum.

    Args:
        decoder: of the rows.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._unknown_rows, self._with_nulls = decoder.unknown_rows, decoder.with_empty_nulls
        self._problems = [str(problem) for problem in decoder.problems] if decoder.quarantines else []

    def of(self, columns: Columns, first: int, last: int) -> IntArray:
        """Returns what is counted in the rows [first, last), (n,) int64."""
        counts: list[int] = []
        for name, unknown_row in self._unknown_rows.items():
            ids = _ids(columns, name, first, last)
            counts += [int(np.count_nonzero(ids == unknown_row)), int(np.count_nonzero(ids >= 0))]
        counts += [self._nulls(columns, name, first, last) for name in self._with_nulls]
        if self._problems:
            codes = columns["bad"].values[first:last]
            counts += np.bincount(codes, minlength=len(self._problems) + 1)[1:].tolist()
        return np.array(counts, dtype=np.int64)

    @staticmethod
    def _nulls(columns: Columns, name: str, first: int, last: int) -> int:
        column = columns[name]
        if not isinstance(column, Flat):
            return int(columns[f"null:{name}"].values[first:last].sum())
        is_null = (column.values[first:last] < 0) & (columns["row"].values[first:last] >= 0)
        if "bad" in columns:
            is_null &= columns["bad"].values[first:last] == 0
        return int(np.count_nonzero(is_null))

    def add(self, tally: Sequence[float] | IntArray, counts: BadRowCounts) -> int:
        """Adds what was counted, and returns how many rows of it were set aside."""
        numbers = [round(number) for number in tally]
        features = len(self._unknown_rows)
        for place, name in enumerate(self._unknown_rows):
            counts.oov[name] = counts.oov.get(name, 0) + numbers[2 * place]
            counts.ids[name] = counts.ids.get(name, 0) + numbers[2 * place + 1]
        for place, name in enumerate(self._with_nulls, start=2 * features):
            counts.null[name] = counts.null.get(name, 0) + numbers[place]
        quarantined = numbers[2 * features + len(self._with_nulls) :]
        for problem, number in zip(self._problems, quarantined, strict=True):
            if number:
                counts.by_reason[problem] = counts.by_reason.get(problem, 0) + number
        return sum(quarantined)


def _ids(columns: Columns, name: str, first: int, last: int) -> IntArray:
    column = columns[name]
    if isinstance(column, Flat):
        return column.values[first:last]
    return column.values[column.offsets[first] : column.offsets[last]]


def most_allowed(fraction: float, rows: int) -> int:
    """Returns how many of so many rows may be set aside: a share that is written in decimals, rounded down."""
    return math.floor(fraction * rows + 1e-9)


def too_many(
    what: str, quarantined: int, rows: int, fraction: float, counts: BadRowCounts, hints: Sequence[str]
) -> DataError:
    """Returns the error of a set in which more rows were set aside than `data.max_bad_fraction` allows.

    Args:
        what: the set.
        quarantined: rows that were set aside.
        rows: of the set.
        fraction: the share that may be.
        counts: what is known to be wrong with rows.
        hints: sentences on where one of them is, where all are, and how to go on.
    """
    commonest = sorted(counts.by_reason.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason} ({number})" for reason, number in commonest[:3])
    more = f" and {len(commonest) - 3} more reasons" if len(commonest) > 3 else ""
    text = (
        f"{what}: {quarantined} rows were set aside; data.max_bad_fraction={fraction:g} of {rows} rows allows "
        f"{most_allowed(fraction, rows)}. The commonest reasons: {reasons}{more}."
    )
    return DataError(" ".join([text, *(hint for hint in hints if hint)]))


# -------------------------------------------------------------------------------------------------------------- record
def record(source: Source, rows: IntArray, codes: IntArray) -> pa.Table:
    """Returns where rows that were set aside are and what is wrong with each, by reading them again.

    Args:
        source: the data set.
        rows: their numbers in it, (n,) int64, in any order, each once.
        codes: of its decoder, as the column `bad` holds them, (n,).

    Returns:
        file, row_group, row, column, value and reason of each, in their order.

    Raises:
        DataError: if a row group cannot be read any more.
    """
    groups = source.row_groups_of(rows)
    problems = [source.decoder.problems[code - 1] for code in codes]
    values: list[str | None] = [None] * len(rows)
    for group, code in np.unique(np.stack([groups, codes]), axis=1).T.tolist():
        problem, first_row = source.decoder.problems[code - 1], source.inventory.row_groups[group].first_row
        places = np.flatnonzero((groups == group) & (codes == code))
        places = places[np.argsort(rows[places])]
        for finding in source.find(group, [problem.name], rows[places] - first_row):
            if finding.problem == problem:
                _, firsts = np.unique(finding.rows, return_index=True)  # a list may hold several: the first is told
                for place, first in zip(places.tolist(), firsts.tolist(), strict=True):
                    values[place] = finding.value(first)
    of_rows = [source.inventory.row_groups[group] for group in groups]
    return pa.table(
        {
            "file": pa.array([source.uri_of(group) for group in of_rows], pa.string()),
            "row_group": pa.array([group.index for group in of_rows], pa.int64()),
            "row": pa.array(source.rows_in_row_groups(rows), pa.int64()),
            "column": pa.array([problem.column for problem in problems], pa.string()),
            "value": pa.array(values, pa.string()),
            "reason": pa.array([problem.reason for problem in problems], pa.string()),
        }
    )


def write_record(
    folder: PathOrUri | Location,
    name: str,
    rows: pa.Table,
    steps: Sequence[int] | None = None,
    epochs: Sequence[int] | None = None,
) -> None:
    """Writes a part of a run's record, whole or not at all; no file where there are no rows.

    Args:
        folder: `quarantine/` of the run directory; made where it is not there.
        name: of the file.
        rows: as `record` returns them.
        steps: that trained them; None for sets that are not trained.
        epochs: in which that was.

    Raises:
        StorageError: if it cannot be written.
    """
    place = locate(folder)
    if not rows.num_rows:
        with reaching(place):
            place.join(name).delete_file()
        return
    nothing = [None] * rows.num_rows
    table = rows.append_column("step", pa.array(nothing if steps is None else steps, pa.int64()))
    table = table.append_column("epoch", pa.array(nothing if epochs is None else epochs, pa.int64()))
    stream = pa.BufferOutputStream()
    pq.write_table(table.cast(_SCHEMA), stream)
    with reaching(place):
        place.make_dirs()
        place.join(name).write_bytes_atomically(stream.getvalue().to_pybytes())


def example_of(rows: pa.Table) -> str:
    """Returns a sentence on the first row of a record; nothing where it has none."""
    if not rows.num_rows:
        return ""
    first = rows.slice(0, 1).to_pylist()[0]
    value = "null" if first["value"] is None else repr(first["value"])
    return (
        f"For example {first['file']}, row group {first['row_group']}, row {first['row']}: "
        f"column '{first['column']}' is {value}: {first['reason']}."
    )


class Quarantine:
    """One rank's record of the training rows that were set aside.

    Args:
        folder: `quarantine/` of the run directory.
        rank: this process's.
        sources: one for each partition.
    """

    def __init__(self, folder: PathOrUri | Location, rank: int, sources: Sequence[Source]) -> None:
        self.folder = locate(folder)
        self._rank, self._sources = rank, sources
        self._pending: list[tuple[int, int, IntArray, IntArray]] = []  # step, partition, rows, codes

    @staticmethod
    def forget_after(folder: PathOrUri | Location, step: int) -> None:
        """Takes away what was recorded after a step: a run that goes on from there records it again.

        Parts end at checkpoints, so none holds rows from before and after one.
        """
        place = locate(folder)
        with reaching(place):
            for name in _parts(place):
                if int(name.split("-")[1]) > step:
                    place.join(name).delete_file()

    def add(self, batch: Batch) -> None:
        """Notes the rows of a batch that were set aside, once its step was done; in the first epoch, which has them all."""
        position = batch.training_position
        if batch.bad is None or position.epoch:
            return
        codes = batch.bad.numpy()
        places = np.flatnonzero(codes)
        if len(places):
            rows = batch.rows.numpy()[places]
            self._pending.append((position.step + 1, position.partition, rows, codes[places].astype(np.int64)))

    def flush(self) -> None:
        """Writes what was noted since the last part, to the disk.

        Raises:
            DataError: if the data cannot be read any more.
        """
        if not self._pending:
            return
        parts, steps = [], []
        for partition, source in enumerate(self._sources):
            noted = [entry for entry in self._pending if entry[1] == partition]
            if noted:
                rows, codes = (np.concatenate([entry[place] for entry in noted]) for place in (2, 3))
                parts.append(record(source, rows, codes))
                steps += [step for step, _, entry_rows, _ in noted for _ in entry_rows]
        name = f"train-{self._pending[0][0]:08d}-{self._rank:05d}.parquet"
        write_record(self.folder, name, pa.concat_tables(parts), steps, [0] * len(steps))
        self._pending = []

    def example(self) -> str:
        """Returns a sentence on one of the rows in the record."""
        with reaching(self.folder):
            part = min(_parts(self.folder), default=None)
            if part is None:
                return ""
            with self.folder.join(part).open_input() as file:
                return example_of(pq.read_table(file))


def _parts(folder: Location) -> list[str]:
    """Returns the names of the files of a record of training rows."""
    return [name for name in folder.list_names() if name.startswith("train-") and name.endswith(".parquet")]
