"""Rows that begin with vectors from Parquet files, such as those of another run's checkpoint.

Every rank reads the files, a few thousand rows at a time, and takes what lies in its shards: no rank holds more of a table
than it has under the plan. A vector whose id the vocabulary does not know is left out, an id without a vector begins as
`init` says; both are counted. An id that is there twice, a vector of another length and a number that the table's dtype
does not hold are errors, on all ranks.
"""

from __future__ import annotations

__all__ = ["WarmStart", "start_warm", "warm_start"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embedshard.config import Config
from embedshard.config.parts import InitFromConfig
from embedshard.data.footers import data_files
from embedshard.data.mapped_ids import integers, is_string
from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import DataError, nearest
from embedshard.sharding.shards import Shard, weight_shards
from embedshard.storage import Location
from embedshard.train.assembly import Assembly
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import World

_ROWS_AT_ONCE: Final = 16_384
_SHOWN: Final = 5

IntArray = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WarmStart:
    """What a table's rows began with.

    Attributes:
        table: its name.
        files: that were read.
        vectors: that they hold.
        matched: rows that began with one of them.
        missing: ids of the vocabulary that had none, and began as `init` says.
        not_in_vocabulary: vectors of ids that the vocabulary does not know.
    """

    table: str
    files: int
    vectors: int
    matched: int
    missing: int
    not_in_vocabulary: int

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What a person is told."""
        return (
            f"Table '{self.table}': {self.matched:,} of {self.matched + self.missing:,} ids begin with a vector of "
            f"init_from, {self.missing:,} without one as init says; {self.not_in_vocabulary:,} of its {self.vectors:,} "
            "vectors are of ids that are not in the vocabulary."
        )


def start_warm(parts: Assembly, run: RunDirectory, reporter: Reporter) -> None:
    """Gives a new run's rows the vectors that its config names, if it names any, and keeps what came of it. Collective.

    Raises:
        DataError: as `warm_start` does.
    """
    found = warm_start(parts.config, parts.dataset.vocabularies, parts.model, parts.world, reporter.prepared)
    if found and parts.world.is_rank_zero:
        run.write_json("warm_start.json", {table: start.to_json() for table, start in found.items()})
    for start in found.values():
        reporter.said(start.sentence)


@torch.no_grad()
def warm_start(
    config: Config,
    vocabularies: Mapping[str, Vocabulary],
    model: DistributedModelParallel,
    world: World,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, WarmStart]:
    """Writes the vectors that the config names into this rank's shards. Collective.

    Args:
        config: whose tables may have an `init_from`.
        vocabularies: of each table.
        model: sharded, its rows initialised.
        world: whose ranks hold it.
        progress: told what is read, and how many rows of how many.

    Returns:
        What came of it, by table; empty where the config names none.

    Raises:
        DataError: if a file is not what the config says.
    """
    found: dict[str, WarmStart] = {}
    shards = list(weight_shards(model))
    for name, table in config.tables.items():
        if table.init_from is None:
            continue
        mine = [shard for shard in shards if shard.table == name]
        reader = _Reader(name, table.init_from, table.dim, table.dtype, vocabularies[name])
        problem: DataError | None = None
        try:
            found[name] = reader.fill(mine, progress)
        except DataError as error:
            problem = error
        problems = [told for told in world.gather_objects(None if problem is None else str(problem)) if told is not None]
        if problems:
            raise problem or DataError(problems[0])
    return found


class _Reader:
    """Reads one table's vectors."""

    def __init__(self, table: str, source: InitFromConfig, dim: int, dtype: str, vocabulary: Vocabulary) -> None:
        self._table, self._source, self._dim, self._vocabulary = table, source, dim, vocabulary
        self._largest = float(np.finfo(np.float16 if dtype == "fp16" else np.float32).max)
        self._dtype = dtype
        self._is_met = np.zeros(-(-vocabulary.rows // 8), dtype=np.uint8)  # a bit a row

    def fill(self, shards: list[Shard], progress: Progress) -> WarmStart:
        """Writes the vectors into shards of this table, and counts them."""
        files, _ = data_files(self._source.parquet)
        total = sum(self._check_schema(file) for file in files)
        vectors = matched = unknown = 0
        for where, ids, vectors_ND in self._batches(files):
            rows = self._rows(where, ids)
            is_known = rows >= 0
            self._check_twice(where, ids, rows)
            for shard in shards:
                _write(shard, rows, vectors_ND)
            vectors, matched = vectors + len(rows), matched + int(is_known.sum())
            unknown += int((~is_known).sum())
            progress(f"vectors for table '{self._table}'", vectors, total)
        return WarmStart(self._table, len(files), vectors, matched, self._vocabulary.rows - matched, unknown)

    def _check_schema(self, file: Location) -> int:
        """Checks that a file has the two columns; returns its rows."""
        where = self._where(file)
        try:
            with file.open_input() as opened:
                parquet = pq.ParquetFile(opened)
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}. It must be a Parquet file of ids and vectors.") from error
        for column in (self._source.id, self._source.vector):
            if column not in schema.names:
                raise DataError(f"{where} has no column '{column}'. {nearest(column, schema.names)}")
        kind = schema.field(self._source.id).type
        if not (pa.types.is_integer(kind) or is_string(kind)):
            raise DataError(f"{where}: column '{self._source.id}' is {kind}; ids are integers or strings.")
        kind = schema.field(self._source.vector).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
            raise DataError(f"{where}: column '{self._source.vector}' is {kind}; vectors are lists of numbers.")
        if pa.types.is_fixed_size_list(kind) and kind.list_size != self._dim:
            raise self._wrong_length(where, kind.list_size)
        return int(rows)

    def _batches(self, files: list[Location]) -> Iterator[tuple[str, pa.Array, npt.NDArray[np.float32]]]:
        """Yields where rows are, their ids and their vectors, (N, dim)."""
        columns = [self._source.id, self._source.vector]
        for file in files:
            row = 0
            try:
                with file.open_input() as opened:
                    # Row groups are not buffered ahead: a file may be one.
                    parquet = pq.ParquetFile(opened, pre_buffer=False)
                    for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                        where = f"{self._where(file)}, rows {row} to {row + batch.num_rows - 1}"
                        yield (
                            where,
                            self._ids(where, batch.column(columns[0])),
                            self._vectors(where, batch.column(columns[1])),
                        )
                        row += batch.num_rows
            except (OSError, pa.ArrowException, ValueError) as error:
                raise DataError(f"{self._where(file)} cannot be read: {error}. Write it anew.") from error

    def _ids(self, where: str, ids: pa.Array) -> pa.Array:
        if ids.null_count:
            raise DataError(f"{where}: {ids.null_count} ids are null; each vector needs one. Remove these rows.")
        return ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids

    def _vectors(self, where: str, vectors: pa.Array) -> npt.NDArray[np.float32]:
        if vectors.null_count:
            raise DataError(f"{where}: {vectors.null_count} vectors are null. Remove these rows.")
        if not pa.types.is_fixed_size_list(vectors.type):
            lengths = np.unique(vectors.value_lengths().to_numpy(zero_copy_only=False))
            wrong = lengths[lengths != self._dim]
            if len(wrong):
                raise self._wrong_length(where, int(wrong[0]))
        values = vectors.flatten()
        if values.null_count:
            raise DataError(f"{where}: {values.null_count} numbers of vectors are null. Remove these rows.")
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        bad = ~(np.abs(numbers) <= self._largest)
        if bad.any():
            raise DataError(
                f"{where}: a vector holds {numbers[bad][0]}, which a table of {self._dtype} does not. Correct the vector, "
                "or leave it out."
            )
        return numbers.reshape(-1, self._dim)

    def _rows(self, where: str, ids: pa.Array) -> IntArray:
        try:
            if pa.types.is_integer(ids.type):
                return self._vocabulary.map_integers(integers(ids))
            return self._vocabulary.map_strings(ids.cast(pa.large_string()))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _check_twice(self, where: str, ids: pa.Array, rows: IntArray) -> None:
        """Checks that no row is met a second time, and notes those that are met."""
        known = rows[rows >= 0]
        unique, counts = np.unique(known, return_counts=True)
        place, bit = unique >> 3, (1 << (unique & 7)).astype(np.uint8)
        twice = unique[(counts > 1) | (self._is_met[place] & bit != 0)]
        if len(twice):
            met = ids.take(pa.array(np.flatnonzero(np.isin(rows, twice[:_SHOWN]))))
            shown = ", ".join(dict.fromkeys(map(str, met.to_pylist())))
            raise DataError(
                f"{where}: {len(twice)} ids have a vector already: {shown}{', ...' if len(twice) > _SHOWN else ''}. Each "
                "has one: remove the others."
            )
        np.bitwise_or.at(self._is_met, place, bit)

    def _where(self, file: Location) -> str:
        return f"tables.{self._table}.init_from: {file.uri}"

    def _wrong_length(self, where: str, length: int) -> DataError:
        return DataError(
            f"{where}: column '{self._source.vector}' has vectors of {length} numbers, and tables.{self._table}.dim is "
            f"{self._dim}. Change the dim, or take vectors that were trained with it."
        )


def _write(shard: Shard, rows: IntArray, vectors_ND: npt.NDArray[np.float32]) -> None:
    """Writes what lies in a shard."""
    first_row, first_column = shard.offset
    mine = np.flatnonzero((rows >= first_row) & (rows < first_row + shard.tensor.shape[0]))
    if not len(mine):
        return
    block = np.ascontiguousarray(vectors_ND[mine, first_column : first_column + shard.tensor.shape[1]])
    places = torch.from_numpy(rows[mine] - first_row).to(shard.tensor.device)
    shard.tensor[places] = torch.from_numpy(block).to(shard.tensor)
