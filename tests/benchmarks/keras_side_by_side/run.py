"""Trains four models with Keras and with embedshard, side by side, and prints one table in Markdown.

Run: python tests/benchmarks/keras_side_by_side/run.py [--quick] [--out FILE]
in embedshard's environment. Keras gets one of its own, which is made at the first run (`requirements.txt`; about 2 GB).

Each training is a fresh process on one thread, all of them bound to the same CPU core; those of a case take turns, so that
noise meets all. A speed is the median over repeats of the rows trained a second after WARM_UP_STEPS steps, a loss is the
median too: each repeat has a seed of its own. A training that takes longer than a minute is not repeated, nor is one that
does not come near the loss of Keras with its default optimizer.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cases import CASES, STEPS_AT_ONCE, TOLERANCE, WARM_UP_STEPS, Case, Optimizer
from environment import DEFAULT_CACHE, keras_python
from generate import generate
from losses import LOSSES

from embedshard.storage import locate
from embedshard.train.checkpoint_reader import newest_intact

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bound import finished  # noqa: E402

NOT_REPEATED_S = 60
COLUMNS = (
    "model, ids",
    "rows",
    "program",
    "optimizer, lr",
    "samples/s",
    "times the fastest Keras",
    "peak memory, MiB",
    "whole process, s",
    "held-out loss",
)


@dataclass
class Side:
    """One program with one optimizer, and what its runs measured."""

    program: str
    optimizer: Optimizer
    speeds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def speed(self):
        return statistics.median(self.speeds)

    @property
    def loss(self):
        return statistics.median(self.losses)

    @property
    def label(self):
        no_xla = "" if self.optimizer.xla else ", no XLA"
        dense = f", dense adam {self.optimizer.dense_lr:g}" if self.optimizer.dense_lr else ""
        return f"{self.optimizer.kind} {self.optimizer.lr:g}{dense}{no_xla}"


def train_keras(case, optimizer, data, scratch, cpu, python, rows, seed):
    weights = scratch / "keras.npz"
    command = [
        python,
        HERE / "train_keras.py",
        case.model,
        case.vocabulary,
        rows // case.batch,
        optimizer.kind,
        optimizer.lr,
    ]
    command += [data, weights, "--seed", seed, *([] if optimizer.xla else ["--no-xla"])]
    ended = finished(command, {cpu})
    measured = json.loads(ended.text.strip().splitlines()[-1])
    with np.load(weights) as arrays:
        loss = held_out_loss(case, data, lambda name: arrays[name])
    return measured["steps_per_second"] * case.batch, ended.memory, ended.seconds, loss


def train_embedshard(case, optimizer, data, scratch, cpu, seed):
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = {f"tables.{table}.rows": case.vocabulary for table in case.tables} | {"seed": seed}
    settings |= {"optimizer.tables.kind": optimizer.kind, "optimizer.tables.lr": optimizer.lr}
    settings |= {"optimizer.dense.lr": optimizer.dense_lr} if optimizer.dense_lr else {}
    settings |= {"train.global_batch_size": case.batch, "train.log_every_steps": STEPS_AT_ONCE}
    command = [sys.executable, "-m", "embedshard.cli", "train", HERE / f"{case.model}.yaml", "--run-dir", run]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    ended = finished(command, {cpu}, DATA=str(data))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A line tells the mean speed since the beginning: rows divided by it are the seconds so far.
    speeds = {line["step"]: line["train/samples_per_second"] for line in lines if "train/samples_per_second" in line}
    spent = {step: step * case.batch / speed for step, speed in speeds.items()}
    last = max(spent)
    speed = (last - WARM_UP_STEPS) * case.batch / (spent[last] - spent[WARM_UP_STEPS])
    checkpoint = newest_intact(locate(run / "checkpoints"))
    return speed, ended.memory, ended.seconds, held_out_loss(case, data, lambda name: whole(checkpoint, name))


def whole(checkpoint, name):
    """Returns a tensor of a checkpoint as an array."""
    spec = checkpoint.tensors[name]
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    checkpoint.read_into([(name, (0,) * len(spec.shape), tensor)])
    return tensor.numpy()


def held_out_loss(case, data, weights):
    rows = {path.stem: np.load(path) for path in (*(data / "test").glob("*.npy"), *data.glob("*.npy"))}
    return LOSSES[case.model](weights, rows)


def measure(case: Case, data, scratch, arguments, python):
    """Returns the sides of a case, each of which was trained so many times as is worthwhile."""
    sides = [Side("Keras", optimizer) for optimizer in case.keras]
    sides += [Side("embedshard", optimizer) for optimizer in case.embedshard]
    for turn in range(1 if arguments.quick else arguments.repeats):
        for side in sides:
            if turn and (side.seconds[0] > NOT_REPEATED_S or not reaches(side, sides)):
                continue
            if side.program == "Keras":
                measured = train_keras(
                    case, side.optimizer, data, scratch, arguments.cpu, python, case.rows(arguments.quick), turn + 1
                )
            else:
                measured = train_embedshard(case, side.optimizer, data, scratch, arguments.cpu, turn + 1)
            for kept, value in zip((side.speeds, side.memory, side.seconds, side.losses), measured, strict=True):
                kept.append(value)
            print(f"{case.name} {side.program} {side.label}: {side.speeds[-1]:,.0f} rows/s", file=sys.stderr, flush=True)
    return sides


def reaches(side, sides):
    """Returns whether a side's loss is near that of Keras with its default optimizer, the first side, or below it."""
    return side.loss <= sides[0].loss * (1 + TOLERANCE)


def rows_of_table(case, sides, is_quick):
    fastest = max((side for side in sides if side.program == "Keras" and reaches(side, sides)), key=lambda side: side.speed)
    for side in sides:
        note = "" if reaches(side, sides) else " (not reached)"
        yield line(
            f"{case.model}, {case.vocabulary:,}",
            f"{case.rows(is_quick):,}",
            side.program,
            side.label,
            f"{side.speed:,.0f}",
            f"{side.speed / fastest.speed:.2f}",
            f"{statistics.median(side.memory) / 2**20:,.0f}",
            f"{statistics.median(side.seconds):.1f}",
            f"{side.loss:.4f}{note}",
        )


def line(*cells):
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows, once each, small vocabularies: whether it works")
    parser.add_argument("--out", type=Path, help="where the table goes too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", action="append", help="only these models")
    parser.add_argument("--ids", type=int, action="append", help="only these vocabularies")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="the core that all are bound to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    arguments = parser.parse_args()
    python = keras_python(arguments.cache)
    lines = [line(*COLUMNS), line(*["---"] * len(COLUMNS))]
    with tempfile.TemporaryDirectory(prefix="embedshard-keras-") as scratch:
        for case in CASES:
            is_wanted = case.model in (arguments.model or [case.model]) and case.vocabulary in (
                arguments.ids or [case.vocabulary]
            )
            if not is_wanted or (arguments.quick and case.vocabulary > 10_000 and not arguments.ids):
                continue
            data = arguments.cache / "data" / f"{case.name}-{case.rows(arguments.quick)}"
            generate(case.model, case.vocabulary, case.rows(arguments.quick), data)
            sides = measure(case, data, Path(scratch), arguments, python)
            lines += rows_of_table(case, sides, arguments.quick)
            if arguments.out is not None:
                arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\n{platform.machine()}, core {arguments.cpu}, {time.strftime('%Y-%m-%d')}", file=sys.stderr)


if __name__ == "__main__":
    main()
