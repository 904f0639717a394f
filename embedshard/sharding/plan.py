"""From a config to a plan: which table is cut how and lies where.

In a world of one each table lies whole on the one rank. In a larger world TorchRec's planner chooses within what each
table allows, or the config says it (`explicit.py`). Kernels are `fused` but for data-parallel tables and those whose memory
is not the GPU's (`memory.py`): the planner is told the kernel of each, since on a CPU it may pick one that it cannot price.
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
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
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
from embedshard.sharding.memory import (
    CACHED,
    OFF_DEVICE,
    cache_params,
    fewest_spilled,
    in_memory,
    kernels_allowed,
    key_value_params,
    lying,
)
from embedshard.sharding.recorded import RecordedPlan
from embedshard.world import World

RESERVE: Final = 0.15
"""Share of a rank's memory that a plan leaves free: for contexts, the allocator's gaps, sorted ids and what NCCL keeps."""


class AnyTypeSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on a CPU offers fewer sharding types than work there; this one offers all.

    It offers the fused kernels, which alone keep a table's optimizer, and `dense` for data-parallel tables.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns all sharding types that an EmbeddingBagCollection has."""
        return list(ALL_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the kernels of a sharding type."""
        return _kernels(sharding_type, compute_device_type)


class SequenceSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of sequences, with the same kernels as `AnyTypeSharder` has."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Returns the kernels of a sharding type."""
        return _kernels(sharding_type, compute_device_type)


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
    local = world.local_world_size
    if recorded is not None and recorded.applies(specs, planner, world.world_size, local, world.device.type):
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
    beyond_bytes: int | None = None,
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
            asks for tables whose memory is `auto` alone.
        beyond_bytes: of a rank's share of the host's memory, and of the SSD, beside a GPU's; what there is where None.

    Raises:
        PlanError: if the tables cannot be placed within what the config allows.
    """
    usable = int(cluster.memory_bytes * (1 - RESERVE)) if usable_bytes is None else usable_bytes
    lengths = lengths or {}
    if cluster.machine.device == "cpu":
        specs = [in_memory(spec, "device") if spec.memory.kind == "auto" else spec for spec in specs]
    if planner == "explicit" or cluster.world_size == 1:
        return Planned(_explicit(model, specs, cluster, usable, lengths))
    host = int(cluster.host_memory_bytes * (1 - RESERVE)) if beyond_bytes is None else beyond_bytes
    topology = cluster.topology(usable, host, beyond_bytes)
    return fewest_spilled(
        specs, lengths, lambda told: _chosen(model, told, sharders, cluster, topology, batch_size, lengths)
    )


def _chosen(
    model: nn.Module,
    specs: Sequence[TableSpec],
    sharders: Sharders,
    cluster: Cluster,
    topology: Topology,
    batch_size: int,
    lengths: Mapping[str, float],
) -> Planned:
    """Returns what TorchRec's planner chooses for tables whose memory is told."""
    chosen: list[ShardingOption] = []

    def note(options: list[ShardingOption]) -> list[ShardingOption]:
        chosen.extend(options)
        return options

    found = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # it is taken off already
        constraints={spec.name: _constraints(spec, cluster, lengths) for spec in specs},
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


def _constraints(spec: TableSpec, cluster: Cluster, lengths: Mapping[str, float]) -> ParameterConstraints:
    (kernel,) = kernels_allowed(spec, cluster.machine.device)
    return ParameterConstraints(
        sharding_types=possible_types(spec, cluster),
        compute_kernels=[kernel, EmbeddingComputeKernel.DENSE.value],  # which data-parallel tables have alone
        pooling_factors=[lengths.get(lookup.key, 1.0) for lookup in spec.lookups],
        cache_params=cache_params(kernel, spec.memory.ratio),
        key_value_params=key_value_params(spec, kernel),
    )


def _explicit(
    model: nn.Module, specs: Sequence[TableSpec], cluster: Cluster, usable: int, lengths: Mapping[str, float]
) -> ShardingPlan:
    """Returns the plan where ranks are said, or there is one: `auto` tables leave the GPUs' memory as far as it takes."""
    places = place_tables(specs, cluster.world_size, cluster.local_world_size)

    def attempt(told: Sequence[TableSpec]) -> list[TableSpec]:
        taken = [0] * cluster.world_size
        for spec in told:
            place = places[spec.name]
            (kernel,) = kernels_allowed(spec, cluster.machine.device)
            ratio = spec.memory.ratio if kernel in CACHED else None
            share = lying(spec, kernel, ratio, spec.num_embeddings, spec.dim)
            copies = len(place.ranks) if place.sharding_type == ShardingType.DATA_PARALLEL.value else 1
            for rank in place.ranks:
                taken[rank] += (share.device_weights + share.device_state) * copies // len(place.ranks)
        if max(taken) > usable:
            raise PlanError(f"tables take {max(taken):,} bytes of a rank's {usable:,}.")
        return list(told)

    try:
        told = {spec.name: spec for spec in fewest_spilled(specs, lengths, attempt)}
    except PlanError:  # as small as it gets: whether it fits is for the footprint to say
        told = {spec.name: in_memory(spec, "uvm_caching") if spec.memory.kind == "auto" else spec for spec in specs}
    return ShardingPlan(
        {
            path: EmbeddingModuleShardingPlan(
                {
                    name: _parameter(weight, places[name], cluster, told[name])
                    for name, weight in table_weights(module).items()
                }
            )
            for path, module in table_modules(model)
        }
    )


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


def _parameter(weight: torch.Tensor, place: Placement, cluster: Cluster, spec: TableSpec) -> ParameterSharding:
    """Returns what TorchRec wants to know of a table whose memory is told."""
    kind, (kernel,) = place.sharding_type, kernels_allowed(spec, cluster.machine.device)
    if kind == ShardingType.DATA_PARALLEL.value:
        kernel = EmbeddingComputeKernel.DENSE.value
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
        compute_kernel=kernel,
        ranks=list(place.ranks),
        sharding_spec=None if kind == ShardingType.DATA_PARALLEL.value else EnumerableShardingSpec(pieces),
        cache_params=cache_params(kernel, spec.memory.ratio),
        key_value_params=key_value_params(spec, kernel),
    )


def _kernels(sharding_type: str, device_type: str) -> list[str]:
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return [EmbeddingComputeKernel.DENSE.value]
    return [EmbeddingComputeKernel.FUSED.value, *(OFF_DEVICE if device_type == "cuda" else ())]
