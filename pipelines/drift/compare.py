"""Puts runs on the drifting stream side by side: what they predict, and how many lookups share their row with another id.

python pipelines/drift/compare.py runs/managed runs/hash
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import EmbedshardError
from embedshard.launch.run_tables import ids_in, open_checkpoint_of, table_of
from embedshard.train.run_directory import RunDirectory

IntArray = npt.NDArray[np.int64]


def main() -> None:
    """Prints a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    data = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "drift"
    parser.add_argument("--data", type=Path, default=data, help="what prepare.py wrote (default: %(default)s)")
    given = parser.parse_args()
    shown = Table("run", "vocabulary", "test AUC", "test log loss", "progressive AUC, mean", "lookups that collide")
    try:
        for run in given.runs:
            shown.add_row(*row_of(RunDirectory.open(run), given.data))
    except (EmbedshardError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(EmbedshardError.exit_code)
    Console().print(shown)


def row_of(run: RunDirectory, data: Path) -> list[str]:
    """Returns what is shown of a run."""
    config = run.load_config(os.environ).config
    result: dict[str, Any] = run.read_json("result.json")
    progressive = [day["auc"] for day in result["progressive"][1:]]  # nothing is known before the first day
    kind = config.tables["item"].vocabulary.kind
    if kind == "managed":
        collide = colliding_in_checkpoint(run)
    else:
        vocabulary = load_vocabularies(config)["item"]
        days = [pq.read_table(path, columns=["item_id"])["item_id"].to_numpy() for path in sorted(data.glob("day=*"))]
        collide = colliding(days, lambda ids: vocabulary.map_integers(ids))
    metrics = result["metrics"]
    return [
        run.folder.name,
        kind,
        f"{metrics['auc']:.4f}",
        f"{metrics['log_loss']:.4f}",
        f"{np.mean(progressive):.4f}",
        f"{collide:.1%}",
    ]


def colliding(days: list[IntArray], rows_of: Any) -> float:
    """Returns the share of lookups whose row is also that of another item of the same day."""
    shared = total = 0
    for items in days:
        there, counts = np.unique(items, return_counts=True)
        rows = rows_of(there)
        shared += int(counts[np.bincount(rows)[rows] > 1].sum())
        total += len(items)
    return shared / total


def colliding_in_checkpoint(run: RunDirectory) -> float:
    """Returns the share of rows whose id holds another one too: a row holds one id, so 0 means that nothing is shared."""
    config = run.load_config(os.environ).config
    _, owner, vocabulary = table_of(run, config, "item")
    held = ids_in(open_checkpoint_of(run, None), owner, vocabulary)
    ids = [id_ for id_ in held.ids_of(np.arange(held.rows, dtype=np.int64)) if id_ is not None]
    return 1.0 - len(set(ids)) / len(ids)


if __name__ == "__main__":
    main()
