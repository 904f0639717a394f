"""Which rows are trained when: pure functions of integers.

An epoch is the concatenation of all row groups in a seeded permutation, its rows numbered 0 .. N-1: *epoch rows*. They
are cut into equal spans, the lanes. A step takes the next rows of each lane; a global batch is the lanes' rows in lane
order, and a rank that owns a contiguous block of lanes owns a contiguous block of the batch. Within a lane, rows are
permuted inside windows of some steps. So the order depends on (seed, epoch) alone, the ranks only divide the work, and
the position in the data is one integer, the global step.

Lanes differ by at most one row, so all that is missing to whole batches is missing in an epoch's last step; there, and
only there, are places that hold no row: padding, -1.

This module must not know files, columns, tensors or processes.
"""

from __future__ import annotations

__all__ = [
    "Digest",
    "EpochOrder",
    "Order",
    "Position",
    "largest_world",
    "row_digest",
    "sum_of_digests",
    "worlds_that_fit",
]

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.compiled import compiled
from embedshard.errors import ConfigError

IntArray = npt.NDArray[np.int64]
Digest = tuple[int, int]
"""An order-free sum of hashes of rows: two words of 64 bits."""

_ROW_GROUPS, _WINDOW = 1, 2  # the streams of draws; their numbers are part of the order


def _draws(seed: int, stream: int, a: int, b: int, c: int, count: int) -> npt.NDArray[np.uint64]:
    """Returns `count` random words that depend on nothing but the arguments (Philox, Salmon et al. 2011)."""
    generator = np.random.Philox(key=[seed, stream], counter=[0, a, b, c])
    return generator.random_raw(count)


def _permutation(seed: int, stream: int, a: int, b: int, c: int, count: int) -> IntArray:
    """Returns a permutation of 0 .. count-1.

    By sorting raw words, since numpy promises the same words in every version, but not the same shuffles. Of equal words the
    first is first; where there are none, which is nearly always, any way of sorting gives the same: the fastest is taken.
    """
    words = _draws(seed, stream, a, b, c, count)
    order = np.argsort(words)
    in_order = words[order]
    if (in_order[1:] == in_order[:-1]).any():
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64, copy=False)


def worlds_that_fit(lanes: int) -> list[int]:
    """Returns the world sizes that can train `lanes` lanes: its divisors, ascending."""
    return [size for size in range(1, lanes + 1) if lanes % size == 0]


def largest_world(lanes: int, workers: int) -> int:
    """Returns the largest world size of at most so many workers that can train `lanes` lanes."""
    return max(size for size in worlds_that_fit(lanes) if size <= workers)


@dataclass(frozen=True)
class Position:
    """Where a step is in the data.

    Attributes:
        step: 0-based global step.
        epoch: 0-based pass over all partitions.
        partition: which of the partitions.
        step_in_epoch: 0-based step within this partition's pass.
        is_epoch_end: whether it is the last step of the pass over all partitions.
        is_partition_end: whether it is the last step of the pass over its partition.
    """

    step: int
    epoch: int
    partition: int
    step_in_epoch: int
    is_epoch_end: bool
    is_partition_end: bool = False


@dataclass(frozen=True)
class Order:
    """The order of a data set's partitions over a run.

    Attributes:
        seed: of the run.
        lanes: spans an epoch is cut into.
        global_batch_size: rows a step, a multiple of lanes.
        window_steps: steps of a window, of each partition; 0 means the whole lane.
        row_groups: rows of each row group, of each partition, in file order.
        shuffle: False keeps row groups and rows in file order.
    """

    seed: int
    lanes: int
    global_batch_size: int
    window_steps: tuple[int, ...]
    row_groups: tuple[tuple[int, ...], ...]
    shuffle: bool = True

    def __post_init__(self) -> None:
        assert self.global_batch_size % self.lanes == 0, "the config checks that lanes divide the batch"
        assert len(self.window_steps) == len(self.row_groups), "a window length for each partition"

    @property
    def rows_per_lane(self) -> int:
        """Rows that a step takes of each lane."""
        return self.global_batch_size // self.lanes

    @cached_property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each partition."""
        return tuple(sum(groups) for groups in self.row_groups)

    @cached_property
    def partition_steps(self) -> tuple[int, ...]:
        """Steps of one pass over each partition."""
        longest_lanes = (math.ceil(rows / self.lanes) for rows in self.num_rows)
        return tuple(math.ceil(rows / self.rows_per_lane) for rows in longest_lanes)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over all partitions."""
        return sum(self.partition_steps)

    def position(self, step: int) -> Position:
        """Returns where a 0-based step is: a `divmod`, no state."""
        epoch, rest = divmod(step, self.epoch_steps)
        is_epoch_end = rest == self.epoch_steps - 1
        for partition, steps in enumerate(self.partition_steps):
            if rest < steps:
                return Position(step, epoch, partition, rest, is_epoch_end, rest == steps - 1)
            rest -= steps
        raise AssertionError("the steps of the partitions add up to those of the epoch")

    def epoch_order(self, epoch: int, partition: int) -> EpochOrder:
        """Returns the order of one pass over one partition."""
        return EpochOrder(self, epoch, partition)

    def lane_block(self, rank: int, world_size: int) -> tuple[int, int]:
        """Returns the lanes [first, last) of a rank.

        Raises:
            ConfigError: if the world size does not divide the lanes.
        """
        if self.lanes % world_size:
            fitting = ", ".join(str(size) for size in worlds_that_fit(self.lanes))
            raise ConfigError(
                f"{world_size} workers cannot share data.lanes={self.lanes} lanes evenly. "
                f"Use one of {fitting} workers, or other lanes (96 fits 1, 2, 3, 4, 6, 8, ...)."
            )
        block = self.lanes // world_size
        return rank * block, (rank + 1) * block


class EpochOrder:
    """One pass over one partition."""

    def __init__(self, order: Order, epoch: int, partition: int) -> None:
        self._order, self._epoch, self._partition = order, epoch, partition
        self.num_rows = order.num_rows[partition]
        self.num_steps = order.partition_steps[partition]
        self.window_steps = order.window_steps[partition] or max(self.num_steps, 1)
        groups = order.row_groups[partition]
        self.group_order: IntArray = (
            _permutation(order.seed, _ROW_GROUPS, epoch, partition, 0, len(groups))
            if order.shuffle
            else np.arange(len(groups), dtype=np.int64)
        )
        """The row groups, by number in the partition, in the order of the epoch."""
        sizes = np.asarray(groups, dtype=np.int64)[self.group_order] if len(groups) else np.zeros(0, np.int64)
        self.group_starts: IntArray = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        """Epoch row at which each of them begins, and the number of rows."""
        file_starts = np.concatenate([[0], np.cumsum(np.asarray(groups, dtype=np.int64))]).astype(np.int64)
        self._file_starts = file_starts[:-1][self.group_order] if len(groups) else file_starts[:0]

    @property
    def rows_per_lane(self) -> int:
        """Rows that a step takes of each lane."""
        return self._order.rows_per_lane

    def lane_of(self, row: int) -> int:
        """Returns the lane that holds an epoch row."""
        return ((row + 1) * self._order.lanes - 1) // self.num_rows

    def place_of(self, row: int) -> int:
        """Returns the place in `group_order` of the row group that holds an epoch row."""
        return int(np.searchsorted(self.group_starts, row, side="right")) - 1

    def lane_span(self, lane: int) -> tuple[int, int]:
        """Returns the epoch rows [first, last) of a lane."""
        return lane * self.num_rows // self._order.lanes, (lane + 1) * self.num_rows // self._order.lanes

    def window_of(self, step_in_epoch: int) -> int:
        """Returns the window that holds a step."""
        return step_in_epoch // self.window_steps

    def steps(self, window: int) -> int:
        """Returns the steps of a window; 0 beyond the last."""
        return max(min(self.window_steps, self.num_steps - window * self.window_steps), 0)

    def window_of_row(self, lane: int, row: int) -> int:
        """Returns the window in which one of a lane's epoch rows is trained."""
        return (row - self.lane_span(lane)[0]) // (self.window_steps * self.rows_per_lane)

    def window_rows(self, lane: int, window: int) -> tuple[int, int]:
        """Returns the epoch rows [first, last) that a lane's window holds, in any order."""
        first, last = self.lane_span(lane)
        width = self.window_steps * self._order.rows_per_lane
        return min(first + window * width, last), min(first + (window + 1) * width, last)

    def lane_order(self, lane: int, window: int) -> IntArray:
        """Returns a lane's epoch rows of one window in the order in which they are trained."""
        first, last = self.window_rows(lane, window)
        if not self._order.shuffle:
            return np.arange(first, last, dtype=np.int64)
        # `window` and `lane` share a word: both are far below 2**32.
        word = (window << 32) | lane
        return first + _permutation(self._order.seed, _WINDOW, self._epoch, self._partition, word, last - first)

    def rows(self, window: int, lanes: tuple[int, int]) -> IntArray:
        """Returns the epoch rows of a window for a block of lanes, as they are trained.

        Args:
            window: which window of the epoch.
            lanes: the block, [first, last).

        Returns:
            (steps, lanes * rows_per_lane) int64; -1 where a place holds no row.
        """
        per_lane = self._order.rows_per_lane
        steps = self.steps(window)
        table = np.full((lanes[1] - lanes[0], steps * per_lane), -1, dtype=np.int64)
        for place, lane in enumerate(range(*lanes)):
            in_order = self.lane_order(lane, window)
            table[place, : len(in_order)] = in_order
        return np.ascontiguousarray(table.reshape(-1, steps, per_lane).transpose(1, 0, 2)).reshape(steps, -1)

    def dataset_rows(self, epoch_rows: IntArray) -> IntArray:
        """Returns the partition's row numbers, in file order, of epoch rows; -1 stays -1."""
        if not len(self._file_starts):
            return epoch_rows.copy()
        rows = np.empty(epoch_rows.size, dtype=np.int64)
        _rows_in_file_order(epoch_rows.ravel(), self.group_starts, self._file_starts, rows)
        return rows.reshape(epoch_rows.shape)


def row_digest(epoch: int, partition: int, rows: IntArray) -> Digest:
    """Returns an order-free 128-bit sum of hash(epoch, partition, row), as two wrapping 64-bit words.

    Sums over disjoint sets of rows add up word by word modulo 2**64, so the ledgers of any number of ranks and restarts
    can be compared with what the inventory says. The hash is splitmix64's finaliser (Steele et al. 2014) under two
    different starting words.

    Args:
        epoch: 0-based epoch in which the rows were trained.
        partition: which partition they belong to.
        rows: row numbers in the partition, in any order; -1 is skipped.
    """
    pass_number = 2 * (epoch * 65_537 + partition) + 1
    first, second = (np.uint64(salt * pass_number % 2**64) for salt in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F))
    words = _sums_of_hashes(rows, first, second)
    return int(words[0]), int(words[1])


@compiled
def _rows_in_file_order(epoch_rows: Any, group_starts: Any, file_starts: Any, rows: Any) -> None:
    """Fills in the row number of each epoch row; most are of the same row group as the one before."""
    place = 0
    for at in range(len(epoch_rows)):
        row = epoch_rows[at]
        if row < 0:
            rows[at] = -1
            continue
        if row < group_starts[place] or row >= group_starts[place + 1]:
            place, last = 0, len(file_starts) - 1
            while place < last:
                middle = (place + last + 1) >> 1
                if group_starts[middle] <= row:
                    place = middle
                else:
                    last = middle - 1
        rows[at] = row - group_starts[place] + file_starts[place]


@compiled
def _mixed(word: Any) -> Any:
    """As `hashing.finalised`, of one word, in a loop."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled
def _sums_of_hashes(rows: Any, first: Any, second: Any) -> Any:
    of_first, of_second = np.uint64(0), np.uint64(0)
    for place in range(len(rows)):
        if rows[place] >= 0:
            row = np.uint64(rows[place])
            of_first += _mixed(row + first)
            of_second += _mixed(row + second)
    return of_first, of_second


def sum_of_digests(digests: Iterable[Digest]) -> Digest:
    """Returns the digest of all the rows that the digests are of."""
    first = second = 0
    for digest in digests:
        first, second = first + digest[0], second + digest[1]
    return first % 2**64, second % 2**64
