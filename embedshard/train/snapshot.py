"""A run's state as named pieces: what a checkpoint holds, and how it comes back.

Names belong to no world size: `tables/<table>/<weight or state>`, `dense/<parameter>`,
`dense_optimizer/<parameter>/<state>`, `objective/<buffer>`. Tables are live views of this rank's shards; the rest is
replicated, and rank 0 writes it.
"""

from __future__ import annotations

__all__ = ["pieces", "restore", "restore_model"]

from collections.abc import Iterator

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embedshard.models.objectives.objective import Objective
from embedshard.sharding.optimizers import Optimizers
from embedshard.sharding.shards import optimizer_shards, weight_shards
from embedshard.train.checkpoint import Checkpoint, Piece
from embedshard.world import World


def pieces(model: DistributedModelParallel, optimizers: Optimizers, objective: Objective, world: World) -> Iterator[Piece]:
    """Yields what this rank writes. Not collective."""
    yield from _tables(model)
    if world.is_rank_zero:
        yield from _whole("dense", _dense_parameters(model))
        yield from _whole("dense_optimizer", optimizers.dense_state())
        yield from _whole("objective", dict(objective.named_buffers()))


def restore(checkpoint: Checkpoint, model: DistributedModelParallel, optimizers: Optimizers, objective: Objective) -> None:
    """Fills this rank's shards and everything replicated from a checkpoint of any world. Not collective.

    Raises:
        CheckpointError: if a piece is damaged, missing, or of another shape or type.
    """
    optimizers.make_dense_state()
    _fill(
        checkpoint,
        [
            *_tables(model),
            *_whole("dense", _dense_parameters(model)),
            *_whole("dense_optimizer", optimizers.dense_state()),
            *_whole("objective", dict(objective.named_buffers())),
        ],
    )


def restore_model(checkpoint: Checkpoint, model: DistributedModelParallel) -> None:
    """Fills the weights alone, for evaluation. Not collective."""
    tables = [piece for piece in _tables(model) if piece.name.endswith("/weight")]
    _fill(checkpoint, [*tables, *_whole("dense", _dense_parameters(model))])


def _fill(checkpoint: Checkpoint, wanted: list[Piece]) -> None:
    with torch.no_grad():
        checkpoint.read_into(wanted)


def _tables(model: DistributedModelParallel) -> Iterator[Piece]:
    for shard in (*weight_shards(model), *optimizer_shards(model)):
        yield Piece(f"tables/{shard.table}/{shard.kind}", shard.tensor, shard.offset, shard.shape)


def _dense_parameters(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not isinstance(value, ShardedTensor)}


def _whole(prefix: str, tensors: dict[str, torch.Tensor]) -> Iterator[Piece]:
    for name, tensor in sorted(tensors.items()):
        yield Piece(f"{prefix}/{name}", tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape))
