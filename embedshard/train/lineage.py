"""The surviving line of a run: which steps of which attempt count, after all restarts.

An attempt that goes on from a checkpoint rolls back all that was done after it, by whichever attempt. So the steps that
count are found from the end: the newest checkpoint of the last attempt, the checkpoint that it went on from, the attempt
that wrote that one, and so on to the beginning. Must not know ledgers, data or models.
"""

from __future__ import annotations

__all__ = ["Lineage", "Stretch", "follow"]

from dataclasses import dataclass
from typing import Any

from embedshard.errors import CheckpointError
from embedshard.train.checkpoint_reader import Checkpoint, find_steps, open_step
from embedshard.train.run_directory import Attempt, RunDirectory


@dataclass(frozen=True)
class Stretch:
    """The steps [first, last) that an attempt did and that count; 0-based."""

    attempt: Attempt
    first: int
    last: int


@dataclass(frozen=True)
class Lineage:
    """What led to the weights that the run has now.

    Attributes:
        num_attempts: starts of the run.
        attempts: by number, those that attempts.jsonl tells of.
        stretches: of the steps that count, in their order; an attempt none of whose steps counts has none.
        steps: how many steps count.
        checkpoint: that was taken after them; None where it is not there any more.
        result: what result.json says; empty where it is not there or cannot be read.
        problems: why the line could not be followed to its beginning.
        notes: what else a person should know.
    """

    num_attempts: int
    attempts: dict[int, Attempt]
    stretches: tuple[Stretch, ...]
    steps: int
    checkpoint: Checkpoint | None
    result: dict[str, Any]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def counts_until(self, attempt: int) -> int:
        """Returns the step at which an attempt's work ceases to count; 0 if none of it does."""
        return next((stretch.last for stretch in self.stretches if stretch.attempt.attempt == attempt), 0)


def follow(run: RunDirectory) -> Lineage:
    """Follows the surviving line of a run. Of checkpoints, the manifests alone are read.

    Raises:
        CheckpointError: if no step counts yet.
    """
    num_attempts, attempts, problems = run.attempts()
    notes: list[str] = []
    checkpoints = _checkpoints(run, notes)
    for step, checkpoint in checkpoints.items():
        if not 1 <= int(checkpoint.attempt) <= num_attempts:
            problems.append(
                f"the checkpoint of step {step} was written by attempt {int(checkpoint.attempt)}; attempts.jsonl tells of "
                f"{num_attempts} attempts"
            )
    result = _result(run, notes)
    number, steps = _end(result, num_attempts, attempts, checkpoints)
    if not steps:
        raise CheckpointError(
            f"{run.folder.uri} has no checkpoint yet, so none of its steps counts and there is nothing to audit. "
            f"Train on: embedshard train --resume {run.folder.quoted}."
        )
    stretches = []
    end = steps
    while end:
        attempt = attempts.get(number)
        if attempt is None:
            problems.append(
                f"steps 1 to {end} cannot be traced: attempts.jsonl does not tell of attempt {number}, which ended them"
            )
            break
        origin = attempt.resumed_from
        first = 0 if origin is None else origin.step
        if first > end or (origin is not None and origin.attempt >= number):
            problems.append(
                f"steps 1 to {end} cannot be traced: attempts.jsonl says that attempt {number}, which did step {end}, went "
                f"on after step {first} of attempt {origin.attempt if origin is not None else number}"
            )
            break
        if first < end:
            stretches.append(Stretch(attempt, first, end))
        if origin is None:
            break
        number, end = origin.attempt, first
    last = checkpoints.get(steps)
    return Lineage(num_attempts, attempts, tuple(reversed(stretches)), steps, last, result, tuple(problems), tuple(notes))


def _checkpoints(run: RunDirectory, notes: list[str]) -> dict[int, Checkpoint]:
    """Returns the committed checkpoints by step."""
    found = {}
    for step in find_steps(run.checkpoints):
        try:
            found[step] = open_step(run.checkpoints, step)
        except CheckpointError as error:
            notes.append(f"Passed over: {error}")
    return found


def _result(run: RunDirectory, notes: list[str]) -> dict[str, Any]:
    try:
        result = run.read_json("result.json")
    except ValueError as error:
        notes.append(f"result.json cannot be read: {error}")
        return {}
    return result if isinstance(result, dict) else {}


def _end(
    result: dict[str, Any], num_attempts: int, attempts: dict[int, Attempt], checkpoints: dict[int, Checkpoint]
) -> tuple[int, int]:
    """Returns which attempt took the last step that counts, and how many steps count."""
    own = [step for step, checkpoint in checkpoints.items() if int(checkpoint.attempt) == num_attempts]
    if own:
        return num_attempts, max(own)
    if result.get("attempt") == num_attempts and isinstance(result.get("steps"), int):
        return num_attempts, result["steps"]  # it ended, and its checkpoints were deleted
    last = attempts.get(num_attempts)
    if last is not None:
        return (num_attempts, 0) if last.resumed_from is None else (last.resumed_from.attempt, last.resumed_from.step)
    newest = max(checkpoints, default=0)
    return (int(checkpoints[newest].attempt) if newest else 0), newest
