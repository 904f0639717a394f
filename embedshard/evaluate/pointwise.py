"""Metrics that compare each row's prediction with its label: errors, log loss, AUC, calibration, accuracy and F1.

Sums are kept in float64 over batches, AUCs keep their rows, and parts of several workers add up to the same result. Rows
of weight 0 (padding, quarantined rows) do not exist here: they are neither counted nor checked.

This module must not know models, files or processes.

Shapes: B rows of a batch.
"""

from __future__ import annotations

__all__ = ["Link", "PointwiseSums", "entropy"]

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import POINTWISE_METRICS
from embedshard.errors import ConfigError, DataError, TrainingError, nearest
from embedshard.evaluate.classes import Confusion
from embedshard.evaluate.discrimination import average_precision, grouped_auc, weighted_auc
from embedshard.evaluate.ranking import FloatArray, IntArray

_KEEP_ROWS: Final = {"auc", "pr_auc", "gauc"}

Link = Literal["identity", "sigmoid"]
"""`identity` where logits are predictions (ratings), `sigmoid` where they are log odds."""

ArrayLike = torch.Tensor | npt.NDArray[np.generic]


class PointwiseSums:
    """Sums from which pointwise metrics follow; batches and other workers' sums are added in any order.

    rmse and mae compare the label with link(logit). log_loss takes logits as they are, so a logit of 1000 costs 1000
    and not infinity. normalised_entropy is log_loss over that of the mean label, predicted for every row (He et al. 2014):
    below 1 is better than knowing nothing of a row. calibration is the sum of the predictions over that of the labels.
    accuracy and f1 take log odds above 0 as the class 1. auc, pr_auc and gauc need only the logits' order, and keep
    every counted row (a logit, a weight and a byte, for gauc a group). All are weighted.

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
        self._squares = self._absolutes = self._log_losses = self._labels = self._predictions = 0.0
        self._confusion = Confusion(2)
        self._kept: list[tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_], FloatArray, IntArray]] = []

    def update(
        self,
        logits_B: ArrayLike,
        labels_B: ArrayLike,
        weights_B: ArrayLike | None = None,
        groups_B: ArrayLike | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            logits_B: (B,) floats, what the model said before the link function.
            labels_B: (B,) numbers; in [0, 1] for log_loss, normalised_entropy and calibration, 0 or 1 for auc, pr_auc, gauc,
                accuracy and f1.
            weights_B: (B,) at least 0; None weighs every row 1.
            groups_B: (B,) the user of each row, for gauc; -1 where there is none.

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
        groups = np.full(len(labels), -1, dtype=np.int64)
        if groups_B is not None:
            groups = np.asarray(torch.as_tensor(groups_B).cpu().numpy(), dtype=np.int64)[counts]

        self.num_rows += len(labels)
        self.total_weight += float(weights.sum())
        wide = logits.astype(np.float64)
        if "rmse" in self.metrics or "mae" in self.metrics:
            error = (wide if self.link == "identity" else _sigmoid(wide)) - labels
            self._squares += float(np.dot(weights, error * error))
            self._absolutes += float(np.dot(weights, np.abs(error)))
        self._labels += float(np.dot(weights, labels))
        if "calibration" in self.metrics:
            self._predictions += float(np.dot(weights, wide if self.link == "identity" else _sigmoid(wide)))
        if "log_loss" in self.metrics or "normalised_entropy" in self.metrics:
            # -y log(sigmoid(x)) - (1 - y) log(1 - sigmoid(x)), with the exponent never above 0. A share of 0 is left
            # out, as its product with an infinite logit would be nan.
            wrong_share = np.where(wide < 0, labels, 1.0 - labels)
            linear = np.multiply(np.abs(wide), wrong_share, out=np.zeros_like(wide), where=wrong_share != 0)
            self._log_losses += float(np.dot(weights, linear + np.log1p(np.exp(-np.abs(wide)))))
        if "accuracy" in self.metrics or "f1" in self.metrics:
            self._confusion.update(wide > 0, labels == 1, weights)
        if _KEEP_ROWS & set(self.metrics):
            self._kept.append((logits, labels == 1, weights, groups))

    def add(self, other: PointwiseSums) -> None:
        """Adds another worker's sums to these."""
        assert (self.metrics, self.link) == (other.metrics, other.link)
        self.num_rows += other.num_rows
        self.total_weight += other.total_weight
        self._squares += other._squares
        self._absolutes += other._absolutes
        self._log_losses += other._log_losses
        self._labels += other._labels
        self._predictions += other._predictions
        self._confusion.add(other._confusion)
        self._kept.extend(other._kept)

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name; `rows`, how many rows it is from; with gauc `gauc_groups`, over how many.

        A value is nan where it has no meaning: all of them without any row; auc, gauc and normalised_entropy where all rows
        have the same label, since they compare a positive with a negative; pr_auc and calibration without a positive row.
        """
        values: dict[str, float] = {}
        counts = {"rows": self.num_rows}
        for name in self.metrics:
            if self.num_rows == 0:
                values[name] = float("nan")
            elif name == "gauc":
                values[name], counts["gauc_groups"] = grouped_auc(*self._rows())
            elif name not in ("accuracy", "f1"):
                values[name] = self._value(name)
        return values | self._confusion.values(self.metrics) | counts

    def _value(self, name: str) -> float:
        if name in ("auc", "pr_auc"):
            scores, is_positive, weights, _ = self._rows()
            return (weighted_auc if name == "auc" else average_precision)(scores, is_positive, weights)
        if name == "rmse":
            return float(np.sqrt(self._squares / self.total_weight))
        if name == "mae":
            return self._absolutes / self.total_weight
        log_loss = self._log_losses / self.total_weight
        if name == "normalised_entropy":
            nothing = entropy(self._labels / self.total_weight)
            return log_loss / nothing if nothing > 0 else float("nan")
        if name == "calibration":
            return self._predictions / self._labels if self._labels > 0 else float("nan")
        assert name == "log_loss", name
        return log_loss

    def _rows(self) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_], FloatArray, IntArray]:
        scores, is_positive, weights, groups = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        return scores, is_positive, weights, groups

    def _check(self, logits: npt.NDArray[np.floating], labels: FloatArray) -> None:
        if np.isnan(logits).any():
            raise TrainingError(
                f"{int(np.isnan(logits).sum())} of {len(logits)} predictions are nan, so the model has diverged. Lower "
                "the learning rate, or go back to an earlier checkpoint."
            )
        good, need, metric = np.isfinite(labels), "finite", "every pointwise metric"
        exact = [name for name in ("auc", "pr_auc", "gauc", "accuracy", "f1") if name in self.metrics]
        shares = [name for name in ("log_loss", "normalised_entropy", "calibration") if name in self.metrics]
        if exact:
            good, need, metric = (labels == 0) | (labels == 1), "0 or 1", exact[0]
        elif shares:
            good, need, metric = (labels >= 0) & (labels <= 1), "in [0, 1]", shares[0]
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


def entropy(share: float) -> float:
    """Returns the log loss of predicting a share of positive rows for each row: 0 where all are of one class."""
    return -sum(part * float(np.log(part)) for part in (share, 1.0 - share) if part > 0)
