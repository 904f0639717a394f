"""A run that goes on where another one ended: with its weights and all that it has learnt, on the data that came since.

The new run has a folder, an order, a ledger and an audit of its own, over the new partitions alone. What it takes over
stands in `continued_from.json`: the checkpoint, and what the former runs have kept of their data.
"""

from __future__ import annotations

__all__ = ["Continuation", "check_can_grow", "continuation_of", "keep_continuation", "take_over"]

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from embedshard.config import Config, Loaded, differences
from embedshard.config.parts import EachPartition, HierarchicalSoftmaxConfig, ManagedVocabulary
from embedshard.data.inventory import Inventory
from embedshard.data.partitions import Former
from embedshard.errors import CheckpointError, ConfigError
from embedshard.storage import reaching
from embedshard.train.checkpoint import Checkpoint, newest_intact, open_step
from embedshard.train.run_directory import RunDirectory, is_below

_FILE: Final = "continued_from.json"

_FREE_TO_CHANGE: Final = (
    "name", "seed", "data", "train", "evaluate", "checkpoint", "tracking", "sharding",
    "features.*.column", "features.*.unknown", "features.*.null", "features.*.missing",
    "tables.*.vocabulary.path", "tables.*.vocabulary.buckets", "tables.*.init", "tables.*.init_from",
    "tables.*.l2_lookup", "tables.*.sharding",
    "tables.*.optimizer.lr", "tables.*.optimizer.eps", "tables.*.optimizer.betas",
    "optimizer.tables.lr", "optimizer.tables.eps", "optimizer.tables.betas",
    "optimizer.dense.lr", "optimizer.dense.clip_norm", "optimizer.schedule",
    "objective.temperature", "objective.num_negatives", "objective.distribution", "objective.alpha", "objective.margin",
    "objective.negative_weight", "objective.mask_accidental_hits", "objective.mask_list",
    "objective.negatives", "objective.label_smoothing",
)  # fmt: skip
"""What may differ from the run that is continued: weights, state and vocabularies mean the same under all of it."""


@dataclass(frozen=True)
class Continuation:
    """What a run takes over.

    Attributes:
        run: the folder of the run that it continues.
        step: of the checkpoint.
        inherited: what that run has kept of its data, as `open_dataset` takes it.
    """

    run: str
    step: int
    inherited: dict[str, Any]

    def checkpoint(self) -> Checkpoint:
        """Opens the checkpoint.

        Raises:
            CheckpointError: if it is not there any more, or damaged.
        """
        root = RunDirectory(self.run).checkpoints
        with reaching(root):
            return open_step(root, self.step)


def continuation_of(run: RunDirectory) -> Continuation | None:
    """Returns what a run takes over; None if it continues none."""
    kept = run.read_json(_FILE)
    return None if kept is None else Continuation(kept["run"], kept["step"], kept["inherited"])


def keep_continuation(run: RunDirectory, continues: Continuation | None) -> None:
    """Notes in the folder of a new run what it takes over, and nothing else of the kind."""
    with reaching(run.folder):
        for name in (_FILE, "plan.json"):
            run.folder.join(name).delete_file()  # of a start that came to nothing
    if continues is None:
        return
    run.write_json(_FILE, {"run": continues.run, "step": continues.step, "inherited": continues.inherited})
    _copy_vocabularies(RunDirectory(continues.run), run)
    plan = RunDirectory(continues.run).read_json("plan.json")
    if plan is not None:  # kept where world and config still are those: sums are added up in the same order then
        run.write_json("plan.json", plan)


def _copy_vocabularies(former: RunDirectory, run: RunDirectory) -> None:
    """Copies the vocabularies that the former run has counted: they say which row is whose."""
    with reaching(former.vocabularies):
        names = former.vocabularies.list_names() if former.vocabularies.exists() else []
    if not names:
        return
    with tempfile.TemporaryDirectory(prefix="embedshard-vocabularies-") as folder:
        for name in names:
            copy = Path(folder) / name
            with reaching(former.vocabularies.join(name)):
                former.vocabularies.join(name).get_file(copy)
            with reaching(run.vocabularies):
                run.vocabularies.make_dirs()
                run.vocabularies.join(name).put_file(copy)


def take_over(former: RunDirectory, loaded: Loaded, environment: Mapping[str, str]) -> tuple[Continuation, str]:
    """Returns what a new run takes over from one that has ended, and a sentence about it.

    Raises:
        ConfigError: if the former run's weights mean something else under the new run's config.
        CheckpointError: if the former run has not ended, or has no intact checkpoint.
    """
    _check_config(former, loaded, environment)
    inventory = former.read_json("inventory.json")
    with reaching(former.checkpoints):
        checkpoint = newest_intact(former.checkpoints)
    if checkpoint is None or inventory is None:
        raise CheckpointError(
            f"{former.folder.uri} has no checkpoint yet, so there is nothing to continue. Train it first: "
            f"embedshard train --resume {former.folder.quoted}."
        )
    planned = _planned_steps(former.load_config(environment).config, inventory)
    ended_at = (former.read_json("result.json") or {}).get("steps")
    if checkpoint.step != planned and checkpoint.step != ended_at:
        raise CheckpointError(
            f"{former.folder.uri} has not ended: its newest checkpoint is of step {checkpoint.step} of {planned}, and the "
            "rows of the other steps would never be trained. Let it end first: embedshard train --resume "
            f"{former.folder.uri}."
        )
    earlier = Former.from_json(inventory.get("former"))
    names = inventory.get("names") or [""] * len(inventory["partitions"])
    together = Former(
        (*earlier.names, *names),
        (*earlier.inventories, *map(Inventory.from_json, inventory["partitions"])),
        earlier.steps + checkpoint.step,
    )
    _check_schedule(loaded.config, together.steps)
    taken = {name: inventory[name] for name in ("statistics", "vocabularies", "tokenizers") if name in inventory}
    inherited = taken | {"former": together.to_json()}
    short = planned - checkpoint.step
    early = f" It ended early: {short} steps of its data are not trained, and will not be." if short > 0 else ""
    told = f"Continues {former.folder.uri} after step {checkpoint.step}.{early}"
    return Continuation(former.folder.address, checkpoint.step, inherited), told


def check_can_grow(config: Config, is_watching: bool) -> None:
    """Checks that a config can be trained on data that come after a run has begun.

    Raises:
        ConfigError: naming what cannot.
    """
    if isinstance(config.objective, HierarchicalSoftmaxConfig):
        raise ConfigError(
            "objective 'hierarchical_softmax' goes down a tree that is made of the ids' counts when a run begins, so with "
            "other data its nodes would mean something else. Choose 'negative_sampling' or 'sampled_softmax' for days that "
            "follow."
        )
    if not is_watching:
        return
    if not isinstance(config.data.partitions, EachPartition):
        raise ConfigError(
            "--watch waits for partitions by one pattern: give the config data.partitions: {each: GLOB}, such as "
            "{each: days/day=*}."
        )
    if config.train.epochs != 1:
        raise ConfigError(
            f"--watch trains each partition once, as it comes, and train.epochs is {config.train.epochs}. Set it to 1, or "
            "train the partitions that are there without --watch and go on with --continue."
        )
    if config.data.validation_fraction is not None:
        raise ConfigError(
            "--watch: data.validation_fraction is a share of all training rows, and nobody knows yet how many there will "
            "be. Give data.validation files, or evaluate.progressive."
        )
    schedule = config.optimizer.schedule
    if schedule.decay != "none" and schedule.decay_steps is None:
        raise ConfigError(
            "--watch: optimizer.schedule decays over the rest of the run, which has no end. Give "
            "optimizer.schedule.decay_steps, or decay: none."
        )


def _check_config(former: RunDirectory, loaded: Loaded, environment: Mapping[str, str]) -> None:
    saved = former.load_config(environment)
    ours, theirs = (each.config.model_dump(mode="json") for each in (loaded, saved))
    changed = [
        f"  {path}: {was!r} in the run, {now!r} now"
        for path, now, was in differences(ours, theirs)
        if not is_below(path, _FREE_TO_CHANGE)
    ]
    for name, table in loaded.config.tables.items():
        was = saved.config.tables.get(name)
        if was is None or not all(isinstance(each.vocabulary, ManagedVocabulary) for each in (was, table)):
            continue
        before, now = (each.config.num_buckets(name) for each in (saved, loaded))
        if before != now:
            changed.append(f"  tables.{name}.vocabulary.buckets: {before} in the run, {now} now (data.lanes, if not given)")
    if changed:
        raise ConfigError(
            f"{former.folder.uri} cannot be continued with this config, under which its weights mean something else:\n"
            + "\n".join(changed)
            + "\nUse its own config (leave CONFIG out), or start a new run without --continue."
        )


def _check_schedule(config: Config, former_steps: int) -> None:
    schedule = config.optimizer.schedule
    if schedule.decay == "none" or schedule.decay_steps is None or schedule.final > 0:
        return
    if former_steps >= schedule.warmup_steps + schedule.decay_steps:
        raise ConfigError(
            f"optimizer.schedule has fallen to final=0 after {schedule.warmup_steps + schedule.decay_steps} steps, and the "
            f"runs before have done {former_steps}: nothing would be trained. Set optimizer.schedule.final above 0, raise "
            "decay_steps, or leave decay_steps out: the decay is over each run's own steps then."
        )


def _planned_steps(config: Config, inventory: Mapping[str, Any]) -> int:
    planned = config.train.epochs * int(inventory["epoch_steps"])
    return planned if config.train.max_steps is None else min(planned, config.train.max_steps)
