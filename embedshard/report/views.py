"""What a page shows of a run: headline numbers, charts, rows of tables. Decides what counts as best; knows no HTML."""

from __future__ import annotations

__all__ = [
    "Cell",
    "Chart",
    "Headline",
    "Row",
    "best",
    "column_slice_tables",
    "compare_metrics",
    "compared_charts",
    "config_differences",
    "curve_charts",
    "direction",
    "headlines",
    "hottest_rows",
    "intervals",
    "labels",
    "managed_tables",
    "metric_table",
    "progressive_table",
    "slice_table",
    "validation",
]

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from embedshard.errors import ConfigError
from embedshard.evaluate.ranking import higher_is_better
from embedshard.quantities import number
from embedshard.report.charts import Line, Mark, line_chart, smoothed
from embedshard.report.run import Points, Run, integer, is_number, mapping, numbers

_SMOOTHED_FROM = 30  # points: a shorter curve is shown as it is
_SPANS = 30  # a curve is smoothed over so many parts of it


@dataclass(frozen=True)
class Headline:
    """A metric that stands large at the top.

    Attributes:
        metric: its name.
        value: the model's.
        split: the set that it was measured on.
        baseline: the name of the best baseline; None where there is none.
        reference: its value.
        is_better: whether the model is better than it.
    """

    metric: str
    value: float
    split: str
    baseline: str | None = None
    reference: float | None = None
    is_better: bool | None = None

    @property
    def difference(self) -> float | None:
        """How far the model lies above the baseline."""
        return None if self.reference is None else self.value - self.reference


@dataclass(frozen=True)
class Cell:
    """A value of a table; the best of its group stands out."""

    value: float | None
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table of values."""

    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Chart:
    """A drawn chart with what stands around it.

    Attributes:
        title: above it.
        svg: the drawing.
        latest: its last value, in words.
        legend: (label, colour) of each line; empty where there is one line.
        note: below it.
    """

    title: str
    svg: Markup
    latest: str
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""


@dataclass(frozen=True)
class HotRow:
    """One of the rows of a table that are looked up most, with its share of the feature's lookups."""

    row: int | None
    id: str | None
    count: int
    share: float | None


@dataclass(frozen=True)
class ManagedTable:
    """What became of the ids of a managed table, and how full its buckets are.

    Attributes:
        name: the table's.
        rows: that ids can hold.
        used: rows that hold one at the end.
        admitted: ids that were given a row, of 1,000 steps.
        evicted: ids that lost theirs, of 1,000 steps.
        unknown_share: of the lookups, those of ids without a row.
        emptiest: share of the rows in use in the bucket that has the least.
        fullest: in the one that has the most.
    """

    name: str
    rows: int
    used: int
    admitted: float | None
    evicted: float | None
    unknown_share: float | None
    emptiest: float | None
    fullest: float | None


# --------------------------------------------------------------------------------------------------------- what is best
def direction(metric: str) -> int:
    """Returns 1 where a greater value of the metric is better, -1 where a smaller one is, 0 for an unknown metric."""
    try:
        return 1 if higher_is_better(metric) else -1
    except ConfigError:
        return 0


def best(metric: str, values: Iterable[float | None]) -> float | None:
    """Returns the best of those values that there are; None without any, or where the metric is not known."""
    found, sign = [value for value in values if value is not None], direction(metric)
    return max(found, key=lambda value: sign * value) if found and sign else None


def _row(metric: str, name: str, values: Sequence[float | None]) -> Row:
    winner = best(metric, values) if sum(value is not None for value in values) > 1 else None
    return Row(name, [Cell(value, value is not None and value == winner) for value in values])


# -------------------------------------------------------------------------------------------------------------- one run
def headlines(run: Run) -> list[Headline]:
    """Returns the metrics of the test set, else of the validation set, each beside the best baseline."""
    if not run.test_metrics:
        return [Headline(metric, value, "validation") for metric, value in validation(run).items()]
    found = []
    for metric, value in run.test_metrics.items():
        baselines = {name: values[metric] for name, values in run.baselines.items() if metric in values}
        reference, sign = best(metric, baselines.values()), direction(metric)
        if reference is None:
            found.append(Headline(metric, value, "test"))
            continue
        name = next(name for name, other in baselines.items() if other == reference)
        found.append(Headline(metric, value, "test", name, reference, sign * (value - reference) > 0))
    return found


def validation(run: Run) -> dict[str, float]:
    """The validation metrics at the selected step; at the last one that was measured where none is selected yet."""
    return run.measured("validation", run.selected_step) or run.measured("validation")


def metric_table(run: Run) -> tuple[list[str], list[Row]]:
    """Returns the columns and the rows of the table of metrics: the model's and each baseline's on the test set.

    The best of a row stands out. The validation set's values are on other rows of data, so they do not compete.
    """
    validated = validation(run)
    rows = []
    for metric in dict.fromkeys((*run.test_metrics, *validated, *(m for values in run.baselines.values() for m in values))):
        tested = _row(metric, metric, [run.test_metrics.get(metric), *(b.get(metric) for b in run.baselines.values())])
        rows.append(Row(metric, [*tested.cells, *([Cell(validated.get(metric))] if validated else [])]))
    return ["model", *run.baselines, *(["model, validation"] if validated else [])], rows


def slice_table(run: Run) -> tuple[list[str], list[Row], dict[str, int | None]]:
    """Returns the metrics, a row for each slice of the catalogue, and how many queries each has."""
    slices = {str(name): mapping(values) for name, values in mapping(run.result.get("slices")).items()}
    metrics = list(dict.fromkeys(m for values in slices.values() for m in values if m != "queries"))
    rows = [Row(name, [Cell(numbers(values).get(m)) for m in metrics]) for name, values in slices.items()]
    return metrics, rows, {name: integer(values.get("queries")) for name, values in slices.items()}


def progressive_table(run: Run) -> tuple[list[str], list[tuple[str, int, dict[str, float]]]]:
    """Returns the metrics of progressive validation, and of each partition its name, the steps done by then and the values.

    They are taken from the curves, since a run that waits for partitions has no result yet.
    """
    prefix = "progressive/"
    metrics = [name.removeprefix(prefix) for name in run.curves if name.startswith(prefix)]
    names = run.inventory.get("names", [])
    rows = []
    for step, value in run.curves.get(f"{prefix}partition", ()):
        number = int(value)
        name = str(names[number - 1]) if number <= len(names) and names[number - 1] else str(number)
        rows.append((name, step, {metric: dict(run.curves[prefix + metric]).get(step, math.nan) for metric in metrics}))
    return [metric for metric in metrics if metric != "partition"], rows


def column_slice_tables(run: Run) -> dict[str, tuple[list[str], list[Row], dict[str, int | None]]]:
    """Returns, for each column by which the test set was sliced, the metrics, a row for each value, and its rows' number."""
    found = {}
    for column, values in mapping(run.result.get("column_slices")).items():
        slices = {str(name): mapping(of_slice) for name, of_slice in mapping(values).items()}
        metrics = list(dict.fromkeys(m for of_slice in slices.values() for m in of_slice if m != "rows"))
        rows = [Row(name, [Cell(numbers(of_slice).get(m)) for m in metrics]) for name, of_slice in slices.items()]
        found[str(column)] = metrics, rows, {name: integer(of_slice.get("rows")) for name, of_slice in slices.items()}
    return found


def intervals(run: Run) -> dict[str, tuple[float, float]]:
    """Returns within which two values 95 % of resamples of the test set have each metric."""
    found = {}
    for metric, edges in mapping(run.result.get("intervals")).items():
        if isinstance(edges, list) and len(edges) == 2 and all(is_number(edge) for edge in edges):
            found[str(metric)] = edges[0], edges[1]
    return found


def hottest_rows(feature: Mapping[str, Any]) -> list[HotRow]:
    """Returns the hottest rows of a feature's statistics."""
    total = integer(feature.get("ids"))
    found = []
    for entry in feature.get("hottest") or []:
        row, count, *rest = entry
        raw = rest[0] if rest else None
        found.append(
            HotRow(
                None if row is None else int(row),
                None if raw is None else str(raw),
                int(count),
                count / total if total else None,
            )
        )
    return found


def managed_tables(run: Run) -> list[ManagedTable]:
    """Returns the managed tables of a run that has ended; what happened at steps that were rolled back is left out."""
    found = []
    for name, kept in mapping(run.result.get("vocabularies")).items():
        prefix, of_table = f"train/vocabulary/{name}/", mapping(kept)
        steps = max((step for step, _ in run.curves.get(f"{prefix}admitted", ())), default=0)
        admitted, evicted = (
            1000 * sum(value for _, value in run.curves.get(prefix + what, ())) / steps if steps else None
            for what in ("admitted", "evicted")
        )
        unknown = [value for _, value in run.curves.get(f"{prefix}unknown_share", ())]
        fill = [used / size for used, size in of_table.get("buckets") or [] if size]
        found.append(
            ManagedTable(
                name=str(name),
                rows=integer(of_table.get("rows")) or 0,
                used=integer(of_table.get("used")) or 0,
                admitted=admitted,
                evicted=evicted,
                unknown_share=sum(unknown) / len(unknown) if unknown else None,
                emptiest=min(fill, default=None),
                fullest=max(fill, default=None),
            )
        )
    return found


def curve_charts(run: Run) -> list[Chart]:
    """Returns the charts of a run: its loss, each metric of the validation set, its speed, and what else it logged."""
    restarts = [
        Mark(f"attempt {attempt.number}: went on after step {attempt.resumed_after:,}", attempt.resumed_after)
        for attempt in run.attempts[1:]
        if attempt.resumed_after is not None
    ]
    charts = []
    if run.curves.get("train/loss"):
        charts.append(_loss_chart(run.curves["train/loss"], restarts))
    for name, points in run.curves.items():
        if name.startswith("validation/"):
            charts.append(_validation_chart(run, name.partition("/")[2], points, restarts))
    speed = run.curves.get("train/samples_per_second")
    if speed:
        svg = line_chart("Samples a second", [Line("samples/s", speed)], restarts, from_zero=True)
        charts.append(Chart("Samples a second", svg, number(round(speed[-1][1])), note="Mean of the attempt so far."))
    charts += _streaming_charts(run, restarts)
    groups: dict[str, list[str]] = {}
    for name in run.curves:
        split, _, rest = name.partition("/")
        if rest.startswith(("window/", "run/", "waterfall/", "beside/")):
            continue
        if split == "train" and rest not in ("loss", "epoch", "samples_per_second", "bytes_read"):
            groups.setdefault(rest.partition("/")[0], []).append(name)
    for title, names in groups.items():
        lines = [Line(name.rpartition("/")[2], run.curves[name], colour) for colour, name in enumerate(sorted(names))]
        legend = [(line.label, line.colour) for line in lines] if len(lines) > 1 else []
        latest = number(lines[0].points[-1][1]) if len(lines) == 1 else ""
        shown = "seconds a step, by stage" if title == "seconds" else title.replace("_", " ")
        charts.append(Chart(shown, line_chart(title, lines, restarts, from_zero=True), latest, legend))
    return charts


def _streaming_charts(run: Run, restarts: Sequence[Mark]) -> list[Chart]:
    """Returns a chart for each metric of the training rows: of the steps since the last measurement, and of the run."""
    charts = []
    for name, points in run.curves.items():
        if name.startswith("train/window/"):
            metric = name.removeprefix("train/window/")
            lines = [Line("window", points), Line("run", run.curves.get(f"train/run/{metric}", ()), 1)]
            legend = [(line.label, line.colour) for line in lines]
            title, note = f"Training {metric}", "Of training rows, as they were predicted before they were learnt."
            charts.append(Chart(title, line_chart(title, lines, restarts), number(points[-1][1]), legend, note))
    return charts


def _loss_chart(points: Points, restarts: Sequence[Mark]) -> Chart:
    title = "Training loss"
    if len(points) < _SMOOTHED_FROM:
        return Chart(title, line_chart(title, [Line("loss", points)], restarts), number(points[-1][1]))
    smooth = smoothed(points, 1 + len(points) / _SPANS)
    lines = [Line("one step", points, is_faint=True), Line("smoothed", smooth)]
    note = "Pale: the loss of single steps. Full: their moving average."
    return Chart(title, line_chart(title, lines, restarts), number(smooth[-1][1]), note=note)


def _validation_chart(run: Run, metric: str, points: Points, restarts: Sequence[Mark]) -> Chart:
    chosen = [Mark("the selected checkpoint", step, value) for step, value in points if step == run.selected_step]
    winner = best(metric, (value for _, value in points))
    note = f"Ring: the selected checkpoint, step {chosen[0].step:,}, at {number(chosen[0].value)}. " if chosen else ""
    if winner is not None:
        step = next(step for step, value in points if value == winner)
        if not chosen or chosen[0].value != winner:
            note += f"Best: {number(winner)} at step {step:,}."
    title = f"Validation {metric}"
    return Chart(title, line_chart(title, [Line(metric, points)], [*restarts, *chosen]), number(points[-1][1]), note=note)


# --------------------------------------------------------------------------------------------------------- several runs
def labels(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run that no other has: its folder's, else its path."""
    folders = [run.folder for run in runs]
    return [folder if folders.count(folder) == 1 else run.location.uri for run, folder in zip(runs, folders, strict=True)]


def compare_metrics(runs: Sequence[Run], values: Sequence[Mapping[str, float]]) -> tuple[list[str], list[Row]]:
    """Returns the metrics that any run has, and a row for each run; the best of each metric stands out."""
    metrics = list(dict.fromkeys(metric for found in values for metric in found))
    columns = [_row(metric, metric, [found.get(metric) for found in values]).cells for metric in metrics]
    names = labels(runs)
    return metrics, [Row(name, [column[place] for column in columns]) for place, name in enumerate(names)]


def compared_charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns charts with a line for each run: the validation metrics, the loss, the speed."""
    names = labels(runs)
    curves = list(dict.fromkeys(name for run in runs for name in run.curves))
    shown = [name for name in curves if name.startswith("validation/")]
    shown += [name for name in ("train/loss", "train/samples_per_second") if name in curves]
    titles = {"train/loss": "Training loss", "train/samples_per_second": "Samples a second"}
    charts = []
    longest = max((len(run.curves.get("train/loss", ())) for run in runs), default=0)
    for name in shown:
        title = titles.get(name) or f"Validation {name.partition('/')[2]}"
        lines = []
        for colour, (label, run) in enumerate(zip(names, runs, strict=True)):
            points = run.curves.get(name, ())
            is_smoothed = name == "train/loss" and longest >= _SMOOTHED_FROM
            lines.append(Line(label, smoothed(points, 1 + longest / _SPANS) if is_smoothed else points, colour))
        note = "Moving averages of the loss of single steps." if name == "train/loss" and longest >= _SMOOTHED_FROM else ""
        charts.append(Chart(title, line_chart(title, lines, from_zero="second" in name), "", note=note))
    return charts


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns each (path, value of each run) in which the runs' configs differ.

    Defaults count as written where all configs fit this version.
    """
    configs = [run.config for run in runs if run.config is not None]
    trees = [config.model_dump(mode="json") for config in configs] if len(configs) == len(runs) else [r.tree for r in runs]
    flat = [dict(_flattened(tree)) for tree in trees]
    found = []
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        values = [leaves.get(path, "absent") for leaves in flat]
        if len(set(values)) > 1:
            found.append((path, values))
    return found


def _flattened(node: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flattened(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False, default=str)
