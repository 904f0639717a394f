"""The loop. Read this first.

`train` is the one entry that every launcher calls: in one process, in many, under Ray. What it calls lies one level down:
the order and the reading of the data in `data/`, the step in `step.py`, what a checkpoint holds in `snapshot.py`.
"""

from __future__ import annotations

__all__ = ["TrainResult", "train"]

import resource
import time
from dataclasses import dataclass
from typing import Any

from embedshard import __version__
from embedshard.config import Config
from embedshard.data.order import Position
from embedshard.evaluate.ranking import higher_is_better
from embedshard.report import write_report
from embedshard.train.assembly import Assembly, assemble
from embedshard.train.checkpoint import Checkpoint, Checkpointer, open_step
from embedshard.train.ledger import Ledger
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import pieces, restore, restore_model
from embedshard.train.state import TrainState, due
from embedshard.train.stop import StopSignal
from embedshard.train.tracking import Reporter
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
    config: Config, world: World, run: RunDirectory, reporter: Reporter, resume_from: Checkpoint | None = None
) -> TrainResult:
    """Trains a config to its end, or until it is asked to stop. Collective.

    Args:
        config: what is trained.
        world: the processes that train together.
        run: the run's folder, the same for all ranks.
        reporter: told by rank 0 alone.
        resume_from: where the run goes on; None begins it.

    Raises:
        ConfigError, DataError, PlanError, CheckpointError, TrainingError: what a user can act on.
    """
    begin = time.monotonic()
    parts = assemble(config, world, run.read_json("inventory.json"))
    state = TrainState()
    if resume_from is not None:
        restore(resume_from, parts.model, parts.optimizers, parts.objective)
        state = TrainState.from_json(resume_from.state["train"])
    if world.is_rank_zero:
        run.write_json("inventory.json", parts.dataset.resolved())
    attempt = world.broadcast_object(run.begin_attempt(world.world_size) if world.is_rank_zero else None)
    with Checkpointer(
        root=run.checkpoints,
        rank=world.rank,
        world_size=world.world_size,
        attempt=f"{attempt:04d}",
        mode=config.checkpoint.mode,
        memory_bytes=config.checkpoint.memory_bytes,
    ) as checkpointer:
        ledger = Ledger(run.path / "ledger", attempt, world.rank)
        training = _Training(parts, state, reporter, checkpointer, ledger)
        try:
            stopped_by = training.run()
        finally:
            ledger.close()
    if stopped_by is not None:
        result = TrainResult(stopped_by, state.step, {})
    else:
        result = _conclude(parts, state, run, reporter, training, time.monotonic() - begin)
    if world.is_rank_zero:
        _leave_report(run, reporter)
    return result


class _Training:
    """The state of the loop and its cadences."""

    def __init__(
        self, parts: Assembly, state: TrainState, reporter: Reporter, checkpointer: Checkpointer, ledger: Ledger
    ) -> None:
        self.parts, self.state, self.reporter = parts, state, reporter
        self.checkpointer, self.ledger = checkpointer, ledger
        self.num_steps = _num_steps(parts)
        self.seconds = 0.0  # in steps, evaluations and saves left out
        self.samples = 0

    def run(self) -> str | None:
        """Takes the steps that are left; returns the signal that ended it early, if one did."""
        config, state, steps = self.parts.config, self.state, self.num_steps
        self.reporter.started(state.step, steps)
        with self.parts.reader().batches(state.step, steps) as batches, StopSignal() as stop:
            while state.step < steps and not state.has_stopped_early(config.train.early_stopping):
                begin = time.monotonic()
                batch = next(batches)
                self.parts.optimizers.set_learning_rates(state.step, steps)
                result = self.parts.stepper.take(batch, stop_asked=stop.asked is not None)
                self.ledger.add(batch)
                state.step += 1
                state.samples_seen += result.rows
                self.samples += result.rows
                self.seconds += time.monotonic() - begin
                self._tell(batch.training_position, result.loss)
                is_end = state.step == steps
                is_best = self._evaluate(batch.training_position, is_end)
                ends = is_end or result.stop_asked or state.has_stopped_early(config.train.early_stopping)
                if ends or is_best or due(state.step, config.checkpoint.every_steps, batch.training_position.is_epoch_end):
                    self._save()
                if result.stop_asked and not is_end:
                    return stop.asked.name if stop.asked is not None else "another rank"
        return None

    @property
    def samples_per_second(self) -> float:
        """Rows trained a second of this attempt, evaluations and saves left out."""
        return self.samples / self.seconds if self.seconds else 0.0

    def _tell(self, position: Position, loss: float) -> None:
        step = self.state.step
        self.reporter.stepped(step, position.epoch, loss, self.samples_per_second)
        if due(step, self.parts.config.train.log_every_steps, False) or step == self.num_steps:
            self.reporter.measured(
                step,
                {
                    "train/loss": loss,
                    "train/epoch": position.epoch,
                    "train/samples_per_second": self.samples_per_second,
                },
            )

    def _evaluate(self, position: Position, is_end: bool) -> bool:
        """Looks at the validation set when it is time to; returns whether the model is the best so far."""
        config, state = self.parts.config, self.state
        if not self.parts.evaluator.has("validation"):
            return False
        if not (is_end or due(state.step, config.evaluate.every_steps, position.is_epoch_end)):
            return False
        values = self.parts.evaluator.evaluate(self.parts.model, "validation")
        self.reporter.measured(state.step, {f"validation/{name}": value for name, value in values.items()})
        selected = config.evaluate.select or config.evaluate.metrics[0]
        min_delta = config.train.early_stopping.min_delta if config.train.early_stopping else 0.0
        return state.judge(values[selected], higher_is_better(selected), min_delta)

    def _save(self) -> None:
        parts, decided = self.parts, self.checkpointer.decision
        self.ledger.flush()
        self.checkpointer.save(
            self.state.step,
            lambda: pieces(parts.model, parts.optimizers, parts.objective, parts.world),
            {
                "train": self.state.to_json(),
                "vocabularies": parts.dataset.vocabulary_fingerprints(),
                "data": parts.dataset.fingerprint,
                "embedshard": __version__,
            },
            keep=parts.config.checkpoint.keep,
            protect=set() if self.state.best_step is None else {self.state.best_step},
        )
        if self.checkpointer.decision != decided:
            self.reporter.said(f"Checkpoints are written {self.checkpointer.decision}.")


def _num_steps(parts: Assembly) -> int:
    planned = parts.config.train.epochs * parts.dataset.order.epoch_steps
    return planned if parts.config.train.max_steps is None else min(planned, parts.config.train.max_steps)


def _conclude(
    parts: Assembly, state: TrainState, run: RunDirectory, reporter: Reporter, training: _Training, seconds: float
) -> TrainResult:
    """Evaluates the selected checkpoint on the test set, once, and writes result.json."""
    selected_step = state.step if state.best_step is None else state.best_step
    if selected_step != state.step:
        restore_model(open_step(run.checkpoints, selected_step), parts.model)
    metrics: dict[str, float] = {}
    if parts.evaluator.has("test"):
        metrics = parts.evaluator.evaluate(parts.model, "test")
        reporter.measured(selected_step, {f"test/{name}": value for name, value in metrics.items()})
    result: dict[str, Any] = {
        "metrics": metrics,
        "selected_step": selected_step,
        "best_validation": state.best_value,
        "steps": state.step,
        "epochs": state.step / parts.dataset.order.epoch_steps,
        "samples_seen": state.samples_seen,
        "wall_seconds": seconds,
        "samples_per_second": training.samples_per_second,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "workers": parts.world.world_size,
        "evaluated": parts.evaluator.counts,
    }
    if parts.world.is_rank_zero:
        run.write_json("result.json", result)
    return TrainResult(None, state.step, metrics)


def _leave_report(run: RunDirectory, reporter: Reporter) -> None:
    """Writes report.html. The run is done by now: a failure to tell of it is said and fails nothing."""
    try:
        write_report([run.path], is_over=True)
    except Exception as error:
        reporter.said(
            f"The report could not be made ({type(error).__name__}: {error}). The run itself is whole. Try again with: "
            f"embedshard report {run.path}"
        )
