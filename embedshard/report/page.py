"""From runs to a page: one file that needs nothing else, not even a network, and runs no script."""

from __future__ import annotations

__all__ = ["comparison_page", "report_page", "write_report"]

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from embedshard import __version__
from embedshard.config import dump_tree
from embedshard.errors import ConfigError
from embedshard.quantities import MISSING, duration, number, share, size
from embedshard.report import views
from embedshard.report.read import read_run
from embedshard.report.run import Run, mapping, numbers
from embedshard.report.waterfall import waterfall_chart, waterfall_of
from embedshard.storage import Location, PathOrUri, locate, reaching

_MINUS = "\N{MINUS SIGN}"


def write_report(folders: Sequence[PathOrUri | Location], out: PathOrUri | None = None, is_over: bool = False) -> Location:
    """Writes the report of a run, or the comparison of several; returns where it is.

    Args:
        folders: of the runs.
        out: the file; `report.html` in the folder of one run, `comparison.html` here for several, where not given.
        is_over: whether it is known that no process trains the runs any more.

    Raises:
        ConfigError: if a folder holds no run, or the page cannot be written.
        StorageError: if a folder cannot be reached.
    """
    now = datetime.now(UTC)
    runs = []
    for folder in map(locate, folders):
        with reaching(folder):
            runs.append(read_run(folder, now, is_over))
    page = report_page(runs[0], now) if len(runs) == 1 else comparison_page(runs, now)
    if out is not None:
        written = locate(out)
    else:
        written = runs[0].location.join("report.html") if len(runs) == 1 else locate("comparison.html")
    try:
        written.write_text_atomically(page)
    except OSError as error:
        raise ConfigError(
            f"{written.uri} cannot be written: {error.strerror or error}. Give another place with --out, in a folder that "
            f"exists."
        ) from error
    return written


def report_page(run: Run, now: datetime) -> str:
    """Returns the page of a run."""
    waterfall = waterfall_of(run)
    return (
        _templates()
        .get_template("report.html")
        .render(
            title=run.name,
            now=now,
            run=run,
            headlines=views.headlines(run),
            charts=views.curve_charts(run),
            metrics=views.metric_table(run),
            slices=views.slice_table(run),
            progressive=views.progressive_table(run),
            managed=views.managed_tables(run),
            column_slices=views.column_slice_tables(run),
            intervals=views.intervals(run),
            ids=mapping(run.result.get("ids")),
            bad_rows={split: mapping(found) for split, found in mapping(run.result.get("bad_rows")).items()},
            waterfall=waterfall,
            waterfall_chart=None if waterfall is None else waterfall_chart(waterfall),
            config_text=dump_tree(run.tree),
        )
    )


def comparison_page(runs: Sequence[Run], now: datetime) -> str:
    """Returns the page that puts runs beside each other."""
    fingerprints = {run.inventory.get("fingerprint") for run in runs} - {None}
    return (
        _templates()
        .get_template("comparison.html")
        .render(
            title=f"{len(runs)} runs compared",
            now=now,
            runs=list(zip(views.labels(runs), runs, strict=True)),
            test=views.compare_metrics(runs, [run.test_metrics for run in runs]),
            validation=views.compare_metrics(runs, [views.validation(run) for run in runs]),
            charts=views.compared_charts(runs),
            differences=views.config_differences(runs),
            has_same_data=len(fingerprints) <= 1,
        )
    )


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "share": share,
        "size": size,
        "duration": duration,
        "moment": _moment,
        "signed": _signed,
        "numbers": numbers,
        "mapping": mapping,
        "hottest_rows": views.hottest_rows,
    }
    environment.globals |= {"version": __version__, "missing": MISSING, "direction": views.direction}
    return environment


def _moment(time: datetime | None) -> str:
    return MISSING if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _signed(value: float, as_share: bool = False) -> str:
    text = share(abs(value)) if as_share else number(abs(value))
    return f"{'+' if value >= 0 else _MINUS}{text}"
