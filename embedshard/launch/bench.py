"""`embedshard bench`: measures alone, measures with workers, and a table of both."""

from __future__ import annotations

__all__ = ["Bench", "bench_as_worker", "bench_here", "show"]

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard.bench.computing import computing_measures
from embedshard.bench.exchanging import exchange_measures
from embedshard.bench.machine import copied_memory, describe_machine
from embedshard.bench.measure import Measure, Timer
from embedshard.bench.ranking import ranking_measure
from embedshard.bench.reading import reading_measures
from embedshard.bench.saving import lack_of_room, saving_measures
from embedshard.bench.stepping import Steps, take_steps
from embedshard.bench.synthetic import synthetic_config, write_criteo_shape
from embedshard.config import Config, dump_tree, load_config
from embedshard.data.order import worlds_that_fit
from embedshard.errors import ConfigError, EmbedshardError
from embedshard.launch.processes import run_workers
from embedshard.quantities import MISSING, number, share, size
from embedshard.train.assembly import assemble
from embedshard.train.tracking import json_text
from embedshard.world import World, launched_world_size, open_world

_FORMAT: Final = 1
_BAR, _WIDTH, _MARKDOWN_WIDTH = 44, 120, 1_000
_QUIET: Final = 0.9
_PREFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass
class Bench:
    """What was measured.

    Attributes:
        config: its path; None where it measured data of its own.
        machine: and versions, and the date.
        workers: that measured together.
        seconds: that each measure might take.
        measures: in the order of a step's way, limits beside what they limit.
        steps: whole steps: alone, and with workers.
        left_out: why steps were not taken, where they were not.
    """

    config: str | None
    machine: dict[str, Any]
    workers: int
    seconds: float
    measures: list[Measure] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "format": _FORMAT,
            "config": self.config,
            "machine": self.machine,
            "workers": self.workers,
            "seconds_per_measure": self.seconds,
            "measures": [measure.to_json() for measure in self.measures],
            "steps": [steps.to_json() for steps in self.steps],
            "left_out": self.left_out,
        }


def bench_here(
    config: Path | None,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    *,
    workers: int = 2,
    seconds: float = 1.0,
    device: str = "auto",
    console: Console,
) -> Bench:
    """Measures a config, or data and a model of its own, in this process and in worker processes. Leaves nothing behind.

    Args:
        config: a YAML config; None makes Criteo's shape and two towers, in a folder that is deleted.
        overrides: `a.b=value`, as of `--set`.
        environment: gives the config its `${VAR}`, and is the workers'.
        workers: that exchange; 1 leaves that out.
        seconds: that each measure may take.
        device: `cpu`, `cuda` or `auto`.
        console: told how far it is, and why workers failed.

    Raises:
        EmbedshardError: what a user can act on.
    """
    if launched_world_size(environment) is not None:
        raise ConfigError("bench starts its own workers: unset RANK and WORLD_SIZE, and say how many with --workers.")
    with tempfile.TemporaryDirectory(prefix="embedshard-bench-") as name:
        folder = Path(name)
        path = config
        if path is None:
            console.print("... makes data of Criteo's shape")
            write_criteo_shape(folder)
            path = folder / "bench.yaml"
            path.write_text(dump_tree(synthetic_config(folder)), encoding="utf-8")
        loaded = load_config(path, environment, overrides).config
        if loaded.data.lanes % workers:
            fit = ", ".join(map(str, worlds_that_fit(loaded.data.lanes)))
            raise ConfigError(f"--workers {workers}: data.lanes={loaded.data.lanes} fit {fit}. Choose one of these.")
        with open_world(device) as world:
            found = Bench(None if config is None else str(config), describe_machine(world.device), workers, seconds)
            begin, computed = time.monotonic(), time.process_time()
            for measure in _alone(loaded, world, seconds, folder, lambda what: console.print(f"... {what}")):
                found.measures.append(measure)
            found.machine["computing"] = (time.process_time() - computed) / (time.monotonic() - begin)
            gc.collect()  # the tables are let go before they are made anew
            lack = next(one.not_applicable for one in found.measures if one.name == "checkpoint write")
            if lack:
                found.left_out.append(f"Steps of one worker, whose last saves a checkpoint: {lack}.")
            else:
                console.print("... steps, one worker")
                steps = take_steps(loaded, world, folder / "run-1", seconds)
                assert steps is not None, "rank 0 is told"
                found.steps.append(steps)
        gc.collect()
        if workers > 1:
            console.print(f"... {workers} workers")
            told = _with_workers(path, overrides, workers, seconds, device, environment, folder, console)
            found.measures += [Measure.from_json(one) for one in told["measures"]]
            found.steps += [Steps.from_json(one) for one in told["steps"]]
            found.left_out += told["left_out"]
    return found


def _alone(config: Config, world: World, seconds: float, folder: Path, say: Callable[[str], None]) -> Iterator[Measure]:
    timer = Timer(seconds, world.device)
    parts = assemble(config, world)
    say("memory")
    yield copied_memory(timer, world.device)
    say("reading")
    yield from reading_measures(parts, timer)
    say("lookup, update, dense part")
    yield from computing_measures(parts, timer)
    say("checkpoints")
    yield from saving_measures(parts, timer, folder)
    say("top-k")
    yield ranking_measure(parts, timer)


def _with_workers(
    config: Path,
    overrides: Sequence[str],
    workers: int,
    seconds: float,
    device: str,
    environment: Mapping[str, str],
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Starts this program as so many workers of a bench, and returns what they measured."""
    report = folder / "workers.json"
    arguments = ["bench", str(config), "--seconds", str(seconds), "--device", device, "--report-to", str(report)]
    arguments += [text for override in overrides for text in ("--set", override)]
    code = run_workers(arguments, workers, environment, console)
    if code or not report.exists():
        raise EmbedshardError(
            f"bench --workers {workers}: the workers ended with exit code {code}; what they said is above. Measure without "
            f"them: --workers 1."
        )
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def bench_as_worker(
    config: Path, overrides: Sequence[str], environment: Mapping[str, str], *, seconds: float, device: str, report: Path
) -> None:
    """Measures as one of the workers that `bench_here` started; the first leaves what was found in a file.

    Raises:
        EmbedshardError: what a user can act on.
    """
    loaded = load_config(config, environment, overrides).config
    with open_world(device) as world:
        import torch

        def any_wants(wish: bool) -> bool:
            return bool(world.sum(torch.tensor(int(wish))).item())

        timer = Timer(seconds, world.device, meet=world.barrier, say_again=any_wants)
        found = Bench(str(config), {}, world.world_size, seconds)
        lack = _exchange(loaded, world, timer, report.parent, found)
        gc.collect()
        if lack:
            found.left_out.append(f"Steps of {world.world_size} workers, whose last saves a checkpoint: {lack}.")
        else:
            steps = take_steps(loaded, world, report.parent / f"run-{world.world_size}", seconds)
            found.steps += [] if steps is None else [steps]
        if world.is_rank_zero:
            report.write_text(json_text(found.to_json()), encoding="utf-8")


def _exchange(config: Config, world: World, timer: Timer, folder: Path, found: Bench) -> str:
    """Measures what workers exchange; returns why there is no room for checkpoints, if there is none. Collective."""
    parts = assemble(config, world)
    found.measures += exchange_measures(parts, timer)
    return lack_of_room(parts, folder)


# ---------------------------------------------------------------------------------------------------------------- shown
def show(found: Bench, console: Console, *, as_markdown: bool = False) -> None:
    """Prints what was measured: the machine, each measure beside its limit, and where steps' time goes.

    Args:
        found: what was measured.
        console: where it is printed.
        as_markdown: whether tables are Markdown's, without bars.
    """
    machine = found.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['cpu']}"
    console.print(
        f"{where}; {machine['cores_allowed']} of {machine['cores']} cores, {machine['threads']} threads, load "
        f"{machine['load']:.1f}, {size(machine['memory_bytes'])}; {machine['system']}\n{versions}; {machine['date']}",
        soft_wrap=True,
    )
    if machine["computing"] < _QUIET:
        console.print(
            f"While it measured, this process computed for {machine['computing']:.0%} of the time: others wanted its cores, "
            f"or it waited for the disk or a device. Rates are of the whole time; shares suffer less: limits took turns.",
            soft_wrap=True,
        )
    console.print("\nWhat the machine allows, and how near the system comes (medians):\n", soft_wrap=True)
    table = _table(as_markdown)
    if not console.is_terminal:
        console.width = max(console.width, _MARKDOWN_WIDTH if as_markdown else _WIDTH)
    table.add_column("measure", no_wrap=True)
    for heading in ("rate", "quartiles", "of its limit"):
        table.add_column(heading, justify="right", no_wrap=heading != "of its limit")
    table.add_column("limit")
    table.add_column("memory at its peak", justify="right")
    for measure in found.measures:
        table.add_row(*_cells(measure))
    console.print(table)
    if as_markdown:
        console.print()
    for measure in found.measures:
        note = measure.not_applicable or measure.note
        told = f"{'- ' if as_markdown else ''}{measure.name}: {measure.what}{f'; {note}' if note else ''}."
        console.print(told, soft_wrap=True, markup=False)
    for steps in found.steps:
        _show_steps(steps, console, as_markdown)
    for sentence in found.left_out:
        console.print(f"Left out: {escape(sentence)}", soft_wrap=True)


def _table(as_markdown: bool) -> Table:
    return Table(box=box.MARKDOWN) if as_markdown else Table()


def _cells(measure: Measure) -> list[str]:
    if measure.not_applicable:
        return [measure.name, "n/a", "", "", "", ""]
    spread, limit = measure.spread, measure.limit
    assert measure.rate is not None, "it was measured"
    assert spread is not None, "it was measured"
    return [
        measure.name,
        _rate(measure.rate, measure.unit),
        f"{_rate(spread[0], '')} - {_rate(spread[1], '')}",
        "" if measure.share is None else f"{measure.share:.0%}",
        "" if limit is None else f"{limit.name}, {_rate(limit.rate, measure.unit)}",
        MISSING if measure.peak_bytes is None else size(measure.peak_bytes),
    ]


def _rate(value: float, unit: str) -> str:
    scale, letter = next(((scale, letter) for scale, letter in _PREFIXES if value >= scale), _PREFIXES[-1])
    told = f"{value / scale:.3g} {letter}{unit}".rstrip()
    return f"{told}/s" if unit else told


def _show_steps(steps: Steps, console: Console, as_markdown: bool) -> None:
    waterfall, wall = steps.waterfall, steps.waterfall.wall
    workers = f"{steps.workers} worker{'s' if steps.workers > 1 else ''}"
    title = (
        f"\nA step of {steps.batch_size:,} samples, {workers}: {number(1e3 * wall)} ms, "
        f"{number(round(steps.samples_per_second))} samples/s (mean of {steps.steps:,} steps; "
        f"{share(abs(steps.remainder))} of the wall time is in no stage)"
    )
    console.print(f"{title}:\n" if as_markdown else title, soft_wrap=True)
    table = _table(as_markdown)
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    if not as_markdown:
        table.add_column("where in the step")

    def add(name: str, seconds: float, bar: str) -> None:
        cells = [name, number(1e3 * seconds), share(seconds / wall)]
        table.add_row(*cells, *([] if as_markdown else [bar]))

    begin = 0.0
    for name, seconds in waterfall.stages.items():
        if seconds > 0:
            add(name, seconds, _bar(begin, seconds, wall))
        begin += seconds
    if not as_markdown:
        table.add_section()
    begin = 0.0
    for name, seconds in waterfall.beside.items():
        begin = 0.0 if name == "save" else begin
        if seconds > 0:
            add(f"beside: {name}", seconds, _bar(begin, seconds, wall, "░" if name == "ahead" else "▒"))
        begin += seconds
    console.print(table)
    if as_markdown:
        console.print()
    for sentence in waterfall.sentences():
        console.print(escape(sentence), soft_wrap=True)
    if steps.window is not None:
        console.print(
            f"Less than a window of {steps.window:,} steps was watched: what they wait for data is not all of it. Give it "
            f"more --seconds.",
            soft_wrap=True,
        )


def _bar(begin: float, seconds: float, wall: float, block: str = "█") -> str:
    first = min(round(begin / wall * _BAR), _BAR - 1)
    length = max(1, round(seconds / wall * _BAR))
    return " " * first + block * min(length, _BAR - first)
