"""A measure: some work, how long it takes, at which rate that is, and which part of its limit.

What is measured and what limits it take turns, so that both meet the same noise; a share is the median over the turns.
"""

from __future__ import annotations

__all__ = ["Limit", "Measure", "Timer", "peak_memory", "waiting"]

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import pyarrow as pa
import torch

from embedshard.stages import Laps

_FEWEST, _MOST = 5, 1_000
_FEWEST_SLOW: Final = 3
"""Turns where one takes longer than all of them should."""


@dataclass(frozen=True)
class Limit:
    """What a measure is held against.

    Attributes:
        name: what it is.
        work: of a pass, in the measure's unit.
        seconds: of each turn, in the order of the measure's.
    """

    name: str
    work: float
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The median."""
        return self.work / median(self.seconds)


@dataclass(frozen=True)
class Measure:
    """What was measured, or why it was not.

    Attributes:
        name: of the measure.
        what: one pass of it.
        unit: of its work; `/s` makes it that of its rate.
        work: of a pass.
        seconds: of each pass.
        limit: what it is held against; None where it is a limit itself.
        peak_bytes: the most memory that the process, or on CUDA torch, held during a pass beyond what it held before; None
            where that is not told.
        note: what is to be known of it.
        not_applicable: why it was not measured; empty where it was.
    """

    name: str
    what: str
    unit: str = ""
    work: float = 0.0
    seconds: tuple[float, ...] = ()
    limit: Limit | None = None
    peak_bytes: int | None = None
    note: str = ""
    not_applicable: str = ""

    @property
    def rate(self) -> float | None:
        """The median, in `unit` a second."""
        return self.work / median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The quartiles of the rate."""
        if not self.seconds:
            return None
        if len(self.seconds) == 1:
            return self.work / self.seconds[0], self.work / self.seconds[0]
        first, _, third = quantiles(self.seconds, n=4, method="inclusive")
        return self.work / third, self.work / first

    @property
    def share(self) -> float | None:
        """Which part of its limit's rate it reaches: the median over the turns."""
        if self.limit is None or not self.seconds:
            return None
        pairs = zip(self.seconds, self.limit.seconds, strict=True)
        return median((self.work / own) / (self.limit.work / limits) for own, limits in pairs)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data, with what follows from it."""
        spread = self.spread
        return {
            "name": self.name,
            "what": self.what,
            "status": "not applicable" if self.not_applicable else "measured",
            "why": self.not_applicable or None,
            "unit": f"{self.unit}/s" if self.unit else None,
            "rate": self.rate,
            "rate_quartiles": None if spread is None else list(spread),
            "work": self.work,
            "seconds": list(self.seconds),
            "limit": None if self.limit is None else self.limit.name,
            "limit_rate": None if self.limit is None else self.limit.rate,
            "limit_work": None if self.limit is None else self.limit.work,
            "limit_seconds": None if self.limit is None else list(self.limit.seconds),
            "share": self.share,
            "peak_bytes": self.peak_bytes,
            "note": self.note or None,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Measure:
        """Returns what `to_json` told."""
        limit = None
        if found["limit"] is not None:
            limit = Limit(found["limit"], found["limit_work"], tuple(found["limit_seconds"]))
        return cls(
            name=found["name"],
            what=found["what"],
            unit=(found["unit"] or "").removesuffix("/s"),
            work=found["work"],
            seconds=tuple(found["seconds"]),
            limit=limit,
            peak_bytes=found["peak_bytes"],
            note=found["note"] or "",
            not_applicable=found["why"] or "",
        )


Pass = Callable[[], Any]
"""Makes ready for a pass, and returns what its work is given."""


class Timer:
    """Times passes.

    Args:
        seconds: how long the passes of one measure may take, its limit's beside them; a few are always done.
        device: waited for after each pass.
        meet: called before each pass, as processes that work together do to begin together.
        say_again: given this process's wish to go on, returns that of all; processes that work together must take as many
            turns.
    """

    def __init__(
        self,
        seconds: float,
        device: torch.device,
        meet: Callable[[], None] = lambda: None,
        say_again: Callable[[bool], bool] = lambda wish: wish,
    ) -> None:
        self._seconds, self._device, self._meet, self._say_again = seconds, device, meet, say_again
        self.peak_bytes: int | None = None
        """The most memory that the first work's last warm-up took beyond what was held before."""

    def alone(self, work: Callable[..., Any], prepare: Pass | None = None) -> tuple[float, ...]:
        """Returns the seconds of each pass, after a warm-up; see `in_turns`."""
        return self.in_turns([(work, prepare)])[0]

    def in_turns(self, works: Sequence[tuple[Callable[..., Any], Pass | None]]) -> list[tuple[float, ...]]:
        """Returns the seconds of each pass of several works that take turns, after a warm-up of each.

        Args:
            works: what is timed, and what makes ready for it, untimed, whose result the work is given; None for nothing.
        """
        before = _reset_peak(self._device)
        self._once(*works[0])
        after = peak_memory(self._device)
        self.peak_bytes = None if before is None or after is None else max(after - before, 0)
        for work in works[1:]:
            self._once(*work)
        taken: list[list[float]] = [[] for _ in works]
        begin = time.monotonic()
        wants_more = True
        while wants_more:
            for seconds, work in zip(taken, works, strict=True):
                seconds.append(self._once(*work))
            turns, spent = len(taken[0]), time.monotonic() - begin
            fewest = _FEWEST if spent < self._seconds * (1 + turns) else _FEWEST_SLOW
            wants_more = self._say_again(turns < _MOST and (turns < fewest or spent < self._seconds))
        return [tuple(seconds) for seconds in taken]

    def _once(self, work: Callable[..., Any], prepare: Pass | None) -> float:
        given = () if prepare is None else (prepare(),)
        self._wait()
        self._meet()
        begin = time.perf_counter()
        work(*given)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def waiting(laps: Laps, device: torch.device) -> Iterator[None]:
    """Makes laps wait for the device, so that a stage holds what the device did in it; on a CPU nothing changes."""
    if device.type == "cpu":
        yield
        return
    lap = laps.lap

    def after_the_device(stage: str) -> float:
        torch.cuda.synchronize(device)
        return lap(stage)

    laps.lap = after_the_device  # type: ignore[method-assign]  # of this one alone, for a while
    try:
        yield
    finally:
        del laps.lap


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak(device: torch.device) -> int | None:
    """Lets go of what nobody holds, and sets the high-water mark back; returns it, None where none is told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        pa.default_memory_pool().release_unused()
        try:
            _CLEAR.write_text("5")
        except OSError:
            return None
    return peak_memory(device)


def peak_memory(device: torch.device) -> int | None:
    """Returns the high-water mark of the process's memory, on CUDA of what torch has allocated; None where none is told."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
