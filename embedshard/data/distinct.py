"""How many ids are different, and how many of one set another has never seen, in bounded memory.

Each id is hashed to 64 bits, and the least of the hashes are kept (k minimum values, Bar-Yossef et al. 2002). While no more
are met than are kept, all answers are exact. Beyond, those that are kept are a sample of the ids, the same in every set: so
samples can be compared, which the registers of a HyperLogLog cannot.
"""

from __future__ import annotations

__all__ = ["Absent", "DistinctIds"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedshard.data.hashing import WordArray, hash_integers, hash_strings
from embedshard.data.mapped_ids import integers

IntArray = npt.NDArray[np.int64]

_KEPT = 2**20
_WORDS = 2.0**64


@dataclass(frozen=True)
class Absent:
    """What of one set's ids another set has not.

    Attributes:
        ids: how many different ones.
        id_share: of the different ones.
        value_share: of all, each as often as it occurs.
        is_exact: whether these are counted, not estimated.
    """

    ids: int
    id_share: float
    value_share: float
    is_exact: bool


class DistinctIds:
    """The different ids of a column, counted, or estimated within about 0.1 % if they are more than a million.

    Args:
        kept: hashes that are kept.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._hashes: WordArray = np.zeros(0, dtype=np.uint64)
        self._counts: IntArray = np.zeros(0, dtype=np.int64)
        self._pending: list[WordArray] = []
        self._num_pending = 0
        self._limit = np.uint64(2**64 - 1)
        """Hashes up to this are kept."""

    def add(self, ids: pa.Array) -> None:
        """Adds integers or strings; nulls are none."""
        hashes = _hashes(ids.drop_null() if ids.null_count else ids)
        if not self.is_exact:
            hashes = hashes[hashes <= self._limit]
        self._pending.append(hashes)
        self._num_pending += len(hashes)
        if self._num_pending >= self._kept:
            self._merge()

    @property
    def is_exact(self) -> bool:
        """Whether all that were added are kept."""
        return bool(self._limit == np.uint64(2**64 - 1))

    def estimate(self) -> int:
        """Returns how many different ids were added."""
        self._merge()
        if self.is_exact:
            return len(self._hashes)
        return round((len(self._hashes) - 1) / (float(self._limit) / _WORDS))

    def absent_from(self, others: Sequence[DistinctIds]) -> Absent:
        """Returns how many of these ids none of the others has."""
        everyone = (self, *others)
        for each in everyone:
            each._merge()
        limit = min(each._limit for each in everyone)
        mine = self._hashes <= limit
        absent = np.ones(int(mine.sum()), dtype=np.bool_)
        for other in others:
            absent &= ~np.isin(self._hashes[mine], other._hashes, assume_unique=True)
        counts = self._counts[mine]
        id_share = float(absent.sum() / max(len(absent), 1))
        value_share = float(counts[absent].sum() / max(counts.sum(), 1))
        is_exact = all(each.is_exact for each in everyone)
        ids = int(absent.sum()) if is_exact else round(id_share * self.estimate())
        return Absent(ids, id_share, value_share, is_exact)

    def _merge(self) -> None:
        if not self._pending:
            return
        added, added_counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._num_pending = [], 0
        hashes, places = np.unique(np.concatenate([self._hashes, added]), return_inverse=True)
        counts = np.bincount(places, weights=np.concatenate([self._counts, added_counts])).astype(np.int64)
        self._hashes, self._counts = hashes[: self._kept], counts[: self._kept]
        if len(hashes) > self._kept:
            self._limit = self._hashes[-1]


def _hashes(ids: pa.Array) -> WordArray:
    if pa.types.is_null(ids.type) or not len(ids):
        return np.zeros(0, dtype=np.uint64)
    if pa.types.is_dictionary(ids.type):
        return _hashes(ids.dictionary)[ids.indices.cast(pa.int64()).to_numpy(zero_copy_only=False)]
    return hash_integers(integers(ids), 0) if pa.types.is_integer(ids.type) else hash_strings(ids, 0)
