"""Whole steps: the loop itself, for a while, and the waterfall that it logs."""

from __future__ import annotations

__all__ = ["Steps", "take_steps"]

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

from embedshard.config import Config, Loaded
from embedshard.config.parts import EvaluateConfig, TrackingConfig
from embedshard.stages import BESIDE, STEP_STAGES, Waterfall
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.world import World

_LINE: Final = 10  # steps between measurements
_EPOCHS: Final = 10_000
_FEWEST_LINES: Final = 3
_PATIENCE: Final = 20


@dataclass
class Steps:
    """The steps of a training that was watched.

    Attributes:
        workers: that trained.
        batch_size: rows of a step, over all workers.
        steps: that were watched, after those of the warm-up.
        wall: seconds of each step from its begin to the next one's, by a clock of its own: means over ten steps each.
        waterfall: the mean step, over all workers, as it was logged.
        window: steps of a window where less than one was watched, so that what a step waits for data is not known; None
            where that is known.
    """

    workers: int
    batch_size: int
    steps: int
    wall: tuple[float, ...]
    waterfall: Waterfall
    window: int | None = None

    @property
    def mean_wall(self) -> float:
        """Seconds of a step, by the clock of its own."""
        return sum(self.wall) / len(self.wall)

    @property
    def samples_per_second(self) -> float:
        """Over all of them, telling of steps and saves included: a median would hide the steps that wait for a window."""
        return self.batch_size / self.mean_wall

    @property
    def remainder(self) -> float:
        """The part of the mean step that belongs to no stage; less than nothing where rank 0 is faster than the others."""
        return (self.mean_wall - self.waterfall.wall) / self.mean_wall

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data, with what follows from it."""
        edges = quantiles(self.wall, n=4, method="inclusive") if len(self.wall) > 1 else [self.wall[0]] * 3
        return {
            "workers": self.workers,
            "global_batch_size": self.batch_size,
            "steps": self.steps,
            "samples_per_second": self.samples_per_second,
            "samples_per_second_quartiles": [self.batch_size / edges[2], self.batch_size / edges[0]],
            "wall_seconds": list(self.wall),
            "stages": dict(self.waterfall.stages),
            "beside": dict(self.waterfall.beside),
            "remainder": self.remainder,
            "unwatched_window": self.window,
            "sentences": self.waterfall.sentences(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Steps:
        """Returns what `to_json` told."""
        waterfall = Waterfall(found["stages"], found["beside"], found["workers"])
        wall, window = tuple(found["wall_seconds"]), found["unwatched_window"]
        return cls(found["workers"], found["global_batch_size"], found["steps"], wall, waterfall, window)


@dataclass
class _Watch(Reporter):
    """Notes what the loop tells, and asks it to stop when its time is over.

    Attributes:
        notices: that the loop looks at.
        run: whose data say how long a window is.
        seconds: how long steps are watched, and until whole windows of data that are streamed were: the step that waits for
            a window belongs to the others. No longer than `_PATIENCE` times that.
        lines: when, after which step, and what was measured.
    """

    notices: Notices
    run: RunDirectory
    seconds: float
    lines: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Notes it."""
        if "train/loss" not in values:
            return
        self.lines.append((time.monotonic(), step, dict(values)))
        spent, taken = self.lines[-1][0] - self.lines[0][0], step - self.lines[0][1]
        if len(self.lines) <= _FEWEST_LINES or spent < self.seconds:
            return
        if taken % self.window_steps < _LINE or spent > _PATIENCE * self.seconds:
            self.notices.stop = "the bench"

    @cached_property
    def window_steps(self) -> int:
        """Steps of a window; 1 where the data are kept in memory."""
        inventory = self.run.read_json("inventory.json") or {}
        window = int(inventory["window_steps"][0])
        return min(window, int(inventory["epoch_steps"])) if window else 1

    @property
    def lacks_a_window(self) -> bool:
        """Whether less than a window was watched."""
        return self.lines[-1][1] - self.lines[0][1] < self.window_steps


def take_steps(config: Config, world: World, folder: Path, seconds: float) -> Steps | None:
    """Trains a config for a while by the loop itself, without held-out sets; saves as the config says. Collective.

    Args:
        config: the config.
        world: the processes that train together.
        folder: for the run, the same on all ranks; it is not deleted.
        seconds: how long, after a warm-up of some steps.

    Returns:
        What rank 0 was told; None on the others.

    Raises:
        EmbedshardError: what a user can act on.
    """
    bare = _bare(config)
    loaded = Loaded(bare, bare.model_dump(mode="json"), "bench")
    place = world.from_rank_zero(lambda: RunDirectory.create(folder, loaded).folder.uri)
    notices = Notices()
    run = RunDirectory(place)
    watch = _Watch(notices, run, seconds)
    train(loaded.config, world, run, watch if world.is_rank_zero else Reporter(), notices=notices)
    if not world.is_rank_zero:
        return None
    lines = watch.lines
    if len(lines) == 1:
        raise AssertionError("a run of so many epochs logs more than one line")
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(lines)]
    steps = lines[-1][1] - lines[0][1]

    def mean(name: str) -> float:
        return sum(taken * line[2][name] for (_, taken), line in zip(spans, lines[1:], strict=True)) / steps

    waterfall = Waterfall(
        {name: mean(f"train/waterfall/{name}") for name in STEP_STAGES},
        {name: mean(f"train/beside/{name}") for name in BESIDE},
        world.world_size,
    )
    wall = tuple(seconds / taken for seconds, taken in spans)
    window = watch.window_steps if watch.lacks_a_window else None
    return Steps(world.world_size, config.train.global_batch_size, steps, wall, waterfall, window)


def _bare(config: Config) -> Config:
    """Returns the config without held-out sets, and long enough."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": None, "test": None, "validation_fraction": None}),
            "evaluate": EvaluateConfig(),
            "train": config.train.model_copy(
                update={"early_stopping": None, "epochs": _EPOCHS, "max_steps": None, "log_every_steps": _LINE}
            ),
            "tracking": TrackingConfig(tensorboard=False),
        }
    )
