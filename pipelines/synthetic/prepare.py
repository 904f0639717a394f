"""Generates the synthetic interactions that `make train` trains on.

python pipelines/synthetic/prepare.py --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from embedshard.data.synthetic import K, SyntheticSpec, generate, write
from embedshard.errors import ConfigError


def main() -> None:
    """Generates the data, unless they are there already."""
    defaults = SyntheticSpec()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "synthetic"
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: %(default)s)")
    for name in ("seed", "users", "items", "interactions", "topics"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        spec = SyntheticSpec(
            seed=arguments.seed,
            users=arguments.users,
            items=arguments.items,
            interactions=arguments.interactions,
            topics=arguments.topics,
        )
    except ConfigError as error:
        sys.exit(f"prepare.py: {error}")
    make(spec, arguments.out)


def make(spec: SyntheticSpec, out: Path) -> None:
    """Writes a data set into a folder, whole or not at all; one that is there with the same spec is kept."""
    truth_path = out / "truth.json"
    if truth_path.exists() and json.loads(truth_path.read_text(encoding="utf-8"))["spec"] == asdict(spec):
        print(f"Data: {out} holds them already.")
    else:
        begin = time.monotonic()
        partial = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            write(generate(spec), partial)
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"Data: {out}, generated in {time.monotonic() - begin:.0f} s.")
    truth = json.loads(truth_path.read_text(encoding="utf-8"))
    rows, test = truth["rows"], truth["test"]
    print(
        f"  {rows['train']:,} training rows, {rows['validation']:,} validation, {rows['test']:,} test; "
        f"{spec.users:,} users, {spec.items:,} items, seed {spec.seed}\n"
        f"  recall@{K} on the test rows: reachable {test[f'reachable_recall@{K}']:.4f}, "
        f"popularity {test[f'popularity_recall@{K}']:.4f}, random {test[f'random_recall@{K}']:.4f}"
    )


if __name__ == "__main__":
    main()
