"""Checkpoints that belong to no world size.

`checkpoints/step-00001000/` holds safetensors files of at most 256 MB and manifest.json. The manifest names every piece (a
block of a named tensor) with its file, offset and shape, every file with its size and SHA-256, and the caller's JSON state; it is
written last, and its appearance commits the checkpoint. Each rank writes its own files, named by attempt and rank, so that
two attempts never write the same file. A reader takes the pieces that overlap what it wants, one verified file at a time: no
gather, no pickle.

This module must not know models, torchrec or process groups. Ranks meet in the folder: each leaves a part list there, and
rank 0 commits when all have.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "Checkpointer", "Piece", "TensorSpec", "find_steps", "newest_intact", "open_step"]

import errno
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import safetensors.torch
import torch

from embedshard.errors import CheckpointError
from embedshard.storage import Location

FORMAT = 1
MAX_FILE_BYTES = 256 * 1000**2
COMMIT_TIMEOUT_S = 600.0

_FOLDER = re.compile(r"^step-(\d{8,})$")
_FILE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_\-]*\.safetensors$")
_MANIFEST = "manifest.json"
_POLL_S = 0.05
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip

Offset = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block of a named tensor.

    Attributes:
        name: of the whole tensor.
        tensor: the block, on any device; it may be a live view.
        offset: where it begins in the whole; () for a scalar.
        shape: of the whole.
    """

    name: str
    tensor: torch.Tensor
    offset: Offset
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _StoredPiece:
    file: str
    key: str
    offset: Offset
    shape: tuple[int, ...]


# --------------------------------------------------------------------------------------------------------------- reading
class Checkpoint:
    """A committed checkpoint whose manifest was read and makes sense.

    Attributes:
        folder: where it is.
        step: at which it was taken.
        state: what the caller gave to keep.
        tensors: what it holds, by name.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        manifest = _read_manifest(folder)
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self._files: dict[str, tuple[int, str]] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self._pieces: dict[str, list[_StoredPiece]] = {}
        try:
            self._take(manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder.uri}/{_MANIFEST} does not make sense: {error!r}. {_offer(folder)}") from error

    def _take(self, manifest: dict[str, Any]) -> None:
        for name, file in manifest["files"].items():
            if not _FILE.match(name):
                raise CheckpointError(
                    f"{self.folder.uri}/{_MANIFEST} names the file {name!r}, which is not a plain name within its folder. "
                    f"The manifest was tampered with or is damaged. {_offer(self.folder)}"
                )
            self._files[name] = (int(file["size_bytes"]), str(file["sha256"]))
        for name, tensor in manifest["tensors"].items():
            self.tensors[name] = TensorSpec(_DTYPES[tensor["dtype"]], tuple(tensor["shape"]))
            self._pieces[name] = [
                _StoredPiece(piece["file"], piece["key"], tuple(piece["offset"]), tuple(piece["shape"]))
                for piece in tensor["pieces"]
            ]
            self._check_tiling(name)

    def _check_tiling(self, name: str) -> None:
        """Checks that the pieces cover the tensor, each element once: by volume, and no two overlap."""
        shape, pieces = self.tensors[name].shape, self._pieces[name]
        ordered = sorted(pieces, key=lambda piece: piece.offset)
        volume = sum(_volume(piece.shape) for piece in pieces)
        inside = all(
            len(piece.shape) == len(shape)
            and all(at >= 0 and at + size <= end for at, size, end in zip(piece.offset, piece.shape, shape, strict=True))
            for piece in pieces
        )
        overlapping = any(
            _overlap(first.offset, first.shape, second.offset, second.shape) is not None
            for i, first in enumerate(ordered)
            for second in ordered[i + 1 :]
            if not shape or second.offset[0] < first.offset[0] + first.shape[0]
        )
        unknown = [piece.file for piece in pieces if piece.file not in self._files]
        if volume != _volume(shape) or not inside or overlapping or unknown:
            raise CheckpointError(
                f"{self.folder.uri}/{_MANIFEST}: the pieces of '{name}' do not cover its shape {list(shape)} exactly once. "
                f"The manifest is damaged. {_offer(self.folder)}"
            )

    def read_into(self, wanted: Sequence[tuple[str, Offset, torch.Tensor]]) -> None:
        """Fills blocks of tensors, which may be live views of any cut.

        Reads each file that is needed once, and verifies it before anything is copied from it.

        Args:
            wanted: name, offset in the whole, and the tensor to fill.

        Raises:
            CheckpointError: if a name is not there, a dtype or shape differs, or a file is damaged.
        """
        by_file: dict[str, list[tuple[_StoredPiece, Offset, torch.Tensor]]] = {}
        for name, offset, tensor in wanted:
            self._check_wanted(name, offset, tensor)
            for piece in self._pieces[name]:
                if _overlap(piece.offset, piece.shape, offset, tuple(tensor.shape)) is not None:
                    by_file.setdefault(piece.file, []).append((piece, offset, tensor))
        for file, copies in sorted(by_file.items()):
            content = self._load(file)
            for piece, offset, tensor in copies:
                region = _overlap(piece.offset, piece.shape, offset, tuple(tensor.shape))
                assert region is not None, "only overlapping pieces were taken"
                source = content[piece.key][
                    tuple(slice(a - p, b - p) for (a, b), p in zip(region, piece.offset, strict=True))
                ]
                target = tensor[tuple(slice(a - o, b - o) for (a, b), o in zip(region, offset, strict=True))]
                with torch.no_grad():
                    target.copy_(source)

    def _check_wanted(self, name: str, offset: Offset, tensor: torch.Tensor) -> None:
        spec = self.tensors.get(name)
        if spec is None:
            raise CheckpointError(
                f"{self.folder.uri} does not hold '{name}'. It was saved from another model; it holds "
                f"{', '.join(sorted(self.tensors)[:8])}, ... Use the run's own config."
            )
        fits = len(spec.shape) == tensor.dim() and all(
            at + size <= end for at, size, end in zip(offset, tensor.shape, spec.shape, strict=True)
        )
        if spec.dtype != tensor.dtype or not fits:
            raise CheckpointError(
                f"{self.folder.uri}: '{name}' is {spec.dtype} of shape {list(spec.shape)}, the model wants {tensor.dtype} "
                f"of shape {list(tensor.shape)} at {list(offset)}. Use the run's own config."
            )

    def verify(self) -> None:
        """Reads every file and checks its size and SHA-256.

        Raises:
            CheckpointError: naming the file.
        """
        for file in self._files:
            self._load(file)

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        size, digest = self._files[file]
        location = self.folder.join(file)
        try:
            data = location.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{location.uri} is missing or cannot be read ({error}); the manifest names it. {_offer(self.folder)}"
            ) from error
        if len(data) != size:
            raise CheckpointError(
                f"{location.uri} has {len(data):,} bytes, the manifest says {size:,}: it was cut off or replaced. "
                f"{_offer(self.folder)}"
            )
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise CheckpointError(
                f"{location.uri} is damaged: its SHA-256 begins with {found[:12]}, the manifest says {digest[:12]}. "
                f"{_offer(self.folder)}"
            )
        return safetensors.torch.load(data)


def _read_manifest(folder: Location) -> dict[str, Any]:
    location = folder.join(_MANIFEST)
    if not location.exists():
        what = "has no manifest, so its save did not finish" if folder.exists() else "is not there"
        raise CheckpointError(f"{folder.uri} {what}. {_offer(folder)}")
    try:
        manifest = json.loads(location.read_bytes())
        version, digest = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{location.uri} is damaged: {error!r}. {_offer(folder)}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{location.uri} is of format {version!r}; this embedshard reads format {FORMAT}. Use the release that wrote it."
        )
    if _digest(manifest) != digest:
        raise CheckpointError(f"{location.uri} is damaged: its own SHA-256 does not match. {_offer(folder)}")
    assert isinstance(manifest, dict)
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _overlap(
    offset: Offset, shape: Sequence[int], other: Offset, other_shape: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Returns the block that two blocks share, as (first, last) by axis; None if they share nothing."""
    region = []
    for a, size, b, other_size in zip(offset, shape, other, other_shape, strict=True):
        first, last = max(a, b), min(a + size, b + other_size)
        if first >= last:
            return None
        region.append((first, last))
    return region


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def find_steps(root: Location) -> list[int]:
    """Returns the steps of committed checkpoints, ascending; their files are not looked at."""
    steps = []
    for name in root.list_names():
        match = _FOLDER.match(name)
        if match and root.join(name, _MANIFEST).exists():
            steps.append(int(match.group(1)))
    return sorted(steps)


def open_step(root: Location, step: int) -> Checkpoint:
    """Opens the checkpoint of a step.

    Raises:
        CheckpointError: if there is none, or its manifest is damaged; offers the newest intact one.
    """
    return Checkpoint(_folder(root, step))


def newest_intact(root: Location, on_damage: Callable[[str], None] | None = None) -> Checkpoint | None:
    """Returns the newest checkpoint whose files are all as they were written; None if there is no checkpoint.

    Args:
        root: the folder of checkpoints.
        on_damage: told about each newer one that is damaged.

    Raises:
        CheckpointError: if there are checkpoints, all of them damaged.
    """
    steps, damage = find_steps(root), ""
    for step in reversed(steps):
        try:
            checkpoint = Checkpoint(_folder(root, step))
            checkpoint.verify()
        except CheckpointError as error:
            damage = str(error)
            if on_damage is not None:
                on_damage(damage)
            continue
        return checkpoint
    if steps:
        raise CheckpointError(f"none of the {len(steps)} checkpoints in {root.uri} is intact. The oldest: {damage}")
    return None


def _folder(root: Location, step: int) -> Location:
    return root.join(f"step-{step:08d}")


def _offer(folder: Location) -> str:
    """Returns a sentence that names the newest intact checkpoint beside a damaged one."""
    root = Location(folder.filesystem, folder.path.rsplit("/", 1)[0], folder.uri.rsplit("/", 1)[0])
    for step in reversed(find_steps(root)):
        if f"step-{step:08d}" == folder.name:
            continue
        try:
            _intact(_folder(root, step))
        except CheckpointError:
            continue
        return f"The newest intact one is step-{step:08d}: give --checkpoint {step}, or resume, which takes it."
    return "There is no other intact checkpoint: start a new run."


def _intact(folder: Location) -> None:
    """Checks all files of a checkpoint, without offering another."""
    manifest_location = folder.join(_MANIFEST)
    try:
        manifest = json.loads(manifest_location.read_bytes())
        digest = manifest.pop("sha256")
        whole = _digest(manifest) == digest and manifest["format"] == FORMAT
        for name, file in manifest["files"].items():
            data = folder.join(name).read_bytes() if whole and _FILE.match(name) else b""
            whole = whole and hashlib.sha256(data).hexdigest() == file["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.uri} is damaged") from error
    if not whole:
        raise CheckpointError(f"{folder.uri} is damaged")


# --------------------------------------------------------------------------------------------------------------- writing
class Checkpointer:
    """Writes this rank's share of checkpoints, in the background where memory allows it, one at a time.

    Use it as a context manager: leaving it waits for the save in flight. An error of a background save is raised by the next
    `save`, `wait` or at leaving.

    Args:
        root: the folder of checkpoints.
        rank: this process's.
        world_size: how many processes save together.
        attempt: names the start of the run; two attempts never write the same file.
        mode: `background`, `blocking`, or `auto`: background if the copy of the state fits `memory_bytes`.
        memory_bytes: what the copy may take on this rank.
        max_file_bytes: of a safetensors file.
    """

    def __init__(
        self,
        root: Location,
        rank: int,
        world_size: int,
        attempt: str,
        mode: str = "auto",
        memory_bytes: int = 2 * 1024**3,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._root, self._rank, self._world_size, self._attempt = root, rank, world_size, attempt
        self._mode, self._memory_bytes, self._max_file_bytes = mode, memory_bytes, max_file_bytes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._leaving = threading.Event()
        root.make_dirs()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._leaving.set()  # other ranks may never come
            if self._thread is not None:
                self._thread.join()
            return
        self.wait()

    def describe_mode(self, pieces: Iterable[Piece]) -> tuple[bool, str]:
        """Returns whether a save goes to the background, and why."""
        size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)
        shown = f"{size / 1e6:,.0f} MB"
        if self._mode != "auto":
            return self._mode == "background", f"checkpoint.mode is {self._mode} ({shown})"
        fits = size <= self._memory_bytes
        relation = "fits" if fits else "does not fit"
        return fits, f"a copy of {shown} {relation} checkpoint.memory_bytes={self._memory_bytes:,}"

    def save(
        self,
        step: int,
        pieces: Callable[[], Iterable[Piece]],
        state: dict[str, Any],
        keep: int,
        protect: set[int],
    ) -> None:
        """Saves a step. A committed checkpoint of the same step is left: the same step is the same state.

        Args:
            step: optimizer steps done.
            pieces: gives this rank's pieces; is called before this returns, and may give live views.
            state: JSON; rank 0's is kept.
            keep: newest checkpoints that are kept after the commit.
            protect: steps that are kept beside them.

        Raises:
            CheckpointError: if the former or this save fails; committed checkpoints are as they were.
        """
        self.wait()
        if step in find_steps(self._root):
            try:
                _intact(_folder(self._root, step))
            except CheckpointError:
                _folder(self._root, step).join(_MANIFEST).delete_file()
            else:
                self._prune(keep, protect)
                return
        in_background, _ = self.describe_mode(pieces())
        if not in_background:
            self._write(step, pieces(), state, keep, protect)
            return
        snapshot = [
            Piece(piece.name, piece.tensor.detach().to("cpu", copy=True), piece.offset, piece.shape) for piece in pieces()
        ]
        self._thread = threading.Thread(
            target=self._write_quietly, args=(step, snapshot, state, keep, protect), name="embedshard-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in flight.

        Raises:
            CheckpointError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_quietly(
        self, step: int, pieces: Iterable[Piece], state: dict[str, Any], keep: int, protect: set[int]
    ) -> None:
        try:
            self._write(step, pieces, state, keep, protect)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, pieces: Iterable[Piece], state: dict[str, Any], keep: int, protect: set[int]) -> None:
        folder = _folder(self._root, step)
        try:
            folder.make_dirs()
            part = self._write_files(folder, pieces)
            part_file = folder.join(f"{self._attempt}-r{self._rank:05d}.json")
            part_file.write_bytes_atomically(json.dumps(part).encode())
            if self._rank == 0:
                self._commit(folder, step, state)
                self._prune(keep, protect)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            for name in folder.list_names():
                if name.startswith(f"{self._attempt}-r{self._rank:05d}"):
                    folder.join(name).delete_file()
            cause = "the disk is full" if full else str(error)
            advice = "Free some space" if full else "See that the folder can be written"
            raise CheckpointError(
                f"{folder.uri} cannot be saved: {cause}. Earlier checkpoints are as they were. {advice}, then resume."
            ) from error

    def _write_files(self, folder: Location, pieces: Iterable[Piece]) -> dict[str, Any]:
        files: dict[str, Any] = {}
        listed: list[dict[str, Any]] = []
        for number, portion in enumerate(_portions(pieces, self._max_file_bytes)):
            name = f"{self._attempt}-r{self._rank:05d}-{number:05d}.safetensors"
            content = {str(i): piece.tensor.detach().cpu().contiguous() for i, piece in enumerate(portion)}
            data = safetensors.torch.save(content)
            folder.join(name).write_bytes_atomically(data)
            files[name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            listed += [
                {
                    "name": piece.name,
                    "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                    "whole": list(piece.shape),
                    "file": name,
                    "key": str(i),
                    "offset": list(piece.offset),
                    "shape": list(piece.tensor.shape),
                }
                for i, piece in enumerate(portion)
            ]
        return {"files": files, "pieces": listed}

    def _commit(self, folder: Location, step: int, state: dict[str, Any]) -> None:
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for part in self._parts(folder):
            files |= part["files"]
            for piece in part["pieces"]:
                tensor = tensors.setdefault(piece["name"], {"dtype": piece["dtype"], "shape": piece["whole"], "pieces": []})
                tensor["pieces"].append({key: piece[key] for key in ("file", "key", "offset", "shape")})
        manifest = {
            "format": FORMAT,
            "step": step,
            "attempt": self._attempt,
            "world_size": self._world_size,
            "state": state,
            "files": files,
            "tensors": tensors,
        }
        whole = manifest | {"sha256": _digest(manifest)}
        folder.join(_MANIFEST).write_bytes_atomically(json.dumps(whole, sort_keys=True).encode())
        for name in folder.list_names():
            if name not in files and name != _MANIFEST:
                folder.join(name).delete_file()

    def _parts(self, folder: Location) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        for rank in range(self._world_size):
            part = folder.join(f"{self._attempt}-r{rank:05d}.json")
            while not part.exists():
                if self._leaving.wait(_POLL_S) or time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder.uri} is not committed: rank {rank} of {self._world_size} has not written its share. "
                        f"Earlier checkpoints are as they were; see what that rank says, then resume."
                    )
            content = json.loads(part.read_bytes())
            assert isinstance(content, dict)
            yield content

    def _prune(self, keep: int, protect: set[int]) -> None:
        """Deletes checkpoints that are neither among the newest nor protected, and torn saves older than the newest."""
        if self._rank != 0:
            return
        steps = find_steps(self._root)
        kept = {*steps[-keep:], *protect}
        for name in self._root.list_names():
            match = _FOLDER.match(name)
            if match and int(match.group(1)) not in kept and steps and int(match.group(1)) <= steps[-1]:
                self._root.join(name, _MANIFEST).delete_file()  # first: what is half deleted is no checkpoint
                self._root.join(name).delete_tree()


def _portions(pieces: Iterable[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """Yields lists of pieces of at most so many bytes each; a larger piece is cut by rows."""
    portion: list[Piece] = []
    size = 0
    for whole in pieces:
        for piece in _cut(whole, max_bytes):
            piece_bytes = piece.tensor.numel() * piece.tensor.element_size()
            if portion and size + piece_bytes > max_bytes:
                yield portion
                portion, size = [], 0
            portion.append(piece)
            size += piece_bytes
    if portion:
        yield portion


def _cut(piece: Piece, max_bytes: int) -> Iterator[Piece]:
    tensor = piece.tensor
    if tensor.dim() == 0 or tensor.numel() * tensor.element_size() <= max_bytes:
        yield piece
        return
    rows = max(1, max_bytes // max(1, tensor[0].numel() * tensor.element_size()))
    for first in range(0, len(tensor), rows):
        offset = (piece.offset[0] + first, *piece.offset[1:])
        yield Piece(piece.name, tensor[first : first + rows], offset, piece.shape)
