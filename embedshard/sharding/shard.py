"""Applies a plan to a model from outside: the model's code does not change."""

from __future__ import annotations

__all__ = ["make_sharders", "round_at_random", "shard_model"]

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import QuantizedCommCodecs, ShardingEnv, ShardingPlan

from embedshard.config import Config, TableSpec
from embedshard.errors import ConfigError
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.sharding.alone import look_up_directly
from embedshard.sharding.cache import keep_apart
from embedshard.sharding.initialise import initialise_tables
from embedshard.sharding.lazy_adam import pose_as_sgd, take_over
from embedshard.sharding.memory import check_memory
from embedshard.sharding.optimizers import attach_table_optimizers
from embedshard.sharding.plan import AnyTypeSharder, SequenceSharder, Sharders, make_plan
from embedshard.sharding.pooled_exchange import exchange_directly
from embedshard.sharding.recorded import RecordedPlan
from embedshard.sharding.row_tables import take_over_tables
from embedshard.sharding.shards import weight_shards
from embedshard.world import World

_UNEVEN: Final = {"table_wise", "column_wise", "data_parallel"}
"""Sharding types whose vectors travel in any number from any rank."""


def shard_model(
    model: nn.Module,
    config: Config,
    specs: Sequence[TableSpec],
    world: World,
    recorded: RecordedPlan | None = None,
    *,
    initialises: bool = True,
) -> DistributedModelParallel:
    """Shards the tables by the plan, replicates the rest, and gives every row its first value. Collective.

    Args:
        model: unsharded.
        config: the config.
        specs: its tables.
        world: whose ranks share them.
        recorded: a plan to replay; None makes one.
        initialises: whether rows get their first values; not where a checkpoint's replace them all.

    Raises:
        PlanError: if there is no plan within what the config allows, or the recorded one is another config's.
        ConfigError: if the communication's precision, or a table's memory, is not to be had on this device.
    """
    check_memory(specs, world.device, is_training=True)
    attach_table_optimizers(model, specs)
    sharders = make_sharders(config, world.device)
    batch_size = config.train.global_batch_size // world.world_size
    plan = make_plan(model, specs, sharders, config.sharding.planner, world, batch_size, recorded)
    round_at_random(plan, specs)
    keep_apart(model, plan)
    if world.device.type == "cpu":
        pose_as_sgd(model)
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(world.group),
        device=world.device,
        plan=plan,
        sharders=list(sharders),
        init_data_parallel=False,  # what all have a copy of is kept the same by `dense_gradients.py`
    )
    take_over(sharded)
    take_over_tables(sharded)
    sharded._dmp_wrapped_module.to(world.device)  # as DDP's wrapper would
    if world.world_size == 1:
        look_up_directly(sharded)
    exchange_directly(sharded, world)
    _allow_uneven_lookups(sharded, plan, world)
    if initialises:
        initialise_tables(config.seed, specs, weight_shards(sharded))
    return sharded


def _allow_uneven_lookups(model: nn.Module, plan: ShardingPlan, world: World) -> None:
    """Tells lookups whether ranks may ask for different numbers of rows: gloo scatters no sums of tables cut by rows so."""
    types = {placed.sharding_type for module_plan in plan.plan.values() for placed in module_plan.values()}
    for module in model.modules():
        if isinstance(module, EmbeddingLookup):
            module.is_uneven = world.world_size == 1 or types <= _UNEVEN


def round_at_random(plan: ShardingPlan, specs: Sequence[TableSpec]) -> None:
    """Tells TorchRec, in its plan, which tables' updates are rounded at random."""
    at_random = {spec.name for spec in specs if spec.stochastic_rounding}
    for module_plan in plan.plan.values():
        for table, placed in module_plan.items():
            if table in at_random:
                placed.stochastic_rounding = True


def make_sharders(config: Config, device: torch.device) -> Sharders:
    """Returns what shards the tables on a device, which need not be there.

    Raises:
        ConfigError: if the communication's precision, or a table's rounding, is not to be had on the device.
    """
    for name, table in config.tables.items():
        if table.stochastic_rounding and device.type == "cpu":
            raise ConfigError(
                f"tables.{name}.stochastic_rounding: FBGEMM rounds at random on CUDA alone, and on a CPU to the nearest. "
                "Leave it out, or train on CUDA."
            )
    # Rounding at random makes the result depend on more than (config, data, seed): only a table that asks for it does.
    fused: dict[str, Any] = {"stochastic_rounding": False}
    if device.type == "cuda" and any(table.memory.kind in ("auto", "uvm_caching") for table in config.tables.values()):
        fused |= {"gather_uvm_cache_stats": True, "prefetch_pipeline": config.train.prefetch}
    codecs = _codecs(config, device)
    return (
        AnyTypeSharder(fused_params=fused, qcomm_codecs_registry=codecs),
        SequenceSharder(fused_params=fused, qcomm_codecs_registry=codecs),
    )


def _codecs(config: Config, device: torch.device) -> dict[str, QuantizedCommCodecs] | None:
    """Returns what quantises embeddings and gradients on their way between workers; None if nothing does."""
    wanted = config.sharding.communication
    if wanted == "bf16" and device.type == "cpu":
        raise ConfigError(
            "sharding.communication is 'bf16', and gloo, which carries it between CPUs, has no bf16: TorchRec would take "
            "fp16 instead. Choose fp16 or fp32, or train on CUDA."
        )
    precision = CommType(wanted)
    return get_qcomm_codecs_registry(QCommsConfig(forward_precision=precision, backward_precision=precision), device=device)
