"""Proves from a run's ledger that each row was trained exactly once an epoch, or names what was not.

What should have been trained follows from inventory.json and the config; no data are read. What was trained the ledger
tells. Of it, the steps of the surviving line of checkpoints count (`lineage.py`). Three things are checked: each rank of
each attempt covers its steps without a gap or a repetition; the rows that it counts are as many as its lanes have in
these steps; and the digests of each pass add up to that of the rows of its steps. A digest that does not is followed
down to the ledger's lines. Must not know models or torchrec.
"""

from __future__ import annotations

__all__ = ["audit_run"]

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from embedshard.config import Config
from embedshard.data.expected import ExpectedRows
from embedshard.data.inventory import Inventory, fingerprint_of
from embedshard.data.order import Order, Position, sum_of_digests
from embedshard.data.training_set import without_held_out
from embedshard.errors import ConfigError, DataError
from embedshard.storage import reaching
from embedshard.train.audit_report import AttemptReport, Audit, Failure, PassReport, StepRange
from embedshard.train.ledger import LedgerLine, Unreadable, ledger_files, read_ledger
from embedshard.train.lineage import Lineage, Stretch, follow
from embedshard.train.run_directory import Attempt, RunDirectory

_VARIABLE_WITHOUT_DEFAULT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

Key = tuple[int, int]
"""An epoch and a partition, from 0."""


def audit_run(
    run: RunDirectory, environment: Mapping[str, str], progress: Callable[[int, int], None] = lambda done, total: None
) -> Audit:
    """Audits a run. It may go on while it is audited.

    Args:
        run: its folder.
        environment: of variables in its config; one that is missing stands for itself, since no data are read.
        progress: told how many rows were summed, of how many.

    Raises:
        ConfigError: if the folder holds no run that has begun.
        DataError: if its inventory cannot be used.
        CheckpointError: if none of its steps counts yet.
    """
    if not run.has_begun:
        raise ConfigError(
            f"{run.folder.uri} has no attempts.jsonl, so no training has begun there. Give the folder of a run that has."
        )
    with reaching(run.folder):
        names = _VARIABLE_WITHOUT_DEFAULT.findall(run.config_file.read_text())
        config = run.load_config({name: f"${{{name}}}" for name in names} | dict(environment)).config
        inventories, order = _read_inventory(run, config)
        # The line of checkpoints is read first: what it counts is in the ledger by then.
        return _Auditor(run, config, inventories, order, follow(run), progress).audit()


def _read_inventory(run: RunDirectory, config: Config) -> tuple[list[Inventory], Order]:
    where = run.folder.join("inventory.json")
    try:
        saved = run.read_json("inventory.json")
        inventories = without_held_out(config.data, [Inventory.from_json(partition) for partition in saved["partitions"]])
        row_groups = tuple(tuple(group.num_rows for group in inventory.row_groups) for inventory in inventories)
        if len(saved["window_steps"]) != len(inventories) or not any(inventory.num_rows for inventory in inventories):
            raise ValueError("it needs a length of windows for each partition, and rows")
        order = Order(
            seed=config.seed,
            lanes=config.data.lanes,
            global_batch_size=config.train.global_batch_size,
            window_steps=tuple(int(steps) for steps in saved["window_steps"]),
            row_groups=row_groups,
            shuffle=config.data.shuffle,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        met = "is not there" if not where.exists() else f"cannot be used ({type(error).__name__}: {error})"
        raise DataError(
            f"{where.uri} {met}. What should have been trained follows from it: put back the file that the run wrote."
        ) from error
    return inventories, order


@dataclass(frozen=True)
class _Counted:
    """A ledger's line that counts, and who wrote it."""

    line: LedgerLine
    attempt: Attempt
    rank: int


class _Auditor:
    """One audit, as it goes on."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        inventories: Sequence[Inventory],
        order: Order,
        lineage: Lineage,
        progress: Callable[[int, int], None],
    ) -> None:
        self._run, self._config, self._inventories, self._order = run, config, inventories, order
        self._lineage, self._progress = lineage, progress
        self._failures: list[Failure] = []
        self._notes = list(lineage.notes)
        held_out = sum(inventory.num_file_rows - inventory.num_rows for inventory in inventories)
        if held_out:
            self._notes.append(f"{held_out:,} rows of the training files are held out for validation, and never trained.")
        self._passes = {(one.epoch - 1, one.partition - 1): one for one in _passes(order, lineage.steps)}
        self._counted: defaultdict[Key, list[_Counted]] = defaultdict(list)
        self._discarded: defaultdict[int, list[LedgerLine]] = defaultdict(list)
        self._total_rows = sum(one.rows_expected for one in self._passes.values())
        self._summed_rows = 0

    def audit(self) -> Audit:
        """Judges everything."""
        for problem in self._lineage.problems:
            self._fail(problem)
        self._sort_lines()
        for key in self._passes:
            self._judge_pass(key)
        self._judge_checkpoint()
        planned = self._config.train.epochs * self._order.epoch_steps
        if self._config.train.max_steps is not None:
            planned = min(planned, self._config.train.max_steps)
        return Audit(
            run=self._run.folder.uri,
            steps=self._lineage.steps,
            planned_steps=planned,
            is_finished=self._is_finished(planned),
            passes=list(self._passes.values()),
            attempts=[self._attempt_report(attempt) for attempt in self._lineage.attempts.values()],
            failures=self._failures,
            notes=self._notes,
        )

    def _fail(
        self,
        what: str,
        *,
        steps: tuple[int, int] | None = None,
        attempt: int | None = None,
        rank: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Notes a failure, once for each pass that its 0-based steps [first, last) are in."""
        counted, expected = rows if rows is not None else (None, None)
        if steps is None:
            self._failures.append(Failure(what, attempt=attempt, rank=rank))
            return
        for one in _passes(self._order, steps[1], steps[0]):
            mine = self._passes.get((one.epoch - 1, one.partition - 1))
            if mine is not None:
                mine.is_proved = False
            self._failures.append(Failure(what, one.epoch, one.partition, one.steps, attempt, rank, counted, expected))

    # ---------------------------------------------------------------------------------- which lines count, and for what
    def _sort_lines(self) -> None:
        """Reads the ledgers, sorts the lines that count by pass, and checks that they cover each step once."""
        files, others = ledger_files(self._run.ledger)
        for path in others:
            self._fail(f"ledger/{path.name} is not named ATTEMPT-RANK.jsonl, so nobody knows whose it is")
        ledgers = {owner: read_ledger(path) for owner, path in files.items()}
        for (attempt, rank), lines in ledgers.items():
            known = self._lineage.attempts.get(attempt)
            if known is None:
                unknown = f"attempts.jsonl tells of {self._lineage.num_attempts} attempts"
                if attempt <= self._lineage.num_attempts:
                    unknown = f"attempts.jsonl cannot be read where it tells of attempt {attempt}"
                self._fail(f"ledger/{files[attempt, rank].name} is there, and {unknown}", attempt=attempt, rank=rank)
            elif rank >= known.world_size:
                what = f"ledger/{files[attempt, rank].name} is there, and attempt {attempt} had {_ranks(known.world_size)}"
                self._fail(what, attempt=attempt, rank=rank)
            until = self._lineage.counts_until(attempt)
            self._discarded[attempt] += [line for line in lines if isinstance(line, LedgerLine) and line.first_step >= until]
            if not until and any(isinstance(line, Unreadable) for line in lines):
                self._notes.append(f"ledger/{files[attempt, rank].name} has unreadable lines, of work that was rolled back.")
        for stretch in self._lineage.stretches:
            if self._order.lanes % stretch.attempt.world_size:
                what = (
                    f"cannot be judged: attempts.jsonl says {_ranks(stretch.attempt.world_size)}, which cannot share "
                    f"data.lanes={self._order.lanes} lanes"
                )
                self._fail(what, steps=(stretch.first, stretch.last), attempt=stretch.attempt.attempt)
                continue
            for rank in range(stretch.attempt.world_size):
                self._judge_rank(stretch, rank, ledgers.get((stretch.attempt.attempt, rank)))

    def _judge_rank(self, stretch: Stretch, rank: int, lines: Sequence[LedgerLine | Unreadable] | None) -> None:
        """Checks that a rank's lines cover the steps of its attempt that count, each once."""
        attempt = stretch.attempt.attempt
        name = f"ledger/{attempt:04d}-{rank:05d}.jsonl"
        if lines is None:
            what = f"cannot be judged: {name} is not there, and attempt {attempt} had {_ranks(stretch.attempt.world_size)}"
            self._fail(what, steps=(stretch.first, stretch.last), attempt=attempt, rank=rank)
            return
        done, damage = stretch.first, ""
        for line in lines:
            if isinstance(line, Unreadable):
                what = "is cut off" if line.is_cut_off else f"cannot be read ({line.reason})"
                if done >= stretch.last:
                    self._notes.append(
                        f"{name}: line {line.number} {what}; it is of work after step {stretch.last}, which does not count."
                    )
                else:
                    damage = f": line {line.number} of {name} {what}"
                    if not line.is_cut_off:
                        self._fail(f"line {line.number} of {name} {what}", attempt=attempt, rank=rank)
                continue
            if line.first_step >= stretch.last:
                continue
            self._count(_Counted(line, stretch.attempt, rank))
            if line.first_step < done:
                again = (line.first_step, min(done, line.last_step + 1))
                before = f"belong to an earlier attempt, and attempt {attempt} did them too"
                what = "were trained more than once" if line.first_step >= stretch.first else before
                self._fail(what, steps=again, attempt=attempt, rank=rank)
            if line.first_step > done:
                self._fail(f"were not trained{damage}", steps=(done, line.first_step), attempt=attempt, rank=rank)
            if line.last_step >= stretch.last:
                what = f"{name}: a line holds {_shown(line)}, from before and after the checkpoint of step {stretch.last}"
                self._fail(what, attempt=attempt, rank=rank)
            done, damage = max(done, line.last_step + 1), ""
        if done < stretch.last:
            self._fail(f"were not trained{damage}", steps=(done, stretch.last), attempt=attempt, rank=rank)

    def _count(self, counted: _Counted) -> None:
        """Adds a line to the pass that its steps are in."""
        line = counted.line
        first, last = self._order.position(line.first_step), self._order.position(line.last_step)
        if {(first.epoch, first.partition), (last.epoch, last.partition)} != {(line.epoch, line.partition)}:
            what = f"stand in a line that says epoch {line.epoch + 1}, partition {line.partition + 1}, which they are not of"
            steps = (line.first_step, min(line.last_step + 1, self._lineage.steps))
            self._fail(what, steps=steps, attempt=counted.attempt.attempt, rank=counted.rank)
            return
        self._counted[line.epoch, line.partition].append(counted)

    # ---------------------------------------------------------------------------------------------- rows against digests
    def _judge_pass(self, key: Key) -> None:
        """Compares a pass's rows with those that its steps have."""
        one, counted = self._passes[key], self._counted[key]
        one.rows_trained = sum(each.line.rows for each in counted)
        one.weightless_rows = sum(each.line.weightless_rows for each in counted)
        start = one.steps.first_step - 1 - self._order.position(one.steps.first_step - 1).step_in_epoch
        expected = ExpectedRows(self._order, *key, self._on_rows)
        by_rank: defaultdict[tuple[int, int], list[_Counted]] = defaultdict(list)
        for each in counted:
            by_rank[each.attempt.world_size, each.rank].append(each)
        digest = expected.digest((one.steps.first_step - 1 - start, one.steps.last_step - start))
        if sum_of_digests(each.line.words for each in counted) == digest and one.rows_trained == one.rows_expected:
            return
        for (world_size, rank), lines in by_rank.items():
            self._judge_lines(expected, start, self._order.lane_block(rank, world_size), lines)
        if one.is_proved:
            what = f"cannot be accounted for: {one.rows_trained:,} rows counted, {one.rows_expected:,} expected"
            self._fail(what, steps=(one.steps.first_step - 1, one.steps.last_step))

    def _judge_lines(self, expected: ExpectedRows, start: int, lanes: tuple[int, int], counted: Sequence[_Counted]) -> None:
        """Names the lines of a rank whose rows are not those of its lanes in these steps."""
        ordered = sorted(counted, key=lambda each: each.line.first_step)
        intervals = [(each.line.first_step - start, each.line.last_step + 1 - start) for each in ordered]
        digests = expected.digests(intervals, lanes)
        for each, interval, digest in zip(ordered, intervals, digests, strict=True):
            line, rows = each.line, expected.count(interval, lanes)
            if line.words == digest and line.rows == rows:
                continue
            what = "as many rows as expected, but others" if line.rows == rows else "not the rows that were expected"
            self._fail(
                f"hold {what}: {line.rows:,} counted, {rows:,} expected",
                steps=(line.first_step, line.last_step + 1),
                attempt=each.attempt.attempt,
                rank=each.rank,
                rows=(line.rows, rows),
            )

    def _on_rows(self, rows: int) -> None:
        self._summed_rows += rows
        self._progress(self._summed_rows, max(self._total_rows, self._summed_rows))

    def _judge_checkpoint(self) -> None:
        """Compares with what the newest checkpoint says of the data, which was counted in another way."""
        checkpoint = self._lineage.checkpoint
        if checkpoint is None:
            self._notes.append(
                f"The checkpoint of step {self._lineage.steps} is not there any more, so its counts were not compared."
            )
            return
        # A run that waits for partitions has more by now, perhaps.
        then = self._inventories[: checkpoint.state.get("partitions", len(self._inventories))]
        if checkpoint.state["data"] != fingerprint_of(then):
            self._fail(f"inventory.json tells of other training data than the checkpoint of step {checkpoint.step}")
        seen, trained = checkpoint.state["train"]["samples_seen"], sum(one.rows_trained for one in self._passes.values())
        if seen != trained:
            self._fail(f"the checkpoint of step {checkpoint.step} has seen {seen:,} rows, the ledger counts {trained:,}")

    # ------------------------------------------------------------------------------------------------ the run's history
    def _is_finished(self, planned: int) -> bool:
        result, steps = self._lineage.result, self._lineage.steps
        return result.get("steps") == steps and (steps >= planned or result.get("attempt") == self._lineage.num_attempts)

    def _attempt_report(self, attempt: Attempt) -> AttemptReport:
        number, origin = attempt.attempt, attempt.resumed_from
        stretch = next((one for one in self._lineage.stretches if one.attempt is attempt), None)
        lines = self._discarded[number]
        is_unsaved = number == self._lineage.num_attempts
        beyond = _span(lines)
        return AttemptReport(
            attempt=number,
            time=attempt.time,
            host=attempt.host,
            world_size=attempt.world_size,
            resumed_after=0 if origin is None else origin.step,
            resumed_attempt=None if origin is None else origin.attempt,
            counted=None if stretch is None else StepRange(stretch.first + 1, stretch.last),
            rolled_back=None if is_unsaved else beyond,
            unsaved=beyond if is_unsaved else None,
            rows_discarded=sum(line.rows for line in lines),
        )


def _passes(order: Order, last: int, first: int = 0) -> Iterable[PassReport]:
    """Yields what the 0-based steps [first, last) are of each pass over a partition."""
    while first < last:
        at: Position = order.position(first)
        num_steps, num_rows = order.partition_steps[at.partition], order.num_rows[at.partition]
        steps = (at.step_in_epoch, min(num_steps, at.step_in_epoch + last - first))
        rows = ExpectedRows(order, at.epoch, at.partition, lambda _: None).count(steps, (0, order.lanes))
        span = StepRange(first + 1, first + steps[1] - steps[0])
        yield PassReport(at.epoch + 1, at.partition + 1, span, steps == (0, num_steps), num_rows, rows)
        first = span.last_step


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _span(lines: Sequence[LedgerLine]) -> StepRange | None:
    if not lines:
        return None
    return StepRange(min(line.first_step for line in lines) + 1, max(line.last_step for line in lines) + 1)


def _shown(line: LedgerLine) -> StepRange:
    return StepRange(line.first_step + 1, line.last_step + 1)
