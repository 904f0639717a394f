"""From a config to a plan: which table is cut how and lies where.

In a world of one each table lies whole on the one rank. In a larger world TorchRec's planner chooses within what each
table allows, or the config says it (`explicit.py`). Kernels are `fused` always, but for data-parallel tables: what the
planner may pick on a CPU otherwise, it cannot price.
"""

from __future__ import annotations

__all__ = ["AnyTypeSharder", "make_plan"]

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets, placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embedshard.config import TableSpec
from embedshard.config.placement import ALL_TYPES, DEFAULT_TYPES
from embedshard.errors import PlanError
from embedshard.sharding.explicit import Placement, leaves_empty_pieces, place_tables
from embedshard.world import World


class AnyTypeSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on a CPU offers fewer sharding types than work there; this one offers all.

    It offers one kernel for each: `fused`, which alone keeps a table's optimizer, and `dense` for data-parallel tables.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns all sharding types that an EmbeddingBagCollection has."""
        return list(ALL_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the one kernel of a sharding type."""
        return [_kernel(sharding_type)]


def make_plan(
    model: nn.Module, specs: Sequence[TableSpec], sharder: EmbeddingBagCollectionSharder, planner: str, world: World
) -> ShardingPlan:
    """Returns the plan. Collective.

    Args:
        model: unsharded.
        specs: its tables.
        sharder: what will shard it.
        planner: `auto` or `explicit`.
        world: whose ranks share the tables.

    Raises:
        PlanError: if the tables cannot be placed within what the config allows.
    """
    if planner == "explicit" or world.world_size == 1:
        places = place_tables(specs, world.world_size, world.local_world_size)
        return ShardingPlan(
            {
                path: EmbeddingModuleShardingPlan(
                    {name: _parameter(bag.weight, places[name], world) for name, bag in module.embedding_bags.items()}
                )
                for path, module in model.named_modules()
                if isinstance(module, EmbeddingBagCollection)
            }
        )
    found, problem = world.broadcast_object(_planned(model, specs, sharder, world) if world.is_rank_zero else None)
    if problem is not None:
        raise PlanError(
            f"TorchRec's planner finds no place for the tables on {world.world_size} workers: {problem} "
            f"Allow more sharding types (tables.NAME.sharding.types), or use more workers."
        )
    return found


def _planned(
    model: nn.Module, specs: Sequence[TableSpec], sharder: EmbeddingBagCollectionSharder, world: World
) -> tuple[ShardingPlan | None, str | None]:
    """Returns the planner's plan, or why there is none: all ranks must know, or the others wait in vain."""
    sharders: list[ModuleSharder[nn.Module]] = [sharder]
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world.world_size,
            local_world_size=world.local_world_size,
            compute_device=world.device.type,
        ),
        constraints={spec.name: ParameterConstraints(sharding_types=_possible(spec, world)) for spec in specs},
    )
    try:
        return planner.plan(model, sharders), None
    except PlannerError as error:
        return None, str(error)


def _possible(spec: TableSpec, world: World) -> list[str]:
    """Returns the types that the planner may choose: `table_wise` instead of those that would leave a piece empty."""
    pieces = {"row_wise": world.world_size, "table_row_wise": world.local_world_size, "grid_shard": world.local_world_size}
    allowed = spec.sharding.types or DEFAULT_TYPES
    is_out = {kind: kind in pieces and leaves_empty_pieces(spec.num_embeddings, pieces[kind]) for kind in allowed}
    return list(dict.fromkeys("table_wise" if is_out[kind] else kind for kind in allowed))


def _parameter(weight: torch.Tensor, place: Placement, world: World) -> ParameterSharding:
    """Returns what TorchRec wants to know of a table."""
    kind = place.sharding_type
    sizes, offsets = calculate_shard_sizes_and_offsets(
        weight,
        world_size=world.world_size,
        local_world_size=len(place.ranks) // place.num_blocks,
        sharding_type=kind,
        col_wise_shard_dim=weight.shape[1] // place.num_blocks,
    )
    pieces = [
        ShardMetadata(
            shard_sizes=size,
            shard_offsets=offset,
            placement=placement(world.device.type, rank, world.local_world_size),
        )
        for size, offset, rank in zip(sizes, offsets, place.ranks, strict=True)
    ]
    return ParameterSharding(
        sharding_type=kind,
        compute_kernel=_kernel(kind),
        ranks=list(place.ranks),
        sharding_spec=None if kind == ShardingType.DATA_PARALLEL.value else EnumerableShardingSpec(pieces),
    )


def _kernel(sharding_type: str) -> str:
    is_replicated = sharding_type == ShardingType.DATA_PARALLEL.value
    return (EmbeddingComputeKernel.DENSE if is_replicated else EmbeddingComputeKernel.FUSED).value
