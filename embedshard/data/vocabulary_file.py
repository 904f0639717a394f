"""Vocabularies that a Parquet file holds: those that a user gives, and those that were counted from the training set."""

from __future__ import annotations

__all__ = ["Counted", "IdFile", "counted_metadata", "load_id_file", "read_footer"]

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.hashing import WordArray
from embedshard.data.mapped_ids import IntegerIds, MappedIds, is_string, lay_out, mapped
from embedshard.errors import ConfigError, DataError
from embedshard.storage import Location, reaching

IntArray = npt.NDArray[np.int64]

_KEY: Final = b"embedshard"
_COLUMNS: Final = ["id", "count", "row"]
_MAPPED_ROWS: Final = 2**18
"""From so many ids on they are laid out for all processes of the machine; fewer are in each one's memory."""
_READ_BYTES: Final = 2**23


@dataclass(frozen=True)
class Counted:
    """What was counted for a vocabulary.

    Attributes:
        lookups: how many ids were met, each as often as it was; those without a row too.
        distinct: how many different ones.
        features: what was counted: the config's features over the table, as the config has them.
        data: the fingerprint of the training set.
        is_exact: whether every training row counted: none could be set aside.
        known: how many of the lookups are of ids that have a row.
    """

    lookups: int
    distinct: int
    features: Mapping[str, Any]
    data: str
    is_exact: bool
    known: int = 0


def counted_metadata(counted: Counted) -> dict[bytes, bytes]:
    """Returns what the file of a counted vocabulary has in its footer."""
    return {_KEY: json.dumps(dataclasses.asdict(counted), sort_keys=True).encode()}


class IdFile:
    """A `Vocabulary` of the ids, integers or strings, that a file names in row order.

    Args:
        where: the file, for messages.
        ids: which.
        counted: what was counted, if it was.
        location: of the file.
    """

    def __init__(self, where: str, ids: MappedIds, counted: Counted | None, location: Location) -> None:
        self.rows, self.counted = len(ids), counted
        self.fingerprint = f"file of {self.rows}, sha256 {ids.fingerprint}"
        self._where, self._ids, self._location = where, ids, location

    def map_integers(self, ids: IntArray | WordArray) -> IntArray:
        """Returns each id's row, -1 for an unknown one."""
        if not isinstance(self._ids, IntegerIds):
            raise DataError(
                f"the column holds integers, but the vocabulary {self._where} holds strings. Both must be of one kind: "
                f"write the vocabulary as integers, or the column as strings."
            )
        return self._ids.rows_of(ids)

    def map_strings(self, ids: pa.Array) -> IntArray:
        """Returns each string's row, -1 for an unknown one."""
        if isinstance(self._ids, IntegerIds):
            raise DataError(
                f"the column holds strings, but the vocabulary {self._where} holds integers. Both must be of one kind: "
                f"write the vocabulary as strings, or the column as integers."
            )
        return self._ids.rows_of(ids)

    def ids_of(self, rows: IntArray) -> list[int | str | None]:
        """Returns the id of each row; None for the one for unknown ids."""
        return self._ids.ids_of(rows)

    def describe(self) -> str:
        """Returns what is known, for messages."""
        return f"the {self.rows} ids of {self._where}"

    def counts(self) -> IntArray | None:
        """Returns how often each row's id was met, and last how often all ids without a row were, (rows + 1,).

        None where they were not counted, or where the file is gone since: it was made for this process alone, say.
        """
        with reaching(self._location):
            if self.counted is None or not self._location.exists():
                return None
        with self._location.open_input() as file:
            of_rows = pq.read_table(file, columns=["count"])["count"].to_numpy()
        return np.append(of_rows, self.counted.lookups - self.counted.known).astype(np.int64)


def read_footer(location: Location) -> tuple[int, Counted | None]:
    """Returns how many ids a vocabulary's file has, and what was counted for it; None where it was not counted.

    Raises:
        StorageError: if it cannot be read.
    """
    with reaching(location), location.open_input() as file:
        parquet = pq.ParquetFile(file)
        return parquet.metadata.num_rows, _counted(parquet)


def load_id_file(table: str, location: Location, path: str, column: str | None) -> IdFile:
    """Reads a vocabulary's file.

    Args:
        table: its name.
        location: of the file.
        path: the same as the config has it.
        column: of the ids; None for the only one, or that of a file that was counted.

    Raises:
        DataError: if it is not what it must be.
        ConfigError: if it has no such column.
        StorageError: if it is large and cannot be laid out.
    """
    where = f"tables.{table}.vocabulary: {path}"
    try:
        with location.open_input() as file:
            parquet = pq.ParquetFile(file)
            counted = _counted(parquet)
            name = _column(where, parquet, column)
            kind = parquet.schema_arrow.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_integer(kind) or is_string(kind)):
                raise DataError(f"{where}: column '{name}' is {kind}; ids are integers or strings.")
            num_rows = parquet.metadata.num_rows

            def laid_out(folder: Path | None) -> MappedIds:
                found = lay_out(_batches(where, parquet, name), kind, num_rows, folder)
                _check_unique(where, name, found)
                return found

            if num_rows < _MAPPED_ROWS:
                ids = laid_out(None)
            else:
                ids = mapped(f"{_digest(location)[:32]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}", laid_out)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(where, error) from error
    return IdFile(path, ids, counted, location)


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where} cannot be read: {error}. It must be a Parquet file of ids in row order, as "
        f"'embedshard vocabulary build' writes one."
    )


def _column(where: str, parquet: pq.ParquetFile, column: str | None) -> str:
    names = parquet.schema_arrow.names
    if column is None:
        if len(names) != 1 and names != _COLUMNS:
            raise ConfigError(f"{where} has the columns {', '.join(names)}. Name that of the ids: vocabulary.column.")
        column = names[0]
    if column not in names:
        raise ConfigError(f"{where} has no column '{column}', only {', '.join(names)}.")
    return column


def _counted(parquet: pq.ParquetFile) -> Counted | None:
    text = (parquet.metadata.metadata or {}).get(_KEY)
    if text is None or parquet.schema_arrow.names != _COLUMNS:
        return None
    try:
        return Counted(**json.loads(text))
    except (TypeError, ValueError):
        return None


def _batches(where: str, parquet: pq.ParquetFile, column: str) -> Iterator[pa.Array]:
    done, batches = 0, parquet.iter_batches(columns=[column], use_threads=False)
    while True:
        try:  # here, so that it is not taken for a failure to write what is made of it
            batch = next(batches, None)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(where, error) from error
        if batch is None:
            return
        ids = batch.column(0)
        if ids.null_count:
            row = done + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{where}: row {row} of column '{column}' is null; each row must name an id. Remove it.")
        done += len(ids)
        yield ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids


def _check_unique(where: str, column: str, ids: MappedIds) -> None:
    repeated = ids.repeated()
    if repeated is not None:
        former, row, count = repeated
        (id_,) = ids.ids_of(np.array([row]))
        raise DataError(
            f"{where}: rows {former} and {row} of column '{column}' are both {id_!r} "
            f"({count} rows repeat an earlier id). Each id has one row: remove the others."
        )


def _digest(location: Location) -> str:
    """Returns the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with location.open_input() as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
