"""Counts the ids of a table over the training set, in bounded memory, and puts them into the order of rows.

DuckDB counts and sorts, and spills to a scratch folder what its memory does not hold (docs/log.md says what else was
tried). What this module adds is the stream of ids into it: as they are looked up, so that zeros that are padding and what
is cut off a list are not counted, and neither are rows that are set aside or held out.
"""

from __future__ import annotations

__all__ = ["Share", "count_share", "merge_shares"]

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.config.parts import AutoVocabulary
from embedshard.data.inventory import fingerprint_of
from embedshard.data.source import Source
from embedshard.data.vocabulary_file import Counted, counted_metadata
from embedshard.errors import DataError, StorageError

_BATCH_ROWS: Final = 65_536
_ROW_GROUP_ROWS: Final = 2**20
_ENGINE_SHARE: Final = 0.5
"""Of the memory; the rest is for the process itself, for what is read, and for what DuckDB does not count as its own."""
_LEAST_BYTES: Final = 128 * 2**20


@dataclass(frozen=True)
class Share:
    """What one process has counted.

    Attributes:
        path: a local Parquet file of (id, count), in no order.
        lookups: how many ids were met, each as often as it was.
    """

    path: Path
    lookups: int


def count_share(
    sources: Sequence[Source],
    table: str,
    rank: int,
    world_size: int,
    memory_bytes: int,
    scratch: Path,
    told: Callable[[int, int], None],
) -> Share:
    """Counts the ids of one rank's share of the row groups.

    Args:
        sources: the training set, with a decoder that takes any id of the table.
        table: its name.
        rank: of this process.
        world_size: how many share the work.
        memory_bytes: that this process may take.
        scratch: a local folder to spill to and to leave the counts in.
        told: hears how many of the share's rows are done, and of how many.

    Raises:
        DataError: if a file cannot be read, or the features' columns are not all of one kind.
        StorageError: if the scratch folder is full.
    """
    groups = [(source, number) for source in sources for number in range(len(source.inventory.row_groups))]
    mine = groups[rank::world_size]
    total = sum(source.inventory.row_groups[number].num_rows for source, number in mine)
    schema = pa.schema([("id", _id_type(sources, table))])
    lookups, failures = 0, []

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal lookups
        done = 0
        told(0, total)
        try:
            for source, number in mine:
                for ids, num_rows in _ids(source, number, table, schema.field("id").type):
                    lookups += len(ids)
                    done += num_rows
                    yield pa.record_batch([ids], schema=schema)
                    told(done, total)
        except Exception as error:  # Arrow hands on its text alone
            failures.append(error)
            raise

    path = scratch / f"{table}-{rank}.counts.parquet"
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    with _Engine(memory_bytes, scratch) as engine:
        engine.register("ids", reader)
        try:
            engine.run(f"COPY (SELECT id, count(*) AS count FROM ids GROUP BY id) TO '{_quoted(path)}' (FORMAT parquet)")
        except (duckdb.Error, StorageError):
            if failures:
                raise failures[0] from None
            raise
    return Share(path, lookups)


def merge_shares(
    shares: Sequence[Share],
    vocabulary: AutoVocabulary,
    sources: Sequence[Source],
    table: str,
    features: Mapping[str, Any],
    memory_bytes: int,
    scratch: Path,
) -> Path:
    """Writes the vocabulary: a local Parquet file of (id, count, row), the most frequent first.

    Of equally frequent ids the smaller integer, or the string whose UTF-8 bytes are smaller, comes first. The file is a
    function of the data and the config alone.

    Args:
        shares: of all processes.
        vocabulary: which ids have a row.
        sources: the training set.
        table: its name.
        features: over the table, as the config has them.
        memory_bytes: that this process may take.
        scratch: a local folder to spill to and to leave the file in.

    Raises:
        DataError: if no id is met so often.
        StorageError: if the scratch folder is full.
    """
    path = scratch / f"{table}.parquet"
    with _Engine(memory_bytes, scratch) as engine:
        merged = shares[0].path
        if len(shares) > 1:
            merged = scratch / f"{table}.merged.parquet"
            parts = ", ".join(f"'{_quoted(share.path)}'" for share in shares)
            engine.run(
                f"COPY (SELECT id, sum(count)::BIGINT AS count FROM read_parquet([{parts}]) GROUP BY id) "
                f"TO '{_quoted(merged)}' (FORMAT parquet)"
            )
        counted = Counted(
            lookups=sum(share.lookups for share in shares),
            distinct=pq.read_metadata(merged).num_rows,
            features=features,
            data=fingerprint_of([source.inventory for source in sources]),
            is_exact=not any(source.decoder.quarantines for source in sources),
        )
        most = "" if vocabulary.max_size is None else f" LIMIT {vocabulary.max_size}"
        ordered = engine.stream(
            f"SELECT id, count FROM read_parquet('{_quoted(merged)}') WHERE count >= {vocabulary.min_count} "
            f"ORDER BY count DESC, id{most}"
        )
        rows = _write(ordered, path, _id_type(sources, table), counted)
    if not rows:
        columns = list(dict.fromkeys(spec.column for spec in sources[0].decoder.specs if spec.table == table))
        raise DataError(
            f"tables.{table}.vocabulary: no id is met {vocabulary.min_count} times in column "
            f"{' and '.join(map(repr, columns))} of the training set, so there is no vocabulary to make. Look at the data, "
            f"or give a lower min_count."
        )
    return path


# ------------------------------------------------------------------------------------------------------------ reading
def _ids(source: Source, number: int, table: str, kind: pa.DataType) -> Iterator[tuple[pa.Array, int]]:
    """Yields a row group's ids, a few thousand rows' and one column's at once, and of how many more rows that is all."""
    specs = [spec for spec in source.decoder.specs if spec.table == table]
    for batch, where in source.iter_tables(number, _BATCH_ROWS):
        rows = batch
        if source.decoder.quarantines:
            bad = source.decoder.decode(batch, where)["bad"].values
            rows = batch.filter(pa.array(np.equal(bad, 0)))
        for place, spec in enumerate(specs):
            ids = source.decoder.looked_up(spec, rows, where)
            try:
                ids = ids.cast(kind)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{where.row(0)} or one after it: column '{spec.column}': {error}. The columns of table '{table}' are "
                    f"counted together as {kind}: write all of them as int64, or all as uint64."
                ) from error
            yield ids, batch.num_rows if place == len(specs) - 1 else 0


def _id_type(sources: Sequence[Source], table: str) -> pa.DataType:
    """Returns the one type that all ids of a table are counted as: strings, int64, or uint64 where none has a sign."""
    columns = {spec.column for spec in sources[0].decoder.specs if spec.table == table}
    found = {column: [kind for source in sources for kind in source.id_types(column)] for column in sorted(columns)}
    kinds = [(column, kind) for column, of_column in found.items() for kind in of_column]
    for column, kind in kinds:
        first, first_kind = kinds[0]
        if pa.types.is_integer(kind) != pa.types.is_integer(first_kind):
            raise DataError(
                f"tables.{table}.vocabulary: column '{first}' holds {first_kind}, column '{column}' {kind}. A vocabulary is "
                f"of integers or of strings: write all columns over the table as one of the two."
            )
    if kinds and not pa.types.is_integer(kinds[0][1]):
        return pa.large_string()
    is_unsigned = bool(kinds) and all(pa.types.is_unsigned_integer(kind) for _, kind in kinds)
    return pa.uint64() if is_unsigned and any(pa.types.is_uint64(kind) for _, kind in kinds) else pa.int64()


# ------------------------------------------------------------------------------------------------------------ writing
def _write(ordered: pa.RecordBatchReader, path: Path, kind: pa.DataType, counted: Counted) -> int:
    """Writes (id, count, row); returns how many rows. Row groups are of one size, however DuckDB hands its rows over."""
    kind = pa.string() if pa.types.is_large_string(kind) else kind
    schema = pa.schema([("id", kind), ("count", pa.int64()), ("row", pa.int64())])
    waiting: list[pa.RecordBatch] = []
    num_waiting = first = known = 0

    def flush(writer: pq.ParquetWriter, size: int) -> None:
        nonlocal waiting, num_waiting, first, known
        table = pa.Table.from_batches(waiting)
        group = table.slice(0, size)
        numbers = pa.array(np.arange(first, first + size, dtype=np.int64))
        columns = [group["id"].cast(kind), group["count"].cast(pa.int64()), numbers]
        known += pc.sum(columns[1]).as_py()
        writer.write_table(pa.table(columns, schema=schema), row_group_size=size)
        waiting, num_waiting, first = table.slice(size).to_batches(), num_waiting - size, first + size

    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in ordered:
                waiting.append(batch)
                num_waiting += batch.num_rows
                while num_waiting >= _ROW_GROUP_ROWS:
                    flush(writer, _ROW_GROUP_ROWS)
            if num_waiting:
                flush(writer, num_waiting)
            writer.add_key_value_metadata(counted_metadata(dataclasses.replace(counted, known=known)))
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        raise _spilt(path.parent, error) from error
    return first


class _Engine:
    """A DuckDB of its own, with bounded memory and a folder to spill to; a context manager."""

    def __init__(self, memory_bytes: int, scratch: Path) -> None:
        self._spill, self._scratch = scratch / "spill", scratch
        limit = max(int(memory_bytes * _ENGINE_SHARE), _LEAST_BYTES)
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{limit}B",
                "threads": 1,  # each thread has buffers of its own, and workers share the cores
                "temp_directory": str(self._spill),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
            },
        )

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    def register(self, name: str, reader: pa.RecordBatchReader) -> None:
        """Makes a stream a table that can be read once."""
        self._connection.register(name, reader)

    def run(self, statement: str) -> None:
        """Runs a statement."""
        try:
            self._connection.execute(statement)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            raise _spilt(self._scratch, error) from error

    def stream(self, query: str) -> pa.RecordBatchReader:
        """Returns the rows of a query as they are made."""
        try:
            return self._connection.sql(query).to_arrow_reader(_BATCH_ROWS)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            raise _spilt(self._scratch, error) from error


def _spilt(scratch: Path, error: Exception) -> StorageError:
    free = shutil.disk_usage(scratch).free if scratch.exists() else 0
    return StorageError(
        f"{scratch}: ids cannot be counted there: {' '.join(str(error).split())} ({free / 2**30:.1f} GiB are free). "
        f"Counting spills about as much to the folder of temporary files as the ids take: set TMPDIR to one with more "
        f"space, or give more memory."
    )


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
