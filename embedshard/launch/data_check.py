"""Checks a config's data, and shows a person what was found."""

from __future__ import annotations

__all__ = ["check_here", "show"]

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from embedshard.config import load_config
from embedshard.data.check import check_data
from embedshard.data.check_report import ColumnReport, Known, ProblemReport, Report, SetReport
from embedshard.quantities import size

_ACTIONS = {
    "error": "refused",
    "quarantine": "row set aside",
    "oov": "row for unknown ids",
    "empty": "counts as no id",
    "zero": "counts as 0",
}


def check_here(config_path: Path, overrides: Sequence[str], environment: Mapping[str, str], console: Console) -> Report:
    """Checks the data of a config, with a bar of progress.

    Raises:
        ConfigError: if the config cannot be read.
    """
    config = load_config(config_path, environment, overrides).config
    with Progress(
        TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        return check_data(config, lambda done, total: bar.update(task, completed=done, total=total))


def show(report: Report, console: Console) -> None:
    """Prints a report: what each set holds, what does not fit, and whether a run would go through."""
    for one in report.sets:
        _show_set(one, console)
    if report.known:
        console.print(_known_table(report.known))
        console.print()
    if not report.refused:
        console.print("[green]Nothing would be refused.[/]")
        return
    console.print("[red]A run would be refused:[/]")
    for reason in report.refused:
        console.print(f"  - {escape(reason)}", highlight=False, soft_wrap=True)


def _show_set(report: SetReport, console: Console) -> None:
    console.print(f"[bold]{escape(report.name)}[/]  {escape(', '.join(report.patterns))}", highlight=False, soft_wrap=True)
    for line in _facts(report):
        console.print(Padding(escape(line), (0, 0, 0, 2), expand=False), highlight=False)
    if any(column.types for column in report.columns):
        console.print(_columns_table([column for column in report.columns if column.types]))
    for problem in report.problems:
        _show_problem(problem, report.rows, console)
    for refusal in report.refusals:
        console.print(f"  [red]refused[/]  {escape(refusal.message)}", highlight=False, soft_wrap=True)
        _show_examples(refusal.examples, refusal.files, console)
    console.print()


def _facts(report: SetReport) -> Iterator[str]:
    groups = report.row_groups
    yield (
        f"{report.rows:,} rows in {_count(report.files, 'file')}"
        + (
            ""
            if groups is None
            else f", {_count(groups.count, 'row group')} of {_spread(groups.least, groups.greatest)} rows"
        )
        + (f" (median {groups.median:,})" if groups is not None and groups.least != groups.greatest else "")
    )
    if report.rows:
        fit = {True: ": fits data.cache_bytes", False: ": more than data.cache_bytes, so streamed", None: ""}
        sizes = f"{size(report.size_bytes)} on disk, {size(report.decoded_bytes)} decoded"
        yield sizes + fit[report.fits_cache]
    if report.unread_rows:
        yield f"{report.unread_rows:,} rows could not be read"
    if report.skipped:
        names = [uri.rpartition("/")[2] for uri in report.skipped]
        yield f"not Parquet, so skipped: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    yield from report.notes


def _columns_table(columns: Sequence[ColumnReport]) -> Table:
    has_lists = any(column.lists for column in columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column("column", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("null", justify="right")
    table.add_column("range", overflow="fold")
    if has_lists:
        table.add_column("length (mean)", overflow="fold")
    table.add_column("distinct", justify="right")
    table.add_column("unknown", justify="right")
    for column in columns:
        has_ids = column.distinct is not None
        cells = [
            escape(column.column),
            escape(", ".join(column.types)),
            _share(column.nulls, column.null_share),
            escape(_range(column)),
            *([_lengths(column)] if has_lists else []),
            f"{'' if column.distinct_is_exact else '~'}{column.distinct:,}" if has_ids else "",
            _share(column.unknown, column.unknown_share) if has_ids else "",
        ]
        table.add_row(*cells)
    return table


def _known_table(known: Sequence[Known]) -> Table:
    table = Table(
        title="Ids that another set has not",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for heading in ("ids of", "column", "not in"):
        table.add_column(heading)
    for heading in ("ids", "share of ids", "of values"):
        table.add_column(heading, justify="right")
    for one in known:
        ids = f"{'' if one.absent.is_exact else '~'}{one.absent.ids:,}"
        shares = f"{one.absent.id_share:.2%}", f"{one.absent.value_share:.2%}"
        table.add_row(escape(one.set_name), escape(one.column), one.compared_with, ids, *shares)
    return table


def _show_problem(problem: ProblemReport, rows: int, console: Console) -> None:
    style = "red" if problem.action == "error" else "yellow"
    many = f"{_count(problem.values, 'value')} in {_count(problem.rows, 'row')} ({problem.rows / max(rows, 1):.2%})"
    console.print(
        f"  [{style}]{_ACTIONS[problem.action]}[/]  {escape(problem.column)}: {problem.reason}, {many}", highlight=False
    )
    _show_examples(problem.examples, problem.rows, console)


def _show_examples(examples: Sequence[str], count: int, console: Console) -> None:
    for example in examples:
        console.print(f"    {escape(example)}", highlight=False, soft_wrap=True)
    if examples and count > len(examples):
        console.print(f"    and {count - len(examples):,} more", highlight=False)


def _range(column: ColumnReport) -> str:
    if column.least is None:
        return ""
    if column.distinct is not None and isinstance(column.least, int):  # ids are names: no commas
        return f"{column.least} to {column.greatest}"
    return _spread(column.least, column.greatest)


def _spread(least: Any, greatest: Any) -> str:
    return _short(least) if least == greatest else f"{_short(least)} to {_short(greatest)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else repr(value if len(value) <= 12 else f"{value[:11]}…")


def _lengths(column: ColumnReport) -> str:
    if column.least_length is None:
        return ""
    return f"{_spread(column.least_length, column.greatest_length)} ({column.mean_length:.3g})"


def _share(count: int, share: float) -> str:
    if not count:
        return "0"
    return f"{count:,} ({share:.1%})" if share >= 0.0005 else f"{count:,} (0.0%)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
