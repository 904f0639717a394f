"""From Parquet to batches: raw pyarrow, and the run's own reader over the same rows."""

from __future__ import annotations

__all__ = ["reading_measures"]

from collections.abc import Iterator
from typing import Any, Final

import pyarrow.parquet as pq

from embedshard.bench.measure import Limit, Measure, Timer
from embedshard.data.source import Source
from embedshard.stages import READING, Laps
from embedshard.storage import locate
from embedshard.train.assembly import Assembly

_ROWS: Final = 2**18
"""Rows of a pass at least, where the data are streamed, in whole windows; data that fit the cache are read whole."""


def reading_measures(parts: Assembly, timer: Timer) -> Iterator[Measure]:
    """Measures raw decoding of a config's columns, and its reader, this rank's part of the first partition's first epoch."""
    dataset, order = parts.dataset, parts.dataset.order
    source, global_batch_size = dataset.train[0], order.global_batch_size
    epoch_steps = order.partition_steps[0]
    steps, window = epoch_steps, order.window_steps[0] or epoch_steps
    if not dataset.cached[0]:
        steps = min(epoch_steps, window * -(-_ROWS // (window * global_batch_size)))
    rows = min(steps * global_batch_size, order.num_rows[0])
    groups = _first_groups(source, rows)
    raw_rows = sum(source.inventory.row_groups[group].num_file_rows for group in groups)
    laps: list[Laps] = []
    read_before = source.byte_count.total

    def read_batches() -> None:
        reader = parts.reader()
        with reader.batches(0, steps) as batches:
            for _ in batches:
                pass
        laps.append(reader.laps)

    own, raw = timer.in_turns([(read_batches, None), (lambda: _decode(source, groups), None)])
    peak = timer.peak_bytes
    columns = source.decoder.columns
    yield Measure(
        "Parquet decode",
        f"{raw_rows:,} rows, {len(columns)} columns, by pyarrow, one thread",
        "rows",
        raw_rows,
        raw,
        note=f"{_compressed_bytes(source, groups) / raw_rows:.0f} bytes a row as compressed; files are in the page cache",
    )
    total = {name: sum(one.seconds[name] for one in laps) for name in READING}
    busy = sum(total.values()) or 1.0
    asked = (source.byte_count.total - read_before) / len(laps) / rows
    split = ", ".join(f"{name} {seconds / busy:.0%}" for name, seconds in total.items())
    kept = "decoded whole, then kept" if dataset.cached[0] else f"streamed, {order.lanes} lanes"
    yield Measure(
        "decode, order, collate",
        f"{rows:,} rows to KeyedJaggedTensors, {steps:,} batches of {global_batch_size:,}, {kept}",
        "rows",
        rows,
        own,
        Limit("Parquet decode", raw_rows, raw),
        peak,
        note=f"the reader's thread: {split}; it asks files for {asked:.0f} bytes a row",
    )


def _first_groups(source: Source, rows: int) -> list[int]:
    found, seen = [], 0
    for number, group in enumerate(source.inventory.row_groups):
        if seen >= rows:
            break
        found.append(number)
        seen += group.num_file_rows
    return found


def _decode(source: Source, groups: list[int]) -> None:
    """Reads row groups as a program without embedshard would, with one thread, as a reader has."""
    files: dict[int, Any] = {}
    for number in groups:
        group = source.inventory.row_groups[number]
        if group.file not in files:
            files[group.file] = pq.ParquetFile(locate(source.uri_of(group)).open_input())
        files[group.file].read_row_group(group.index, columns=source.decoder.columns, use_threads=False)
    for file in files.values():
        file.close()


def _compressed_bytes(source: Source, groups: list[int]) -> int:
    """Returns the bytes of row groups' chunks of a source's columns."""
    total = 0
    for number in groups:
        group = source.inventory.row_groups[number]
        with locate(source.uri_of(group)).open_input() as file:
            metadata = pq.ParquetFile(file).metadata
        chunks = metadata.row_group(group.index)
        total += sum(
            chunks.column(place).total_compressed_size
            for place in range(metadata.num_columns)
            if metadata.schema.column(place).path.split(".")[0] in source.decoder.columns
        )
    return total
