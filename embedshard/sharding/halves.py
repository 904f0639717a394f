"""The backward pass in two halves: down to what was looked up, and on from there into the tables.

Tables take their optimizer's step in their backward pass: between the halves is the last moment to say that they must not.
"""

from __future__ import annotations

__all__ = ["LookedUp"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from embedshard.models.embeddings import EmbeddingLookup


class LookedUp:
    """The vectors of a step's lookups, where the first half of the backward pass ends.

    Args:
        model: whose lookups hand their vectors on through this from now on. Make it once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = torch.zeros((), requires_grad=True)
        self._cuts: list[_Cut] = []
        self._is_apart = False
        for module in model.modules():
            if isinstance(module, EmbeddingLookup):
                module.hand_on = self._cut

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Lets the backward pass of what is looked up inside end there. What a former step has left is let go of."""
        self._cuts, self._is_apart = [], True
        try:
            yield
        finally:
            self._is_apart = False

    def go_on(self, factor: float = 1.0) -> None:
        """Takes the second half of the backward pass, after the first: tables are updated. Collective.

        Args:
            factor: what the gradients are multiplied by on their way.
        """
        pairs = [
            (vectors, gradient)
            for cut in self._cuts
            for vectors, gradient in zip(cut.vectors, cut.gradients, strict=True)
            if gradient is not None and vectors.requires_grad
        ]
        self._cuts = []
        if pairs:
            vectors, gradients = zip(*pairs, strict=True)
            if factor != 1.0:
                gradients = tuple(torch._foreach_mul(gradients, factor))
            torch.autograd.backward(vectors, gradients)

    def _cut(self, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._is_apart:
            return vectors
        cut = _Cut(list(vectors.values()))
        self._cuts.append(cut)
        handed_on = _End.apply(self._root, cut, *(tensor.detach() for tensor in vectors.values()))  # type: ignore[no-untyped-call]
        return dict(zip(vectors, handed_on, strict=True))


class _Cut:
    """What one lookup gave, and the gradients that have come back to it; None for what the loss does not depend on."""

    def __init__(self, vectors: list[torch.Tensor]) -> None:
        self.vectors = vectors
        self.gradients: list[torch.Tensor | None] = [None] * len(vectors)


class _End(torch.autograd.Function):
    """Where the first half ends. Unlike leaves of the graph, it keeps gradients as they come, without a copy."""

    @staticmethod
    def forward(ctx: Any, root: torch.Tensor, cut: _Cut, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return vectors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        ctx.cut.gradients = list(gradients)
        return (None,) * (2 + len(gradients))
