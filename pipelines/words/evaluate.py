"""Word similarity and analogies by the vectors of runs, or of Parquet files with the columns `word` and `vector`.

Similarity is Spearman's correlation of cosines with people's scores, over the pairs whose words are both known; words are
compared in small letters. An analogy a : b = c : ? is answered with the word nearest to b - a + c, of unit vectors each
(Mikolov et al. 2013), among the most frequent words (the first ones), without a, b and c; questions with a word outside
them are not asked.

    python pipelines/words/evaluate.py RUN_DIR... --source ../shared/data/word-eval
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from embedshard.errors import EmbedshardError
from embedshard.launch.similar import vectors_here
from embedshard.world import set_process_environment

SHOWN = ("ws-353-all", "simlex-999", "men-tr-3k", "mturk-771", "rw-stanford")
CANDIDATES = 30_000
BLOCK = 512

Vectors = npt.NDArray[np.float32]


def main() -> None:
    """Prints a table, or with `--json` everything as JSON."""
    set_process_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", type=Path, help="run directories, or Parquet files of vectors")
    parser.add_argument("--source", type=Path, required=True, help="folder with similarity.parquet and analogies.parquet")
    parser.add_argument("--table", help="of a run; the centres where absent")
    help_text = "an analogy's answer is looked for among so many of the most frequent words (default: %(default)s)"
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    table = Table()
    for name in ("vectors", *SHOWN, "analogies"):
        table.add_column(name, justify="left" if name == "vectors" else "right")
    try:
        similarity = pq.read_table(arguments.source / "similarity.parquet").to_pylist()
        questions = pq.read_table(arguments.source / "analogies.parquet").to_pylist()
        for what in arguments.what:
            rows, vectors = read_vectors(what, arguments.table)
            correlations = similarities(rows, vectors, similarity)
            answers = analogies(rows, vectors, questions, arguments.candidates)
            if arguments.json:
                print(json.dumps({"vectors": str(what), "spearman": correlations, "analogies": answers}))
            cells = [f"{correlations[name]['spearman']:.3f}" if name in correlations else "-" for name in SHOWN]
            right = f"{answers['correct']:,} of {answers['asked']:,}"
            table.add_row(what.name, *cells, f"{answers['accuracy']:.3f} ({right})")
    except (OSError, pa.ArrowInvalid, KeyError, EmbedshardError) as error:
        sys.exit(f"evaluate.py: {error}")
    if not arguments.json:
        Console().print(table)


def read_vectors(what: Path, table: str | None) -> tuple[dict[str, int], Vectors]:
    """Returns the row of each word, and the vectors as unit vectors, (rows, dim)."""
    if what.is_dir():
        words, vectors = vectors_here(what, os.environ, table=table)
    else:
        content = pq.read_table(what, columns=["word", "vector"])
        words = content["word"].to_pylist()
        vectors = content["vector"].combine_chunks().flatten().to_numpy().reshape(len(words), -1).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return {str(word): row for row, word in enumerate(words)}, vectors / np.maximum(lengths, 1e-12)


def similarities(rows: dict[str, int], vectors: Vectors, pairs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns Spearman's correlation for each data set, with how many of its pairs are known."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair["dataset"]] = counts.get(pair["dataset"], 0) + 1
        first, second = (rows.get(pair[word].lower()) for word in ("word1", "word2"))
        if first is not None and second is not None:
            ours, theirs = found.setdefault(pair["dataset"], ([], []))
            ours.append(float(vectors[first] @ vectors[second]))
            theirs.append(pair["score"])
    return {
        name: {"spearman": float(spearmanr(ours, theirs).statistic), "known": len(ours), "pairs": counts[name]}
        for name, (ours, theirs) in sorted(found.items())
    }


def analogies(rows: dict[str, int], vectors: Vectors, questions: list[dict[str, str]], candidates: int) -> dict[str, Any]:
    """Returns how many questions are asked and how many are answered right, in all and by section."""
    known = [[rows.get(question[part].lower(), len(vectors)) for part in "abcd"] for question in questions]
    asked = [number for number, four in enumerate(known) if max(four) < min(candidates, len(vectors))]
    sections: dict[str, list[int]] = {}
    for begin in range(0, len(asked), BLOCK):
        block = asked[begin : begin + BLOCK]
        a, b, c, d = np.array([known[number] for number in block]).T
        scores = (vectors[b] - vectors[a] + vectors[c]) @ vectors[:candidates].T
        for given in (a, b, c):
            scores[np.arange(len(block)), given] = -np.inf
        for number, is_right in zip(block, scores.argmax(axis=1) == d, strict=True):
            sections.setdefault(questions[number]["section"], []).append(int(is_right))
    correct = sum(map(sum, sections.values()))
    each = {name: {"asked": len(right), "correct": sum(right)} for name, right in sections.items()}
    return {"asked": len(asked), "correct": correct, "accuracy": correct / max(len(asked), 1), "sections": each}


if __name__ == "__main__":
    main()
