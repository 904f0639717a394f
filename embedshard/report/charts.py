"""Line charts as inline SVG: axes, round ticks, a hover title at each step. Colours come from the page's style sheet.

A chart is drawn for a width of 480 units and scales with its column, so its letters stay legible on a telephone.
"""

from __future__ import annotations

__all__ = ["Line", "Mark", "line_chart", "smoothed", "text_at", "ticks"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from embedshard.quantities import number
from embedshard.report.run import Points

_WIDTH, _HEIGHT = 480, 230
_TOP, _RIGHT, _BOTTOM = 12, 20, 36
_COLOURS = 8
_DIGIT_WIDTH = 6.7  # of the letters on the axes
_UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from which value on, what of, its letter
_MOST_POINTS, _MOST_TITLES = 400, 80
_DOTTED_POINTS = 20  # a line of no more points shows each


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        label: its name in the legend and in hover titles.
        points: (step, value), ascending.
        colour: which of the style sheet's, from 0.
        is_faint: whether it lies pale in the background, as the raw values behind a smoothed line.
    """

    label: str
    points: Points
    colour: int = 0
    is_faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on a chart: a vertical line at a step, or a ring around a point where there is a value."""

    label: str
    step: int
    value: float | None = None


def smoothed(points: Points, span: float) -> Points:
    """Returns the exponential moving average over about `span` points, not drawn to zero at its beginning."""
    weight = 1 - 2 / (span + 1)
    found, total, seen = [], 0.0, 0.0
    for step, value in points:
        total, seen = weight * total + (1 - weight) * value, weight * seen + (1 - weight)
        found.append((step, total / seen))
    return found


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers, steps of 1, 2 or 5 times a power of ten, that lie in [low, high]."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), from_zero: bool = False) -> Markup:
    """Returns a chart of values over steps.

    Args:
        title: what a screen reader says of it.
        lines: with a point at least in one of them.
        marks: restarts and chosen points.
        from_zero: whether the axis of values begins at 0.
    """
    last_step = max((step for line in lines for step, _ in line.points), default=1)
    plot = _Plot(0, max(last_step, 1), *_range(lines, from_zero))
    parts = [plot.axes()]
    parts += [plot.restart(mark) for mark in marks if mark.value is None]
    parts += [plot.curve(line) for line in lines if line.points]
    parts += [plot.ring(mark) for mark in marks if mark.value is not None]
    parts.append(plot.titles(lines, marks))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(parts)
    )


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    """The least and the greatest value to show. A pale line's spikes may be cut off at the top, a full line's never."""
    full = sorted(value for line in lines if not line.is_faint for _, value in line.points)
    pale = sorted(value for line in lines if line.is_faint for _, value in line.points)
    if pale:
        cut = len(pale) // 100
        full += [pale[cut], pale[-1 - cut]]
    low, high = min(full), max(full)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _tick_texts(values: Sequence[float]) -> list[str]:
    """Returns what stands beside the ticks: of one unit and with as many decimals as tell them apart."""
    greatest = max(map(abs, values), default=0.0)
    unit, letter = next(((unit, letter) for least, unit, letter in _UNITS if greatest >= least), (1.0, ""))
    step = (values[1] - values[0] if len(values) > 1 else greatest) / unit or 1.0
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    if decimals > 6:
        return [f"{value:.1e}" for value in values]
    return [f"{value / unit:,.{decimals}f}{letter}" if value else "0" for value in values]


def _thinned(points: Points) -> Points:
    """Returns few enough points to draw: of each stretch its least and greatest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    found: list[tuple[int, float]] = []
    stretch = math.ceil(len(points) / (_MOST_POINTS // 2))
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return found


class _Plot:
    """The mapping from steps and values to places on the page."""

    def __init__(self, first_step: float, last_step: float, low: float, high: float) -> None:
        self._steps, self._values = (first_step, last_step), (low, high)
        self._step_ticks = [tick for tick in ticks(first_step, last_step, 6) if tick.is_integer()]
        self._value_ticks = ticks(low, high, 5)
        self._step_texts = _tick_texts(self._step_ticks)
        self._value_texts = _tick_texts(self._value_ticks)
        self._left = 14 + _DIGIT_WIDTH * max(map(len, self._value_texts), default=1)

    def axes(self) -> Markup:
        """Returns lines at the ticks, and what stands beside them."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for value, text in zip(self._value_ticks, self._value_texts, strict=True):
            parts.append(
                Markup('<line class="grid" x1="{0:.1f}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(
                    self._left, right, self._y(value)
                )
            )
            parts.append(text_at(self._left - 7, self._y(value) + 4, text, "end"))
        parts.append(
            Markup('<line class="axis" x1="{0:.1f}" x2="{1}" y1="{2}" y2="{2}"/>').format(self._left, right, bottom)
        )
        for step, text in zip(self._step_ticks, self._step_texts, strict=True):
            place = self._x(step)
            is_at_edge = place > right - _DIGIT_WIDTH * len(text) / 2
            parts.append(text_at(right if is_at_edge else place, bottom + 17, text, "end" if is_at_edge else "middle"))
        parts.append(text_at((self._left + right) / 2, _HEIGHT - 4, "step", "middle"))
        return Markup("").join(parts)

    def curve(self, line: Line) -> Markup:
        """Returns a line; its points too, where they are few."""
        points = _thinned(line.points)
        path = " ".join(f"{self._x(step):.1f},{self._y(value):.1f}" for step, value in points)
        classes = f"line c{line.colour % _COLOURS}" + (" faint" if line.is_faint else "")
        drawn = Markup('<polyline class="{}" points="{}"/>').format(classes, path)
        if len(points) > _DOTTED_POINTS or line.is_faint:
            return drawn
        dot = Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
        return drawn + Markup("").join(
            dot.format(line.colour % _COLOURS, self._x(step), self._y(value)) for step, value in points
        )

    def restart(self, mark: Mark) -> Markup:
        """Returns a vertical line."""
        line = '<line class="restart" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"><title>{3}</title></line>'
        return Markup(line).format(self._x(mark.step), _TOP, _HEIGHT - _BOTTOM, mark.label)

    def ring(self, mark: Mark) -> Markup:
        """Returns a ring around a point."""
        assert mark.value is not None
        ring = '<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="6"/>'
        return Markup(ring).format(self._x(mark.step), self._y(mark.value))

    def titles(self, lines: Sequence[Line], marks: Sequence[Mark]) -> Markup:
        """Returns bands over the whole height that tell, where the pointer is, each line's value."""
        steps = sorted({step for line in lines for step, _ in line.points})
        steps = steps[:: math.ceil(len(steps) / _MOST_TITLES)]
        values = [(line.label, dict(line.points)) for line in lines]
        edges = [self._left, *((self._x(a) + self._x(b)) / 2 for a, b in pairwise(steps)), float(_WIDTH - _RIGHT)]
        parts = []
        for step, (left, right) in zip(steps, pairwise(edges), strict=True):
            told = [f"step {step:,}", *(f"{label} {number(found[step])}" for label, found in values if step in found)]
            told += [mark.label for mark in marks if left <= self._x(mark.step) < right or mark.step == step]
            parts.append(
                Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                    left, _TOP, max(right - left, 0.5), _HEIGHT - _BOTTOM - _TOP, "\n".join(told)
                )
            )
        return Markup("").join(parts)

    def _x(self, step: float) -> float:
        first, last = self._steps
        return self._left + (step - first) / (last - first) * (_WIDTH - _RIGHT - self._left)

    def _y(self, value: float) -> float:
        low, high = self._values
        place = (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - min(max(place, 0.0), 1.0) * (_HEIGHT - _BOTTOM - _TOP)


def text_at(x: float, y: float, text: str, anchor: str) -> Markup:
    """Returns a text that begins, has its middle or ends at a place, as its anchor says."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
