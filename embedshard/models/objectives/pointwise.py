"""Losses of a row by itself, on its label."""

from __future__ import annotations

__all__ = ["CrossEntropy", "Pointwise", "checked_classes"]

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from embedshard.config.parts import CrossEntropyConfig
from embedshard.data.batch import Batch
from embedshard.errors import DataError
from embedshard.models.objectives.objective import Objective


class Pointwise(Objective):
    """Squared error (`mse`) or binary cross entropy (`bce`) between a row's logit and its label. Not collective.

    Args:
        kind: which.
        label_weights: what each of several labels' losses counts in the row's; empty where there is one label.
    """

    def __init__(self, kind: Literal["mse", "bce"], label_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.kind = kind
        self._label_weights = list(label_weights)

    def forward(self, output: Any, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses, each row's the weighted sum of its labels'."""
        if not self._label_weights:
            return self._losses(output.logits, batch.labels[:, 0])
        return self._losses(output.logits_BL, batch.labels) @ batch.labels.new_tensor(self._label_weights)

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.kind == "mse":
            return F.mse_loss(logits, labels, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


class CrossEntropy(Objective):
    """Cross entropy of a row's label among several classes. Not collective."""

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__()
        self._classes, self._smoothing = config.classes, config.label_smoothing

    def forward(self, output: Any, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses.

        Raises:
            DataError: if a label is none of the classes.
        """
        labels = torch.where(batch.weights > 0, batch.labels[:, 0], 0.0)
        return F.cross_entropy(
            output.logits_BC, checked_classes(labels, self._classes), reduction="none", label_smoothing=self._smoothing
        )


def checked_classes(labels_B: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Returns labels as int64 classes.

    Raises:
        DataError: if one is no whole number from 0 to `num_classes` - 1.
    """
    classes = labels_B.long()
    fits = (classes == labels_B) & (classes >= 0) & (classes < num_classes)
    if not bool(fits.all()):
        bad = float(labels_B[~fits][0])
        raise DataError(
            f"a row's label is {bad:g}; objective.classes={num_classes} needs whole numbers from 0 to {num_classes - 1}. "
            f"Correct the label column, or objective.classes."
        )
    return classes
