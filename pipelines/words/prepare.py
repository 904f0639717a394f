"""Writes the words of IMDB's 50,000 labelled reviews as lists, a review a row, for skip-gram.

Reads train.parquet and test.parquet, each with a column `text` (`--source`). Tags fall out, capitals become small letters,
and a word is a run of the letters a to z. Words that are met fewer than `--min-count` times fall out of the lists, as
word2vec does it. Beside the lists lies the vocabulary, words.parquet: each word with its count, the most frequent first.

    python pipelines/words/prepare.py --source ../shared/data/imdb
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

from embedshard.data.preparation import write_sets

MIN_COUNT = 5
ROW_GROUP_ROWS = 2_500


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with train.parquet and test.parquet")
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "words"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    help_text = "how often a word is met at least (default: %(default)s)"
    parser.add_argument("--min-count", type=int, default=MIN_COUNT, help=help_text)
    arguments = parser.parse_args()
    try:
        texts = [pq.read_table(arguments.source / f"{name}.parquet", columns=["text"])["text"] for name in ("train", "test")]
        lists = pa.chunked_array([words_of(chunk) for text in texts for chunk in text.chunks])
        kept, vocabulary = frequent_words(lists, arguments.min_count)
        write_sets({"train": pa.table({"words": kept})}, arguments.out, ROW_GROUP_ROWS)
        pq.write_table(vocabulary, arguments.out / "words.parquet", compression="zstd")
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    total = pc.sum(vocabulary["count"]).as_py() or 0
    print(f"{arguments.out}: {len(kept):,} reviews, {total:,} words, {vocabulary.num_rows:,} different ones")


def words_of(texts: pa.StringArray) -> pa.ListArray:
    """Returns the words of each text, in order; none of a null."""
    plain = pc.utf8_lower(pc.replace_substring_regex(texts, r"<[^>]*>", " "))
    spaced = pc.utf8_trim(pc.replace_substring_regex(plain, "[^a-z]+", " "), " ")
    words = pc.split_pattern(spaced, " ")
    return words.filter(pc.fill_null(pc.not_equal(spaced, ""), False))


def frequent_words(lists: pa.ChunkedArray, min_count: int) -> tuple[pa.ListArray, pa.Table]:
    """Returns the lists without rare words, those that stay empty left out, and the words with their counts.

    Raises:
        ValueError: if no word is frequent enough.
    """
    column = lists.combine_chunks()
    codes = column.flatten().dictionary_encode()
    counts = np.bincount(codes.indices.to_numpy(), minlength=len(codes.dictionary))
    table = pa.table({"word": codes.dictionary, "count": counts})
    table = table.filter(pc.greater_equal(table["count"], min_count)).sort_by(
        [("count", "descending"), ("word", "ascending")]
    )
    if not table.num_rows:
        raise ValueError(f"no word is met {min_count} times. Choose a smaller --min-count, or another --source")
    is_kept = (counts >= min_count)[codes.indices.to_numpy()]
    ends = np.concatenate([[0], np.cumsum(is_kept)])[column.offsets.to_numpy() - column.offsets[0].as_py()]
    words = codes.dictionary.take(codes.indices.filter(pa.array(is_kept)))
    kept = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), words)
    return kept.filter(pc.greater(pc.list_value_length(kept), 0)), table


if __name__ == "__main__":
    main()
