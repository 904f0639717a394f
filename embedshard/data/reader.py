"""Reads windows of columns in the order of `order.py` and hands them on as batches, ahead of the loop, in a thread.

Data that fit the cache are decoded once and kept, and gathered in final order; else windows are read one after the other
(`windows.py`). Batches are slices of what comes of either.
"""

from __future__ import annotations

__all__ = ["BatchReader"]

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedshard.data.batch import Batch
from embedshard.data.collate import Collator
from embedshard.data.columns import Buffers, Columns, concatenate, gather, load_loops
from embedshard.data.crew import Crew
from embedshard.data.negatives import Sampler
from embedshard.data.order import EpochOrder, Order, Position
from embedshard.data.source import Source
from embedshard.data.windows import Windows
from embedshard.stages import BESIDE, Laps

_ROWS_AT_ONCE = 65_536
"""Rows put in order at once: what they take stays in the cache until batches are made of them."""
_BATCHES_AHEAD, _BATCHES_LEFT = 8, 2
"""So many batches are made ahead, and made again when so few are left."""
_DECODERS_A_MAKER = 3
"""Decoding takes about three times as long as making batches."""


class _Rows(Protocol):
    """Where a pass over a partition takes its rows from."""

    def open(self, epoch: EpochOrder, window: int) -> None:
        """Has the rows of a window there; what was read of another one is used no more."""
        ...

    def read(self, first: int, last: int, buffers: Buffers) -> Columns:
        """Returns rows of the steps [first, last) of the open window, in their order. For several threads.

        They are valid until the next call with these buffers.
        """
        ...

    def expect(self, upcoming: EpochOrder | None) -> None:
        """Says which pass over the same partition follows the one that is opened next; None: none does."""
        ...

    def close(self) -> None:
        """Lets go of what is not needed to begin anew."""
        ...


class _CachedRows:
    """A partition decoded once, in file order."""

    def __init__(self, source: Source, lanes: tuple[int, int], laps: Laps, crew: Crew) -> None:
        types = source.least_types  # rows are gathered from all over the partition: of less memory, more is in the cache
        groups = range(len(source.inventory.row_groups))
        reads = [partial(_decoded, source, group, types) for group in groups]
        self._columns = concatenate(list(crew.in_order(reads)))
        laps.lap("decode")
        self._lanes = lanes
        self._table: tuple[EpochOrder, int, npt.NDArray[np.int64]] | None = None

    def open(self, epoch: EpochOrder, window: int) -> None:
        if self._table is None or self._table[:2] != (epoch, window):
            self._table = epoch, window, epoch.rows(window, self._lanes)

    def read(self, first: int, last: int, buffers: Buffers) -> Columns:
        assert self._table is not None, "a window is opened before it is read"
        epoch, _, rows = self._table
        return gather(self._columns, epoch.dataset_rows(rows[first:last].ravel()), buffers)

    def expect(self, upcoming: EpochOrder | None) -> None:
        """Has all rows of all passes."""

    def close(self) -> None:
        """Keeps what was decoded."""


def _decoded(source: Source, group: int, types: Mapping[str, np.dtype[Any]]) -> Iterator[Columns]:
    yield source.read_row_group(group, types)


class BatchReader:
    """One rank's batches of a run, from any step on.

    Args:
        order: the order of the data.
        sources: one for each partition.
        cached: whether each partition is decoded once and kept.
        cache_bytes: of a partition that is not, so many may be kept in memory that were met before their turn.
        collator: makes batches of columns.
        sampler: draws candidates for a step; None if none are asked for.
        rank: this process's.
        world_size: processes that train.
        former_steps: of runs that this one continues: what is drawn for a step goes on from theirs.
        pins: whether batches are made in pinned memory, for a CUDA device to fetch.
        threads: that decode row groups; a third as many make batches.

    Attributes:
        laps: the seconds that its threads have taken, by stage; of several, those in which one that waits for them did.
            Ordering counts as making batches then.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[Source],
        cached: Sequence[bool],
        cache_bytes: int,
        collator: Collator,
        sampler: Sampler | None,
        rank: int,
        world_size: int,
        former_steps: int = 0,
        pins: bool = False,
        threads: int = 1,
    ) -> None:
        self._former_steps, self._pins = former_steps, pins
        self._order, self._sources, self._cached, self._cache_bytes = order, sources, cached, cache_bytes
        self._collator, self._sampler = collator, sampler
        self._rank, self._world_size = rank, world_size
        self._lanes = order.lane_block(rank, world_size)
        self._local_batch_size = order.global_batch_size // world_size
        self._partition = -1
        self._rows: _Rows | None = None
        self.laps = Laps(BESIDE)
        makers = (threads + _DECODERS_A_MAKER - 1) // _DECODERS_A_MAKER
        self._decoders, self._makers = Crew(threads, "embedshard-decode"), Crew(makers, "embedshard-batches")
        self._spare_buffers: list[Buffers] = []
        for source, is_cached in zip(sources, cached, strict=True):
            has_lists = any(spec.is_list or spec.is_text for spec in source.decoder.specs)
            load_loops(source.least_types.values(), is_cached, has_lists)

    @contextmanager
    def batches(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """Opens the batches of the steps [start, stop), read ahead in a thread that ends with the context.

        An error in the thread is raised at the loop's next step, ahead of batches that are ready.
        """
        with ExitStack() as stack:
            stack.callback(self._spare_buffers.clear)
            stack.enter_context(closing(self._decoders))
            stack.enter_context(closing(self._makers))
            stack.callback(self._close_rows)
            produced = stack.enter_context(closing(self._produce(start, stop)))
            yield iter(stack.enter_context(closing(_ReadAhead(produced, self.laps))))

    def _close_rows(self) -> None:
        if self._rows is not None:
            self._rows.close()

    def _produce(self, start: int, stop: int) -> Generator[Batch]:
        step = start
        epoch = upcoming = None
        key = (-1, -1)
        while step < stop:
            position = self._order.position(step)
            rows = self._open(position.partition)
            if (position.epoch, position.partition) != key:
                key = (position.epoch, position.partition)
                epoch = upcoming or self._order.epoch_order(*key)
                upcoming = self._upcoming(position, epoch, stop)
                rows.expect(upcoming)
            assert epoch is not None, "the first step opens an epoch"
            window = epoch.window_of(position.step_in_epoch)
            self.laps.lap("order")
            begin = position.step_in_epoch - window * epoch.window_steps
            end = min(epoch.steps(window), begin + stop - step)
            rows.open(epoch, window)
            self.laps.lap("order")
            at_once = max(1, _ROWS_AT_ONCE // self._local_batch_size)
            if self._makers.size > 1:  # what a thread makes, it makes to its end: it is to be no more than is made ahead
                at_once = min(at_once, _BATCHES_AHEAD)
            jobs = [
                partial(self._made, rows, step + first - begin, first, min(first + at_once, end))
                for first in range(begin, end, at_once)
            ]
            with closing(self._makers.in_order(jobs)) as batches:
                for batch in batches:
                    self.laps.lap("collate")
                    yield batch
            step += end - begin

    def _made(self, rows: _Rows, step: int, first: int, last: int) -> Iterator[Batch]:
        """Yields the batches of the steps [first, last) of the open window, of which `step` is the first; in any thread."""
        try:
            buffers = self._spare_buffers.pop()
        except IndexError:  # other threads have them
            buffers = Buffers()
        columns = rows.read(first, last, buffers)
        if self._makers.size == 1:
            self.laps.lap("order")
        for place in range(last - first):
            yield self._batch(columns, place, self._order.position(step + place))
        self._spare_buffers.append(buffers)

    def _upcoming(self, position: Position, epoch: EpochOrder, stop: int) -> EpochOrder | None:
        """Returns the next pass over the same partition, if the next step after this one is of one."""
        step = position.step - position.step_in_epoch + epoch.num_steps
        if step >= stop:
            return None
        after = self._order.position(step)
        return self._order.epoch_order(after.epoch, after.partition) if after.partition == position.partition else None

    def _open(self, partition: int) -> _Rows:
        if self._rows is None or partition != self._partition:
            if self._rows is not None:
                self._rows.close()
            self._rows = None  # lets go of the former before the next is read
            source = self._sources[partition]
            self._rows = (
                _CachedRows(source, self._lanes, self.laps, self._decoders)
                if self._cached[partition]
                else Windows(source, self._lanes, self._cache_bytes, self.laps, self._decoders)
            )
            self._partition = partition
        return self._rows

    def _batch(self, columns: Columns, place: int, position: Position) -> Batch:
        size = self._local_batch_size
        draws = None
        if self._sampler is not None:
            step = self._former_steps + position.step
            draws = self._sampler.draw(step, self._rank, self._world_size)
        batch = self._collator.batch(columns, place * size, (place + 1) * size, draws, position)
        return batch.pin_memory() if self._pins else batch


class _ReadAhead:
    """Runs an iterator in a thread, a few items ahead.

    The thread rests from when it is far enough ahead until few are left: to wake it at each item costs both threads more.
    """

    def __init__(self, produce: Iterator[Batch], laps: Laps) -> None:
        self._produce, self._laps = produce, laps
        self._ready: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._rests = self._is_awaited = self._has_ended = self._is_closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="embedshard-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._laps.restart()
            for batch in self._produce:
                if not self._put(batch):
                    break
                self._laps.lap("ahead")
        except BaseException as error:
            self._error = error
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def _put(self, batch: Batch) -> bool:
        """Adds a batch, and waits until another one is wanted; returns whether it is."""
        with self._changed:
            self._ready.append(batch)
            if self._is_awaited:
                self._changed.notify()
            if len(self._ready) >= _BATCHES_AHEAD:
                self._rests = True
                self._changed.wait_for(lambda: self._is_closing or len(self._ready) <= _BATCHES_LEFT)
                self._rests = False
            return not self._is_closing

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._take()) is not None:
            yield batch

    def _take(self) -> Batch | None:
        with self._changed:
            if not self._ready and not self._has_ended:
                self._is_awaited = True
                self._changed.wait_for(lambda: self._ready or self._has_ended)
                self._is_awaited = False
            if self._error is not None:
                raise self._error
            if not self._ready:
                return None
            batch = self._ready.popleft()
            if self._rests and len(self._ready) <= _BATCHES_LEFT:
                self._changed.notify()
            return batch

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
