"""Writes IMDB's reviews as weighted bags of words and of runs of words, weighed as by NBSVM (Wang and Manning 2012).

From what `prepare.py` wrote. Words and runs are those of `ngram_bag.yaml`, each different one of a review once, the most
frequent first; a run that fewer than `--min-reviews` training reviews have is left out. The weight of one is how far it
tells favourable reviews from others, |log(p / q)|: p is how many training reviews of label 1 have it, and `--smoothing`
more, divided by the sum of that over all of its kind, and q the same of label 0. Those of a review and a kind are divided
by the root of the sum of their squares.

The test set's texts and labels count for nothing here. With `--hold-out` neither do those of the validation set, for tuning.

    python pipelines/imdb/weigh.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.config import load_config
from embedshard.config.parts import WordNgramsVocabulary
from embedshard.data.hashing import hash_ngrams
from embedshard.data.preparation import write_sets
from embedshard.data.tokenizer import Tokenizer
from embedshard.data.tokenizer_training import train_tokenizers
from embedshard.errors import EmbedshardError

MIN_REVIEWS = 2
SMOOTHING = 10.0
ROW_GROUP_ROWS = 2_500
SETS = ("train", "validation", "test")
CONFIG = Path(__file__).parent / "ngram_bag.yaml"

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.int64] | npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


def main() -> None:
    """Parses arguments, weighs, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "imdb"
    parser.add_argument("--source", type=Path, default=default, help="folder that prepare.py wrote (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: nbsvm within the source)")
    reviews = "training reviews that have a run at least (default: %(default)s)"
    parser.add_argument("--min-reviews", type=int, default=MIN_REVIEWS, help=reviews)
    smoothing = "reviews of either label by which a word or run has more than it was met in (default: %(default)s)"
    parser.add_argument("--smoothing", type=float, default=SMOOTHING, help=smoothing)
    parser.add_argument("--hold-out", action="store_true", help="learn nothing from the validation set")
    arguments = parser.parse_args()
    out = arguments.out or arguments.source / "nbsvm"
    if not arguments.smoothing > 0 or arguments.min_reviews < 1:
        parser.error("--smoothing must be above 0, and --min-reviews at least 1")
    try:
        sets = {name: pq.read_table(arguments.source / name, columns=["text", "label"]) for name in SETS}
        learnt_from = SETS[:1] if arguments.hold_out else SETS[:2]
        weighed, numbers = weigh(sets, learnt_from, arguments.source, arguments.min_reviews, arguments.smoothing)
        counts = write_sets(weighed, out, ROW_GROUP_ROWS)
    except (OSError, pa.ArrowInvalid, KeyError, ValueError, EmbedshardError) as error:
        sys.exit(f"weigh.py: {error}")
    told = [f"{name} {count:,} rows" for name, count in counts.items()]
    print(f"{out}: " + ", ".join([*told, *(f"{number:,} {kind}" for kind, number in numbers.items())]))


def weigh(
    sets: dict[str, pa.Table], learnt_from: Sequence[str], source: Path, min_reviews: int, smoothing: float
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Returns each set with bags and weights in place of texts, and how many words and runs there are.

    Args:
        sets: their texts and labels, by name.
        learnt_from: the sets whose words, runs and labels count.
        source: the folder of the sets, whose words the tokenizer is made from.
        min_reviews: that have a run at least.
        smoothing: what is added to the reviews of each label that have a key.
    """
    files = ", ".join(f"'{source / name}/*.parquet'" for name in learnt_from)
    config = load_config(CONFIG, os.environ, [f"data.train=[{files}]"]).config
    runs = config.tables["run"].vocabulary
    assert isinstance(runs, WordNgramsVocabulary), "ngram_bag.yaml has runs"
    tokenizer = Tokenizer(train_tokenizers(config)["word"], "the tokenizer")
    rows = {name: table.num_rows for name, table in sets.items()}
    texts = pa.chunked_array([chunk for table in sets.values() for chunk in table["text"].chunks]).combine_chunks()
    labels = np.concatenate([table["label"].to_numpy() for table in sets.values()]).astype(bool)
    is_learnt_from = np.repeat([name in learnt_from for name in sets], list(rows.values()))
    words, lengths = tokenizer.encode(texts)
    words = np.where(words < 0, tokenizer.rows, words)
    hashes, run_lengths = hash_ngrams(words, lengths, runs.n, runs.seed)
    columns, numbers = {}, {}
    for kind, keys, counts, least in (("words", words, lengths, 1), ("runs", hashes, run_lengths, min_reviews)):
        columns[kind], columns[f"{kind}_weights"], numbers[kind] = weighed_bags(
            keys, counts, labels, is_learnt_from, least, smoothing
        )
    columns["label"] = pa.array(labels.astype(np.int8))
    whole = pa.table(columns)
    ends = np.cumsum(list(rows.values()))
    return {name: whole.slice(end - rows[name], rows[name]) for name, end in zip(rows, ends, strict=True)}, numbers


def weighed_bags(
    keys: KeyArray, lengths: IntArray, labels: BoolArray, is_learnt_from: BoolArray, min_reviews: int, smoothing: float
) -> tuple[pa.ListArray, pa.ListArray, int]:
    """Returns the bag of each review, the weights in it, and how many ids there are.

    Args:
        keys: the words or runs of all reviews one after another, by any number that stands for one.
        lengths: how many of them each review has.
        labels: of the reviews, (n,).
        is_learnt_from: whether a review's keys and label count, (n,).
        min_reviews: reviews that count and have a key at least; keys of fewer are left out.
        smoothing: what is added to the reviews of each label that have a key.
    """
    known, codes = _known(keys, np.repeat(is_learnt_from, lengths))
    pairs = np.unique(np.repeat(np.arange(len(lengths)), lengths)[codes >= 0] * len(known) + codes[codes >= 0])
    reviews, codes = np.divmod(pairs, max(len(known), 1))
    counts = is_learnt_from[reviews]
    having = [np.bincount(codes[counts & (labels[reviews] == label)], minlength=len(known)) for label in (False, True)]
    is_kept = having[0] + having[1] >= min_reviews
    by_number = np.argsort(-(having[0] + having[1]), kind="stable")
    by_number = by_number[is_kept[by_number]]
    ids = np.full(len(known), -1, dtype=np.int64)
    ids[by_number] = np.arange(len(by_number))
    smoothed = [of_label[by_number] + smoothing for of_label in having]
    shares = [of_label / of_label.sum() for of_label in smoothed]
    told = np.abs(np.log(shares[1] / shares[0]))
    reviews, bags = reviews[ids[codes] >= 0], ids[codes[ids[codes] >= 0]]
    squares = np.bincount(reviews, weights=told[bags] ** 2, minlength=len(lengths))
    weights = (told[bags] / np.sqrt(np.maximum(squares[reviews], 1e-12))).astype(np.float32)
    offsets = pa.array(np.append(0, np.cumsum(np.bincount(reviews, minlength=len(lengths)))).astype(np.int32))
    return *(pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (bags, weights)), len(by_number)


def _known(keys: KeyArray, count: BoolArray) -> tuple[KeyArray, IntArray]:
    """Returns the different keys of those that count, ascending, and the place of each key among them, or -1."""
    known = np.unique(keys[count])
    if not len(known):
        return known, np.full(len(keys), -1, dtype=np.int64)
    codes = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known, np.where(known[codes] == keys, codes, -1)


if __name__ == "__main__":
    main()
