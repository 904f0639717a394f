"""Paths and URIs, for data, checkpoints and exports: every file goes through pyarrow's filesystems.

What differs between a disk and an object store is decided here and nowhere else: on a disk a file appears by a rename
and is flushed to the device; on an object store it appears by one PUT. This module must not know what the files hold.
"""

from __future__ import annotations

__all__ = ["Expansion", "Location", "PathOrUri", "expand", "expand_each", "locate", "reaching"]

import errno
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from embedshard.errors import ConfigError, DataError, StorageError

PathOrUri = str | os.PathLike[str]
"""As a person writes it: a local path, or a URI, which is never a `Path`: that would make `s3:/` of `s3://`."""

_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_OBJECT_STORES = ("s3", "gcs", "abfs")
_GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
_HIDDEN = ("_", ".")


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
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder that it is in; the root is in itself."""
        path = self.path.rstrip("/").rpartition("/")[0] or ("/" if self.path.startswith("/") else "")
        uri = self.uri.rstrip("/").rpartition("/")[0]
        return Location(self.filesystem, path, uri or path or self.uri)

    @property
    def quoted(self) -> str:
        """Its URI as one word of a shell, for commands to paste."""
        return shlex.quote(self.uri)

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's filesystem."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def address(self) -> str:
        """What names it from any working folder: the absolute path, links resolved, of a local one, else the URI."""
        return os.path.realpath(self.path) if self.is_local else self.uri.rstrip("/")

    def join(self, *parts: str) -> Location:
        """Returns a location below this one."""
        tail = "/".join(parts)
        return Location(self.filesystem, _joined(self.path, tail), _joined(self.uri, tail))

    def exists(self) -> bool:
        """Returns whether there is a file or a folder."""
        return bool(self._kind() != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Returns whether there is a file."""
        return bool(self._kind() == fs.FileType.File)

    def size(self) -> int:
        """Returns a file's bytes; raises FileNotFoundError where there is none."""
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.uri)
        return int(info.size)

    def version(self) -> tuple[int, int]:
        """Returns a file's bytes and when it was written, in nanoseconds; raises FileNotFoundError where there is none."""
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.uri)
        return int(info.size), int(info.mtime_ns or 0)

    def open_input(self) -> pa.NativeFile:
        """Opens a file for random access; a context manager."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """Returns a file's content."""
        with self.open_input() as file:
            content: bytes = file.read()
        return content

    def read_text(self) -> str:
        """Returns the content of a file in UTF-8; bytes that are none become replacement characters."""
        return self.read_bytes().decode("utf-8", errors="replace")

    def write_bytes_atomically(self, data: bytes) -> None:
        """Writes a file so that a reader sees the former or the new one, never a part, and it outlives a power cut.

        On an object store by one PUT, elsewhere by a rename. The folder must exist.
        """
        partial_name = f".{self.name}.{uuid.uuid4().hex}.part"
        if not self.is_local:
            is_put = self.filesystem.type_name in _OBJECT_STORES
            written = self if is_put else self.parent.join(partial_name)
            with self.filesystem.open_output_stream(written.path) as stream:
                stream.write(data)
            if not is_put:
                self.filesystem.move(written.path, self.path)
            return
        target = Path(self.path)
        partial = target.with_name(partial_name)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def write_text_atomically(self, text: str) -> None:
        """Writes a UTF-8 file as `write_bytes_atomically` does."""
        self.write_bytes_atomically(text.encode("utf-8"))

    def put_file(self, source: Path) -> None:
        """Writes a copy of a local file as `write_bytes_atomically` does, a part at a time. The folder must exist."""
        local = fs.LocalFileSystem()
        if not self.is_local:
            is_put = self.filesystem.type_name in _OBJECT_STORES
            written = self if is_put else self.parent.join(f".{self.name}.{uuid.uuid4().hex}.part")
            fs.copy_files(str(source), written.path, source_filesystem=local, destination_filesystem=self.filesystem)
            if not is_put:
                self.filesystem.move(written.path, self.path)
            return
        target = Path(self.path)
        partial = target.with_name(f".{self.name}.{uuid.uuid4().hex}.part")
        try:
            shutil.copyfile(source, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def replace_by(self, source: Location) -> None:
        """Puts a file of the same filesystem here, over what is here; it is no longer there. The folder must exist.

        On a disk by a rename that outlives a power cut; on an object store by a copy, which appears whole, and a deletion.
        """
        if not self.is_local and self.filesystem.type_name not in _OBJECT_STORES:
            self.delete_file()
        self.filesystem.move(source.path, self.path)
        if self.is_local:
            _sync_folder(Path(self.path).parent)
            _sync_folder(Path(source.path).parent)

    def sync(self) -> None:
        """Makes the content of a local file outlive a power cut; what is elsewhere is its filesystem's."""
        if self.is_local:
            with Path(self.path).open("rb") as file:
                os.fsync(file.fileno())
            _sync_folder(Path(self.path).parent)

    def get_file(self, target: Path) -> None:
        """Copies a file to a local one, a part at a time."""
        local = fs.LocalFileSystem()
        fs.copy_files(self.path, str(target), source_filesystem=self.filesystem, destination_filesystem=local)

    def make_dirs(self) -> None:
        """Makes the folder and those above it; does nothing where it exists."""
        if self.exists():
            return
        self.filesystem.create_dir(self.path, recursive=True)
        if self.is_local:
            _sync_folder(Path(self.path).parent)

    def list_names(self) -> list[str]:
        """Returns the names of what is in a folder, sorted; none where there is no folder."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        try:
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        except FileNotFoundError:  # pyarrow lists, looks again, and raises where the folder was made in between
            return []

    def delete_file(self) -> None:
        """Deletes a file; does nothing where there is none."""
        with suppress(FileNotFoundError):
            if self.exists():
                self.filesystem.delete_file(self.path)

    def delete_tree(self) -> None:
        """Deletes a folder and all that is in it; does nothing where there is none."""
        with suppress(FileNotFoundError):
            if self.exists():
                self.filesystem.delete_dir(self.path)

    def _kind(self) -> fs.FileType:
        return self.filesystem.get_file_info(self.path).type


def locate(place: PathOrUri | Location, filesystem: fs.FileSystem | None = None) -> Location:
    """Returns the location of a local path (relative ones and `~` too) or of a URI (`s3://`, `gs://`, `file://`, ...).

    Credentials, region and endpoint of an object store are taken from the environment by pyarrow, or from the URI.

    Args:
        place: as a person writes it; a location is returned as it is.
        filesystem: if given, what the path is in; it is then no URI.

    Raises:
        ConfigError: if pyarrow has no filesystem for the URI, or cannot open it.
    """
    if isinstance(place, Location):
        return place
    path_or_uri = os.fspath(place)
    if filesystem is not None:
        return Location(filesystem, path_or_uri.rstrip("/"), path_or_uri)
    scheme = _SCHEME.match(path_or_uri)
    if scheme is None:
        if not path_or_uri:
            raise ConfigError("a path is empty. Give a local path or a URI.")
        return Location(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path_or_uri)), path_or_uri)
    if scheme[1].lower() not in _SCHEMES:
        raise ConfigError(
            f"'{path_or_uri}' has the scheme '{scheme[1]}', and pyarrow has no filesystem for it. Give a local path "
            f"or one of these: {', '.join(_SCHEMES)}."
        )
    try:
        filesystem, path = fs.FileSystem.from_uri(path_or_uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(
            f"'{path_or_uri}' cannot be opened: {' '.join(str(error).split())}. "
            f"Correct the URI, or see that its server can be reached and lets you in."
        ) from error
    if isinstance(filesystem, fs.LocalFileSystem):
        path = os.path.abspath(path)
    return Location(filesystem, path.rstrip("/") or "/", path_or_uri)


@contextmanager
def reaching(location: Location) -> Iterator[None]:
    """Tells of a failure to read or write there as an error that a user can act on.

    Raises:
        StorageError: for what the filesystem raises.
    """
    try:
        yield
    except OSError as error:
        detail = " ".join(str(error).split()).rstrip(".")
        advice = "See that the disk is there, has space and may be written."
        if not location.is_local:
            advice = (
                "See that the bucket exists, that its server can be reached, and that it lets you in: the endpoint, region "
                "and credentials are taken from the environment (for S3: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, "
                "AWS_ACCESS_KEY_ID, ...)."
            )
        raise StorageError(f"{location.uri} cannot be read or written: {detail}. {advice}") from error


@dataclass(frozen=True)
class Expansion:
    """What paths, folders and globs name.

    Attributes:
        files: sorted by path, each once.
        spelled_out: the paths of those among them that were given in full, not by a glob or a folder.
        skipped: what lies among them and is not meant, sorted by path.
    """

    files: list[Location]
    spelled_out: frozenset[str]
    skipped: list[Location]


def expand(patterns: Sequence[str], filesystem: fs.FileSystem | None = None) -> Expansion:
    """Returns the files that paths, folders and globs name, and what is skipped among them.

    `*`, `?` and `[...]` stand for characters of a name, `**` for any folders. A folder stands for the `*.parquet` files
    in and below it; the others are skipped. So are names that begin with `_` or `.`, as writers put markers there, unless
    the pattern spells that character.

    Args:
        patterns: local paths or URIs, with or without globs.
        filesystem: if given, what the patterns are in; they are then no URIs.

    Raises:
        ConfigError: if a URI has no filesystem.
        DataError: if a pattern matches nothing, or a folder cannot be read.
    """
    found: dict[tuple[str, str], Location] = {}
    skipped: dict[tuple[str, str], Location] = {}
    spelled_out = set()
    for pattern in patterns:
        # The glob part may hold characters that a URI may not: split it off before the rest is parsed.
        parts = pattern.rstrip("/").split("/")
        num_fixed = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts))
        base = locate("/".join(parts[:num_fixed]) or _start(pattern, filesystem), filesystem)
        try:
            matches, passed_over = _matches(base, parts[num_fixed:])
        except OSError as error:
            raise DataError(
                f"{pattern}: {base.uri} cannot be looked through ({error}). See that it may be read and can be reached."
            ) from error
        if not matches:
            raise DataError(_nothing(pattern, base))
        literal = base.join(*parts[num_fixed:]) if num_fixed < len(parts) else base
        if matches == [literal]:
            spelled_out.add(literal.path)
        for places, locations in ((found, matches), (skipped, passed_over)):
            for location in locations:
                places.setdefault((location.path, location.filesystem.type_name), location)
    return Expansion(
        [found[key] for key in sorted(found)],
        frozenset(spelled_out),
        [skipped[key] for key in sorted(skipped) if key not in found],
    )


def expand_each(pattern: str) -> list[tuple[str, Location]]:
    """Returns the folders and files that a glob itself names, each with its path below the glob's fixed part.

    They are in the order of these paths, numbers in them by value: `day=9` is before `day=10`. Names that begin with `_` or
    `.` are left out unless the pattern spells that character. A pattern without a glob names the one thing, if it is there.

    Raises:
        ConfigError: if the URI has no filesystem.
        DataError: if a folder cannot be read.
    """
    parts = pattern.rstrip("/").split("/")
    num_fixed = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts))
    base, wanted = locate("/".join(parts[:num_fixed]) or _start(pattern, None)), parts[num_fixed:]
    try:
        if not wanted:
            return [(base.name, base)] if base.exists() else []
        below = _below(base, recursive=len(wanted) > 1 or wanted[0] == "**") if base.exists() else ()
        found = [names for _, names in below if _fits(names, wanted)]
    except OSError as error:
        raise DataError(
            f"{pattern}: {base.uri} cannot be looked through ({error}). See that it may be read and can be reached."
        ) from error
    return [("/".join(names), base.join(*names)) for names in sorted(found, key=_by_value)]


def _by_value(names: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Returns what sorts a path with the numbers in it by value, and equal values by how they are written."""
    return [
        [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
        for name in names
    ]


def _start(pattern: str, filesystem: fs.FileSystem | None) -> str:
    """Where a pattern without a fixed part begins."""
    if pattern.startswith("/"):
        return "/"
    return "." if filesystem is None and pattern else ""


def _joined(folder: str, tail: str) -> str:
    return f"{folder.rstrip('/')}/{tail}" if folder else tail


def _matches(base: Location, wanted: Sequence[str]) -> tuple[list[Location], list[Location]]:
    """Returns what a pattern names, and what is skipped."""
    literal = base.join(*wanted) if wanted else base  # a name may hold the characters of a glob
    kind = literal.filesystem.get_file_info(literal.path).type if literal.path else fs.FileType.Directory
    found: list[Location] = []
    skipped: list[Location] = []
    if kind == fs.FileType.File:
        found.append(literal)
    elif kind == fs.FileType.Directory:
        _add_folder(literal, found, skipped)
    elif wanted and not base.is_file():
        for info, names in _below(base, recursive=len(wanted) > 1 or wanted[0] == "**"):
            match = base.join(*names)
            if not _fits(names, wanted):
                if info.type == fs.FileType.File and _fits(names, wanted, with_hidden=True):
                    skipped.append(match)
            elif info.type == fs.FileType.File:
                found.append(match)
            elif wanted[-1] != "**":
                _add_folder(match, found, skipped)
    return found, skipped


def _add_folder(folder: Location, found: list[Location], skipped: list[Location]) -> None:
    for info, names in _below(folder, recursive=True):
        if info.type == fs.FileType.File:
            (found if _fits(names, ("**", "*.parquet")) else skipped).append(folder.join(*names))


def _below(folder: Location, recursive: bool) -> Iterator[tuple[fs.FileInfo, list[str]]]:
    """Yields what is below a folder, with the names that lead there."""
    prefix = f"{folder.path.rstrip('/')}/" if folder.path else ""
    selector = fs.FileSelector(folder.path, allow_not_found=True, recursive=recursive)
    for info in folder.filesystem.get_file_info(selector):
        yield info, info.path.removeprefix(prefix).split("/")


def _fits(names: Sequence[str], wanted: Sequence[str], with_hidden: bool = False) -> bool:
    """Returns whether the names of a path fit the parts of a pattern."""
    if not wanted or not names:
        return not names and all(part == "**" for part in wanted)
    name, part = names[0], wanted[0]
    if name.startswith(_HIDDEN) and name[0] != part[:1] and not with_hidden:
        return part == "**" and _fits(names, wanted[1:])
    if part == "**":
        return _fits(names, wanted[1:], with_hidden) or _fits(names[1:], wanted, with_hidden)
    return fnmatchcase(name, part) and _fits(names[1:], wanted[1:], with_hidden)


def _nothing(pattern: str, base: Location) -> str:
    folder = base
    while folder.path.strip("/") and not folder.exists():
        folder = folder.parent
    if folder.is_file():
        return f"{pattern}: {folder.uri} is a file, not a folder. Correct the path."
    names = folder.list_names()
    holds = "is empty" if not names else "holds " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{pattern}: no file matches. The nearest folder that exists, {folder.uri or '/'}, {holds}. "
        f"A folder stands for its *.parquet files. Correct the path, or make the data first."
    )


def _sync_folder(folder: Path) -> None:
    """Makes the names in a local folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
