"""Vectors to Parquet, a block of rows at a time, never a table at once."""

from __future__ import annotations

__all__ = ["RowsAlone", "Write", "all_vectors", "id_array", "id_type", "unit_vectors", "vector_file"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedshard.data.vocabulary import HeldIds
from embedshard.storage import Location
from embedshard.train.checkpoint_reader import Checkpoint

IntArray = npt.NDArray[np.int64]
Write = Callable[[pa.Array, IntArray, npt.NDArray[np.float32]], int]
"""Writes a block: its ids, rows and vectors, (n, D); returns n."""

_ROWS_AT_ONCE = 2**16


class Ids(Protocol):
    """The ids of rows 0 to `rows` - 1."""

    rows: int

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row; None where no one id has it."""
        ...


class RowsAlone:
    """The rows of a table that are no ids': nodes of a tree, or what two hashes share."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns None of each."""
        return [None] * len(rows)


def id_type(vocabulary: Ids) -> pa.DataType:
    """Returns the type of a vocabulary's ids: string or int64, also where it keeps none."""
    first = vocabulary.ids_of(np.zeros(min(1, vocabulary.rows), dtype=np.int64))
    return pa.string() if first and isinstance(first[0], str) else pa.int64()


def id_array(vocabulary: Ids, rows: IntArray, kind: pa.DataType) -> pa.Array:
    """Returns the ids of rows; null where no one id has it, and of the row for unknown ids, which is the last."""
    known = np.flatnonzero(rows < vocabulary.rows)
    ids: list[int | str | None] = [None] * len(rows)
    for place, id_ in zip(known.tolist(), vocabulary.ids_of(rows[known]), strict=True):
        ids[place] = id_
    try:
        return pa.array(ids, kind)
    except (OverflowError, pa.ArrowInvalid):
        return pa.array(ids, pa.uint64())


def all_vectors(
    checkpoint: Checkpoint, name: str, vocabulary: Ids, *, with_unknown: bool = False
) -> Iterator[tuple[pa.Array, IntArray, npt.NDArray[np.float32]]]:
    """Yields ids, rows and vectors of all ids of a table, by row. A file of the checkpoint is held at a time.

    Args:
        checkpoint: where it is.
        name: of the tensor.
        vocabulary: whose ids the rows are; rows that hold no id now are left out.
        with_unknown: whether the row for unknown ids comes last, with a null for its id.

    Raises:
        CheckpointError: if there is no such tensor, or a file is damaged.
    """
    kind = id_type(vocabulary)
    end = vocabulary.rows + with_unknown
    for first, block in checkpoint.row_blocks(name, lambda first, last: first < end):
        last = min(first + len(block), end)
        for start in range(first, last, _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, last), dtype=np.int64)
            if isinstance(vocabulary, HeldIds):
                is_unknown = rows >= vocabulary.rows
                rows = rows[is_unknown | vocabulary.is_held[np.minimum(rows, vocabulary.rows - 1)]]
            if len(rows):
                yield id_array(vocabulary, rows, kind), rows, block[torch.from_numpy(rows - first)].float().numpy()


def unit_vectors(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns vectors, (n, D), by their lengths; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)


@contextmanager
def vector_file(place: Location) -> Iterator[Write]:
    """Opens a Parquet file that is there when all is written: yields what writes a block and returns how many it is.

    Its columns are `id`, `row` and `vector`, a list of float32 of one length. Each block is a row group.
    """
    target = place.parent.join(f".{place.name}.part") if place.is_local else place
    writer: list[pq.ParquetWriter] = []

    def write(ids: pa.Array, rows: IntArray, vectors: npt.NDArray[Any]) -> int:
        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        of_rows = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        content = pa.table({"id": ids, "row": pa.array(rows), "vector": of_rows})
        if not writer:
            writer.append(pq.ParquetWriter(stream, content.schema))
        writer[0].write_table(content)
        return len(rows)

    place.parent.make_dirs()
    try:
        with target.filesystem.open_output_stream(target.path) as stream:
            yield write
            if writer:
                writer[0].close()
        if target is not place:
            target.filesystem.move(target.path, place.path)
    except BaseException:
        target.delete_file()
        raise
