"""Ids and strings to rows of tables."""

from __future__ import annotations

__all__ = ["MetVocabulary", "Vocabulary", "integers", "load_vocabularies", "table_rows"]

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.config import Config
from embedshard.config.parts import FileVocabulary, HashVocabulary, TokenizerVocabulary, WordNgramsVocabulary
from embedshard.data.hashing import WordArray, hash_integers, hash_strings
from embedshard.data.text import NgramVocabulary, TextVocabulary, UntrainedVocabulary, WordVocabulary, read_tokenizer
from embedshard.data.tokenizer import Tokenizer
from embedshard.errors import ConfigError, DataError
from embedshard.storage import locate

IntArray = npt.NDArray[np.int64]


class Vocabulary(Protocol):
    """Maps ids to rows of a table.

    Attributes:
        rows: how many rows there are for known ids.
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
        known = (ids >= 0) & (ids < self.rows)
        rows = ids.astype(np.int64, copy=False)
        return rows if known.all() else np.where(known, rows, -1)

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


class _File:
    def __init__(self, where: str, ids: pa.Array) -> None:
        self.rows = len(ids)
        self._where, self._ids = where, ids
        is_integer = pa.types.is_integer(ids.type)
        self._strings = None if is_integer else ids.cast(pa.large_string())
        numbers = integers(ids) if is_integer else np.zeros(0, dtype=np.int64)
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        content = (
            numbers.tobytes() if is_integer else b"\0".join(ids.cast(pa.large_string()).cast(pa.large_binary()).to_pylist())
        )
        self.fingerprint = f"file of {self.rows}, sha256 {hashlib.sha256(content).hexdigest()}"

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        if self._strings is not None:
            raise DataError(
                f"the column holds integers, but the vocabulary {self._where} holds strings. Both must be of one kind: "
                f"write the vocabulary as integers, or the column as strings."
            )
        if not self.rows:
            return np.full(len(ids), -1, dtype=np.int64)
        own = ids.astype(self._sorted.dtype, copy=False)
        place = np.minimum(np.searchsorted(self._sorted, own), self.rows - 1)
        known = self._sorted[place] == own
        if own.dtype != ids.dtype:  # what one of int64 and uint64 cannot hold has the bits of another number
            known &= ids.astype(np.int64) >= 0
        return np.where(known, self._order[place], -1)

    def map_strings(self, ids: pa.Array) -> IntArray:
        if self._strings is None:
            raise DataError(
                f"the column holds strings, but the vocabulary {self._where} holds integers. Both must be of one kind: "
                f"write the vocabulary as strings, or the column as integers."
            )
        found = pc.index_in(ids.cast(pa.large_string()), value_set=self._strings)
        return found.fill_null(-1).cast(pa.int64()).to_numpy(zero_copy_only=False)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        return [self._ids[row].as_py() if row < self.rows else None for row in rows.tolist()]

    def describe(self) -> str:
        return f"the {self.rows} ids of {self._where}"


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

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row."""
        met: list[int | str | None] = list(self._rows)
        return [met[row] for row in rows.tolist()]

    def describe(self) -> str:
        """Returns what is known."""
        return "any id"

    def _of(self, met: Sequence[int | str]) -> IntArray:
        rows = np.array([self._rows.setdefault(one, len(self._rows)) for one in met], dtype=np.int64)
        self.rows = len(self._rows)
        return rows


def load_vocabularies(config: Config, tokenizers: Mapping[str, str] | None = None) -> dict[str, Vocabulary]:
    """Returns the vocabulary of each of the config's tables.

    Args:
        config: the config.
        tokenizers: the JSON of each table's tokenizer, as `train_tokenizers` returns it or a run has kept it. Without one
            that is not ready as a file, its table's vocabulary finds no words and has the most rows that there can be.

    Raises:
        DataError: if a vocabulary's file is not what it must be.
        ConfigError: if a table's rows and its vocabulary's differ.
    """
    loaded: dict[str, Vocabulary] = {}
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, FileVocabulary):
            from_file = _load_file(name, vocabulary)
            if table.rows is not None and table.rows != from_file.rows:
                raise ConfigError(
                    f"tables.{name}.rows is {table.rows}, but its vocabulary {vocabulary.path} has {from_file.rows} ids. "
                    f"Leave 'rows' out: the file tells."
                )
            loaded[name] = from_file
            continue
        if isinstance(vocabulary, TokenizerVocabulary):
            loaded[name] = _load_words(name, vocabulary, table.known_rows, (tokenizers or {}).get(name))
            continue
        if isinstance(vocabulary, WordNgramsVocabulary):
            continue  # when the words are there
        rows = table.known_rows
        assert rows is not None, "the config checks that rows are known without a file"
        loaded[name] = _Hash(rows, vocabulary.seed) if isinstance(vocabulary, HashVocabulary) else _Identity(rows)
    for name, table in config.tables.items():
        if isinstance(table.vocabulary, WordNgramsVocabulary):
            words, rows = loaded[table.vocabulary.of], table.known_rows
            assert isinstance(words, TextVocabulary), "the config checks that it has a tokenizer"
            assert rows is not None, "the config checks that rows are known without a file"
            loaded[name] = NgramVocabulary(words, table.vocabulary.n, rows, table.vocabulary.seed)
    return {name: loaded[name] for name in config.tables}


def table_rows(vocabularies: Mapping[str, Vocabulary]) -> dict[str, int]:
    """Returns how many ids each table has rows for."""
    return {name: vocabulary.rows for name, vocabulary in vocabularies.items()}


def _load_words(table: str, vocabulary: TokenizerVocabulary, most: int | None, text: str | None) -> TextVocabulary:
    if text is None and vocabulary.path is None:
        return UntrainedVocabulary(most or 0)
    if text is None:
        text = read_tokenizer(table, vocabulary)
    return WordVocabulary(Tokenizer(text, f"tables.{table}.vocabulary: {vocabulary.path or 'what the run has kept'}"))


def _load_file(table: str, vocabulary: FileVocabulary) -> _File:
    where = f"tables.{table}.vocabulary: {vocabulary.path}"
    try:
        with locate(vocabulary.path).open_input() as file:
            content: Any = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where} cannot be read: {error}. It must be a Parquet file of ids in row order.") from error
    column = vocabulary.column
    if column is None:
        if len(content.column_names) != 1:
            raise ConfigError(
                f"{where} has the columns {', '.join(content.column_names)}. Name that of the ids: vocabulary.column."
            )
        column = content.column_names[0]
    if column not in content.column_names:
        raise ConfigError(f"{where} has no column '{column}', only {', '.join(content.column_names)}.")
    ids = content[column].combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if not (pa.types.is_integer(ids.type) or _is_string(ids.type)):
        raise DataError(f"{where}: column '{column}' is {ids.type}; ids are integers or strings.")
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}: row {row} of column '{column}' is null; each row must name an id. Remove it.")
    codes = ids.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    unique, first = np.unique(codes, return_index=True)
    if len(unique) < len(codes):
        repeated = np.setdiff1d(np.arange(len(codes)), first)
        row = int(repeated[0])
        former = int(first[np.searchsorted(unique, codes[row])])
        raise DataError(
            f"{where}: rows {former} and {row} of column '{column}' are both {ids[row].as_py()!r} "
            f"({len(repeated)} rows repeat an earlier id). Each id has one row: remove the others."
        )
    return _File(vocabulary.path, ids)


def integers(ids: pa.Array) -> IntArray | WordArray:
    """Returns integers of any width, without nulls, as int64, or as uint64 if they are that."""
    kind = pa.uint64() if pa.types.is_uint64(ids.type) else pa.int64()
    return ids.cast(kind).to_numpy(zero_copy_only=False)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
