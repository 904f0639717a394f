"""A delta: what makes a later export of an earlier one, as a folder of its own, with a manifest that is written last.

Of each file that is another than before there is the least of these: the rows that changed, the bytes that changed, or all
of it. Which it is was decided by making the file again, and comparing its SHA-256 with what it has to be.
"""

from __future__ import annotations

__all__ = [
    "RESULT",
    "Change",
    "ChangedBytes",
    "ChangedRows",
    "DeltaManifest",
    "Digest",
    "OpenDelta",
    "Side",
    "State",
    "WholeFile",
    "check_delta_folder",
    "open_delta",
    "prepare_delta_folder",
    "rebuild",
    "side_of",
    "write_delta",
]

import hashlib
import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedshard import __version__
from embedshard.errors import ExportError
from embedshard.export.delta_bytes import rebuild_bytes, write_byte_changes
from embedshard.export.delta_rows import rebuild_rows, write_row_changes
from embedshard.export.manifest import (
    DELTA_MARKER,
    MANIFEST,
    VERIFICATION,
    FileHash,
    FileName,
    Manifest,
    OpenExport,
    hash_file,
    is_run,
)
from embedshard.storage import Location, PathOrUri, locate, reaching

_TARGET: Final = "target.json"
_ROWS, _REMOVED, _BYTES, _WHOLE = "rows", "removed", "bytes", "files"
_FOLDERS: Final = (_ROWS, _REMOVED, _BYTES, _WHOLE)
RESULT: Final = "result"
"""The folder of a delta in which the export is written that it is made of; it goes when the delta is there."""
_WORTH: Final = 0.9
"""What takes more than this of the file is no saving: the file is written whole."""
_CHUNK: Final = 2**22

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
PartName = Annotated[str, Field(pattern=rf"^{_NAME}(/{_NAME}){{0,2}}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ChangedRows(_Model):
    """Rows of a Parquet file.

    Attributes:
        kind: tells it from the others.
        rows: the part with the rows that changed or are new, with their places in the file and in the earlier one (`base`).
        removed: the part with the places (`base`), rows and ids of those that are there no longer; None where none is.
        changed: how many are others than before.
        added: how many are new, or stand in another order.
        gone: how many are there no longer, or stood in another order.
        kept: how many are as they were.
        row_groups: rows of each.
    """

    kind: Literal["rows"] = "rows"
    rows: PartName
    removed: PartName | None
    changed: Count
    added: Count
    gone: Count
    kept: Count
    row_groups: list[Count]


class ChangedBytes(_Model):
    """Bytes of a file of any kind.

    Attributes:
        kind: tells it from the others.
        bytes: the part with the spans that changed: `offset` and `bytes`.
        changed: bytes in them.
    """

    kind: Literal["bytes"] = "bytes"
    bytes: PartName
    changed: Count


class WholeFile(_Model):
    """A file as it is.

    Attributes:
        kind: tells it from the others.
        file: the part.
    """

    kind: Literal["whole"] = "whole"
    file: PartName


Change = ChangedRows | ChangedBytes | WholeFile


class State(_Model):
    """An export, by what names it for good.

    Attributes:
        run: the run's folder, its name alone.
        step: of the checkpoint.
        sha256: of its manifest.
    """

    run: str
    step: int
    sha256: Sha256


class DeltaManifest(_Model):
    """All of a delta.

    Attributes:
        kind: that it is no export.
        format: of this manifest.
        embedshard: the version that wrote it.
        pyarrow: the version that wrote it: another may write the same rows in other bytes.
        written: when, in ISO 8601.
        base: the export that it is applied to.
        target: what that becomes.
        manifest: the part with the target's manifest, in which all its files and their hashes are.
        changes: of each file of the target that is another than the base's, or new.
        removed: files of the base that the target has not.
        parts: the files of the delta.
    """

    kind: Literal["delta"] = "delta"
    format: Literal[1] = 1
    embedshard: str
    pyarrow: str
    written: str
    base: State
    target: State
    manifest: PartName
    changes: dict[FileName, Annotated[Change, Field(discriminator="kind")]]
    removed: list[FileName]
    parts: dict[PartName, FileHash]


@dataclass(frozen=True)
class Side:
    """An export, wherever its files lie.

    Attributes:
        state: which it is.
        text: its manifest, as it is written.
        files: size and SHA-256 of each.
        place: returns where a file lies that was compared with these; raises ExportError where it is another.
    """

    state: State
    text: bytes
    files: Mapping[str, FileHash]
    place: Callable[[str], Location]


@dataclass(frozen=True)
class OpenDelta:
    """A delta that is whole as far as its manifest tells. Made by `open_delta`."""

    folder: Location
    manifest: DeltaManifest

    def part(self, name: str) -> Location:
        """Returns a part, after it was compared with the manifest.

        Raises:
            ExportError: naming the part, if it is missing or another than was written.
        """
        place, expected = self.folder.join(*name.split("/")), self.manifest.parts.get(name)
        if expected is None or not place.is_file() or hash_file(place) != expected:
            what = "is not what was written" if place.is_file() else "is missing"
            raise ExportError(f"{place.uri} {what}: the delta is damaged. {_again(self.folder)}")
        return place

    def target(self) -> tuple[bytes, Manifest]:
        """Returns the manifest of the export that it makes, as it is written, and parsed."""
        text = self.part(self.manifest.manifest).read_bytes()
        try:
            return text, Manifest.model_validate_json(text)
        except ValidationError as error:
            raise ExportError(f"{self.folder.join(self.manifest.manifest).uri} is damaged. {_again(self.folder)}") from error


class Digest(io.RawIOBase):
    """A file that is not kept: its size and SHA-256 are."""

    def __init__(self) -> None:
        super().__init__()
        self._hash, self._size = hashlib.sha256(), 0

    def writable(self) -> bool:
        """It can be written."""
        return True

    def write(self, data: Any) -> int:
        """Takes bytes."""
        self._hash.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        """Returns how many there were."""
        return self._size

    def result(self) -> FileHash:
        """Returns what was written."""
        return FileHash(size=self._size, sha256=self._hash.hexdigest())


def side_of(export: OpenExport) -> Side:
    """Returns an export as one side of a delta."""
    text = export.folder.join(MANIFEST).read_bytes()
    sha256 = hashlib.sha256(text).hexdigest()
    manifest = export.manifest
    return Side(State(run=manifest.run, step=manifest.step, sha256=sha256), text, manifest.files, export.file)


def write_delta(base: Side, target: Side, folder: Location, say: Callable[[str], None] = lambda file: None) -> DeltaManifest:
    """Writes what makes the target of the base, its manifest last; each file is made again and compared as it is written.

    Args:
        base: the earlier export.
        target: the later one.
        folder: of the delta; it is there.
        say: is told the file at hand.

    Raises:
        ExportError: if a file of either is not what its manifest says.
    """
    changes: dict[str, Change] = {}
    for name, expected in sorted(target.files.items()):
        if base.files.get(name) != expected:
            say(name)
            changes[name] = _written(base, target, name, folder)
    folder.join(_TARGET).write_bytes_atomically(target.text)
    names = [_TARGET, *(part for change in changes.values() for part in _parts(change))]
    manifest = DeltaManifest(
        embedshard=__version__,
        pyarrow=pa.__version__,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        base=base.state,
        target=target.state,
        manifest=_TARGET,
        changes=changes,
        removed=sorted(base.files.keys() - target.files.keys()),
        parts={name: hash_file(folder.join(*name.split("/"))) for name in names},
    )
    folder.join(MANIFEST).write_text_atomically(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def rebuild(change: Change, base: Callable[[], Location], part: Callable[[str], Location], size: int, sink: Any) -> None:
    """Writes a file of the target.

    Args:
        change: of it.
        base: returns where the base's lies.
        part: returns where a part of the delta lies.
        size: of the file.
        sink: a file that is open to write.

    Raises:
        ExportError: if the parts do not fit the base.
    """
    try:
        if isinstance(change, ChangedRows):
            removed = None if change.removed is None else part(change.removed)
            rebuild_rows(base(), part(change.rows), removed, change.row_groups, sink)
        elif isinstance(change, ChangedBytes):
            rebuild_bytes(base(), part(change.bytes), size, sink)
        else:
            with part(change.file).open_input() as file:
                while chunk := file.read(_CHUNK):
                    sink.write(chunk)
    except pa.ArrowException as error:
        raise ExportError(f"a file of a delta cannot be made: {error}. Write the delta again.") from error


def check_delta_folder(folder: Location) -> None:
    """Checks that a delta can be written to a folder: it is new, or that of an earlier delta. Nothing is touched.

    Raises:
        ExportError: if something else is there.
    """
    names = [] if folder.is_file() else folder.list_names()
    if folder.is_file() or (names and DELTA_MARKER not in names):
        shown = "is a file" if folder.is_file() else f"holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        raise ExportError(f"{folder.uri} {shown} and is no earlier delta, so it is not written over. Name a new folder.")


def prepare_delta_folder(folder: Location) -> None:
    """Makes the folder of a delta, or empties that of an earlier one; its manifest goes first.

    Raises:
        ExportError: if something else is there.
    """
    check_delta_folder(folder)
    names = folder.list_names()
    folder.make_dirs()
    folder.join(MANIFEST).delete_file()
    folder.join(DELTA_MARKER).write_text_atomically(
        "What makes a later export of embedshard of an earlier one: it is whole if it has a manifest.json.\n"
    )
    for name in names:
        if name in (*_FOLDERS, RESULT):
            folder.join(name).delete_tree()
        elif name in (_TARGET, VERIFICATION):
            folder.join(name).delete_file()


def open_delta(place: PathOrUri | Location) -> OpenDelta:
    """Opens a delta: reads its manifest; parts are checked as they are used.

    Raises:
        ExportError: if it is none, did not finish, or its manifest is damaged.
        StorageError: if it cannot be read.
    """
    folder = locate(place)
    with reaching(folder):
        if not folder.join(MANIFEST).is_file():
            why = "has no manifest, so its writing did not finish or what it makes did not pass verification"
            if folder.join(DELTA_MARKER).exists():
                raise ExportError(f"{folder.uri} {why}. {_again(folder)}")
            if folder.exists() and is_run(folder):
                more = f"Write one of it: embedshard export {folder.uri} DELTA --since EXPORT"
                raise ExportError(f"{folder.uri} is the folder of a run, not a delta. {more}")
            why = "holds no delta" if folder.exists() else "is not there"
            raise ExportError(f"{folder.uri} {why}. Write one: embedshard export RUN_DIR DELTA --since EXPORT")
        content = folder.join(MANIFEST).read_bytes()
    try:
        return OpenDelta(folder, DeltaManifest.model_validate_json(content))
    except ValidationError as error:
        try:
            Manifest.model_validate_json(content)
        except ValidationError:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            message = f"{folder.join(MANIFEST).uri} is damaged: {where or 'it'}: {detail['msg']}. {_again(folder)}"
            raise ExportError(message) from error
        raise ExportError(f"{folder.uri} is an export, not a delta. It needs nothing applied: use it as it is.") from error


# ---------------------------------------------------------------------------------------------------------- one file
def _written(base: Side, target: Side, name: str, folder: Location) -> Change:
    """Writes the least that makes a file of what was; what does not make it, bit for bit, is not kept."""
    expected, after = target.files[name], target.place(name)
    if name in base.files:
        before = base.place(name)
        of_rows = _of_rows(before, after, name, folder) if name.endswith(".parquet") else None
        change = of_rows or _of_bytes(before, after, name, folder)
        parts = {part: folder.join(*part.split("/")) for part in _parts(change)}
        if sum(part.size() for part in parts.values()) <= _WORTH * expected.size:
            sink = Digest()
            with suppress(ExportError):  # one that cannot be made is not kept either
                rebuild(change, lambda: before, lambda part: parts[part], expected.size, sink)
            if sink.result() == expected:
                return change
        for part in parts.values():
            part.delete_file()
    whole = WholeFile(file=f"{_WHOLE}/{name}")
    copy = folder.join(_WHOLE, *name.split("/"))
    copy.parent.make_dirs()
    with copy.filesystem.open_output_stream(copy.path) as stream:
        rebuild(whole, lambda: after, lambda _: after, expected.size, stream)
    return whole


def _of_rows(before: Location, after: Location, name: str, folder: Location) -> ChangedRows | None:
    rows, removed = f"{_ROWS}/{name}", f"{_REMOVED}/{name}"
    found = write_row_changes(before, after, *(folder.join(*part.split("/")) for part in (rows, removed)))
    if found is None:
        return None
    return ChangedRows(
        rows=rows, removed=removed if found.removed else None, changed=found.changed, added=found.added,
        gone=found.removed, kept=found.kept, row_groups=found.row_groups,
    )  # fmt: skip


def _of_bytes(before: Location, after: Location, name: str, folder: Location) -> ChangedBytes:
    part = f"{_BYTES}/{name}"
    return ChangedBytes(bytes=part, changed=write_byte_changes(before, after, folder.join(*part.split("/"))))


def _parts(change: Change) -> list[str]:
    if isinstance(change, ChangedRows):
        return [change.rows] if change.removed is None else [change.rows, change.removed]
    return [change.bytes] if isinstance(change, ChangedBytes) else [change.file]


def _again(folder: Location) -> str:
    return f"Write it again: embedshard export RUN_DIR {folder.uri} --since EXPORT"
