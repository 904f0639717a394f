"""Gives a managed table another number of rows, in a run's checkpoints: ids keep what they have learnt.

Each id goes on in its bucket. Where that has fewer rows now, its least useful ids lose theirs; where it has more, they are
free and begin as `init` says. What is written replaces a checkpoint in one stroke, as a later attempt's save does.
"""

from __future__ import annotations

__all__ = ["Resized", "resize_checkpoint"]

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import TableSpec
from embedshard.config.parts import ManagedVocabulary
from embedshard.errors import CheckpointError
from embedshard.sharding.initialise import scattered_rows
from embedshard.sharding.managed import ManagedRows
from embedshard.sharding.slots import FREE, sketch_width
from embedshard.train.checkpoint import Checkpoint, Checkpointer, Piece

IntArray = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Resized:
    """What became of one checkpoint.

    Attributes:
        step: of it.
        rows_before: that ids could hold.
        rows: that they can hold now.
        kept: ids that hold a row as before.
        lost: ids that hold none any more.
    """

    step: int
    rows_before: int
    rows: int
    kept: int
    lost: int


def resize_checkpoint(
    checkpoint: Checkpoint,
    checkpointer: Checkpointer,
    vocabulary: ManagedVocabulary,
    specs: dict[str, TableSpec],
    table: str,
    buckets: int,
    seed: int,
) -> Resized:
    """Writes a checkpoint anew with a table's rows as its spec has them. Holds one of its tables in memory.

    Args:
        checkpoint: as it is.
        checkpointer: of an attempt that replaces all former ones, alone in its world.
        vocabulary: the table's.
        specs: of the tables whose rows it manages, by name, with their new rows.
        table: the config's table.
        buckets: of it.
        seed: the run's, of first values.

    Raises:
        CheckpointError: if it is damaged, or is no checkpoint of this table.
    """
    name = f"vocabularies/{table}/ids"
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder.uri} holds no managed vocabulary of table '{table}'.")
    old_rows, rows = checkpoint.tensors[name].shape[0], specs[table].rows
    old, new = (ManagedRows(vocabulary, size, buckets, 0, buckets).slots for size in (old_rows, rows))
    for kind in ("ids", "counts", "last_steps"):
        getattr(old, kind)[:] = checkpoint.read(f"vocabularies/{table}/{kind}").numpy()
    sightings = checkpoint.read(f"vocabularies/{table}/sightings").numpy()
    if len(sightings) != buckets:
        raise CheckpointError(
            f"{checkpoint.folder.uri}: table '{table}' has {len(sightings)} buckets there and {buckets} in the config. Use "
            f"the config that it was trained with."
        )
    old.load()
    moved_from, moved_to = new.take_over(old, checkpoint.step)
    new.sightings[:] = _refolded(sightings, sketch_width(rows, buckets))
    new.sighted[:] = checkpoint.read(f"vocabularies/{table}/sighted").numpy()

    def pieces() -> Iterator[Piece]:
        for tensor, spec in checkpoint.tensors.items():
            prefix, owner, *_ = [*tensor.split("/"), ""]
            if prefix == "vocabularies" and owner == table:
                continue
            if prefix == "tables" and owner in specs and spec.shape[:1] == (old_rows + 1,):
                yield from _moved(checkpoint.read(tensor), tensor, specs[owner], moved_from, moved_to, seed)
                continue
            for offset, block in checkpoint.blocks(tensor):
                yield Piece(tensor, block, offset, spec.shape)
        for kind in ("ids", "counts", "last_steps", "sightings", "sighted"):
            state = torch.from_numpy(getattr(new, kind))
            yield Piece(f"vocabularies/{table}/{kind}", state, (0,) * state.dim(), tuple(state.shape))

    checkpointer.save(checkpoint.step, pieces, checkpoint.state)
    used = int((old.ids != FREE).sum())
    return Resized(checkpoint.step, old_rows, rows, len(moved_to), used - len(moved_to))


def _moved(
    old: torch.Tensor, name: str, spec: TableSpec, moved_from: IntArray, moved_to: IntArray, seed: int
) -> Iterator[Piece]:
    """Yields a table's weights or state with its rows in their new places, a block at a time."""
    shape = (spec.rows + 1, *old.shape[1:])
    is_weight = name.endswith("/weight")
    for first in range(0, shape[0], _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, shape[0])
        block = torch.zeros((last - first, *old.shape[1:]), dtype=old.dtype)
        if is_weight:
            block.copy_(torch.from_numpy(scattered_rows(seed, spec, np.arange(first, last))))
        here = (moved_to >= first) & (moved_to < last)
        block[torch.from_numpy(moved_to[here] - first)] = old[torch.from_numpy(moved_from[here])]
        if last == shape[0]:
            block[-1] = old[-1]  # the row for unknown ids
        yield Piece(name, block, (first, *(0,) * (old.dim() - 1)), shape)


def _refolded(sightings: npt.NDArray[np.int16], width: int) -> npt.NDArray[np.int16]:
    """Returns sketches with another number of counters, a power of two, which still count no id too few times."""
    buckets, depth, old_width = sightings.shape
    if width >= old_width:
        return np.tile(sightings, (1, 1, width // old_width))
    folded = sightings.reshape(buckets, depth, old_width // width, width).astype(np.int64).sum(axis=2)
    return np.minimum(folded, np.iinfo(np.int16).max).astype(np.int16)
