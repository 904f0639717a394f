"""Paths and URIs, for data, checkpoints and exports: every file goes through pyarrow's filesystems."""

from __future__ import annotations

__all__ = ["Location", "expand", "locate"]

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from embedshard.errors import ConfigError, DataError

_GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")


@dataclass(frozen=True)
class Location:
    """A path in a filesystem.

    Attributes:
        filesystem: pyarrow's.
        path: within it.
        uri: as a person would write it, for messages.
    """

    filesystem: fs.FileSystem
    path: str
    uri: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's filesystem."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def join(self, *parts: str) -> Location:
        """Returns a location below this one."""
        tail = "/".join(parts)
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{tail}", f"{self.uri.rstrip('/')}/{tail}")

    def info(self) -> Any:
        """Returns pyarrow's FileInfo."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Returns whether there is a file or a folder."""
        return bool(self.info().type != fs.FileType.NotFound)

    def size(self) -> int:
        """Returns a file's bytes; raises FileNotFoundError where there is none."""
        info = self.info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(self.uri)
        return int(info.size)

    def open_input(self) -> Any:
        """Opens a file for random access."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """Returns a file's content."""
        with self.open_input() as file:
            content: bytes = file.read()
        return content

    def write_bytes_atomically(self, data: bytes) -> None:
        """Writes a file so that a reader sees the former or the new one, never a part.

        By a rename on this machine's filesystem, by one PUT on an object store.
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        target = Path(self.path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)

    def make_dirs(self) -> None:
        """Makes the folder and those above it."""
        self.filesystem.create_dir(self.path, recursive=True)

    def children(self) -> list[Location]:
        """Returns what is in a folder, sorted by name; nothing where there is no folder."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted((self.join(info.base_name) for info in self.filesystem.get_file_info(selector)), key=_path)

    def delete(self) -> None:
        """Deletes a file, or a folder with all that is in it; nothing where there is none."""
        kind = self.info().type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path)


def _path(location: Location) -> str:
    return location.path


def sync_folder(folder: Path) -> None:
    """Makes renames within a local folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locate(path_or_uri: str) -> Location:
    """Returns the location of a path or URI (`s3://`, `gs://`, `file://`, ...).

    Raises:
        ConfigError: if pyarrow has no filesystem for the URI.
    """
    if not _SCHEME.match(path_or_uri):
        path = os.path.abspath(os.path.expanduser(path_or_uri))
        return Location(fs.LocalFileSystem(), path, path_or_uri)
    try:
        filesystem, path = fs.FileSystem.from_uri(path_or_uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        raise ConfigError(
            f"'{path_or_uri}' cannot be opened: {error}. Give a local path, or a URI with a scheme that pyarrow knows: "
            f"file, s3, gs (or gcs), abfs, hdfs."
        ) from error
    return Location(filesystem, path, path_or_uri)


def expand(patterns: Sequence[str]) -> list[Location]:
    """Returns the files that paths, folders and globs name, sorted by path, each once.

    A folder stands for the Parquet files in and below it. Names that begin with `_` or `.` are skipped, as writers put
    markers there. `**` stands for any folders.

    Raises:
        DataError: if a pattern matches nothing.
    """
    found: dict[str, Location] = {}
    for pattern in patterns:
        matches = list(_matches(pattern))
        if not matches:
            raise DataError(_nothing(pattern))
        found.update((match.path, match) for match in matches)
    return [found[path] for path in sorted(found)]


def _matches(pattern: str) -> Iterator[Location]:
    # The part behind the scheme may hold characters that a URI may not: split them off before.
    parts = pattern.split("/")
    fixed_count = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts))
    base = locate("/".join(parts[:fixed_count]) or ("/" if pattern.startswith("/") else "."))
    wanted = parts[fixed_count:]
    if not wanted:
        kind = base.info().type
        if kind == fs.FileType.File:
            yield base
        elif kind == fs.FileType.Directory:
            yield from (file for file in _below(base, recursive=True) if file.path.endswith(".parquet"))
        return
    expression = re.compile(_regular_expression(wanted))
    for file in _below(base, recursive=len(wanted) > 1 or "**" in wanted):
        if expression.fullmatch(file.path[len(base.path.rstrip("/")) + 1 :]):
            yield file


def _below(base: Location, recursive: bool) -> Iterator[Location]:
    prefix = base.path.rstrip("/")
    selector = fs.FileSelector(base.path or "/", allow_not_found=True, recursive=recursive)
    for info in base.filesystem.get_file_info(selector):
        inner = info.path[len(prefix) :].lstrip("/")
        if info.type == fs.FileType.File and not any(part.startswith(("_", ".")) for part in inner.split("/")):
            yield base.join(inner)


def _regular_expression(parts: Sequence[str]) -> str:
    pieces = [r"(?:[^/]+/)*" if part == "**" else _one_part(part) + "/" for part in parts]
    return "".join(pieces).removesuffix("/") if parts[-1] != "**" else "".join(pieces) + "[^/]+"


def _one_part(part: str) -> str:
    return fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")


def _nothing(pattern: str) -> str:
    parts = pattern.split("/")
    folder = locate("/".join(parts[:-1]) or ("/" if pattern.startswith("/") else "."))
    while not folder.exists() and "/" in folder.path.strip("/"):
        folder = Location(folder.filesystem, folder.path.rsplit("/", 1)[0] or "/", folder.uri.rsplit("/", 1)[0])
    names = [child.name for child in folder.children()]
    holds = "is empty" if not names else "holds " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{pattern}: no file matches. The nearest folder that exists, {folder.uri or '.'}, {holds}. "
        f"Correct the path, or make the data with the pipeline's prepare.py."
    )
