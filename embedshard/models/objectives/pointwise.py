"""Losses of a row by itself, on its label."""

from __future__ import annotations

__all__ = ["Pointwise"]

from typing import Any, Literal

import torch
import torch.nn.functional as F

from embedshard.data.batch import Batch
from embedshard.models.objectives.objective import Objective


class Pointwise(Objective):
    """Squared error (`mse`) or binary cross entropy (`bce`) between a row's logit and its label. Not collective."""

    def __init__(self, kind: Literal["mse", "bce"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, output: Any, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        labels = batch.labels[:, 0]
        if self.kind == "mse":
            return F.mse_loss(output.logits, labels, reduction="none")
        return F.binary_cross_entropy_with_logits(output.logits, labels, reduction="none")
