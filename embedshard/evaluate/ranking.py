"""The metrics' names, and the arithmetic of those that look at positions in a ranked list.

A query has a set of relevant items and a ranked list. The *position* of a relevant item is its 1-based place in that
list, or `UNRANKED`. Positions of all queries lie one after another in a flat array, cut by offsets: query i owns
`positions[offsets[i]:offsets[i + 1]]`. The positions of one query differ from each other, except `UNRANKED`.

This module must not know vectors, scores, tensors or processes: who counts the positions is `retrieval.py`.

Shapes: Q queries, R relevant items of all queries.
"""

from __future__ import annotations

__all__ = [
    "UNRANKED",
    "FloatArray",
    "IntArray",
    "higher_is_better",
    "largest_k",
    "metric_values",
]

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.config import LOSS, Metric, parse_metric
from embedshard.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNRANKED: Final = int(np.iinfo(np.int64).max)
"""The position of an item that is too far down to earn anything."""

_LOWER_IS_BETTER: Final = frozenset({LOSS, "rmse", "mae", "log_loss", "normalised_entropy"})


def higher_is_better(metric: str) -> bool:
    """Returns whether a greater value of the metric, such as 'recall@20', 'rmse' or 'auc:click', means a better model.

    Raises:
        ConfigError: there is no such metric, or neither is better.
    """
    name = parse_metric(metric.partition(":")[0]).name
    if name == "calibration":
        raise ConfigError("metric 'calibration' is best at 1: neither more nor less of it is better.")
    return name not in _LOWER_IS_BETTER


def largest_k(metrics: Iterable[Metric]) -> int:
    """Returns the length of the list that all the metrics need: the greatest k, and 1 where none has a k."""
    return max((metric.k for metric in metrics if metric.k is not None), default=1)


def metric_values(metric: Metric, positions_R: IntArray, offsets: IntArray) -> FloatArray:
    """Returns the metric's value for every query.

    With n relevant items of which h have a position of at most k:

    - recall@k is h / n, and precision@k is h / k (also where fewer than k items can be listed).
    - hit_rate@k is 1 if h > 0, else 0.
    - ndcg@k has gain 1 for each relevant item, discount 1 / log2(position + 1), and as its ideal the first min(n, k)
      positions (Järvelin and Kekäläinen 2002).
    - map@k sums, over the h hits, the share of relevant items in the list down to the hit, and divides by min(n, k).
    - mrr is 1 / the best position, and 0 if that is `UNRANKED`.

    Args:
        metric: a ranking metric other than coverage, which belongs to all queries together.
        positions_R: (R,) 1-based positions of the relevant items, exact up to k, and anything above k beyond it.
        offsets: (Q + 1,) where each query's positions begin, from 0 to R.

    Returns:
        (Q,) values in [0, 1]; nan for queries without relevant items, which are not to be averaged.
    """
    num_queries = len(offsets) - 1
    num_relevant_Q = np.diff(offsets)
    query_R = np.repeat(np.arange(num_queries), num_relevant_Q)

    def per_query(values_R: FloatArray) -> FloatArray:
        return np.bincount(query_R, weights=values_R, minlength=num_queries).astype(np.float64, copy=False)

    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of a query without relevant items
        if metric.name == "mrr":
            best_Q = np.full(num_queries, UNRANKED, dtype=np.int64)
            np.minimum.at(best_Q, query_R, positions_R)
            values_Q = np.where(best_Q == UNRANKED, 0.0, 1.0 / best_Q)
            return np.where(num_relevant_Q > 0, values_Q, np.nan)

        assert metric.k is not None
        assert metric.name != "coverage"
        hit_R = positions_R <= metric.k
        hits_Q = per_query(hit_R.astype(np.float64))
        most_hits_Q = np.minimum(num_relevant_Q, metric.k)
        if metric.name == "recall":
            return hits_Q / num_relevant_Q
        if metric.name == "precision":
            return np.where(num_relevant_Q > 0, hits_Q / metric.k, np.nan)
        if metric.name == "hit_rate":
            return np.where(num_relevant_Q > 0, (hits_Q > 0).astype(np.float64), np.nan)
        reached_R = np.where(hit_R, positions_R, 1)
        if metric.name == "ndcg":
            gain_Q = per_query(np.where(hit_R, 1.0 / np.log2(reached_R + 1.0), 0.0))
            longest = int(most_hits_Q.max(initial=0))
            ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(longest) + 2.0))])
            per_ideal_Q: FloatArray = gain_Q / ideal[most_hits_Q]
            return per_ideal_Q
        assert metric.name == "map"
        order_R = np.lexsort((positions_R, query_R))  # keeps each query's span, ascending within it
        nth_R = np.arange(len(positions_R)) - offsets[query_R] + 1.0
        precision_R = np.where(hit_R[order_R], nth_R / reached_R[order_R], 0.0)
        return per_query(precision_R) / most_hits_Q
