"""Committed checkpoints: which there are, whether they are intact, and how any world reads what it wants of one.

Must not know how checkpoints are written, models, torchrec or process groups. Nothing that is read can run code.
"""

from __future__ import annotations

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "TensorSpec",
    "find_steps",
    "newest_intact",
    "offer",
    "open_checkpoint",
    "open_step",
    "prune",
    "step_folder",
]

import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from types import MappingProxyType
from typing import Any

import torch

from embedshard.errors import CheckpointError, nearest
from embedshard.storage import Location
from embedshard.train.checkpoint_files import Piece, files_at_once, read_file
from embedshard.train.checkpoint_format import (
    DTYPES,
    DamageError,
    FileEntry,
    Manifest,
    PieceEntry,
    overlap,
    parse_manifest,
)

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
_LARGEST_MANIFEST = 2**30
_LARGEST_TO_OFFER = 8 * 1000**3
"""A checkpoint with more bytes is not read through merely to be offered in a message."""


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A committed checkpoint whose manifest was read and makes sense. Made by `open_checkpoint`.

    Attributes:
        folder: where it is.
        step: optimizer steps done when it was taken.
        attempt: the start of the run that wrote it.
        world_size: how many ranks wrote it; readers need not care.
        state: the JSON that the caller gave to keep.
        tensors: what it holds, by name.
        size_bytes: of its files.
        num_files: how many they are.
    """

    def __init__(self, folder: Location, manifest: Manifest) -> None:
        self.folder = folder
        self.step: int = manifest.step
        self.attempt: str = manifest.attempt
        self.world_size: int = manifest.world_size
        self.state: dict[str, Any] = manifest.state
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(
            {name: TensorSpec(DTYPES[entry.dtype], entry.shape) for name, entry in manifest.tensors.items()}
        )
        self.size_bytes = sum(file.size for file in manifest.files)
        self.num_files = len(manifest.files)
        self._dtypes = {name: entry.dtype for name, entry in manifest.tensors.items()}
        self._files: dict[str, FileEntry] = {file.name: file for file in manifest.files}
        self._by_name: dict[str, list[PieceEntry]] = defaultdict(list)
        self._by_file: dict[str, list[PieceEntry]] = defaultdict(list)
        for piece in manifest.pieces:
            self._by_name[piece.name].append(piece)
            self._by_file[piece.file].append(piece)

    def read_into(self, wanted: Iterable[Piece | tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
        """Fills blocks of tensors, cut in any way, from the pieces that overlap them. Not collective.

        Reads each file that is needed once, and verifies all of it before anything is copied from it; the next ones are
        read meanwhile (`files_at_once`). If a file is damaged, blocks may have been filled from the files before it.

        Args:
            wanted: blocks to fill, which may be live views: as (name, offset in the whole, tensor), or as a `Piece`, for
                which the shape of the whole must be the checkpoint's too.

        Raises:
            CheckpointError: if a name is not there, a dtype or shape is another, or a file is damaged; nothing was filled
                in the first two cases.
        """
        copies: dict[str, list[tuple[PieceEntry, tuple[int, ...], torch.Tensor]]] = defaultdict(list)
        for block in wanted:
            if isinstance(block, Piece):
                name, offset, tensor, shape = block.name, block.offset, block.tensor, tuple(block.shape)
            else:
                (name, offset, tensor), shape = block, None
            self._check_wanted(name, offset, tensor, shape)
            for piece in self._by_name[name]:
                if overlap(piece.offset, piece.shape, offset, tensor.shape) is not None:
                    copies[piece.file].append((piece, offset, tensor))
        try:
            for file, content in self._loaded(sorted(copies)):
                _copy(content, copies[file])
        except DamageError as error:
            raise CheckpointError(f"{error}. {offer(self.folder)}") from error

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor whole. Not collective.

        Raises:
            CheckpointError: if there is no such tensor, or a file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder.uri} does not hold '{name}'. {nearest(name, self.tensors)}")
        spec = self.tensors[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.read_into([(name, (0,) * tensor.dim(), tensor)])
        return tensor

    def blocks(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yields the pieces of a tensor with where they begin in it, a file at a time. Not collective.

        Raises:
            CheckpointError: if there is no such tensor, or a file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder.uri} does not hold '{name}'. {nearest(name, self.tensors)}")
        try:
            for file, content in self._loaded(sorted({piece.file for piece in self._by_name[name]})):
                for piece in self._by_name[name]:
                    if piece.file == file:
                        yield piece.offset, content[piece.key]
        except DamageError as error:
            raise CheckpointError(f"{error}. {offer(self.folder)}") from error

    def row_blocks(
        self, name: str, wanted: Callable[[int, int], bool] = lambda first, last: True
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields a tensor's rows in order, all columns of them, as many at once as a piece has. Not collective.

        Beside one block no more than a few files are in memory (`files_at_once`, and the one that is copied from).

        Args:
            name: of a tensor with at least one axis.
            wanted: asked whether rows [first, last) are to be read; files that none is wanted of are not looked at.

        Raises:
            CheckpointError: if there is no such tensor, or a file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder.uri} does not hold '{name}'. {nearest(name, self.tensors)}")
        spec = self.tensors[name]
        cuts = sorted({0, spec.shape[0], *(piece.offset[0] for piece in self._by_name[name])})
        for first, last in pairwise(cuts):
            if wanted(first, last):
                block = torch.empty(last - first, *spec.shape[1:], dtype=spec.dtype)
                self.read_into([(name, (first, *(0 for _ in spec.shape[1:])), block)])
                yield first, block

    def verify(self) -> None:
        """Reads every file and checks its size, its SHA-256 and what it holds. Not collective.

        Raises:
            CheckpointError: naming the file, and the newest intact checkpoint.
        """
        damage = self.find_damage()
        if damage is not None:
            raise CheckpointError(f"{damage}. {offer(self.folder)}")

    def find_damage(self) -> str | None:
        """Reads every file, and says what is wrong with the first that is not as it was written; None if all are."""
        try:
            for _ in self._loaded(self._files):
                pass
        except DamageError as error:
            return str(error)
        return None

    def _loaded(self, files: Iterable[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yields what verified files hold, in their order; those that come next are read in threads.

        Raises:
            DamageError: in the place of the first file that is not as it was written.
        """
        rest, at_once = iter(files), files_at_once(self.folder)
        threads = ThreadPoolExecutor(at_once, "embedshard-checkpoint")
        try:
            ahead = deque((file, threads.submit(self._load, file)) for file in islice(rest, at_once))
            while ahead:
                file, loading = ahead.popleft()
                content = loading.result()
                ahead.extend((following, threads.submit(self._load, following)) for following in islice(rest, 1))
                del loading  # it holds the content, too
                yield file, content
                del content
        finally:
            threads.shutdown(cancel_futures=True)

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        return read_file(self.folder, self._files[file], self._by_file[file], self._dtypes)

    def _check_wanted(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor, shape: tuple[int, ...] | None) -> None:
        spec = self.tensors.get(name)
        if spec is None:
            raise CheckpointError(
                f"{self.folder.uri} does not hold '{name}', which is needed. {nearest(name, self.tensors)} "
                f"Use the config that the checkpoint was trained with."
            )
        fits = len(spec.shape) == tensor.dim() == len(offset) and all(
            first >= 0 and first + size <= end for first, size, end in zip(offset, tensor.shape, spec.shape, strict=True)
        )
        if spec.dtype != tensor.dtype or not fits or shape not in (None, spec.shape):
            block = f"{list(tensor.shape)} at {list(offset)}" + ("" if shape is None else f" of {list(shape)}")
            raise CheckpointError(
                f"{self.folder.uri}: '{name}' is {spec.dtype} of shape {list(spec.shape)}, needed is {tensor.dtype} of "
                f"shape {block}. Use the config that the checkpoint was trained with."
            )


def _copy(content: Mapping[str, torch.Tensor], copies: Iterable[tuple[PieceEntry, tuple[int, ...], torch.Tensor]]) -> None:
    """Copies what of a file's pieces overlaps blocks, each with its offset in the whole."""
    for piece, offset, tensor in copies:
        region = overlap(piece.offset, piece.shape, offset, tensor.shape)
        assert region is not None, "only overlapping pieces were taken"
        source = content[piece.key][tuple(slice(a - o, b - o) for (a, b), o in zip(region, piece.offset, strict=True))]
        target = tensor.detach()[tuple(slice(a - o, b - o) for (a, b), o in zip(region, offset, strict=True))]
        target.copy_(source)


def open_checkpoint(folder: Location) -> Checkpoint:
    """Opens a checkpoint: reads its manifest and checks that it makes sense; its files are not looked at.

    Raises:
        CheckpointError: if it is not there, was not committed, its manifest is damaged, or its format is unknown; names
            the newest intact one beside it.
    """
    try:
        return _open(folder)
    except DamageError as error:
        raise CheckpointError(f"{error}. {offer(folder)}") from error


def open_step(root: Location, step: int) -> Checkpoint:
    """Opens the checkpoint of a step, as `open_checkpoint` does."""
    return open_checkpoint(step_folder(root, step))


def find_steps(root: Location) -> list[int]:
    """Returns the steps of committed checkpoints, ascending; whether they are intact is not looked at."""
    return [step for step, folder in _step_folders(root) if folder.join(MANIFEST).exists()]


def newest_intact(root: Location, on_damage: Callable[[str], None] | None = None, verify: bool = True) -> Checkpoint | None:
    """Returns the newest checkpoint that is intact; None if none was ever committed.

    Ranks that call it each read everything: on more than one, let rank 0 call it and tell the others the step.

    Args:
        root: the folder of checkpoints.
        on_damage: told what is wrong with each newer one that is passed over.
        verify: whether all files are read and checked; else only their manifests are.

    Raises:
        CheckpointError: if there are checkpoints and none is intact: to begin anew is not this function's decision.
    """
    damages = []
    for step in reversed(find_steps(root)):
        checkpoint, damage = _examine(step_folder(root, step), verify)
        if damage is None:
            return checkpoint
        damages.append(damage)
        if on_damage is not None:
            on_damage(damage)
    if damages:
        raise CheckpointError(
            f"{root.uri} has {len(damages)} checkpoints and none is intact. The newest: {damages[0]}. "
            f"Restore one from a backup, or start a new run."
        )
    return None


def offer(folder: Location) -> str:
    """Returns the sentence that names the newest intact checkpoint beside a damaged one."""
    for step in reversed(find_steps(folder.parent)):
        other = step_folder(folder.parent, step)
        if other.name == folder.name:
            continue
        checkpoint, _ = _examine(other, verify=False)
        if checkpoint is not None and checkpoint.size_bytes > _LARGEST_TO_OFFER:
            return f"The newest one with an intact manifest is {other.name}."
        if checkpoint is not None and checkpoint.find_damage() is None:
            return f"The newest intact one is {other.name}."
    return "There is no intact one beside it: start a new run."


def prune(root: Location, keep: int, protect: Collection[int] = (), newest: int | None = None) -> None:
    """Deletes old checkpoints, and the folders of saves that did not finish and are older than the newest complete one.

    A checkpoint's manifest is deleted first, so one that is half deleted is none.

    Args:
        root: the folder of checkpoints.
        keep: how many of the newest are kept; at least 1.
        protect: steps that are kept besides.
        newest: leaves all later steps alone and out of the count: a run that went back to an earlier checkpoint, because
            a later one is damaged, must not take that one for its newest. None: the newest committed.

    Raises:
        CheckpointError: if one cannot be deleted.
    """
    assert keep >= 1, "the newest checkpoint is always kept"
    steps = [step for step in find_steps(root) if newest is None or step <= newest]
    if not steps:
        return
    kept = {*steps[-keep:], *protect}
    for step, folder in _step_folders(root):
        is_torn = step not in steps
        if step > steps[-1] or (step in kept and not is_torn):
            continue
        try:
            folder.join(MANIFEST).delete_file()
            folder.delete_tree()
        except OSError as error:
            raise CheckpointError(
                f"{folder.uri} is an old checkpoint and cannot be deleted ({error}). Newer ones are whole. Delete it by "
                f"hand, and see that the folder can be written."
            ) from error


def step_folder(root: Location, step: int) -> Location:
    """Returns the folder of a step's checkpoint."""
    return root.join(f"step-{step:08d}")


def _step_folders(root: Location) -> list[tuple[int, Location]]:
    steps = sorted(int(match[1]) for match in map(_FOLDER.fullmatch, root.list_names()) if match is not None)
    return [(step, step_folder(root, step)) for step in steps]


def _examine(folder: Location, verify: bool) -> tuple[Checkpoint, str | None] | tuple[None, str]:
    """Returns a checkpoint, if its manifest is intact, and what is wrong with it."""
    try:
        checkpoint = _open(folder)
    except DamageError as error:
        return None, str(error)
    return checkpoint, checkpoint.find_damage() if verify else None


def _open(folder: Location) -> Checkpoint:
    location = folder.join(MANIFEST)
    try:
        size = location.size()
        if size > _LARGEST_MANIFEST:
            raise DamageError(f"has {size:,} bytes, more than a manifest ever has")
        manifest = parse_manifest(location.read_bytes())
    except FileNotFoundError as error:
        what = "has no manifest, so its save did not finish" if folder.exists() else "is not there"
        raise DamageError(f"{folder.uri} {what}") from error
    except OSError as error:
        raise DamageError(f"{location.uri} cannot be read ({error})") from error
    except DamageError as error:
        raise DamageError(f"{location.uri} {error}") from error
    named = _FOLDER.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise DamageError(f"{location.uri} is of step {manifest.step}, not of its folder's step {int(named[1])}")
    return Checkpoint(folder, manifest)
