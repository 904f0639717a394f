"""What one GPU trains and reads: MLPerf's DLRM-DCNv2, two towers over 100 million items, tables in and beyond its memory.

    python tests/benchmarks/gpu.py --only dcn two_tower [--scale 1.0] [--threads N] [--write FILE]
    python tests/benchmarks/gpu.py --only memory stages          # each about ten minutes; the other case is `reading`
    python tests/benchmarks/gpu.py --quick --device cpu          # small tables and batches: whether it works

The data, 16 batches, are drawn and kept in a folder (`--data`), and read from Parquet again in each epoch. Each training is
`embedshard train` in a fresh process, and ended before it writes 100 GB as its checkpoint; samples a second are those after
the first 20 steps. Tables begin with zeros, which changes no time of a step. They take 104 GB, or as much less as leaves a
smaller GPU 30 % (`--scale`). Reading is the same reader with nothing behind it, by as many threads as training has (half of
the cores, unless it is told); `reading` trains nothing, and reads by one thread, too. `memory` trains a quarter of the
tables in the GPU's memory, behind a cache of a fifth of their rows (`uvm_caching`, without and with `train.prefetch`), and
in the host's. `stages` is `embedshard bench` on a fortieth of them, whose checkpoints it writes: each stage's share of its
limit. A case that fails is told, and the others go on. No case has been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from data import skewed
from tables import check_marks, machine, put

# Criteo's tables of 2022 and ids a row in MLPerf's training benchmark (mlcommons/training, recommendation_v2/torchrec_dlrm).
ROWS = [
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938, 155,
    4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
]  # fmt: skip
IDS_A_ROW = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]
NUMBERS, DIM, BATCH = 13, 128, 65_536
ITEMS, USERS = 100_000_000, 10_000_000
WARM_UP, BATCHES = 20, 16
TABLE_BYTES = sum(ROWS) * DIM * 4
CASES = ("reading", "dcn", "two_tower", "memory", "stages")


def write_files(folder: Path, rows: int, make: Callable[[np.random.Generator, int], pa.Table]) -> Path:
    """Writes files of at most 65,536 rows in as many threads as there are cores. What is there already is kept."""

    def write(number: int) -> None:
        table = make(np.random.default_rng([0, number]), min(65_536, rows - number * 65_536))
        pq.write_table(table, folder / f"part-{number:03}.parquet", compression="zstd")

    if not (folder / "DONE").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(write, range(math.ceil(rows / 65_536))))
        (folder / "DONE").touch()
    return folder


def fitting_scale() -> float:
    """Returns how much of the tables leaves 30 % of the GPU's memory free, at most all."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    return min(1.0, math.floor(20 * 0.7 * int(found) / TABLE_BYTES) / 20)


def dcn(data: Path, rows: int, scale: float, batch: int, precision: str, memory: str = "device", dim: int = DIM) -> dict:
    """Writes the rows, and returns the config of a DCNv2 over them."""
    sizes = [max(int(size * scale), 3) for size in ROWS]

    def rows_of(generator: np.random.Generator, count: int) -> pa.Table:
        found: dict = {"label": (generator.random(count) < 0.25).astype(np.float32)}
        for number, (size, ids) in enumerate(zip(sizes, IDS_A_ROW, strict=True)):
            values = skewed(generator, size, count * ids).astype(np.int32)
            found[f"c{number}"] = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * ids, values)
        numbers = {f"i{number}": generator.exponential(10.0, count).astype(np.float32) for number in range(NUMBERS)}
        return pa.table(found | numbers)

    folder = write_files(data / f"dcn-{rows}-{scale:g}", rows, rows_of)
    names = [f"c{number}" for number in range(len(sizes))]
    return {
        "name": "dcn",
        "data": {"train": f"{folder}/*.parquet", "label": "label", "window_steps": 8, "cache_bytes": 0},
        "features": {name: {"kind": "bag", "table": name} for name in names}
        | {f"i{number}": {"kind": "dense", "normalise": "log1p"} for number in range(NUMBERS)},
        "tables": {
            name: {"rows": size, "dim": dim, "memory": {"kind": memory}, "init": {"kind": "zeros"}}
            for name, size in zip(names, sizes, strict=True)
        },
        "model": {"kind": "dcn_v2", "cross_layers": 3, "low_rank": 512, "mlp": [1024, 1024, 512, 256]}
        if dim == DIM
        else {"kind": "dcn_v2", "mlp": [16]},
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.005}, "dense": {"kind": "adam", "lr": 0.001}},
        "train": {"global_batch_size": batch, "log_every_steps": 10, "precision": precision},
        "tracking": {"tensorboard": False},
    }


def two_tower(data: Path, rows: int, items: int, users: int, batch: int, precision: str) -> dict:
    """Writes the rows, and returns the config of two towers over them."""

    def rows_of(generator: np.random.Generator, count: int) -> pa.Table:
        columns = {
            "user_id": skewed(generator, users, count),
            "item_id": skewed(generator, items, count),
            "label": (generator.random(count) < 0.5).astype(np.float32),
        }
        return pa.table(columns)

    folder = write_files(data / f"towers-{rows}-{items}", rows, rows_of)
    return {
        "name": "towers",
        "data": {"train": f"{folder}/*.parquet", "label": "label"},
        "features": {"user_id": {"kind": "id", "table": "user"}, "item_id": {"kind": "id", "table": "item"}},
        "tables": {
            name: {"rows": size, "dim": 64, "init": {"kind": "zeros"}} for name, size in (("user", users), ("item", items))
        },
        "model": {
            "kind": "two_tower",
            "user": {"features": ["user_id"], "mlp": [128, 64]},
            "item": {"features": ["item_id"], "mlp": [128, 64]},
        },
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}, "dense": {"kind": "adam", "lr": 0.001}},
        "train": {"global_batch_size": batch, "log_every_steps": 10, "precision": precision},
        "tracking": {"tensorboard": False},
    }


def trained(tree: dict, device: str, steps: int, scratch: Path) -> tuple[float, dict[str, float]]:
    """Trains a config; returns samples a second after warm-up, and milliseconds of the stages of a step."""
    run, config = scratch / "run", scratch / "config.json"
    tree = tree | {"train": tree["train"] | {"epochs": math.ceil((steps + 2) / BATCHES)}}  # no end before it is told
    shutil.rmtree(run, ignore_errors=True)
    config.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "embedshard.cli", "train", str(config), "--run-dir", str(run), "--device", device]
    lines = until_told(command, run / "metrics.jsonl", steps, scratch)
    batch = tree["train"]["global_batch_size"]
    # A line tells the mean speed since the beginning: rows divided by it are the seconds so far.
    spent = {line["step"]: line["step"] * batch / line["train/samples_per_second"] for line in lines}
    last = max(spent)
    stages = {
        name.removeprefix("train/waterfall/"): 1e3 * value
        for name, value in lines[-1].items()
        if name.startswith("train/waterfall/")
    }
    shutil.rmtree(run)
    return (last - WARM_UP) * batch / (spent[last] - spent[WARM_UP]), stages


def until_told(command: list[str], metrics: Path, steps: int, scratch: Path) -> list[dict]:
    """Starts a training, and ends it as soon as it has told of so many steps; returns what it told."""
    with (scratch / "out").open("w") as output, (scratch / "err").open("w") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                lines = measured(metrics)
                if lines and lines[-1]["step"] >= steps:
                    return lines
        finally:
            process.kill()
            process.wait()
    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(scratch / 'err').read_text()[-3000:]}")


def measured(metrics: Path) -> list[dict]:
    """Returns the lines of a run's metrics that tell its speed."""
    text = metrics.read_text() if metrics.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "train/samples_per_second" in line]


def read(tree: dict, threads: int, scratch: Path) -> float:
    """Returns the rows a second of the reader alone."""
    config = scratch / "reading.json"
    config.write_text(json.dumps(tree | {"data": tree["data"] | {"threads": threads}}))
    return float(finished([sys.executable, __file__, "--read", str(config)], scratch).strip().splitlines()[-1])


def read_here(path: str) -> None:
    """Reads a config's training data once, and prints rows a second."""
    from embedshard.world import open_world, set_process_environment

    set_process_environment()
    from embedshard.config import table_specs
    from embedshard.config.load import load_config
    from embedshard.data.collate import Collator
    from embedshard.data.dataset import open_dataset
    from embedshard.data.quarantine import Tally
    from embedshard.data.reader import BatchReader

    with open_world("cpu") as world:
        config = load_config(path, os.environ, []).config
        dataset = open_dataset(config, world, None)
        specs = table_specs(config, dataset.table_rows)
        collator = Collator(config, specs, Tally(dataset.train[0].decoder), dataset.pair_maker, dataset.tree)
        reader = BatchReader(
            dataset.order, dataset.train, dataset.cached, config.data.cache_bytes, collator, dataset.sampler, 0, 1,
            threads=config.data.threads,
        )  # fmt: skip
        steps, begin = dataset.order.epoch_steps, time.perf_counter()
        with reader.batches(0, steps) as batches:
            rows = sum(batch.size for batch in batches)
        print(rows / (time.perf_counter() - begin))


def finished(command: list[str], scratch: Path) -> str:
    """Runs a command to its end, and returns what it printed."""
    with (scratch / "out").open("w+") as output, (scratch / "err").open("w") as errors:
        code = subprocess.run(command, stdout=output, stderr=errors, check=False).returncode
        output.seek(0)
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{(scratch / 'err').read_text()[-3000:]}")
        return output.read()


def main() -> None:
    """Parses arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES[1:]))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=float, help="of the DCNv2's tables: 1.0 takes 104 GB")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2), help="that read")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "embedshard-gpu", help="kept")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", type=Path, help="file whose tables, between their marks, are replaced")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_here(arguments.read)
        return
    batch, items, users, dim = arguments.batch, ITEMS, USERS, DIM
    if arguments.quick:
        scale, batch, items, users, dim = 1e-4, 512, 10_000, 1_000, 8
    else:
        scale = arguments.scale or (fitting_scale() if arguments.device == "cuda" else 1.0)
    if arguments.write:
        check_marks(arguments.write, [f"gpu {case}" for case in arguments.only])
    rows = BATCHES * batch
    columns = ["samples/s", f"the reader alone, rows/s, `data.threads` {arguments.threads}", "longest stages of a step, ms"]
    head = [f"| | {' | '.join(columns)} |", "|---|---|---|---|"]
    alone: dict[str, float] = {}

    def told(name: str, tree: dict, is_trained: bool = True) -> str:
        """Returns a line of a table."""
        tree["data"]["threads"] = arguments.threads
        speed = shown = ""
        try:
            if is_trained:
                samples, stages = trained(tree, arguments.device, arguments.steps, scratch)
                longest = sorted(stages.items(), key=lambda stage: -stage[1])[:4]
                speed, shown = f"{samples:,.0f}", ", ".join(f"{stage} {value:.1f}" for stage, value in longest)
            else:
                shown = f"by 1 thread {read(tree, 1, scratch):,.0f} rows/s"
            data = tree["data"]["train"]
            if data not in alone:
                alone[data] = read(tree, arguments.threads, scratch)
            return f"| {name} | {speed} | {alone[data]:,.0f} | {shown} |"
        except SystemExit as error:
            print(error, file=sys.stderr)
            return f"| {name} | failed | | {str(error).strip().splitlines()[-1][:200]} |"

    def lines_of(case: str) -> list[str]:
        if case == "reading":
            return [*head, told("rows of the DCNv2", dcn(arguments.data, rows, scale, batch, "fp32", dim=dim), False)]
        lines = list(head)
        if case == "dcn":
            for precision in ("fp32", "bf16"):
                tree = dcn(arguments.data, rows, scale, batch, precision, dim=dim)
                lines.append(told(f"DCNv2, tables of MLPerf times {scale:g}, batches of {batch:,}, {precision}", tree))
        elif case == "two_tower":
            for precision in ("fp32", "bf16"):
                tree = two_tower(arguments.data, rows, items, users, batch, precision)
                lines.append(told(f"two towers, {items:,} items of 64 numbers, batches of {batch:,}, {precision}", tree))
        elif case == "memory":
            for memory in ("device", "uvm_caching", "uvm") if arguments.device == "cuda" else ("device",):
                for fetches in (False, True) if memory == "uvm_caching" else (False,):
                    tree = dcn(arguments.data, rows, scale / 4, batch, "bf16", memory, dim)
                    tree["train"]["prefetch"] = fetches
                    how = ", `prefetch`" if fetches else ""
                    lines.append(told(f"DCNv2, tables times {scale / 4:g}, `memory: {memory}`{how}", tree))
        else:
            config = scratch / "bench.json"
            config.write_text(json.dumps(dcn(arguments.data, rows, scale / 40, batch, "bf16", dim=dim)))
            command = [sys.executable, "-m", "embedshard.cli", "bench", str(config), "--device", arguments.device]
            try:
                return finished([*command, "--workers", "1", "--markdown"], scratch).splitlines()
            except SystemExit as error:
                return ["```", str(error), "```"]
        return lines

    with tempfile.TemporaryDirectory(prefix="embedshard-gpu-") as folder:
        scratch = Path(folder)
        for case in arguments.only:
            text = "\n".join([machine(), "", *lines_of(case)])
            print(text, flush=True)
            if arguments.write:
                put(arguments.write, f"gpu {case}", text)


if __name__ == "__main__":
    main()
