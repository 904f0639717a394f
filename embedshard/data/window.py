"""One window of streamed data: rows are put in as they are decoded, by several threads, and read as they are trained."""

from __future__ import annotations

__all__ = ["Spot", "Window"]

import math
import threading
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedshard.data.columns import (
    Buffers,
    Columns,
    Flat,
    Ragged,
    padding_of,
    put_values,
    take_lists,
    take_values,
)
from embedshard.data.order import EpochOrder

IntArray = npt.NDArray[np.int64]
IndexArray = npt.NDArray[np.int32]
Array = npt.NDArray[Any]

_INDEX: Final = ":index"  # a column of which list is where, by a name that no feature has


class Window:
    """A window: it is filled, then read some steps at a time.

    A number or an id goes to its place at once, lane by lane: the places of a lane lie side by side in the cache, and are
    written one after the other. Step by step, as they are trained, a lane's places would be a batch apart, which for a cache
    are few lines again and again. Lists, whose places are not known before all are there, wait in the order in which those
    that came together are trained: then they are read one after the other, too. Both are put in order some steps at a time,
    so that a batch is made of what is in the cache.

    Several threads may put rows in, and after `finish` several may read them.

    Args:
        epoch: the pass.
        number: of the window.
        lanes: the rank's, [first, last).
        types: of the ids of each column, the least integers that hold them.
        buffers: memory for its rows.
    """

    def __init__(
        self,
        epoch: EpochOrder,
        number: int,
        lanes: tuple[int, int],
        types: Mapping[str, np.dtype[Any]],
        buffers: Buffers,
    ) -> None:
        self.epoch, self.number = epoch, number
        self._lanes, self._types, self._buffers = lanes, types, buffers
        self._rows = _num_rows(epoch, number, lanes)
        self._shape = lanes[1] - lanes[0], epoch.steps(number), epoch.rows_per_lane
        self._count = math.prod(self._shape)
        self._orders: dict[int, IndexArray] = {}
        self._places: dict[int, IntArray] = {}
        self._flat: dict[str, Array] = {}
        self._lists: dict[str, _Lists] = {}
        self._met: list[tuple[int, IntArray]] = []
        self._entries = 0
        self._lock = threading.Lock()

    def spot(self, lane: int, first: int, count: int) -> Spot:
        """Returns where so many rows of a lane, which begin at an epoch row, belong."""
        return Spot(self, *self._in_order(lane, first, count))

    def flat(self, name: str, pattern: Flat) -> Array:
        """Returns the values of a column, lane by lane."""
        if name not in self._flat:
            with self._lock:
                if name not in self._flat:
                    held = self._buffers.array(name, self._count, self._type(name, pattern))
                    if self._rows < self._count:
                        held[:] = padding_of(name, held.dtype)
                    self._flat[name] = held
        return self._flat[name]

    def lists(self, name: str, pattern: Ragged) -> _Lists:
        """Returns the lists of a column."""
        if name not in self._lists:
            with self._lock:
                if name not in self._lists:
                    self._lists[name] = _Lists(name, self._rows, self._type(name, pattern), pattern, self._buffers)
        return self._lists[name]

    def lists_come(self, places: IntArray) -> int:
        """Says where rows belong whose lists come; returns the number of their first list, which is that of each column."""
        with self._lock:
            first, self._entries = self._entries, self._entries + len(places) + 1
            self._met.append((first, places))
        return first

    def finish(self, pattern: Columns) -> None:
        """Says that all rows are there.

        Args:
            pattern: the columns of the data, for a window that has none of this rank's rows.
        """
        for name, column in pattern.items():
            if isinstance(column, Flat):
                self.flat(name, column)
            else:
                self.lists(name, column)
        if self._lists:
            index = self._flat[_INDEX] = self._buffers.array(_INDEX, self._count, np.int32)
            index[:] = -1
            for first, places in self._met:
                index[places] = np.arange(first, first + len(places), dtype=np.int32)

    def columns(self, first: int, last: int, buffers: Buffers) -> Columns:
        """Returns the rows of the steps [first, last) as they are trained.

        Args:
            first: step of the window.
            last: after the last step.
            buffers: memory for them.
        """
        lanes, steps, rows = self._shape
        shape = last - first, lanes, rows
        columns: Columns = {}
        for name, values in self._flat.items():
            ordered = buffers.array(name, math.prod(shape), values.dtype)
            ordered.reshape(shape)[:] = values.reshape(lanes, steps, rows)[:, first:last].transpose(1, 0, 2)
            columns[name] = Flat(ordered)
        if self._lists:
            index = columns.pop(_INDEX).values
            columns |= {name: lists.taken(index, buffers) for name, lists in self._lists.items()}
        return columns

    def _in_order(self, lane: int, first: int, count: int) -> tuple[IndexArray, slice | IntArray]:
        """Returns the order in which rows of a lane are trained, and their places, lane by lane, in this order.

        Args:
            lane: whose they are.
            first: epoch row of the first one.
            count: how many, which follow each other.
        """
        lane_first, lane_last = self.epoch.window_rows(lane, self.number)
        begin = (lane - self._lanes[0]) * self._shape[1] * self._shape[2]
        order = self._orders.get(lane)
        if order is None:
            order = self._orders[lane] = (self.epoch.lane_order(lane, self.number) - lane_first).astype(np.int32)
        if count == lane_last - lane_first:
            return order, slice(begin, begin + count)
        places = self._places.get(lane)
        if places is None:
            places = np.empty(len(order), dtype=np.int64)
            places[order] = np.arange(begin, begin + len(order))
            self._places[lane] = places  # filled in: another thread may find them
        own = places[first - lane_first : first - lane_first + count]
        part = np.argsort(own).astype(np.int32)
        return part, own[part]

    def _type(self, name: str, column: Flat | Ragged) -> np.dtype[Any]:
        return self._types.get(name, column.values.dtype)


class Spot:
    """Where rows that came together belong in a window. Of one thread.

    Args:
        window: theirs.
        order: in which they are trained, (n,).
        places: in this order; a slice where they follow each other.
    """

    def __init__(self, window: Window, order: IndexArray, places: slice | IntArray) -> None:
        self._window, self._order, self._places = window, order, places
        self._first_list: int | None = None

    def put(self, name: str, column: Flat | Ragged) -> None:
        """Puts a column of the rows there."""
        if isinstance(column, Flat):
            held = self._window.flat(name, column)
            if isinstance(self._places, slice):
                take_values(column.values, self._order, held[self._places])
            else:
                put_values(column.values, self._order, self._places, held)
            return
        if self._first_list is None:
            places = self._places
            places = np.arange(places.start, places.stop) if isinstance(places, slice) else places
            self._first_list = self._window.lists_come(places)
        self._window.lists(name, column).put(column, self._order, self._first_list)


class _Lists:
    """A column of lists of a window, one piece after the other, each in a part of its own.

    Threads copy at the same time; larger memory is taken when none does.
    """

    def __init__(self, name: str, rows: int, dtype: np.dtype[Any], pattern: Ragged, buffers: Buffers) -> None:
        self._name, self._buffers, self._size, self._copying = name, buffers, 0, 0
        self._changed = threading.Condition()
        lists = max(len(pattern.offsets) - 1, 1)
        expected = rows * int(pattern.offsets[-1] - pattern.offsets[0]) // lists * 17 // 16
        self._starts: Array = buffers.whole(f"{name}/starts", rows * 17 // 16 + 1, np.int32)
        self._values = buffers.whole(name, expected, dtype)
        self._weights = None if pattern.weights is None else buffers.whole(f"{name}/weights", expected, np.float32)

    def put(self, column: Ragged, order: Array, first: int) -> None:
        """Adds lists.

        Args:
            column: the lists, (n,).
            order: in which they are added, (n,) int32.
            first: their first one's number; they have n + 1, so that where the last one ends is told, too.
        """
        count, last = int(column.offsets[-1] - column.offsets[0]), first + len(order) + 1
        with self._changed:
            at, self._size = self._size, self._size + count
            if not self._has_room(last):
                self._changed.wait_for(lambda: not self._copying)
                self._make_room(last)
            self._copying += 1
            end = at + count  # what follows is another thread's: it is not written over
            starts, values = self._starts[first:last], self._values[:end]
            weights = None if self._weights is None else self._weights[:end]
        try:
            take_lists(column.values, column.offsets, order, values, starts, at)
            if weights is not None and column.weights is not None:
                take_lists(column.weights, column.offsets, order, weights, starts, at)
        finally:
            with self._changed:
                self._copying -= 1
                self._changed.notify_all()

    def _has_room(self, last: int) -> bool:
        has_values = self._size <= min(len(self._values), np.iinfo(self._starts.dtype).max)
        return has_values and last <= len(self._starts)

    def _make_room(self, last: int) -> None:
        """Takes memory for all that is to come so far, of which nothing is being copied."""
        starts, former = f"{self._name}/starts", self._starts
        is_long = self._size > np.iinfo(np.int32).max
        if last > len(former) or (is_long and former.dtype != np.int64):
            kind = np.int64 if is_long else np.int32
            self._starts = self._buffers.grown(starts, max(last, len(former)), len(former), kind)
        if self._size > len(self._values):
            self._values = self._buffers.grown(self._name, self._size, len(self._values))
            if self._weights is not None:
                self._weights = self._buffers.grown(f"{self._name}/weights", self._size, len(self._weights))

    def taken(self, index: Array, buffers: Buffers) -> Ragged:
        """Returns lists in the order of an index; -1 gives an empty one.

        Args:
            index: of the lists, (m,).
            buffers: memory for them: as large as all lists of the window, of which only what these take is written to.
        """
        offsets = buffers.array(f"{self._name}/offsets", len(index) + 1, self._starts.dtype)
        values = buffers.whole(self._name, self._size, self._values.dtype)
        take_lists(self._values, self._starts, index, values, offsets, 0)
        weights = None
        if self._weights is not None:
            weights = buffers.whole(f"{self._name}/weights", self._size, np.float32)
            take_lists(self._weights, self._starts, index, weights, offsets, 0)
        return Ragged(values, offsets, weights)


def _num_rows(epoch: EpochOrder, window: int, lanes: tuple[int, int]) -> int:
    """Returns the rows of a window of some lanes, without padding."""
    return sum(last - first for first, last in (epoch.window_rows(lane, window) for lane in range(*lanes)))
