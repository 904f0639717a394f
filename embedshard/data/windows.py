"""The windows of data of any size, one after the other: each row group is decoded once a pass, forwards.

Lanes are spread over the whole epoch, so a window takes rows from many places. Each row group that holds some of them is
open as a stream, which is decoded no further than the window needs; lanes that share a row group share its stream. What a
stream meets on its way for later windows waits on a shelf, but for the next one if nothing uses its memory yet. The next
window, be it the first one of the next epoch, is decoded in a thread while one is trained.
"""

from __future__ import annotations

__all__ = ["Windows", "rows_that_wait", "window_steps"]

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final, Generic, TypeVar

import numpy as np

from embedshard.config import Config
from embedshard.data.columns import Buffers, Columns, Flat, Ragged, gather, num_rows, part_of
from embedshard.data.crew import Crew
from embedshard.data.order import EpochOrder
from embedshard.data.shelf import Piece, Shelf, own_copy
from embedshard.data.source import Source
from embedshard.data.window import Spot, Window
from embedshard.stages import Laps

_T = TypeVar("_T")

_DECODE_ROWS: Final = 65_536
_LANE_ROWS: Final = 16_384
"""Rows decoded at once, and where a row group is one lane's: a lane holds no more beyond its window."""
_WHOLE_ROWS: Final = 2**17
"""A row group of no more is decoded to its end: its rows take less memory than pages and dictionaries of an open stream."""
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
        crew: decodes row groups.
    """

    def __init__(self, source: Source, lanes: tuple[int, int], limit_bytes: int, laps: Laps, crew: Crew) -> None:
        self._source, self._lanes, self._laps, self._crew = source, lanes, laps, crew
        self._types = source.least_types
        self._shelf = Shelf(limit_bytes)
        self._buffers = Buffers(), Buffers()
        self._turn = 0  # which of the buffers the window has that was read last
        self._epoch: EpochOrder | None = None
        self._upcoming: EpochOrder | None = None
        self._next = -1
        self._streams: dict[int, _Stream] = {}
        self._ended: set[int] = set()
        self._no_rows: Columns = {}
        self._current: Window | None = None
        self._following: Window | None = None  # the next one to be read, if it has rows already
        self._ahead: tuple[EpochOrder, int, _Soon[Window]] | None = None

    def open(self, epoch: EpochOrder, window: int) -> None:
        """Has all rows of a window there; what was read of another one is used no more.

        Raises:
            DataError: if the rows cannot be read or hold what the config does not allow.
        """
        if self._current is None or self._current.epoch is not epoch or self._current.number != window:
            self._current = self._next_window(epoch, window)

    def read(self, first: int, last: int, buffers: Buffers) -> Columns:
        """Returns rows of the steps [first, last) of the open window, as they are trained. For several threads.

        They are steps * lanes * rows of a lane in a step. Padding is an empty list, a number of 0, and an id or row number
        of -1. Ids are of the least type that holds all of their table's.

        Args:
            first: step of the window.
            last: after the last step.
            buffers: memory for them.
        """
        assert self._current is not None, "a window is opened before it is read"
        return self._current.columns(first, last, buffers)

    def expect(self, upcoming: EpochOrder | None) -> None:
        """Says which pass follows the one that is read next; None: none does, or one over other data."""
        self._upcoming = upcoming

    def _next_window(self, epoch: EpochOrder, window: int) -> Window:
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

    def _read(self, epoch: EpochOrder, window: int, laps: Laps, is_next_free: bool = False) -> Window:
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
        waiting = [partial(self._put_waiting, found)] * self._crew.size
        self._crew.run([*waiting, *(partial(self._decode, found, *one) for one in self._streams_of(epoch, window))])
        for place in [place for place, stream in self._streams.items() if stream.has_ended]:
            del self._streams[place]
            self._ended.add(place)
        found.finish(self._pattern())
        laps.lap("decode")
        return found

    def _put_waiting(self, window: Window) -> None:
        """Puts pieces from the shelf into their window until there are none."""
        while (piece := self._shelf.take(window.number)) is not None:
            spot = window.spot(piece.lane, piece.first, num_rows(piece.columns))
            for name, column in piece.columns.items():
                spot.put(name, column)

    def _streams_of(self, epoch: EpochOrder, window: int) -> Iterator[tuple[_Stream, int]]:
        """Yields the streams that have rows of a window, and up to which epoch row each is needed."""
        for place, last in _needed(epoch, window, self._lanes).items():
            if place in self._ended:
                continue
            if place not in self._streams:
                end = _end(epoch, place, self._lanes)
                first = _first_needed(epoch, place, window, self._lanes)
                at_once = end - first <= _WHOLE_ROWS or epoch.lane_of(first) < epoch.lane_of(end - 1)
                is_small = epoch.group_starts[place + 1] - epoch.group_starts[place] <= _WHOLE_ROWS
                rows = _WHOLE_ROWS if is_small else _DECODE_ROWS if at_once else _LANE_ROWS
                self._streams[place] = _Stream(self._source, epoch, place, first, end, rows)
            yield self._streams[place], last

    def _decode(self, window: Window, stream: _Stream, last: int) -> None:
        """Decodes a row group as far as a window needs it."""
        for first, count, columns in stream.up_to(last):
            self._put(window, first, count, columns)

    def _empty_window(self, epoch: EpochOrder, window: int, turn: int) -> Window:
        return Window(epoch, window, self._lanes, self._types, self._buffers[turn])

    def _pattern(self) -> Columns:
        """Returns the columns of the data, without a row."""
        if not self._no_rows and self._source.inventory.row_groups:
            self._no_rows = gather(self._source.read_row_group(0), np.zeros(0, dtype=np.int64), None)
        return self._no_rows

    def _put(self, window: Window, first: int, count: int, columns: Iterator[tuple[str, Flat | Ragged]]) -> None:
        """Puts rows of a stream where their windows find them; those of other ranks, and of former windows, nowhere.

        Args:
            window: the one that is read.
            first: epoch row of the first one.
            count: how many.
            columns: of these rows, each decoded when it is asked for.
        """
        epoch, end = window.epoch, first + count
        spots: list[tuple[int, int, Spot]] = []
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


class _Stream:
    """A row group of an epoch, decoded forwards.

    Args:
        source: the partition.
        epoch: the pass.
        place: of the row group in the epoch.
        first: epoch row that is the first one to be decoded.
        end: epoch row after the last one that is needed of it.
        rows: that are decoded at once.
    """

    def __init__(self, source: Source, epoch: EpochOrder, place: int, first: int, end: int, rows: int) -> None:
        begin = int(epoch.group_starts[place])
        self._pieces = source.iter_row_group(int(epoch.group_order[place]), rows, first - begin)
        self._next, self._end = first, end

    @property
    def has_ended(self) -> bool:
        """Whether all that is needed of it is decoded."""
        return self._next >= self._end

    def up_to(self, last: int) -> Iterator[tuple[int, int, Iterator[tuple[str, Flat | Ragged]]]]:
        """Decodes on to an epoch row, or a little further; to the end if that is not far.

        Yields:
            The first epoch row of each piece, how many it has, and its columns, each decoded when it is asked for.
        """
        if self._end - self._next <= _WHOLE_ROWS:
            last = self._end
        while self._next < last:
            count, columns = next(self._pieces)
            first, self._next = self._next, self._next + count
            yield first, count, columns
        if self.has_ended:
            self._pieces.close()  # with its file and what Arrow has decoded last: others of the window take longer


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
