"""Rows that all contenders read and train on: Criteo's shape, the same with lists, and users with items."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLES, NUMBERS = 26, 13
IDS = [f"c{number}" for number in range(1, TABLES + 1)]
DENSE = [f"i{number}" for number in range(1, NUMBERS + 1)]
SIZES = [100, 1_000, 10_000, 100_000] * 6 + [100, 1_000_000]
USERS, ITEMS = 100_000, 1_000_000
MEAN_LENGTH = 3


def write(folder: Path, kind: str, rows: int, row_group: int, seed: int = 0) -> Path:
    """Writes `ids`, `lists` or `towers`; see `write_files`."""

    def make(generator: np.random.Generator, count: int) -> pa.Table:
        return _towers(generator, count) if kind == "towers" else _criteo(generator, count, kind == "lists")

    return write_files(folder / f"{kind}-{rows}-{row_group}", rows, row_group, make, seed)


def write_files(
    folder: Path, rows: int, row_group: int, make: Callable[[np.random.Generator, int], pa.Table], seed: int = 0
) -> Path:
    """Writes zstd files of at most a million rows, of tables that are made. Files that are there already are kept."""
    done = folder / "DONE"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number, begin in enumerate(range(0, rows, 2**20)):
        table = make(generator, min(2**20, rows - begin))
        pq.write_table(table, folder / f"part-{number:03}.parquet", compression="zstd", row_group_size=row_group)
    done.touch()
    return folder


def skewed(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Draws ids log-uniformly: a few are met often, most seldom."""
    return np.minimum(np.exp(generator.random(count) * np.log(size + 1)).astype(np.int64), size) - 1


def _criteo(generator: np.random.Generator, count: int, has_lists: bool) -> pa.Table:
    columns = {}
    for name, size in zip(IDS, SIZES, strict=True):
        if has_lists:
            offsets = np.append(0, np.cumsum(generator.integers(1, 2 * MEAN_LENGTH, count))).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(offsets, skewed(generator, size, int(offsets[-1])))
        else:
            columns[name] = skewed(generator, size, count)
    for name in DENSE:
        columns[name] = generator.exponential(10.0, count).astype(np.float32)
    columns["label"] = (generator.random(count) < 0.25).astype(np.float32)
    return pa.table(columns)


def _towers(generator: np.random.Generator, count: int) -> pa.Table:
    return pa.table(
        {
            "user_id": skewed(generator, USERS, count),
            "item_id": skewed(generator, ITEMS, count),
            "label": (generator.random(count) < 0.5).astype(np.float32),
        }
    )


def criteo_tree(folder: Path, has_lists: bool, batch: int, dim: int, **data: object) -> dict:
    """Returns the config of a DLRM over the files."""
    kind = "bag" if has_lists else "id"
    return {
        "name": "peers",
        "data": {"train": f"{folder}/*.parquet", "label": "label", **data},
        "features": {name: {"kind": kind, "table": name} for name in IDS} | {name: {"kind": "dense"} for name in DENSE},
        "tables": {name: {"rows": size, "dim": dim} for name, size in zip(IDS, SIZES, strict=True)},
        "model": {"kind": "dlrm", "dense_mlp": [64], "mlp": [128, 64]},
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}, "dense": {"kind": "adam", "lr": 0.001}},
        "train": {"global_batch_size": batch, "log_every_steps": 20},
        "tracking": {"tensorboard": False},
    }


def towers_tree(folder: Path, batch: int, dim: int, optimizer: str) -> dict:
    """Returns the config of two towers over the files."""
    return {
        "name": "peers",
        "data": {"train": f"{folder}/*.parquet", "label": "label"},
        "features": {"user_id": {"kind": "id", "table": "user"}, "item_id": {"kind": "id", "table": "item"}},
        "tables": {"user": {"rows": USERS, "dim": dim}, "item": {"rows": ITEMS, "dim": dim}},
        "model": {
            "kind": "two_tower",
            "user": {"features": ["user_id"], "mlp": [128, dim]},
            "item": {"features": ["item_id"], "mlp": [128, dim]},
        },
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": optimizer, "lr": 0.05}, "dense": {"kind": "adam", "lr": 0.001}},
        "train": {"global_batch_size": batch, "log_every_steps": 20},
        "tracking": {"tensorboard": False},
    }
