"""What models hand to objectives."""

from __future__ import annotations

__all__ = ["ClassOutput", "Output", "RetrievalOutput"]

from dataclasses import dataclass, field
from typing import Protocol

import torch


class Output(Protocol):
    """What every objective can ask of a model's output.

    Attributes:
        lookups: pooled vectors by key, (B, D) each; empty where the model does not hand them on.
    """

    lookups: dict[str, torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        """One number a row, before any link function, (B,)."""
        ...


@dataclass
class ClassOutput:
    """Logits of classes.

    Attributes:
        logits_BC: one for each class; one alone, the log odds of the label 1, where there are two.
        lookups: looked-up vectors by key, for penalties.
    """

    logits_BC: torch.Tensor
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """The log odds of the label 1, (B,)."""
        assert self.logits_BC.shape[1] == 1, "several classes have no one logit"
        return self.logits_BC[:, 0]


@dataclass
class RetrievalOutput:
    """Vectors whose dot product is the score of a query and a candidate; biases are columns of both.

    Attributes:
        query_BD: one a row.
        candidate_BD: the row's own item.
        negative_ND: this rank's share of the drawn candidates, if there are any.
        lookups: pooled vectors by key, for penalties.
    """

    query_BD: torch.Tensor
    candidate_BD: torch.Tensor
    negative_ND: torch.Tensor | None = None
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """Each row's own score, (B,)."""
        return (self.query_BD * self.candidate_BD).sum(dim=1)
