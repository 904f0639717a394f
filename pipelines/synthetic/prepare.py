"""Generates the synthetic interactions that `make train` trains on.

python pipelines/synthetic/prepare.py --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from embedshard.data.synthetic import K, SyntheticSpec, generate, is_written, write
from embedshard.errors import EmbedshardError


def main() -> None:
    """Generates the data, unless they are there already."""
    defaults = SyntheticSpec()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "synthetic"
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: %(default)s)")
    names = ("seed", "users", "items", "interactions", "topics")
    for name in names:
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help="default: %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that what is half made is removed
    try:
        make(SyntheticSpec(**{name: getattr(arguments, name) for name in names}), arguments.out)
    except (EmbedshardError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(EmbedshardError.exit_code)


def make(spec: SyntheticSpec, out: Path) -> None:
    """Writes a data set into a folder, whole or not at all; one that is there with the same spec is kept."""
    if is_written(spec, out):
        print(f"Data: {out} holds them already.")
    else:
        begin = time.monotonic()
        partial, former = (out.with_name(f".{out.name}.{os.getpid()}.{role}") for role in ("part", "former"))
        try:
            write(generate(spec), partial)
            if out.exists():
                out.rename(former)  # in one move: a folder that is being deleted would look like a whole one
            partial.rename(out)
        finally:
            if former.exists() and not out.exists():
                former.rename(out)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)
        print(f"Data: {out}, generated in {time.monotonic() - begin:.0f} s.")
    truth = json.loads((out / "truth.json").read_text(encoding="utf-8"))
    counts, test = truth["counts"], truth["test"]
    print(
        f"  {counts['train']:,} training rows, {counts['validation']:,} validation, {counts['test']:,} test; "
        f"{counts['users']:,} users, {counts['items']:,} items, seed {spec.seed}\n"
        f"  recall@{K} on the test rows: reachable {test[f'reachable_recall@{K}']:.4f}, "
        f"popularity {test[f'popularity_recall@{K}']:.4f}, random {test[f'random_recall@{K}']:.4f}"
    )


if __name__ == "__main__":
    main()
