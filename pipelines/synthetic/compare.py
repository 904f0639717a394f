"""Puts a run's recall on the synthetic data beside what is reachable, popularity, and the untrained model.

python pipelines/synthetic/compare.py RUN_DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from embedshard.data.synthetic import K
from embedshard.errors import EmbedshardError
from embedshard.launch.local import evaluate_untrained
from embedshard.world import set_process_environment

METRIC = f"recall@{K}"


def main() -> None:
    """Prints the table."""
    set_process_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    data = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "synthetic"
    parser.add_argument("--data", type=Path, default=data, help="folder of the data (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        truth = json.loads((arguments.data / "truth.json").read_text(encoding="utf-8"))["test"]
        result = json.loads((arguments.run_dir / "result.json").read_text(encoding="utf-8"))
        untrained = evaluate_untrained(arguments.run_dir, "validation", "auto", os.environ)
    except (OSError, EmbedshardError) as error:
        sys.exit(f"compare.py: {error}")
    reachable = truth[f"reachable_{METRIC}"]
    rows = {
        "reachable: ranking by the true probability": reachable,
        "the trained model": result["metrics"][METRIC],
        "popularity": truth[f"popularity_{METRIC}"],
        "the untrained model, on validation users": untrained[METRIC],
    }
    table = Table(title=f"{METRIC} on the test rows, items met before left out", title_justify="left")
    table.add_column("ranking")
    table.add_column(METRIC, justify="right")
    table.add_column("of reachable", justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}", f"{value / reachable:.1%}")
    Console().print(table)
    print(
        f"{result['samples_seen']:,} rows in {result['wall_seconds']:.0f} s, "
        f"{result['samples_per_second']:,.0f} a second. The result lies in {arguments.run_dir / 'result.json'}"
    )


if __name__ == "__main__":
    main()
