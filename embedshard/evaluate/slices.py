"""Slices of the catalogue by popularity: how good a model is at what everybody knows, and at the rest."""

from __future__ import annotations

__all__ = ["ItemSlices", "sliced_sums"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from embedshard.config import Metric
from embedshard.data.columns import offsets_of
from embedshard.evaluate.ranking import IntArray
from embedshard.evaluate.ranking_sums import RankingSums

_UPPER_SHARES: Final = {"head": 0.5, "torso": 0.8, "tail": 1.0}


@dataclass(frozen=True)
class ItemSlices:
    """Which items are in the head, the torso and the tail.

    The head is the fewest most popular items that make up half of the training interactions; with the torso they are 80 %
    of them; the tail is the rest, and items that the catalogue does not hold. Of equally popular items the
    catalogue's first is taken first; items without an interaction are in the tail.

    Attributes:
        of_item: (N,) the number of each item's slice, in the order of `names`.
    """

    of_item: IntArray
    names = tuple(_UPPER_SHARES)

    @classmethod
    def by_popularity(cls, counts_N: IntArray) -> ItemSlices:
        """Returns the slices of items that are met so often in training."""
        order = np.argsort(-counts_N, kind="stable")
        total = max(int(counts_N.sum()), 1)
        before = (np.cumsum(counts_N[order]) - counts_N[order]) / total
        of_item = np.empty(len(counts_N), dtype=np.int64)
        of_item[order] = np.searchsorted(list(_UPPER_SHARES.values())[:-1], before, side="right")
        of_item[counts_N == 0] = len(_UPPER_SHARES) - 1
        return cls(of_item)

    def of(self, items: IntArray) -> IntArray:
        """Returns the number of each item's slice; items from N on are not in the catalogue."""
        inside = np.minimum(items, len(self.of_item) - 1)
        return np.where(items < len(self.of_item), self.of_item[inside], len(self.names) - 1)

    def values(self, sums: RankingSums) -> dict[str, dict[str, float]]:
        """Returns each slice's metrics, the queries that they are averaged over, and its items in the catalogue."""
        items = np.bincount(self.of_item, minlength=len(self.names)).tolist()
        values = {}
        for name, num_items in zip(self.names, items, strict=True):
            result = sums.slices[name].result()
            metrics = {str(metric): result[str(metric)] for metric in sums.slices[name].metrics}
            values[name] = {**metrics, "queries": result["queries"], "items": num_items}
        return values


def sliced_sums(
    metrics: Sequence[Metric], positions_R: IntArray, query_R: IntArray, num_queries: int, slice_R: IntArray
) -> dict[str, RankingSums]:
    """Returns, for each slice, the sums of metrics in which only its items are relevant.

    Positions are those in the whole list, so a slice is not ranked by itself; queries without a relevant item of the slice
    are not averaged. Coverage, which knows no relevant items, is left out.

    Args:
        metrics: ranking metrics.
        positions_R: (R,) as in `metric_values`.
        query_R: (R,) ascending query of each.
        num_queries: Q.
        slice_R: (R,) number of each relevant item's slice.
    """
    relevant_metrics = [metric for metric in metrics if metric.name != "coverage"]
    sums = {}
    for number, name in enumerate(ItemSlices.names):
        is_in = slice_R == number
        offsets = offsets_of(np.bincount(query_R[is_in], minlength=num_queries))
        sums[name] = RankingSums.from_positions(relevant_metrics, positions_R[is_in], offsets, {})
    return sums
