"""Vectors of a checkpoint to Parquet: of given ids or of all, a block of rows at a time, never a table at once."""

from __future__ import annotations

__all__ = ["Extracted", "extract_here"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.config.parts import HashVocabulary, WordNgramsVocabulary
from embedshard.data.mapped_ids import integers
from embedshard.data.vocabulary import HeldIds, Vocabulary
from embedshard.errors import ConfigError, DataError
from embedshard.export.vectors import all_vectors, vector_file
from embedshard.launch.run_tables import check_holds, ids_in, open_checkpoint_of, table_of
from embedshard.storage import PathOrUri, locate, reaching
from embedshard.train.checkpoint_reader import Checkpoint
from embedshard.train.run_directory import RunDirectory

IntArray = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 2**16
_SHOWN = 10


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        out: the file.
        table: whose vectors they are.
        step: of the checkpoint.
        written: how many.
        unknown: ids that were asked for and that the vocabulary does not know, the first of them.
        num_unknown: how many they are.
    """

    out: str
    table: str
    step: int
    written: int
    unknown: tuple[str, ...]
    num_unknown: int


def extract_here(
    run_dir: PathOrUri,
    out: PathOrUri,
    environment: Mapping[str, str],
    *,
    table: str | None = None,
    ids: Sequence[str] | None = None,
    ids_file: PathOrUri | None = None,
    column: str | None = None,
    skip_unknown: bool = False,
    checkpoint_step: int | None = None,
) -> Extracted:
    """Writes vectors to a Parquet file with the columns `id`, `row` and `vector` (a list of float32), by row.

    Args:
        run_dir: the run's folder.
        out: the file.
        environment: gives configs their `${VAR}`.
        table: its name, a derived one such as `words:context` too; None takes the model's.
        ids: as they are typed: an integer is one where the vocabulary holds integers. None, without `ids_file`: all.
        ids_file: a Parquet file of ids, instead.
        column: that of the ids; the file's only column where None.
        skip_unknown: whether unknown ids are left out and counted, instead of being an error.
        checkpoint_step: None takes the one that the run selected, else the newest.

    Raises:
        EmbedshardError: what a user can act on.
    """
    if ids is not None and ids_file is not None:
        raise ConfigError("--ids and --ids-file both name ids: give one of them, or none for all.")
    run = RunDirectory.open(run_dir)
    config = run.load_config(environment).config
    table, owner, vocabulary = table_of(run, config, table)
    checkpoint, name = open_checkpoint_of(run, checkpoint_step), f"tables/{table}/weight"
    check_holds(checkpoint, name)
    vocabulary = ids_in(checkpoint, owner, vocabulary)
    asked: pa.Array | None = None
    if ids is not None:
        asked = _typed(ids, vocabulary)
    elif ids_file is not None:
        asked = _read_ids(ids_file, column)
    elif isinstance(config.tables[owner].vocabulary, HashVocabulary | WordNgramsVocabulary):
        raise ConfigError(
            f"table '{table}' has the vocabulary '{config.tables[owner].vocabulary.kind}', which does not keep ids: name "
            "those whose vectors are wanted with --ids or --ids-file."
        )
    unknown = pa.array([], pa.string())
    rows: IntArray | None = None
    if asked is not None:
        rows = _rows_of(asked, vocabulary)
        is_unknown = rows < 0
        if is_unknown.any():
            unknown = asked.filter(pa.array(is_unknown))
            if not skip_unknown:
                raise DataError(
                    f"{len(unknown)} of {len(asked)} ids are not among {vocabulary.describe()}, the ids of table '{table}': "
                    f"{', '.join(map(str, unknown[:_SHOWN].to_pylist()))}{', ...' if len(unknown) > _SHOWN else ''}. "
                    f"Correct them, or leave them out with --skip-unknown."
                )
            asked, rows = asked.filter(pa.array(~is_unknown)), rows[~is_unknown]
    place = locate(out)
    with reaching(place), vector_file(place) as write:
        blocks = all_vectors(checkpoint, name, vocabulary) if rows is None else _chosen(checkpoint, name, asked, rows)
        written = sum(write(*block) for block in blocks)
        if not written:
            kind = pa.int64() if asked is None else asked.type
            write(pa.array([], kind), np.zeros(0, np.int64), np.zeros((0, checkpoint.tensors[name].shape[1]), np.float32))
    shown = tuple(map(str, unknown[:_SHOWN].to_pylist()))
    return Extracted(place.uri, table, checkpoint.step, written, shown, len(unknown))


# ------------------------------------------------------------------------------------------------------- which ids
def _typed(ids: Sequence[str], vocabulary: Vocabulary) -> pa.Array:
    """Returns ids as the vocabulary holds them: integers, where it can have integers and all are."""
    are_numbers = all(text.removeprefix("-").isdecimal() and abs(int(text)) < 2**63 for text in ids)
    if are_numbers:
        numbers = pa.array([int(text) for text in ids], pa.int64())
        if isinstance(vocabulary, HeldIds) and (vocabulary.map_integers(integers(numbers)) < 0).all():
            return pa.array(list(ids), pa.large_string())  # digits are strings, too, and strings are held by their hashes
        try:
            vocabulary.map_integers(np.zeros(0, dtype=np.int64))
        except DataError:  # its ids are strings
            return pa.array(list(ids), pa.large_string())
        return numbers
    return pa.array(list(ids), pa.large_string())


def _read_ids(file: PathOrUri, column: str | None) -> pa.Array:
    location = locate(file)
    try:
        with location.open_input() as opened:
            names = pq.read_schema(opened).names
        if column is None and len(names) == 1:
            column = names[0]
        if column not in names:
            met = "no column was named" if column is None else f"there is no column '{column}'"
            raise ConfigError(f"--ids-file {location.uri}: {met}. It has {', '.join(names)}: name one with --column.")
        with location.open_input() as opened:
            ids = pq.read_table(opened, columns=[column])[column].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--ids-file {location.uri} cannot be read: {error}. It must be a Parquet file of ids.") from error
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    is_integer = pa.types.is_integer(ids.type)
    if not (is_integer or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise DataError(f"--ids-file {location.uri}: column '{column}' is {ids.type}; ids are integers or strings.")
    if ids.null_count:
        raise DataError(f"--ids-file {location.uri}: column '{column}' has {ids.null_count} nulls. Remove them.")
    return ids if is_integer else ids.cast(pa.large_string())


def _rows_of(ids: pa.Array, vocabulary: Vocabulary) -> IntArray:
    return vocabulary.map_integers(integers(ids)) if pa.types.is_integer(ids.type) else vocabulary.map_strings(ids)


# --------------------------------------------------------------------------------------------------------- their vectors
def _chosen(checkpoint: Checkpoint, name: str, ids: pa.Array, rows: IntArray) -> Iterator[tuple[pa.Array, IntArray, Any]]:
    """Yields ids, rows and vectors of some rows; files that hold none of them are not read."""
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]

    def span(first: int, last: int) -> tuple[int, int]:
        begin, end = np.searchsorted(ascending, [first, last]).tolist()
        return begin, end

    def is_wanted(first: int, last: int) -> bool:
        begin, end = span(first, last)
        return begin < end

    for first, block in checkpoint.row_blocks(name, is_wanted):
        begin, end = span(first, first + len(block))
        for start in range(begin, end, _ROWS_AT_ONCE):
            places = slice(start, min(start + _ROWS_AT_ONCE, end))
            here = ascending[places]
            yield ids.take(pa.array(order[places])), here, block[here - first].float().numpy()
