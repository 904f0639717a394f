"""The waterfall of a training step: stages one below another, each where the former ends; and the threads beside it."""

from __future__ import annotations

__all__ = ["waterfall_chart", "waterfall_of"]

from collections.abc import Mapping
from itertools import pairwise

from markupsafe import Markup

from embedshard.quantities import number, share
from embedshard.report.charts import text_at, ticks
from embedshard.report.run import Run
from embedshard.stages import BESIDE, READING, STEP_STAGES, Waterfall

_WIDTH, _LABEL, _VALUE, _ROW = 960, 128, 150, 21
_BAR, _TOP, _BOTTOM = 13, 6, 26
_COLOUR_OF = {
    **dict.fromkeys(("read_wait", "agree", "dense_sync"), 1),
    **dict.fromkeys(("copy", "input_dist", "output_dist"), 3),
    **dict.fromkeys(("lookup", "table_backward"), 0),
    **dict.fromkeys(("dense_forward", "loss", "dense_backward", "dense_update"), 2),
    **dict.fromkeys(READING, 5),
    "save": 6,
}
_OTHER, _IDLE = 7, "idle"


def waterfall_of(run: Run) -> Waterfall | None:
    """Returns the mean step of a run's last attempt; None where it logged none.

    Of several measurements the first is left out: things are loaded in it. Each counts by the steps that it is of.
    """
    prefix = "train/waterfall/"
    stages = {name: dict(run.curves.get(prefix + name, ())) for name in STEP_STAGES}
    resumed = (run.attempts[-1].resumed_after or 0) if run.attempts else 0
    steps = sorted({step for points in stages.values() for step in points if step > resumed})
    if not steps:
        return None
    weights = {after: after - before for before, after in pairwise([resumed, *steps])}
    if len(steps) > 1:
        del weights[steps[0]]
    beside = {name: dict(run.curves.get(f"train/beside/{name}", ())) for name in BESIDE}
    means = {name: _mean(points, weights) for name, points in stages.items()}
    return Waterfall(means, {name: _mean(points, weights) for name, points in beside.items()}, run.workers or 1)


def _mean(points: Mapping[int, float], weights: Mapping[int, float]) -> float:
    return sum(points.get(step, 0.0) * weight for step, weight in weights.items()) / sum(weights.values())


def waterfall_chart(found: Waterfall) -> Markup:
    """Returns the drawing; stages that took no time are left out."""
    stages = [(name, seconds) for name, seconds in found.stages.items() if seconds > 0]
    beside = [(name, seconds) for name, seconds in found.beside.items() if seconds > 0]
    reading = sum(seconds for name, seconds in beside if name != "save")
    longest = max(found.wall, reading, found.beside.get("save", 0.0)) or 1.0
    scale = (_WIDTH - _LABEL - _VALUE) / longest
    height = _TOP + _ROW * (len(stages) + len(beside) + bool(beside)) + _BOTTOM
    parts = [_axis(1e3 * longest, scale / 1e3, height)]
    top, begin = _TOP, 0.0
    for name, seconds in stages:
        parts.append(_row(top, name, STEP_STAGES[name], begin, seconds, scale, found.wall))
        top, begin = top + _ROW, begin + seconds
    if beside:
        parts.append(text_at(0, top + _ROW - 6, "beside it, in threads:", "start"))
        top, begin = top + _ROW, 0.0
    for name, seconds in beside:
        begin = 0.0 if name == "save" else begin
        parts.append(_row(top, name, BESIDE[name], begin, seconds, scale, found.wall))
        top, begin = top + _ROW, begin + seconds
    return Markup('<svg class="chart waterfall" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, "Where a step's time goes", Markup("").join(parts)
    )


def _row(top: float, name: str, meaning: str, begin: float, seconds: float, scale: float, wall: float) -> Markup:
    kind = _IDLE if name == "ahead" else f"c{_COLOUR_OF.get(name, _OTHER)}"
    x, width = _LABEL + begin * scale, max(seconds * scale, 1.0)
    bar = Markup('<rect class="dot {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"/>').format(
        kind, x, top + (_ROW - _BAR) / 2, width, _BAR
    )
    told = f"{number(1e3 * seconds)} ms, {share(seconds / wall)}" if wall else f"{number(1e3 * seconds)} ms"
    title = Markup('<rect class="band" x="0" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        top, _WIDTH, _ROW, f"{name}: {meaning}. {told}"
    )
    base = top + _ROW - 6
    return bar + text_at(_LABEL - 10, base, name, "end") + text_at(_WIDTH, base, told, "end") + title


def _axis(longest_ms: float, scale: float, height: float) -> Markup:
    parts = []
    for tick in ticks(0.0, longest_ms, 6):
        line = '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        parts.append(Markup(line).format(_LABEL + tick * scale, _TOP, height - _BOTTOM))
        parts.append(text_at(_LABEL + tick * scale, height - 9, f"{tick:g}", "middle"))
    parts.append(text_at(_WIDTH - _VALUE + 24, height - 9, "ms", "start"))
    return Markup("").join(parts)
