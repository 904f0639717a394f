"""What a checkpoint's manifest says, and whether it can be believed.

Owns the JSON of manifests and of ranks' part files, the hash that a manifest carries of itself, and the check that pieces
cover each tensor exactly once. Must not know how files are written or read.
"""

from __future__ import annotations

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "DamageError",
    "FileEntry",
    "Manifest",
    "PartFile",
    "PieceEntry",
    "TensorEntry",
    "check",
    "dtype_name",
    "overlap",
    "parse_manifest",
    "seal",
    "volume",
]

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 1
_LARGEST = 2**62

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64),
    )
}
"""The dtypes that safetensors knows, by the name that a manifest gives them."""

Size = Annotated[int, Field(ge=0, lt=_LARGEST)]
Sizes = tuple[Size, ...]


class DamageError(Exception):
    """A manifest or a file is not what was written; what was met, for a CheckpointError that says what to do."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Entry):
    """A safetensors file of the checkpoint's folder."""

    name: Annotated[str, Field(max_length=255)]
    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorEntry(_Entry):
    """A whole tensor."""

    dtype: str
    shape: Sizes


class PieceEntry(_Entry):
    """A block of a tensor: which file holds it under which key, and where it lies in the whole."""

    name: str
    file: str
    key: str
    offset: Sizes
    shape: Sizes


class PartFile(_Entry):
    """What one rank has written, until rank 0 gathers it into the manifest."""

    tensors: dict[str, TensorEntry]
    pieces: tuple[PieceEntry, ...]
    files: tuple[FileEntry, ...]


class Manifest(_Entry):
    """All of a checkpoint but the numbers."""

    format: int = FORMAT_VERSION
    step: Size
    attempt: str
    world_size: Annotated[int, Field(ge=1)]
    state: dict[str, Any]
    tensors: dict[str, TensorEntry]
    pieces: tuple[PieceEntry, ...]
    files: tuple[FileEntry, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the manifest's name of a dtype; KeyError if safetensors does not know it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise KeyError(name)
    return name


def volume(shape: Sequence[int]) -> int:
    """Returns the number of elements."""
    return math.prod(shape)


def overlap(
    offset: Sequence[int], shape: Sequence[int], other_offset: Sequence[int], other_shape: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    """Returns what two blocks share, as (first, end) by axis; None if they share nothing."""
    region = []
    for first, size, other_first, other_size in zip(offset, shape, other_offset, other_shape, strict=True):
        low, high = max(first, other_first), min(first + size, other_first + other_size)
        if low >= high:
            return None
        region.append((low, high))
    return tuple(region)


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Returns a manifest's bytes: canonical JSON, with the SHA-256 of all the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return _canonical({**rest, "sha256": hashlib.sha256(_canonical(rest)).hexdigest()})


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest and checks that it makes sense.

    Raises:
        DamageError: as the end of a sentence about the manifest: if a bit is not as it was written, the format is
            unknown, a file lies outside the folder, or the pieces do not cover each tensor exactly once.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"is damaged: it is no JSON ({error})") from error
    # Comparing bytes, not values, refuses each flipped bit, also where both spellings mean the same number.
    is_sealed = isinstance(content, dict) and seal(content) == data
    if isinstance(content, dict) and content.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise DamageError(
            f"is of format {content['format']!r}, and this embedshard reads format {FORMAT_VERSION}: use the release "
            f"that wrote it" + ("" if is_sealed else " (if it is not damaged: its SHA-256 does not match)")
        )
    if not is_sealed:
        raise DamageError("is damaged: its content does not match the SHA-256 that it carries")
    del content["sha256"]
    try:
        manifest = Manifest.model_validate_json(_canonical(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamageError(f"does not make sense at '{where}': {first['msg']}") from error
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Checks what types cannot say: plain file names, known dtypes, and pieces that cover each tensor exactly once.

    Raises:
        DamageError: as the end of a sentence about the manifest.
    """
    files = [file.name for file in manifest.files]
    for name in files:
        if not _is_plain(name):
            raise DamageError(f"names the file {name!r}, which is no plain name within its folder")
    if len(set(files)) != len(files):
        raise DamageError("names a file twice")
    pieces: dict[str, list[PieceEntry]] = defaultdict(list)
    for piece in manifest.pieces:
        if piece.name not in manifest.tensors:
            raise DamageError(f"has a piece of '{piece.name}', which it does not list among the tensors")
        pieces[piece.name].append(piece)
    known = set(files)
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPES:
            raise DamageError(f"says that '{name}' is of dtype {tensor.dtype!r}, which is unknown")
        if lost := next((piece.file for piece in pieces[name] if piece.file not in known), None):
            raise DamageError(f"says that '{name}' is in {lost!r}, which it does not list among the files")
        if problem := _tiling_problem(tensor.shape, pieces[name]):
            raise DamageError(f"has pieces of '{name}' that do not cover its shape {list(tensor.shape)}: {problem}")


def _is_plain(name: str) -> bool:
    stem, dot, suffix = name.partition(".")
    return dot == "." and suffix == "safetensors" and stem.isascii() and stem.replace("-", "").isalnum()


def _tiling_problem(shape: Sequence[int], pieces: Sequence[PieceEntry]) -> str | None:
    """Says why blocks do not cover a shape exactly once; None if they do.

    They do if they lie inside, no two share an element, and their sizes add up.
    """
    for piece in pieces:
        if len(piece.offset) != len(shape) or len(piece.shape) != len(shape):
            return f"one at {list(piece.offset)} has another number of axes"
        if any(first + size > end for first, size, end in zip(piece.offset, piece.shape, shape, strict=True)):
            return f"{list(piece.shape)} at {list(piece.offset)} reaches outside"
        if not volume(piece.shape):
            return f"one at {list(piece.offset)} is empty"
    # Along the first axis, only pieces whose spans meet can overlap.
    open_pieces: list[PieceEntry] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        open_pieces = [other for other in open_pieces if not shape or other.offset[0] + other.shape[0] > piece.offset[0]]
        for other in open_pieces:
            if overlap(piece.offset, piece.shape, other.offset, other.shape) is not None:
                return f"those at {list(other.offset)} and {list(piece.offset)} overlap"
        open_pieces.append(piece)
    missing = volume(shape) - sum(volume(piece.shape) for piece in pieces)
    return f"{missing:,} of {volume(shape):,} elements are in none" if missing else None


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode("ascii")
