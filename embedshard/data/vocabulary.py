"""Ids and strings to rows of tables."""

from __future__ import annotations

__all__ = [
    "UNKNOWN_ID",
    "HeldIds",
    "ManagedIds",
    "MetVocabulary",
    "Vocabulary",
    "load_vocabularies",
    "table_rows",
    "unknown_number",
]

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedshard.config import Config
from embedshard.config.composition import Composition
from embedshard.config.parts import (
    AutoVocabulary,
    DoubleHashVocabulary,
    FileVocabulary,
    HashVocabulary,
    ManagedVocabulary,
    TokenizerVocabulary,
    WordNgramsVocabulary,
)
from embedshard.data.hashing import WordArray, hash_integers, hash_strings
from embedshard.data.text import NgramVocabulary, TextVocabulary, UntrainedVocabulary, WordVocabulary, read_tokenizer
from embedshard.data.tokenizer import Tokenizer
from embedshard.data.vocabulary_file import load_id_file
from embedshard.errors import ConfigError, DataError
from embedshard.storage import Location, locate

IntArray = npt.NDArray[np.int64]

UNKNOWN_ID: Final = 2**63 - 1
"""Under a managed vocabulary, whose ids become rows later: what stands for an unknown one until then."""


class Vocabulary(Protocol):
    """Maps ids to rows of a table; where an id becomes two rows, to the number that a batch makes them of.

    Attributes:
        rows: how many rows, or such numbers, there are for known ids.
        fingerprint: of the whole mapping.
    """

    rows: int
    fingerprint: str

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Returns each id's row, -1 for an unknown one; ids are int64, or uint64 where some may not fit into that."""
        ...

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns each string's row, -1 for an unknown one; there are no nulls among them."""
        ...

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row; None where no one id has it."""
        ...

    def describe(self) -> str:
        """Returns what is known, for messages."""
        ...


class _Identity:
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.fingerprint = f"identity of {rows}"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        rows = ids.astype(np.int64, copy=False)
        if not len(ids) or ids.view(np.uint64).max() < self.rows:  # a negative one is among the largest there
            return rows
        return np.where((ids >= 0) & (ids < self.rows), rows, -1)

    def map_strings(self, ids: pa.Array) -> IntArray:
        raise DataError(
            "the column holds strings, but its table's vocabulary is 'identity', for integers from 0. "
            "Use a 'hash' or a 'file' vocabulary."
        )

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        return [row if row < self.rows else None for row in rows.tolist()]

    def describe(self) -> str:
        return f"ids from 0 to {self.rows - 1} (tables' rows={self.rows})"


class _Hash:
    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self._seed = rows, seed
        self.fingerprint = f"hash to {rows}, seed {seed}"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        return (hash_integers(ids, self._seed) % np.uint64(self.rows)).astype(np.int64)

    def map_strings(self, ids: pa.Array) -> IntArray:
        return (hash_strings(ids, self._seed) % np.uint64(self.rows)).astype(np.int64)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        return [None] * len(rows)

    def describe(self) -> str:
        return "any id"


class ManagedIds:
    """Ids as they travel to the rank that knows their rows: integers of at least 0, strings by their hash."""

    def __init__(self, rows: int, vocabulary: ManagedVocabulary) -> None:
        self.rows, self._seed = rows, vocabulary.seed
        self.ttl_steps = vocabulary.ttl_steps
        self.fingerprint = f"managed, seed {vocabulary.seed}"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Returns the ids themselves, -1 for those below 0."""
        own = ids.astype(np.int64, copy=False)
        known = (own >= 0) & (own < UNKNOWN_ID)
        return own if known.all() else np.where(known, own, -1)

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns 63 bits of each string's hash."""
        return (hash_strings(ids, self._seed) >> np.uint64(1)).astype(np.int64)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns what travels, which are ids and not rows; of strings their hashes."""
        return list(rows.tolist())

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return "integers of at least 0, or strings"

    def held(self, ids: IntArray) -> HeldIds:
        """Returns the vocabulary as it was when rows held these ids, below 0 where none."""
        return HeldIds(self, ids)


class HeldIds:
    """A managed vocabulary at one moment.

    Attributes:
        is_held: which rows hold an id, (rows,).
    """

    def __init__(self, vocabulary: ManagedIds, ids: IntArray) -> None:
        self.rows = vocabulary.rows
        self.fingerprint = vocabulary.fingerprint
        self._vocabulary, self._ids = vocabulary, ids
        self.is_held: npt.NDArray[np.bool_] = ids >= 0
        self._order = np.flatnonzero(self.is_held)
        self._order = self._order[np.argsort(ids[self._order])]
        self._sorted = ids[self._order]

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Returns the row that each id held, -1 where it held none."""
        if not len(self._sorted):
            return np.full(len(ids), -1, dtype=np.int64)
        own = self._vocabulary.map_integers(ids)
        place = np.minimum(np.searchsorted(self._sorted, own), len(self._sorted) - 1)
        return np.where(self._sorted[place] == own, self._order[place], -1)

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns the row that each string held, -1 where it held none."""
        return self.map_integers(self._vocabulary.map_strings(ids))

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id that held each row, of a string its hash; None where none did."""
        return [int(self._ids[row]) if row < self.rows and self._ids[row] >= 0 else None for row in rows.tolist()]

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return f"the {len(self._sorted)} ids that hold one of {self.rows} rows"


class _QuotientRemainder(_Identity):
    """Integers from 0, each a pair of rows."""

    def __init__(self, composition: Composition) -> None:
        super().__init__(composition.num_ids)
        self.fingerprint = f"quotients and remainders of {composition.num_ids} by {composition.second}"

    def map_strings(self, ids: pa.Array) -> IntArray:
        raise DataError(
            "the column holds strings, but its table's vocabulary is 'quotient_remainder', for integers from 0. "
            "Use a 'double_hash', 'hash' or 'file' vocabulary."
        )

    def describe(self) -> str:
        return f"ids from 0 to {self.rows - 1} (vocabulary.ids={self.rows})"


class _DoubleHash(_Hash):
    """Ids of any kind, each a pair of rows."""

    def __init__(self, composition: Composition, seed: int) -> None:
        super().__init__(composition.num_ids, seed)
        self._composition = composition
        self.fingerprint = f"two hashes to {composition.first} and {composition.second}, seed {seed}"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        return self._paired(hash_integers(ids, self._seed), hash_integers(ids, self._seed + 1))

    def map_strings(self, ids: pa.Array) -> IntArray:
        return self._paired(hash_strings(ids, self._seed), hash_strings(ids, self._seed + 1))

    def _paired(self, first: WordArray, second: WordArray) -> IntArray:
        quotients = (first % np.uint64(self._composition.first)).astype(np.int64)
        return quotients * self._composition.second + (second % np.uint64(self._composition.second)).astype(np.int64)


class _Uncounted:
    """Stands for a vocabulary that is yet to be counted: it knows the most rows that there can be, and takes any id."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.fingerprint = "ids that are yet to be counted"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        return np.zeros(len(ids), dtype=np.int64)

    def map_strings(self, ids: pa.Array) -> IntArray:
        return np.zeros(len(ids), dtype=np.int64)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        return [None] * len(rows)

    def describe(self) -> str:
        return "the ids of a vocabulary that is yet to be counted"


class MetVocabulary:
    """Gives each id that it meets a row, in the order in which they are met: integers or strings, never unknown.

    Attributes:
        rows: how many it has met.
        fingerprint: of nothing: it is never kept.
    """

    def __init__(self) -> None:
        self.rows, self.fingerprint = 0, "what is met"
        self._rows: dict[int | str, int] = {}

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Returns each id's row."""
        met, places = np.unique(ids, return_inverse=True)
        return self._of(met.tolist())[places]

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns each string's row."""
        encoded = ids.cast(pa.large_string()).dictionary_encode()
        return self._of(encoded.dictionary.to_pylist())[encoded.indices.to_numpy(zero_copy_only=False)]

    @property
    def met(self) -> list[int | str]:
        """What it has met, in row order."""
        return list(self._rows)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row."""
        met = self.met
        return [met[row] for row in rows.tolist()]

    def describe(self) -> str:
        """Returns what is known."""
        return "any id"

    def _of(self, met: Sequence[int | str]) -> IntArray:
        rows = np.array([self._rows.setdefault(one, len(self._rows)) for one in met], dtype=np.int64)
        self.rows = len(self._rows)
        return rows


def load_vocabularies(
    config: Config, tokenizers: Mapping[str, str] | None = None, counted: Mapping[str, Location] | None = None
) -> dict[str, Vocabulary]:
    """Returns the vocabulary of each of the config's tables.

    Args:
        config: the config.
        tokenizers: the JSON of each table's tokenizer, as `train_tokenizers` returns it or a run has kept it. Without one
            that is not ready as a file, its table's vocabulary finds no words and has the most rows that there can be.
        counted: the file of each table's `auto` vocabulary, as `build_vocabularies` returns it or a run has kept it. Without
            one it takes any id for the first and has the most rows that there can be.

    Raises:
        DataError: if a vocabulary's file is not what it must be.
        ConfigError: if a table's rows and its vocabulary's differ.
    """
    loaded: dict[str, Vocabulary] = {}
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, FileVocabulary):
            from_file = load_id_file(name, locate(vocabulary.path), vocabulary.path, vocabulary.column)
            if table.rows is not None and table.rows != from_file.rows:
                raise ConfigError(
                    f"tables.{name}.rows is {table.rows}, but its vocabulary {vocabulary.path} has {from_file.rows} ids. "
                    f"Leave 'rows' out: the file tells."
                )
            loaded[name] = from_file
            continue
        if isinstance(vocabulary, AutoVocabulary):
            kept = (counted or {}).get(name)
            ready = None if kept is None else load_id_file(name, kept, kept.uri, None)
            loaded[name] = _Uncounted(vocabulary.max_size or 0) if ready is None else ready
            continue
        if isinstance(vocabulary, TokenizerVocabulary):
            loaded[name] = _load_words(name, vocabulary, table.known_rows, (tokenizers or {}).get(name))
            continue
        if isinstance(vocabulary, WordNgramsVocabulary):
            continue  # when the words are there
        rows = table.known_rows
        assert rows is not None, "the config checks that rows are known without a file"
        if isinstance(vocabulary, ManagedVocabulary):
            loaded[name] = ManagedIds(rows, vocabulary)
            continue
        composition = table.composition
        if composition is not None:
            if isinstance(vocabulary, DoubleHashVocabulary):
                loaded[name] = _DoubleHash(composition, vocabulary.seed)
            else:
                loaded[name] = _QuotientRemainder(composition)
            continue
        loaded[name] = _Hash(rows, vocabulary.seed) if isinstance(vocabulary, HashVocabulary) else _Identity(rows)
    for name, table in config.tables.items():
        if isinstance(table.vocabulary, WordNgramsVocabulary):
            words, rows = loaded[table.vocabulary.of], table.known_rows
            assert isinstance(words, TextVocabulary), "the config checks that it has a tokenizer"
            assert rows is not None, "the config checks that rows are known without a file"
            loaded[name] = NgramVocabulary(words, table.vocabulary.n, rows, table.vocabulary.seed)
    return {name: loaded[name] for name in config.tables}


def unknown_number(vocabulary: Vocabulary) -> int:
    """Returns the number by which an unknown id travels: the row after the last, or what becomes that row later."""
    return UNKNOWN_ID if isinstance(vocabulary, ManagedIds) else vocabulary.rows


def table_rows(vocabularies: Mapping[str, Vocabulary]) -> dict[str, int]:
    """Returns how many ids each table tells apart: as many as its rows, but where an id becomes two of them."""
    return {name: vocabulary.rows for name, vocabulary in vocabularies.items()}


def _load_words(table: str, vocabulary: TokenizerVocabulary, most: int | None, text: str | None) -> TextVocabulary:
    if text is None and vocabulary.path is None:
        return UntrainedVocabulary(most or 0)
    if text is None:
        text = read_tokenizer(table, vocabulary)
    return WordVocabulary(Tokenizer(text, f"tables.{table}.vocabulary: {vocabulary.path or 'what the run has kept'}"))
