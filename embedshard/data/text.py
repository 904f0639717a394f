"""Vocabularies of tables that texts are looked up in: words, and runs of neighbouring words.

Both begin with the words that a tokenizer finds, so features over one column share that work.
"""

from __future__ import annotations

__all__ = ["NgramVocabulary", "TextVocabulary", "UntrainedVocabulary", "WordVocabulary", "read_tokenizer"]

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.config.parts import TokenizerVocabulary
from embedshard.data.hashing import WordArray, hash_ngrams
from embedshard.data.tokenizer import Tokenizer
from embedshard.errors import DataError
from embedshard.storage import locate

IntArray = npt.NDArray[np.int64]


class Encoder(Protocol):
    """Finds the words of texts."""

    def encode(self, texts: pa.Array) -> tuple[IntArray, IntArray]:
        """Returns the ids of all texts' words one after another, -1 for unknown ones, and how many each text has."""
        ...


class TextVocabulary:
    """Maps texts to rows of a table. What a `Vocabulary` is asked for besides, for ids, most of them refuse.

    Attributes:
        rows: how many rows there are for known words.
        fingerprint: of the whole mapping.
        encoder: finds words; tables that share it see the same.
        lookups_per_word: how many rows a long text looks up for each of its words.
    """

    rows: int
    fingerprint: str
    encoder: Encoder
    lookups_per_word: int = 1

    def rows_of(self, ids: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Returns the rows of all texts one after another, -1 for unknown words, and how many each text has.

        Args:
            ids: of words, as `encoder` gives them.
            lengths: how many each text has.
        """
        return ids, lengths

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Refuses them."""
        raise DataError(
            f"the column holds integers, but its table's vocabulary is {self.describe()}. "
            f"Use an 'identity', 'hash' or 'file' vocabulary."
        )

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns the row of each string that is a word as it stands, -1 for another."""
        raise DataError(f"the column holds single words, but its table's vocabulary is {self.describe()}. Use 'words'.")

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the word of each row; None where no one word has it."""
        return [None] * len(rows)

    def describe(self) -> str:
        """Returns what is known, for messages."""
        raise NotImplementedError


class WordVocabulary(TextVocabulary):
    """The words, or pieces of words, of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.rows, self.encoder = tokenizer.rows, tokenizer
        self.tokenizer = tokenizer
        self.fingerprint = f"tokenizer of {tokenizer.rows}, sha256 {tokenizer.fingerprint}"

    @cached_property
    def _words(self) -> pa.Array:
        return pa.array(self.tokenizer.words, pa.large_string())

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns the row of each string that is a word as it stands, -1 for another."""
        found = pc.index_in(ids.cast(pa.large_string()), value_set=self._words)
        return found.fill_null(-1).cast(pa.int64()).to_numpy(zero_copy_only=False)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the word of each row; None for unknown ones."""
        return [self.tokenizer.words[row] if row < self.rows else None for row in rows.tolist()]

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return f"the {self.rows} words of a tokenizer"


class NgramVocabulary(TextVocabulary):
    """Runs of neighbouring words, hashed to rows. No run is unknown: all unknown words count as one more word."""

    def __init__(self, words: TextVocabulary, sizes: Sequence[int], rows: int, seed: int) -> None:
        self._words, self._sizes, self._seed = words, tuple(sizes), seed
        self.rows, self.encoder, self.lookups_per_word = rows, words.encoder, len(sizes)
        self.fingerprint = f"runs of {sorted(sizes)} words hashed to {rows}, seed {seed}, of {words.fingerprint}"

    def rows_of(self, ids: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Returns the rows of the runs within each text, by where they begin, and how many each text has."""
        known = np.where(ids < 0, self._words.rows, ids)
        hashes, counts = hash_ngrams(known, lengths, self._sizes, self._seed)
        return (hashes % np.uint64(self.rows)).astype(np.int64), counts

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return "any run of words"


class UntrainedVocabulary(TextVocabulary):
    """Stands for a tokenizer that is yet to be made: it knows the most rows that there can be, and finds no words."""

    def __init__(self, rows: int) -> None:
        self.rows, self.encoder = rows, self
        self.fingerprint = "a tokenizer that is yet to be made"

    def encode(self, texts: pa.Array) -> tuple[IntArray, IntArray]:
        """Finds no words."""
        return np.zeros(0, dtype=np.int64), np.zeros(len(texts), dtype=np.int64)

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Takes all for the first word."""
        return np.zeros(len(ids), dtype=np.int64)

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return "the words of a tokenizer that is yet to be made"


def read_tokenizer(table: str, vocabulary: TokenizerVocabulary) -> str:
    """Returns the JSON of a ready tokenizer.

    Raises:
        DataError: if it cannot be read.
    """
    assert vocabulary.path is not None, "a ready one has a path"
    try:
        return locate(vocabulary.path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(
            f"tables.{table}.vocabulary: {vocabulary.path} cannot be read: {error}. It is the JSON file that Tokenizer.save "
            f"of the library 'tokenizers' writes."
        ) from error
