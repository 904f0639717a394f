"""A run's state as named pieces: what a checkpoint holds, and how it comes back.

Names belong to no world size: `tables/<table>/<weight or state>`, `tables/<table>/step` (under Adam), `dense/<parameter>`,
`dense_optimizer/<parameter>/<state>`, `objective/<buffer>`, `vocabularies/<table>/<state>` (of managed ones). Tables are
live views of this rank's shards; of a table that is replicated each rank writes some rows. Of a managed vocabulary each
writes its buckets. The rest is replicated, and rank 0 writes it.
"""

from __future__ import annotations

__all__ = ["pieces", "restore", "restore_model", "table_shards"]

from collections.abc import Iterator

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embedshard.errors import CheckpointError
from embedshard.models.objectives.objective import Objective
from embedshard.sharding.lazy_adam import lazy_adam_shards
from embedshard.sharding.managed import ManagedTables
from embedshard.sharding.optimizers import Optimizers
from embedshard.sharding.shards import Shard, optimizer_shards, replicated_tables, weight_shards
from embedshard.train.checkpoint import Checkpoint, Piece
from embedshard.world import World, release_freed_memory


def pieces(
    model: DistributedModelParallel,
    optimizers: Optimizers,
    objective: Objective,
    world: World,
    managed: ManagedTables | None = None,
) -> Iterator[Piece]:
    """Yields what this rank writes. Not collective."""
    for shard in table_shards(model, optimizers):
        yield _piece(shard.part(world.rank, world.world_size))
    yield from _vocabularies(managed)
    if world.is_rank_zero:
        yield from _whole("tables", optimizers.adam_steps())
        yield from _whole("dense", _dense_parameters(model))
        yield from _whole("dense_optimizer", optimizers.dense_state())
        yield from _whole("objective", dict(objective.named_buffers()))


def restore(
    checkpoint: Checkpoint,
    model: DistributedModelParallel,
    optimizers: Optimizers,
    objective: Objective,
    managed: ManagedTables | None = None,
    *,
    is_same_run: bool = True,
) -> None:
    """Fills this rank's shards and everything replicated from a checkpoint of any world. Not collective.

    Args:
        checkpoint: of any world.
        model: sharded.
        optimizers: of it.
        objective: with what it estimates.
        managed: tables whose ids come and go.
        is_same_run: whether metrics of training rows go on too; not where a run continues another.

    Raises:
        CheckpointError: if a piece is damaged, missing, or of another shape or type.
    """
    optimizers.make_dense_state()
    tables = list(table_shards(model, optimizers))
    for shard in tables:
        _check_state(checkpoint, shard)
    _fill(
        checkpoint,
        [
            *map(_piece, tables),
            *_whole("tables", optimizers.adam_steps()),
            *_whole("dense", _dense_parameters(model)),
            *_whole("dense_optimizer", optimizers.dense_state()),
            *_whole("objective", _buffers(objective, with_streaming=is_same_run)),
            *_vocabularies(managed),
        ],
    )
    if managed is not None:
        _go_on(checkpoint, managed)


def restore_model(checkpoint: Checkpoint, model: DistributedModelParallel, managed: ManagedTables | None = None) -> None:
    """Fills the weights alone, and which id holds which row, for evaluation. Not collective."""
    weights = [*map(_piece, weight_shards(model)), *_whole("dense", _dense_parameters(model))]
    _fill(checkpoint, [*weights, *_vocabularies(managed)])
    if managed is not None:
        _go_on(checkpoint, managed)


def _go_on(checkpoint: Checkpoint, managed: ManagedTables) -> None:
    try:
        managed.loaded(checkpoint.step)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder.uri}: a managed vocabulary makes no sense: {error}. This is a bug of embedshard, or the "
            f"config's vocabulary.seed or vocabulary.buckets is another than the checkpoint's: report it, or set them back."
        ) from error


def _buffers(objective: Objective, *, with_streaming: bool) -> dict[str, torch.Tensor]:
    """Returns what the objective keeps; metrics of the training rows are of one run, and another begins its own."""
    buffers = dict(objective.named_buffers())
    return buffers if with_streaming else {name: b for name, b in buffers.items() if not name.startswith("streaming.")}


def _vocabularies(managed: ManagedTables | None) -> Iterator[Piece]:
    if managed is not None:
        for name, block, offset, shape in managed.state():
            yield Piece(f"vocabularies/{name}", block, offset, shape)


def _fill(checkpoint: Checkpoint, wanted: list[Piece]) -> None:
    with torch.no_grad():
        checkpoint.read_into(wanted)
    release_freed_memory()


def _check_state(checkpoint: Checkpoint, shard: Shard) -> None:
    """Refuses a row-wise statistic that was kept for other blocks of columns: it says nothing of these."""
    saved = checkpoint.tensors.get(f"tables/{shard.table}/{shard.kind}")
    if shard.kind == "weight" or saved is None or saved.shape == shard.shape or saved.shape[0] != shard.shape[0]:
        return
    met, needed = ((f"{shape[1]} blocks" if len(shape) > 1 else "none") for shape in (saved.shape, shard.shape))
    raise CheckpointError(
        f"{checkpoint.folder.uri}: the optimizer of table '{shard.table}' kept its statistics per row and block of columns "
        f"({met} there, {needed} in this plan), so they mean nothing here. Resume with the table cut as it was "
        f"(tables.{shard.table}.sharding), in a world with the same blocks."
    )


def table_shards(model: DistributedModelParallel, optimizers: Optimizers) -> Iterator[Shard]:
    """Yields this rank's pieces of weights and of optimizers' state, as live views. Not collective."""
    yield from weight_shards(model)
    yield from optimizer_shards(model)
    yield from lazy_adam_shards(model)
    yield from optimizers.replicated_state()


def _piece(shard: Shard) -> Piece:
    return Piece(f"tables/{shard.table}/{shard.kind}", shard.tensor, shard.offset, shard.shape)


def _dense_parameters(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    tables = replicated_tables(model)
    return {
        name: value
        for name, value in model.state_dict().items()
        if not isinstance(value, ShardedTensor) and name not in tables
    }


def _whole(prefix: str, tensors: dict[str, torch.Tensor]) -> Iterator[Piece]:
    for name, tensor in sorted(tensors.items()):
        yield Piece(f"{prefix}/{name}", tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape))
