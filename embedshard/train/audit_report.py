"""What an audit tells: plain values, which become JSON as they are.

Steps, epochs and partitions count from 1 here: step 5 is the fifth, after which metrics.jsonl and checkpoints say 5.
Ranks count from 0.
"""

from __future__ import annotations

__all__ = ["AttemptReport", "Audit", "Failure", "PassReport", "StepRange"]

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRange:
    """Steps of the run, the last included."""

    first_step: int
    last_step: int

    def __str__(self) -> str:
        return (
            f"step {self.first_step}"
            if self.first_step == self.last_step
            else f"steps {self.first_step} to {self.last_step}"
        )


@dataclass(frozen=True)
class Failure:
    """Something that keeps the run from being proved.

    Attributes:
        what: is wrong.
        epoch: in which; None where it is about no one epoch.
        partition: in which.
        steps: in which, as far as the ledger's lines tell.
        attempt: whose ledger tells it.
        rank: whose ledger tells it.
        rows_counted: by the ledger's line, where rows are what is wrong.
        rows_expected: in these steps of this rank.
    """

    what: str
    epoch: int | None = None
    partition: int | None = None
    steps: StepRange | None = None
    attempt: int | None = None
    rank: int | None = None
    rows_counted: int | None = None
    rows_expected: int | None = None


@dataclass
class PassReport:
    """One pass over one partition, as far as its steps count.

    Attributes:
        epoch: the pass over all partitions that it is part of.
        partition: which of the partitions.
        steps: that count.
        is_whole: whether these are all steps of the pass.
        rows_in_partition: rows of a whole pass.
        rows_expected: in these steps.
        rows_trained: as the ledger counts them.
        weightless_rows: those among them whose weight is 0: set aside, or so in the data.
        is_proved: whether each row expected was trained exactly once, and no other.
    """

    epoch: int
    partition: int
    steps: StepRange
    is_whole: bool
    rows_in_partition: int
    rows_expected: int
    rows_trained: int = 0
    weightless_rows: int = 0
    is_proved: bool = True


@dataclass
class AttemptReport:
    """A start of the run.

    Attributes:
        attempt: its number.
        time: at which it began.
        host: of its rank 0.
        world_size: processes that trained.
        resumed_after: the step after which it went on; 0 where it began the run.
        resumed_attempt: that wrote the checkpoint which it went on from.
        counted: its steps that count; None if none does.
        rolled_back: steps in its ledger that a later attempt did again.
        unsaved: steps in its ledger after the newest checkpoint, that a resumed run would do again.
        rows_discarded: of both, over all ranks.
    """

    attempt: int
    time: str
    host: str
    world_size: int
    resumed_after: int
    resumed_attempt: int | None
    counted: StepRange | None
    rolled_back: StepRange | None = None
    unsaved: StepRange | None = None
    rows_discarded: int = 0


@dataclass
class Audit:
    """Whether each row was trained exactly once an epoch.

    Attributes:
        run: its folder.
        steps: that count, and are audited.
        planned_steps: by the config.
        is_finished: whether the run ended as planned, or stopped early by its own rule.
        passes: over partitions, in their order.
        attempts: all that attempts.jsonl tells of.
        failures: why it is not proved; nothing where it is.
        notes: what else a person should know.
    """

    run: str
    steps: int
    planned_steps: int
    is_finished: bool
    passes: list[PassReport]
    attempts: list[AttemptReport]
    failures: list[Failure]
    notes: list[str]

    @property
    def is_proved(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Returns all of it."""
        return {"proved": self.is_proved, **asdict(self)}
