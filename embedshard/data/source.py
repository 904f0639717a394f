"""The files of a data set: what their footers say, and their row groups, decoded.

Only footers are read to know the rows. They make the inventory, which is kept with a run: a resumed run goes on with the
same data or not at all.
"""

from __future__ import annotations

__all__ = [
    "Inventory",
    "InventoryFile",
    "RowGroup",
    "Source",
    "changes",
    "data_files",
    "fingerprint_of",
    "inventory_of",
    "joined",
    "open_file",
    "open_source",
]

import hashlib
import io
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.byte_count import ByteCount
from embedshard.data.columns import Columns, Flat, Ragged, narrowed
from embedshard.data.decode import ColumnSpec, Decoder, Where
from embedshard.data.findings import Finding
from embedshard.data.parse import is_list
from embedshard.data.row_group import Rows, RowsByColumn
from embedshard.data.split import Selection
from embedshard.data.statistics import Statistics
from embedshard.errors import DataError, nearest
from embedshard.storage import Location, expand

IntArray = npt.NDArray[np.int64]

_MAGIC = b"PAR1"
_PARQUET_NAMES = (".parquet", ".parq", ".pq")
_TAIL_BYTES = 8
_OPEN_FILES = 32
_STREAM_BYTES = 65_536  # of a column, as compressed, that a stream asks a file for at once
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
        num_rows: its rows that are in the data set.
        first_row: the first one's number in the data set.
        num_file_rows: all its rows in the file.
        first_file_row: the first one's number among all rows of all files.
    """

    file: int
    index: int
    num_rows: int
    first_row: int
    num_file_rows: int
    first_file_row: int


@dataclass(frozen=True)
class Inventory:
    """All files of a data set, sorted by path.

    Attributes:
        files: what their footers say.
        selection: which of their rows are in the data set; None for all. The others have no number, and nobody who reads
            the data set meets them.
    """

    files: tuple[InventoryFile, ...]
    selection: Selection | None = None

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """All row groups, in file order."""
        groups, first_row, first_file_row = [], 0, 0
        for number, file in enumerate(self.files):
            for index, file_rows in enumerate(file.row_groups):
                end = first_file_row + file_rows
                rows = file_rows if self.selection is None else self.selection.count(first_file_row, end)
                groups.append(RowGroup(number, index, rows, first_row, file_rows, first_file_row))
                first_row, first_file_row = first_row + rows, end
        return tuple(groups)

    @cached_property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def num_file_rows(self) -> int:
        """Rows of the files, selected or not."""
        return sum(sum(file.row_groups) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Of all that the inventory holds; another folder does not change it."""
        held = repr(self.files) if self.selection is None else repr((self.files, self.selection))
        return hashlib.sha256(held.encode()).hexdigest()

    def selected_rows(self, group: RowGroup) -> IntArray | None:
        """Returns which rows of a row group are in the data set, ascending; None for all."""
        if self.selection is None:
            return None
        return self.selection.rows(group.first_file_row, group.first_file_row + group.num_file_rows)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what a run keeps: the files. What is selected of them its config says."""
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


def fingerprint_of(inventories: Sequence[Inventory]) -> str:
    """Returns the fingerprint of a training set, given the inventory of each partition."""
    digest = hashlib.sha256()
    for inventory in inventories:
        digest.update(inventory.fingerprint.encode())
    return digest.hexdigest()


def changes(saved: Inventory, now: Inventory) -> str:
    """Returns how files differ from what they were, naming those that are missing, new, or changed; empty if they don't."""
    if saved.files == now.files:
        return ""
    before, after = ({file.name: file for file in inventory.files} for inventory in (saved, now))
    found = [
        *(f"{name} is missing" for name in before if name not in after),
        *(f"{name} is new" for name in after if name not in before),
        *(f"{name} has changed" for name in before if name in after and before[name] != after[name]),
    ] or ["the files are the same but in another order"]
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


class Source:
    """The row groups of a data set.

    Several threads may read a source.

    Args:
        locations: the files.
        inventory: what their footers say.
        metadata: the footers themselves.
        decoder: turns columns into arrays.
        skipped: what lies among the files and is not read, since it is not Parquet.
        byte_count: counts the compressed bytes of the column chunks that are read; shared with what is derived from this.
    """

    def __init__(
        self,
        locations: Sequence[Location],
        inventory: Inventory,
        metadata: Sequence[pq.FileMetaData],
        decoder: Decoder,
        skipped: Sequence[Location] = (),
        byte_count: ByteCount | None = None,
    ) -> None:
        self.byte_count = byte_count or ByteCount()
        self._locations, self._metadata = tuple(locations), tuple(metadata)
        self.inventory, self.decoder, self.skipped = inventory, decoder, tuple(skipped)
        self._idle: deque[tuple[int, pq.ParquetFile]] = deque()
        self._places: dict[int, dict[str, int | None]] = {}
        self._lock = threading.Lock()

    def narrowed(self, names: Sequence[str]) -> Source:
        """Returns a source of some columns alone."""
        return self._decoded_by(self.decoder.narrowed(names))

    def with_statistics(self, statistics: Statistics) -> Source:
        """Returns a source that standardises by these."""
        return self._decoded_by(self.decoder.with_statistics(statistics))

    def of(self, inventory: Inventory) -> Source:
        """Returns a source of another selection of the same files' rows."""
        assert inventory.files == self.inventory.files, "a selection is of the same files"
        return Source(self._locations, inventory, self._metadata, self.decoder, self.skipped, self.byte_count)

    def part(self, first: int, last: int) -> Source:
        """Returns a source of the files [first, last) alone."""
        assert self.inventory.selection is None, "rows are selected of the parts"
        files, metadata = self.inventory.files[first:last], self._metadata[first:last]
        return Source(self._locations[first:last], Inventory(files), metadata, self.decoder, self.skipped, self.byte_count)

    def _decoded_by(self, decoder: Decoder) -> Source:
        return Source(self._locations, self.inventory, self._metadata, decoder, self.skipped, self.byte_count)

    def describe_row(self, row: int) -> str:
        """Returns the file, row group and row of a row's number in the data set."""
        if row < 0:
            return "padding"
        rows = np.array([row], dtype=np.int64)
        group = self.inventory.row_groups[int(self.row_groups_of(rows)[0])]
        return f"{self.uri_of(group)}, row group {group.index}, row {int(self.rows_in_row_groups(rows)[0])}"

    def rows_in_row_groups(self, rows: IntArray) -> IntArray:
        """Returns where each of the data set's rows is in its row group, as the file has it."""
        of_rows, places = self.row_groups_of(rows), np.empty(len(rows), dtype=np.int64)
        for number in np.unique(of_rows).tolist():
            group = self.inventory.row_groups[number]
            selected, mine = self.inventory.selected_rows(group), of_rows == number
            places[mine] = rows[mine] - group.first_row
            if selected is not None:
                places[mine] = selected[places[mine]]
        return places

    def row_groups_of(self, rows: IntArray) -> IntArray:
        """Returns which row group of the data set holds each of its rows."""
        starts = np.array([group.first_row for group in self.inventory.row_groups])
        return np.searchsorted(starts, rows, side="right") - 1

    def uri_of(self, group: RowGroup) -> str:
        """Returns the URI of the file that holds a row group."""
        return self._locations[group.file].uri

    def id_types(self, column: str) -> list[pa.DataType]:
        """Returns the types of the ids in a column, or in its lists, as the files have them; nulls have none."""
        found = []
        for metadata in self._metadata:
            kind = metadata.schema.to_arrow_schema().field(column).type
            while is_list(kind) or pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not pa.types.is_null(kind):
                found.append(kind)
        return list(dict.fromkeys(found))

    def decoded_bytes(self) -> int:
        """Returns, from the footers alone, about how many bytes all decoded columns take."""
        total = (8 + 2 * self.decoder.quarantines) * self.inventory.num_file_rows
        for spec in self.decoder.specs:
            for metadata in self._metadata:
                place = _place_of(metadata, spec.column)
                for group in range(metadata.num_row_groups):
                    rows = metadata.row_group(group).num_rows
                    if spec.is_text:
                        size = 0 if place is None else metadata.row_group(group).column(place).total_uncompressed_size
                        words = self.decoder.lookups_of_text(spec, size)
                        total += rows * 8 + 8 * (words if spec.max_length is None else min(words, rows * spec.max_length))
                        continue
                    if not spec.is_list:
                        total += rows * (8 if spec.table is not None else 4)
                        continue
                    values = 0 if place is None else metadata.row_group(group).column(place).num_values
                    kept = values if spec.max_length is None else min(values, rows * spec.max_length)
                    total += rows * 8 + kept * (12 if spec.second is not None else 8)
        return total * self.inventory.num_rows // max(self.inventory.num_file_rows, 1)

    @property
    def least_types(self) -> dict[str, np.dtype[Any]]:
        """The least integer types that hold all ids of each decoded column and all row numbers, and -1."""
        return {**self.decoder.integer_types, "row": np.min_scalar_type(-max(self.inventory.num_rows, 1))}

    def read_row_group(self, number: int, types: Mapping[str, np.dtype[Any]] | None = None) -> Columns:
        """Returns a row group, decoded.

        Args:
            number: of the row group in the data set.
            types: of columns whose ids are to be of a smaller type, which holds them all.

        Raises:
            DataError: if it cannot be read or holds what the config does not allow.
        """
        group = self.inventory.row_groups[number]
        rows = self.inventory.selected_rows(group)
        if self._locations[group.file].is_local:
            found: Rows = self._by_column(group, rows)
        else:
            found = _taken(self._read_columns(group, self.decoder.columns), rows)
        columns: Columns = {}
        for name, column in self.decoder.decode_each(found, self._where(group, 0, rows)):
            columns |= narrowed({name: column}, types or {})
        return columns

    def _by_column(self, group: RowGroup, rows: IntArray | None, skip: int = 0) -> RowsByColumn:
        """Returns a row group of a local file; an object store would be asked for each column."""
        read, shared = (lambda name: self._read_columns(group, [name])[name]), self.decoder.shared_columns
        return RowsByColumn(read, shared, group.num_file_rows, rows, skip)

    def _read_columns(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Returns columns of a whole row group, as Arrow has them."""
        try:
            self._count_bytes(group, columns)
            with self._file(group.file) as file:
                table = file.read_row_group(group.index, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unreadable(group, error) from error
        self._check_rows(group, table.num_rows)
        return table

    def find(self, number: int, names: Sequence[str], rows: IntArray) -> list[Finding]:
        """Reads rows of a row group again, for what is wrong with some of their columns whatever the config does about it.

        Args:
            number: of the row group in the data set.
            names: of decoded columns.
            rows: places among the row group's rows that are in the data set, ascending.

        Returns:
            Findings whose rows are such places.

        Raises:
            DataError: if it cannot be read.
        """
        group, decoder = self.inventory.row_groups[number], self.decoder.only(names)
        try:
            # A handle of its own: another thread may read.
            with self._parquet_file(group.file) as file:
                self._count_bytes(group, decoder.columns)
                table = file.read_row_group(group.index, columns=decoder.columns, use_threads=False)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unreadable(group, error) from error
        self._check_rows(group, table.num_rows)
        selected = self.inventory.selected_rows(group)
        found = decoder.find(_taken(_taken(table, selected), rows), self._where(group, 0))
        return [replace(finding, rows=rows[finding.rows]) for finding in found]

    def iter_row_group(
        self, number: int, batch_rows: int, skip_rows: int = 0
    ) -> Generator[tuple[int, Iterator[tuple[str, Flat | Ragged]]]]:
        """Yields a row group from a row on, at most so many rows at once: how many, and their columns one after the other.

        All columns of some rows are to be taken before the next rows are.

        Raises:
            DataError: if it cannot be read or holds what the config does not allow.
        """
        group = self.inventory.row_groups[number]
        if self._locations[group.file].is_local and group.num_file_rows <= batch_rows:
            selected = self.inventory.selected_rows(group)
            found = self._by_column(group, selected, skip_rows)
            rows = None if selected is None else selected[skip_rows:]
            if found.num_rows > 0:
                yield found.num_rows, self.decoder.decode_each(found, self._where(group, skip_rows, rows))
            return
        for batch, where in self.iter_tables(number, batch_rows):
            skip = max(skip_rows - where.first_row, 0)
            if skip < batch.num_rows:
                rows = None if where.rows is None else where.rows[skip:]
                part, where = batch.slice(skip), self._where(group, where.first_row + skip, rows)
                yield part.num_rows, self.decoder.decode_each(part, where)

    def iter_tables(self, number: int, batch_rows: int) -> Iterator[tuple[pa.RecordBatch, Where]]:
        """Yields what is selected of a row group, as Arrow has it, at most so many rows at once, and where they are.

        Raises:
            DataError: if it cannot be read.
        """
        group = self.inventory.row_groups[number]
        selected = self.inventory.selected_rows(group)
        position = 0
        batches = None
        while True:
            try:
                if batches is None:
                    # A handle of its own: a stream keeps it while others read the same file.
                    file = self._parquet_file(group.file, stream=True)
                    self._count_bytes(group, self.decoder.columns)
                    batches = file.iter_batches(
                        batch_size=batch_rows, row_groups=[group.index], columns=self.decoder.columns, use_threads=False
                    )
                batch = next(batches, None)
            except (OSError, pa.ArrowException, ValueError) as error:
                raise self._unreadable(group, error) from error
            if batch is None:
                break
            if selected is None:
                yield batch, self._where(group, position)
            else:
                first, last = np.searchsorted(selected, [position, position + batch.num_rows]).tolist()
                if first < last:
                    rows = selected[first:last]
                    yield _taken(batch, rows - position), self._where(group, first, rows)
            position += batch.num_rows
        self._check_rows(group, position)

    def _where(self, group: RowGroup, row: int, rows: IntArray | None = None) -> Where:
        return Where(self.uri_of(group), group.index, row, group.first_row + row, rows)

    @contextmanager
    def _file(self, number: int) -> Iterator[pq.ParquetFile]:
        """Opens a file for the caller alone: it is not known to bear two readers. It is kept open for the next ones."""
        with self._lock:
            found = next((one for one in self._idle if one[0] == number), None)
            if found is not None:
                self._idle.remove(found)
        file = self._parquet_file(number) if found is None else found[1]
        try:
            yield file
        finally:
            with self._lock:
                self._idle.append((number, file))
                surplus = self._idle.popleft()[1] if len(self._idle) > _OPEN_FILES else None
            if surplus is not None:
                surplus.close()

    def _parquet_file(self, number: int, stream: bool = False) -> pq.ParquetFile:
        """Opens a file anew. Pages that were written with a checksum are verified by it.

        Args:
            number: of the file.
            stream: whether a row group is to be read a little at a time. Of a local file then no more is in memory than the
                pages that are read; of an object store, where each request takes long, its chunks as they are compressed.
        """
        is_local = self._locations[number].is_local
        return pq.ParquetFile(
            self._locations[number].open_input(),
            metadata=self._metadata[number],
            buffer_size=_STREAM_BYTES if stream and is_local else 0,
            pre_buffer=not is_local,
            page_checksum_verification=True,
        )

    def _count_bytes(self, group: RowGroup, columns: Sequence[str]) -> None:
        """Counts a row group's chunks of some columns: pyarrow reads each whole."""
        chunks = self._metadata[group.file].row_group(group.index)
        places = self._places.setdefault(group.file, {})
        for column in columns:
            if column not in places:
                places[column] = _place_of(self._metadata[group.file], column)
        found = [place for column in columns if (place := places[column]) is not None]
        self.byte_count.add(sum(chunks.column(place).total_compressed_size for place in found))

    def _check_rows(self, group: RowGroup, rows: int) -> None:
        if rows != group.num_file_rows:
            raise self._unreadable(group, ValueError(f"it holds {rows} rows, its footer says {group.num_file_rows}"))

    def _unreadable(self, group: RowGroup, error: Exception) -> DataError:
        return DataError(
            f"{self.uri_of(group)}, row group {group.index}: cannot be read: {' '.join(str(error).split())} "
            f"(columns {', '.join(self.decoder.columns)}). The file is damaged or changed while it was read: write it anew."
        )


def _taken(table: pa.Table | pa.RecordBatch, rows: IntArray | None) -> pa.Table | pa.RecordBatch:
    return table if rows is None else table.take(pa.array(rows))


def joined(sources: Sequence[Source]) -> Source:
    """Returns the files of several sources as one data set, in their order; all have the first one's decoder."""
    return Source(
        [location for source in sources for location in source._locations],
        Inventory(tuple(file for source in sources for file in source.inventory.files)),
        [metadata for source in sources for metadata in source._metadata],
        sources[0].decoder,
    )


def open_source(patterns: Sequence[str], decoder: Decoder) -> Source:
    """Opens a data set: finds its files, reads their footers in parallel, and checks their schemas.

    Raises:
        DataError: if nothing matches, a file is not whole Parquet, a column is missing or of another type, or there are no
            rows.
    """
    locations, skipped = data_files(patterns)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(locations))) as pool:
        footers = list(pool.map(lambda location: _open_footer(location, decoder), locations))
    for _, _, refusals in footers:
        for refusal in refusals.values():
            raise DataError(refusal)
    inventory = Inventory(tuple(file for file, _, _ in footers))
    source = Source(locations, inventory, [metadata for _, metadata, _ in footers], decoder, skipped)
    if not source.inventory.num_rows:
        raise DataError(
            f"{', '.join(patterns)}: {len(locations)} files without a row. There must be at least one: "
            f"correct the path, or make the data anew."
        )
    return source


def inventory_of(patterns: Sequence[str]) -> Inventory:
    """Returns what the footers of a data set's files say, whatever their columns are.

    Raises:
        DataError: if nothing matches, or a file is not whole Parquet.
    """
    locations, _ = data_files(patterns)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(locations))) as pool:
        return Inventory(tuple(file for file, _ in pool.map(_read_footer, locations)))


def open_file(location: Location, decoder: Decoder) -> tuple[Source, dict[str, str]]:
    """Opens one file of a data set, with those of its columns that can be decoded. It may be without rows.

    Returns:
        The file as a source, and what is wrong with its other columns: name of the decoded column to message.

    Raises:
        DataError: if it is not whole Parquet.
    """
    file, metadata, refusals = _open_footer(location, decoder)
    return Source([location], Inventory((file,)), [metadata], _without(decoder, refusals)), refusals


def data_files(patterns: Sequence[str]) -> tuple[list[Location], list[Location]]:
    """Returns the files of a data set, and what is skipped: by name, or since neither name nor content is Parquet's.

    Raises:
        DataError: if nothing matches, or nothing that does is Parquet.
    """
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


def _open_footer(location: Location, decoder: Decoder) -> tuple[InventoryFile, pq.FileMetaData, dict[str, str]]:
    """Returns what a footer tells, and what is wrong with the file's columns."""
    file, metadata = _read_footer(location)
    refusals = _schema_refusals(location, metadata, decoder)
    columns = _without(decoder, refusals).columns
    if columns:
        _check_chunks(location, file.size_bytes, metadata, columns)
    return file, metadata, refusals


def _without(decoder: Decoder, names: Collection[str]) -> Decoder:
    return decoder.only([spec.name for spec in decoder.specs if spec.name not in names])


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
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{location.uri} cannot be read as Parquet: {' '.join(str(error).split())}. Write it anew."
        ) from error
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if sum(groups) != metadata.num_rows or any(rows < 0 for rows in groups):
        raise DataError(
            f"{location.uri}: its footer says {metadata.num_rows} rows, and row groups of {', '.join(map(str, groups[:8]))}"
            f"{', ...' if len(groups) > 8 else ''} rows. It is damaged: write it anew."
        )
    return InventoryFile(location.name, size, groups, digest), metadata


class _Unread(io.RawIOBase):
    """Stands for a file while only its footer is looked at: it counts what is asked of it, and has nothing to give."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.reads, self._place = size_bytes, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size_bytes}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        raise OSError("this file is not to be read")


def _check_chunks(location: Location, size_bytes: int, metadata: pq.FileMetaData, columns: list[str]) -> None:
    """Checks what a footer says of the parts of columns.

    Arrow looks at it when asked for it, and ends the process if it does not fit; when it prepares to read, it raises. So
    it prepares to read all row groups, of which nothing is there.
    """
    unread = _Unread(size_bytes)
    try:
        file = pq.ParquetFile(pa.PythonFile(unread, mode="r"), metadata=metadata, pre_buffer=True)
        next(file.iter_batches(columns=columns, use_threads=False), None)
    except (OSError, pa.ArrowException, ValueError) as error:
        if not unread.reads:
            raise DataError(
                f"{location.uri} cannot be read as Parquet: {' '.join(str(error).split())}. Write it anew."
            ) from error


def _schema_refusals(location: Location, metadata: pq.FileMetaData, decoder: Decoder) -> dict[str, str]:
    """Returns what is wrong with the columns of a file: name of the decoded column to message."""
    try:
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{location.uri}: its schema cannot be read: {error}. Write it anew.") from error
    refusals: dict[str, str] = {}
    for spec in decoder.specs:
        for column in (spec.column, spec.second):
            refusal = None if column is None else _column_refusal(location, schema, decoder, spec, column)
            if refusal is not None:
                refusals.setdefault(spec.name, refusal)
    return refusals


def _column_refusal(location: Location, schema: pa.Schema, decoder: Decoder, spec: ColumnSpec, column: str) -> str | None:
    count = schema.names.count(column)
    if not count and f"/{column}=" in location.uri:
        return (
            f"{location.uri} has no column '{column}', which '{spec.name}' needs: it stands in the folder's name, which is "
            f"not read. Write the column into the files."
        )
    if not count:
        return f"{location.uri} has no column '{column}', which '{spec.name}' needs. {nearest(column, schema.names)}"
    if count > 1:
        return (
            f"{location.uri} has {count} columns named '{column}', and '{spec.name}' needs one. "
            f"Write the others under other names, or leave them out."
        )
    kind = schema.field(column).type
    needed = decoder.check_type(spec, column, kind)
    if needed is None:
        return None
    return (
        f"{location.uri}: column '{column}' is {kind}, '{spec.name}' needs {needed}. "
        f"Write the column so, or name another column in the config."
    )


def _place_of(metadata: pq.FileMetaData, column: str) -> int | None:
    """Returns which of a file's leaves holds a column's values; None where it has none."""
    for place in range(metadata.num_columns):
        path = metadata.schema.column(place).path  # row groups say it again, but a damaged one may not be text
        if path == column or path.startswith(f"{column}."):
            return place
    return None
