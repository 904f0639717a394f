"""Where a training step's time goes: stages that follow each other without a gap, and what runs beside them in threads.

Names and clocks alone: who counts is the loop, the reader and the lookups' marks; who shows it is the report and the bench.
"""

from __future__ import annotations

__all__ = ["BESIDE", "READING", "STEP_STAGES", "Laps", "Waterfall"]

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

STEP_STAGES: Final[dict[str, str]] = {
    "read_wait": "waits for a batch",
    "copy": "batch to the device",
    "input_dist": "ids to the workers that hold their rows",
    "lookup": "rows of the tables are read",
    "output_dist": "vectors back to the workers that asked",
    "dense_forward": "the model beyond the tables, forward",
    "loss": "the objective",
    "dense_backward": "backward, down to the looked-up vectors",
    "agree": "loss, weights and wishes are summed over the workers",
    "metrics": "metrics of the training rows",
    "table_backward": "gradients to the rows' workers, rows updated",
    "dense_sync": "the dense gradients' sums over the workers",
    "dense_update": "the dense optimizer",
    "count": "the ledger, bad rows, counts",
    "log": "progress and measurements are told",
    "evaluate": "the validation set",
    "checkpoint": "saves, as far as they hold the loop up",
}
"""A step's stages in their order, and what each does."""

BESIDE: Final[dict[str, str]] = {
    "decode": "reader: Parquet decoded, of streamed data put in lanes",
    "order": "reader: rows put in the order of training",
    "collate": "reader: batches made",
    "ahead": "reader: waits, as its batches are not taken yet",
    "save": "a checkpoint written in the background",
}
"""What runs in threads beside the steps."""
READING: Final = ("decode", "order", "collate")
"""The reader's work; `ahead` is its leisure."""

_WAITS_FOR_DATA: Final = 0.05
_SHOWN: Final = 3


class Laps:
    """Adds up the seconds of one thread's work by stage; a lap ends one stage and begins the next.

    Attributes:
        seconds: by stage, since it was made.
    """

    def __init__(self, stages: Iterable[str]) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._since = time.monotonic()

    def restart(self) -> None:
        """Lets go of the time since the last lap: it belongs to no stage."""
        self._since = time.monotonic()

    def beside(self) -> Laps:
        """Returns laps of another thread's work, which are added up with these. No stage is of both."""
        other = Laps(())
        other.seconds = self.seconds
        return other

    def lap(self, stage: str) -> float:
        """Adds the time since the last lap to a stage; returns it."""
        now = time.monotonic()
        taken, self._since = now - self._since, now
        self.seconds[stage] += taken
        return taken


@dataclass(frozen=True)
class Waterfall:
    """The mean seconds of a step.

    Attributes:
        stages: one after another, by name in the order of `STEP_STAGES`: together the step's wall time.
        beside: seconds a step of what ran in threads meanwhile.
        workers: over whose clocks this is the mean.
    """

    stages: Mapping[str, float]
    beside: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1

    @property
    def wall(self) -> float:
        """Seconds from step to step."""
        return sum(self.stages.values())

    @property
    def reader_share(self) -> float | None:
        """Which part of its time the reader works; None where it was not measured."""
        busy = sum(self.beside.get(name, 0.0) for name in READING)
        all_of_it = busy + self.beside.get("ahead", 0.0)
        return busy / all_of_it if all_of_it else None

    def sentences(self) -> list[str]:
        """Returns what is to be seen: where the time goes, what the step waits for, what overlaps."""
        wall = self.wall
        if not wall:
            return []
        ranked = sorted(self.stages.items(), key=lambda item: -item[1])[:_SHOWN]
        told = ", ".join(f"{name} {seconds / wall:.0%}" for name, seconds in ranked)
        found = [f"Of a step's {_ms(wall)}: {told}."]
        waited = self.stages.get("read_wait", 0.0)
        words = f"It waits {_ms(waited)} ({waited / wall:.0%}) for data"
        if self.reader_share is not None:
            is_bound = waited / wall > _WAITS_FOR_DATA
            words += f"; the reader, in a thread beside it, works {self.reader_share:.0%} of its time"
            words += ": reading holds training up" if is_bound else " and is ahead for the rest"
        found.append(f"{words}.")
        if self.workers > 1:
            agreed = self.stages.get("agree", 0.0)
            moved = sum(self.stages.get(name, 0.0) for name in ("input_dist", "output_dist"))
            found.append(
                f"It waits {_ms(agreed)} ({agreed / wall:.0%}) until all {self.workers} workers agree, which is where the "
                f"slowest is waited for, and {_ms(moved)} ({moved / wall:.0%}) for ids and vectors on their way."
            )
        saving = self.beside.get("save", 0.0)
        if saving:
            found.append(f"Saves in the background take {_ms(saving)} of each step's time beside it.")
        return found


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
