"""Where the loop's time goes, by stage, on this rank's clock.

CUDA is not waited for: what it still does counts where the loop next needs its result.
"""

from __future__ import annotations

__all__ = ["GROUPS", "Stopwatch", "grouped", "over_ranks"]

from collections.abc import Mapping
from typing import Final

import torch

from embedshard.stages import BESIDE, STEP_STAGES, Laps, Waterfall
from embedshard.world import World

GROUPS: Final = ("data", "step", "evaluate", "checkpoint")
"""What stages are put together to: waits for batches; forward, backward, update and counting; evaluations; saves."""
_GROUP_OF: Final = {"read_wait": "data", "evaluate": "evaluate", "checkpoint": "checkpoint", "log": None}


def grouped(stages: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each group; telling of a step belongs to none."""
    found = dict.fromkeys(GROUPS, 0.0)
    for stage, seconds in stages.items():
        group = _GROUP_OF.get(stage, "step")
        if group is not None:
            found[group] += seconds
    return found


class Stopwatch:
    """Reads the clocks of the loop and of what runs beside it.

    Args:
        laps: of the steps' stages; whoever takes part in a step ends its stages.
    """

    def __init__(self, laps: Laps | None = None) -> None:
        self.laps = Laps(STEP_STAGES) if laps is None else laps
        self._reader: Laps | None = None
        self._former_readers = dict.fromkeys(BESIDE, 0.0)
        self._told, self._told_steps = [0.0] * (len(STEP_STAGES) + len(BESIDE)), 0

    def restart(self) -> None:
        """Lets go of the time since the last lap: it belongs to no stage."""
        self.laps.restart()

    def lap(self, stage: str) -> float:
        """Adds the time since the last lap to a stage; returns it."""
        return self.laps.lap(stage)

    def watch_reader(self, laps: Laps) -> None:
        """Adds what a reader that is opened takes from now on; the one before it has ended."""
        self._former_readers, self._reader = self._of_readers(), laps

    @property
    def seconds(self) -> dict[str, float]:
        """By group, since the start of this attempt."""
        return grouped(self.laps.seconds)

    @property
    def training_seconds(self) -> float:
        """In steps and waiting for their data."""
        seconds = self.seconds
        return seconds["data"] + seconds["step"]

    def means(self, steps: int, saved: float = 0.0) -> Waterfall:
        """Returns the mean seconds a step since the last call, on this rank.

        Args:
            steps: that this attempt has taken.
            saved: seconds that saves in the background have taken so far.
        """
        beside = self._of_readers() | {"save": saved}
        now = [*self.laps.seconds.values(), *beside.values()]
        taken = max(steps - self._told_steps, 1)
        means = [(seconds - told) / taken for seconds, told in zip(now, self._told, strict=True)]
        self._told, self._told_steps = now, steps
        return _waterfall(means, 1)

    def _of_readers(self) -> dict[str, float]:
        now = {} if self._reader is None else self._reader.seconds
        return {name: former + now.get(name, 0.0) for name, former in self._former_readers.items()}


def over_ranks(own: Waterfall, world: World) -> Waterfall:
    """Returns the mean over all ranks. Collective."""
    if world.world_size == 1:
        return own
    numbers = torch.tensor([*own.stages.values(), *own.beside.values()], dtype=torch.float64)
    return _waterfall((world.sum(numbers) / world.world_size).tolist(), world.world_size)


def _waterfall(numbers: list[float], workers: int) -> Waterfall:
    stages = dict(zip(STEP_STAGES, numbers, strict=False))
    return Waterfall(stages, dict(zip(BESIDE, numbers[len(STEP_STAGES) :], strict=True)), workers)
