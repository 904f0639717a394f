"""A text file that grows by lines, on any filesystem.

A disk takes each line at once. An object store can't append: there the lines wait until they are kept, when the whole file
is put anew. Lines that another process has put there meanwhile are put again, so that the file never loses any.
"""

from __future__ import annotations

__all__ = ["LineFile"]

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from embedshard.storage import Location, PathOrUri, locate, reaching


class LineFile:
    """A file to which this process adds lines. One that was cut off in the midst of a line goes on with a line of its own.

    Args:
        place: the file; its folder is made where it is not there.
    """

    def __init__(self, place: PathOrUri | Location) -> None:
        self._location = locate(place)
        self._own: list[str] = []
        self._others, self._size, self._has_new = b"", 0, False
        self._file: TextIO | None = None
        if self._location.is_local:
            path = Path(self._location.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            is_cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", encoding="utf-8", buffering=1)
            if is_cut_off:
                self._file.write("\n")

    def add(self, line: str) -> None:
        """Adds a line, given without its end."""
        if self._file is not None:
            self._file.write(line + "\n")
            return
        self._own.append(line)
        self._has_new = True

    def keep(self) -> None:
        """Makes the lines so far outlive this process and a power cut.

        Raises:
            StorageError: if they cannot be written.
        """
        with reaching(self._location):
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
            elif self._has_new:
                self._put()

    def close(self) -> None:
        """Keeps the lines and closes the file. It may be called again.

        Raises:
            StorageError: if they cannot be written.
        """
        if self._file is None:
            self.keep()
        elif not self._file.closed:
            self._file.close()

    def _put(self) -> None:
        """Puts the whole file: what others have written, then what this process has."""
        if not self._size:
            self._location.parent.make_dirs()
        size = 0
        with suppress(FileNotFoundError):
            size = self._location.size()
        if size != self._size:
            self._others = _without(self._location.read_bytes(), self._own) if size else b""
        content = self._others + "".join(f"{line}\n" for line in self._own).encode()
        self._location.write_bytes_atomically(content)
        self._size, self._has_new = len(content), False


def _without(content: bytes, lines: Sequence[str]) -> bytes:
    """Returns the lines of a file that are not among these, whole."""
    known = {line.encode() for line in lines}
    return b"".join(line + b"\n" for line in content.split(b"\n") if line and line not in known)
