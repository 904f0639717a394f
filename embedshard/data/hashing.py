"""The stated hashes of ids, strings and n-grams, pinned by tests: a table's rows mean the same in every release."""

from __future__ import annotations

__all__ = ["GOLDEN", "WordArray", "finalised", "hash_integers", "hash_ngrams", "hash_strings"]

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
"""What splitmix64 counts by."""
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def hash_integers(ids: IntArray | WordArray, seed: int) -> WordArray:
    """Returns a 64-bit hash of each id: splitmix64 (Steele et al. 2014) of id + (seed + 1) * its golden constant."""
    return finalised(ids.astype(np.uint64) + np.uint64((seed + 1) * GOLDEN % 2**64))


def hash_strings(ids: pa.Array, seed: int) -> WordArray:
    """Returns a 64-bit hash of each string: FNV-1a over its UTF-8 bytes, then as for an integer.

    All strings advance one byte at a time together, so the cost is one pass an array for each byte of the longest.
    """
    binary = ids.cast(pa.large_string()).cast(pa.large_binary())
    _, offsets_buffer, data_buffer = binary.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[binary.offset : binary.offset + len(binary) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.zeros(0, dtype=np.uint8)
    words = np.full(len(binary), _FNV_OFFSET, dtype=np.uint64)
    lengths = np.diff(offsets)
    by_length = np.argsort(-lengths, kind="stable")
    sorted_starts, sorted_lengths = offsets[:-1][by_length], lengths[by_length]
    hashed = words[by_length]
    for place in range(int(sorted_lengths[0]) if len(sorted_lengths) else 0):
        count = int(np.searchsorted(-sorted_lengths, -place, side="left"))  # strings longer than `place`
        hashed[:count] = (hashed[:count] ^ data[sorted_starts[:count] + place]) * np.uint64(_FNV_PRIME)
    words[by_length] = hashed
    return finalised(words + np.uint64((seed + 1) * GOLDEN % 2**64))


def hash_ngrams(ids: IntArray, lengths: IntArray, sizes: Collection[int], seed: int) -> tuple[WordArray, IntArray]:
    """Returns a 64-bit hash of each run of ids that lies within one list, and how many each list has.

    The hash of (a, b, c) is h(h(h(a) + b) + c), where h is `hash_integers` and sums are modulo 2**64.

    Args:
        ids: of all lists one after another, at least 0.
        lengths: of the lists.
        sizes: how many ids a run has; at least 1 each.
        seed: of the hash.

    Returns:
        The hashes of all lists one after another, those of a list by where the run begins, of two that begin at one place
        the shorter first; and the numbers of runs, (n,) int64.
    """
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ids))  # ids from here to the list's end
    hashes = hash_integers(ids, seed)
    found, is_within = [], []
    for size in range(1, max(sizes) + 1):
        if size > 1:
            begins = max(len(ids) - size + 1, 0)
            hashes[:begins] = hash_integers(hashes[:begins] + ids[size - 1 :].astype(np.uint64), seed)
        if size in sizes:
            found.append(hashes.copy())
            is_within.append(left >= size)
    counts = np.zeros(len(lengths), dtype=np.int64)
    for size in set(sizes):
        counts += np.maximum(lengths - size + 1, 0)
    return np.stack(found, axis=1)[np.stack(is_within, axis=1)], counts


def finalised(words: WordArray) -> WordArray:
    """Returns splitmix64's last steps of each word, which spread it over all 64 bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
