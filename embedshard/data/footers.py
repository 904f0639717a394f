"""Which files a data set has, and their footers: read, and checked against what is decoded.

Nothing else of a file is read here, so that a data set of many files is opened soon.
"""

from __future__ import annotations

__all__ = ["check_first_file", "data_files", "open_footer", "place_of", "read_footer", "readable"]

import hashlib
import io
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.decode import ColumnSpec, Decoder
from embedshard.data.inventory import InventoryFile
from embedshard.data.statistics import Statistics
from embedshard.errors import DataError, nearest
from embedshard.storage import Location, expand

_MAGIC = b"PAR1"
_PARQUET_NAMES = (".parquet", ".parq", ".pq")
_TAIL_BYTES = 8


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


def check_first_file(patterns: Sequence[str], specs: Sequence[ColumnSpec]) -> None:
    """Refuses a data set whose first file lacks a column, or has numbers of another type: before what takes a pass over all.

    Args:
        patterns: of the files.
        specs: what is to be decoded of them; types of ids are for vocabularies to say, which may not be there yet.

    Raises:
        DataError: saying what is wrong with the first column of which something is.
    """
    location = data_files(patterns)[0][0]
    _, metadata = read_footer(location)
    schema = _schema_of(location, metadata)
    decoder = Decoder(specs, {}, Statistics())
    for spec in specs:
        for column in (spec.column, spec.second):
            if column is not None and (spec.table is None or column not in schema.names):
                refusal = _column_refusal(location, schema, decoder, spec, column)
                if refusal is not None:
                    raise DataError(refusal)


def _begins_as_parquet(location: Location) -> bool:
    try:
        with location.open_input() as file:
            return bool(file.read(len(_MAGIC)) == _MAGIC)
    except OSError as error:
        raise DataError(f"{location.uri} cannot be read: {error}. See that it may be read, or exclude it.") from error


def open_footer(location: Location, decoder: Decoder) -> tuple[InventoryFile, pq.FileMetaData, dict[str, str]]:
    """Returns what a footer tells, and what is wrong with the file's columns: name of the decoded column to message.

    Raises:
        DataError: if it is not whole Parquet.
    """
    file, metadata = read_footer(location)
    refusals = _schema_refusals(location, metadata, decoder)
    columns = readable(decoder, refusals).columns
    if columns:
        _check_chunks(location, file.size_bytes, metadata, columns)
    return file, metadata, refusals


def readable(decoder: Decoder, refusals: Collection[str]) -> Decoder:
    """Returns a decoder of the columns with which nothing is wrong."""
    return decoder.only([spec.name for spec in decoder.specs if spec.name not in refusals])


def read_footer(location: Location) -> tuple[InventoryFile, pq.FileMetaData]:
    """Returns what a file's footer tells, whatever its columns are.

    Raises:
        DataError: if it is not whole Parquet.
    """
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
    schema = _schema_of(location, metadata)
    refusals: dict[str, str] = {}
    for spec in decoder.specs:
        for column in (spec.column, spec.second):
            refusal = None if column is None else _column_refusal(location, schema, decoder, spec, column)
            if refusal is not None:
                refusals.setdefault(spec.name, refusal)
    return refusals


def _schema_of(location: Location, metadata: pq.FileMetaData) -> pa.Schema:
    try:
        return metadata.schema.to_arrow_schema()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{location.uri}: its schema cannot be read: {error}. Write it anew.") from error


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


def place_of(metadata: pq.FileMetaData, column: str) -> int | None:
    """Returns which of a file's leaves holds a column's values; None where it has none."""
    for place in range(metadata.num_columns):
        path = metadata.schema.column(place).path  # row groups say it again, but a damaged one may not be text
        if path == column or path.startswith(f"{column}."):
            return place
    return None
