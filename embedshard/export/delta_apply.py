"""Makes a later export of an earlier one by a delta, and goes back.

All files are made beside the export first, and compared with what they have to be. Then a journal is written, the manifest
goes, the files are exchanged, and the manifest of what the export is now is written. An export is thus what it was until the
journal is there, and what it becomes as soon as the manifest is; between the two it has none, and the journal says what is
left to do: each step can be done again. On a disk a file is exchanged by a rename, and another who applies or exports is
kept out by a lock on the folder. On an object store it is a copy, which appears whole, and nobody is kept out.
"""

from __future__ import annotations

__all__ = ["Applied", "apply_delta", "roll_back"]

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from embedshard.errors import ExportError
from embedshard.export.delta import (
    ChangedRows,
    DeltaManifest,
    OpenDelta,
    Side,
    State,
    open_delta,
    prepare_delta_folder,
    rebuild,
    side_of,
    write_delta,
)
from embedshard.export.manifest import (
    APPLYING,
    DELTA_MARKER,
    JOURNAL,
    MANIFEST,
    ROLLBACK,
    FileName,
    Manifest,
    OpenExport,
    alone_in,
    hash_file,
    open_export,
)
from embedshard.storage import Location, PathOrUri, locate, reaching

_NEW, _BACK = "new", "back"
_NAME_LENGTH: Final = 16


@dataclass(frozen=True)
class Applied:
    """What became of an export.

    Attributes:
        folder: where it is.
        before: what it was.
        after: what it is.
        files: that were exchanged, made or deleted.
        rows: that were `changed`, `added` and `gone`, by the file.
        had_been: whether it was that already, and nothing had to be done.
        finished: whether what was begun earlier was finished.
        earlier: steps that can be rolled back to, the newest first.
    """

    folder: str
    before: State
    after: State
    files: list[str]
    rows: dict[str, dict[str, int]]
    had_been: bool
    finished: bool
    earlier: list[int]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self) | {"before": self.before.model_dump(), "after": self.after.model_dump()}


class _Journal(BaseModel):
    """What is left to do while files are exchanged.

    Attributes:
        format: of it.
        is_back: whether an earlier export is restored.
        before: what the export was.
        after: what it becomes.
        puts: files that are put from the folder of new ones.
        deletes: files that go.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1] = 1
    is_back: bool
    before: State
    after: State
    puts: list[FileName]
    deletes: list[FileName]


def apply_delta(
    delta: PathOrUri, onto: PathOrUri, keep: int = 3, say: Callable[[str], None] = lambda sentence: None
) -> Applied:
    """Makes the later export of the earlier one, in its folder. What was begun there and did not finish is finished first.

    Args:
        delta: its folder.
        onto: that of the export that the delta was made of.
        keep: how many earlier exports can be rolled back to; of the others what leads back is deleted.
        say: is told what is being done.

    Raises:
        ExportError: if the export is not the delta's base, or a file of either is not what was written: nothing is changed.
        StorageError: if the folder cannot be read or written.
    """
    opened, folder = open_delta(delta), locate(onto)
    with reaching(folder), alone_in(folder):
        finished = _finish(folder)
        export = open_export(folder)
        base, manifest = side_of(export), opened.manifest
        had_been = base.state.sha256 == manifest.target.sha256
        if not had_been:
            if base.state.sha256 != manifest.base.sha256:
                raise ExportError(
                    f"{folder.uri} is {_shown(base.state)}; {opened.folder.uri} was made of {_shown(manifest.base)}, and "
                    f"can be applied to nothing else. Apply it to that, or write one of this: embedshard export RUN_DIR NEW "
                    f"--since {folder.uri}"
                )
            _switch(export, base, opened, is_back=False, leads_back=keep > 0, say=say)
            _prune(folder, keep)
        earlier = [one.manifest.target.step for one in _chain(folder)]
    return _applied(folder, manifest, had_been, finished is not None, earlier)


def roll_back(onto: PathOrUri, say: Callable[[str], None] = lambda sentence: None) -> Applied:
    """Restores the export to which the newest delta was applied. A rollback that was begun and did not finish is finished.

    Args:
        onto: the folder of the export.
        say: is told what is being done.

    Raises:
        ExportError: if no delta was applied, or a file is not what was written: nothing is changed.
        StorageError: if the folder cannot be read or written.
    """
    folder = locate(onto)
    with reaching(folder), alone_in(folder):
        finished = _finish(folder)
        if finished is not None and finished.is_back:
            rows: dict[str, dict[str, int]] = {}
            files, earlier = (
                sorted([*finished.puts, *finished.deletes]),
                [one.manifest.target.step for one in _chain(folder)],
            )
            return Applied(folder.uri, finished.before, finished.after, files, rows, False, True, earlier)
        export = open_export(folder)
        base = side_of(export)
        place = _way_back(folder, base.state)
        if not place.join(MANIFEST).is_file():
            raise ExportError(
                f"{folder.uri} is {_shown(base.state)}, and nothing is kept that leads back from it: no delta was applied, "
                f"or --keep was too small. Export the earlier step again: embedshard export RUN_DIR {folder.uri} "
                f"--checkpoint STEP"
            )
        opened = open_delta(place)
        _switch(export, base, opened, is_back=True, leads_back=False, say=say)
        earlier = [one.manifest.target.step for one in _chain(folder)]
    return _applied(folder, opened.manifest, False, finished is not None, earlier)


# ----------------------------------------------------------------------------------------------------- making it ready
def _switch(
    export: OpenExport, base: Side, delta: OpenDelta, is_back: bool, leads_back: bool, say: Callable[[str], None]
) -> None:
    folder, manifest = export.folder, delta.manifest
    say("files of the export")
    for name in base.files:
        export.file(name)
    text, target = delta.target()
    is_whole = all(name in manifest.changes or base.files.get(name) == file for name, file in target.files.items())
    if (
        hashlib.sha256(text).hexdigest() != manifest.target.sha256
        or not is_whole
        or not target.files.keys() >= set(manifest.changes)
    ):
        raise ExportError(f"{delta.folder.uri} is damaged: its manifests contradict each other. Write the delta again.")
    work = folder.join(APPLYING)
    work.delete_tree()
    work.make_dirs()
    try:
        _make_new(export, delta, target, work.join(_NEW), say)
        if leads_back:
            say("what leads back")
            _make_way_back(export, base, manifest.target, text, target, work)
            _way_back(folder, manifest.target).delete_tree()
        work.join(MANIFEST).write_bytes_atomically(text)
    except BaseException:
        with suppress(OSError):  # what is left is emptied the next time
            work.delete_tree()
        raise
    deletes = sorted(base.files.keys() - target.files.keys())
    puts = sorted(manifest.changes)
    journal = _Journal(is_back=is_back, before=base.state, after=manifest.target, puts=puts, deletes=deletes)
    say("exchange")
    work.join(JOURNAL).write_text_atomically(journal.model_dump_json(indent=2) + "\n")
    _finish(folder)


def _make_new(export: OpenExport, delta: OpenDelta, target: Manifest, new: Location, say: Callable[[str], None]) -> None:
    """Makes the files that change, and compares each with what it has to be."""
    for name, change in delta.manifest.changes.items():
        say(name)
        place, expected = new.join(*name.split("/")), target.files[name]
        place.parent.make_dirs()
        with place.filesystem.open_output_stream(place.path) as stream:
            rebuild(change, partial(export.file, name), delta.part, expected.size, stream)
        if hash_file(place) != expected:
            raise ExportError(_otherwise(name, delta.manifest))
        place.sync()


def _make_way_back(export: OpenExport, base: Side, state: State, text: bytes, target: Manifest, work: Location) -> None:
    """Writes the delta that makes the base of the target again."""

    def later(name: str) -> Location:
        made = work.join(_NEW, *name.split("/"))
        return made if made.is_file() else export.file(name)

    back = work.join(_BACK)
    prepare_delta_folder(back)
    written = write_delta(Side(state, text, target.files, later), base, back)
    for name in written.parts:
        back.join(*name.split("/")).sync()


def _otherwise(name: str, manifest: DeltaManifest) -> str:
    advice = "Write the delta again."
    if manifest.pyarrow != pa.__version__:
        advice = (
            f"The delta was written with pyarrow {manifest.pyarrow}, this is {pa.__version__}, which writes the same rows "
            f"in other bytes. Do it with that version, or export whole."
        )
    return f"'{name}', made by the delta, is not what was exported: its SHA-256 is another. Nothing was changed. {advice}"


# ------------------------------------------------------------------------------------------------------------ exchange
def _finish(folder: Location) -> _Journal | None:
    """Does what the journal says; returns it, None where there is none. Each step can be done twice."""
    work, place = folder.join(APPLYING), folder.join(APPLYING, JOURNAL)
    if not place.is_file():
        return None
    try:
        journal = _Journal.model_validate_json(place.read_bytes())
    except ValidationError as error:
        raise ExportError(f"{place.uri} is damaged. Export the run again: embedshard export RUN_DIR {folder.uri}") from error
    manifest = folder.join(MANIFEST)
    if not manifest.is_file() or _hash(manifest) != journal.after.sha256:
        text = work.join(MANIFEST).read_bytes()
        manifest.delete_file()
        for name in journal.puts:
            source, target = work.join(_NEW, *name.split("/")), folder.join(*name.split("/"))
            if source.is_file():
                target.parent.make_dirs()
                target.replace_by(source)
        for name in journal.deletes:
            folder.join(*name.split("/")).delete_file()
        _keep_way_back(work.join(_BACK), _way_back(folder, journal.after))
        manifest.write_bytes_atomically(text)
    if journal.is_back:
        _delete(_way_back(folder, journal.before))
    place.delete_file()
    work.delete_tree()
    return journal


def _keep_way_back(source: Location, target: Location) -> None:
    """Moves a delta, its manifest last."""
    if not source.join(MANIFEST).is_file():
        return
    names = [*open_delta(source).manifest.parts, DELTA_MARKER, MANIFEST]
    for name in names:
        part, place = source.join(*name.split("/")), target.join(*name.split("/"))
        if part.is_file():
            place.parent.make_dirs()
            place.replace_by(part)


def _way_back(folder: Location, state: State) -> Location:
    return folder.join(ROLLBACK, state.sha256[:_NAME_LENGTH])


def _chain(folder: Location) -> list[OpenDelta]:
    """Returns the deltas that lead back, one after the other, as far as their manifests are whole."""
    found: list[OpenDelta] = []
    sha256 = _hash(folder.join(MANIFEST))
    while True:
        place = folder.join(ROLLBACK, sha256[:_NAME_LENGTH])
        if not place.join(MANIFEST).is_file() or any(one.folder.path == place.path for one in found):
            return found
        try:
            found.append(open_delta(place))
        except ExportError:
            return found
        sha256 = found[-1].manifest.target.sha256


def _prune(folder: Location, keep: int) -> None:
    kept = {one.folder.name for one in _chain(folder)[:keep]}
    for name in folder.join(ROLLBACK).list_names():
        if name not in kept:
            _delete(folder.join(ROLLBACK, name))


def _delete(delta: Location) -> None:
    delta.join(MANIFEST).delete_file()
    delta.delete_tree()


# -------------------------------------------------------------------------------------------------------------- result
def _applied(folder: Location, manifest: DeltaManifest, had_been: bool, finished: bool, earlier: list[int]) -> Applied:
    rows = {
        name: {"changed": change.changed, "added": change.added, "gone": change.gone}
        for name, change in manifest.changes.items()
        if isinstance(change, ChangedRows)
    }
    files = sorted([*manifest.changes, *manifest.removed])
    return Applied(folder.uri, manifest.base, manifest.target, files, rows, had_been, finished, earlier)


def _hash(place: Location) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()


def _shown(state: State) -> str:
    return f"step {state.step} of run '{state.run}' (manifest {state.sha256[:12]}...)"
