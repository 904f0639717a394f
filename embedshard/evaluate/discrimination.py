"""How well scores part positive rows from negative ones: AUC, PR-AUC, and AUC within groups; exact, by sorting.

What libraries have was looked at and is not used. torchrec.metrics: its AUC walks through tied scores in whatever order they
were sorted, gives 0.5 where one class is missing, and its grouped AUC counts such groups, each group alike. torchmetrics
1.0: no weights. scikit-learn's agree, and are what the tests compare with.

Shapes: B rows.
"""

from __future__ import annotations

__all__ = ["average_precision", "grouped_auc", "grouped_aucs", "weighted_auc"]

import numpy as np
import numpy.typing as npt

from embedshard.evaluate.ranking import FloatArray, IntArray

ScoreArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]


def weighted_auc(scores_B: ScoreArray, is_positive_B: BoolArray, weights_B: FloatArray) -> float:
    """Returns the probability that a positive row scores above a negative one, a tie counting half.

    Exact, by sorting (Mann and Whitney 1947); rows are drawn by their weights.

    Args:
        scores_B: (B,) logits or scores: only their order matters.
        is_positive_B: (B,) labels.
        weights_B: (B,) at least 0.

    Returns:
        A value in [0, 1]; nan where there is no pair to compare, because all rows with weight are of one class.
    """
    positive, negative = _by_level(scores_B, is_positive_B, weights_B)
    pairs = float(positive.sum()) * float(negative.sum())
    if pairs == 0.0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float(np.dot(positive, below + 0.5 * negative)) / pairs


def average_precision(scores_B: ScoreArray, is_positive_B: BoolArray, weights_B: FloatArray) -> float:
    """Returns the area under the curve of precision over recall, as the mean precision at each positive row.

    Rows of equal scores are above the threshold together. Without interpolation, which would be too kind (Davis and
    Goadrich 2006).

    Returns:
        A value in [0, 1]; nan without a positive row.
    """
    positive, negative = (part[::-1] for part in _by_level(scores_B, is_positive_B, weights_B))
    total = float(positive.sum())
    if total == 0.0:
        return float("nan")
    hits = np.cumsum(positive)
    met = hits + np.cumsum(negative)
    precision = np.divide(hits, met, out=np.zeros_like(hits), where=met > 0)
    return float(np.dot(positive, precision)) / total


def grouped_auc(
    scores_B: ScoreArray, is_positive_B: BoolArray, weights_B: FloatArray, groups_B: IntArray
) -> tuple[float, int]:
    """Returns the mean of the groups' AUCs, each counted by the weight of its rows, and how many groups there are.

    Groups with rows of one class alone have no AUC and are left out (Zhu et al. 2017; Zhou et al. 2018), and so are rows of
    the group -1.

    Returns:
        A value in [0, 1], nan where no group has both classes; and how many have.
    """
    aucs, sizes = grouped_aucs(scores_B, is_positive_B, weights_B, groups_B)
    return (float(np.dot(aucs, sizes) / sizes.sum()) if len(aucs) else float("nan")), len(aucs)


def grouped_aucs(
    scores_B: ScoreArray, is_positive_B: BoolArray, weights_B: FloatArray, groups_B: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Returns the AUC of each group that has rows of both classes, in the groups' order, and the weight of its rows."""
    counts = groups_B >= 0
    scores, is_positive, weights, groups = scores_B[counts], is_positive_B[counts], weights_B[counts], groups_B[counts]
    order = np.lexsort((scores, groups))
    scores, groups = scores[order], groups[order]
    positive = np.where(is_positive[order], weights[order], 0.0)
    negative = weights[order] - positive
    if not len(groups):
        return np.zeros(0), np.zeros(0)
    begins_group = np.append(True, groups[1:] != groups[:-1])
    begins_level = begins_group | np.append(True, scores[1:] != scores[:-1])
    levels = np.flatnonzero(begins_level)
    group_of_level = np.cumsum(begins_group)[levels] - 1
    positive, negative = np.add.reduceat(positive, levels), np.add.reduceat(negative, levels)
    of_group = np.bincount(group_of_level, weights=positive), np.bincount(group_of_level, weights=negative)
    before_group = np.cumsum(of_group[1]) - of_group[1]
    below = np.cumsum(negative) - negative - before_group[group_of_level]
    won = np.bincount(group_of_level, weights=positive * (below + 0.5 * negative))
    pairs = of_group[0] * of_group[1]
    known = pairs > 0
    sizes = (of_group[0] + of_group[1])[known].astype(np.float64, copy=False)
    return won[known] / pairs[known], sizes


def _by_level(scores_B: ScoreArray, is_positive_B: BoolArray, weights_B: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Returns the weight of the positive and of the negative rows of each distinct score, in ascending order."""
    values, level_B = np.unique(scores_B, return_inverse=True)
    positive = np.bincount(level_B, weights=np.where(is_positive_B, weights_B, 0.0), minlength=len(values))
    negative = np.bincount(level_B, weights=np.where(is_positive_B, 0.0, weights_B), minlength=len(values))
    return positive.astype(np.float64, copy=False), negative.astype(np.float64, copy=False)
