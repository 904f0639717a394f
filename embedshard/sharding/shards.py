"""This rank's pieces of a sharded model, as live views: what is initialised, saved and loaded.

TorchRec tells them in state dicts whose keys differ from rank to rank; here they get the table's name, an offset and the
size of the whole.
"""

from __future__ import annotations

__all__ = ["Shard", "optimizer_shards", "weight_shards"]

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel


@dataclass(frozen=True)
class Shard:
    """A block of a table's weights or of its optimizer's state.

    Attributes:
        table: the table's name.
        kind: `weight`, or the name of the optimizer's state, such as `momentum1`.
        tensor: a live view, (rows, columns) or (rows,).
        offset: where the block begins in the whole.
        shape: of the whole.
    """

    table: str
    kind: str
    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def weight_shards(model: DistributedModelParallel) -> Iterator[Shard]:
    """Yields this rank's blocks of tables' weights, in the order of tables' names. Not collective."""
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, ShardedTensor):
            # ...embedding_bags.<table>.weight
            yield from _local(key.split(".embedding_bags.")[1].rsplit(".", 1)[0], "weight", value)


def optimizer_shards(model: DistributedModelParallel) -> Iterator[Shard]:
    """Yields this rank's blocks of the fused optimizers' state, in the order of tables' names. Not collective."""
    state = model.fused_optimizer.state_dict()["state"]
    for parameter, values in sorted(state.items()):
        table = parameter.split(".embedding_bags.")[1].rsplit(".", 1)[0]
        for key, value in sorted(values.items()):
            kind = key.removeprefix(f"{table}.")
            if isinstance(value, ShardedTensor):
                yield from _local(table, kind, value)
            else:
                raise AssertionError(f"the fused state {key} is a {type(value).__name__}, not a ShardedTensor")


def _local(table: str, kind: str, value: ShardedTensor) -> Iterator[Shard]:
    shape = tuple(value.metadata().size)
    for shard in value.local_shards():
        yield Shard(table, kind, shard.tensor, tuple(shard.metadata.shard_offsets), shape)
