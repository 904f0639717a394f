"""The files of a data set: what their footers say, and their row groups, decoded.

Only footers are read to know the rows. They make the inventory, which is kept with a run: a resumed run goes on with the
same data or not at all.
"""

from __future__ import annotations

__all__ = ["Inventory", "InventoryFile", "RowGroup", "Source", "check_unchanged", "open_source"]

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.columns import Columns
from embedshard.data.decode import Decoder, Where
from embedshard.data.findings import Finding
from embedshard.data.statistics import Statistics
from embedshard.errors import DataError, nearest
from embedshard.storage import Location, expand

IntArray = npt.NDArray[np.int64]

_MAGIC = b"PAR1"
_PARQUET_NAMES = (".parquet", ".parq", ".pq")
_TAIL_BYTES = 8
_OPEN_FILES = 32
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class InventoryFile:
    """A file, as its footer tells.

    Attributes:
        name: the last part of its path; the folder may change.
        size_bytes: of the file.
        row_groups: rows of each.
        footer_sha256: of the footer, which holds the columns' places, encodings and least and greatest values.
    """

    name: str
    size_bytes: int
    row_groups: tuple[int, ...]
    footer_sha256: str


@dataclass(frozen=True)
class RowGroup:
    """A row group of a data set.

    Attributes:
        file: which of the files.
        index: within the file.
        num_rows: its rows.
        first_row: its first row's number in the data set.
    """

    file: int
    index: int
    num_rows: int
    first_row: int


@dataclass(frozen=True)
class Inventory:
    """All files of a data set, sorted by path."""

    files: tuple[InventoryFile, ...]

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """All row groups, in file order."""
        groups, first_row = [], 0
        for number, file in enumerate(self.files):
            for index, rows in enumerate(file.row_groups):
                groups.append(RowGroup(number, index, rows, first_row))
                first_row += rows
        return tuple(groups)

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return sum(sum(file.row_groups) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Of all that the inventory holds; another folder does not change it."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what a run keeps."""
        return [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "row_groups": list(file.row_groups),
                "footer_sha256": file.footer_sha256,
            }
            for file in self.files
        ]

    @classmethod
    def from_json(cls, files: Sequence[Mapping[str, Any]]) -> Inventory:
        """Returns what a run has kept."""
        return cls(
            tuple(
                InventoryFile(file["name"], file["size_bytes"], tuple(file["row_groups"]), file["footer_sha256"])
                for file in files
            )
        )


def check_unchanged(saved: Inventory, now: Inventory) -> None:
    """Checks that the data are those that a run began with.

    Raises:
        DataError: naming the files that are missing, new, or changed.
    """
    if saved == now:
        return
    before, after = ({file.name: file for file in inventory.files} for inventory in (saved, now))
    changes = [
        *(f"{name} is missing" for name in before if name not in after),
        *(f"{name} is new" for name in after if name not in before),
        *(f"{name} has changed" for name in before if name in after and before[name] != after[name]),
    ] or ["the files are the same but in another order"]
    shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
    raise DataError(
        f"the training data have changed since the run began: {shown}. A run resumes on the data it began with: "
        f"put them back, or start a new run."
    )


class Source:
    """The row groups of a data set.

    One thread at a time reads a source.

    Args:
        locations: the files.
        inventory: what their footers say.
        metadata: the footers themselves.
        decoder: turns columns into arrays.
        skipped: what lies among the files and is not read, since it is not Parquet.
    """

    def __init__(
        self,
        locations: Sequence[Location],
        inventory: Inventory,
        metadata: Sequence[pq.FileMetaData],
        decoder: Decoder,
        skipped: Sequence[Location] = (),
    ) -> None:
        self._locations, self._metadata = tuple(locations), tuple(metadata)
        self.inventory, self.decoder, self.skipped = inventory, decoder, tuple(skipped)
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    def narrowed(self, names: Sequence[str]) -> Source:
        """Returns a source of some columns alone."""
        return self._decoded_by(self.decoder.narrowed(names))

    def with_statistics(self, statistics: Statistics) -> Source:
        """Returns a source that standardises by these."""
        return self._decoded_by(self.decoder.with_statistics(statistics))

    def _decoded_by(self, decoder: Decoder) -> Source:
        return Source(self._locations, self.inventory, self._metadata, decoder, self.skipped)

    def describe_row(self, row: int) -> str:
        """Returns the file, row group and row of a row's number in the data set."""
        if row < 0:
            return "padding"
        group = self.inventory.row_groups[int(self.row_groups_of(np.array([row]))[0])]
        return f"{self.uri_of(group)}, row group {group.index}, row {row - group.first_row}"

    def row_groups_of(self, rows: IntArray) -> IntArray:
        """Returns which row group of the data set holds each of its rows."""
        starts = np.array([group.first_row for group in self.inventory.row_groups])
        return np.searchsorted(starts, rows, side="right") - 1

    def uri_of(self, group: RowGroup) -> str:
        """Returns the URI of the file that holds a row group."""
        return self._locations[group.file].uri

    def decoded_bytes(self) -> int:
        """Returns, from the footers alone, about how many bytes all decoded columns take."""
        total = (8 + 2 * self.decoder.quarantines) * self.inventory.num_rows
        for spec in self.decoder.specs:
            for metadata in self._metadata:
                for group in range(metadata.num_row_groups):
                    rows = metadata.row_group(group).num_rows
                    if not spec.is_list:
                        total += rows * (8 if spec.table is not None else 4)
                        continue
                    values = _num_values(metadata.row_group(group), spec.column)
                    kept = values if spec.max_length is None else min(values, rows * spec.max_length)
                    total += rows * 8 + kept * (12 if spec.second is not None else 8)
        return total

    def read_row_group(self, number: int) -> Columns:
        """Returns a row group, decoded.

        Raises:
            DataError: if it cannot be read or holds what the config does not allow.
        """
        group = self.inventory.row_groups[number]
        try:
            table = self._file(group.file).read_row_group(group.index, columns=self.decoder.columns, use_threads=False)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unreadable(group, error) from error
        self._check_rows(group, table.num_rows)
        return self.decoder.decode(table, self._where(group, 0))

    def find(self, number: int, names: Sequence[str], rows: IntArray) -> list[Finding]:
        """Reads rows of a row group again, for what is wrong with some of their columns whatever the config does about it.

        Args:
            number: of the row group in the data set.
            names: of decoded columns.
            rows: of the row group, ascending.

        Returns:
            Findings whose rows are the row group's.

        Raises:
            DataError: if it cannot be read.
        """
        group, decoder = self.inventory.row_groups[number], self.decoder.only(names)
        try:
            # A handle of its own: another thread may read.
            with self._parquet_file(group.file) as file:
                table = file.read_row_group(group.index, columns=decoder.columns, use_threads=False)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unreadable(group, error) from error
        self._check_rows(group, table.num_rows)
        found = decoder.find(table.take(pa.array(rows)), self._where(group, 0))
        return [replace(finding, rows=rows[finding.rows]) for finding in found]

    def iter_row_group(self, number: int, batch_rows: int, skip_rows: int = 0) -> Iterator[Columns]:
        """Yields a row group from a row on, at most so many rows at once, decoded.

        Raises:
            DataError: if it cannot be read or holds what the config does not allow.
        """
        group = self.inventory.row_groups[number]
        position = 0
        batches = None
        while True:
            try:
                if batches is None:
                    # A handle of its own: a lane keeps it while others read the same file.
                    file = self._parquet_file(group.file)
                    batches = file.iter_batches(
                        batch_size=batch_rows, row_groups=[group.index], columns=self.decoder.columns, use_threads=False
                    )
                batch = next(batches, None)
            except (OSError, pa.ArrowException, ValueError) as error:
                raise self._unreadable(group, error) from error
            if batch is None:
                break
            begin, position = position, position + batch.num_rows
            if position > skip_rows:
                skip = max(skip_rows - begin, 0)
                yield self.decoder.decode(batch.slice(skip), self._where(group, begin + skip))
        self._check_rows(group, position)

    def _where(self, group: RowGroup, row: int) -> Where:
        return Where(self.uri_of(group), group.index, row, group.first_row + row)

    def _file(self, number: int) -> pq.ParquetFile:
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                file = self._parquet_file(number)
                if len(self._open) >= _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open[number] = file
            return file

    def _parquet_file(self, number: int) -> pq.ParquetFile:
        """Opens a file anew. Pages that were written with a checksum are verified by it."""
        return pq.ParquetFile(
            self._locations[number].open_input(), metadata=self._metadata[number], page_checksum_verification=True
        )

    def _check_rows(self, group: RowGroup, rows: int) -> None:
        if rows != group.num_rows:
            raise self._unreadable(group, ValueError(f"it holds {rows} rows, its footer says {group.num_rows}"))

    def _unreadable(self, group: RowGroup, error: Exception) -> DataError:
        return DataError(
            f"{self.uri_of(group)}, row group {group.index}: cannot be read: {' '.join(str(error).split())} "
            f"(columns {', '.join(self.decoder.columns)}). The file is damaged or changed while it was read: write it anew."
        )


def open_source(patterns: Sequence[str], decoder: Decoder) -> Source:
    """Opens a data set: finds its files, reads their footers in parallel, and checks their schemas.

    Raises:
        DataError: if nothing matches, a file is not whole Parquet, a column is missing or of another type, or there are no
            rows.
    """
    locations, skipped = _data_files(patterns)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(locations))) as pool:
        footers = list(pool.map(_read_footer, locations))
    for location, (_, metadata) in zip(locations, footers, strict=True):
        _check_schema(location, metadata, decoder)
    inventory = Inventory(tuple(file for file, _ in footers))
    source = Source(locations, inventory, [metadata for _, metadata in footers], decoder, skipped)
    if not source.inventory.num_rows:
        raise DataError(
            f"{', '.join(patterns)}: {len(locations)} files without a row. There must be at least one: "
            f"correct the path, or make the data anew."
        )
    return source


def _data_files(patterns: Sequence[str]) -> tuple[list[Location], list[Location]]:
    """Returns the files of a data set, and what is skipped: by name, or since neither name nor content is Parquet's."""
    expansion = expand(patterns)
    doubtful = [
        location
        for location in expansion.files
        if location.path not in expansion.spelled_out and not location.name.lower().endswith(_PARQUET_NAMES)
    ]
    others = {location.path for location in doubtful if not _begins_as_parquet(location)}
    files = [location for location in expansion.files if location.path not in others]
    skipped = expansion.skipped + [location for location in expansion.files if location.path in others]
    if not files:
        shown = ", ".join(location.name for location in skipped[:8]) + (", ..." if len(skipped) > 8 else "")
        raise DataError(
            f"{', '.join(patterns)}: none of the files there is Parquet: {shown}. Correct the path, or make the data first."
        )
    return files, sorted(skipped, key=lambda location: location.path)


def _begins_as_parquet(location: Location) -> bool:
    try:
        with location.open_input() as file:
            return bool(file.read(len(_MAGIC)) == _MAGIC)
    except OSError as error:
        raise DataError(f"{location.uri} cannot be read: {error}. See that it may be read, or exclude it.") from error


def _read_footer(location: Location) -> tuple[InventoryFile, pq.FileMetaData]:
    try:
        with location.open_input() as file:
            size = file.size()
            if size < _TAIL_BYTES + len(_MAGIC):
                raise DataError(f"{location.uri} has {size} bytes, too few for a Parquet file. Write it anew.")
            file.seek(size - _TAIL_BYTES)
            tail = file.read(_TAIL_BYTES)
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != _MAGIC or length + _TAIL_BYTES > size:
                raise DataError(
                    f"{location.uri} is not a whole Parquet file: its last bytes are not 'PAR1'. It was cut off while "
                    f"it was written, or is of another format. Write it anew, or exclude it from the path."
                )
            file.seek(size - _TAIL_BYTES - length)
            digest = hashlib.sha256(file.read(length)).hexdigest()
            file.seek(0)
            metadata = pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{location.uri} cannot be read as Parquet: {' '.join(str(error).split())}. Write it anew."
        ) from error
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return InventoryFile(location.name, size, groups, digest), metadata


def _check_schema(location: Location, metadata: pq.FileMetaData, decoder: Decoder) -> None:
    try:
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{location.uri}: its schema cannot be read: {error}. Write it anew.") from error
    for spec in decoder.specs:
        for column in (spec.column, spec.second):
            if column is None:
                continue
            if column not in schema.names:
                raise DataError(
                    f"{location.uri} has no column '{column}', which '{spec.name}' needs. {nearest(column, schema.names)}"
                )
            kind = schema.field(column).type
            needed = decoder.check_type(spec, column, kind)
            if needed is not None:
                raise DataError(
                    f"{location.uri}: column '{column}' is {kind}, '{spec.name}' needs {needed}. "
                    f"Write the column so, or name another column in the config."
                )


def _num_values(row_group: pq.RowGroupMetaData, column: str) -> int:
    for place in range(row_group.num_columns):
        path = row_group.column(place).path_in_schema
        if path == column or path.startswith(f"{column}."):
            return int(row_group.column(place).num_values)
    return 0
