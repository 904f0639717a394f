"""Metrics that compare each row's prediction with its label: rmse, mae, log loss, AUC, accuracy and F1.

Sums are kept in float64 over batches, AUC keeps its rows, and parts of several workers add up to the same result. Rows
of weight 0 (padding, quarantined rows) do not exist here: they are neither counted nor checked.

This module must not know models, files or processes.

Shapes: B rows of a batch.
"""

from __future__ import annotations

__all__ = ["Link", "PointwiseSums", "weighted_auc"]

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import POINTWISE_METRICS
from embedshard.errors import ConfigError, DataError, TrainingError, nearest
from embedshard.evaluate.classes import Confusion
from embedshard.evaluate.ranking import FloatArray

Link = Literal["identity", "sigmoid"]
"""`identity` where logits are predictions (ratings), `sigmoid` where they are log odds."""

ArrayLike = torch.Tensor | npt.NDArray[np.generic]


def weighted_auc(scores_B: npt.NDArray[np.floating], is_positive_B: npt.NDArray[np.bool_], weights_B: FloatArray) -> float:
    """Returns the probability that a positive row scores above a negative one, a tie counting half.

    Exact, by sorting (Mann and Whitney 1947); rows are drawn by their weights.

    Args:
        scores_B: (B,) logits or scores: only their order matters.
        is_positive_B: (B,) labels.
        weights_B: (B,) at least 0.

    Returns:
        A value in [0, 1]; nan where there is no pair to compare, because all rows with weight are of one class.
    """
    values, level_B = np.unique(scores_B, return_inverse=True)
    positive = np.bincount(level_B, weights=np.where(is_positive_B, weights_B, 0.0), minlength=len(values))
    negative = np.bincount(level_B, weights=np.where(is_positive_B, 0.0, weights_B), minlength=len(values))
    pairs = float(positive.sum()) * float(negative.sum())
    if pairs == 0.0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float(np.dot(positive, below + 0.5 * negative)) / pairs


class PointwiseSums:
    """Sums from which pointwise metrics follow; batches and other workers' sums are added in any order.

    rmse and mae compare the label with link(logit). log_loss takes logits as they are, so a logit of 1000 costs 1000
    and not infinity. accuracy and f1 take log odds above 0 as the class 1. auc needs only the logits' order, and keeps
    every counted row (a logit, a weight and a byte). All are weighted.

    Attributes:
        metrics: the names, in the order of the result.
        link: how a logit becomes a prediction.
        num_rows: rows of a weight above 0 so far.
        total_weight: the sum of their weights.
    """

    def __init__(self, metrics: Sequence[str], link: Link = "identity") -> None:
        for name in metrics:
            if name not in POINTWISE_METRICS:
                raise ConfigError(f"there is no pointwise metric '{name}'. {nearest(name, POINTWISE_METRICS)}")
        assert link in ("identity", "sigmoid")
        self.metrics = tuple(metrics)
        self.link = link
        self.num_rows = 0
        self.total_weight = 0.0
        self._squares = 0.0
        self._absolutes = 0.0
        self._log_losses = 0.0
        self._confusion = Confusion(2)
        self._kept: list[tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_], FloatArray]] = []

    def update(self, logits_B: ArrayLike, labels_B: ArrayLike, weights_B: ArrayLike | None = None) -> None:
        """Adds a batch.

        Args:
            logits_B: (B,) floats, what the model said before the link function.
            labels_B: (B,) numbers; in [0, 1] for log_loss, 0 or 1 for auc, accuracy and f1.
            weights_B: (B,) at least 0; None weighs every row 1.

        Raises:
            DataError: a label that counts is not finite or outside of what a metric needs, or a weight is negative or
                not finite.
            TrainingError: a logit that counts is nan.
        """
        logits, labels = _flat(logits_B), _flat(labels_B).astype(np.float64)
        weights = np.ones(len(labels)) if weights_B is None else _flat(weights_B).astype(np.float64)
        assert logits.shape == labels.shape == weights.shape
        if not (np.isfinite(weights) & (weights >= 0)).all():
            bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
            raise DataError(f"a row's weight is {bad}; weights are finite and at least 0. Correct the weight column.")
        counts = weights > 0
        logits, labels, weights = logits[counts], labels[counts], weights[counts]
        self._check(logits, labels)

        self.num_rows += len(labels)
        self.total_weight += float(weights.sum())
        wide = logits.astype(np.float64)
        if "rmse" in self.metrics or "mae" in self.metrics:
            error = (wide if self.link == "identity" else _sigmoid(wide)) - labels
            self._squares += float(np.dot(weights, error * error))
            self._absolutes += float(np.dot(weights, np.abs(error)))
        if "log_loss" in self.metrics:
            # -y log(sigmoid(x)) - (1 - y) log(1 - sigmoid(x)), with the exponent never above 0. A share of 0 is left
            # out, as its product with an infinite logit would be nan.
            wrong_share = np.where(wide < 0, labels, 1.0 - labels)
            linear = np.multiply(np.abs(wide), wrong_share, out=np.zeros_like(wide), where=wrong_share != 0)
            self._log_losses += float(np.dot(weights, linear + np.log1p(np.exp(-np.abs(wide)))))
        if "accuracy" in self.metrics or "f1" in self.metrics:
            self._confusion.update(wide > 0, labels == 1, weights)
        if "auc" in self.metrics:
            self._kept.append((logits, labels == 1, weights))

    def add(self, other: PointwiseSums) -> None:
        """Adds another worker's sums to these."""
        assert (self.metrics, self.link) == (other.metrics, other.link)
        self.num_rows += other.num_rows
        self.total_weight += other.total_weight
        self._squares += other._squares
        self._absolutes += other._absolutes
        self._log_losses += other._log_losses
        self._confusion.add(other._confusion)
        self._kept.extend(other._kept)

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name, and `rows`, how many rows it is from.

        A value is nan where it has no meaning: all of them without any row, and auc where all rows have the same label,
        since it compares a positive with a negative.
        """
        values: dict[str, float] = {}
        for name in self.metrics:
            if self.num_rows == 0:
                values[name] = float("nan")
            elif name == "rmse":
                values[name] = float(np.sqrt(self._squares / self.total_weight))
            elif name == "mae":
                values[name] = self._absolutes / self.total_weight
            elif name == "log_loss":
                values[name] = self._log_losses / self.total_weight
            elif name == "auc":
                scores, is_positive, weights = (np.concatenate(part) for part in zip(*self._kept, strict=True))
                values[name] = weighted_auc(scores, is_positive, weights)
        return values | self._confusion.values(self.metrics) | {"rows": self.num_rows}

    def _check(self, logits: npt.NDArray[np.floating], labels: FloatArray) -> None:
        if np.isnan(logits).any():
            raise TrainingError(
                f"{int(np.isnan(logits).sum())} of {len(logits)} predictions are nan, so the model has diverged. Lower "
                "the learning rate, or go back to an earlier checkpoint."
            )
        good, need, metric = np.isfinite(labels), "finite", "every pointwise metric"
        exact = [name for name in ("auc", "accuracy", "f1") if name in self.metrics]
        if exact:
            good, need, metric = (labels == 0) | (labels == 1), "0 or 1", exact[0]
        elif "log_loss" in self.metrics:
            good, need, metric = (labels >= 0) & (labels <= 1), "in [0, 1]", "log_loss"
        if not good.all():
            bad = labels[~good][0]
            raise DataError(
                f"a row's label is {bad:g}; {metric} needs labels that are {need}. Correct the label column, or choose "
                "other metrics."
            )


def _flat(values: ArrayLike) -> npt.NDArray[np.floating]:
    """Returns a one-dimensional numpy array in float32 or float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        values = values.numpy()
    assert values.ndim == 1
    return values.astype(np.float32 if values.dtype == np.float32 else np.float64)


def _sigmoid(logits: FloatArray) -> FloatArray:
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)
