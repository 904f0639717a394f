"""Vectors in fewer bits, and back: halves, and bytes with a scale and an offset a row as FBGEMM makes them.

Shapes: B rows of a block, N rows of a file, D dim.
"""

from __future__ import annotations

__all__ = ["QUANTISED", "Format", "decoded", "dequantised", "quantised_formats", "write_quantised"]

from collections.abc import Callable, Iterator
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedshard.errors import ConfigError, nearest
from embedshard.export.read import matrix
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
Format = Literal["fp16", "int8"]

QUANTISED: Final[tuple[Format, ...]] = ("fp16", "int8")


def quantised_formats(asked: str) -> tuple[Format, ...]:
    """Returns in which formats tables are written too: those that are asked for, with commas between them; none of `none`.

    Raises:
        ConfigError: if there is no such format, or `none` is not alone.
    """
    names = [name.strip() for name in asked.split(",")]
    if names == ["none"]:
        return ()
    for name in names:
        if name == "none":
            raise ConfigError(f"--quantise {asked}: 'none' was given with others. Leave it out, or the others.")
        if name not in QUANTISED:
            raise ConfigError(f"--quantise {name}: there is no such format. {nearest(name, ['none', *QUANTISED])}")
    return tuple(kind for kind in QUANTISED if kind in names)


def write_quantised(kind: Format, items: Location, place: Location) -> None:
    """Writes the vectors of a file in fewer bits, a row group at a time.

    `fp16` has the columns `id`, `row` and `vector`, a list of float16. Of `int8` the list is of bytes, and beside it are
    `scale` and `bias`, float32: a number of the vector is byte * scale + bias.

    Args:
        kind: of the numbers.
        items: the file of float32 vectors.
        place: the file that is written.
    """
    with (
        items.open_input() as file,
        place.filesystem.open_output_stream(place.path) as stream,
    ):
        parquet = pq.ParquetFile(file)
        writer: pq.ParquetWriter | None = None
        for group in range(parquet.num_row_groups):
            content = parquet.read_row_group(group)
            quantised = _quantised(kind, content)
            writer = writer or pq.ParquetWriter(stream, quantised.schema)
            writer.write_table(quantised)
        if writer is not None:
            writer.close()


def dequantised(kind: Format, place: Location) -> FloatArray:
    """Returns the vectors that a file of `write_quantised` gives back, (N, D)."""
    return np.concatenate(list(_blocks(kind, place)))


def decoded(kind: Format | None) -> Callable[[pa.Table], FloatArray]:
    """Returns what gives back the vectors, (B, D), of a part of a file; None is one of float32."""

    def of_content(content: pa.Table) -> FloatArray:
        numbers = matrix(content["vector"]).astype(np.float32, copy=False)
        if kind == "int8":
            numbers = numbers * content["scale"].to_numpy()[:, None] + content["bias"].to_numpy()[:, None]
        return numbers

    return of_content


def _blocks(kind: Format, place: Location) -> Iterator[FloatArray]:
    with place.open_input() as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            yield decoded(kind)(parquet.read_row_group(group))


def _quantised(kind: Format, content: pa.Table) -> pa.Table:
    vectors = matrix(content["vector"])
    if kind == "fp16":
        return _replaced(content, vectors.astype(np.float16))
    fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(torch.from_numpy(np.ascontiguousarray(vectors))).numpy()
    dim = vectors.shape[1]
    scale_and_bias = np.ascontiguousarray(fused[:, dim:]).view(np.float32)  # (B, 2), behind the bytes of each row
    result = _replaced(content, np.ascontiguousarray(fused[:, :dim]))
    for place, name in enumerate(("scale", "bias")):
        result = result.append_column(name, pa.array(scale_and_bias[:, place]))
    return result


def _replaced(content: pa.Table, vectors: npt.NDArray[np.float16] | npt.NDArray[np.uint8]) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return content.set_column(content.schema.get_field_index("vector"), "vector", column)
