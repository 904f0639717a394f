"""Audits a run's folder, and shows a person what was found."""

from __future__ import annotations

__all__ = ["audit_here", "show"]

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from embedshard.train.audit import audit_run
from embedshard.train.audit_report import AttemptReport, Audit, Failure, PassReport
from embedshard.train.run_directory import RunDirectory

_SHOWN_FAILURES = 20
"""Failures that are printed; the JSON has all."""


def audit_here(run_dir: Path, environment: Mapping[str, str], console: Console) -> Audit:
    """Audits a run, with a bar of progress.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    with Progress(
        TextColumn("summing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        return audit_run(run, environment, lambda done, total: bar.update(task, completed=done, total=total))


def show(audit: Audit, console: Console) -> None:
    """Prints an audit: each pass, each attempt, what is wrong, and the verdict."""
    console.print(_passes_table(audit))
    console.print()
    for attempt in audit.attempts:
        console.print(escape("; ".join(_history(attempt))), highlight=False, soft_wrap=True)
    console.print()
    for note in audit.notes:
        console.print(f"[yellow]note[/]  {escape(note)}", highlight=False, soft_wrap=True)
    for failure in audit.failures[:_SHOWN_FAILURES]:
        console.print(f"[red]wrong[/]  {escape(_sentence(failure))}", highlight=False, soft_wrap=True)
    if len(audit.failures) > _SHOWN_FAILURES:
        console.print(f"and {len(audit.failures) - _SHOWN_FAILURES:,} more: --json lists all", highlight=False)
    console.print(f"[{'green' if audit.is_proved else 'red'}]{escape(_verdict(audit))}[/]", highlight=False, soft_wrap=True)


def _passes_table(audit: Audit) -> Table:
    has_partitions = any(one.partition > 1 for one in audit.passes)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    for heading in ("epoch", *(["partition"] if has_partitions else [])):
        table.add_column(heading, justify="right")
    table.add_column("steps")
    for heading in ("rows expected", "rows trained", "of weight 0"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", overflow="fold")
    for one in audit.passes:
        table.add_row(
            f"{one.epoch:,}",
            *([f"{one.partition:,}"] if has_partitions else []),
            str(one.steps).partition(" ")[2],
            f"{one.rows_expected:,}",
            f"{one.rows_trained:,}",
            f"{one.weightless_rows:,}",
            _pass_verdict(one),
        )
    return table


def _pass_verdict(one: PassReport) -> str:
    if not one.is_proved:
        return "[red]not proved[/]"
    if one.is_whole:
        return "[green]each row once[/]"
    return f"[green]each row once[/], so far {one.rows_expected:,} of {one.rows_in_partition:,}"


def _history(attempt: AttemptReport) -> Iterator[str]:
    ranks = "1 rank" if attempt.world_size == 1 else f"{attempt.world_size} ranks"
    yield f"attempt {attempt.attempt}: {attempt.time}, {ranks} ({attempt.host})"
    if attempt.resumed_attempt is not None:
        yield f"went on after step {attempt.resumed_after} of attempt {attempt.resumed_attempt}"
    yield f"{attempt.counted} count" if attempt.counted is not None else "none of its steps counts"
    rows = f"{attempt.rows_discarded:,} rows"
    if attempt.rolled_back is not None:
        yield f"{attempt.rolled_back} ({rows}) were rolled back"
    if attempt.unsaved is not None:
        yield f"{attempt.unsaved} ({rows}) came after the newest checkpoint and do not count"


def _sentence(failure: Failure) -> str:
    places = [
        *([f"epoch {failure.epoch}, partition {failure.partition}"] if failure.epoch is not None else []),
        *([f"attempt {failure.attempt}"] if failure.attempt is not None else []),
        *([f"rank {failure.rank}"] if failure.rank is not None else []),
    ]
    where = f"{', '.join(places)}: " if places else ""
    return f"{where}{failure.what if failure.steps is None else f'{failure.steps} {failure.what}'}"


def _verdict(audit: Audit) -> str:
    if not audit.is_proved:
        return f"Not proved: {len(audit.failures):,} thing{'s' if len(audit.failures) > 1 else ''} wrong in {audit.run}."
    if audit.is_finished:
        return f"Proved: each row was trained exactly once an epoch, in all {audit.steps:,} steps."
    return (
        f"Proved for steps 1 to {audit.steps:,} of {audit.planned_steps:,}, up to the newest checkpoint: each row was "
        f"trained exactly once an epoch. The run has not ended; what it did after that checkpoint, a resumed run does again."
    )
