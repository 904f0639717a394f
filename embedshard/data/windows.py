"""Windows of data of any size: each row group is decoded once a pass, forwards.

Lanes are spread over the whole epoch, so a window takes rows from many places. Each row group that holds some of them is
open as a stream, which is decoded no further than the window needs; lanes that share a row group share its stream. What a
stream meets on its way for later windows waits on a shelf, but for the next one if nothing uses its memory yet. The next
window, be it the first one of the next epoch, is decoded in a thread while one is trained.
"""

from __future__ import annotations

__all__ = ["Windows", "rows_that_wait", "window_steps"]

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from embedshard.config import Config
from embedshard.data.columns import (
    Buffers,
    Columns,
    Flat,
    Ragged,
    gather,
    num_rows,
    padding_of,
    part_of,
    put_values,
    take_lists,
    take_values,
)
from embedshard.data.order import EpochOrder
from embedshard.data.shelf import Piece, Shelf, own_copy
from embedshard.data.source import Source
from embedshard.stages import Laps

IntArray = npt.NDArray[np.int64]
IndexArray = npt.NDArray[np.int32]
Array = npt.NDArray[Any]
_T = TypeVar("_T")

_DECODE_ROWS: Final = 65_536
_LANE_ROWS: Final = 16_384
"""Rows decoded at once, and where a row group is one lane's: a lane holds no more beyond its window."""
_WHOLE_ROWS: Final = 2**17
"""A row group of no more is decoded to its end: its rows take less memory than pages and dictionaries of an open stream."""
_ORDER_ROWS: Final = 65_536
"""Rows put in order at once: what they take stays in the cache until batches are made of them."""
_INDEX: Final = ":index"  # a column of which list is where, by a name that no feature has
_WINDOW_ROWS: Final = 2**20
_WINDOW_BYTES: Final = 2**28
"""Of a window over all lanes, where the data do not fit the cache: so many rows, or as many as take so many bytes."""


def window_steps(config: Config, decoded_bytes: int, rows: int) -> int:
    """Returns the steps of a partition's windows; 0 for the whole lane.

    Args:
        config: the config.
        decoded_bytes: of the partition.
        rows: of the partition.
    """
    if config.data.window_steps != "auto":
        return config.data.window_steps
    if decoded_bytes <= config.data.cache_bytes:
        return 0
    most = min(_WINDOW_ROWS, _WINDOW_BYTES * rows // max(decoded_bytes, 1))
    return max(1, most // config.train.global_batch_size)


def rows_that_wait(epoch: EpochOrder, lanes: tuple[int, int], is_read_ahead: bool) -> int:
    """Returns about how many rows are decoded with the first window of some lanes that have no place yet.

    Args:
        epoch: the pass.
        lanes: of a rank.
        is_read_ahead: whether the window is read while one is trained, as all but a run's first one are: else rows of the
            window after it have a place.
    """
    waiting, last_placed = 0, 0 if is_read_ahead else 1
    for place, last in _needed(epoch, 0, lanes).items():
        first, end = _first_needed(epoch, place, 0, lanes), _end(epoch, place, lanes)
        decoded = end if end - first <= _WHOLE_ROWS else min(last + _LANE_ROWS, end)
        waiting += decoded - first
        for lane in range(max(epoch.lane_of(first), lanes[0]), min(epoch.lane_of(end - 1) + 1, lanes[1])):
            begin, stop = epoch.window_rows(lane, 0)[0], epoch.window_rows(lane, last_placed)[1]
            waiting -= max(min(stop, decoded) - max(begin, first), 0)
    return waiting


class Windows:
    """A rank's windows of one partition, the next one decoded in a thread while the last one is taken.

    Args:
        source: the partition.
        lanes: the rank's, [first, last).
        limit_bytes: of rows that wait in memory.
        laps: counts the seconds that decoding takes, in whichever thread.
    """

    def __init__(self, source: Source, lanes: tuple[int, int], limit_bytes: int, laps: Laps) -> None:
        self._source, self._lanes, self._laps = source, lanes, laps
        self._types = source.least_types
        self._shelf = Shelf(limit_bytes)
        self._buffers, self._in_order = (Buffers(), Buffers()), Buffers()
        self._turn = 0  # which of the buffers the window has that was read last
        self._epoch: EpochOrder | None = None
        self._upcoming: EpochOrder | None = None
        self._next = -1
        self._streams: dict[int, _Stream] = {}
        self._ended: set[int] = set()
        self._no_rows: Columns = {}
        self._current: _Window | None = None
        self._following: _Window | None = None  # the next one to be read, if it has rows already
        self._ahead: tuple[EpochOrder, int, _Soon[_Window]] | None = None

    def read(self, epoch: EpochOrder, window: int, first: int, last: int) -> tuple[int, Columns]:
        """Returns rows of the steps from `first` of a window on, as they are trained, and up to which step, at most `last`.

        They are steps * lanes * rows of a lane in a step, and valid until the next call. Padding is an empty list, a number
        of 0, and an id or row number of -1. Ids are of the least type that holds all of their table's.

        Raises:
            DataError: if the rows cannot be read or hold what the config does not allow.
        """
        if self._current is None or self._current.epoch is not epoch or self._current.number != window:
            self._current = self._next_window(epoch, window)
        local_batch_size = (self._lanes[1] - self._lanes[0]) * epoch.rows_per_lane
        last = min(last, first + max(1, _ORDER_ROWS // local_batch_size))
        columns = self._current.columns(first, last, self._in_order)
        self._laps.lap("order")
        return last, columns

    def expect(self, upcoming: EpochOrder | None) -> None:
        """Says which pass follows the one that is read next; None: none does, or one over other data."""
        self._upcoming = upcoming

    def _next_window(self, epoch: EpochOrder, window: int) -> _Window:
        """Returns a window whose rows are all there, and begins with the next one, where the former one was."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is epoch and ahead[1] == window:
            found = ahead[2].result()
            self._laps.restart()  # the wait is no work: that is counted where it is done
        else:
            if ahead is not None:
                ahead[2].wait()
            self._current = None
            found = self._read(epoch, window, self._laps, is_next_free=True)
        following = self._after(epoch, window)
        if following is not None:
            laps = self._laps.beside()
            self._ahead = *following, _Soon(lambda: self._read(*following, laps))
        return found

    def _after(self, epoch: EpochOrder, window: int) -> tuple[EpochOrder, int] | None:
        """Returns the window that follows one, to be read meanwhile; None where a pass is one: memory is to hold one."""
        if epoch.steps(window + 1):
            return epoch, window + 1
        return (self._upcoming, 0) if self._upcoming is not None and window else None

    def close(self) -> None:
        """Waits for the thread, and lets go of all that waits."""
        if self._ahead is not None:
            self._ahead[2].wait()
        self._ahead, self._current, self._epoch, self._upcoming = None, None, None, None
        self._let_go()

    def _let_go(self) -> None:
        self._streams.clear()
        self._ended.clear()
        self._shelf.clear()
        self._following = None

    def _read(self, epoch: EpochOrder, window: int, laps: Laps, is_next_free: bool = False) -> _Window:
        """Decodes what a window needs.

        Args:
            epoch: the pass.
            window: which.
            laps: counts the seconds.
            is_next_free: whether nothing uses the memory of the window after it, so that its rows need not wait.
        """
        if epoch is not self._epoch or window != self._next:
            self._let_go()
            self._epoch = epoch
        self._next, self._turn = window + 1, 1 - self._turn
        found = self._following or self._empty_window(epoch, window, self._turn)
        self._following = (
            self._empty_window(epoch, window + 1, 1 - self._turn) if is_next_free and epoch.steps(window + 1) else None
        )
        for piece in self._shelf.take(window):
            spot = found.spot(piece.lane, piece.first, num_rows(piece.columns))
            for name, column in piece.columns.items():
                spot.put(name, column)
        for place, last in _needed(epoch, window, self._lanes).items():
            if place in self._ended:
                continue
            end = _end(epoch, place, self._lanes)
            if place not in self._streams:
                first = _first_needed(epoch, place, window, self._lanes)
                at_once = end - first <= _WHOLE_ROWS or epoch.lane_of(first) < epoch.lane_of(end - 1)
                is_small = epoch.group_starts[place + 1] - epoch.group_starts[place] <= _WHOLE_ROWS
                rows = _WHOLE_ROWS if is_small else _DECODE_ROWS if at_once else _LANE_ROWS
                self._streams[place] = _Stream(self._source, epoch, place, first, rows)
            stream = self._streams[place]
            for first, count, columns in stream.up_to(end if end - stream.next <= _WHOLE_ROWS else last):
                self._put(found, first, count, columns)
            if stream.next >= end:
                del self._streams[place]
                self._ended.add(place)
        found.finish(self._pattern())
        laps.lap("decode")
        return found

    def _empty_window(self, epoch: EpochOrder, window: int, turn: int) -> _Window:
        return _Window(epoch, window, self._lanes, self._types, self._buffers[turn])

    def _pattern(self) -> Columns:
        """Returns the columns of the data, without a row."""
        if not self._no_rows and self._source.inventory.row_groups:
            self._no_rows = gather(self._source.read_row_group(0), np.zeros(0, dtype=np.int64), None)
        return self._no_rows

    def _put(self, window: _Window, first: int, count: int, columns: Iterator[tuple[str, Flat | Ragged]]) -> None:
        """Puts rows of a stream where their windows find them; those of other ranks, and of former windows, nowhere.

        Args:
            window: the one that is read.
            first: epoch row of the first one.
            count: how many.
            columns: of these rows, each decoded when it is asked for.
        """
        epoch, end = window.epoch, first + count
        spots: list[tuple[int, int, _Spot]] = []
        waiting: list[tuple[int, int, int, Piece]] = []
        for lane in range(max(epoch.lane_of(first), self._lanes[0]), min(epoch.lane_of(end - 1) + 1, self._lanes[1])):
            lane_first, lane_last = epoch.lane_span(lane)
            row, last = max(first, lane_first), min(end, lane_last)
            while row < last:
                of_row = epoch.window_of_row(lane, row)
                stop = min(last, epoch.window_rows(lane, of_row)[1])
                if of_row == window.number:
                    spots.append((row - first, stop - first, window.spot(lane, row, stop - row)))
                elif of_row == window.number + 1 and self._following is not None:
                    spots.append((row - first, stop - first, self._following.spot(lane, row, stop - row)))
                elif of_row > window.number:
                    waiting.append((row - first, stop - first, of_row, Piece(lane, row, {})))
                row = stop
        for name, column in columns:
            for row, stop, spot in spots:
                spot.put(name, part_of(column, row, stop))
            for row, stop, _, piece in waiting:
                piece.columns[name] = own_copy(part_of(column, row, stop), self._types.get(name, column.values.dtype))
            if name not in self._no_rows:
                self._no_rows[name] = own_copy(part_of(column, 0, 0), column.values.dtype)
        for _, _, of_row, piece in waiting:
            self._shelf.put(of_row, piece)


def _needed(epoch: EpochOrder, window: int, lanes: tuple[int, int]) -> Mapping[int, int]:
    """Returns up to which epoch row each row group must be decoded for a window of some lanes, by its place in the epoch."""
    needed: dict[int, int] = {}
    for lane in range(*lanes):
        first, last = epoch.window_rows(lane, window)
        while first < last:
            place = epoch.place_of(first)
            first = min(last, int(epoch.group_starts[place + 1]))
            needed[place] = max(needed.get(place, 0), first)
    return needed


def _first_needed(epoch: EpochOrder, place: int, window: int, lanes: tuple[int, int]) -> int:
    """Returns the first epoch row of a row group that the lanes train in this window or a later one."""
    begin, end = (int(epoch.group_starts[place + i]) for i in (0, 1))
    spans = [(epoch.window_rows(lane, window)[0], epoch.lane_span(lane)[1]) for lane in range(*lanes)]
    return min(max(first, begin) for first, last in spans if max(first, begin) < min(last, end))


def _end(epoch: EpochOrder, place: int, lanes: tuple[int, int]) -> int:
    """Returns the epoch row up to which the lanes train a row group."""
    return min(int(epoch.group_starts[place + 1]), epoch.lane_span(lanes[1] - 1)[1])


def _num_rows(epoch: EpochOrder, window: int, lanes: tuple[int, int]) -> int:
    """Returns the rows of a window of some lanes, without padding."""
    return sum(last - first for first, last in (epoch.window_rows(lane, window) for lane in range(*lanes)))


class _Window:
    """A window: it is filled, then read some steps at a time.

    A number or an id goes to its place at once, lane by lane: the places of a lane lie side by side in the cache, and are
    written one after the other. Step by step, as they are trained, a lane's places would be a batch apart, which for a cache
    are few lines again and again. Lists, whose places are not known before all are there, wait in the order in which those
    that came together are trained: then they are read one after the other, too. Both are put in order some steps at a time,
    so that a batch is made of what is in the cache.

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
        self._met: list[IntArray] = []

    def spot(self, lane: int, first: int, count: int) -> _Spot:
        """Returns where so many rows of a lane, which begin at an epoch row, belong."""
        return _Spot(self, *self._in_order(lane, first, count))

    def flat(self, name: str, pattern: Flat) -> Array:
        """Returns the values of a column, lane by lane."""
        held = self._flat.get(name)
        if held is None:
            held = self._flat[name] = self._buffers.array(name, self._count, self._type(name, pattern))
            if self._rows < self._count:
                held[:] = padding_of(name, held.dtype)
        return held

    def lists(self, name: str, pattern: Ragged) -> _Lists:
        """Returns the lists of a column."""
        if name not in self._lists:
            self._lists[name] = _Lists(name, self._rows, self._type(name, pattern), pattern, self._buffers)
        return self._lists[name]

    def lists_came(self, places: IntArray) -> None:
        """Says where the next lists of all columns belong."""
        self._met.append(places)

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
            met = np.concatenate([np.zeros(0, dtype=np.int64), *self._met])
            index = self._flat[_INDEX] = self._buffers.array(_INDEX, self._count, np.int32)
            index[:] = -1
            index[met] = np.arange(len(met), dtype=np.int32)

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
            places = self._places[lane] = np.empty(len(order), dtype=np.int64)
            places[order] = np.arange(begin, begin + len(order))
        own = places[first - lane_first : first - lane_first + count]
        part = np.argsort(own).astype(np.int32)
        return part, own[part]

    def _type(self, name: str, column: Flat | Ragged) -> np.dtype[Any]:
        return self._types.get(name, column.values.dtype)


class _Spot:
    """Where rows that came together belong in a window.

    Args:
        window: theirs.
        order: in which they are trained, (n,).
        places: in this order; a slice where they follow each other.
    """

    def __init__(self, window: _Window, order: IndexArray, places: slice | IntArray) -> None:
        self._window, self._order, self._places = window, order, places
        self._has_lists = False

    def put(self, name: str, column: Flat | Ragged) -> None:
        """Puts a column of the rows there."""
        if isinstance(column, Flat):
            held = self._window.flat(name, column)
            if isinstance(self._places, slice):
                take_values(column.values, self._order, held[self._places])
            else:
                put_values(column.values, self._order, self._places, held)
            return
        if not self._has_lists:
            places = self._places
            self._window.lists_came(np.arange(places.start, places.stop) if isinstance(places, slice) else places)
            self._has_lists = True
        self._window.lists(name, column).put(column, self._order)


class _Lists:
    """Lists of a window, one piece after the other."""

    def __init__(self, name: str, rows: int, dtype: np.dtype[Any], pattern: Ragged, buffers: Buffers) -> None:
        self._name, self._buffers, self._rows, self._size = name, buffers, 0, 0
        lists = max(len(pattern.offsets) - 1, 1)
        expected = rows * int(pattern.offsets[-1] - pattern.offsets[0]) // lists * 17 // 16
        self._starts: Array = buffers.array(f"{name}/starts", rows + 1, np.int32)
        self._starts[:1] = 0
        self._values = buffers.whole(name, expected, dtype)
        self._weights = None if pattern.weights is None else buffers.whole(f"{name}/weights", expected, np.float32)

    def put(self, column: Ragged, order: Array) -> None:
        """Adds lists.

        Args:
            column: the lists, (n,).
            order: in which they are added, (n,) int32.
        """
        at, self._size = self._size, self._size + int(column.offsets[-1] - column.offsets[0])
        if self._size > np.iinfo(self._starts.dtype).max:
            self._starts = self._starts.astype(np.int64)
        starts = self._starts[self._rows : self._rows + len(order) + 1]
        self._rows += len(order)
        if self._size > len(self._values):
            self._values = self._buffers.grown(self._name, self._size, at)
        take_lists(column.values, column.offsets, order, self._values, starts, at)
        if self._weights is not None and column.weights is not None:
            if self._size > len(self._weights):
                self._weights = self._buffers.grown(f"{self._name}/weights", self._size, at)
            take_lists(column.weights, column.offsets, order, self._weights, starts, at)

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


class _Stream:
    """A row group of an epoch, decoded forwards.

    Attributes:
        next: the epoch row up to which it is decoded.
    """

    def __init__(self, source: Source, epoch: EpochOrder, place: int, first: int, rows: int) -> None:
        begin = int(epoch.group_starts[place])
        self._pieces = source.iter_row_group(int(epoch.group_order[place]), rows, first - begin)
        self.next = first

    def up_to(self, last: int) -> Iterator[tuple[int, int, Iterator[tuple[str, Flat | Ragged]]]]:
        """Decodes on to an epoch row, or a little further.

        Yields:
            The first epoch row of each piece, how many it has, and its columns, each decoded when it is asked for.
        """
        while self.next < last:
            count, columns = next(self._pieces)
            first, self.next = self.next, self.next + count
            yield first, count, columns


class _Soon(Generic[_T]):
    """The result of a function that runs in a thread."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="embedshard-windows", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits for the end, however it ends."""
        self._thread.join()

    def result(self) -> _T:
        """Waits for the result; raises what the function raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result
