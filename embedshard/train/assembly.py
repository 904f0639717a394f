"""Puts the parts of a run together: data, model, objective, optimizers, reader, evaluation."""

from __future__ import annotations

__all__ = ["Assembly", "assemble"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embedshard.config import Config, TableSpec, table_specs
from embedshard.config.parts import ManagedVocabulary
from embedshard.data.collate import Collator
from embedshard.data.dataset import Dataset, open_dataset
from embedshard.data.inventory import Inventory
from embedshard.data.partitions import Partition
from embedshard.data.quarantine import Tally
from embedshard.data.reader import BatchReader
from embedshard.data.tokenizer_training import PreparationProgress
from embedshard.evaluate.evaluator import Evaluator
from embedshard.evaluate.label_metrics import prediction_link
from embedshard.evaluate.streaming import StreamingMetrics
from embedshard.evaluate.users import Users
from embedshard.evaluate.yardsticks import Yardsticks
from embedshard.models.objectives.objective import Objective
from embedshard.models.registry import build_model, build_objective
from embedshard.sharding.cache import CacheRates
from embedshard.sharding.managed import ManagedTables
from embedshard.sharding.marks import mark_lookups
from embedshard.sharding.optimizers import Optimizers
from embedshard.sharding.recorded import RecordedPlan, record_plan
from embedshard.sharding.shard import shard_model
from embedshard.stages import STEP_STAGES, Laps
from embedshard.storage import Location
from embedshard.train.compilation import CompiledDense
from embedshard.train.snapshot import table_shards
from embedshard.train.step import Stepper
from embedshard.world import World


@dataclass
class Assembly:
    """The parts of a run, ready to train or to evaluate."""

    config: Config
    world: World
    dataset: Dataset
    specs: tuple[TableSpec, ...]
    model: DistributedModelParallel
    objective: Objective
    optimizers: Optimizers
    stepper: Stepper
    evaluator: Evaluator
    collator: Collator
    tally: Tally
    caches: CacheRates
    laps: Laps
    streaming: StreamingMetrics | None = None
    managed: ManagedTables | None = None
    compiled: CompiledDense | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, if nothing ends it early."""
        planned = self.config.train.epochs * self.dataset.order.epoch_steps
        return planned if self.config.train.max_steps is None else min(planned, self.config.train.max_steps)

    @property
    def plan(self) -> RecordedPlan:
        """Which table lies where."""
        return record_plan(self.model.plan, self.specs, self.world.world_size, self.world.local_world_size)

    def reader(self) -> BatchReader:
        """Returns this rank's reader of the training data."""
        return BatchReader(
            order=self.dataset.order,
            sources=self.dataset.train,
            cached=self.dataset.cached,
            cache_bytes=self.config.data.cache_bytes,
            collator=self.collator,
            sampler=self.dataset.sampler,
            rank=self.world.rank,
            world_size=self.world.world_size,
            former_steps=self.dataset.former.steps,
            pins=self.world.device.type == "cuda",
            threads=self.config.data.threads,
        )

    def grow(self, partition: Partition, inventory: Inventory) -> None:
        """Adds a partition to the training data, after the last one. Collective.

        Raises:
            DataError: if it cannot be read, or its files are others by now.
        """
        dataset = self.dataset
        dataset.grow(partition, inventory, self.world)
        self.collator = Collator(self.config, self.specs, self.tally, dataset.pair_maker, dataset.tree)
        self.evaluator = Evaluator(self.config, dataset, self.collator, self.world, self.objective)

    def yardsticks(self, *, compares: bool, counts_ids: bool) -> Yardsticks:
        """Looks at the training set for all that the model's metrics are seen beside. Collective."""
        return Yardsticks(
            self.config, self.dataset, self.evaluator.sets, self.world, compares=compares, counts_ids=counts_ids
        )


def assemble(
    config: Config,
    world: World,
    resolved: dict[str, Any] | None = None,
    dataset: Dataset | None = None,
    plan: RecordedPlan | None = None,
    progress: PreparationProgress | None = None,
    vocabularies: Location | None = None,
    partitions: Sequence[Partition] | None = None,
    *,
    initialises: bool = True,
) -> Assembly:
    """Opens the data and builds everything else. Collective.

    Args:
        config: the config.
        world: the processes that train together.
        resolved: what a run has kept of its data (inventory, window lengths, statistics, tokenizers): the data must not
            have changed since. None for a new run.
        dataset: one that is open already, of the same data; it is opened where it is None.
        plan: to be replayed; None makes one.
        progress: hears on rank 0 how far it is with what takes long.
        vocabularies: the folder of those that the run counts and keeps; None keeps none.
        partitions: of the training data; None looks for them.
        initialises: whether tables' rows get their first values; not where a checkpoint is restored next.

    Raises:
        ConfigError, DataError, PlanError: as the parts do.
    """
    if config.train.deterministic and world.device.type == "cuda":
        torch.use_deterministic_algorithms(True)
    if dataset is None:
        dataset = open_dataset(config, world, resolved, progress, vocabularies, partitions)
    specs = table_specs(config, dataset.table_rows)
    model = shard_model(build_model(config, specs, world), config, specs, world, plan, initialises=initialises)
    objective = build_objective(config, specs, world).to(world.device)
    streaming = _streaming(config, dataset, world)
    if streaming is not None:
        objective.add_module("streaming", streaming)  # what it has summed up is saved with what the objective estimates
    optimizers = Optimizers(model, config, specs, world)
    managed = _manage(config, world, specs, model, optimizers)
    laps = Laps(STEP_STAGES)
    mark_lookups(model, laps)
    compiles = config.train.compiles
    tally = Tally(dataset.train[0].decoder)
    collator = Collator(config, specs, tally, dataset.pair_maker, dataset.tree)
    return Assembly(
        config=config,
        world=world,
        dataset=dataset,
        specs=specs,
        model=model,
        objective=objective,
        optimizers=optimizers,
        stepper=Stepper(
            model,
            objective,
            optimizers,
            specs,
            world,
            config.seed,
            dataset.describe_row,
            streaming,
            laps,
            config.train.precision,
        ),
        evaluator=Evaluator(config, dataset, collator, world, objective),
        collator=collator,
        tally=tally,
        caches=CacheRates(model, world),
        laps=laps,
        managed=managed,
        streaming=streaming,
        compiled=None if compiles is None else CompiledDense(model, world, compiles),
    )


def _manage(
    config: Config,
    world: World,
    specs: tuple[TableSpec, ...],
    model: DistributedModelParallel,
    optimizers: Optimizers,
) -> ManagedTables | None:
    vocabularies = {
        name: table.vocabulary for name, table in config.tables.items() if isinstance(table.vocabulary, ManagedVocabulary)
    }
    if not vocabularies:
        return None
    buckets = {name: config.num_buckets(name) for name in vocabularies}
    managed = ManagedTables(specs, vocabularies, buckets, world, config.seed)
    managed.attach(model, lambda: table_shards(model, optimizers))
    return managed


def _streaming(config: Config, dataset: Dataset, world: World) -> StreamingMetrics | None:
    """Returns what measures the training rows, if anything does."""
    if not config.train.metrics:
        return None
    is_odds, labels = prediction_link(config) == "sigmoid", list(config.data.label_columns)
    users = Users.known_to(config, dataset)
    return StreamingMetrics(config.train.metrics, labels, is_odds, world, users, config.train.window_rows).to(world.device)
