"""Metrics of several classes: accuracy and F1 of the one that is predicted, log loss, and AUC of each against the rest.

Sums are kept in float64 over batches, AUC keeps its rows, and parts of several workers add up to the same result. Rows of
weight 0 do not exist here.

Shapes: B rows of a batch, C classes.
"""

from __future__ import annotations

__all__ = ["CLASS_METRICS", "ClassSums", "Confusion"]

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from embedshard.errors import TrainingError
from embedshard.evaluate.discrimination import weighted_auc
from embedshard.evaluate.ranking import FloatArray
from embedshard.models.objectives.pointwise import checked_classes

CLASS_METRICS: Final = ("accuracy", "f1", "log_loss", "auc")
"""The metrics of a choice among several classes."""

Array = npt.NDArray[np.generic]


class Confusion:
    """The weight of the rows of each true class for which each class was predicted.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.weights = np.zeros((num_classes, num_classes))
        """(C, C): true class by predicted class."""

    def update(self, predicted_B: Array, true_B: Array, weights_B: FloatArray) -> None:
        """Adds rows; classes are integers from 0 to C - 1."""
        np.add.at(self.weights, (true_B.astype(np.int64), predicted_B.astype(np.int64)), weights_B)

    def add(self, other: Confusion) -> None:
        """Adds another worker's."""
        self.weights += other.weights

    def accuracy(self) -> float:
        """Returns the share of the weight that is predicted right; nan without any."""
        total = float(self.weights.sum())
        return float(np.trace(self.weights)) / total if total else float("nan")

    def f1(self) -> FloatArray:
        """Returns each class' F1, (C,): 2 hits / (true + predicted); nan for a class that is neither."""
        met = self.weights.sum(axis=0) + self.weights.sum(axis=1)
        return np.divide(2 * np.diag(self.weights), met, out=np.full(len(met), np.nan), where=met > 0)

    def values(self, metrics: Sequence[str]) -> dict[str, float]:
        """Returns `accuracy` and `f1` as far as they are asked for: F1 of each class as `f1:<class>`, their mean as `f1`."""
        found = {"accuracy": self.accuracy()} if "accuracy" in metrics else {}
        if "f1" in metrics:
            each = self.f1()
            known = each[~np.isnan(each)]
            found["f1"] = float(known.mean()) if len(known) else float("nan")
            found |= {f"f1:{number}": float(value) for number, value in enumerate(each)}
        return found


class ClassSums:
    """Sums from which the metrics of several classes follow; batches and other workers' sums are added in any order.

    Of two classes `auc` is the second one's. Of more it is the mean of each class's against all others, by its probability,
    each class counting alike (scikit-learn's and torchmetrics' `macro`, one versus rest); a class that all rows have, or
    none, has no AUC and counts in no mean. All rows are kept for it.

    Args:
        metrics: names among `CLASS_METRICS`.
        num_classes: C, at least 2.
    """

    def __init__(self, metrics: Sequence[str], num_classes: int) -> None:
        assert set(metrics) <= set(CLASS_METRICS), f"{metrics} are not all of {CLASS_METRICS}"
        self.metrics, self.num_classes = tuple(metrics), num_classes
        self.num_rows = 0
        self.total_weight = self._log_losses = 0.0
        self._confusion = Confusion(num_classes)
        self._kept: list[tuple[FloatArray, Array, FloatArray]] = []

    def update(
        self,
        logits_BC: torch.Tensor,
        labels_B: torch.Tensor,
        weights_B: torch.Tensor,
        groups_B: torch.Tensor | None = None,
        /,
    ) -> None:
        """Adds a batch.

        Args:
            logits_BC: before the softmax.
            labels_B: whole numbers from 0 to C - 1, (B,) or (B, 1).
            weights_B: at least 0; rows of weight 0 are not looked at.
            groups_B: not looked at; no metric of classes is within groups.

        Raises:
            DataError: if a label is none of the classes.
            TrainingError: if a logit is nan.
        """
        counts = weights_B > 0
        logits, labels = logits_BC[counts].double(), labels_B.reshape(-1)[counts]
        weights = weights_B[counts].double().cpu().numpy()
        if bool(torch.isnan(logits).any()):
            raise TrainingError(
                "predictions are nan, so the model has diverged. Lower the learning rate, or go back to an earlier "
                "checkpoint."
            )
        classes = checked_classes(labels, self.num_classes)
        self.num_rows += len(classes)
        self.total_weight += float(weights.sum())
        log_shares = torch.log_softmax(logits, dim=1)
        losses = -log_shares.gather(1, classes.unsqueeze(1)).squeeze(1).cpu().numpy()
        self._log_losses += float(np.dot(weights, losses))
        self._confusion.update(logits.argmax(dim=1).cpu().numpy(), classes.cpu().numpy(), weights)
        if "auc" in self.metrics:
            # Of two classes the log odds: they tell apart what both probabilities are rounded to 1 in.
            scores = (logits[:, 1:] - logits[:, :1]) if self.num_classes == 2 else log_shares
            self._kept.append((scores.cpu().numpy(), classes.cpu().numpy(), weights))

    def add(self, other: ClassSums) -> None:
        """Adds another worker's sums to these."""
        assert (self.metrics, self.num_classes) == (other.metrics, other.num_classes)
        self.num_rows += other.num_rows
        self.total_weight += other.total_weight
        self._log_losses += other._log_losses
        self._confusion.add(other._confusion)
        self._kept.extend(other._kept)

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name, and `rows`, how many rows it is from.

        F1 of each class is `f1:<class>`; so is AUC of each, `auc:<class>`, where there are more than two.
        """
        values = self._confusion.values(self.metrics)
        if "log_loss" in self.metrics:
            values["log_loss"] = self._log_losses / self.total_weight if self.total_weight else float("nan")
        if "auc" in self.metrics:
            values |= self._aucs()
        return values | {"rows": self.num_rows}

    def _aucs(self) -> dict[str, float]:
        if not self._kept:
            return {"auc": float("nan")}
        scores, classes, weights = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        if self.num_classes == 2:
            return {"auc": weighted_auc(scores[:, 0], classes == 1, weights)}
        each = np.array([weighted_auc(scores[:, of], classes == of, weights) for of in range(self.num_classes)])
        known = each[~np.isnan(each)]
        mean = float(known.mean()) if len(known) else float("nan")
        return {"auc": mean} | {f"auc:{number}": float(value) for number, value in enumerate(each)}
