"""What changed between two Parquet files of rows, and the later file again, byte for byte, from the earlier and the changes.

Both files are read forward, some thousand rows at a time; of each a row group is in memory. A row is known by its number
(`row`). Where the numbers of a file ascend, as those of tables do, nothing else is kept; where they do not, some integers a
row are, and rows that stand in another order than before are written as if they were new.

Shapes: n rows of a block, D dim.
"""

from __future__ import annotations

__all__ = ["RowCounts", "rebuild_rows", "write_row_changes"]

import base64
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.errors import ExportError
from embedshard.export.delta_places import NONE, IntArray, blocks, find_places, int_blocks, integers
from embedshard.storage import Location

BoolArray = npt.NDArray[np.bool_]

_ROWS_AT_ONCE: Final = 2**14
_ROW, _PLACE, _BASE = "row", "place", "base"


@dataclass(frozen=True)
class RowCounts:
    """How two files differ.

    Attributes:
        changed: rows that both have, of which anything is another.
        added: rows that the later one alone has, or has in another order.
        removed: rows that the earlier one alone has, or had in another order.
        kept: rows that are the same, bit for bit.
        row_groups: rows of each row group of the later file.
    """

    changed: int
    added: int
    removed: int
    kept: int
    row_groups: list[int]


def write_row_changes(base: Location, target: Location, rows: Location, removed: Location) -> RowCounts | None:
    """Writes what makes one file of the other.

    Args:
        base: the earlier file.
        target: the later one.
        rows: is written: of each row that is not as it was its `place` in the later file, its place in the earlier (`base`;
            null where it was not there), and the columns of the later file.
        removed: is written where rows went: of each its place in the earlier file (`base`), and its columns but vectors.

    Returns:
        How many they are. None where the files are no rows that can be compared, or not of one schema: nothing is written.
    """
    with ExitStack() as stack:
        old, new = _parquet(stack, base), _parquet(stack, target)
        if old is None or new is None:
            return None
        schema = _schema_of(new)
        if not _has_rows(schema) or not old.schema_arrow.equals(new.schema_arrow) or not schema.equals(_schema_of(old)):
            return None
        find = find_places(stack, base, target)
        added_to = pa.schema([pa.field(_PLACE, pa.int64()), pa.field(_BASE, pa.int64()), *schema], schema.metadata)
        goes = pa.schema([pa.field(_BASE, pa.int64()), *(one for one in schema if not pa.types.is_nested(one.type))])
        fresh = stack.enter_context(_Writer(rows, added_to, is_always_there=True))
        gone = stack.enter_context(_Writer(removed, goes))
        earlier = _Earlier(blocks(old, _ROWS_AT_ONCE), gone)
        place = changed = kept = 0
        for batch in blocks(new, _ROWS_AT_ONCE):
            later = pa.Table.from_batches([batch])
            at = find(integers(later[_ROW]))
            is_met = at >= 0
            is_same = np.zeros(len(at), dtype=np.bool_)
            if is_met.any():
                is_same[is_met] = _same(earlier.take(at[is_met]), later.filter(pa.array(is_met)))
            others = np.flatnonzero(~is_same)
            columns = [pa.array(others + place), pa.array(at[others], mask=at[others] < 0)]
            fresh.write(pa.Table.from_arrays([*columns, *later.take(pa.array(others)).columns], schema=added_to))
            changed += int((is_met & ~is_same).sum())
            kept += int(is_same.sum())
            place += len(at)
        earlier.finish()
        groups = [new.metadata.row_group(group).num_rows for group in range(new.num_row_groups)]
    return RowCounts(changed, place - kept - changed, gone.written, kept, groups)


def rebuild_rows(base: Location, rows: Location, removed: Location | None, row_groups: list[int], sink: Any) -> None:
    """Writes the later file, as `write_row_changes` met it.

    Args:
        base: the earlier file.
        rows: of `write_row_changes`.
        removed: of `write_row_changes`; None where no row went.
        row_groups: rows of each.
        sink: a file that is open to write.

    Raises:
        ExportError: if they do not fit each other.
    """
    with ExitStack() as stack:
        changes, earlier = _parquet(stack, rows), _parquet(stack, base)
        if changes is None or earlier is None:
            raise ExportError(f"{(rows if changes is None else base).uri} is no Parquet file. Write the delta again.")
        written = _schema_of(changes)
        schema = pa.schema([field for field in written if field.name not in (_PLACE, _BASE)], written.metadata)
        dropped = [_Ascending(int_blocks(stack, rows, _BASE))]
        if removed is not None:
            dropped.append(_Ascending(int_blocks(stack, removed, _BASE)))
        batches = blocks(changes, _ROWS_AT_ONCE)
        kept = _Queue(_without(blocks(earlier, _ROWS_AT_ONCE), dropped), schema)
        fresh = _Queue((pa.Table.from_batches([batch]).select(schema.names) for batch in batches), schema)
        places, first = _Ascending(int_blocks(stack, rows, _PLACE)), 0
        with pq.ParquetWriter(sink, schema) as writer:
            for count in row_groups:
                at = places.below(first + count) - first
                taken = fresh.take(len(at)), kept.take(count - len(at))
                if (len(at) and at[0] < 0) or sum(map(len, taken)) != count:
                    raise _unfit(rows, base)
                writer.write_table(_woven(*taken, at), row_group_size=max(1, count))
                first += count
        if len(places.below(np.iinfo(np.int64).max)) or len(kept.take(1)) or len(fresh.take(1)):
            raise _unfit(rows, base)


# ------------------------------------------------------------------------------------------------------ what is one row
def _has_rows(schema: pa.Schema) -> bool:
    """Returns whether a file has numbered rows of columns that are compared here."""
    if _ROW not in schema.names or schema.field(_ROW).type != pa.int64() or {_PLACE, _BASE} & set(schema.names):
        return False
    is_plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
    return len(set(schema.names)) == len(schema.names) and all(
        any(check(_number_type(field.type)) for check in is_plain) for field in schema
    )


def _number_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_fixed_size_list(kind) else kind


def _same(old: pa.Table, new: pa.Table) -> BoolArray:
    """Returns which rows of two tables are the same bit for bit, (n,)."""
    same = np.ones(len(new), dtype=np.bool_)
    for before, after in zip(old.columns, new.columns, strict=True):
        one, other = (column.combine_chunks() for column in (before, after))
        if pa.types.is_fixed_size_list(after.type):
            if one.null_count or other.null_count or one.flatten().null_count or other.flatten().null_count:
                return np.zeros(len(new), dtype=np.bool_)  # no vectors of ours: all are told, which is never wrong
            numbers = [_bits(column.flatten()).reshape(len(new), -1) for column in (one, other)]
            same &= (numbers[0] == numbers[1]).all(axis=1)
        elif pa.types.is_floating(after.type) and not one.null_count and not other.null_count:
            same &= _bits(one) == _bits(other)
        else:
            equal = pc.or_(pc.fill_null(pc.equal(one, other), False), pc.and_(one.is_null(), other.is_null()))
            same &= equal.to_numpy(zero_copy_only=False)
    return same


def _bits(column: pa.Array) -> npt.NDArray[Any]:
    numbers = column.to_numpy(zero_copy_only=False)
    return numbers.view(f"u{numbers.dtype.itemsize}")


# ------------------------------------------------------------------------------------------------------------- reading
class _Earlier:
    """The earlier file, read forward once: gives rows at ascending places, and tells of those that nobody asked for."""

    def __init__(self, blocks: Iterator[pa.RecordBatch], gone: _Writer) -> None:
        self._blocks, self._gone = blocks, gone
        self._first, self._is_met = 0, np.zeros(0, dtype=np.bool_)
        self._block: pa.RecordBatch | None = None
        self._go_on()

    def take(self, places: IntArray) -> pa.Table:
        """Returns the rows at places that ascend, and are beyond those of the calls before."""
        parts: list[pa.RecordBatch] = []
        while len(places):
            assert self._block is not None, "the places are of this file"
            here = places[: np.searchsorted(places, self._first + len(self._block))] - self._first
            if len(here):
                self._is_met[here] = True
                is_span = here[-1] - here[0] + 1 == len(here)
                part = self._block.slice(here[0], len(here)) if is_span else self._block.take(pa.array(here))
                parts.append(part)
            places = places[len(here) :]
            if len(places):
                self._go_on()
        return pa.Table.from_batches(parts)

    def finish(self) -> None:
        """Reads the rest."""
        while self._block is not None:
            self._go_on()

    def _go_on(self) -> None:
        if self._block is not None:
            left = np.flatnonzero(~self._is_met)
            if len(left):
                columns = [self._block[name].take(pa.array(left)) for name in self._gone.schema.names[1:]]
                self._gone.write(pa.Table.from_arrays([pa.array(left + self._first), *columns], schema=self._gone.schema))
            self._first += len(self._block)
        self._block = next(self._blocks, None)
        self._is_met = np.zeros(0 if self._block is None else len(self._block), dtype=np.bool_)


class _Ascending:
    """Numbers that ascend, read as far as is asked for."""

    def __init__(self, blocks: Iterator[IntArray]) -> None:
        self._blocks, self._block = blocks, NONE

    def below(self, end: int) -> IntArray:
        """Returns those that were not returned before and are less than a number."""
        parts = [NONE]
        while True:
            here = self._block[: np.searchsorted(self._block, end)]
            parts.append(here)
            self._block = self._block[len(here) :]
            following = None if len(self._block) else next(self._blocks, None)
            if following is None:
                return np.concatenate(parts)
            self._block = following


class _Queue:
    """Rows in order, of which the next are taken."""

    def __init__(self, blocks: Iterator[pa.Table], schema: pa.Schema) -> None:
        self._blocks, self._left = blocks, schema.empty_table()

    def take(self, count: int) -> pa.Table:
        """Returns the next rows; fewer where there are no more."""
        parts, missing = [], count
        while True:
            parts.append(self._left.slice(0, missing))
            self._left = self._left.slice(len(parts[-1]))
            missing -= len(parts[-1])
            following = next(self._blocks, None) if missing else None
            if following is None:
                return pa.concat_tables(parts)
            self._left = following


def _without(blocks: Iterator[pa.RecordBatch], dropped: list[_Ascending]) -> Iterator[pa.Table]:
    """Yields the rows that are not dropped."""
    first = 0
    for block in blocks:
        is_kept = np.ones(len(block), dtype=np.bool_)
        for places in dropped:
            is_kept[places.below(first + len(block)) - first] = False
        first += len(block)
        yield pa.Table.from_batches([block]).filter(pa.array(is_kept))


def _woven(fresh: pa.Table, kept: pa.Table, at: IntArray) -> pa.Table:
    """Returns the rows of both, the fresh ones at given places, each column in one piece, as it was written."""
    order = np.zeros(len(fresh) + len(kept), dtype=np.int64)
    is_fresh = np.zeros(len(order), dtype=np.bool_)
    is_fresh[at] = True
    order[is_fresh], order[~is_fresh] = np.arange(len(fresh)), len(fresh) + np.arange(len(kept))
    both = pa.concat_tables([fresh, kept]).combine_chunks()
    return both.take(pa.array(order)) if len(fresh) and len(kept) else both


class _Writer(AbstractContextManager["_Writer"]):
    """A Parquet file of rows, written as they are enough for a row group; there where rows were, or always."""

    def __init__(self, place: Location, schema: pa.Schema, is_always_there: bool = False) -> None:
        self.schema, self.written = schema, 0
        self._place, self._is_always_there = place, is_always_there
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pa.Table) -> None:
        """Writes rows."""
        if len(rows):
            self._waiting.append(rows)
            self._num_waiting += len(rows)
            self.written += len(rows)
        if self._num_waiting >= _ROWS_AT_ONCE:
            self._flush()

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None and (self._num_waiting or self._is_always_there):
            self._flush()
        self._stack.close()

    def _flush(self) -> None:
        if self._writer is None:
            self._place.parent.make_dirs()
            stream = self._stack.enter_context(self._place.filesystem.open_output_stream(self._place.path))
            packed = {field.name: "DELTA_BINARY_PACKED" for field in self.schema if field.type == pa.int64()}
            writer = pq.ParquetWriter(stream, self.schema, use_dictionary=False, column_encoding=packed)
            self._writer = self._stack.enter_context(writer)
        self._writer.write_table(pa.concat_tables([self.schema.empty_table(), *self._waiting]).combine_chunks())
        self._waiting, self._num_waiting = [], 0


def _parquet(stack: ExitStack, place: Location) -> pq.ParquetFile | None:
    try:
        return pq.ParquetFile(stack.enter_context(place.open_input()))
    except pa.ArrowException:
        return None


def _schema_of(parquet: pq.ParquetFile) -> pa.Schema:
    """Returns the schema that a file was written with: reading gives the numbers of a list another name."""
    kept = (parquet.metadata.metadata or {}).get(b"ARROW:schema")
    return parquet.schema_arrow if kept is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(kept)))


def _unfit(rows: Location, base: Location) -> ExportError:
    return ExportError(f"{rows.uri} is of another file than {base.uri}. Apply the delta to the export that it was made of.")
