"""Trains and evaluates in this process: a world of one, or the world that a launcher made this process part of."""

from __future__ import annotations

__all__ = [
    "evaluate_here",
    "evaluate_untrained",
    "load_run_config",
    "open_run",
    "summarise_config",
    "train_here",
    "train_in",
]

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from embedshard.config import Config, Loaded, load_config, table_specs
from embedshard.config.parts import AutoVocabulary, WordsVocabulary
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.errors import ConfigError, nearest
from embedshard.evaluate.held_out import SPLITS, Split
from embedshard.launch.request import TrainRequest
from embedshard.launch.run_tables import open_checkpoint_of
from embedshard.models.summary import Summary, summarise
from embedshard.sharding.recorded import RecordedPlan, read_plan
from embedshard.storage import PathOrUri, reaching
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact, open_step
from embedshard.train.continuation import keep_continuation, take_over
from embedshard.train.loop import TrainResult, train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.train.stop import Notices
from embedshard.train.tracking import ConsoleReporter, JsonLinesReporter, Reporter, Reporters, TensorBoardReporter
from embedshard.train.warm_start import warm_start
from embedshard.world import World, open_world


def train_here(request: TrainRequest, environment: Mapping[str, str], console: Console) -> TrainResult:
    """Trains a config, or continues a run, as the world that this process is part of, and tells where the result lies.

    Raises:
        EmbedshardError: what a user can act on.
    """
    request = request.resolved()
    config = load_run_config(request, environment).config  # a mistake is told before anything is set up
    plan = None if request.plan is None else read_plan(request.plan)
    with open_world(request.device) as world:
        teller = ConsoleReporter(console, config.train.log_every_steps) if world.is_rank_zero else Reporter()
        return train_in(world, request, environment, teller, plan=plan)


def train_in(
    world: World,
    request: TrainRequest,
    environment: Mapping[str, str],
    teller: Reporter,
    notices: Notices | None = None,
    plan: RecordedPlan | None = None,
) -> TrainResult:
    """Trains in a world that is open, and tells where the result lies. Collective.

    Args:
        world: the processes that train together.
        request: a `resolved` one, the same on all ranks.
        environment: gives configs their `${VAR}`.
        teller: what rank 0 tells a person by.
        notices: what this rank is asked from outside; None listens for signals.
        plan: that of `request.plan`, read.

    Raises:
        EmbedshardError: what a user can act on.
    """
    place, step = world.from_rank_zero(lambda: open_run(request, environment, teller))
    run = RunDirectory.open(place)
    config = run.load_config(environment).config
    reporter = _reporter(config, run, teller) if world.is_rank_zero else Reporter()
    resume_from = None if step is None else open_step(run.checkpoints, step)
    try:
        result = train(config, world, run, reporter, resume_from, notices, plan, request.poll_s)
    finally:
        reporter.finished()
    if not world.is_rank_zero:
        return result
    if result.stopped_by is not None:
        where = f"after step {result.step}, with a checkpoint" if result.step else "while it waited for its first partition"
        teller.said(f"Stopped by {result.stopped_by} {where}. Continue with:")
        teller.said(f"  embedshard train --resume {run.folder.quoted}{' --watch' if request.poll_s is not None else ''}")
    else:
        teller.said(f"Result: {run.folder.join('result.json').uri}")
    report = run.folder.join("report.html")
    with reaching(report):
        if report.exists():
            teller.said(f"Report: {report.uri}")
    return result


def load_run_config(request: TrainRequest, environment: Mapping[str, str]) -> Loaded:
    """Returns the config of a `resolved` request.

    Raises:
        ConfigError: if it cannot be read.
    """
    if request.config is not None:
        return load_config(request.config, environment, request.overrides)
    run = request.resume if request.resume is not None else request.continues
    assert run is not None, "a resolved request has one or the other"
    return RunDirectory.open(run).load_config(environment, request.overrides)


def open_run(request: TrainRequest, environment: Mapping[str, str], teller: Reporter) -> tuple[str, int | None]:
    """Makes or opens the folder of a `resolved` request's run; returns it, as given, and the step to go on from.

    Raises:
        ConfigError: if the folder does not fit the request.
        StorageError: if it cannot be reached.
    """
    loaded = load_run_config(request, environment)
    if request.resume is None:
        continues, told = None, ""
        if request.continues is not None:
            continues, told = take_over(RunDirectory.open(request.continues), loaded, environment)
        new = RunDirectory.create(request.run_dir or _default_run_dir(loaded), loaded, environment)
        teller.said(f"Run: {new.folder.uri}")
        keep_continuation(new, continues)
        if continues is not None:
            teller.said(told)
        return new.folder.uri, None
    run = RunDirectory.open(request.resume)
    run.check_same_run(loaded, environment)
    run.save_config(loaded)
    teller.said(f"Run: {run.folder.uri}")
    with reaching(run.checkpoints):
        found = newest_intact(run.checkpoints, on_damage=lambda damage: teller.said(f"Passed over: {damage}"))
    if run.has_begun:
        where = "at its beginning: it has no checkpoint yet" if found is None else f"after step {found.step}"
        teller.said(f"Resumes {where}.")
    return run.folder.uri, None if found is None else found.step


def _default_run_dir(loaded: Loaded) -> Path:
    name = loaded.config.name or Path(loaded.source).stem
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def _reporter(config: Config, run: RunDirectory, teller: Reporter) -> Reporter:
    reporters = [teller, JsonLinesReporter(run.folder.join("metrics.jsonl"), run.num_attempts + 1)]
    if config.tracking.tensorboard:
        reporters.append(TensorBoardReporter(run.folder.join("tensorboard")))
    return Reporters(reporters)


def evaluate_here(
    run_dir: PathOrUri,
    checkpoint_step: int | None,
    device: str,
    environment: Mapping[str, str],
    *,
    with_baselines: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Returns a checkpoint's metrics: `step`, and a dict for each of `validation` and `test` that there is.

    With baselines, also `baselines` (of the test set; of the validation set where there is no other) and its `slices`;
    `say` is told which baselines were left out and why.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    config = run.load_config(environment).config
    checkpoint = open_checkpoint_of(run, checkpoint_step)
    with open_world(device) as world:
        parts = assemble(config, world, run.read_json("inventory.json"), vocabularies=run.vocabularies, initialises=False)
        restore_model(checkpoint, parts.model, parts.managed)
        found: dict[str, Any] = {"step": checkpoint.step}
        splits: list[Split] = [split for split in SPLITS if parts.evaluator.has(split)]
        yardsticks = parts.yardsticks(compares=with_baselines and bool(splits), counts_ids=False)
        for split in splits:
            found[split] = parts.evaluator.evaluate(parts.model, split, yardsticks.slices, in_depth=split == splits[-1])
        if with_baselines and splits:
            comparison = yardsticks.compare(splits[-1])
            for sentence in comparison.said():
                say(sentence)
            found["baselines"] = comparison.metrics
            found["slices"] = parts.evaluator.slices.get(splits[-1], {})
            found["column_slices"] = parts.evaluator.column_slices.get(splits[-1], {})
            found["intervals"] = parts.evaluator.intervals.get(splits[-1], {})
    if not splits:
        raise ConfigError(f"{run.config_file.uri}: nothing to measure. It needs evaluate.metrics and data.test.")
    return found


def evaluate_untrained(run_dir: PathOrUri, split: Split, device: str, environment: Mapping[str, str]) -> dict[str, float]:
    """Returns the metrics of a run's model as it was before its first step: every score is to be seen beside these.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    with open_world(device) as world:
        config = run.load_config(environment).config
        parts = assemble(config, world, run.read_json("inventory.json"), vocabularies=run.vocabularies)
        warm_start(config, parts.dataset.vocabularies, parts.model, world)
        return parts.evaluator.evaluate(parts.model, split)


def summarise_config(
    config_path: Path, overrides: Sequence[str], environment: Mapping[str, str], ids: Sequence[str] = ()
) -> Summary:
    """Describes what a config builds; reads its vocabularies, not its data. `ids` are tables' numbers of ids, `table=N`.

    Raises:
        EmbedshardError: what a user can act on.
    """
    config = load_config(config_path, environment, overrides).config
    for name, table in config.tables.items():
        if isinstance(table.vocabulary, AutoVocabulary) and table.known_rows is None:
            raise ConfigError(
                f"tables.{name}.vocabulary is auto, so its rows are known when a run has counted the ids. To see the rest, "
                f"say how many there are at most: --set tables.{name}.vocabulary.max_size=1000000; or count them: "
                f"embedshard vocabulary build {config_path}."
            )
        if isinstance(table.vocabulary, WordsVocabulary) and table.vocabulary.path is None and table.known_rows is None:
            raise ConfigError(
                f"tables.{name}.vocabulary.num_words is null, so its rows are known when a run has counted the words. To "
                f"see the rest, take a number for it: --set tables.{name}.vocabulary.num_words=100000."
            )
    return summarise(config, table_specs(config, table_rows(load_vocabularies(config))), _numbers_of_ids(config, ids))


def _numbers_of_ids(config: Config, ids: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in ids:
        table, _, number = text.partition("=")
        if table not in config.tables:
            raise ConfigError(f"--ids {text}: there is no table '{table}'. {nearest(table, config.tables)}")
        if not number.replace("_", "").isdecimal() or not int(number):
            raise ConfigError(f"--ids {text}: '{number}' is no number of ids. Give it as --ids {table}=1000000.")
        found[table] = int(number)
    return found
