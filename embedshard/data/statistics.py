"""What is counted over the training set before training: means and deviations, and how often ids occur."""

from __future__ import annotations

__all__ = ["Statistics", "compute_statistics", "count_ids"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedshard.data.columns import Flat, good_rows
from embedshard.errors import DataError

if TYPE_CHECKING:
    from embedshard.data.source import Source


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each standardised feature; a deviation of 0 is kept as 1."""

    moments: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns what a run keeps."""
        return {name: {"mean": mean, "deviation": deviation} for name, (mean, deviation) in self.moments.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Statistics:
        """Returns what a run has kept."""
        return cls({name: (moments["mean"], moments["deviation"]) for name, moments in values.items()})


def compute_statistics(sources: Sequence[Source]) -> Statistics:
    """Reads the standardised features of all sources once, in file order.

    Merges row groups' moments by Chan, Golub and LeVeque (1979), so that large means do not swallow small deviations.
    A missing value, where the feature allows it, and rows that are set aside are left out.

    Raises:
        DataError: if a feature has no value at all.
    """
    names = [name for name in sources[0].decoder.standardised] if sources else []
    if not names:
        return Statistics()
    counts, means, squares = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for source in sources:
        narrowed = source.narrowed(names)
        for group in range(len(narrowed.inventory.row_groups)):
            columns = good_rows(narrowed.read_row_group(group))
            for name in names:
                values = columns[name].values
                values = values[~np.isnan(values)].astype(np.float64)
                if not len(values):
                    continue
                count, mean = len(values), float(values.mean())
                delta, total = mean - means[name], counts[name] + count
                squares[name] += float(np.square(values - mean).sum()) + delta**2 * counts[name] * count / total
                means[name] += delta * count / total
                counts[name] = total
    empty = [name for name in names if not counts[name]]
    if empty:
        raise DataError(
            f"feature '{empty[0]}' is to be standardised, but the training set has no value for it. "
            f"Use 'normalise: none', or leave the feature out."
        )
    return Statistics({name: (means[name], math.sqrt(squares[name] / counts[name]) or 1.0) for name in names})


def count_ids(source: Source, feature: str, rows: int) -> npt.NDArray[np.int64]:
    """Returns how often each row of a feature's table is met, (rows + 1,) int64; the last is for unknown ids.

    Of a list, each place counts. A row without an id, or one that is set aside, is not counted.
    """
    counts = np.zeros(rows + 1, dtype=np.int64)
    narrowed = source.narrowed([feature])
    for group in range(len(narrowed.inventory.row_groups)):
        column = narrowed.read_row_group(group)[feature]
        ids = column.values if isinstance(column, Flat) else column.values[column.offsets[0] : column.offsets[-1]]
        ids = ids[ids >= 0]
        if len(ids) * 16 < rows:  # a row group meets few of a large table's rows
            met, times = np.unique(ids, return_counts=True)
            counts[met] += times
        else:
            counts += np.bincount(ids, minlength=rows + 1)
    return counts
