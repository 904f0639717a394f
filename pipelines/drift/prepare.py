"""Generates a stream of days whose items come and go: each day, half of them are new.

python pipelines/drift/prepare.py
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedshard.data.preparation import write_sets
from embedshard.errors import EmbedshardError

IntArray = npt.NDArray[np.int64]

DIM = 8  # of what users like and items are
SIGNAL = 1.2  # standard deviation of the log odds that come from it
BIAS = 1.0  # of those that come from the item


@dataclass(frozen=True)
class Stream:
    """What is generated.

    Attributes:
        days: how many.
        items: that are there on a day; half of them are new, and the former day's older half is gone.
        users: the same on all days.
        rows: of a day.
        test_rows: of the last day, beside them.
        seed: of everything.
    """

    days: int
    items: int
    users: int
    rows: int
    test_rows: int
    seed: int


def main() -> None:
    """Writes a folder for each day, and the test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "drift"
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: %(default)s)")
    defaults = {"days": 20, "items": 4_000, "users": 2_000, "rows": 80_000, "test-rows": 20_000, "seed": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    given = parser.parse_args()
    stream = Stream(given.days, given.items, given.users, given.rows, given.test_rows, given.seed)
    try:
        rows = write(stream, given.out)
    except (EmbedshardError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(EmbedshardError.exit_code)
    distinct = stream.items + (stream.days - 1) * (stream.items // 2)
    print(
        f"{given.out}: {stream.days} days of {stream.rows:,} rows, {distinct:,} different items; {rows['test']:,} test rows"
    )


def write(stream: Stream, out: Path) -> dict[str, int]:
    """Writes the days, `day=01`, ..., and `test`, which is of the last day; returns their rows."""
    generator = np.random.default_rng(stream.seed)
    half = stream.items // 2
    num_items = stream.items + (stream.days - 1) * half
    names = np.unique(generator.integers(0, 2**62, 2 * num_items))
    names = generator.permutation(names)[:num_items]
    likes = generator.normal(size=(stream.users, DIM))
    traits = generator.normal(size=(num_items, DIM)) * SIGNAL / np.sqrt(DIM)
    biases = generator.normal(size=num_items) * BIAS
    shares = 1.0 / np.arange(1, stream.items + 1)
    out.mkdir(parents=True, exist_ok=True)
    sets = {}
    for day in range(stream.days):
        there = generator.permutation(np.arange(day * half, day * half + stream.items))  # another is popular each day
        count = stream.rows + (stream.test_rows if day == stream.days - 1 else 0)
        items = there[generator.choice(stream.items, count, p=shares / shares.sum())]
        users = generator.integers(0, stream.users, count)
        odds = (likes[users] * traits[items]).sum(axis=1) + biases[items]
        clicked = generator.random(count) < 1.0 / (1.0 + np.exp(-odds))
        table = pa.table({"user_id": users, "item_id": names[items], "clicked": clicked.astype(np.int8)})
        sets[f"day={day + 1:02d}"] = table.slice(0, stream.rows)
        if day == stream.days - 1:
            sets["test"] = table.slice(stream.rows)
    return write_sets(sets, out)


if __name__ == "__main__":
    main()
