"""The loop. Read this first.

`train` is the one entry that every launcher calls: in one process, in many, under Ray. What it calls lies one level down:
the order and the reading of the data in `data/`, the step in `step.py`, what a checkpoint holds in `snapshot.py`.
"""

from __future__ import annotations

__all__ = ["TrainResult", "train"]

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

from embedshard import __version__
from embedshard.config import Config
from embedshard.data.order import Position
from embedshard.data.quarantine import Quarantine, most_allowed, too_many, write_record
from embedshard.evaluate.ranking import higher_is_better
from embedshard.evaluate.yardsticks import Comparison
from embedshard.models.summary import sharding_exceptions
from embedshard.sharding.managed import ManagedTables
from embedshard.sharding.recorded import RecordedPlan
from embedshard.storage import Location
from embedshard.train.assembly import Assembly, assemble
from embedshard.train.checkpoint import Checkpoint, Checkpointer, open_step
from embedshard.train.days import Days
from embedshard.train.ledger import Ledger
from embedshard.train.run_directory import Origin, RunDirectory
from embedshard.train.selection import selected_metric, why_not_judged
from embedshard.train.snapshot import pieces, restore, restore_model
from embedshard.train.state import TrainState, due
from embedshard.train.step import StepResult
from embedshard.train.stop import Notices, StopSignal
from embedshard.train.stopwatch import Stopwatch, grouped, over_ranks
from embedshard.train.tracking import Reporter
from embedshard.train.unlearnt import check_learnt
from embedshard.train.warm_start import start_warm
from embedshard.world import World


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    Attributes:
        stopped_by: the signal that ended it early, if one did; it can be resumed then.
        step: steps done.
        metrics: of the test set at the selected checkpoint; empty if it was stopped or has no test set.
    """

    stopped_by: str | None
    step: int
    metrics: dict[str, float]


def train(
    config: Config,
    world: World,
    run: RunDirectory,
    reporter: Reporter,
    resume_from: Checkpoint | None = None,
    notices: Notices | None = None,
    plan: RecordedPlan | None = None,
    poll_s: float | None = None,
) -> TrainResult:
    """Trains a config to its end, or until it is asked to stop. Collective.

    A run that continues another (`continuation.py`) begins with its weights and trains the partitions that are new.

    Args:
        config: what is trained.
        world: the processes that train together.
        run: the run's folder, the same for all ranks.
        reporter: told by rank 0 alone.
        resume_from: where the run goes on; None begins it.
        notices: what this rank is asked from outside; None listens for SIGTERM and SIGINT.
        plan: which table lies where; None keeps the run's own plan where it still fits, else makes one.
        poll_s: seconds between looks for new partitions, which the run then waits for until it is asked to stop; None ends
            it with those that there are.

    Raises:
        ConfigError, DataError, PlanError, CheckpointError, TrainingError: what a user can act on.
    """
    begin = time.monotonic()
    notices = notices or StopSignal()
    days = Days(config, run, world, reporter, poll_s)
    kept, own_plan = days.kept(), plan or _own_plan(world, run)
    partitions = days.first(kept, notices)
    if partitions == []:
        return TrainResult(notices.stop or "another rank", 0, {})
    is_new = resume_from is None and days.continues is None
    parts = assemble(
        config, world, kept, None, own_plan, reporter.prepared, run.vocabularies, partitions, initialises=is_new
    )
    state = TrainState()
    if is_new:
        start_warm(parts, run, reporter)
    elif resume_from is None and days.continues is not None:
        former = days.continues.checkpoint()
        restore(former, parts.model, parts.optimizers, parts.objective, parts.managed, is_same_run=False)
        if parts.managed is not None:
            parts.managed.count_steps_anew()
    if resume_from is not None:
        restore(resume_from, parts.model, parts.optimizers, parts.objective, parts.managed)
        state = TrainState.from_json(resume_from.state["train"])
    if world.is_rank_zero:
        run.write_json("inventory.json", parts.dataset.resolved())
        run.write_tokenizers(parts.dataset.tokenizers)
        run.write_json("plan.json", parts.plan.to_json())
    _say_skipped(parts.dataset.skipped_files, reporter)
    if not days.waits:
        _say_left(parts.dataset.newer, reporter)
    for exception in sharding_exceptions(config, parts.specs):
        reporter.said(exception)
    origin = None if resume_from is None else Origin(step=resume_from.step, attempt=int(resume_from.attempt))
    attempt = world.broadcast_object(run.begin_attempt(world.world_size, origin) if world.is_rank_zero else None)
    if world.is_rank_zero:
        Quarantine.forget_after(run.quarantine, state.step)  # a former attempt that lives adds no more to it
    with Checkpointer(
        root=run.checkpoints,
        rank=world.rank,
        world_size=world.world_size,
        attempt=f"{attempt.attempt:04d}",
        mode=config.checkpoint.mode,
        memory_bytes=config.checkpoint.memory_bytes,
    ) as checkpointer:
        ledger = Ledger(run.ledger, attempt.attempt, world.rank)
        quarantine = Quarantine(run.quarantine, world.rank, parts.dataset.train)
        check = partial(run.check_not_replaced, attempt)
        training = _Training(parts, state, reporter, checkpointer, ledger, quarantine, check, days)
        try:
            stopped_by = training.run(notices)
        finally:
            if not run.is_replaced(attempt):
                ledger.close()
                quarantine.flush()
    run.check_not_replaced(attempt)
    if stopped_by is not None:
        result = TrainResult(stopped_by, state.step, {})
    else:
        result = _conclude(parts, state, run, reporter, training, attempt.attempt, time.monotonic() - begin)
    world.barrier()  # the ledgers of all are whole
    if world.is_rank_zero:
        reporter.saving()
        _leave_report(run.folder, reporter)
    return result


def _own_plan(world: World, run: RunDirectory) -> RecordedPlan | None:
    """Returns the plan that the run had when it was last started, to be kept where config and world still are those.

    A run that goes on in the same world then adds its sums up in the same order: TorchRec's planner need not choose alike
    twice. Collective.
    """
    saved = world.from_rank_zero(lambda: run.read_json("plan.json"))
    return None if saved is None else RecordedPlan.from_json(saved, run.folder.join("plan.json").uri, is_binding=False)


class _Training:
    """The state of the loop and its cadences."""

    def __init__(
        self,
        parts: Assembly,
        state: TrainState,
        reporter: Reporter,
        checkpointer: Checkpointer,
        ledger: Ledger,
        quarantine: Quarantine,
        check_not_replaced: Callable[[], None],
        days: Days,
    ) -> None:
        self.parts, self.state, self.reporter = parts, state, reporter
        self.checkpointer, self.ledger, self.quarantine = checkpointer, ledger, quarantine
        self.check_not_replaced = check_not_replaced
        self.days = days
        self.num_steps = parts.num_steps
        self.stopwatch = Stopwatch(parts.laps)
        self.samples = self.steps = 0  # of this attempt
        self.has_said_why_not = False

    def run(self, notices: Notices) -> str | None:
        """Takes the steps that are left; returns the signal that ended it early, if one did."""
        self.reporter.started(self.state.step, self.num_steps)
        with notices:
            stopped_by = self._train(notices)
            while self.days.waits and stopped_by is None and not self._has_ended:
                self._rest()
                if not self.days.take_next(self.parts, notices, self.check_not_replaced):
                    return notices.stop or "another rank"
                self.num_steps = self.parts.num_steps
                stopped_by = self._train(notices)
        return stopped_by

    @property
    def _has_ended(self) -> bool:
        """Whether the run ends here even if there are more partitions to come."""
        train = self.parts.config.train
        return self.state.has_stopped_early(train.early_stopping) or train.max_steps == self.state.step

    def _rest(self) -> None:
        """Leaves the folder as a run leaves it that may be killed while it waits."""
        self.checkpointer.wait()
        if self.parts.world.is_rank_zero:
            self.reporter.saving()
            _leave_report(self.checkpointer.root.parent, self.reporter, is_over=False)

    def _train(self, notices: Notices) -> str | None:
        """Trains the partitions that there are; returns the signal that ended it early, if one did."""
        config, state, steps = self.parts.config, self.state, self.num_steps
        reader = self.parts.reader()
        self.stopwatch.watch_reader(reader.laps)
        with reader.batches(state.step, steps) as batches:
            self.stopwatch.restart()
            with_upcoming = pairwise(chain(batches, [None]))
            while state.step < steps and not state.has_stopped_early(config.train.early_stopping):
                self.days.validate_next(self.parts, state)
                self.stopwatch.lap("evaluate")
                batch, upcoming = next(with_upcoming)
                assert batch is not None, "the reader has a batch for each step"
                self.stopwatch.lap("read_wait")
                self.parts.optimizers.set_learning_rates(state.step, steps, self.parts.dataset.former.steps)
                self.stopwatch.lap("dense_update")
                result = self.parts.stepper.take(
                    batch, notices.stop is not None, notices.save, self.parts.dataset.bytes_read, upcoming
                )
                self.ledger.add(batch)
                self.quarantine.add(batch)
                state.step += 1
                state.samples_seen += result.rows
                self.samples, self.steps = self.samples + result.rows, self.steps + 1
                position = batch.training_position
                self._count_bad_rows(position, result)
                self.stopwatch.lap("count")
                self._tell(position, result)
                is_end = state.step == steps
                self._check_learnt(position, result, is_end)
                self.stopwatch.lap("log")
                is_best = self._evaluate(position, is_end)
                self.stopwatch.lap("evaluate")
                ends = is_end or result.stop_asked or state.has_stopped_early(config.train.early_stopping)
                is_due = due(state.step, config.checkpoint.every_steps, position.is_epoch_end)
                is_due = is_due or self.days.end_here(position, self.parts)
                if ends or is_best or is_due or result.save_asked:
                    self._save()
                    notices.save = False
                    self.reporter.measured(state.step, {"checkpoint/seconds": self.stopwatch.lap("checkpoint")})
                if result.stop_asked and not is_end:
                    self.parts.stepper.end()
                    return notices.stop or "another rank"
            self.parts.stepper.end()
        return None

    @property
    def samples_per_second(self) -> float:
        """Rows trained a second of this attempt, evaluations and saves left out."""
        return self.samples / self.stopwatch.training_seconds if self.samples else 0.0

    def _count_bad_rows(self, position: Position, result: StepResult) -> None:
        """Counts what was wrong with a step's rows, and stops the run where too many of the epoch's are set aside."""
        state, data = self.state, self.parts.config.data
        if position.partition == 0 and position.step_in_epoch == 0:
            state.epoch_quarantined = 0
        state.epoch_quarantined += self.parts.tally.add(result.tally, state.bad_rows)
        rows = sum(self.parts.dataset.order.num_rows)
        if state.epoch_quarantined > most_allowed(data.max_bad_fraction, rows):
            self.quarantine.flush()
            folder = self.quarantine.folder
            hints = [
                self.quarantine.example(),
                f"All so far are in {folder.uri}. Correct the rows or what the config says of them and start a new run, or "
                f"allow more and go on: embedshard train --resume {folder.parent.quoted} --set data.max_bad_fraction=SHARE.",
            ]
            what = f"step {state.step}, epoch {position.epoch + 1} of the training data"
            raise too_many(what, state.epoch_quarantined, rows, data.max_bad_fraction, state.bad_rows, hints)

    def _check_learnt(self, position: Position, result: StepResult, is_end: bool) -> None:
        """Says that an epoch had nothing to learn from, and stops a run that never had."""
        state, parts = self.state, self.parts
        state.steps_without_loss = 0 if result.has_loss else state.steps_without_loss + 1
        check_learnt(parts.config, state, position, parts.dataset.order.epoch_steps, is_end, self.reporter.said)

    def _tell(self, position: Position, result: StepResult) -> None:
        step, bad_rows = self.state.step, self.state.bad_rows
        if bad_rows.quarantined or bad_rows.oov_share:
            self.reporter.counted(self.state.samples_seen, bad_rows)
        self.reporter.stepped(step, position.epoch, result.loss, self.samples_per_second)
        if due(step, self.parts.config.train.log_every_steps, False) or step == self.num_steps:
            for news in self.parts.compiled.news() if self.parts.compiled is not None else ():
                self.reporter.said(news)
            watched = self.parts.streaming.measure() if self.parts.streaming is not None else {}
            own = self.stopwatch.means(self.steps, self.checkpointer.background_seconds)
            means = over_ranks(own, self.parts.world)
            self.reporter.measured(
                step,
                {
                    **{f"train/{name}": value for name, value in watched.items()},
                    "train/loss": result.loss,
                    "train/epoch": position.epoch,
                    "train/samples_per_second": self.samples_per_second,
                    **{f"train/seconds/{group}": mean for group, mean in grouped(own.stages).items()},
                    **{f"train/waterfall/{stage}": mean for stage, mean in means.stages.items()},
                    **{f"train/beside/{what}": mean for what, mean in means.beside.items()},
                    "train/bytes_read": result.bytes_read,
                    **({"train/quarantined": bad_rows.quarantined} if bad_rows.quarantined else {}),
                    **{f"train/oov/{name}": count / bad_rows.ids[name] for name, count in bad_rows.oov.items() if count},
                    **_vocabulary_metrics(self.parts.managed),
                    **{f"train/cache/{name}": rate for name, rate in self.parts.caches.measure().items()},
                },
            )

    def _evaluate(self, position: Position, is_end: bool) -> bool:
        """Looks at the validation set when it is time to; returns whether the model is the best so far."""
        config, state = self.parts.config, self.state
        if not self.parts.evaluator.has("validation"):
            return False
        if not (is_end or due(state.step, config.evaluate.every_steps, position.is_epoch_end)):
            return False
        with self.parts.caches.left_out():
            values = self.parts.evaluator.evaluate(self.parts.model, "validation")
        self.reporter.measured(state.step, {f"validation/{name}": value for name, value in values.items()})
        why_not = why_not_judged(config, values, state.step)
        if why_not is not None and not self.has_said_why_not:
            self.reporter.said(why_not)
            self.has_said_why_not = True
        selected = selected_metric(config)
        min_delta = config.train.early_stopping.min_delta if config.train.early_stopping else 0.0
        return state.judge(values[selected], higher_is_better(selected), min_delta)

    def _save(self) -> None:
        parts, decided = self.parts, self.checkpointer.decision
        self.check_not_replaced()
        self.ledger.flush()
        self.quarantine.flush()
        if parts.streaming is not None:
            parts.streaming.gather()
        self.reporter.saving()
        self.checkpointer.save(
            self.state.step,
            lambda: pieces(parts.model, parts.optimizers, parts.objective, parts.world, parts.managed),
            {
                "train": self.state.to_json(),
                "vocabularies": parts.dataset.vocabulary_fingerprints(),
                "data": parts.dataset.fingerprint,
                "partitions": len(parts.dataset.train),
                "embedshard": __version__,
            },
            keep=parts.config.checkpoint.keep,
            protect=set() if self.state.best_step is None else {self.state.best_step},
        )
        if self.checkpointer.decision != decided:
            self.reporter.said(f"Checkpoints: {self.checkpointer.decision}.")


def _vocabulary_metrics(managed: ManagedTables | None) -> dict[str, float]:
    """Returns what became of the ids of managed vocabularies since the last time. Collective."""
    counted = {} if managed is None else managed.take_counts()
    return {
        f"train/vocabulary/{table}/{name}": value
        for table, counts in counted.items()
        for name, value in {
            "admitted": counts.admitted,
            "evicted": counts.evicted,
            "used_rows": counts.used,
            "unknown_share": counts.unknown / max(counts.lookups, 1),
        }.items()
    }


def _say_skipped(files: Sequence[str], reporter: Reporter) -> None:
    if files:
        shown = ", ".join(files[:5]) + (f", and {len(files) - 5} more" if len(files) > 5 else "")
        reporter.said(f"Skipped {len(files)} {'files that are' if len(files) > 1 else 'file that is'} not Parquet: {shown}.")


def _say_left(newer: Sequence[str], reporter: Reporter) -> None:
    if newer:
        shown = ", ".join(newer[:5]) + (", ..." if len(newer) > 5 else "")
        reporter.said(f"Partitions that came after this run had begun are left to one that continues it: {shown}.")


def _bad_rows(parts: Assembly, state: TrainState) -> dict[str, Any]:
    """Returns what was wrong with each set; one that this attempt had no need to read is read."""
    dataset = parts.dataset
    for split in dataset.held_out:
        if split not in dataset.set_aside:
            dataset.read_held_out(split)
    others = {name: aside.counts.to_json(aside.num_rows) for name, aside in dataset.set_aside.items()}
    return {"train": state.bad_rows.to_json(state.samples_seen)} | others


def _conclude(
    parts: Assembly,
    state: TrainState,
    run: RunDirectory,
    reporter: Reporter,
    training: _Training,
    attempt: int,
    seconds: float,
) -> TrainResult:
    """Evaluates the selected checkpoint on the test set, once, and writes result.json."""
    selected_step = state.step if state.best_step is None else state.best_step
    if selected_step != state.step:
        restore_model(open_step(run.checkpoints, selected_step), parts.model, parts.managed)
    metrics: dict[str, float] = {}
    comparison = Comparison()
    has_test = parts.evaluator.has("test")
    yardsticks = parts.yardsticks(compares=has_test, counts_ids=True)
    if has_test:
        training.stopwatch.restart()
        metrics = parts.evaluator.evaluate(parts.model, "test", yardsticks.slices, in_depth=True)
        training.stopwatch.lap("evaluate")
        reporter.measured(selected_step, {f"test/{name}": value for name, value in metrics.items()})
        comparison = yardsticks.compare("test")
        for sentence in comparison.said():
            reporter.said(sentence)
        reporter.compared(metrics, comparison.metrics)
    result: dict[str, Any] = {
        "metrics": metrics,
        "baselines": comparison.metrics,
        "slices": parts.evaluator.slices.get("test", {}),
        "column_slices": parts.evaluator.column_slices.get("test", {}),
        "intervals": parts.evaluator.intervals.get("test", {}),
        "ids": yardsticks.ids,
        "selected_step": selected_step,
        "best_validation": state.best_value,
        "steps": state.step,
        "attempt": attempt,
        "epochs": state.step / parts.dataset.order.epoch_steps,
        "samples_seen": state.samples_seen,
        "wall_seconds": seconds,
        "samples_per_second": training.samples_per_second,
        "seconds": training.stopwatch.seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "workers": parts.world.world_size,
        "idle_workers": parts.world.idle,
        "evaluated": parts.evaluator.counts,
        "progressive": state.progressive,
        "former_steps": parts.dataset.former.steps,
        "warm_start": run.read_json("warm_start.json") or {},
        "bad_rows": _bad_rows(parts, state),
        "vocabularies": {} if parts.managed is None else parts.managed.described(),
        "skipped_files": parts.dataset.skipped_files,
    }
    result["bytes_read"] = sum(parts.world.gather_objects(parts.dataset.bytes_read))
    if parts.world.is_rank_zero:
        for name, aside in parts.dataset.set_aside.items():
            write_record(run.quarantine, f"{name}.parquet", aside.rows)
        run.write_json("result.json", result)
    return TrainResult(None, state.step, metrics)


def _leave_report(folder: Location, reporter: Reporter, is_over: bool = True) -> None:
    """Writes report.html. The run is done by now: a failure to tell of it is said and fails nothing."""
    from embedshard.report import write_report  # and Jinja, which nothing before the first step needs

    try:
        write_report([folder], is_over=is_over)
    except Exception as error:
        reporter.said(
            f"The report could not be made ({type(error).__name__}: {error}). The run itself is whole. Try again with: "
            f"embedshard report {folder.uri}"
        )
