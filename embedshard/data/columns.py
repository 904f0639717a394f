"""Decoded columns as flat arrays, and the gathers that put their rows in order.

A column of ids or numbers is one array; a column of lists is its values and offsets. Nothing here makes an object per row.
"""

from __future__ import annotations

__all__ = [
    "Buffers",
    "Columns",
    "Flat",
    "Ragged",
    "concatenate",
    "gather",
    "good_rows",
    "load_loops",
    "narrowed",
    "num_rows",
    "offsets_of",
    "padding_of",
    "part_of",
    "put_values",
    "rebased",
    "repeated",
    "slice_rows",
    "take_lists",
    "take_values",
]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedshard.compiled import compiled

_COUNTS: Final = ("bad", "null:")  # columns of integers that are no ids

IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Flat:
    """A value a row: (n,) int64 ids, smaller ones in what is trained, float32 numbers, int16 or int32 counts and codes."""

    values: Array


@dataclass(frozen=True)
class Ragged:
    """A list a row.

    Attributes:
        values: all lists one after another, int64, or smaller integers in what is trained; rows use
            values[offsets[0] : offsets[-1]].
        offsets: (n + 1,) int64, or int32 in what is streamed. They need not begin at 0: slices share memory with the whole.
        weights: of the values, float32, where the feature has weights.
    """

    values: IntArray
    offsets: IntArray
    weights: npt.NDArray[np.float32] | None = None


Columns = dict[str, Flat | Ragged]
"""Columns of equal length by name: features, `label:<name>`, `weight`, `candidates`, and `row`. Ids may be of a smaller
type in what is trained (`Source.least_types`); the collator widens them.

Beside them, where a config asks for it: `bad`, 0 or a code for why a row is set aside, and `null:<feature>`, how many nulls
fell out of the row's list.
"""


class Buffers:
    """Memory that gathers write into again and again.

    What a gather returns is valid until the next gather into the same buffers: fresh memory for every window costs more
    in page faults than the gather itself.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def array(self, name: str, size: int, dtype: npt.DTypeLike) -> Array:
        """Returns (size,) uninitialised memory, the same as last time if it is large enough."""
        return self.whole(name, size, dtype)[:size]

    def whole(self, name: str, size: int, dtype: npt.DTypeLike) -> Array:
        """Returns all memory of a name, at least (size,)."""
        held = self._arrays.get(name)
        if held is None or len(held) < size or held.dtype != np.dtype(dtype):
            held = np.empty(max(size, 1) * 9 // 8 + 1, dtype=dtype)
            self._arrays[name] = held
        return held

    def grown(self, name: str, size: int, used: int, dtype: npt.DTypeLike | None = None) -> Array:
        """Returns larger memory of a name, maybe of another type: (size,) or more, the first `used` values as they were."""
        former = self._arrays[name]
        held = np.empty(max(size, 1) * 5 // 4 + 1, dtype=dtype or former.dtype)
        held[:used] = former[:used]
        self._arrays[name] = held
        return held


def num_rows(columns: Mapping[str, Flat | Ragged]) -> int:
    """Returns the number of rows; 0 without columns."""
    for column in columns.values():
        return len(column.values) if isinstance(column, Flat) else len(column.offsets) - 1
    return 0


def part_of(column: Flat | Ragged, first: int, last: int) -> Flat | Ragged:
    """Returns the rows [first, last) of a column as views; offsets of lists stay as they are."""
    if isinstance(column, Flat):
        return Flat(column.values[first:last])
    return Ragged(column.values, column.offsets[first : last + 1], column.weights)


def slice_rows(columns: Mapping[str, Flat | Ragged], first: int, last: int) -> Columns:
    """Returns the rows [first, last) as views; offsets of lists stay as they are."""
    return {name: part_of(column, first, last) for name, column in columns.items()}


def narrowed(columns: Columns, types: Mapping[str, np.dtype[Any]]) -> Columns:
    """Returns columns whose values are of the types named; others stay as they are."""
    return {
        name: replace(column, values=column.values.astype(types[name], copy=False)) if name in types else column
        for name, column in columns.items()
    }


def good_rows(columns: Columns) -> Columns:
    """Returns the rows that are not set aside."""
    bad = columns.get("bad")
    if bad is None or not bad.values.any():
        return columns
    return gather(columns, np.flatnonzero(bad.values == 0), None)


def concatenate(parts: Sequence[Mapping[str, Flat | Ragged]]) -> Columns:
    """Returns the rows of all parts, which have the same columns; offsets begin at 0."""
    if len(parts) <= 1:
        return dict(parts[0]) if parts else {}
    joined: Columns = {}
    for name, first in parts[0].items():
        if isinstance(first, Flat):
            joined[name] = Flat(np.concatenate([part[name].values for part in parts]))
            continue
        pieces = [rebased(part[name]) for part in parts]
        starts = np.cumsum([0] + [len(piece.values) for piece in pieces])
        offsets = [piece.offsets[:-1] + start for piece, start in zip(pieces, starts, strict=False)]
        weights = [piece.weights for piece in pieces if piece.weights is not None]
        joined[name] = Ragged(
            np.concatenate([piece.values for piece in pieces]),
            np.concatenate([*offsets, starts[-1:]]).astype(np.int64, copy=False),
            np.concatenate(weights) if weights else None,
        )
    return joined


def rebased(column: Flat | Ragged) -> Ragged:
    """Returns lists as a view of their own values alone; offsets begin at 0."""
    assert isinstance(column, Ragged), "parts have the same columns"
    first, last = int(column.offsets[0]), int(column.offsets[-1])
    weights = None if column.weights is None else column.weights[first:last]
    return Ragged(column.values[first:last], column.offsets - first, weights)


def gather(columns: Mapping[str, Flat | Ragged], index: IntArray, buffers: Buffers | None) -> Columns:
    """Returns the rows at `index`, in its order; -1 gives padding.

    Padding is an empty list, a number of 0, and an id or row number of -1.

    Args:
        columns: where rows come from.
        index: (m,) int64, from -1 to n - 1.
        buffers: memory to write into; None makes new memory.
    """
    buffers = Buffers() if buffers is None else buffers
    return {
        name: _gather_flat(name, column, index, buffers)
        if isinstance(column, Flat)
        else _gather_ragged(name, column, index, buffers)
        for name, column in columns.items()
    }


def padding_of(name: str, dtype: np.dtype[Any]) -> int:
    """Returns what a column has in a place that holds no row."""
    return 0 if np.issubdtype(dtype, np.floating) or name.startswith(_COUNTS) else -1


def _gather_flat(name: str, column: Flat, index: IntArray, buffers: Buffers) -> Flat:
    out = buffers.array(name, len(index), column.values.dtype)
    _take(column.values, index, out.dtype.type(padding_of(name, out.dtype)), out)
    return Flat(out)


@compiled
def _take(values: Array, index: IntArray, padding: Any, out: Array) -> None:
    """Copies values in the order of an index; -1 gives padding."""
    for place in range(len(index)):
        row = index[place]
        if row < 0:
            out[place] = padding
        else:
            out[place] = values[row]


@compiled
def take_values(values: Array, order: Array, out: Array) -> None:
    """Copies values in an order, (n,), to an array that may be of a smaller type that holds them all, (n,)."""
    for place in range(len(order)):
        out[place] = values[order[place]]


@compiled
def put_values(values: Array, order: Array, places: IntArray, out: Array) -> None:
    """As `take_values`, to places (n,) of a larger array."""
    for at in range(len(order)):
        out[places[at]] = values[order[at]]


def load_loops(types: Iterable[np.dtype[Any]], is_cached: bool, has_lists: bool) -> None:
    """Loads the loops that rows go through in training, some 40 ms each once in a process, if they are not loaded yet.

    Args:
        types: of ids and row numbers, the least that hold them.
        is_cached: whether rows are gathered from a whole partition, and not put into windows.
        has_lists: whether there are columns of lists.
    """
    index, short = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32)
    starts, short_starts = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int32)
    number = np.dtype(np.float32)
    for kind in {*types, number}:
        out = np.zeros(1, dtype=kind)
        decoded, waiting = out.astype(number if kind == number else np.int64), out.copy()
        if is_cached:
            _take(waiting, index, out.dtype.type(0), out)
        else:
            for values in (decoded, waiting):
                take_values(values, short, out)
                put_values(values, short, index, out)
        if has_lists and kind != number and is_cached:
            take_lists(waiting, starts, index, out, starts.copy(), 0)
        elif has_lists and kind != number:
            take_lists(decoded, starts, short, out, short_starts.copy(), 0)
            take_lists(waiting, short_starts, short, out, short_starts.copy(), 0)


def _gather_ragged(name: str, column: Ragged, index: IntArray, buffers: Buffers) -> Ragged:
    size = int((column.offsets[index + 1] - column.offsets[index]).sum(where=index >= 0))
    offsets = buffers.array(f"{name}/offsets", len(index) + 1, np.int64)
    values = buffers.array(name, size, column.values.dtype)
    take_lists(column.values, column.offsets, index, values, offsets, 0)
    weights = None
    if column.weights is not None:
        weights = buffers.array(f"{name}/weights", size, np.float32)
        take_lists(column.weights, column.offsets, index, weights, offsets, 0)
    return Ragged(values, offsets, weights)


@compiled
def take_lists(values: Array, starts: Array, index: Array, out: Array, offsets: Array, first: int) -> None:
    """Copies lists in the order of an index.

    Args:
        values: of the lists, (V,) or more.
        starts: where each begins, and where the last ends, (n + 1,).
        index: of the list in each place, (m,); -1 where none is.
        out: (first + V,) or more, for the lists one after another; of a type that holds all values. Behind the last one it
            may hold anything afterwards.
        offsets: of the places in `out`, (m + 1,).
        first: where in `out` the first one begins.
    """
    end, values_end, out_end = first, len(values) - 4, len(out) - 4
    for place in range(len(index)):
        offsets[place] = end
        row = index[place]
        if row < 0:
            continue
        begin, done = starts[row], 0
        length = starts[row + 1] - begin
        if begin <= values_end and end <= out_end:  # four at once, however few they are: what is too much is written over
            for i in range(4):
                out[end + i] = values[begin + i]
            done = 4
        for i in range(done, length):
            out[end + i] = values[begin + i]
        end += length
    offsets[len(index)] = end


def offsets_of(lengths: IntArray) -> IntArray:
    """Returns where each list begins among the values of all, and where the last ends, (n + 1,) int64."""
    offsets = np.empty(len(lengths) + 1, dtype=np.int64)
    _sum_up(lengths, offsets)
    return offsets


@compiled
def _sum_up(lengths: Any, offsets: Any) -> None:
    """Fills in 0 and the running sums; numpy's `cumsum` takes eight times as long."""
    end = 0
    for row in range(len(lengths)):
        offsets[row] = end
        end += lengths[row]
    offsets[len(lengths)] = end


def repeated(values: npt.NDArray[np.float32], lengths: Array, total: int) -> npt.NDArray[np.float32]:
    """Returns each value so often as its length says, (total,); numpy's `repeat` takes four times as long."""
    out = np.empty(total, dtype=np.float32)
    _repeat(values, lengths, out)
    return out


@compiled
def _repeat(values: Array, lengths: Array, out: Array) -> None:
    place, most = 0, len(out) - 4
    for row in range(len(lengths)):
        value, length, done = values[row], lengths[row], 0
        if place <= most:  # four at once, however few they are, as in `take_lists`
            for i in range(4):
                out[place + i] = value
            done = 4
        for i in range(done, length):
            out[place + i] = value
        place += length
