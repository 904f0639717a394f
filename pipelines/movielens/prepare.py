"""Writes MovieLens-1M in the protocol of NCF (He et al. 2017) as Parquet, with a validation set cut from the training set.

From a folder that holds train.parquet and test.parquet (`--source`), or from the files that the authors of NCF publish.
The test set is each user's last rating with 99 given negatives. The validation set is made the same way from what is left:
each user's last training rating, with 99 items drawn among those that the user has not rated in training.

    python pipelines/movielens/prepare.py --source ../shared/data/ncf-ml-1m
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

OFFICIAL = "https://raw.githubusercontent.com/hexiangnan/neural_collaborative_filtering/master/Data"
FILES = ("ml-1m.train.rating", "ml-1m.test.rating", "ml-1m.test.negative")
NUM_NEGATIVES = 99
SEED = 7
ROW_GROUP_ROWS = 65_536

IntArray = npt.NDArray[np.int64]


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with train.parquet and test.parquet; else they are fetched")
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "movielens" / "ncf"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        train, test = read_parquet(arguments.source) if arguments.source else fetch(arguments.out.parent / "official")
        counts = write(split_validation(train), test, arguments.out)
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{arguments.out}: " + ", ".join(f"{name} {count:,} rows" for name, count in counts.items()))


def read_parquet(folder: Path) -> tuple[pa.Table, pa.Table]:
    """Returns (train, test) of a folder; train is in each user's order of time."""
    train = pq.read_table(folder / "train.parquet", columns=["user_id", "item_id", "seq_pos"])
    test = pq.read_table(folder / "test.parquet", columns=["user_id", "item_id", "negatives"])
    return train.rename_columns(["user_id", "item_id", "time"]), test


def fetch(folder: Path) -> tuple[pa.Table, pa.Table]:
    """Downloads the official files, unless they are there, and returns (train, test)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (folder / name).exists():
            print(f"fetching {OFFICIAL}/{name}")
            try:
                with urllib.request.urlopen(f"{OFFICIAL}/{name}", timeout=60) as answer:
                    partial = folder / f"{name}.part"
                    with partial.open("wb") as file:
                        shutil.copyfileobj(answer, file)
                    partial.rename(folder / name)
            except urllib.error.URLError as error:
                raise OSError(
                    f"{OFFICIAL}/{name} cannot be fetched: {error.reason}. Put the file into {folder} yourself, "
                    f"or give --source a folder with train.parquet and test.parquet."
                ) from error
    return read_official(folder)


def read_official(folder: Path) -> tuple[pa.Table, pa.Table]:
    """Returns (train, test) of the official text files."""
    rating = np.loadtxt(folder / FILES[0], dtype=np.int64, delimiter="\t", ndmin=2)
    train = pa.table({"user_id": rating[:, 0], "item_id": rating[:, 1], "time": rating[:, 3]})
    users, items, negatives = [], [], []
    for line in (folder / FILES[2]).read_text().splitlines():
        pair, *others = line.split("\t")
        user, item = pair.strip("()").split(",")
        users.append(int(user))
        items.append(int(item))
        negatives.append([int(other) for other in others])
    test = pa.table({"user_id": users, "item_id": items, "negatives": pa.array(negatives, pa.list_(pa.int64()))})
    return train, test


def split_validation(train: pa.Table) -> dict[str, pa.Table]:
    """Returns the training set without each user's last item, and the validation set of those."""
    user, item, time = (train[name].to_numpy() for name in ("user_id", "item_id", "time"))
    order = np.lexsort((time, user))
    is_last = np.zeros(len(user), dtype=bool)
    is_last[order[np.append(np.flatnonzero(np.diff(user[order])), len(order) - 1)]] = True
    num_items = int(item.max()) + 1
    rated = np.unique(user.astype(np.int64) * num_items + item)
    generator = np.random.default_rng(SEED)
    held_out = np.flatnonzero(is_last)[np.argsort(user[is_last], kind="stable")]
    negatives = np.stack([_unrated(int(who), num_items, rated, generator) for who in user[held_out]])
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, negatives.size + 1, NUM_NEGATIVES, dtype=np.int32)), pa.array(negatives.ravel())
    )
    return {
        "train": pa.table({"user_id": user[~is_last], "item_id": item[~is_last]}),
        "validation": pa.table({"user_id": user[held_out], "item_id": item[held_out], "negatives": lists}),
    }


def _unrated(user: int, num_items: int, rated: IntArray, generator: np.random.Generator) -> IntArray:
    """Returns items that a user has not rated in training, drawn without repetition."""
    begin, end = np.searchsorted(rated, [user * num_items, (user + 1) * num_items])
    free = np.setdiff1d(np.arange(num_items), rated[begin:end] - user * num_items, assume_unique=True)
    return generator.choice(free, NUM_NEGATIVES, replace=False)


def write(parts: dict[str, pa.Table], test: pa.Table, out: Path) -> dict[str, int]:
    """Writes a folder for each part, complete or not at all; returns their rows."""
    counts = {}
    for name, table in {**parts, "test": test}.items():
        partial = out / f".{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pq.write_table(table, partial / "part-00000.parquet", compression="zstd", row_group_size=ROW_GROUP_ROWS)
        shutil.rmtree(out / name, ignore_errors=True)
        partial.rename(out / name)
        counts[name] = table.num_rows
    return counts


if __name__ == "__main__":
    main()
