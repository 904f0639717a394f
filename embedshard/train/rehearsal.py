"""A rehearsal: some steps of a config, and what came of them as plain arrays, for comparison with another plan or world.

It takes the steps of the loop, with the loop's parts, and leaves out what the loop does beside: no run's folder, no
evaluation, no report.
"""

from __future__ import annotations

__all__ = ["Block", "Noted", "Rehearsal", "merge", "rehearse"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.config import Config
from embedshard.data.batch import Batch
from embedshard.data.dataset import Dataset
from embedshard.storage import locate
from embedshard.train.assembly import Assembly, assemble
from embedshard.train.checkpoint import Checkpointer, Piece, open_step
from embedshard.train.snapshot import pieces, restore
from embedshard.train.warm_start import warm_start
from embedshard.world import World

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rehearsal:
    """Which steps to take.

    Attributes:
        config: what is trained.
        last: steps done at the end, or fewer where the run has fewer.
        resume_from: a folder of checkpoints and the step to begin after; None begins anew.
        save_to: a folder of checkpoints for the state at the end.
        rows: by table, the rows that are noted; None notes all of them.
        notes_state: whether the optimizers' state is noted too.
    """

    config: Config
    last: int
    resume_from: tuple[str, int] | None = None
    save_to: str | None = None
    rows: Mapping[str, Array] | None = None
    notes_state: bool = False


@dataclass
class Noted:
    """What a rank noted.

    Attributes:
        losses: of each step.
        before: blocks before the first step.
        after: blocks after the last.
        touched: by table, which rows this rank's batches looked up.
    """

    losses: list[float] = field(default_factory=list)
    before: list[Block] = field(default_factory=list)
    after: list[Block] = field(default_factory=list)
    touched: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A part of a tensor.

    Attributes:
        name: as in a checkpoint, such as `tables/item/weight`.
        rows: the places of its rows among those that are noted; None for a tensor that is noted whole.
        column: where its columns begin.
        shape: of all that is noted.
        values: a row each.
    """

    name: str
    rows: Array | None
    column: int
    shape: tuple[int, ...]
    values: Array


def rehearse(wanted: Rehearsal, world: World, dataset: Dataset | None = None) -> tuple[Noted, Dataset]:
    """Takes the steps. Collective.

    Args:
        wanted: which.
        world: the processes that take them.
        dataset: that of an earlier rehearsal of the same data, so that it need not be read again.

    Returns:
        What this rank noted, and the data set.

    Raises:
        EmbedshardError: what a user can act on.
    """
    parts = assemble(wanted.config, world, dataset=dataset, initialises=wanted.resume_from is None)
    first = 0
    if wanted.resume_from is not None:
        folder, first = wanted.resume_from
        restore(open_step(locate(folder), first), parts.model, parts.optimizers, parts.objective, parts.managed)
    else:
        warm_start(wanted.config, parts.dataset.vocabularies, parts.model, world)
    noted = Noted(before=list(_blocks(parts, wanted)))
    last = min(wanted.last, parts.num_steps)
    touched: dict[str, list[Array]] = {}
    with parts.reader().batches(first, last) as batches:
        for step, (batch, upcoming) in zip(range(first, last), pairwise(chain(batches, [None])), strict=True):
            assert batch is not None, "the reader has a batch for each step"
            parts.optimizers.set_learning_rates(step, parts.num_steps)
            noted.losses.append(parts.stepper.take(batch, stop_asked=False, upcoming=upcoming).loss)
            for table, ids in _looked_up(parts, batch):
                touched.setdefault(table, []).append(ids)
    noted.touched = {table: np.unique(np.concatenate(ids)) for table, ids in touched.items()}
    noted.after = list(_blocks(parts, wanted))
    if wanted.save_to is not None:
        with Checkpointer(locate(wanted.save_to), world.rank, world.world_size, attempt="1", mode="blocking") as saver:
            saver.save(last, lambda: pieces(parts.model, parts.optimizers, parts.objective, world, parts.managed), {})
    return noted, parts.dataset


def merge(ranks: Sequence[Iterable[Block]]) -> dict[str, Array]:
    """Returns whole arrays by name from all ranks' blocks.

    A table that is replicated is there once for each rank: all must be equal, bit for bit.

    Raises:
        ValueError: naming what is there twice with different values, or is not there completely.
    """
    wholes: dict[str, Array] = {}
    filled: dict[str, Array] = {}
    for rank, blocks in enumerate(ranks):
        for block in blocks:
            whole = wholes.setdefault(block.name, np.zeros(block.shape, block.values.dtype))
            there = filled.setdefault(block.name, np.zeros(block.shape, bool))
            place: Any = ... if block.rows is None else block.rows
            if block.rows is not None and whole.ndim > 1:
                columns = np.arange(block.column, block.column + block.values.shape[1])
                place = np.ix_(block.rows, columns)
            known = there[place]
            if not np.array_equal(whole[place][known], block.values[known]):
                raise ValueError(
                    f"'{block.name}' is replicated, and rank {rank} holds other values than the ranks before it"
                )
            whole[place], there[place] = block.values, True
    for name, there in filled.items():
        if not there.all():
            raise ValueError(f"'{name}': {np.size(there) - int(there.sum()):,} elements are on no rank")
    return wholes


def _blocks(parts: Assembly, wanted: Rehearsal) -> Iterator[Block]:
    for piece in pieces(parts.model, parts.optimizers, parts.objective, parts.world, parts.managed):
        kind, _, rest = piece.name.partition("/")
        is_weight = kind == "dense" or (kind == "tables" and rest.endswith("/weight"))
        if is_weight or (wanted.notes_state and not (kind == "vocabularies" and piece.tensor.dim() > 1)):
            yield _block(piece, wanted.rows)


def _block(piece: Piece, rows: Mapping[str, Array] | None) -> Block:
    values = piece.tensor.detach().cpu().numpy()
    if piece.name.startswith("vocabularies/"):
        return Block(piece.name, np.arange(len(values)) + piece.offset[0], 0, piece.shape, values.copy())
    if not piece.name.startswith("tables/"):
        return Block(piece.name, None, 0, piece.shape, values.copy())
    chosen = None if rows is None else rows[piece.name.split("/")[1]]
    first, last = piece.offset[0], piece.offset[0] + len(values)
    places = np.arange(first, last) if chosen is None else np.flatnonzero((chosen >= first) & (chosen < last))
    picked = values.copy() if chosen is None else values[chosen[places] - first]
    column = piece.offset[1] if len(piece.offset) > 1 else 0
    return Block(piece.name, places, column, (piece.shape[0] if chosen is None else len(chosen), *piece.shape[1:]), picked)


def _looked_up(parts: Assembly, batch: Batch) -> Iterator[tuple[str, Array]]:
    if parts.managed is not None:
        batch = parts.managed.to_rows(batch, is_training=False)
    for spec in parts.specs:
        ids = batch.sequences if spec.is_sequence else batch.weighted if spec.weighted else batch.sparse
        assert ids is not None, "the collator fills what tables are looked up by"
        for lookup in spec.lookups:
            yield spec.name, ids[lookup.key].values().cpu().numpy()
