"""How often a feature looks up each row of its table, counted in memory that is bounded by what is counted."""

from __future__ import annotations

__all__ = ["FeatureIds", "IdCounts"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.data.columns import offsets_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_HOTTEST: Final = 10
_DENSE_ROWS: Final = 2**22
_PENDING_IDS: Final = 2**22


@dataclass(frozen=True)
class FeatureIds:
    """The lookups of a feature.

    Attributes:
        table: the table's name.
        lookups: how many there are.
        unknown: how many of them are of the row for unknown ids.
        distinct_rows: how many rows are looked up, that for unknown ids included.
        hottest: (row, count) of those that are looked up most; of equal counts the smaller row comes first.
    """

    table: str
    lookups: int
    unknown: int
    distinct_rows: int
    hottest: list[tuple[int, int]]


class IdCounts:
    """Counts a feature's lookups.

    A table of few rows has a counter for each; of a larger one only the rows that are met have one. Ids are counted many
    at a time, so that a lookup does not cost more where the table is larger.

    Args:
        table: the table's name.
        num_rows: its rows; row `num_rows` is for unknown ids.
    """

    def __init__(self, table: str, num_rows: int) -> None:
        self._table, self._num_rows = table, num_rows
        self._is_dense = num_rows <= _DENSE_ROWS
        self._rows = np.arange(num_rows + 1 if self._is_dense else 0, dtype=np.int64)
        self._counts = np.zeros(len(self._rows), dtype=np.int64)
        self._pending: list[IntArray] = []
        self._num_pending = 0

    def add(self, rows: IntArray) -> None:
        """Counts lookups; what is below 0 is none."""
        kept = rows[rows >= 0]
        self._pending.append(kept)
        self._num_pending += len(kept)
        if self._num_pending >= max(_PENDING_IDS, len(self._rows)):
            self._count()

    def result(self) -> FeatureIds:
        """Returns what was counted."""
        self._count()
        hottest = self._hottest()
        return FeatureIds(
            table=self._table,
            lookups=int(self._counts.sum()),
            unknown=int(self._counts[self._rows == self._num_rows].sum()),
            distinct_rows=int((self._counts > 0).sum()),
            hottest=[(int(self._rows[i]), int(self._counts[i])) for i in hottest if self._counts[i] > 0],
        )

    def lookups_between(self, bounds: Sequence[int]) -> IntArray:
        """Returns how many lookups are of rows [bounds[i], bounds[i + 1]), for each i; bounds ascend."""
        self._count()
        sums = offsets_of(self._counts)
        return np.diff(sums[np.searchsorted(self._rows, np.asarray(bounds, dtype=np.int64))])

    def to_the_power(self, alpha: float) -> IdCounts:
        """Returns counts raised to a power, in millionths: what popularity draws by."""
        return self.weighed(lambda counts: counts**alpha)

    def weighed(self, weigh: Callable[[FloatArray], FloatArray]) -> IdCounts:
        """Returns other counts of the rows that are met, in millionths: what a function makes of theirs, (n,) each."""
        self._count()
        found = IdCounts(self._table, self._num_rows)
        found._is_dense, found._rows = self._is_dense, self._rows
        found._counts = np.zeros(len(self._counts), dtype=np.int64)
        is_met = self._counts > 0
        found._counts[is_met] = (weigh(self._counts[is_met].astype(np.float64)) * 1e6).astype(np.int64)
        return found

    def shares(self) -> FloatArray:
        """Returns the share of the lookups that each row has which is met, (n,), rows ascending."""
        self._count()
        met = self._counts[self._counts > 0].astype(np.float64)
        return met / met.sum()

    def total(self) -> int:
        """Returns how many lookups were counted."""
        self._count()
        return int(self._counts.sum())

    def _hottest(self) -> IntArray:
        """Returns the places of the rows that are looked up most; rows ascend, so that a stable sort breaks ties."""
        least = np.sort(self._counts)[-_HOTTEST:][:1]
        places = np.flatnonzero(self._counts >= least) if len(least) else np.zeros(0, dtype=np.int64)
        return places[np.argsort(-self._counts[places], kind="stable")][:_HOTTEST]

    def _count(self) -> None:
        rows = np.concatenate([*self._pending, np.zeros(0, dtype=np.int64)])
        self._pending, self._num_pending = [], 0
        if self._is_dense:
            self._counts += np.bincount(rows, minlength=len(self._counts))
            return
        met, counts = np.unique(rows, return_counts=True)
        self._rows, group = np.unique(np.concatenate([self._rows, met]), return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._counts = np.bincount(group, weights=both, minlength=len(self._rows)).astype(np.int64)
