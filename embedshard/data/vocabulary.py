"""Ids and strings to rows of tables."""

from __future__ import annotations

__all__ = ["Vocabulary", "WordArray", "hash_integers", "hash_strings", "integers", "load_vocabularies", "table_rows"]

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.config import Config
from embedshard.config.parts import FileVocabulary, HashVocabulary
from embedshard.errors import ConfigError, DataError
from embedshard.storage import locate

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


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


def hash_integers(ids: IntArray | WordArray, seed: int) -> WordArray:
    """Returns a 64-bit hash of each id: splitmix64 (Steele et al. 2014) of id + (seed + 1) * its golden constant."""
    return _finalised(ids.astype(np.uint64) + np.uint64((seed + 1) * _GOLDEN % 2**64))


def hash_strings(ids: pa.Array, seed: int) -> WordArray:
    """Returns a 64-bit hash of each string: FNV-1a over its UTF-8 bytes, then as for an integer.

    All strings advance one byte at a time together, so the cost is one pass an array for each byte of the longest.
    """
    binary = ids.cast(pa.large_string()).cast(pa.large_binary())
    _, offsets_buffer, data_buffer = binary.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[binary.offset : binary.offset + len(binary) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.zeros(0, dtype=np.uint8)
    words = np.full(len(binary), _FNV_OFFSET, dtype=np.uint64)
    lengths = np.diff(offsets)
    by_length = np.argsort(-lengths, kind="stable")
    sorted_starts, sorted_lengths = offsets[:-1][by_length], lengths[by_length]
    hashed = words[by_length]
    for place in range(int(sorted_lengths[0]) if len(sorted_lengths) else 0):
        count = int(np.searchsorted(-sorted_lengths, -place, side="left"))  # strings longer than `place`
        hashed[:count] = (hashed[:count] ^ data[sorted_starts[:count] + place]) * np.uint64(_FNV_PRIME)
    words[by_length] = hashed
    return _finalised(words + np.uint64((seed + 1) * _GOLDEN % 2**64))


def _finalised(words: WordArray) -> WordArray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


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


def load_vocabularies(config: Config) -> dict[str, Vocabulary]:
    """Returns the vocabulary of each of the config's tables.

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
        rows = table.known_rows
        assert rows is not None, "the config checks that rows are known without a file"
        loaded[name] = _Hash(rows, vocabulary.seed) if isinstance(vocabulary, HashVocabulary) else _Identity(rows)
    return loaded


def table_rows(vocabularies: Mapping[str, Vocabulary]) -> dict[str, int]:
    """Returns how many ids each table has rows for."""
    return {name: vocabulary.rows for name, vocabulary in vocabularies.items()}


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
