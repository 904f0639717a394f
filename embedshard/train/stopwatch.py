"""Where the loop's time goes, by stage, on this rank's clock.

CUDA is not waited for: what it still does counts where the loop next needs its result.
"""

from __future__ import annotations

__all__ = ["Stopwatch"]

import time

_STAGES = ("data", "step", "evaluate", "checkpoint")


class Stopwatch:
    """Adds up seconds by stage.

    Attributes:
        seconds: since the start of this attempt: `data` waits for batches; `step` is forward, backward, update and
            counting; `evaluate`; `checkpoint` is how long saves held the loop up.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_STAGES, 0.0)
        self._told, self._told_steps = dict(self.seconds), 0
        self._since = time.monotonic()

    def restart(self) -> None:
        """Lets go of the time since the last lap: it belongs to no stage."""
        self._since = time.monotonic()

    def lap(self, stage: str) -> float:
        """Adds the time since the last lap to a stage; returns it."""
        now = time.monotonic()
        taken, self._since = now - self._since, now
        self.seconds[stage] += taken
        return taken

    @property
    def training_seconds(self) -> float:
        """In steps and waiting for their data."""
        return self.seconds["data"] + self.seconds["step"]

    def means(self, steps: int) -> dict[str, float]:
        """Returns each stage's seconds a step since the last call.

        Args:
            steps: that this attempt has taken.
        """
        taken = max(steps - self._told_steps, 1)
        found = {stage: (seconds - self._told[stage]) / taken for stage, seconds in self.seconds.items()}
        self._told, self._told_steps = dict(self.seconds), steps
        return found
