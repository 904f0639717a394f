"""Checkpoints that belong to no world size: how the ranks of a run write them together.

`step-00001000/` holds safetensors files of at most 30 MB and `manifest.json`. Each rank writes its own files, named
`<attempt>-r<rank>-<number>.safetensors`, then the list of them, `<attempt>-r<rank>.json`. Rank 0 waits for all lists and
writes the manifest: its appearance commits the checkpoint. Then it deletes the lists, by which the other ranks know. So the
ranks meet in the folder alone: no collective, in any thread, on disks and object stores.

A step that a later attempt saves again (because it was damaged, or the run went back) is written anew beside the former
files, whose manifest stays valid until the new one replaces it in one stroke; then the former files are deleted. So no
rank has to judge, alike with all others, whether what is there is good. An attempt that a later one has replaced is refused.

This module must not know models, torchrec or process groups. Reading is in `checkpoint_reader.py`.
"""

from __future__ import annotations

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Piece",
    "TensorSpec",
    "find_steps",
    "newest_intact",
    "offer",
    "open_checkpoint",
    "open_step",
    "prune",
    "step_folder",
]

import errno
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from embedshard.errors import CheckpointError, PeerError
from embedshard.storage import Location
from embedshard.train.checkpoint_files import MAX_FILE_BYTES, Piece, num_bytes, write_pieces
from embedshard.train.checkpoint_format import DamageError, Manifest, PartFile, check, parse_manifest, seal
from embedshard.train.checkpoint_reader import (
    MANIFEST,
    Checkpoint,
    TensorSpec,
    find_steps,
    newest_intact,
    offer,
    open_checkpoint,
    open_step,
    prune,
    step_folder,
)

_ATTEMPT = re.compile(r"\.?(\d+)-r\d+[.-]")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAVING_S = 30.0
"""How long a process that fails still waits for the others' part of a save that has begun."""


class Checkpointer:
    """Saves this rank's pieces, one save at a time, in the background where memory allows it.

    Use it as a context manager: leaving waits for the save in flight. When a save has ended without an error, its
    checkpoint is committed, on every rank. An error in the background is raised by the next `save`, `wait` or `close`, once.

    Args:
        root: the folder of checkpoints.
        rank: this process's.
        world_size: how many processes save together.
        attempt: the number of this start of the run, in digits; a later start has a higher one.
        mode: `blocking` writes piece by piece before `save` returns; `background` copies the pieces and writes while
            training goes on; `auto` does so if the copy fits `memory_bytes`.
        memory_bytes: what the copy may take on this rank.
        max_file_bytes: a safetensors file's.
        timeout_s: how long a rank waits for the others.
        is_aborted: asked while waiting for other ranks: whether to give up.
    """

    def __init__(
        self,
        root: Location,
        rank: int,
        world_size: int,
        attempt: str,
        mode: Literal["auto", "background", "blocking"] = "auto",
        memory_bytes: int = 2 * 1024**3,
        max_file_bytes: int = MAX_FILE_BYTES,
        timeout_s: float = 600.0,
        is_aborted: Callable[[], bool] = lambda: False,
    ) -> None:
        assert attempt.isdigit(), f"attempt {attempt!r} is not a number"
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.root = root
        self._root, self._rank, self._world_size, self._attempt = root, rank, world_size, attempt
        self._mode, self._memory_bytes, self._max_file_bytes = mode, memory_bytes, max_file_bytes
        self._timeout_s, self._is_aborted = timeout_s, is_aborted
        self._leave_by = float("inf")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.background_seconds = 0.0
        """What saves in the background have taken beside the loop, those that have ended."""
        self.decision = "nothing was saved yet"
        """How the last save was done, and why: a line for the log."""

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        self._leave_by = time.monotonic() + _LEAVING_S  # the other ranks may never come
        try:
            self.close()
        except (CheckpointError, PeerError) as second:
            error.add_note(f"Besides, a save in the background failed: {second}")

    def save(
        self,
        step: int,
        pieces: Callable[[], Iterable[Piece]] | Iterable[Piece],
        state: Mapping[str, Any],
        keep: int | None = None,
        protect: Collection[int] = (),
    ) -> None:
        """Saves a step, after the former save has ended. Every rank calls it; no collective is used.

        A step that this attempt has committed already is left as it is: the same step is the same state.

        Args:
            step: optimizer steps done.
            pieces: this rank's pieces, or what gives them (called once or twice, before this returns); live views are
                fine. All ranks' pieces together cover each tensor exactly once.
            state: JSON that is kept beside them; rank 0's counts.
            keep: if given, only so many of the newest checkpoints are kept after the commit.
            protect: steps that are kept besides.

        Raises:
            CheckpointError: if the former save or this one failed. Committed checkpoints are as they were.
            PeerError: if it failed since another rank did.
        """
        self.wait()
        if not callable(pieces):
            given = list(pieces)
            pieces = lambda: given  # noqa: E731 (a generator can be read once only)
        frozen = json.loads(json.dumps(state))
        try:
            size = num_bytes(pieces())
            in_background = self._decide(size)
            taken = _copied(pieces()) if in_background else pieces()
        except BaseException as error:
            self._give_up(step_folder(self._root, step), str(error), is_published=False)
            raise
        if not in_background:
            self._write(step, taken, size, frozen, keep, protect)
            return
        arguments = (step, taken, size, frozen, keep, frozenset(protect))
        self._thread = threading.Thread(target=self._write_quietly, args=arguments, name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in flight, if there is one.

        Raises:
            CheckpointError: if it failed.
            PeerError: if it failed since another rank did.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends the saves, as `wait` does."""
        self.wait()

    def _decide(self, size: int) -> bool:
        """Returns whether a save of so many bytes is done in the background; says why in `decision`."""
        in_background = self._mode == "background" or (self._mode == "auto" and size <= self._memory_bytes)
        if self._mode != "auto":
            reason = f"checkpoint.mode is {self._mode}; the state has {size:,} bytes"
        elif in_background:
            reason = f"a copy of {size:,} bytes fits checkpoint.memory_bytes={self._memory_bytes:,}"
        else:
            reason = f"a copy of {size:,} bytes does not fit checkpoint.memory_bytes={self._memory_bytes:,}"
        self.decision = f"{'background' if in_background else 'blocking, piece by piece'}: {reason}"
        return in_background

    def _write_quietly(self, *arguments: Any) -> None:
        begin = time.monotonic()
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error
        finally:
            self.background_seconds += time.monotonic() - begin

    def _write(
        self,
        step: int,
        pieces: Iterable[Piece],
        size: int,
        state: dict[str, Any],
        keep: int | None,
        protect: Collection[int],
    ) -> None:
        folder = step_folder(self._root, step)
        is_published = False
        try:
            if not self._has_committed(folder):
                folder.make_dirs()
                part = write_pieces(folder, self._prefix(self._rank), pieces, self._max_file_bytes)
                folder.join(self._part_name(self._rank)).write_text_atomically(part.model_dump_json())
                is_published = True
                if self._rank == 0:
                    self._commit(folder, step, state)
                else:
                    self._wait_for_commit(folder)
        except BaseException as error:
            told = _explained(error, folder, size)
            self._give_up(folder, str(told), is_published)
            if told is error:
                raise
            raise told from error
        if self._rank == 0 and keep is not None:
            prune(self._root, keep, protect, newest=step)

    # ------------------------------------------------------------------------------------------- the ranks' meeting
    def _prefix(self, rank: int) -> str:
        return f"{self._attempt}-r{rank:05d}"

    def _part_name(self, rank: int) -> str:
        return f"{self._prefix(rank)}.json"

    def _failed_name(self, rank: int) -> str:
        return f"{self._prefix(rank)}.failed"

    def _commit(self, folder: Location, step: int, state: dict[str, Any]) -> None:
        expected = {self._part_name(rank): rank for rank in range(self._world_size)}
        self._meet(folder, lambda names: [rank for name, rank in expected.items() if name not in names])
        manifest = self._gathered(folder, step, state)
        # As late as possible: an attempt that was replaced must not replace its successor's manifest.
        self._has_committed(folder)
        lost = {file.name for file in manifest.files} - set(folder.list_names())
        if lost:
            raise CheckpointError(
                f"{folder.uri} is not committed: {min(lost)} was written and is gone. Another process deletes files there: "
                f"find it, then resume. Earlier checkpoints are as they were."
            )
        folder.join(MANIFEST).write_bytes_atomically(seal(manifest.model_dump()))
        self._sweep(folder, {file.name for file in manifest.files})

    def _gathered(self, folder: Location, step: int, state: dict[str, Any]) -> Manifest:
        names = [self._part_name(rank) for rank in range(self._world_size)]
        parts = [PartFile.model_validate_json(folder.join(name).read_bytes()) for name in names]
        tensors = {name: entry for part in parts for name, entry in part.tensors.items()}
        for rank, part in enumerate(parts):
            for name, entry in part.tensors.items():
                assert entry == tensors[name], f"'{name}' is {entry} on rank {rank} and {tensors[name]} on another"
        manifest = Manifest(
            step=step,
            attempt=self._attempt,
            world_size=self._world_size,
            state=state,
            tensors=tensors,
            pieces=tuple(piece for part in parts for piece in part.pieces),
            files=tuple(file for part in parts for file in part.files),
        )
        try:
            check(manifest)
        except DamageError as error:
            raise CheckpointError(
                f"{folder.uri} is not committed: its manifest {error}. This is a mistake of embedshard or of a model's own "
                f"state: report it. Earlier checkpoints are as they were."
            ) from error
        return manifest

    def _wait_for_commit(self, folder: Location) -> None:
        part = self._part_name(self._rank)
        self._meet(folder, lambda names: [0] if part in names else [])
        if not self._has_committed(folder):  # rank 0 deletes the lists also when it gives up
            raise self._not_committed(folder, [0])

    def _meet(self, folder: Location, missing: Callable[[Collection[str]], list[int]]) -> None:
        """Waits until no rank is missing, by the names of the folder's files."""
        begin, pause_s = time.monotonic(), 0.005
        while True:
            names = set(folder.list_names())
            ranks = missing(names)
            if not ranks:
                return
            failed = [rank for rank in range(self._world_size) if self._failed_name(rank) in names]
            if failed:
                raise self._not_committed(folder, failed)
            waited_s = time.monotonic() - begin
            is_late = waited_s > self._timeout_s or time.monotonic() > self._leave_by
            if is_late or self._is_aborted():
                shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
                raise PeerError(
                    f"{folder.uri} is not committed: after {waited_s:.1f} s, rank {shown} of {self._world_size} has not "
                    f"done its share. See what it says, then resume. Earlier checkpoints are as they were."
                )
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)

    def _not_committed(self, folder: Location, failed: list[int]) -> PeerError:
        """Returns an error with the word that one of the failed ranks left."""
        try:
            word = folder.join(self._failed_name(failed[0])).read_bytes().decode()
        except OSError:
            word = "it left no word why. Earlier checkpoints are as they were."
        return PeerError(f"{folder.uri} is not committed: rank {failed[0]} failed: {word}")

    def _has_committed(self, folder: Location) -> bool:
        """Returns whether this attempt has committed this step.

        Raises:
            CheckpointError: if a later attempt has, so that this one was replaced.
        """
        attempt = _committed_attempt(folder)
        if attempt > int(self._attempt):
            raise CheckpointError(
                f"{folder.uri} was saved by attempt {attempt} of this run, and this is attempt {self._attempt}, which the "
                f"other has replaced. End this process."
            )
        return attempt == int(self._attempt)

    # -------------------------------------------------------------------------------------------------- cleaning up
    def _sweep(self, folder: Location, kept: Collection[str]) -> None:
        """Deletes what this attempt and earlier ones left beside a manifest's files: first the lists, which others watch."""
        with suppress(OSError):  # the checkpoint is committed: what stays is garbage, deleted with its folder
            for name in sorted(folder.list_names(), key=lambda name: (not name.endswith(".json"), name)):
                match = _ATTEMPT.match(name)
                if match and int(match[1]) <= int(self._attempt) and name not in kept:
                    folder.join(name).delete_file()

    def _give_up(self, folder: Location, reason: str, is_published: bool) -> None:
        """Tells the other ranks that this one failed, and deletes its files if no manifest can come to name them.

        Once a rank has published its list, only rank 0 decides: it may be committing at this moment.
        """
        with suppress(OSError):
            if _committed_attempt(folder) == int(self._attempt):
                return
        with suppress(OSError):
            if self._world_size > 1:
                folder.make_dirs()
                folder.join(self._failed_name(self._rank)).write_text_atomically(reason)
        with suppress(OSError):
            names = folder.list_names()
            if self._rank and is_published and self._failed_name(0) not in names:
                return
            own = self._prefix(self._rank)
            # What others are still writing (.name.part) is theirs to delete.
            doomed = (own, f".{own}") if self._rank else (f"{self._attempt}-r", f".{own}")
            for name in names:
                if name.startswith(doomed) and not name.endswith(".failed"):
                    folder.join(name).delete_file()
            if not folder.list_names():
                folder.delete_tree()


def _copied(pieces: Iterable[Piece]) -> list[Piece]:
    return [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]


def _committed_attempt(folder: Location) -> int:
    """Returns the number of the attempt whose manifest is there; -1 if there is none, or a damaged one."""
    try:
        attempt = parse_manifest(folder.join(MANIFEST).read_bytes()).attempt
    except (FileNotFoundError, DamageError):
        return -1
    return int(attempt) if attempt.isdigit() else -1


def _explained(error: BaseException, folder: Location, size: int) -> BaseException:
    """Returns an error that a user can act on, for those that a filesystem raises."""
    if not isinstance(error, OSError):
        return error
    if error.errno not in _FULL:
        return CheckpointError(
            f"{folder.uri} cannot be saved: {error}. See that the folder can be written, then resume. Earlier checkpoints "
            f"are as they were."
        )
    free = "an unknown number of"
    if folder.is_local:
        free = f"{shutil.disk_usage(folder.parent.path).free:,}"
    return CheckpointError(
        f"{folder.uri} cannot be saved: the disk is full ({error.strerror}). This rank's share needs {size:,} bytes, and "
        f"{free} bytes are free. Free some space or keep fewer (checkpoint.keep), then resume. Earlier checkpoints are as "
        f"they were."
    )
