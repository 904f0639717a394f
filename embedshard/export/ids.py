"""Ids as a person types them, and what a file knows of them."""

from __future__ import annotations

__all__ = ["Id", "align_metadata", "find_row", "read_metadata", "row_of"]

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import DataError, nearest, sentence
from embedshard.storage import locate

Id = int | str | None

_OFFERED_IDS: Final = 100_000
"""Of the first so many ids of a vocabulary the one most like an unknown one is offered."""


def row_of(id_: str, table: str, vocabulary: Vocabulary) -> int:
    """Returns the row of an id as it was typed.

    Raises:
        DataError: if the vocabulary does not know it; names the known one that is most like it.
    """
    row = -1
    if id_.removeprefix("-").isdecimal() and abs(int(id_)) < 2**63:
        try:
            row = int(vocabulary.map_integers(np.array([int(id_)], dtype=np.int64))[0])
        except DataError:  # its ids are strings
            row = -1
    if row < 0:
        try:
            row = int(vocabulary.map_strings(pa.array([id_], pa.large_string()))[0])
        except DataError:  # its ids are integers
            row = -1
    if row < 0:
        first = vocabulary.ids_of(np.arange(min(vocabulary.rows, _OFFERED_IDS), dtype=np.int64))
        hint = nearest(id_, (str(known) for known in first if isinstance(known, str)))
        hint = hint if any(isinstance(known, str) for known in first) else "Give one of these"
        raise DataError(f"'{id_}' is not among {vocabulary.describe()}, the ids of table '{table}'. {sentence(hint)}")
    return row


def find_row(id_: int | str, vocabulary: Vocabulary) -> int:
    """Returns the row of an id as JSON has it, -1 where the vocabulary does not know it.

    It is looked up as what it is; where the vocabulary's ids are of the other type, as that.
    """
    word = str(id_)
    number = int(word) if word.removeprefix("-").isdecimal() and abs(int(word)) < 2**63 else None
    for as_integer in (True, False) if isinstance(id_, int) else (False, True):
        try:
            if not as_integer:
                return int(vocabulary.map_strings(pa.array([word], pa.large_string()))[0])
            if number is not None:
                return int(vocabulary.map_integers(np.array([number], dtype=np.int64))[0])
        except DataError:  # its ids are of the other type
            continue
    return -1


def read_metadata(path: str, columns: Sequence[str], table: str, ids: Sequence[Id]) -> dict[Id, dict[str, Any]]:
    """Returns what a Parquet file knows of ids, a row each.

    Args:
        path: of the file.
        columns: names of that of the ids, the first that is there; else it is the file's first.
        table: whose ids they are, for messages.
        ids: those that are asked for.

    Raises:
        DataError: if it cannot be read, or its ids are of another type.
    """
    content, key = _metadata(path, columns)
    wanted = _as_key(pa.array([id_ for id_ in ids if id_ is not None]), content[key].type, key, path, columns, table)
    content = content.filter(pc.is_in(content[key], value_set=wanted))
    return {record.pop(key): record for record in content.to_pylist()}


def align_metadata(path: str, columns: Sequence[str], table: str, ids: pa.Array) -> pa.Table:
    """Returns what a Parquet file knows of ids, a row for each of them in their order, nulls where it knows nothing.

    Args and raises: as `read_metadata`.
    """
    content, key = _metadata(path, columns)
    places = pc.index_in(
        _as_key(ids, content[key].type, key, path, columns, table), value_set=content[key].combine_chunks(), skip_nulls=True
    )
    return content.drop_columns([key]).take(places)


def _metadata(path: str, columns: Sequence[str]) -> tuple[pa.Table, str]:
    """Returns a Parquet file of metadata, and the column of the ids in it."""
    location = locate(path)
    try:
        with location.open_input() as file:
            content = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--metadata {location.uri} cannot be read: {error}. It must be a Parquet file.") from error
    return content, next((column for column in columns if column in content.column_names), content.column_names[0])


def _as_key(ids: pa.Array, kind: pa.DataType, key: str, path: str, columns: Sequence[str], table: str) -> pa.Array:
    try:
        return ids.cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"--metadata {path}: column '{key}' is {kind}, the ids of table '{table}' are not. "
            f"Name the column of the ids '{columns[0]}', or put it first."
        ) from error
