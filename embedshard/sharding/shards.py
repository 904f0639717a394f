"""This rank's pieces of a sharded model, as live views: what is initialised, saved and loaded.

TorchRec tells them in state dicts whose keys differ from rank to rank; here they get the table's name, an offset and the
size of the whole. A table that is replicated (data-parallel) is one piece, the same on every rank.
"""

from __future__ import annotations

__all__ = [
    "TABLE_HOLDERS",
    "Shard",
    "fused_kernels",
    "num_column_blocks",
    "optimizer_shards",
    "replicated_tables",
    "weight_shards",
]

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingType

from embedshard.sharding.fetched import let_go

TABLE_HOLDERS: Final = ("embedding_bags", "embeddings")
"""Where TorchRec's collections, of bags and of sequences, hold their tables: `<path>.<holder>.<table>.weight`."""


@dataclass(frozen=True)
class Shard:
    """A block of a table's weights or of its optimizer's state.

    Attributes:
        table: the table's name.
        kind: `weight`, or the name of the optimizer's state, such as `momentum1`.
        tensor: a live view, (rows, columns) or (rows,).
        offset: where the block begins in the whole.
        shape: of the whole.
        is_replicated: whether every rank has all of it.
    """

    table: str
    kind: str
    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_replicated: bool = False

    def part(self, rank: int, world_size: int) -> Shard:
        """Returns the part that a rank writes, so that all ranks' parts are the whole once."""
        if not self.is_replicated:
            return self
        rows = len(self.tensor)
        first, last = rank * rows // world_size, (rank + 1) * rows // world_size
        return replace(self, tensor=self.tensor[first:last], offset=(first, *self.offset[1:]))


def replicated_tables(model: DistributedModelParallel) -> dict[str, str]:
    """Returns the data-parallel tables, by the names of their parameters."""
    replicated = {
        f"{path}.{holder}.{table}.weight": table
        for path, module_plan in model.plan.plan.items()
        for table, sharding in module_plan.items()
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        for holder in TABLE_HOLDERS
    }
    return {name: replicated[name] for name, _ in model.named_parameters() if name in replicated}


def fused_kernels(model: nn.Module) -> Iterator[Any]:
    """Yields TorchRec's fused kernels on this rank. They hang on lookups, which `modules()` does not reach."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            for kernel in lookup.modules():
                if hasattr(kernel, "fused_optimizer") and hasattr(kernel, "emb_module"):
                    yield kernel


def num_column_blocks(model: DistributedModelParallel) -> dict[str, int]:
    """Returns into how many blocks of columns each table is cut, by name."""
    return {
        table: 1
        if sharding.sharding_spec is None
        else len({shard.shard_offsets[1] for shard in sharding.sharding_spec.shards})
        for module_plan in model.plan.plan.values()
        for table, sharding in module_plan.items()
    }


def weight_shards(model: DistributedModelParallel) -> Iterator[Shard]:
    """Yields this rank's blocks of tables' weights that are not empty, in the order of parameters' names. Not collective.

    A table behind a cache is written back and its cache emptied first: what is read is the newest, and what is written
    stays. The views are good until the next lookup.
    """
    for kernel in fused_kernels(model):
        let_go(kernel.emb_module)
        kernel.flush()
        kernel.purge()
    replicated = replicated_tables(model)
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, ShardedTensor):
            yield from _local(_table(key), "weight", value)
        elif key in replicated:
            yield Shard(replicated[key], "weight", value, (0, 0), tuple(value.shape), is_replicated=True)


def optimizer_shards(model: DistributedModelParallel) -> Iterator[Shard]:
    """Yields this rank's blocks of the fused optimizers' state that are not empty, by parameters' names. Not collective.

    A row-wise state of a table whose columns are cut has one number per row and block of columns: (rows, blocks).
    """
    blocks = num_column_blocks(model)
    for parameter, values in sorted(model.fused_optimizer.state_dict()["state"].items()):
        table = _table(parameter)
        for key, value in sorted(values.items()):
            kind = key.removeprefix(f"{table}.").replace("exp_avg_sq", "momentum2")  # TorchRec's name of fused Adam's
            if not isinstance(value, ShardedTensor):
                raise AssertionError(f"the fused state {key} is a {type(value).__name__}, not a ShardedTensor")
            for shard in _local(table, kind, value):
                is_row_wise = len(shard.shape) == 1
                yield _by_block(shard, blocks[table]) if is_row_wise and blocks[table] > 1 else shard


def _by_block(shard: Shard, num_blocks: int) -> Shard:
    """Returns a row-wise state with its place by row and block; TorchRec tells it as (block * rows + row)."""
    rows = shard.shape[0] // num_blocks
    block, row = divmod(shard.offset[0], rows)
    return replace(shard, tensor=shard.tensor.unsqueeze(1), offset=(row, block), shape=(rows, num_blocks))


def _local(table: str, kind: str, value: ShardedTensor) -> Iterator[Shard]:
    shape = tuple(value.metadata().size)
    for shard in value.local_shards():
        if shard.tensor.numel():
            yield Shard(table, kind, shard.tensor, tuple(shard.metadata.shard_offsets), shape)


def _table(parameter: str) -> str:
    """Returns the table of <path>.<holder>.<table>.weight."""
    return parameter.rsplit(".", 2)[1]
