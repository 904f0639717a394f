"""What an export is: the folder, its manifest, which is written last, and the hashes that are checked before use.

An export without a manifest is none: its writing did not finish, or it did not pass verification. Nothing that is read here
can run code.
"""

from __future__ import annotations

__all__ = [
    "APPLYING",
    "DELTA_MARKER",
    "JOURNAL",
    "MANIFEST",
    "ROLLBACK",
    "VERIFICATION",
    "ExportedIndex",
    "ExportedTable",
    "ExportedTower",
    "FileHash",
    "Manifest",
    "OpenExport",
    "alone_in",
    "check_folder",
    "hash_file",
    "hash_files",
    "is_export",
    "is_run",
    "open_export",
    "plain",
    "prepared_folder",
    "write_manifest",
]

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedshard.errors import ExportError
from embedshard.export.signature import ExportedProgram
from embedshard.storage import Location, PathOrUri, locate, reaching
from embedshard.train.run_directory import RunDirectory

MANIFEST: Final = "manifest.json"
VERIFICATION: Final = "verification.json"
APPLYING: Final = "applying"
"""The folder in which a delta is made ready."""
JOURNAL: Final = "journal.json"
"""There, while the files of an export are exchanged."""
ROLLBACK: Final = "rollback"
"""The folder of the deltas that lead back."""
DELTA_MARKER: Final = "EMBEDSHARD_DELTA"
"""A file that tells the folder of a delta, finished or not."""
_MARKER: Final = "EMBEDSHARD_EXPORT"
_FOLDERS: Final = ("tables", "vocabularies", "tokenizers", "programs")
_FILES: Final = ("users.parquet", "items.parquet", "seen.parquet", "dense.safetensors", "items.faiss", VERIFICATION)
_PREFIXES: Final = ("items-",)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")
_CHUNK: Final = 2**22
_NO_LOCKS: Final = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What filesystems say that have no locks on folders, as NFS."""
_LARGEST_MANIFEST: Final = 2**28

FileName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileHash(_Part):
    """A file as it was written.

    Attributes:
        size: in bytes.
        sha256: of all of them, in hexadecimal.
    """

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ExportedTable(_Part):
    """A table's vectors.

    Attributes:
        file: with the columns `id`, `row` and `vector`; the last row, without an id, is that of unknown ids.
        vectors: how many.
        dim: of each.
        dtype: that the table was trained in; the file is float32.
        has_ids: whether rows have ids; those of hashed ids have none.
    """

    file: FileName
    vectors: int
    dim: int
    dtype: str
    has_ids: bool


class ExportedTower(_Part):
    """What a tower made of all users, or of all items.

    Attributes:
        file: with the columns `id`, `row` and `vector`.
        vectors: how many.
        dim: of each.
        feature: that names the user or the item.
        columns: of the data in which the id stands.
        table: whose rows `row` are.
        vocabulary: how an id becomes a row: the table's config, with the export's file for a path.
        features: that the tower reads.
        is_unit: whether vectors are of length 1, so that a score is a cosine: items that are near each other, without users.
    """

    file: FileName
    vectors: int
    dim: int
    feature: str
    columns: list[str]
    table: str
    vocabulary: dict[str, Any]
    features: list[str]
    is_unit: bool = False


class ExportedIndex(_Part):
    """The FAISS index of the items' vectors, by inner product; a number in it is a place in the items' file.

    Attributes:
        file: as FAISS writes it.
        kind: `flat` is exact.
        settings: with which it was built and is searched.
    """

    file: FileName
    kind: Literal["flat", "hnsw", "ivf"]
    settings: dict[str, int]


class Manifest(_Part):
    """All of an export.

    Attributes:
        format: of the manifest.
        embedshard: the version that wrote it.
        written: when, in ISO 8601.
        run: the run's folder, its name alone.
        step: of the checkpoint.
        attempt: that wrote the checkpoint.
        data: the position in the data (`step`, `samples_seen`), the fingerprint of the training files and their partitions.
        config: the run's, with its `${VAR}` as they were written.
        metrics: the run's own, as in its result.json.
        tables: by name.
        dense: the file of the dense part.
        user: the users' vectors.
        item: the items' vectors.
        seen: the file of the items (`item`, a row) that users (`user`, a row) have met and are not recommended.
        index: of the items.
        quantised: files of the items' vectors in fewer bits, by name.
        programs: of the towers (`user`, `item`), or of the whole model (`model`), by name.
        quantised_tables: files of the tables in fewer bits, by how (`int8`, `fp16`) and by table.
        verification: what was found when the export was read again.
        notes: what is not in it, and why.
        files: all of them but the manifest.
    """

    format: Literal[1] = 1
    embedshard: str
    written: str
    run: str
    step: int
    attempt: str
    data: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float | None]
    tables: dict[str, ExportedTable]
    dense: FileName | None
    user: ExportedTower | None = None
    item: ExportedTower | None = None
    seen: FileName | None = None
    index: ExportedIndex | None = None
    quantised: dict[str, FileName] = {}
    programs: dict[str, ExportedProgram] = {}
    quantised_tables: dict[str, dict[str, FileName]] = {}
    verification: dict[str, Any] | None = None
    notes: list[str] = []
    files: dict[FileName, FileHash]


class OpenExport:
    """An export that is whole as far as its manifest tells. Made by `open_export`.

    Attributes:
        folder: where it is.
        manifest: what it is.
    """

    def __init__(self, folder: Location, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._checked: set[str] = set()

    def file(self, name: str) -> Location:
        """Returns a file of the export, after its size and SHA-256 were compared with the manifest's, once.

        Raises:
            ExportError: naming the file, if it is missing or another than was written.
            StorageError: if it cannot be read.
        """
        place = self.folder.join(*name.split("/"))
        if name in self._checked:
            return place
        expected = self.manifest.files.get(name)
        if expected is None:
            raise ExportError(f"{place.uri} is not among the files that {MANIFEST} lists. {_again(self.folder)}")
        with reaching(place):
            if not place.is_file():
                raise ExportError(f"{place.uri} is missing; {MANIFEST} lists it. {_again(self.folder)}")
            found = hash_file(place)
        if found != expected:
            what = (
                f"{found.size:,} bytes, not {expected.size:,}"
                if found.size != expected.size
                else (f"the SHA-256 {found.sha256[:12]}..., not {expected.sha256[:12]}...")
            )
            raise ExportError(f"{place.uri} has {what}: it is not what was exported. {_again(self.folder)}")
        self._checked.add(name)
        return place


@contextmanager
def alone_in(folder: Location) -> Iterator[None]:
    """Keeps others who would change an export from its folder, where it is on a disk; the lock goes with the process.

    Raises:
        ExportError: if another has it.
    """
    if not folder.is_local or not os.path.isdir(folder.path):
        yield
        return
    handle = os.open(folder.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder.uri} is being changed by another apply, rollback or export. Wait until it is done."
            raise ExportError(message) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def check_folder(out: PathOrUri | Location) -> Location:
    """Returns the place of an export that is to be written: a new folder, or that of an earlier export, finished or not.

    Nothing is touched.

    Raises:
        ExportError: if something else is there.
        StorageError: if it cannot be read.
    """
    folder = locate(out)
    with reaching(folder):
        names = [] if folder.is_file() else folder.list_names()
        if folder.is_file() or (names and _MARKER not in names):
            shown = "is a file" if folder.is_file() else f"holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            raise ExportError(
                f"{folder.uri} {shown} and is no earlier export, so it is not written over. Name a new folder, or an export."
            )
    return folder


@contextmanager
def prepared_folder(out: PathOrUri | Location) -> Iterator[Location]:
    """Makes the folder of an export, or empties that of an earlier one, finished or not; its manifest goes first.

    It keeps out others who would write there for as long as it is open.

    Raises:
        ExportError: if something else is there, or another export is being written there, or a delta applied or rolled back.
        StorageError: if it cannot be written.
    """
    folder = check_folder(out)
    with reaching(folder):
        folder.make_dirs()
    with alone_in(folder):
        with reaching(folder):
            names = check_folder(folder).list_names()
            folder.join(MANIFEST).delete_file()
            folder.join(APPLYING, JOURNAL).delete_file()
            folder.join(_MARKER).write_text_atomically("An export of embedshard: it is whole if it has a manifest.json.\n")
            for name in names:
                if name in (*_FOLDERS, APPLYING, ROLLBACK):
                    folder.join(name).delete_tree()
                elif name in _FILES or name.startswith(_PREFIXES):
                    folder.join(name).delete_file()
        yield folder


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Writes the manifest, by which the folder becomes an export.

    Raises:
        StorageError: if it cannot be written.
    """
    with reaching(folder):
        folder.join(MANIFEST).write_text_atomically(manifest.model_dump_json(indent=2) + "\n")


def open_export(out: PathOrUri | Location) -> OpenExport:
    """Opens an export: reads its manifest; files are checked as they are used.

    Raises:
        ExportError: if it is none, did not finish, or its manifest is damaged.
        StorageError: if it cannot be read.
    """
    folder = locate(out)
    place = folder.join(MANIFEST)
    with reaching(place):
        if not place.is_file():
            raise ExportError(_why_none(folder))
        if place.size() > _LARGEST_MANIFEST:
            raise ExportError(f"{place.uri} has {place.size():,} bytes, more than a manifest ever has. {_again(folder)}")
        content = place.read_bytes()
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        if _is_delta(content):
            advice = f"Apply it to the export that it was made of: embedshard apply {folder.uri} EXPORT"
            raise ExportError(f"{folder.uri} is a delta: it has only what changed. {advice}") from error
        if _is_checkpoint(content):
            advice = f"Export it: embedshard export RUN_DIR OUT --checkpoint {folder.name.rpartition('-')[2].lstrip('0')}"
            raise ExportError(f"{folder.uri} is a checkpoint of a run, not an export. {advice}") from error
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise ExportError(f"{place.uri} is damaged: {where or 'it'}: {detail['msg']}. {_again(folder)}") from error
    return OpenExport(folder, manifest)


def hash_files(folder: Location) -> dict[str, FileHash]:
    """Returns the files of an export that is being written, by name, those in folders with the folder's."""
    names = []
    for name in folder.list_names():
        if name in _FOLDERS:
            names += [f"{name}/{below}" for below in folder.join(name).list_names()]
        elif name in _FILES or name.startswith(_PREFIXES):
            names.append(name)
    return {name: hash_file(folder.join(*name.split("/"))) for name in names}


def hash_file(place: Location) -> FileHash:
    """Returns a file's size and SHA-256, read a part at a time."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(place):
        digest.update(chunk)
        size += len(chunk)
    return FileHash(size=size, sha256=digest.hexdigest())


def plain(value: Any) -> Any:
    """Returns a value as JSON knows it: numbers that are not finite become null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _chunks(place: Location) -> Iterator[bytes]:
    with place.open_input() as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _why_none(folder: Location) -> str:
    """Returns what a folder without a manifest is, for who takes it for an export, and what to do."""
    if not folder.exists():
        return f"{folder.uri} is not there. Make it: embedshard export RUN_DIR {folder.uri}"
    if folder.is_file():
        return f"{folder.uri} is a file; an export is a folder. Name the folder in which its {MANIFEST} lies."
    if folder.join(APPLYING, JOURNAL).is_file():
        return (
            f"{folder.uri} is between two exports: a delta is being applied or rolled back, or that did not finish. "
            f"If nothing is at work on it, finish it: embedshard apply DELTA {folder.uri}; or go back: embedshard "
            f"rollback {folder.uri}"
        )
    see = f" (see {VERIFICATION})" if folder.join(VERIFICATION).exists() else ""
    if folder.join(_MARKER).exists():
        why = "has no manifest, so its export did not finish or did not pass verification"
        return f"{folder.uri} {why}{see}. {_again(folder)}"
    if folder.join(DELTA_MARKER).exists():
        return (
            f"{folder.uri} is a delta without a manifest: its writing did not finish or what it makes did not pass "
            f"verification{see}. Write it again: embedshard export RUN_DIR {folder.uri} --since EXPORT"
        )
    if is_run(folder):
        return f"{folder.uri} is the folder of a run, not an export. Export it first: embedshard export {folder.uri} OUT"
    if folder.list_names():
        return f"{folder.uri} holds no export. Name the folder of one, or make one: embedshard export RUN_DIR OUT"
    return f"{folder.uri} is empty. Export a run to it: embedshard export RUN_DIR {folder.uri}"


def is_export(folder: Location) -> bool:
    """Whether a folder is that of an export or a delta, finished or not: `open_export` opens it or says why it cannot."""
    return any(folder.join(name).exists() for name in (MANIFEST, _MARKER, DELTA_MARKER))


def is_run(folder: Location) -> bool:
    """Whether a folder is that of a run."""
    return RunDirectory(folder).config_file.is_file()


def _is_delta(content: bytes) -> bool:
    return _parsed(content).get("kind") == "delta"


def _is_checkpoint(content: bytes) -> bool:
    return {"pieces", "tensors"} <= _parsed(content).keys()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _again(folder: Location) -> str:
    return f"Export the run again: embedshard export RUN_DIR {folder.uri}"
