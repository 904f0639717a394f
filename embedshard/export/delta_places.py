"""Where a row of a later file stood in an earlier one, by its number."""

from __future__ import annotations

__all__ = ["NONE", "IntArray", "blocks", "find_places", "int_blocks", "integers"]

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.storage import Location

IntArray = npt.NDArray[np.int64]

NONE: Final = np.zeros(0, dtype=np.int64)
_AT_ONCE: Final = 2**17
_ROW: Final = "row"


def find_places(stack: ExitStack, base: Location, target: Location) -> Callable[[IntArray], IntArray]:
    """Returns what is given the numbers of the later file's rows, in order, and returns the places in the earlier one.

    Places ascend; -1 where there is none.
    """
    with ExitStack() as looked:
        does_ascend = all(_ascends(int_blocks(looked, place, _ROW)) for place in (base, target))
    if does_ascend:
        return _Merge(int_blocks(stack, base, _ROW))
    with ExitStack() as looked:
        numbers = [np.concatenate([NONE, *int_blocks(looked, place, _ROW)]) for place in (base, target)]
    return _Chain(*numbers)


class _Merge:
    """Finds ascending numbers among ascending ones, a block of these in memory."""

    def __init__(self, blocks: Iterator[IntArray]) -> None:
        self._blocks = blocks
        self._first, self._block = 0, NONE

    def __call__(self, wanted: IntArray) -> IntArray:
        found = np.full(len(wanted), -1, dtype=np.int64)
        while len(wanted):
            if len(self._block):
                at = np.minimum(np.searchsorted(self._block, wanted), len(self._block) - 1)
                is_there = self._block[at] == wanted
                found[is_there] = self._first + at[is_there]
                if self._block[-1] >= wanted[-1]:
                    break
            following = next(self._blocks, None)
            if following is None:
                break
            self._first, self._block = self._first + len(self._block), following
        return found


class _Chain:
    """Finds numbers in any order: the most of them that stand in one order in both files."""

    def __init__(self, base: IntArray, target: IntArray) -> None:
        known, first = np.unique(base, return_index=True)
        self._places, self._next = np.full(len(target), -1, dtype=np.int64), 0
        if not len(known):
            return
        at = np.minimum(np.searchsorted(known, target), len(known) - 1)
        met = np.flatnonzero(known[at] == target)
        places = first[at[met]]
        chosen = _longest_ascending(places)
        self._places[met[chosen]] = places[chosen]

    def __call__(self, wanted: IntArray) -> IntArray:
        first, self._next = self._next, self._next + len(wanted)
        return self._places[first : self._next]


def _longest_ascending(values: IntArray) -> IntArray:
    """Returns the places of a longest strictly ascending subsequence (patience sorting, Fredman 1975)."""
    if (np.diff(values) > 0).all():
        return np.arange(len(values))
    ends: list[int] = []
    at: list[int] = []
    before = np.full(len(values), -1, dtype=np.int64)
    for place, value in enumerate(values.tolist()):
        length = bisect_left(ends, value)
        before[place] = at[length - 1] if length else -1
        if length == len(ends):
            ends.append(value)
            at.append(place)
        else:
            ends[length], at[length] = value, place
    chosen = np.zeros(len(ends), dtype=np.int64)
    place = at[-1]
    for length in reversed(range(len(ends))):
        chosen[length], place = place, int(before[place])
    return chosen


def _ascends(blocks: Iterator[IntArray]) -> bool:
    last = -math.inf
    for block in blocks:
        if len(block):
            if block[0] <= last or not (np.diff(block) > 0).all():
                return False
            last = int(block[-1])
    return True


def blocks(parquet: pq.ParquetFile, rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a Parquet file, some at a time. pyarrow keeps what it has read until it has done a row group."""
    for group in range(parquet.num_row_groups):  # and of all groups until it has done all, where it is asked for all
        yield from parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns)


def int_blocks(stack: ExitStack, place: Location, name: str) -> Iterator[IntArray]:
    """Yields a column of integers of a Parquet file, a block at a time, without nulls; the file is closed with the stack."""
    parquet = pq.ParquetFile(stack.enter_context(place.open_input()))
    return (integers(batch[name].drop_null()) for batch in blocks(parquet, _AT_ONCE, [name]))


def integers(column: pa.Array | pa.ChunkedArray) -> IntArray:
    """Returns a column of integers as numpy has them."""
    return np.asarray(column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy())
