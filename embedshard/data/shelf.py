"""Decoded rows that wait for their window: in memory up to a limit, and beyond it in files that have no name."""

from __future__ import annotations

__all__ = ["Piece", "Shelf", "own_copy"]

import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from embedshard.data.columns import Columns, Flat, Ragged
from embedshard.errors import DataError

_FILE_BYTES: Final = 2**28


@dataclass(frozen=True)
class Piece:
    """Rows of a lane that follow each other in the epoch.

    Attributes:
        lane: whose they are.
        first: the first one's epoch row.
        columns: the rows.
    """

    lane: int
    first: int
    columns: Columns


@dataclass
class _File:
    handle: IO[bytes]
    size_bytes: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class _Written:
    """A piece in a file: of each column its name, and of each of its arrays, or None, the type and the number of values."""

    lane: int
    first: int
    file: _File
    begin: int
    columns: tuple[tuple[str, tuple[tuple[np.dtype[Any], int] | None, ...]], ...]


@dataclass
class Shelf:
    """Pieces by the window in which their rows are trained.

    For several threads, of which one at a time writes or reads files. What was written is gone with the shelf, and with the
    process however it ends.

    Args:
        limit_bytes: that are held in memory; what is put beyond them goes to a file in the folder of temporary files.

    Attributes:
        held_bytes: that are in memory.
        written_bytes: that went to files so far.
    """

    limit_bytes: int
    held_bytes: int = field(default=0, init=False)
    written_bytes: int = field(default=0, init=False)
    _windows: dict[int, list[Piece | _Written]] = field(default_factory=lambda: defaultdict(list), init=False)
    _file: _File | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def put(self, window: int, piece: Piece) -> None:
        """Puts a piece down, whose columns are the shelf's own from then on (`own_copy`).

        Raises:
            DataError: if a file has no room.
        """
        size = _size_bytes(piece.columns)
        with self._lock:
            is_held = self.held_bytes + size <= self.limit_bytes
            self.held_bytes += size if is_held else 0
            self._windows[window].append(piece if is_held else self._write(piece, size))

    def take(self, window: int) -> Piece | None:
        """Returns a piece of a window, and lets go of it; None if there is none any more."""
        with self._lock:
            pieces = self._windows.get(window)
            if not pieces:
                self._windows.pop(window, None)
                return None
            piece = pieces.pop()
            if isinstance(piece, _Written):
                return self._read(piece)
            self.held_bytes -= _size_bytes(piece.columns)
            return piece

    def clear(self) -> None:
        """Lets go of everything."""
        for pieces in self._windows.values():
            for piece in pieces:
                if isinstance(piece, _Written):
                    piece.file.handle.close()
        if self._file is not None:
            self._file.handle.close()
        self._windows.clear()
        self.held_bytes, self._file = 0, None

    def _write(self, piece: Piece, size: int) -> _Written:
        if self._file is None or self._file.size_bytes >= _FILE_BYTES:
            self._file = _File(tempfile.TemporaryFile(prefix="embedshard-rows-"))  # noqa: SIM115 - closed with its last piece
        file, columns = self._file, []
        begin = file.size_bytes
        try:
            file.handle.seek(begin)
            for name, column in piece.columns.items():
                arrays = _arrays(column)
                for array in arrays:
                    if array is not None:
                        file.handle.write(array.data)
                columns.append((name, tuple(None if array is None else (array.dtype, len(array)) for array in arrays)))
            file.handle.flush()
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()} has no room for rows that wait for their turn ({error}); {self.written_bytes:,} "
                f"bytes went there so far. Set TMPDIR to a folder with more room, or data.cache_bytes higher "
                f"({self.limit_bytes:,}), or write the data in smaller row groups."
            ) from error
        file.size_bytes += size
        file.waiting += 1
        self.written_bytes += size
        return _Written(piece.lane, piece.first, file, begin, tuple(columns))

    def _read(self, written: _Written) -> Piece:
        file, columns = written.file, {}
        file.handle.seek(written.begin)
        for name, arrays in written.columns:
            read = [None if array is None else _read_array(file.handle, *array) for array in arrays]
            columns[name] = Flat(read[0]) if len(read) == 1 else Ragged(*read)  # type: ignore[arg-type]
        file.waiting -= 1
        if not file.waiting and file is self._file:
            file.size_bytes = 0  # it begins anew
        elif not file.waiting:
            file.handle.close()
        return Piece(written.lane, written.first, columns)


def _arrays(column: Flat | Ragged) -> tuple[npt.NDArray[Any] | None, ...]:
    return (column.values,) if isinstance(column, Flat) else (column.values, column.offsets, column.weights)


def _size_bytes(columns: Columns) -> int:
    return sum(array.nbytes for column in columns.values() for array in _arrays(column) if array is not None)


def own_copy(column: Flat | Ragged, dtype: np.dtype[Any]) -> Flat | Ragged:
    """Returns a copy of a column with values of a type that holds them; offsets begin at 0."""
    if isinstance(column, Flat):
        return Flat(column.values.astype(dtype))
    first, last = int(column.offsets[0]), int(column.offsets[-1])
    weights = None if column.weights is None else column.weights[first:last].copy()
    is_short = last - first <= np.iinfo(np.int32).max
    offsets: npt.NDArray[Any] = (column.offsets - first).astype(np.int32 if is_short else np.int64)
    values: npt.NDArray[Any] = column.values[first:last].astype(dtype)
    return Ragged(values, offsets, weights)


def _read_array(handle: IO[bytes], dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    array = np.empty(count, dtype=dtype)
    if count and handle.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]
        raise DataError("rows that waited for their turn are not in their file of temporary files any more. Start again.")
    return array
