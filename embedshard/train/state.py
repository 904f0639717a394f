"""What a run knows beside its weights: a few numbers, saved with each checkpoint, and pure functions of them."""

from __future__ import annotations

__all__ = ["TrainState", "due"]

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from embedshard.config.parts import EarlyStoppingConfig
from embedshard.data.quarantine import BadRowCounts


def due(step: int, every: int | None, is_epoch_end: bool) -> bool:
    """Returns whether something is to be done after `step` steps: each `every` steps, or without it at epochs' ends."""
    return is_epoch_end if every is None else step % every == 0


@dataclass
class TrainState:
    """The position in the data, and what the validation set has said so far.

    Attributes:
        step: optimizer steps done: the position in the data.
        samples_seen: rows trained, over all workers; padding not counted.
        bad_rows: what was wrong with them.
        epoch_quarantined: rows of the epoch that were set aside so far.
        steps_without_loss: the newest steps in a row in which nothing had a loss that counts.
        best_value: best value of the selected metric so far.
        best_step: the step at which it was reached.
        evaluations_since_best: evaluations since then.
        progressive: of each partition that was evaluated before it was trained: its number from 1, its name, the steps done
            by then, its rows and its metrics.
    """

    step: int = 0
    samples_seen: int = 0
    bad_rows: BadRowCounts = field(default_factory=BadRowCounts)
    epoch_quarantined: int = 0
    steps_without_loss: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    progressive: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, value: float, higher_is_better: bool, min_delta: float) -> bool:
        """Takes a value of the selected metric into account; returns whether it is the best so far. NaN never is."""
        sign = 1.0 if higher_is_better else -1.0
        improved = self.best_value is None or sign * (value - self.best_value) > min_delta
        if improved and value == value:
            self.best_value, self.best_step, self.evaluations_since_best = value, self.step, 0
            return True
        self.evaluations_since_best += 1
        return False

    def has_stopped_early(self, config: EarlyStoppingConfig | None) -> bool:
        """Returns whether the patience is at its end."""
        return config is not None and self.evaluations_since_best >= config.patience

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Returns the state that a checkpoint kept."""
        kept = {known.name: values[known.name] for known in fields(cls) if known.name in values}
        return cls(**kept | {"bad_rows": BadRowCounts(**values["bad_rows"])})
