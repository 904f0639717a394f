"""Which rows of a training set are held out for validation: pure functions of integers.

A row's draw is a hash of (seed, its number in the training set). Of each block of consecutive rows those with the least
draws are held out, as many as bring the rows so far to the wanted share. So the share is exact, how many rows of a span are
held out follows almost without hashing any, and which they are depends neither on row groups nor on the order of training.

This module must not know files, columns, tensors or processes.
"""

from __future__ import annotations

__all__ = ["Selection", "Split"]

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedshard.data.hashing import hash_integers

IntArray = npt.NDArray[np.int64]

_BLOCK_ROWS = 4096  # part of what is held out: another number holds out other rows
_STREAM = 5  # beside those of order.py, negatives.py and pairs.py


@dataclass(frozen=True)
class Split:
    """A share of the rows of a training set.

    Attributes:
        fraction: that is held out, between 0 and 1.
        seed: of the draws.
        num_rows: of the training set, all partitions one after the other.
    """

    fraction: float
    seed: int
    num_rows: int

    def num_held_out(self, first: int, last: int) -> int:
        """Returns how many of the rows [first, last) are held out."""
        begin, end = -(-first // _BLOCK_ROWS) * _BLOCK_ROWS, last // _BLOCK_ROWS * _BLOCK_ROWS
        if last == self.num_rows:
            end = last
        if begin >= end:
            return int(np.count_nonzero(self.held_out(first, last)))
        ends = np.count_nonzero(self.held_out(first, begin)) + np.count_nonzero(self.held_out(end, last))
        return int(ends) + self._quota(end) - self._quota(begin)

    def held_out(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Returns which of the rows [first, last) are held out, (last - first,)."""
        assert 0 <= first <= last <= self.num_rows
        if first == last:
            return np.zeros(0, dtype=np.bool_)
        begin = first // _BLOCK_ROWS * _BLOCK_ROWS
        end = min(-(-last // _BLOCK_ROWS) * _BLOCK_ROWS, self.num_rows)
        key = int(hash_integers(np.array([self.seed], dtype=np.int64), _STREAM)[0])
        draws = hash_integers(np.arange(begin, end, dtype=np.int64), key)  # no two alike: the hash is a bijection
        held = np.zeros(end - begin, dtype=np.bool_)
        for block in range(begin, end, _BLOCK_ROWS):
            until = min(block + _BLOCK_ROWS, end)
            count = self._quota(until) - self._quota(block)
            if count:
                of_block = draws[block - begin : until - begin]
                held[block - begin : until - begin] = of_block <= np.partition(of_block, count - 1)[count - 1]
        return held[first - begin : last - begin]

    def _quota(self, rows: int) -> int:
        """Returns how many of the first rows are held out, where a block ends: a share in decimals, rounded down."""
        return math.floor(rows * self.fraction + 1e-9)


@dataclass(frozen=True)
class Selection:
    """The rows of a data set that are on one side of a split.

    Attributes:
        split: of the training set.
        is_held_out: whether these are the rows that are held out, or those that are trained.
        first_row: the number in the training set of the data set's first row.
    """

    split: Split
    is_held_out: bool
    first_row: int

    def count(self, first: int, last: int) -> int:
        """Returns how many of the data set's rows [first, last) are selected."""
        held_out = self.split.num_held_out(self.first_row + first, self.first_row + last)
        return held_out if self.is_held_out else last - first - held_out

    def rows(self, first: int, last: int) -> IntArray:
        """Returns which of the data set's rows [first, last) are selected, counted from `first`, ascending."""
        held_out = self.split.held_out(self.first_row + first, self.first_row + last)
        return np.flatnonzero(held_out if self.is_held_out else ~held_out)
