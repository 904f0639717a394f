"""From a config to a plan: which table is cut how and lies where.

In a world of one each table lies whole on the one rank. In a larger world TorchRec's planner chooses among the sharding
types that leave the table's optimizer as it is, or among those that the config allows. Kernels are `fused` always: what
the planner may pick on a CPU otherwise, it cannot price.
"""

from __future__ import annotations

__all__ = ["OPTIMIZER_KEEPING_TYPES", "AnyTypeSharder", "make_plan"]

from collections.abc import Sequence

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embedshard.config import TableSpec
from embedshard.errors import PlanError
from embedshard.world import World

OPTIMIZER_KEEPING_TYPES = ("table_wise", "row_wise", "table_row_wise")
"""Sharding types under which every fused optimizer is what it is unsharded."""


class AnyTypeSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on a CPU offers fewer sharding types than work there; this one offers all."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns all sharding types that an EmbeddingBagCollection has."""
        return [
            kind.value
            for kind in (
                ShardingType.TABLE_WISE,
                ShardingType.COLUMN_WISE,
                ShardingType.TABLE_COLUMN_WISE,
                ShardingType.ROW_WISE,
                ShardingType.TABLE_ROW_WISE,
                ShardingType.GRID_SHARD,
                ShardingType.DATA_PARALLEL,
            )
        ]


def make_plan(
    model: nn.Module, specs: Sequence[TableSpec], sharder: EmbeddingBagCollectionSharder, world: World
) -> ShardingPlan:
    """Returns the plan. Collective.

    Raises:
        PlanError: if the tables cannot be placed within what the config allows.
    """
    sharders: list[ModuleSharder[nn.Module]] = [sharder]
    if world.world_size == 1:
        return ShardingPlan(
            {
                path: construct_module_sharding_plan(
                    module,
                    per_param_sharding={
                        name: table_wise(rank=0, compute_kernel=EmbeddingComputeKernel.FUSED.value)
                        for name in module.embedding_bags
                    },
                    sharder=sharder,
                    local_size=1,
                    world_size=1,
                    device_type=world.device.type,
                )
                for path, module in model.named_modules()
                if isinstance(module, EmbeddingBagCollection)
            }
        )
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world.world_size,
            local_world_size=world.local_world_size,
            compute_device=world.device.type,
        ),
        constraints={
            spec.name: ParameterConstraints(
                sharding_types=list(spec.sharding_types or OPTIMIZER_KEEPING_TYPES),
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            )
            for spec in specs
        },
    )
    try:
        return planner.collective_plan(model, sharders, world.group)
    except PlannerError as error:
        raise PlanError(
            f"TorchRec's planner finds no place for the tables on {world.world_size} workers: {error} "
            f"Allow more sharding types (tables.NAME.sharding.types), or use more workers."
        ) from error
