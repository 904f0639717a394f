"""A table far larger than what one is used to, on one machine: memory against the plan, speed against a small table.

    python tests/benchmarks/scale.py [--rows 1_000_000 200_000_000] [--workers 1 2] [--folder /tmp/scale]

For each number of workers, `embedshard plan` says what the fullest worker takes; a run is trained half way, saved piece by
piece (`checkpoint.mode: blocking`), resumed by a new process, trained to its end and saved again. The peak is that of the
kernel (VmHWM) over all of it, of the fullest worker. The same is done with a table of a million rows, for its speed: both
look rows up uniformly, so that the large one finds nothing in a cache. All in one table at the end, and in results.json, to
which a later start with other rows or workers adds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

GB = 1e9
USERS = 100_000
POLL_S = 0.1


def generate(folder: Path, rows: int, interactions: int) -> Path:
    """Writes interactions with items drawn uniformly; clicked where a bit of user and item agree."""
    data = folder / f"interactions-{rows}"
    data.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    files = 4
    for number in range(files):
        path = data / f"part-{number}.parquet"
        count = interactions // files
        users, items = generator.integers(0, USERS, count), generator.integers(0, rows, count)
        table = pa.table({"user_id": users, "item_id": items, "clicked": ((users ^ items) & 1).astype(np.int8)})
        pq.write_table(table, path, row_group_size=100_000)
    return data


def write_config(folder: Path, data: Path, rows: int, dim: int, batch_size: int) -> Path:
    tree = {
        "name": f"scale-{rows}",
        "data": {"train": f"{data}/*.parquet", "label": "clicked"},
        "features": {"user_id": {"kind": "id", "table": "user"}, "item_id": {"kind": "id", "table": "item"}},
        "tables": {
            "user": {"rows": USERS, "dim": dim},
            "item": {
                "rows": rows, "dim": dim, "dtype": "fp16", "init": {"kind": "uniform", "scale": 0.1},
                "sharding": {"types": ["row_wise"]},
            },
        },
        "model": {"kind": "two_tower", "user": {"features": ["user_id"]}, "item": {"features": ["item_id"]}},
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}},
        "train": {"global_batch_size": batch_size, "epochs": 1000},
        "checkpoint": {"mode": "blocking", "keep": 1, "every_steps": 1_000_000},
        "tracking": {"tensorboard": False},
    }  # fmt: skip
    path = folder / f"scale-{rows}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def embedshard(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "embedshard.cli", *map(str, arguments)]


def planned(config: Path, workers: int) -> tuple[int, int]:
    """Returns what the fullest worker takes by the plan, and what the tables and their state alone are."""
    told = subprocess.run(
        embedshard("plan", config, "--workers", workers, "--json"), capture_output=True, text=True, check=False
    )
    found = json.loads(told.stdout)
    fullest = max(found["ranks"], key=lambda rank: rank["total"])
    return fullest["total"], fullest["weights"] + fullest["state"]


def descendants(pid: int) -> list[int]:
    found, todo = [pid], [pid]
    while todo:
        with suppress(OSError):
            for task in Path(f"/proc/{todo.pop()}/task").iterdir():
                children = [int(number) for number in (task / "children").read_text().split()]
                found += children
                todo += children
    return found


def peak_bytes(pid: int) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def run(command: list[str], log: Path) -> tuple[int, float]:
    """Runs a command; returns the greatest peak of any of its processes, and the seconds it took."""
    begin, peak = time.monotonic(), 0
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max([peak, *map(peak_bytes, descendants(process.pid))])
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return peak, time.monotonic() - begin


def measure(folder: Path, config: Path, rows: int, workers: int, steps: int) -> dict[str, float]:
    plan_bytes, table_bytes = planned(config, workers)
    run_dir = folder / f"run-{rows}-{workers}"
    shutil.rmtree(run_dir, ignore_errors=True)
    spread = ["--workers", workers] if workers > 1 else []
    log = folder / f"run-{rows}-{workers}.log"
    half = steps // 2
    peak, seconds = run(embedshard("train", config, "--run-dir", run_dir, "--set", f"train.max_steps={half}", *spread), log)
    first = json.loads((run_dir / "result.json").read_text())
    resumed, resumed_seconds = run(
        embedshard("train", "--resume", run_dir, "--set", f"train.max_steps={steps}", *spread), log
    )
    last = json.loads((run_dir / "result.json").read_text())
    size = sum(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*.safetensors"))
    shutil.rmtree(run_dir / "checkpoints")
    return {
        "rows": rows, "workers": workers, "plan_bytes": plan_bytes, "table_bytes": table_bytes,
        "peak_bytes": peak, "resumed_peak_bytes": resumed,
        "samples_per_second": max(first["samples_per_second"], last["samples_per_second"]),
        "checkpoint_bytes": size, "checkpoint_seconds": last["seconds"]["checkpoint"],
        "seconds": seconds, "resumed_seconds": resumed_seconds,
    }  # fmt: skip


def show(found: list[dict[str, float]]) -> str:
    lines = [
        "| rows | workers | tables and state | plan | peak, train + save | peak, resume + save | against the plan | "
        "samples/s | of 1 million rows' | checkpoint | saved in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        small = next(
            other["samples_per_second"]
            for other in found
            if other["workers"] == one["workers"] and other["rows"] == min(each["rows"] for each in found)
        )
        peak = max(one["peak_bytes"], one["resumed_peak_bytes"])
        lines.append(
            f"| {one['rows']:,} | {one['workers']} | {one['table_bytes'] / GB:.2f} GB | {one['plan_bytes'] / GB:.2f} GB | "
            f"{one['peak_bytes'] / GB:.2f} GB | {one['resumed_peak_bytes'] / GB:.2f} GB | "
            f"{peak / one['plan_bytes'] - 1:+.1%} | {one['samples_per_second']:,.0f} | "
            f"{one['samples_per_second'] / small:.2f} | "
            f"{one['checkpoint_bytes'] / GB:.2f} GB | {one['checkpoint_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def number(text: str) -> int:
    return int(text.replace("_", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=number, nargs="+", default=[1_000_000, 200_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--interactions", type=number, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/embedshard-scale"))
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given.folder.mkdir(parents=True, exist_ok=True)
    needed = 2 * max(given.rows) * (2 * given.dim + 4) + 2 * GB
    free = shutil.disk_usage(given.folder).free
    if free < needed:
        raise SystemExit(f"{given.folder} has {free / GB:.1f} GB free, and two checkpoints need {needed / GB:.1f} GB.")
    results = given.folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else []
    for workers in given.workers:
        for rows in given.rows:
            data = generate(given.folder, rows, given.interactions)
            config = write_config(given.folder, data, rows, given.dim, given.batch_size)
            measured = measure(given.folder, config, rows, workers, given.steps)
            shutil.rmtree(data)
            print(json.dumps(measured), flush=True)
            others = [one for one in found if (one["rows"], one["workers"]) != (rows, workers)]
            found = sorted([*others, measured], key=lambda one: (one["rows"], one["workers"]))
            results.write_text(json.dumps(found, indent=2))
    print(show(found))


if __name__ == "__main__":
    main()
