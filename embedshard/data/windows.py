"""Windows of data of any size, in the order of training: each row group is decoded once a pass, forwards.

Lanes are spread over the whole epoch, so a window takes rows from many places. Each row group that holds some of them is
open as a stream, which is decoded no further than the window needs; lanes that share a row group share its stream. What a
stream meets on its way for later windows waits on a shelf. Then the rows of each lane, a contiguous span, are put in their
order and into their places, a lane and a column at a time: what is read at random so lies in a core's cache.
"""

from __future__ import annotations

__all__ = ["Windows"]

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from embedshard.compiled import compiled
from embedshard.data.columns import Buffers, Columns, Flat, Ragged, concatenate, num_rows, slice_rows
from embedshard.data.order import EpochOrder
from embedshard.data.shelf import Piece, Shelf
from embedshard.data.source import Source
from embedshard.stages import Laps

IntArray = npt.NDArray[np.int64]
_T = TypeVar("_T")

_DECODE_ROWS: Final = 16_384
"""Rows decoded at once: columns of them lie in a core's cache, and a lane holds no more beyond its window."""
_WHOLE_ROWS: Final = 2**17
"""A row group of no more is decoded to its end: its rows take less memory than pages and dictionaries of an open stream."""


class Windows:
    """A rank's windows of one partition, the next one decoded in a thread while the last one is taken.

    Args:
        source: the partition.
        lanes: the rank's, [first, last).
        limit_bytes: of rows that wait in memory.
        laps: counts the seconds that decoding and ordering take, in whichever thread.
    """

    def __init__(self, source: Source, lanes: tuple[int, int], limit_bytes: int, laps: Laps) -> None:
        self._source, self._lanes, self._laps = source, lanes, laps
        self._shelf = Shelf(limit_bytes)
        self._buffers = (Buffers(), Buffers())
        self._epoch: EpochOrder | None = None
        self._next = -1
        self._streams: dict[int, _Stream] = {}
        self._ended: set[int] = set()
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._ahead: tuple[EpochOrder, int, _Soon[Columns]] | None = None

    def read(self, epoch: EpochOrder, window: int) -> Columns:
        """Returns a window's rows as they are trained, steps * lanes * rows of a step; valid until the next call.

        Padding is an empty list, a number of 0, and an id or row number of -1. Ids of a column that all fit are int32.

        Raises:
            DataError: if the rows cannot be read or hold what the config does not allow.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is epoch and ahead[1] == window:
            columns = ahead[2].result()
            self._laps.restart()  # the wait is no work: that is counted where it is done
        else:
            if ahead is not None:
                ahead[2].wait()
            columns = self._read(epoch, window, self._laps)
        if epoch.steps(window + 1):
            laps = self._laps.beside()
            self._ahead = epoch, window + 1, _Soon(lambda: self._read(epoch, window + 1, laps))
        return columns

    def close(self) -> None:
        """Waits for the thread, and lets go of all that waits."""
        if self._ahead is not None:
            self._ahead[2].wait()
        self._ahead, self._epoch = None, None
        self._let_go()

    def _let_go(self) -> None:
        self._streams.clear()
        self._ended.clear()
        self._shelf.clear()

    # ------------------------------------------------------------------------------------------------------- decoding
    def _read(self, epoch: EpochOrder, window: int, laps: Laps) -> Columns:
        if epoch is not self._epoch or window != self._next:
            self._let_go()
            self._epoch = epoch
        self._next = window + 1
        for place, last in self._needed(epoch, window).items():
            if place in self._ended:
                continue
            if place not in self._streams:
                self._streams[place] = _Stream(self._source, epoch, place, self._first_needed(epoch, place, window))
            stream = self._streams[place]
            end = min(int(epoch.group_starts[place + 1]), epoch.lane_span(self._lanes[1] - 1)[1])
            for first, piece in stream.up_to(end if end - stream.next <= _WHOLE_ROWS else last):
                self._put(epoch, window, first, piece)
            if stream.next >= end:
                del self._streams[place]
                self._ended.add(place)
        laps.lap("decode")
        columns = self._arranged(epoch, window)
        laps.lap("order")
        return columns

    def _needed(self, epoch: EpochOrder, window: int) -> Mapping[int, int]:
        """Returns up to which epoch row each row group must be decoded for a window, by its place in the epoch."""
        needed: dict[int, int] = {}
        for lane in range(*self._lanes):
            first, last = epoch.window_rows(lane, window)
            while first < last:
                place = epoch.place_of(first)
                first = min(last, int(epoch.group_starts[place + 1]))
                needed[place] = max(needed.get(place, 0), first)
        return needed

    def _first_needed(self, epoch: EpochOrder, place: int, window: int) -> int:
        """Returns the first epoch row of a row group that this window or a later one trains."""
        begin, end = (int(epoch.group_starts[place + i]) for i in (0, 1))
        spans = [(epoch.window_rows(lane, window)[0], epoch.lane_span(lane)[1]) for lane in range(*self._lanes)]
        return min(max(first, begin) for first, last in spans if max(first, begin) < min(last, end))

    def _put(self, epoch: EpochOrder, window: int, first: int, columns: Columns) -> None:
        """Puts the rows of a stream where their windows find them; those of other ranks, and of former windows, nowhere."""
        if not self._dtypes:
            self._dtypes = {name: column.values.dtype for name, column in columns.items()}
        begin, end = first, first + num_rows(columns)
        for lane in range(max(epoch.lane_of(begin), self._lanes[0]), min(epoch.lane_of(end - 1) + 1, self._lanes[1])):
            lane_first, lane_last = epoch.lane_span(lane)
            row, last = max(begin, lane_first), min(end, lane_last)
            while row < last:
                of_row = epoch.window_of_row(lane, row)
                stop = min(last, epoch.window_rows(lane, of_row)[1])
                if of_row >= window:
                    piece = Piece(lane, row, slice_rows(columns, row - begin, stop - begin))
                    self._shelf.put(of_row, piece, waits=of_row > window)
                row = stop

    # ------------------------------------------------------------------------------------------------------- ordering
    def _arranged(self, epoch: EpochOrder, window: int) -> Columns:
        """Returns the rows of a window, all of which are on the shelf, in the order of training."""
        by_lane: dict[int, list[Columns]] = defaultdict(list)
        for piece in self._shelf.take(window):
            by_lane[piece.lane].append(piece.columns)
        if not by_lane:
            return {}
        lanes = {lane: concatenate(pieces) for lane, pieces in by_lane.items()}
        orders = {lane: epoch.lane_order(lane, window) - epoch.window_rows(lane, window)[0] for lane in lanes}
        places = _Places(epoch, window, self._lanes, orders)
        buffers = self._buffers[window % 2]
        pattern: Columns = next(iter(lanes.values()))
        return {
            name: _arranged_flat(name, self._dtypes[name], places, lanes, buffers)
            if isinstance(column, Flat)
            else _arranged_ragged(name, places, lanes, buffers, column.weights is not None)
            for name, column in pattern.items()
        }


class _Stream:
    """A row group of an epoch, decoded forwards.

    Attributes:
        next: the epoch row up to which it is decoded.
    """

    def __init__(self, source: Source, epoch: EpochOrder, place: int, first: int) -> None:
        begin = int(epoch.group_starts[place])
        self._pieces = source.iter_row_group(int(epoch.group_order[place]), _DECODE_ROWS, first - begin)
        self.next = first

    def up_to(self, last: int) -> Iterator[tuple[int, Columns]]:
        """Decodes on to an epoch row, or a little further; yields the first epoch row of each piece, and the piece."""
        while self.next < last:
            piece = next(self._pieces)
            first, self.next = self.next, self.next + num_rows(piece)
            yield first, piece


class _Places:
    """Where the rows of a window lie in it.

    Args:
        epoch: the pass.
        window: which window.
        lanes: [first, last).
        orders: of each lane's rows in the order of training, their numbers within the lane's window.

    Attributes:
        shape: steps, lanes, rows of a lane in a step.
        orders: by lane.
    """

    def __init__(self, epoch: EpochOrder, window: int, lanes: tuple[int, int], orders: Mapping[int, IntArray]) -> None:
        self.shape = epoch.steps(window), lanes[1] - lanes[0], epoch.rows_per_lane
        self.orders, self._first = orders, lanes[0]
        self._scratch = Buffers()

    def fill(self, out: npt.NDArray[Any], lane: int, values: npt.NDArray[Any], padding: int) -> None:
        """Writes a lane's values, in order, into their places of all of the window's, and padding where it has no more."""
        steps, lanes, per_lane = self.shape
        taken = self._scratch.array(str(values.dtype), steps * per_lane, values.dtype)
        count = len(self.orders[lane])
        np.take(values, self.orders[lane], out=taken[:count], mode="clip")
        taken[count:] = padding
        out.reshape(steps, lanes, per_lane)[:, lane - self._first] = taken.reshape(steps, per_lane)

    def of_lane(self, of_all: npt.NDArray[Any], lane: int) -> npt.NDArray[Any]:
        """Returns what a lane's rows have of the window's, in their order, without padding."""
        of_lane = of_all.reshape(self.shape)[:, lane - self._first].reshape(-1)
        return of_lane[: len(self.orders[lane])]

    @property
    def count(self) -> int:
        """Rows of the window, padding included."""
        steps, lanes, per_lane = self.shape
        return steps * lanes * per_lane

    def absent(self, lanes: Mapping[int, Columns]) -> list[int]:
        """Returns the places among the rank's lanes of those without a row."""
        return [i for i in range(self.shape[1]) if i + self._first not in lanes]


def _arranged_flat(name: str, dtype: np.dtype[Any], places: _Places, lanes: Mapping[int, Columns], buffers: Buffers) -> Flat:
    padding = -1 if dtype == np.int64 else 0
    is_narrow = dtype == np.int64 and all(columns[name].values.dtype == np.int32 for columns in lanes.values())
    out = buffers.array(name, places.count, np.int32 if is_narrow else dtype)
    for lane in places.absent(lanes):
        out.reshape(places.shape)[:, lane] = padding
    for lane, columns in lanes.items():
        places.fill(out, lane, columns[name].values, padding)
    return Flat(out)


def _arranged_ragged(
    name: str, places: _Places, lanes: Mapping[int, Columns], buffers: Buffers, has_weights: bool
) -> Ragged:
    lengths = buffers.array(f"{name}/lengths", places.count, np.int64)
    for lane in places.absent(lanes):
        lengths.reshape(places.shape)[:, lane] = 0
    for lane, columns in lanes.items():
        places.fill(lengths, lane, np.diff(_ragged(columns[name]).offsets), 0)
    offsets = buffers.array(f"{name}/offsets", places.count + 1, np.int64)
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1:])
    is_narrow = all(columns[name].values.dtype == np.int32 for columns in lanes.values())
    values = buffers.array(name, int(offsets[-1]), np.int32 if is_narrow else np.int64)
    weights = buffers.array(f"{name}/weights", int(offsets[-1]), np.float32) if has_weights else None
    for lane, columns in lanes.items():
        column, order = _ragged(columns[name]), places.orders[lane]
        begins = places.of_lane(offsets[:-1], lane)
        _move_lists(column.values, column.offsets, order, begins, values)
        if weights is not None:
            assert column.weights is not None, "pieces have the same columns"
            _move_lists(column.weights, column.offsets, order, begins, weights)
    return Ragged(values, offsets, weights)


def _ragged(column: Flat | Ragged) -> Ragged:
    assert isinstance(column, Ragged), "pieces have the same columns"
    return column


@compiled
def _move_lists(
    values: npt.NDArray[Any], offsets: IntArray, order: IntArray, begins: IntArray, out: npt.NDArray[Any]
) -> None:
    """Copies lists, in an order, to where each begins."""
    for place in range(len(order)):
        source, target = offsets[order[place]], begins[place]
        for i in range(offsets[order[place] + 1] - source):
            out[target + i] = values[source + i]


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
