"""Reads what a run left in its folder, and makes sense of it: which lines count, which work was rolled back, how it ended.

Nothing but the folder is read: no data, no model, no environment, so that a copied folder gives the same report anywhere.
What is missing stays None, and what is damaged is said in `Run.problems`: stopped runs, and older ones, have reports too.
"""

from __future__ import annotations

__all__ = ["read_run"]

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from embedshard.config import Config
from embedshard.errors import ConfigError
from embedshard.report.files import (
    committed_steps,
    read_config,
    read_json,
    read_json_lines,
    read_quarantine,
    read_tree,
)
from embedshard.report.run import Attempt, Points, Run, State, integer, is_number, mapping
from embedshard.storage import Location, PathOrUri, locate

_SILENCE = timedelta(minutes=10)
"""How long an unfinished run may say nothing before it counts as stopped."""


def read_run(place: PathOrUri | Location, now: datetime, is_over: bool = False) -> Run:
    """Reads a run's folder.

    Args:
        place: the folder.
        now: the time, to tell a run that goes on from one that was stopped.
        is_over: whether it is known that no process trains the run any more.

    Raises:
        ConfigError: if the folder holds no run, or a config that is no YAML.
    """
    folder = locate(place)
    if not folder.join("config.yaml").is_file():
        found = "has no config.yaml, so it holds no run" if folder.exists() else "is not there"
        raise ConfigError(f"{folder.uri} {found}. Give the folder that 'embedshard train' printed when it began.")
    problems: list[str] = []
    tree = read_tree(folder.join("config.yaml"))
    config = read_config(tree, folder.join("config.yaml"), problems)
    inventory = mapping(read_json(folder.join("inventory.json"), problems))
    result = mapping(read_json(folder.join("result.json"), problems))
    starts = read_json_lines(folder.join("attempts.jsonl"), problems)
    lines = [
        line
        for line in read_json_lines(folder.join("metrics.jsonl"), problems)
        if integer(line.get("step")) is not None and integer(line.get("attempt")) is not None
    ]
    attempts = _attempts(starts, lines, _ledger_spans(folder.join("ledger"), problems))
    lines = _surviving(lines, attempts)
    rows, reasons = read_quarantine(folder.join("quarantine"), problems)
    return Run(
        location=folder,
        tree=tree,
        config=config,
        attempts=attempts,
        curves=_curves(lines),
        result=result,
        inventory=inventory,
        quarantined=rows,
        quarantine_reasons=reasons,
        state=_state(_planned_steps(config, inventory), result, attempts, lines, now, is_over),
        checkpoints=committed_steps(folder.join("checkpoints")),
        problems=tuple(problems),
    )


def _ledger_spans(folder: Location, problems: list[str]) -> dict[int, tuple[int, int]]:
    """Returns, by attempt, (the step after which it went on, the last step that it wrote down)."""
    steps: defaultdict[int, list[int]] = defaultdict(list)
    for name in folder.list_names():
        if not fnmatchcase(name, "*-*.jsonl"):
            continue
        number = name.partition("-")[0]
        for line in read_json_lines(folder.join(name), problems):
            first, last = integer(line.get("first_step")), integer(line.get("last_step"))
            if number.isdigit() and first is not None and last is not None:
                steps[int(number)] += [first, last + 1]
    return {attempt: (min(found), max(found)) for attempt, found in steps.items()}


def _attempts(
    starts: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], spans: Mapping[int, tuple[int, int]]
) -> tuple[Attempt, ...]:
    logged: defaultdict[int, list[int]] = defaultdict(list)
    for line in lines:
        if not _is_conclusion(line):
            logged[line["attempt"]].append(line["step"])
    known = {number: start for start in starts if (number := integer(start.get("attempt"))) is not None}
    found: list[Attempt] = []
    overtaken_after: int | None = None
    for number in sorted({*known, *logged, *spans}, reverse=True):
        steps = logged[number] + ([spans[number][1]] if number in spans else [])
        start = known.get(number, {})
        begin = spans[number][0] if number in spans else 0 if number == 1 else None
        if "resumed_from" in start:
            origin = start["resumed_from"]
            begin = integer(origin.get("step")) if isinstance(origin, Mapping) else 0
        found.append(
            Attempt(
                number=number,
                time=_time(start.get("time")),
                host=None if start.get("host") is None else str(start["host"]),
                world_size=integer(start.get("world_size")),
                resumed_after=begin,
                last_step=max(steps, default=None),
                overtaken_after=overtaken_after,
                is_last=not found,
            )
        )
        if begin is None and logged[number]:  # no ledger: the first step that it logged bounds where it went on
            begin = min(logged[number]) - 1
        overtaken_after = min((step for step in (overtaken_after, begin) if step is not None), default=None)
    return tuple(reversed(found))


def _surviving(lines: Sequence[dict[str, Any]], attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Returns the lines of steps that no later attempt did again, in the order of their steps."""
    ends = {attempt.number: attempt.overtaken_after for attempt in attempts}
    kept = []
    for line in lines:
        end = ends.get(line["attempt"])
        if end is None or line["step"] <= end:
            kept.append(line)
    return sorted(kept, key=lambda line: (line["step"], line["attempt"]))


def _is_conclusion(line: Mapping[str, Any]) -> bool:
    """Returns whether a line tells of the test set: its step is the selected one, not where the attempt was."""
    return any(name.startswith("test/") for name in line)


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        for name, value in line.items():
            if "/" in name and is_number(value):
                found[name][line["step"]] = float(value)
    return {name: tuple(points.items()) for name, points in found.items()}


def _state(
    planned: int | None,
    result: Mapping[str, Any],
    attempts: Sequence[Attempt],
    lines: Sequence[Mapping[str, Any]],
    now: datetime,
    is_over: bool,
) -> State:
    steps = [line["step"] for line in lines if not _is_conclusion(line)]
    if attempts and attempts[-1].last_step is not None:
        steps.append(attempts[-1].last_step)
    step, done = max(steps, default=0), integer(result.get("steps"))
    signs = [*(_time(line.get("time")) for line in lines), *(attempt.time for attempt in attempts)]
    last_sign = max((sign for sign in signs if sign is not None), default=None)
    if done is not None and done >= step:
        return State("finished", done, planned, last_sign)
    latest = max((line["attempt"] for line in lines), default=0)
    times = sorted(time for line in lines if line["attempt"] == latest and (time := _time(line.get("time"))) is not None)
    gaps = (later - earlier for earlier, later in pairwise(times))
    silence = max(_SILENCE, 3 * max(gaps, default=timedelta(0)))
    is_silent = last_sign is None or now - last_sign > silence
    return State("stopped" if is_over or is_silent else "running", step, planned, last_sign)


def _planned_steps(config: Config | None, inventory: Mapping[str, Any]) -> int | None:
    epoch_steps = integer(inventory.get("epoch_steps"))
    if config is None or epoch_steps is None:
        return None
    steps = config.train.epochs * epoch_steps
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def _time(value: Any) -> datetime | None:
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
