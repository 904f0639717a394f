"""Reads windows of columns in the order of `order.py` and hands them on as batches, ahead of the loop, in a thread.

Data that fit the cache are decoded once and kept; else each lane is a cursor that moves forward through its row groups
and holds no more than its window. Either way a window's rows are gathered in final order, one gather a column, and
batches are slices of that.
"""

from __future__ import annotations

__all__ = ["BatchReader"]

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedshard.data.batch import Batch
from embedshard.data.collate import Collator
from embedshard.data.columns import Buffers, Columns, concatenate, gather, num_rows, slice_rows
from embedshard.data.negatives import Sampler
from embedshard.data.order import EpochOrder, Order, Position
from embedshard.data.source import Source
from embedshard.stages import BESIDE, Laps

_GATHER_ROWS = 65_536  # rows gathered at once from a cache
_DECODE_ROWS = 16_384  # rows decoded at once by a cursor
_BATCHES_AHEAD = 4


class _Rows(Protocol):
    """Where a pass over a partition takes its rows from."""

    steps_at_once: int

    def gather(self, epoch: EpochOrder, epoch_rows: npt.NDArray[np.int64], window: int) -> Columns:
        """Returns the rows in the order of `epoch_rows`, -1 being padding; valid until the next call."""
        ...


class _CachedRows:
    """A partition decoded once, in file order."""

    def __init__(self, source: Source, local_batch_size: int, laps: Laps) -> None:
        self._columns = concatenate([source.read_row_group(i) for i in range(len(source.inventory.row_groups))])
        laps.lap("decode")
        self._buffers = Buffers()
        self.steps_at_once = max(1, _GATHER_ROWS // local_batch_size)

    def gather(self, epoch: EpochOrder, epoch_rows: npt.NDArray[np.int64], window: int) -> Columns:
        return gather(self._columns, epoch.dataset_rows(epoch_rows), self._buffers)


class _LaneCursor:
    """A forward cursor over one lane's rows of one epoch."""

    def __init__(self, source: Source, epoch: EpochOrder, lane: int) -> None:
        self._source, self._epoch = source, epoch
        self._next, self._last = epoch.lane_span(lane)
        self._pieces: Iterator[Columns] | None = None
        self._left: list[Columns] = []

    def skip_to(self, epoch_row: int) -> None:
        """Moves forward before anything was taken."""
        assert self._pieces is None, "a cursor skips once, at its start"
        self._next = max(self._next, epoch_row)

    def take(self, last: int) -> list[Columns]:
        """Returns pieces that hold the rows from where the cursor is up to `last`."""
        if self._pieces is None:
            self._pieces = self._read(self._next, self._last)
        wanted, taken = last - self._next, []
        while wanted > 0:
            piece = self._left.pop() if self._left else next(self._pieces)
            size = num_rows(piece)
            if size > wanted:
                self._left.append(slice_rows(piece, wanted, size))
                piece, size = slice_rows(piece, 0, wanted), wanted
            taken.append(piece)
            wanted -= size
        self._next = last
        return taken

    def _read(self, first: int, last: int) -> Iterator[Columns]:
        starts, groups = self._epoch.group_starts, self._epoch.group_order
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while first < last:
            end = int(min(starts[place + 1], last))
            if end > first:
                wanted = end - first
                skip = first - int(starts[place])
                for piece in self._source.iter_row_group(int(groups[place]), _DECODE_ROWS, skip):
                    size = num_rows(piece)
                    yield piece if size <= wanted else slice_rows(piece, 0, wanted)
                    wanted -= min(size, wanted)
                    if not wanted:
                        break
                first = end
            place += 1


class _StreamedRows:
    """A partition of any size: each lane holds its window."""

    def __init__(self, source: Source, lanes: tuple[int, int], laps: Laps) -> None:
        self._source, self._lanes, self._laps = source, lanes, laps
        self._buffers = Buffers()
        self._epoch: EpochOrder | None = None
        self._window = -1
        self._cursors: list[_LaneCursor] = []
        self.steps_at_once = 0  # a window

    def gather(self, epoch: EpochOrder, epoch_rows: npt.NDArray[np.int64], window: int) -> Columns:
        if epoch is not self._epoch or window != self._window + 1:
            self._cursors = [_LaneCursor(self._source, epoch, lane) for lane in range(*self._lanes)]
            for cursor, lane in zip(self._cursors, range(*self._lanes), strict=True):
                cursor.skip_to(epoch.window_rows(lane, window)[0])
        self._epoch, self._window = epoch, window
        spans = [epoch.window_rows(lane, window) for lane in range(*self._lanes)]
        pieces = [piece for cursor, span in zip(self._cursors, spans, strict=True) for piece in cursor.take(span[1])]
        self._laps.lap("decode")
        # Lanes are contiguous spans of the epoch, but their windows are not: number the rows as they lie in `pieces`.
        bases = np.cumsum([0] + [last - first for first, last in spans])
        firsts = np.array([first for first, _ in spans], dtype=np.int64)
        lane_of_row = np.clip(np.searchsorted(firsts, epoch_rows, side="right") - 1, 0, len(spans) - 1)
        index = np.where(epoch_rows < 0, -1, epoch_rows - firsts[lane_of_row] + bases[lane_of_row])
        return gather(concatenate(pieces), index, self._buffers)


class BatchReader:
    """One rank's batches of a run, from any step on.

    Args:
        order: the order of the data.
        sources: one for each partition.
        cached: whether each partition is decoded once and kept.
        collator: makes batches of columns.
        sampler: draws candidates for a step; None if none are asked for.
        rank: this process's.
        world_size: processes that train.
        former_steps: of runs that this one continues: what is drawn for a step goes on from theirs.

    Attributes:
        laps: the seconds that its thread has taken, by stage.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[Source],
        cached: Sequence[bool],
        collator: Collator,
        sampler: Sampler | None,
        rank: int,
        world_size: int,
        former_steps: int = 0,
    ) -> None:
        self._former_steps = former_steps
        self._order, self._sources, self._cached = order, sources, cached
        self._collator, self._sampler = collator, sampler
        self._rank, self._world_size = rank, world_size
        self._lanes = order.lane_block(rank, world_size)
        self._local_batch_size = order.global_batch_size // world_size
        self._partition = -1
        self._rows: _Rows | None = None
        self.laps = Laps(BESIDE)

    @contextmanager
    def batches(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """Opens the batches of the steps [start, stop), read ahead in a thread that ends with the context.

        An error in the thread is raised at the loop's next step, ahead of batches that are ready.
        """
        ahead = _ReadAhead(self._produce(start, stop), self.laps)
        try:
            yield iter(ahead)
        finally:
            ahead.close()

    def _produce(self, start: int, stop: int) -> Iterator[Batch]:
        step, epoch = start, None
        key = (-1, -1)
        while step < stop:
            position = self._order.position(step)
            if (position.epoch, position.partition) != key:
                key = (position.epoch, position.partition)
                epoch = self._order.epoch_order(*key)
            assert epoch is not None, "the first step opens an epoch"
            window = epoch.window_of(position.step_in_epoch)
            table = epoch.rows(window, self._lanes)
            self.laps.lap("order")
            rows = self._open(position.partition)
            first = position.step_in_epoch - window * epoch.window_steps
            last = min(len(table), first + stop - step)
            at_once = rows.steps_at_once or len(table)
            for begin in range(first, last, at_once):
                end = min(begin + at_once, last)
                columns = rows.gather(epoch, table[begin:end].ravel(), window)
                self.laps.lap("order")
                for place in range(end - begin):
                    batch = self._batch(columns, place, self._order.position(step))
                    self.laps.lap("collate")
                    yield batch
                    step += 1

    def _open(self, partition: int) -> _Rows:
        if self._rows is None or partition != self._partition:
            self._rows = None  # lets go of the former before the next is read
            source = self._sources[partition]
            self._rows = (
                _CachedRows(source, self._local_batch_size, self.laps)
                if self._cached[partition]
                else _StreamedRows(source, self._lanes, self.laps)
            )
            self._partition = partition
        return self._rows

    def _batch(self, columns: Columns, place: int, position: Position) -> Batch:
        size = self._local_batch_size
        draws = None
        if self._sampler is not None:
            step = self._former_steps + position.step
            draws = self._sampler.draw(step, self._rank, self._world_size)
        return self._collator.batch(columns, place * size, (place + 1) * size, draws, position)


class _ReadAhead:
    """Runs an iterator in a thread, a few items ahead."""

    def __init__(self, produce: Iterator[Batch], laps: Laps) -> None:
        self._produce, self._laps = produce, laps
        self._ready: queue.Queue[Batch | None] = queue.Queue(maxsize=_BATCHES_AHEAD)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="embedshard-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._laps.restart()
            for batch in self._produce:
                if not self._put(batch):
                    return
                self._laps.lap("ahead")
        except BaseException as error:
            self._error = error
        self._put(None)

    def _put(self, item: Batch | None) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                if self._error is not None:  # the loop looks at the error first, no need to wait for a place
                    return False
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self._error is not None:
                raise self._error
            try:
                batch = self._ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if self._error is not None:
                raise self._error
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.join()
