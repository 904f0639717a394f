"""What a run's checkpoints are and hold, from their manifests: no data, no model; files are read where that is asked for."""

from __future__ import annotations

__all__ = ["CheckpointInfo", "TensorInfo", "list_here", "show_here", "show_list", "show_tensors"]

import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from embedshard.errors import CheckpointError
from embedshard.launch.run_tables import open_checkpoint_of
from embedshard.quantities import size
from embedshard.storage import PathOrUri, reaching
from embedshard.train.checkpoint_reader import MANIFEST, find_steps, open_step, step_folder
from embedshard.train.run_directory import RunDirectory


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        step: optimizer steps done.
        size_bytes: of its files; None where its manifest is damaged.
        num_files: how many they are.
        attempt: the start of the run that wrote it.
        workers: how many wrote it.
        time: when it was committed, in ISO 8601.
        is_selected: whether the run selected it, or the validation set says so far that it is the best.
        damage: what is wrong with it, as far as it was looked at; None if nothing is.
        is_verified: whether all its files were read and checked.
    """

    step: int
    size_bytes: int | None
    num_files: int | None
    attempt: int | None
    workers: int | None
    time: str | None
    is_selected: bool
    damage: str | None
    is_verified: bool


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def list_here(run_dir: PathOrUri, verify: bool) -> list[CheckpointInfo]:
    """Returns the checkpoints of a run, by step.

    Args:
        run_dir: the run's folder.
        verify: whether every file is read, and its size, SHA-256 and content checked.

    Raises:
        EmbedshardError: what a user can act on; damage is in the result.
    """
    run = RunDirectory.open(run_dir)
    found: list[CheckpointInfo] = []
    best_yet = None
    with reaching(run.checkpoints):
        for step in find_steps(run.checkpoints):
            manifest = step_folder(run.checkpoints, step).join(MANIFEST)
            written = datetime.fromtimestamp(manifest.version()[1] / 1e9, UTC).isoformat(timespec="seconds")
            try:
                checkpoint = open_step(run.checkpoints, step)
            except CheckpointError as error:
                found.append(CheckpointInfo(step, None, None, None, None, written, False, str(error), verify))
                continue
            found.append(
                CheckpointInfo(
                    step=step,
                    size_bytes=checkpoint.size_bytes,
                    num_files=checkpoint.num_files,
                    attempt=int(checkpoint.attempt),
                    workers=checkpoint.world_size,
                    time=written,
                    is_selected=False,
                    damage=checkpoint.find_damage() if verify else None,
                    is_verified=verify,
                )
            )
            best_yet = checkpoint.state.get("train", {}).get("best_step")
    selected = (run.read_json("result.json") or {}).get("selected_step", best_yet)
    return [replace(one, is_selected=one.step == selected) for one in found]


def show_list(found: list[CheckpointInfo], console: Console) -> None:
    """Prints them as a table."""
    if not found:
        console.print("No checkpoint was committed yet.")
        return
    table = Table()
    for heading in ("step", "size", "files", "attempt", "workers"):
        table.add_column(heading, justify="right")
    for heading in ("committed", "", "intact"):
        table.add_column(heading)
    for one in found:
        intact = "damaged" if one.damage is not None else "yes" if one.is_verified else "not read"
        numbers = ["?" if value is None else f"{value:,}" for value in (one.num_files, one.attempt, one.workers)]
        weight = "?" if one.size_bytes is None else size(one.size_bytes)
        table.add_row(f"{one.step:,}", weight, *numbers, one.time or "?", "best" if one.is_selected else "", intact)
    console.print(table)
    for one in found:
        if one.damage is not None:
            console.print(f"step {one.step}: {one.damage}", markup=False, soft_wrap=True)


def show_here(run_dir: PathOrUri, step: int | None) -> dict[str, Any]:
    """Returns what a checkpoint holds, as plain data: tensors, how tables lie, and the state beside them.

    Args:
        run_dir: the run's folder.
        step: None takes the one that the run selected, else the newest.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    checkpoint = open_checkpoint_of(run, step)
    tensors = []
    for name, spec in sorted(checkpoint.tensors.items()):
        num_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        tensors.append(TensorInfo(name, str(spec.dtype).removeprefix("torch."), spec.shape, num_bytes))
    plan = (run.read_json("plan.json") or {}).get("tables", {})
    return {
        "step": checkpoint.step,
        "attempt": int(checkpoint.attempt),
        "workers": checkpoint.world_size,
        "size_bytes": checkpoint.size_bytes,
        "files": checkpoint.num_files,
        "tensors": [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in tensors],
        "plan": {name: _placement(table) for name, table in plan.items()},
        "state": checkpoint.state,
    }


def _placement(table: dict[str, Any]) -> dict[str, Any]:
    """Returns the type of a table of plan.json, and the ranks that have shards of it."""
    ranks = sorted({shard["rank"] for shard in table.get("shards", []) if "rank" in shard})
    return {"sharding_type": table.get("sharding_type"), "ranks": ranks}


def show_tensors(found: dict[str, Any], console: Console) -> None:
    """Prints what `show_here` returns."""
    written = f"written by attempt {found['attempt']} on {found['workers']} workers, {size(found['size_bytes'])}"
    console.print(f"Step {found['step']:,}: {written} in {found['files']} files", highlight=False)
    table = Table()
    for heading, justify in (("tensor", "left"), ("dtype", "left"), ("shape", "right"), ("size", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich's type is a Literal
    for tensor in found["tensors"]:
        shape = " x ".join(f"{length:,}" for length in tensor["shape"]) or "one number"
        table.add_row(tensor["name"], tensor["dtype"], shape, size(tensor["size_bytes"]))
    console.print(table)
    if found["plan"]:
        console.print("Tables as they lay when the run was last started (the checkpoint fits any plan):", highlight=False)
        for name, placed in found["plan"].items():
            ranks = ", ".join(map(str, placed["ranks"]))
            console.print(f"  {name}: {placed['sharding_type']}, rank {ranks}", highlight=False)
    state = found["state"]
    for name in ("train", "vocabularies"):
        for key, value in (state.get(name) or {}).items():
            console.print(f"{name}.{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    for name in ("data", "embedshard"):
        console.print(f"{name}: {state.get(name)}", markup=False, highlight=False, soft_wrap=True)
