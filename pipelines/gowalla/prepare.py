"""Writes Gowalla's check-ins in the split of NGCF and LightGCN as Parquet, with a validation set cut from the training set.

From a folder that holds train.parquet and test.parquet with user_id and item_id (`--source`), or from the text files that
the authors of LightGCN publish. A tenth of each user's training items, rounded down, is the validation set.

    python pipelines/gowalla/prepare.py --source ../shared/data/gowalla
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.data.preparation import fetch, held_out_share, write_sets

OFFICIAL = "https://raw.githubusercontent.com/gusye1234/LightGCN-PyTorch/master/data/gowalla"
VALIDATION_SHARE = 0.1
SEED = 7


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with train.parquet and test.parquet; else they are fetched")
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "gowalla"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        if arguments.source:
            train, test = (
                pq.read_table(arguments.source / f"{name}.parquet", columns=["user_id", "item_id"])
                for name in ("train", "test")
            )
        else:
            train, test = (
                read_official(fetch(f"{OFFICIAL}/{name}.txt", arguments.out / "official")) for name in ("train", "test")
            )
        counts = write_sets({**split_validation(train), "test": test}, arguments.out)
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{arguments.out}: " + ", ".join(f"{name} {count:,} rows" for name, count in counts.items()))
    largest = {name: max(pc.max(table[name]).as_py() for table in (train, test)) for name in train.column_names}
    print("tables need " + ", ".join(f"{name.removesuffix('_id')}: rows {most + 1}" for name, most in largest.items()))


def read_official(path: Path) -> pa.Table:
    """Returns the pairs of a text file whose lines are a user and the items it met."""
    users, items = [], []
    for line in path.read_text().splitlines():
        user, *met = (int(number) for number in line.split())
        users.append(np.full(len(met), user, dtype=np.int32))
        items.append(np.array(met, dtype=np.int32))
    return pa.table({"user_id": np.concatenate(users), "item_id": np.concatenate(items)})


def split_validation(train: pa.Table) -> dict[str, pa.Table]:
    """Returns the training set without a tenth of each user's rows, and the validation set of those."""
    held_out = held_out_share(train["user_id"].to_numpy(), VALIDATION_SHARE, SEED)
    return {"train": train.filter(pa.array(~held_out)), "validation": train.filter(pa.array(held_out))}


if __name__ == "__main__":
    main()
