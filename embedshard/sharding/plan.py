"""From a config to a plan: which table is cut how and lies where.

In a world of one each table lies whole on the one rank. In a larger world TorchRec's planner chooses within what each
table allows, or the config says it (`explicit.py`). Kernels are `fused` always, but for data-parallel tables: what the
planner may pick on a CPU otherwise, it cannot price.
"""

from __future__ import annotations

__all__ = [
    "RESERVE",
    "AnyTypeSharder",
    "Planned",
    "SequenceSharder",
    "Sharders",
    "make_plan",
    "plan_tables",
    "possible_types",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets, placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)

from embedshard.config import TableSpec
from embedshard.config.placement import ALL_TYPES, DEFAULT_TYPES, SEQUENCE_TYPES
from embedshard.errors import PlanError
from embedshard.models.embeddings import table_modules, table_weights
from embedshard.sharding.explicit import Placement, leaves_empty_pieces, place_tables
from embedshard.sharding.hardware import Cluster, this_cluster
from embedshard.sharding.recorded import RecordedPlan
from embedshard.world import World

RESERVE: Final = 0.15
"""Share of a rank's memory that a plan leaves free: for contexts, the allocator's gaps, sorted ids and what NCCL keeps."""


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


class SequenceSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of sequences, with the same kernels as `AnyTypeSharder` has."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the one kernel of a sharding type."""
        return [_kernel(sharding_type)]


Sharders = Sequence[ModuleSharder[Any]]
"""What shards the collections of a model: one for each kind of them."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what the planner makes of it.

    Attributes:
        plan: as TorchRec wants it.
        estimated_ms: of a step's lookups and their communication on the busiest rank; None where no planner was asked.
    """

    plan: ShardingPlan
    estimated_ms: float | None = None


def make_plan(
    model: nn.Module,
    specs: Sequence[TableSpec],
    sharders: Sharders,
    planner: str,
    world: World,
    batch_size: int,
    recorded: RecordedPlan | None = None,
) -> ShardingPlan:
    """Returns the plan of the world that trains. Collective.

    Args:
        model: unsharded.
        specs: its tables.
        sharders: what will shard it.
        planner: `auto` or `explicit`.
        world: whose ranks share the tables.
        batch_size: rows of one rank.
        recorded: a plan to replay where it applies.

    Raises:
        PlanError: if the tables cannot be placed within what the config allows, or a binding plan does not apply.
    """
    if recorded is not None and recorded.applies(specs, planner, world.world_size, world.local_world_size):
        return recorded.to_torchrec(model, world.device.type)
    found, problem = world.broadcast_object(
        _planned(model, specs, sharders, planner, this_cluster(world), batch_size) if world.is_rank_zero else None
    )
    if problem is not None:
        raise PlanError(problem)
    return found


def plan_tables(
    model: nn.Module,
    specs: Sequence[TableSpec],
    sharders: Sharders,
    planner: str,
    cluster: Cluster,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
    usable_bytes: int | None = None,
) -> Planned:
    """Returns the plan for a cluster, which need not be there.

    Args:
        model: unsharded, its tables on any device, also meta.
        specs: its tables.
        sharders: what will shard it.
        planner: `auto` or `explicit`.
        cluster: the workers and their machines.
        batch_size: rows of one rank.
        lengths: mean ids a row under each key; 1 where absent.
        usable_bytes: of a rank's memory, for tables and what they move; all but a reserve where None. An explicit plan
            does not ask.

    Raises:
        PlanError: if the tables cannot be placed within what the config allows.
    """
    if planner == "explicit" or cluster.world_size == 1:
        places = place_tables(specs, cluster.world_size, cluster.local_world_size)
        return Planned(
            ShardingPlan(
                {
                    path: EmbeddingModuleShardingPlan(
                        {name: _parameter(weight, places[name], cluster) for name, weight in table_weights(module).items()}
                    )
                    for path, module in table_modules(model)
                }
            )
        )
    usable = int(cluster.memory_bytes * (1 - RESERVE)) if usable_bytes is None else usable_bytes
    topology = cluster.topology(usable)
    lengths = lengths or {}
    chosen: list[ShardingOption] = []

    def note(options: list[ShardingOption]) -> list[ShardingOption]:
        chosen.extend(options)
        return options

    found = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # it is taken off already
        constraints={
            spec.name: ParameterConstraints(
                sharding_types=possible_types(spec, cluster),
                pooling_factors=[lengths.get(lookup.key, 1.0) for lookup in spec.lookups],
            )
            for spec in specs
        },
        callbacks=[note],
        debug=False,
    )
    try:
        plan = found.plan(model, list(sharders))
    except PlannerError as error:
        raise PlanError(
            f"TorchRec's planner finds no place for the tables on {cluster.world_size} workers: {error} "
            f"Allow more sharding types (tables.NAME.sharding.types), or use more workers."
        ) from error
    return Planned(plan, float(NoopPerfModel(topology).rate(chosen)))


def _planned(
    model: nn.Module,
    specs: Sequence[TableSpec],
    sharders: Sharders,
    planner: str,
    cluster: Cluster,
    batch_size: int,
) -> tuple[ShardingPlan | None, str | None]:
    """Returns the plan, or why there is none: all ranks must know, or the others wait in vain."""
    try:
        return plan_tables(model, specs, sharders, planner, cluster, batch_size).plan, None
    except PlanError as error:
        return None, str(error)


def possible_types(spec: TableSpec, cluster: Cluster) -> list[str]:
    """Returns the types that the planner may choose: `table_wise` instead of those that would leave a piece empty."""
    local = cluster.local_world_size
    pieces = {"row_wise": cluster.world_size, "table_row_wise": local, "grid_shard": local}
    allowed = spec.sharding.types or [kind for kind in DEFAULT_TYPES if not spec.is_sequence or kind in SEQUENCE_TYPES]
    is_out = {kind: kind in pieces and leaves_empty_pieces(spec.num_embeddings, pieces[kind]) for kind in allowed}
    return list(dict.fromkeys("table_wise" if is_out[kind] else kind for kind in allowed))


def _parameter(weight: torch.Tensor, place: Placement, cluster: Cluster) -> ParameterSharding:
    """Returns what TorchRec wants to know of a table."""
    kind = place.sharding_type
    sizes, offsets = calculate_shard_sizes_and_offsets(
        weight,
        world_size=cluster.world_size,
        local_world_size=len(place.ranks) // place.num_blocks,
        sharding_type=kind,
        col_wise_shard_dim=weight.shape[1] // place.num_blocks,
    )
    pieces = [
        ShardMetadata(
            shard_sizes=size,
            shard_offsets=offset,
            placement=placement(cluster.machine.device, rank, cluster.local_world_size),
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
