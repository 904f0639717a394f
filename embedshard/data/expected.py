"""What a ledger must say of a pass over a partition: counts and digests of the rows of any steps and lanes.

They follow from the order alone. A pass of any length is summed in blocks; a lane's order is drawn only for windows that
an interval of steps cuts, one at a time.

This module must not know files, columns, tensors or processes.
"""

from __future__ import annotations

__all__ = ["ExpectedRows"]

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from embedshard.data.order import Digest, EpochOrder, Order, row_digest, sum_of_digests

IntArray = npt.NDArray[np.int64]

_BLOCK_ROWS = 2**16


class ExpectedRows:
    """The rows of one pass over one partition.

    Steps are 0-based and count within the pass; intervals of steps and of lanes are [first, last).

    Args:
        order: of the run.
        epoch: which pass over all partitions.
        partition: which of the partitions.
        on_rows: told how many more rows were summed.
    """

    def __init__(self, order: Order, epoch: int, partition: int, on_rows: Callable[[int], None]) -> None:
        self._order, self._key, self._on_rows = order, (epoch, partition), on_rows
        self._lane_rows = np.diff(np.arange(order.lanes + 1, dtype=np.int64) * order.num_rows[partition] // order.lanes)
        self._drawn: tuple[int, int, IntArray] | None = None

    @cached_property
    def _epoch(self) -> EpochOrder:
        return self._order.epoch_order(*self._key)

    def count(self, steps: tuple[int, int], lanes: tuple[int, int]) -> int:
        """Returns how many rows some steps take of some lanes."""
        rows, per_step = self._lane_rows[slice(*lanes)], self._order.rows_per_lane
        return int((np.minimum(rows, steps[1] * per_step) - np.minimum(rows, steps[0] * per_step)).sum())

    def digest(self, steps: tuple[int, int]) -> Digest:
        """Returns the digest of the rows that some steps take of all lanes."""
        if steps == (0, self._epoch.num_steps):
            return self._sum(_blocks_of_span(0, self._epoch.num_rows))
        return self.digests([steps], (0, self._order.lanes))[0]

    def digests(self, intervals: Sequence[tuple[int, int]], lanes: tuple[int, int]) -> list[Digest]:
        """Returns, for each interval of steps, the digest of the rows that it takes of some lanes."""
        sums: list[Digest] = [(0, 0)] * len(intervals)
        for lane in range(*lanes):
            for place, (first, last) in enumerate(intervals):
                blocks = (self._epoch.dataset_rows(rows) for rows in self._epoch_rows(lane, first, last))
                sums[place] = sum_of_digests([sums[place], self._sum(blocks)])
        return sums

    def _sum(self, blocks: Iterator[IntArray]) -> Digest:
        total: Digest = (0, 0)
        for rows in blocks:
            total = sum_of_digests([total, row_digest(*self._key, rows)])
            self._on_rows(len(rows))
        return total

    def _epoch_rows(self, lane: int, first: int, last: int) -> Iterator[IntArray]:
        """Yields the epoch rows that some steps take of a lane, in blocks, in any order."""
        epoch, per_step = self._epoch, self._order.rows_per_lane
        start, end = epoch.lane_span(lane)
        while first < last:
            window = epoch.window_of(first)
            begins = window * epoch.window_steps
            ends = min(begins + epoch.window_steps, epoch.num_steps)
            if first == begins and last >= ends:  # whole windows: whatever their order, they hold one span
                whole = (last - begins) // epoch.window_steps * epoch.window_steps
                until = last if last == epoch.num_steps else begins + whole
                yield from _blocks_of_span(min(start + first * per_step, end), min(start + until * per_step, end))
            else:
                until = min(last, ends)
                rows = self._in_order(lane, window)[(first - begins) * per_step : (until - begins) * per_step]
                yield from (rows[at : at + _BLOCK_ROWS] for at in range(0, len(rows), _BLOCK_ROWS))
            first = until

    def _in_order(self, lane: int, window: int) -> IntArray:
        """Returns a lane's order of a window; draws it once where intervals that follow each other share it."""
        if self._drawn is None or self._drawn[:2] != (lane, window):
            self._drawn = None  # lets go of the former before the next is drawn
            self._drawn = (lane, window, self._epoch.lane_order(lane, window))
        return self._drawn[2]


def _blocks_of_span(first: int, last: int) -> Iterator[IntArray]:
    for at in range(first, last, _BLOCK_ROWS):
        yield np.arange(at, min(at + _BLOCK_ROWS, last), dtype=np.int64)
