"""A plan made without the hardware: which table lies where and why, what each rank holds, and whether that fits.

TorchRec's planner is told the hardware; the tables stay on the meta device, so that billions of rows cost nothing.
"""

from __future__ import annotations

__all__ = ["Draft", "Reason", "draft_plan"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import (
    DrawsNegatives,
    HierarchicalSoftmaxConfig,
    InBatchSoftmaxConfig,
    ItemEmbeddingConfig,
    SASRecConfig,
    SoftmaxConfig,
    TableShardingConfig,
    TwoTowerConfig,
)
from embedshard.data.lookup_sample import LookupSample
from embedshard.errors import PlanError
from embedshard.models.registry import build_model
from embedshard.models.summary import summarise
from embedshard.sharding.demand import Demand, key_lengths, places_per_row, table_demands
from embedshard.sharding.footprint import DenseCost, Footprint, footprint_of
from embedshard.sharding.hardware import Cluster
from embedshard.sharding.memory import CACHED, check_memory, in_memory
from embedshard.sharding.optimizers import attach_table_optimizers
from embedshard.sharding.plan import RESERVE, Planned, plan_tables, possible_types
from embedshard.sharding.recorded import RecordedPlan, record_plan
from embedshard.sharding.shard import make_sharders

_OF_AN_EVEN_SHARE: Final = (1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2, 2.5, 3.2, 4, 6, 10, 30, 100, 1e4)
"""Where nothing fits, the memory of a rank that a plan is looked for with, in even shares of all tables, step by step."""

PROCESS_BYTES: Final = 750 * 1024**2
"""What a worker takes before it has tables or data: Python, torch and FBGEMM. Measured on Linux, CPU builds."""
DRAWN_BYTES_PER_ID: Final = 40
"""What a worker keeps of each id that is drawn from by its count, at the most, while it is made. Measured at 10 million."""
TREE_BYTES_PER_ID: Final = 61
"""The same of each leaf of a Huffman tree, with what counts are kept for beside."""


@dataclass(frozen=True)
class Reason:
    """Why a table lies as it does.

    Attributes:
        why: in a few words.
        estimated_ms: of a step's lookups and their communication on the busiest rank, with the plan as it is.
        runner_up: the next best type for this table, the others as they are; None if there is none that fits.
        runner_up_ms: the same estimate with it.
        misfits: types that would not fit.
        memory: why it lies in the memory that it lies in; None where there is but one, or the config leaves it at that.
    """

    why: str
    estimated_ms: float | None = None
    runner_up: str | None = None
    runner_up_ms: float | None = None
    misfits: tuple[str, ...] = ()
    memory: str | None = None


@dataclass(frozen=True)
class Draft:
    """A plan and what comes of it.

    Attributes:
        cluster: what it is made for.
        plan: which shards lie where.
        footprint: what it takes.
        reasons: by table; empty unless asked for.
        demands: by table, what a row of a batch asks of it.
        weight_bytes: of each table, whole.
        state_bytes: of each table's optimizer, whole.
        usable_bytes: of a rank's memory, the reserve taken off.
        usable_host_bytes: the same, of its share of the memory of a GPU's host; None on a CPU.
        problem: what the planner said, if it found no place within the memory that there is.
    """

    cluster: Cluster
    plan: RecordedPlan
    footprint: Footprint
    reasons: Mapping[str, Reason]
    demands: Mapping[str, Demand]
    weight_bytes: Mapping[str, int]
    state_bytes: Mapping[str, int]
    usable_bytes: int
    usable_host_bytes: int | None
    problem: str | None

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory that it needs, of each kind."""
        ranks, ssd = self.footprint.ranks, self.cluster.ssd_bytes
        return (
            max(rank.total for rank in ranks) <= self.usable_bytes
            and (self.usable_host_bytes is None or max(rank.host for rank in ranks) <= self.usable_host_bytes)
            and (ssd is None or max(rank.ssd for rank in ranks) <= ssd)
        )


def draft_plan(
    config: Config, specs: Sequence[TableSpec], cluster: Cluster, sample: LookupSample | None, *, explains: bool
) -> Draft:
    """Plans a config for a cluster that need not be there. Not collective.

    Args:
        config: the config.
        specs: its tables.
        cluster: the workers.
        sample: what is known of the data.
        explains: whether reasons are wanted; each costs some runs of the planner.

    Raises:
        ConfigError: if the config cannot be trained on the cluster's devices.
        PlanError: if the tables cannot be placed, whatever the memory.
    """
    maker = _Maker(config, specs, cluster, sample)
    planned, problem = maker.plan()
    plan = record_plan(planned.plan, specs, cluster.world_size, cluster.local_world_size)
    demands = table_demands(config, specs, sample, config.train.global_batch_size // cluster.world_size)
    footprint = footprint_of(
        plan, specs, demands, cluster, maker.dense, config.train.global_batch_size, config.sharding.communication
    )
    reasons = maker.reasons(plan, planned, problem is None) if explains else {}
    return Draft(
        cluster=cluster,
        plan=plan,
        footprint=footprint,
        reasons=reasons,
        demands=demands,
        weight_bytes={spec.name: spec.weight_bytes for spec in specs},
        state_bytes={spec.name: spec.state_bytes for spec in specs},
        usable_bytes=int(cluster.memory_bytes * (1 - RESERVE)),
        usable_host_bytes=int(cluster.host_memory_bytes * (1 - RESERVE)) if cluster.machine.device == "cuda" else None,
        problem=problem,
    )


class _Maker:
    """Asks TorchRec's planner; where it finds no place, again with as little memory more as it takes."""

    def __init__(self, config: Config, specs: Sequence[TableSpec], cluster: Cluster, sample: LookupSample | None) -> None:
        device = torch.device(cluster.machine.device)
        check_memory(specs, device, is_training=False)
        self._config, self._specs, self._cluster = config, specs, cluster
        self._batch_size = config.train.global_batch_size // cluster.world_size
        self._lengths = key_lengths(config, specs, sample, self._batch_size)
        self._model = build_model(config, specs)
        attach_table_optimizers(self._model, specs)
        self._sharders = make_sharders(config, device)
        self.dense = _dense_cost(config, specs, self._model, cluster, sample)
        dense = self.dense
        fixed = 2 * dense.weight_bytes + dense.state_bytes + dense.process_bytes
        fixed += 8 * (self._batch_size * dense.numbers_per_row + dense.numbers_gathered)
        self._usable = int(cluster.memory_bytes * (1 - RESERVE)) - fixed

    def plan(self) -> tuple[Planned, str | None]:
        """Returns a plan, and why it does not fit, if it does not."""
        try:
            return self._planned(self._specs, self._usable), None
        except PlanError as error:
            problem = error
        whole = sum(spec.weight_bytes + spec.state_bytes for spec in self._specs)
        for factor in _OF_AN_EVEN_SHARE:
            try:
                share = int(whole * factor) // self._cluster.world_size
                return self._planned(self._specs, max(share, self._usable), share), str(problem)
            except PlanError:
                continue
        raise problem

    def _planned(self, specs: Sequence[TableSpec], usable: int, beyond: int | None = None) -> Planned:
        if usable <= 0:
            raise PlanError("the dense part and its activations alone take a rank's memory.")
        planner = self._config.sharding.planner
        return plan_tables(
            self._model, specs, self._sharders, planner, self._cluster, self._batch_size, self._lengths, usable, beyond
        )

    def reasons(self, plan: RecordedPlan, planned: Planned, fits: bool) -> dict[str, Reason]:
        return {
            spec.name: replace(self._reason(spec, plan, planned, fits), memory=self._memory(spec, plan))
            for spec in self._specs
        }

    def _memory(self, spec: TableSpec, plan: RecordedPlan) -> str | None:
        if self._cluster.machine.device == "cpu" or spec.memory.kind == "device":
            return None
        if spec.memory.kind != "auto":
            return "the config says so"
        if plan.tables[spec.name].kernel not in CACHED:
            return "the GPUs' memory has room for it"
        return (
            "the GPUs' memory has no room for all tables; of those that may leave it, the fewest do, most bytes for each "
            "lookup first"
        )

    def _reason(self, spec: TableSpec, plan: RecordedPlan, planned: Planned, fits: bool) -> Reason:
        kind = plan.tables[spec.name].sharding_type
        if self._cluster.world_size == 1:
            return Reason("one worker")
        if self._config.sharding.planner == "explicit":
            if kind != spec.sharding.type:
                return Reason(f"the config says {spec.sharding.type}, but it has too few rows for that")
            where = ", on these ranks" if spec.sharding.ranks else "; ranks by size"
            return Reason(f"the config says so{where if kind not in ('row_wise', 'data_parallel') else ''}")
        allowed, possible = list(spec.sharding.types), possible_types(spec, self._cluster)
        if len(possible) == 1:
            few = [name for name in allowed or ("row_wise",) if name != kind]
            return Reason(f"too few rows for {', '.join(few)}" if few else "the only type that the config allows")
        others = {name: self._rating(spec, plan, name) for name in possible if name != kind}
        misfits = tuple(name for name, rating in others.items() if rating is None)
        rated = sorted((rating, name) for name, rating in others.items() if rating is not None)
        if not fits:
            return Reason("no plan fits; this is the one that lacks least memory", planned.estimated_ms)
        if not rated:
            return Reason("the only type that fits", planned.estimated_ms, misfits=misfits)
        return Reason("cheapest of those that fit", planned.estimated_ms, rated[0][1], rated[0][0], misfits)

    def _rating(self, spec: TableSpec, plan: RecordedPlan, kind: str) -> float | None:
        """Returns the planner's estimate of the plan with one table cut otherwise; None if that fits nowhere."""
        specs = [
            _only(other, kind if other.name == spec.name else plan.tables[other.name].sharding_type, plan)
            for other in self._specs
        ]
        try:
            return self._planned(specs, self._usable).estimated_ms
        except PlanError:
            return None


def _only(spec: TableSpec, kind: str, plan: RecordedPlan) -> TableSpec:
    sharding = TableShardingConfig.model_validate({"types": [kind], "allow_changed_optimizer": True})
    if spec.memory.kind == "auto":
        spec = in_memory(spec, "uvm_caching" if plan.tables[spec.name].kernel in CACHED else "device")
    return replace(spec, sharding=sharding)


def _dense_cost(
    config: Config, specs: Sequence[TableSpec], model: nn.Module, cluster: Cluster, sample: LookupSample | None
) -> DenseCost:
    layers = summarise(config, specs).layers
    objective, width = config.objective, _output_width(config)
    gathered, estimates = 0, 0
    if isinstance(objective, InBatchSoftmaxConfig):
        gathered = config.train.global_batch_size * width if objective.negatives == "global" else 0
        if objective.log_q == "streaming":
            estimates = 8 * min(_num_items(config, specs), objective.log_q_buckets)
    elif isinstance(objective, DrawsNegatives):
        gathered = objective.num_negatives * width
    elif isinstance(objective, SoftmaxConfig):
        gathered = max(spec.num_embeddings for spec in specs) * width
    linears = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    process = 0
    if cluster.machine.device == "cpu":
        decoded = 0 if sample is None else sample.decoded_bytes
        process = PROCESS_BYTES + (decoded if decoded <= config.data.cache_bytes else 0)
        process += _bytes_per_id(config) * _num_ids(config, specs)
    return DenseCost(
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        state_bytes=sum(layer.state_bytes for layer in layers) + estimates,
        numbers_per_row=sum(linears) + round(2 * width * _vectors_per_row(config, sample)),
        numbers_gathered=gathered,
        process_bytes=process,
    )


def _bytes_per_id(config: Config) -> int:
    """Returns what each process keeps of each id at the most, as it is made: counts, shares, their sums, a tree."""
    objective = config.objective
    if isinstance(objective, HierarchicalSoftmaxConfig):
        return TREE_BYTES_PER_ID
    draws = isinstance(objective, DrawsNegatives) and objective.distribution == "popularity"
    subsamples = isinstance(config.model, ItemEmbeddingConfig) and config.model.subsample is not None
    return DRAWN_BYTES_PER_ID if draws or subsamples else 0


def _num_ids(config: Config, specs: Sequence[TableSpec]) -> int:
    """Returns how many ids are drawn from, or are leaves of the tree."""
    if not isinstance(config.model, ItemEmbeddingConfig):
        return _num_items(config, specs)
    sequence = config.model.sequence
    return next(spec.num_ids for spec in specs if sequence in {lookup.key for lookup in spec.lookups})


def _vectors_per_row(config: Config, sample: LookupSample | None) -> float:
    """Returns how many queries, or as many candidates, a row has: of a list each place is a centre and a context."""
    return places_per_row(config, sample) if isinstance(config.model, ItemEmbeddingConfig) else 1.0


def _output_width(config: Config) -> int:
    """Returns the numbers of a query or candidate; of a custom model they are not known."""
    if isinstance(config.model, ItemEmbeddingConfig | SASRecConfig):
        return config.width(config.model.sequence)
    return config.tower_width(config.model.user) if isinstance(config.model, TwoTowerConfig) else 0


def _num_items(config: Config, specs: Sequence[TableSpec]) -> int:
    item_id = config.identity("item_id")
    return next((spec.num_ids for spec in specs if item_id in {lookup.key for lookup in spec.lookups}), 0)
