"""Writes IMDB's labelled reviews (Maas et al. 2011) as Parquet, with a validation set cut from the training set.

From a folder that holds train.parquet and test.parquet with text and label (`--source`). A tenth of the training reviews
of each label, drawn by the seed and rounded down, is the validation set. HTML tags stay in the texts: `strip_html` of a
vocabulary takes them away.

    python pipelines/imdb/prepare.py --source ../shared/data/imdb
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.preparation import held_out_share, write_sets

VALIDATION_SHARE = 0.1
SEED = 7
ROW_GROUP_ROWS = 2_500


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with train.parquet and test.parquet")
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "imdb"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    share = "share of the training reviews that are held out (default: %(default)s)"
    parser.add_argument("--validation-share", type=float, default=VALIDATION_SHARE, help=share)
    parser.add_argument("--seed", type=int, default=SEED, help="of what is held out (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        train, test = (read_reviews(arguments.source / f"{name}.parquet") for name in ("train", "test"))
        sets = {**split_validation(train, arguments.validation_share, arguments.seed), "test": test}
        counts = write_sets(sets, arguments.out, ROW_GROUP_ROWS)
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{arguments.out}: " + ", ".join(f"{name} {count:,} rows" for name, count in counts.items()))


def read_reviews(path: Path) -> pa.Table:
    """Returns texts and their labels, 1 for a favourable review and 0 for another."""
    table = pq.read_table(path, columns=["text", "label"])
    return table.set_column(1, "label", table["label"].cast(pa.int8()))


def split_validation(train: pa.Table, share: float, seed: int) -> dict[str, pa.Table]:
    """Returns the training set without a share of each label's rows, and the validation set of those.

    Raises:
        ValueError: if the share is none.
    """
    if not 0 <= share < 1:
        raise ValueError(f"--validation-share {share} is no share of the training reviews. Choose one from 0 to below 1")
    held_out = held_out_share(train["label"].to_numpy(), share, seed)
    return {"train": train.filter(pa.array(~held_out)), "validation": train.filter(pa.array(held_out))}


if __name__ == "__main__":
    main()
