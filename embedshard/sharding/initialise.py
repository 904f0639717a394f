"""How rows begin: a function of (seed, table, row), so that every plan begins with the same weights.

TorchRec initialises each shard by itself, so another plan would begin with other weights. Here the element (row, column)
of a table is draw number row * dim + column of a counter-based generator keyed by (seed, table), so a row can be made
wherever it lies, and a table that grows keeps its rows.
"""

from __future__ import annotations

__all__ = ["initial_rows", "initialise_tables", "scattered_rows"]

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import TableSpec
from embedshard.data.hashing import hash_integers
from embedshard.sharding.shards import Shard

_BLOCK_ELEMENTS = 32 * 1024
"""Made at once: what is in between stays in the cache, and the allocator gives the same pages again."""
_PART_ELEMENTS = 1024 * 1024
"""Made by a thread at a time, and copied to a GPU in one go."""
_WORDS_PER_COUNT = 4  # Philox4x64 gives four words a count; a dim is a multiple of four


def initial_rows(seed: int, spec: TableSpec, first: int, last: int) -> npt.NDArray[np.float32]:
    """Returns the first values of rows [first, last) of a table, (last - first, dim) float32.

    `normal` by Box and Muller's transform, `uniform` in [-scale, scale).
    """
    count = (last - first) * spec.dim
    if spec.init.kind == "zeros" or spec.managed_by is not None:
        return scattered_rows(seed, spec, np.arange(first, last, dtype=np.int64))
    key = np.array([seed, zlib.crc32(spec.name.encode())], dtype=np.uint64)
    generator = np.random.Philox(key=key)
    generator.advance(first * spec.dim // _WORDS_PER_COUNT)
    return _values(generator.random_raw(count), spec).reshape(last - first, spec.dim)


def scattered_rows(seed: int, spec: TableSpec, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Returns the first values of any rows of a managed table, (n, dim) float32; row by row they cost the same.

    Its words are hashes of the elements' numbers, since a row may begin anew at any time.
    """
    if spec.init.kind == "zeros":
        return np.zeros((len(rows), spec.dim), dtype=np.float32)
    elements = (rows[:, None] * spec.dim + np.arange(spec.dim)).ravel()
    words = hash_integers(hash_integers(elements, zlib.crc32(spec.name.encode())), seed)
    return _values(words, spec).reshape(len(rows), spec.dim)


def _values(words: npt.NDArray[np.uint64], spec: TableSpec) -> npt.NDArray[np.float32]:
    """Returns what random words stand for; overwrites them. Logarithm and cosine are torch's, twice as fast as numpy's."""
    scale = spec.init.scale if spec.init.scale is not None else spec.dim**-0.5
    if spec.init.kind == "uniform":
        words >>= np.uint64(11)
        values = words.astype(np.float64)
        values *= 2.0**-52
        values -= 1.0
    else:
        values = (words >> np.uint64(32)).astype(np.float64)
        values += 1.0
        values *= 2.0**-32  # (0, 1]
        torch.from_numpy(values).log_()
        values *= -2.0
        np.sqrt(values, out=values)
        words &= np.uint64(0xFFFFFFFF)
        angles = words.astype(np.float64)
        angles *= 2.0 * np.pi * 2.0**-32
        torch.from_numpy(angles).cos_()
        values *= angles
    values *= scale
    return values.astype(np.float32)


@torch.no_grad()
def initialise_tables(seed: int, specs: Iterable[TableSpec], shards: Iterable[Shard]) -> None:
    """Writes the first values into this rank's shards of tables, a block of rows at a time. Not collective.

    In as many threads as torch has: a table of a GPU's size takes one thread many minutes (docs/performance.md).
    """
    by_name = {spec.name: spec for spec in specs}
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="embedshard-initialise") as pool:
        for shard in shards:
            spec = by_name[shard.table]
            if spec.init.kind == "zeros":
                shard.tensor.zero_()
                continue
            rows = max(1, _PART_ELEMENTS // spec.dim)
            spans = ((first, min(first + rows, len(shard.tensor))) for first in range(0, len(shard.tensor), rows))
            for _ in pool.map(lambda span, spec=spec, shard=shard: _fill(seed, spec, shard, *span), spans):
                pass


@torch.no_grad()  # which is a thread's own
def _fill(seed: int, spec: TableSpec, shard: Shard, first: int, last: int) -> None:
    """Writes the first values of a shard's rows [first, last). What is not on the CPU is copied there in one go."""
    row, column = shard.offset
    part = shard.tensor[first:last]
    made = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=part.dtype)
    block = max(1, _BLOCK_ELEMENTS // spec.dim)
    for start in range(0, last - first, block):
        stop = min(start + block, last - first)
        values = initial_rows(seed, spec, row + first + start, row + first + stop)[:, column : column + part.shape[1]]
        made[start:stop].copy_(torch.from_numpy(np.ascontiguousarray(values)))
    if made is not part:
        part.copy_(made)
