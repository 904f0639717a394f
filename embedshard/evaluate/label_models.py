"""Models in closed form that predict a label from who met what: the mean, and the user's and the item's distance from it.

Shapes: n training rows, B rows to predict.
"""

from __future__ import annotations

__all__ = ["BiasModel", "bias_bytes", "fit_biases", "mean_logit"]

from dataclasses import dataclass
from typing import Final

import numpy as np

from embedshard.data.survey import Interactions
from embedshard.errors import TrainingError
from embedshard.evaluate.pointwise import Link
from embedshard.evaluate.ranking import FloatArray, IntArray

_SWEEPS: Final = 10


def mean_logit(label_sum: float, weight: float, link: Link) -> float:
    """Returns the logit that predicts the mean label.

    As log odds, by the rule of succession (one row more of either label), so that they are finite.

    Raises:
        TrainingError: if there is no mean, or it has no log odds.
    """
    mean = label_sum / weight if weight else float("nan")
    if np.isnan(mean) or (link == "sigmoid" and not 0 <= mean <= 1):
        raise TrainingError(f"the training set's mean label is {mean:g}; it needs one that can be predicted.")
    if link == "identity":
        return mean
    return float(np.log((label_sum + 1.0) / (weight - label_sum + 1.0)))


@dataclass(frozen=True)
class BiasModel:
    """Predicts a row's logit as a sum.

    Attributes:
        mean: of all rows.
        users: what each row of the user's table adds.
        items: what each row of the item's table adds.
    """

    mean: float
    users: FloatArray
    items: FloatArray

    def predict(self, users_B: IntArray, items_B: IntArray) -> FloatArray:
        """Returns the (B,) logits."""
        return self.mean + self.users[users_B] + self.items[items_B]


def bias_bytes(num_users: int, num_items: int, num_interactions: int) -> int:
    """Returns about how much memory `fit_biases` takes."""
    return 32 * (num_users + num_items) + 96 * num_interactions


def fit_biases(rows: Interactions, num_users: int, num_items: int, damping: float, link: Link) -> BiasModel:
    """Fits what each user and each item adds to the mean label.

    Ratings: the least squares that are penalised by `damping` times each squared bias (Koren 2010), by turns of users and
    items. Log odds: those of the user's and of the item's labels, each averaged with `damping` rows of the mean, as if the
    two told of the label independently.

    Args:
        rows: the training rows with labels and weights; labels in [0, 1] for log odds.
        num_users: rows of the user's table.
        num_items: rows of the item's table.
        damping: above 0.
        link: how a logit becomes a prediction.

    Raises:
        TrainingError: if a label or the mean of all cannot be predicted.
    """
    weights, labels = rows.weights.astype(np.float64), rows.labels.astype(np.float64)
    mean = mean_logit(float(np.dot(weights, labels)), float(weights.sum()), link)
    sides = ((rows.users, num_users), (rows.items, num_items))
    if link == "sigmoid":
        bad = labels[(labels < 0) | (labels > 1)]
        if len(bad):
            raise TrainingError(f"the training set has a label of {bad[0]:g}; it needs labels in [0, 1].")
        rate = 1.0 / (1.0 + np.exp(-mean))
        offsets = []
        for ids, count in sides:
            positive = np.bincount(ids, weights * labels, count) + damping * rate
            negative = np.bincount(ids, weights * (1.0 - labels), count) + damping * (1.0 - rate)
            offsets.append(np.log(positive / negative) - mean)
        return BiasModel(mean, *offsets)
    totals = [np.bincount(ids, weights, count) + damping for ids, count in sides]
    biases = [np.zeros(count) for _, count in sides]
    for _ in range(_SWEEPS):
        for side, other in ((1, 0), (0, 1)):
            ids, count = sides[side]
            rest = labels - mean - biases[other][sides[other][0]]
            biases[side] = np.bincount(ids, weights * rest, count) / totals[side]
    return BiasModel(mean, *biases)
