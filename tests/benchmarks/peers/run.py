"""Measures this machine, and reading and training beside what else there is; prints the tables in Markdown.

    python tests/benchmarks/peers/run.py [--only bench keras reading training workers start] [--repeats 3]
        [--write docs/benchmarks.md]

Each measurement is a fresh process with one thread, bound to one core (`--cpu`; the cases with two workers to two). The
contenders of a case read the same data and are measured in turns, so often as `--repeats` says; what is told is the median,
and from the least to the greatest. Others get the best of three settings. `--write` puts each part between its marks in the
file as soon as it is measured, with the machine, the day and the versions; other parts stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bound import VARIABLES, finished  # noqa: E402
from data import criteo_tree, towers_tree, write  # noqa: E402
from tables import check_marks, machine, put  # noqa: E402

BATCH, TRAIN_BATCH = 8_192, 4_096
WARM_UP_STEPS = 40


@dataclass
class Side:
    """A contender.

    Attributes:
        name: what the table calls it.
        command: that measures it, and prints JSON in its last line; or the tree of a config that is trained.
        workers: processes.
    """

    name: str
    command: list[str] | dict
    workers: int = 1
    speeds: list[float] = field(default_factory=list)
    memory: int = 0

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


def measure(sides: list[Side], repeats: int, cpus: list[int], scratch: Path) -> None:
    """Measures contenders in turns."""
    for number in range(repeats):
        for side in sides:
            bound = set(cpus[: side.workers])
            if isinstance(side.command, dict):
                speed, memory = trained(side, bound, scratch)
            else:
                ended = finished(side.command, bound, counts_children=True)
                memory, told = ended.memory, json.loads(ended.text.strip().splitlines()[-1])
                speed = told.get("rows_per_second") or told["samples_per_second"]
            side.speeds.append(speed)
            side.memory = max(side.memory, memory)
            print(
                f"{number + 1}/{repeats} {side.name}: {speed:,.0f}/s, {memory / 2**20:,.0f} MiB", file=sys.stderr, flush=True
            )


def trained(side: Side, cpus: set[int], scratch: Path) -> tuple[float, int]:
    """Trains a config from its Parquet files by `embedshard train`; returns samples a second after warm-up, and memory."""
    run, config = scratch / "run", scratch / "config.json"
    shutil.rmtree(run, ignore_errors=True)
    config.write_text(json.dumps(side.command))
    command = [sys.executable, "-m", "embedshard.cli", "train", str(config), "--run-dir", str(run)]
    command += ["--workers", str(side.workers)] if side.workers > 1 else []
    memory = finished(command, cpus, counts_children=True).memory
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A line tells the mean speed since the beginning: rows divided by it are the seconds so far.
    batch = side.command["train"]["global_batch_size"]
    spent = {
        line["step"]: line["step"] * batch / line["train/samples_per_second"]
        for line in lines
        if "train/samples_per_second" in line
    }
    last = max(spent)
    return (last - WARM_UP_STEPS) * batch / (spent[last] - spent[WARM_UP_STEPS]), memory


def table(title: str, unit: str, sides: list[Side], first: int, asked: dict[str, float]) -> list[str]:
    """Returns a table in which each side is told against the one of a place."""
    base = sides[first].speed
    lines = [f"**{title}**", "", f"| | {unit} | least to greatest | against {sides[first].name} | asked | peak MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for side in sides:
        span = f"{min(side.speeds):,.0f} to {max(side.speeds):,.0f}"
        least = f"{asked[side.name]:g}" if side.name in asked else ""
        lines.append(
            f"| {side.name} | {side.speed:,.0f} | {span} | {side.speed / base:.2f} | {least} | {side.memory / 2**20:,.0f} |"
        )
    return [*lines, ""]


def reading(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Parquet to batches."""
    lines = []
    for kind, rows, groups, least in (
        ("ids", arguments.rows, (65_536, 2**20), 0.5),
        ("lists", arguments.rows // 2, (65_536,), 0.4),
    ):
        for row_group in groups:
            folder = write(arguments.data, kind, rows, row_group)

            def side(name: str, reader: str, setting: str = "-", folder: Path = folder, kind: str = kind) -> Side:
                return Side(name, [sys.executable, str(HERE / "reading.py"), str(folder), kind, reader, setting, str(BATCH)])

            sides = [
                side("pyarrow alone", "pyarrow"),
                side("pyarrow alone, jemalloc", "pyarrow", "jemalloc"),
                side("pyarrow alone, the system's memory", "pyarrow", "system"),
                side("embedshard", "embedshard"),
            ]
            if row_group == groups[0]:
                sides += [side(f"Ray Data, {name}", "ray", name) for name in ("batch", "group", "large")]
                sides += [
                    side("DataLoader, row by row", "dataloader", "rows"),
                    side("DataLoader, batches by the dataset", "dataloader", "batches"),
                    side("DataLoader, those by a worker", "dataloader", "worker"),
                ]
            measure(sides, arguments.repeats, [arguments.cpu], scratch)
            shape = "26 columns of ids" if kind == "ids" else "26 columns of lists of 3 ids"
            title = f"{shape}, 13 numbers, a label; {rows:,} rows, zstd, row groups of {row_group:,}, batches of {BATCH:,}"
            lines += table(title, "rows/s", sides, 0, {"embedshard": least})
    return lines


def training(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Parquet to trained tables, one worker."""
    lines = []
    towers = write(arguments.data, "towers", arguments.steps * TRAIN_BATCH, 65_536)
    criteo = write(arguments.data, "ids", arguments.steps * TRAIN_BATCH // 2, 65_536)
    for title, tree, least in (
        ("Two towers, dim 64, 1 million items", towers_tree(towers, TRAIN_BATCH, 64, "rowwise_adagrad"), 0.85),
        ("DLRM, 26 tables of 16 numbers", criteo_tree(criteo, False, TRAIN_BATCH, 16), 0.92),
    ):
        sides = [
            in_memory("bare TorchRec, batches in memory", "torchrec", tree, arguments, scratch),
            Side("embedshard", tree),
        ]
        measure(sides, arguments.repeats, [arguments.cpu], scratch)
        lines += table(f"{title}; batches of {TRAIN_BATCH:,}", "samples/s", sides, 0, {"embedshard": least})
    tree = towers_tree(towers, TRAIN_BATCH, 64, "adagrad")
    sides = [in_memory("plain PyTorch, batches in memory", "pytorch", tree, arguments, scratch), Side("embedshard", tree)]
    measure(sides, arguments.repeats, [arguments.cpu], scratch)
    title = f"Two towers, dim 64, 1 million items, Adagrad; batches of {TRAIN_BATCH:,}"
    return lines + table(title, "samples/s", sides, 0, {"embedshard": 1.5})


def workers(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Two workers, a thread and a core each."""
    lines, cpus = [], [arguments.cpu, *sorted(os.sched_getaffinity(0) - {arguments.cpu})]
    if len(cpus) < 2:
        return ["Two workers need two cores.", ""]
    towers = write(arguments.data, "towers", arguments.steps * TRAIN_BATCH, 65_536)
    criteo = write(arguments.data, "ids", arguments.steps * TRAIN_BATCH // 2, 65_536)
    for title, tree, asked in (
        ("Two towers, dim 64, 1 million items", towers_tree(towers, TRAIN_BATCH, 64, "rowwise_adagrad"), {}),
        ("DLRM, 26 tables of 16 numbers", criteo_tree(criteo, False, TRAIN_BATCH, 16), {"embedshard, 1 worker": 1 / 1.3}),
    ):
        sides = [
            Side("embedshard, 2 workers", tree, 2),
            Side("embedshard, 1 worker", tree),
            in_memory("bare TorchRec, 2 workers", "torchrec", tree, arguments, scratch, 2),
        ]
        measure(sides, arguments.repeats, cpus, scratch)
        asked = {**asked, "bare TorchRec, 2 workers": 1 / 0.95}
        lines += table(f"{title}; batches of {TRAIN_BATCH:,} (asked: at most)", "samples/s", sides, 0, asked)
    return lines


def in_memory(name: str, way: str, tree: dict, arguments: argparse.Namespace, scratch: Path, count: int = 1) -> Side:
    """Returns a side that trains on batches in memory."""
    config = scratch / f"{way}-{tree['model']['kind']}-{tree['optimizer']['tables']['kind']}.json"
    config.write_text(json.dumps(tree))
    start = [sys.executable]
    if count > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return Side(name, [*start, str(HERE / "training.py"), str(config), way, str(arguments.steps // 2)], count)


def start(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """From the command to its first word, and to the first step."""
    towers = write(arguments.data, "towers", 8 * TRAIN_BATCH, 65_536)
    config, run = scratch / "start.json", scratch / "started"
    tree = towers_tree(towers, TRAIN_BATCH, 64, "rowwise_adagrad")
    tree["train"] |= {"max_steps": 1, "log_every_steps": 1}
    config.write_text(json.dumps(tree))
    lines = ["| command | seconds, median | least to greatest | asked, at most |", "|---|---|---|---|"]
    for name, command, most in (
        ("`embedshard --help`", ["--help"], 0.5),
        ("`embedshard train`, until its first step is taken and told", ["train", str(config), "--run-dir", str(run)], 6),
    ):
        until = run / "metrics.jsonl" if command[0] == "train" else None
        seconds = []
        for _ in range(arguments.repeats + 1):
            shutil.rmtree(run, ignore_errors=True)
            seconds.append(
                finished([sys.executable, "-m", "embedshard.cli", *command], {arguments.cpu}, until=until).seconds
            )
        seconds = seconds[1:]  # the first finds nothing in the page cache
        middle = statistics.median(seconds)
        lines.append(f"| {name} | {middle:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {most} |")
    return [*lines, ""]


def bench(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """What this machine allows, and how near each stage comes."""
    return _printed([sys.executable, "-m", "embedshard.cli", "bench", "--seconds", "2", "--markdown"])


def keras(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Four models by Keras, in an environment of its own, and by embedshard."""
    command = [sys.executable, str(HERE.parent / "keras_side_by_side" / "run.py"), "--repeats", str(arguments.repeats)]
    return _printed([*command, "--cpu", str(arguments.cpu), *(["--quick"] if arguments.quick else [])])


def _printed(command: list[str]) -> list[str]:
    """Returns the lines that a program prints, one thread each of its processes; what it says beside them is shown."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **VARIABLES})
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}.")
    return [*ended.stdout.splitlines(), ""]


PARTS = {"bench": bench, "keras": keras, "reading": reading, "training": training, "workers": workers, "start": start}


def main() -> None:
    """Parses arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts; all but these are left out"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2**22, help="to read, with ids; half of it with lists")
    parser.add_argument("--steps", type=int, default=400, help="to train")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="core that contenders are bound to")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "embedshard-peers", help="kept")
    parser.add_argument("--quick", action="store_true", help="Keras: few rows, once each: whether it works")
    parser.add_argument("--write", type=Path, help="file whose tables, between their marks, are replaced")
    arguments = parser.parse_args()
    if arguments.write:
        check_marks(arguments.write, arguments.only)
    with tempfile.TemporaryDirectory(prefix="embedshard-peers-") as scratch:
        for name in arguments.only:
            lines = PARTS[name](arguments, Path(scratch))
            text = "\n".join([machine(), "", *lines])
            print(text, flush=True)
            if arguments.write:
                put(arguments.write, name, text)


if __name__ == "__main__":
    main()
