"""What the pipelines' prepare scripts share: published files fetched, rows held out, sets written whole or not at all."""

from __future__ import annotations

__all__ = ["fetch", "held_out_share", "last_of_each", "negatives_for", "write_sets"]

import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ROW_GROUP_ROWS = 65_536


def fetch(url: str, folder: Path) -> Path:
    """Downloads a file into a folder, unless it is there, and returns its path; half a file never has its name.

    Raises:
        OSError: saying what can be done instead.
    """
    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}")
    partial = path.with_name(f".{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except urllib.error.URLError as error:
        raise OSError(
            f"{url} cannot be fetched: {error.reason}. Put the file into {folder} yourself, or give --source a folder that "
            f"holds the data as Parquet."
        ) from error
    partial.rename(path)
    return path


def last_of_each(users: IntArray, times: IntArray) -> BoolArray:
    """Returns which rows are their user's last, (n,); of equal times the later row."""
    order = np.lexsort((times, users))
    is_last = np.zeros(len(users), dtype=bool)
    is_last[order[np.append(np.flatnonzero(np.diff(users[order])), len(order) - 1)]] = True
    return is_last


def held_out_share(users: IntArray, share: float, seed: int) -> BoolArray:
    """Returns a random share of each user's rows, rounded down, (n,)."""
    words = np.random.Philox(key=[seed, 0]).random_raw(len(users))
    order = np.lexsort((words, users))
    in_order = users[order]
    place = np.arange(len(users)) - np.searchsorted(in_order, in_order)
    held = np.zeros(len(users), dtype=bool)
    held[order] = place < np.floor(np.bincount(users)[in_order] * share)
    return held


def negatives_for(users: IntArray, rated_users: IntArray, rated_items: IntArray, count: int, seed: int) -> pa.ListArray:
    """Returns, for each of `users`, `count` items that the user has not rated, drawn without repetition.

    Raises:
        ValueError: if a user has fewer items left.
    """
    num_items = int(rated_items.max()) + 1
    rated = np.unique(rated_users.astype(np.int64) * num_items + rated_items)
    generator = np.random.default_rng(seed)
    drawn = np.empty((len(users), count), dtype=np.int64)
    for row, user in enumerate(users.tolist()):
        begin, end = np.searchsorted(rated, [user * num_items, (user + 1) * num_items])
        free = np.setdiff1d(np.arange(num_items), rated[begin:end] - user * num_items, assume_unique=True)
        if len(free) < count:
            raise ValueError(f"user {user} has {len(free)} of {num_items} items not rated; {count} negatives are asked for")
        drawn[row] = generator.choice(free, count, replace=False)
    offsets = np.arange(0, drawn.size + 1, count, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(drawn.ravel()))


def write_sets(sets: Mapping[str, pa.Table], out: Path, row_group_rows: int = ROW_GROUP_ROWS) -> dict[str, int]:
    """Writes a folder of Parquet for each set, each complete or not at all; returns their rows."""
    counts = {}
    for name, table in sets.items():
        partial = out / f".{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pq.write_table(table, partial / "part-00000.parquet", compression="zstd", row_group_size=row_group_rows)
        shutil.rmtree(out / name, ignore_errors=True)
        partial.rename(out / name)
        counts[name] = table.num_rows
    return counts
