"""Checkpoints: written and read as a run does, beside plain files of as many bytes."""

from __future__ import annotations

__all__ = ["lack_of_room", "saving_measures"]

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch

from embedshard.bench.machine import raw_files
from embedshard.bench.measure import Limit, Measure, Timer
from embedshard.storage import locate
from embedshard.train.assembly import Assembly
from embedshard.train.checkpoint import Checkpointer, open_step
from embedshard.train.checkpoint_files import Piece, num_bytes
from embedshard.train.snapshot import pieces, restore

_COPIES = 3  # that are on the disk at once: a checkpoint, the one that is written, and the plain files


def saving_measures(parts: Assembly, timer: Timer, folder: Path) -> Iterator[Measure]:
    """Measures writing a checkpoint, piece by piece, and reading it back into the model, in a world of one.

    Args:
        parts: of the run.
        timer: for both.
        folder: on the disk that is measured; what is written there is deleted.
    """
    parts.optimizers.make_dense_state()
    size = num_bytes(_pieces(parts))
    what = f"{size / 2**20:,.1f} MiB of weights and optimizer state"
    why = lack_of_room(parts, folder)
    if why:
        yield Measure("checkpoint write", what, not_applicable=why)
        yield Measure("checkpoint read", what, not_applicable=why)
        return
    root, raw, steps = folder / "checkpoints", raw_files(folder / "raw", size), count(1)
    with Checkpointer(locate(root), 0, 1, attempt="1", mode="blocking") as checkpointer:
        step = [0]

        def make_room() -> int:
            shutil.rmtree(root, ignore_errors=True)
            step[0] = next(steps)
            return step[0]

        def write(number: int) -> None:
            checkpointer.save(number, lambda: _pieces(parts), {})

        own, limit = timer.in_turns([(write, make_room), (raw.write, None)])
        yield Measure(
            "checkpoint write", f"{what}, hashed and synced", "B", size, own, Limit("plain files, synced", size, limit),
            timer.peak_bytes,
        )  # fmt: skip

        def read() -> None:
            restore(open_step(locate(root), step[0]), parts.model, parts.optimizers, parts.objective, parts.managed)

        own, limit = timer.in_turns([(read, None), (raw.read, None)])
    yield Measure(
        "checkpoint read", f"{what}, verified", "B", size, own, Limit("plain files", size, limit), timer.peak_bytes,
        note="from the page cache, as the plain files are",
    )  # fmt: skip
    shutil.rmtree(root)
    shutil.rmtree(folder / "raw")


def lack_of_room(parts: Assembly, folder: Path) -> str:
    """Returns why checkpoints of all ranks have no room in a folder; empty where they have. Collective."""
    size = int(parts.world.sum(torch.tensor(num_bytes(_pieces(parts)))).item())
    free = parts.world.broadcast_object(shutil.disk_usage(folder).free)
    if free >= _COPIES * size:
        return ""
    return f"{folder} has {free / 2**30:.1f} GiB free, and {_COPIES * size / 2**30:.1f} are needed: set TMPDIR"


def _pieces(parts: Assembly) -> Iterator[Piece]:
    return pieces(parts.model, parts.optimizers, parts.objective, parts.world, parts.managed)
