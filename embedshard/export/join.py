"""Joins tables and a program: looks rows of ids up in the tables' files, pools them, and makes what the program takes.

It knows the manifest's signature and nothing of the model.

Shapes: B rows, V ids of a feature in all rows, L places of the longest row, n looked-up rows, D dim.
"""

from __future__ import annotations

__all__ = ["Vectors", "as_in_the_data", "join", "table_vectors"]

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config.composition import Composition
from embedshard.data.columns import Columns, Flat, Ragged, num_rows
from embedshard.errors import ExportError
from embedshard.export.quantised import Format, decoded
from embedshard.export.read import vectors_of
from embedshard.export.signature import ProgramInput
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Vectors = Callable[[str, IntArray], FloatArray]
"""Returns the vectors, (n, D), of rows, (n,), of a table."""


def table_vectors(places: Mapping[str, Location], kind: Format | None = None) -> Vectors:
    """Returns what reads rows out of tables' files, of row groups alone in which there is one.

    Args:
        places: the file of each table.
        kind: of the numbers in them; None is float32.
    """

    def vectors(table: str, rows: IntArray) -> FloatArray:
        once, inverse = np.unique(rows, return_inverse=True)
        found, is_there = vectors_of(places[table], once, decoded(kind))
        if not is_there.all():
            raise ExportError(
                f"{places[table].uri} has no row {int(once[~is_there][0])}: no id holds it now. Look up the row of an id "
                f"that has one."
            )
        return found[inverse]

    return vectors


def as_in_the_data(inputs: Sequence[ProgramInput], columns: Columns) -> Columns:
    """Returns columns with the numbers of dense features as the data have them, of those that a reader has normalised."""
    found = dict(columns)
    for spec in inputs:
        if spec.kind != "dense":
            continue
        numbers = columns[spec.feature].values.astype(np.float64)
        if spec.config["normalise"] == "log1p":
            numbers = np.sign(numbers) * np.expm1(np.abs(numbers))
        elif spec.mean is not None and spec.deviation is not None:
            numbers = numbers * spec.deviation + spec.mean
        found[spec.feature] = Flat(numbers)
    return found


def join(inputs: Sequence[ProgramInput], columns: Columns, vectors: Vectors) -> dict[str, torch.Tensor]:
    """Returns what a program takes, by keyword.

    Args:
        inputs: of the program.
        columns: by feature, as many rows of each: of ids, the rows of their table, -1 where there is none (of those that
            look up two rows, the number that these are made of); of weighted lists with the weights by which the sum is
            made; of dense features numbers as they are in the data, NaN where missing.
        vectors: looks rows up.

    Raises:
        ExportError: if a table lacks a row.
    """
    size = num_rows(columns)
    made: dict[str, torch.Tensor] = {}
    for spec in inputs:
        column = columns[spec.feature]
        if spec.kind == "dense":
            made[spec.name] = torch.from_numpy(column.values.astype(np.float64))
            continue
        ids_V, lengths_B, weights_V = _listed(column)
        if spec.kind == "lengths":
            made[spec.name] = torch.from_numpy(lengths_B)
        elif spec.kind == "sequence":
            made[spec.name] = _padded(spec, ids_V, lengths_B, vectors)
        else:
            made[spec.name] = _pooled(spec, ids_V, lengths_B, _weights(spec, lengths_B, weights_V), size, vectors)
    return made


def _listed(column: Flat | Ragged) -> tuple[IntArray, IntArray, npt.NDArray[np.float32] | None]:
    """Returns the ids of all rows, how many each has, and their weights, if there are any."""
    if isinstance(column, Flat):
        is_there = column.values >= 0
        return column.values[is_there], is_there.astype(np.int64), None
    span = slice(int(column.offsets[0]), int(column.offsets[-1]))
    return column.values[span], np.diff(column.offsets), None if column.weights is None else column.weights[span]


def _weights(
    spec: ProgramInput, lengths_B: IntArray, given_V: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32] | None:
    if given_V is not None:
        return given_V
    power = {"mean": 1.0, "sqrtn": 0.5}.get(str(spec.pooling))
    if power is None:
        return None
    return np.repeat((1.0 / np.maximum(lengths_B, 1) ** power).astype(np.float32), lengths_B)


def _pooled(
    spec: ProgramInput,
    ids_V: IntArray,
    lengths_B: IntArray,
    weights_V: npt.NDArray[np.float32] | None,
    size: int,
    vectors: Vectors,
) -> torch.Tensor:
    assert spec.table is not None, "what is pooled is looked up"
    assert spec.dim is not None, "what is pooled is looked up"
    of_row = np.repeat(np.arange(size, dtype=np.int64), lengths_B)
    if spec.pair is not None:
        ids_V, counts = Composition(**spec.pair).rows_of(ids_V)
        of_row = np.repeat(of_row, counts)
        weights_V = None if weights_V is None else np.repeat(weights_V, counts)
    sums_BD = torch.zeros(size, spec.dim)
    if len(ids_V):
        found_VD = torch.from_numpy(vectors(spec.table, ids_V))
        if weights_V is not None:
            found_VD = found_VD * torch.from_numpy(weights_V).unsqueeze(1)
        sums_BD.index_add_(0, torch.from_numpy(of_row), found_VD)
    return sums_BD


def _padded(spec: ProgramInput, ids_V: IntArray, lengths_B: IntArray, vectors: Vectors) -> torch.Tensor:
    assert spec.table is not None, "a sequence is looked up"
    assert spec.dim is not None, "a sequence is looked up"
    longest = max(1, int(lengths_B.max(initial=0)))
    places = spec.shape[1] if isinstance(spec.shape[1], int) else longest
    padded_BLD = np.zeros((len(lengths_B), places, spec.dim), dtype=np.float32)
    if len(ids_V):
        padded_BLD[np.arange(places) < lengths_B[:, None]] = vectors(spec.table, ids_V)
    return torch.from_numpy(padded_BLD)
