"""What changed between two files of any kind: the bytes that differ, where both have some; and the later file again.

It is small where a file keeps its layout and some of its content changes, as a flat index does, or the weights of a
network. Both files are read forward, a part at a time.
"""

from __future__ import annotations

__all__ = ["rebuild_bytes", "write_byte_changes"]

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.columns import offsets_of
from embedshard.errors import ExportError
from embedshard.storage import Location

Bytes = npt.NDArray[np.uint8]

_PART: Final = 2**22
_GRAIN: Final = 32
"""Differences are told in so many bytes: to tell where one is takes about as many as some that are the same."""
_SCHEMA: Final = pa.schema({"offset": pa.int64(), "bytes": pa.large_binary()})


def write_byte_changes(base: Location, target: Location, place: Location) -> int:
    """Writes the bytes of a file that are not those of another at the same place; returns how many they are.

    Args:
        base: the earlier file.
        target: the later one.
        place: is written: Parquet of `offset` and `bytes`.
    """
    total = 0
    place.parent.make_dirs()
    with (
        base.open_input() as old,
        target.open_input() as new,
        place.filesystem.open_output_stream(place.path) as stream,
        pq.ParquetWriter(stream, _SCHEMA, use_dictionary=False, column_encoding={"offset": "DELTA_BINARY_PACKED"}) as writer,
    ):
        for offset, after in _parts(new):
            before = np.frombuffer(old.read(_PART), dtype=np.uint8)
            begins, ends = _differences(before, after)
            if len(begins):
                lengths = ends - begins
                bounds = offsets_of(lengths)
                inside = np.repeat(begins - bounds[:-1], lengths) + np.arange(bounds[-1])
                buffers = [None, pa.py_buffer(bounds), pa.py_buffer(np.ascontiguousarray(after[inside]))]
                content = pa.Array.from_buffers(pa.large_binary(), len(begins), buffers)
                writer.write_table(pa.Table.from_arrays([pa.array(begins + offset), content], schema=_SCHEMA))
                total += int(bounds[-1])
    return total


def rebuild_bytes(base: Location, changes: Location, size: int, sink: Any) -> None:
    """Writes the later file.

    Args:
        base: the earlier file.
        changes: of `write_byte_changes`.
        size: of the later file, in bytes.
        sink: a file that is open to write.

    Raises:
        ExportError: if they do not fit each other.
    """
    with base.open_input() as old, changes.open_input() as file:
        spans = _spans(file)
        span = next(spans, None)
        for offset in range(0, size, _PART):
            part = np.zeros(min(_PART, size - offset), dtype=np.uint8)
            before = np.frombuffer(old.read(len(part)), dtype=np.uint8)
            part[: len(before)] = before
            while span is not None and span[0] < offset + len(part):
                begin = span[0] - offset
                if begin < 0 or begin + len(span[1]) > len(part):
                    break
                part[begin : begin + len(span[1])] = span[1]
                span = next(spans, None)
            sink.write(part.tobytes())
        if span is not None:
            raise ExportError(f"{changes.uri} is of another file than {base.uri}. Write the delta again.")


def _differences(before: Bytes, after: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns where spans of bytes that differ begin and end, in whole grains; all beyond the earlier file's end does."""
    num_both = min(len(before), len(after))
    is_other = np.ones(-(-len(after) // _GRAIN), dtype=np.bool_)
    whole = num_both // _GRAIN
    both = [side[: whole * _GRAIN].reshape(whole, _GRAIN) for side in (before, after)]
    is_other[:whole] = (both[0] != both[1]).any(axis=1)
    if len(before) == len(after) and whole < len(is_other):
        is_other[whole] = bool((before[whole * _GRAIN :] != after[whole * _GRAIN :]).any())
    steps = np.diff(is_other.astype(np.int8), prepend=0, append=0)
    begins, ends = np.flatnonzero(steps == 1) * _GRAIN, np.flatnonzero(steps == -1) * _GRAIN
    return begins, np.minimum(ends, len(after))


def _parts(file: pa.NativeFile) -> Iterator[tuple[int, Bytes]]:
    offset = 0
    while part := file.read(_PART):
        yield offset, np.frombuffer(part, dtype=np.uint8)
        offset += len(part)


def _spans(file: pa.NativeFile) -> Iterator[tuple[int, Bytes]]:
    parquet = pq.ParquetFile(file)
    for group in range(parquet.num_row_groups):
        content = parquet.read_row_group(group)
        for offset, span in zip(content["offset"].to_pylist(), content["bytes"], strict=True):
            yield offset, np.frombuffer(span.as_buffer(), dtype=np.uint8)
