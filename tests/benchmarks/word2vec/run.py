"""Words a second of embedshard's skip-gram and of gensim's on the words of IMDB's reviews, in turns, as a table in Markdown.

    python pipelines/words/prepare.py --source ../shared/data/imdb
    python tests/benchmarks/word2vec/run.py --gensim /tmp/gensim/bin/python --data data

in embedshard's environment; gensim_words.py beside it says how to make gensim's. Each training is a fresh process of one
epoch on one thread, all bound to one core. All words count, also those that sub-sampling leaves out. embedshard's speed is
that of `embedshard train` from its first step to its last, reading and decoding included; gensim's that of `train` alone,
over lists in memory.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bound import finished  # noqa: E402

CONFIGS = HERE.parents[2] / "pipelines" / "words"
CASES = ("word2vec", "hierarchical_softmax")


def ours(case, arguments, scratch):
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "embedshard.cli", "train", CONFIGS / f"{case}.yaml", "--run-dir", run]
    finished([*command, "--set", "train.epochs=1"], {arguments.cpu}, EMBEDSHARD_DATA=str(arguments.data))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reviews = [line["train/samples_per_second"] for line in lines if "train/samples_per_second" in line][-1]
    lists = pq.read_table(arguments.data / "words" / "train", columns=["words"])["words"]
    return reviews * sum(len(chunk.flatten()) for chunk in lists.chunks) / len(lists)


def gensim(case, arguments, scratch):
    command = [arguments.gensim, HERE / "gensim_words.py", arguments.data / "words", "--out", scratch / "vectors.parquet"]
    flags = ["--hierarchical-softmax"] if case == "hierarchical_softmax" else []
    said = finished([*command, "--epochs", 1, *flags], {arguments.cpu}).text
    return float(re.search(r"([\d,]+) words/s", said).group(1).replace(",", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gensim", type=Path, required=True, help="Python of gensim's environment")
    parser.add_argument("--data", type=Path, required=True, help="folder with words/, as EMBEDSHARD_DATA names it")
    parser.add_argument("--case", action="append", choices=CASES, help="only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="the core that all are bound to")
    arguments = parser.parse_args()
    print("| objective | program | words/s | least to greatest | times gensim |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="embedshard-words-") as scratch:
        for case in arguments.case or CASES:
            speeds = {"embedshard": [], "gensim": []}
            for _ in range(arguments.repeats):
                for program, measured in (("embedshard", ours), ("gensim", gensim)):
                    speeds[program].append(measured(case, arguments, Path(scratch)))
                    print(f"{case}, {program}: {speeds[program][-1]:,.0f} words/s", file=sys.stderr, flush=True)
            for program, each in speeds.items():
                median, against = (statistics.median(values) for values in (each, speeds["gensim"]))
                cells = (case, program, f"{median:,.0f}", f"{min(each):,.0f} to {max(each):,.0f}", f"{median / against:.2f}")
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
