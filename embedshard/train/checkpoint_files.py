"""Pieces of tensors in safetensors files: written in files of bounded size, read back only after they are verified.

Must not know manifests, ranks that wait for each other, or which checkpoint is the newest.
"""

from __future__ import annotations

__all__ = ["MAX_FILE_BYTES", "Piece", "files_at_once", "num_bytes", "read_file", "write_pieces"]

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import safetensors
import safetensors.torch
import torch

from embedshard.errors import CheckpointError
from embedshard.storage import Location
from embedshard.train.checkpoint_format import (
    DTYPES,
    DamageError,
    FileEntry,
    PartFile,
    PieceEntry,
    TensorEntry,
    dtype_name,
)

MAX_FILE_BYTES: Final = 30 * 1000**2
"""Below 32 MiB, above which glibc gives memory back to the kernel, which clears it for each file anew."""


@dataclass(frozen=True)
class Piece:
    """One block of a whole tensor.

    Attributes:
        name: the whole's, such as `tables/item/weight`.
        tensor: the block, on any device; may be a live view, of any strides.
        offset: where it begins in the whole; () for a scalar.
        shape: of the whole.
    """

    name: str
    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def files_at_once(folder: Location) -> int:
    """Returns how many files of a folder are read, or written, at the same time: a store answers late, and many at once."""
    return 2 if folder.is_local else 4


def num_bytes(pieces: Iterable[Piece]) -> int:
    """Returns the bytes of the pieces' elements."""
    return sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)


def write_pieces(folder: Location, prefix: str, pieces: Iterable[Piece], max_file_bytes: int) -> PartFile:
    """Writes pieces, one file after the other, and returns what a manifest has to say of them.

    Each file's SHA-256 is taken from memory, so it also tells what a disk changed. Files are written in threads, while their
    SHA-256 is taken and the next one is made: at most `files_at_once` and one more are in memory.

    Args:
        folder: exists.
        prefix: the files are named `<prefix>-00000.safetensors`, ...
        pieces: taken one by one. An empty one leaves its tensor's name and shape.
        max_file_bytes: a file's; larger pieces are cut, by rows where they have several.

    Raises:
        CheckpointError: if safetensors does not know a dtype.
        OSError: as the filesystem does.
    """
    tensors: dict[str, TensorEntry] = {}
    entries: list[PieceEntry] = []
    files: list[FileEntry] = []
    writes: deque[Future[None]] = deque()
    at_once = files_at_once(folder)
    with ThreadPoolExecutor(at_once, "embedshard-checkpoint") as threads:
        for content in _portions(_registered(pieces, tensors), max_file_bytes):
            name = f"{prefix}-{len(files):05d}.safetensors"
            data = safetensors.torch.save(_on_cpu(content))
            if len(writes) == at_once:
                writes.popleft().result()
            writes.append(threads.submit(folder.join(name).write_bytes_atomically, data))
            files.append(FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
            entries += [
                PieceEntry(name=piece.name, file=name, key=_key(piece), offset=piece.offset, shape=tuple(piece.tensor.shape))
                for piece in content
            ]
        for write in writes:
            write.result()
    return PartFile(tensors=tensors, pieces=tuple(entries), files=tuple(files))


def read_file(
    folder: Location, file: FileEntry, pieces: Iterable[PieceEntry], dtypes: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Reads a file and returns its tensors by key, after its size and SHA-256 and all that is known of them were checked.

    Args:
        folder: where it is.
        file: what the manifest says of it.
        pieces: what the manifest says is in it.
        dtypes: the manifest's names of dtypes, by name of tensor.

    Raises:
        DamageError: if it is not as it was written.
    """
    location = folder.join(file.name)
    try:
        size = location.size()
        data = location.read_bytes() if size == file.size else b""
    except FileNotFoundError as error:
        raise DamageError(f"{location.uri} is missing; the manifest names it") from error
    except OSError as error:
        raise DamageError(f"{location.uri} cannot be read ({error})") from error
    if size != file.size or len(data) != file.size:
        raise DamageError(f"{location.uri} has {size:,} bytes, the manifest says {file.size:,}: it was cut off or replaced")
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise DamageError(
            f"{location.uri} is damaged: its SHA-256 is {digest[:12]}..., the manifest says {file.sha256[:12]}..."
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DamageError(f"{location.uri} is not a safetensors file ({error})") from error
    for piece in pieces:
        tensor = tensors.get(piece.key)
        if tensor is None:
            raise DamageError(f"{location.uri} does not hold '{piece.key}', which the manifest says it does")
        if tensor.dtype != DTYPES[dtypes[piece.name]] or tuple(tensor.shape) != piece.shape:
            raise DamageError(
                f"{location.uri}: '{piece.key}' is {tensor.dtype} of shape {list(tensor.shape)}, the manifest says "
                f"{dtypes[piece.name]} of shape {list(piece.shape)}"
            )
    return tensors


def _registered(pieces: Iterable[Piece], tensors: dict[str, TensorEntry]) -> Iterator[Piece]:
    """Passes on the pieces that have elements; notes all of their tensors."""
    for piece in pieces:
        assert len(piece.offset) == piece.tensor.dim() == len(piece.shape), f"{piece.name}: offset and shape have other axes"
        try:
            entry = TensorEntry(dtype=dtype_name(piece.tensor.dtype), shape=tuple(piece.shape))
        except KeyError as error:
            raise CheckpointError(
                f"'{piece.name}' is {piece.tensor.dtype}, which a checkpoint cannot hold. It holds: {', '.join(DTYPES)}."
            ) from error
        assert tensors.setdefault(piece.name, entry) == entry, f"{piece.name}: two pieces tell of two wholes"
        if piece.tensor.numel():
            yield replace(piece, tensor=piece.tensor.detach())


def _portions(pieces: Iterable[Piece], max_file_bytes: int) -> Iterator[list[Piece]]:
    """Yields what goes into each file."""
    content: list[Piece] = []
    size = 0
    for whole in pieces:
        for piece in _cut(whole, max_file_bytes):
            added = num_bytes([piece]) + _header_bytes(piece)
            if content and size + added > max_file_bytes:
                yield content
                content, size = [], 0
            content.append(piece)
            size += added
    if content:
        yield content


def _cut(piece: Piece, max_file_bytes: int) -> Iterator[Piece]:
    """Cuts a piece that is too large for a file, along the first axis that can be cut."""
    budget = max(0, max_file_bytes - _header_bytes(piece))
    size = num_bytes([piece])
    axis = next((axis for axis, length in enumerate(piece.tensor.shape) if length > 1), None)
    if size <= budget or axis is None:
        yield piece
        return
    length = piece.tensor.shape[axis]
    step = max(1, budget * length // size)
    for first in range(0, length, step):
        offset = tuple(at + first if i == axis else at for i, at in enumerate(piece.offset))
        block = piece.tensor.narrow(axis, first, min(step, length - first))
        yield from _cut(replace(piece, tensor=block, offset=offset), max_file_bytes)


def _key(piece: Piece) -> str:
    return f"{piece.name}@{','.join(str(at) for at in piece.offset)}"


def _header_bytes(piece: Piece) -> int:
    """Bounds what a piece takes of a file's header, and its share of the header's own frame."""
    return len(json.dumps(_key(piece)).encode()) + 128 + 24 * len(piece.shape)


def _on_cpu(content: Sequence[Piece]) -> dict[str, torch.Tensor]:
    """Returns the blocks as safetensors wants them: contiguous, on the CPU, no two in one storage."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for piece in content:
        tensor = piece.tensor.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[_key(piece)] = tensor
    return tensors
