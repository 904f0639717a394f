"""Reads an export's Parquet files again, a row group at a time: vectors of given rows, or all, and what users have met.

Shapes: Q given rows, N rows of a file, D dim.
"""

from __future__ import annotations

__all__ = ["ids_at", "matrix", "rows_of", "seen_by", "spread_rows", "spread_vectors", "vector_blocks", "vectors_of"]

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.errors import ExportError
from embedshard.evaluate.jagged import JaggedIds
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 2**18


def vector_blocks(place: Location) -> Iterator[FloatArray]:
    """Yields all vectors, (n, D) at a time, in order."""
    with place.open_input() as file:
        parquet = _opened(place, file)
        for group in range(parquet.num_row_groups):
            yield matrix(parquet.read_row_group(group, columns=["vector"])["vector"])


def rows_of(place: Location) -> IntArray:
    """Returns the row of each vector, (N,), in order."""
    with place.open_input() as file:
        return _opened(place, file).read(columns=["row"])["row"].to_numpy()


def vectors_of(
    place: Location,
    rows: IntArray,
    decoded: Callable[[pa.Table], FloatArray] = lambda content: matrix(content["vector"]),
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Returns the vectors of given rows, (Q, D), zeros where there is none, and whether there is one, (Q,).

    Vectors are read of the row groups alone in which one is wanted.

    Args:
        place: of the file.
        rows: wanted.
        decoded: returns the vectors of a row group, (n, D).
    """
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    found = np.zeros(len(rows), dtype=np.bool_)
    vectors: FloatArray | None = None
    with place.open_input() as file:
        parquet = _opened(place, file)
        numbers = [name for name in parquet.schema_arrow.names if name in ("vector", "scale", "bias")]
        for group in range(parquet.num_row_groups):
            if not _may_hold(parquet, group, ascending):
                continue
            here = parquet.read_row_group(group, columns=["row"])["row"].to_numpy()
            begins, ends = (np.searchsorted(ascending, here, side=side) for side in ("left", "right"))
            counts = ends - begins
            if not counts.any():
                continue
            block = decoded(parquet.read_row_group(group, columns=numbers))
            if vectors is None:
                vectors = np.zeros((len(rows), block.shape[1]), dtype=np.float32)
            for at in np.flatnonzero(counts).tolist():
                wanted = order[begins[at] : ends[at]]
                vectors[wanted], found[wanted] = block[at], True
    return np.zeros((len(rows), 0), dtype=np.float32) if vectors is None else vectors, found


def _may_hold(parquet: pq.ParquetFile, group: int, ascending: IntArray) -> bool:
    """Whether one of these rows can be in a row group, as far as its statistics tell."""
    column = parquet.metadata.row_group(group).column(parquet.schema_arrow.get_field_index("row"))
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max:
        return True
    first = np.searchsorted(ascending, statistics.min, side="left")
    last = np.searchsorted(ascending, statistics.max, side="right")
    return bool(last > first)


def spread_vectors(place: Location, wanted: int) -> FloatArray:
    """Returns about so many vectors at even distances, (n, D); those alone are in memory, and a row group."""
    taken = [matrix(content) for content in _spread(place, "vector", wanted)]
    return np.concatenate(taken) if taken else np.zeros((0, 0), dtype=np.float32)


def spread_rows(place: Location, wanted: int) -> IntArray:
    """Returns the rows of about so many vectors at even distances, (n,)."""
    taken = [content.to_numpy() for content in _spread(place, "row", wanted)]
    return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)


def _spread(place: Location, column: str, wanted: int) -> Iterator[pa.ChunkedArray]:
    """Yields about so many values of a column at even distances, those of a row group at a time."""
    with place.open_input() as file:
        parquet = _opened(place, file)
        count = parquet.metadata.num_rows
        places = np.unique(np.linspace(0, max(0, count - 1), min(wanted, count)).astype(np.int64))
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            here = places[(places >= first) & (places < first + rows)] - first
            if len(here):
                yield parquet.read_row_group(group, columns=[column])[column].take(pa.array(here))
            first += rows


def ids_at(place: Location, places: IntArray) -> tuple[list[int | str | None], IntArray]:
    """Returns the ids and the rows that stand at given places of a file, (Q,)."""
    with place.open_input() as file:
        content = _opened(place, file).read(columns=["id", "row"])
    taken = content.take(pa.array(places))
    return taken["id"].to_pylist(), taken["row"].to_numpy()


def seen_by(place: Location, users: IntArray, item_rows: IntArray) -> JaggedIds:
    """Returns the places of the items that users have met, ascending, (Q) lists; an item without a place is left out.

    Args:
        place: of the pairs.
        users: rows, each once.
        item_rows: the row of the item at each place.
    """
    user_order, item_order = np.argsort(users), np.argsort(item_rows)
    queries, items = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    with place.open_input() as file:
        for batch in _opened(place, file).iter_batches(batch_size=_ROWS_AT_ONCE):
            query, is_asked = _places(users, user_order, batch["user"].to_numpy())
            item, is_there = _places(item_rows, item_order, batch["item"].to_numpy())
            kept = is_asked & is_there
            queries.append(query[kept])
            items.append(item[kept])
    return JaggedIds.from_pairs(np.concatenate(queries), np.concatenate(items), len(users))


def _places(values: IntArray, order: IntArray, wanted: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Returns where wanted values stand among others, and whether they do."""
    if not len(values):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
    place = order[np.minimum(np.searchsorted(values, wanted, sorter=order), len(values) - 1)]
    return place, values[place] == wanted


def matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns a column of lists of one length as a matrix, (n, D)."""
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in column.chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)


def _opened(place: Location, file: pa.NativeFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ExportError(f"{place.uri} is no Parquet file: {error}. Export the run again.") from error
