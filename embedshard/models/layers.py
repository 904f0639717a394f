"""Layers that models share."""

from __future__ import annotations

__all__ = ["mlp"]

from collections.abc import Sequence

from torch import nn


def mlp(width: int, sizes: Sequence[int]) -> nn.Sequential:
    """Returns linear layers with ReLU between them and none after the last: (B, width) to (B, sizes[-1])."""
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes):
        if i:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(width, size))
        width = size
    return nn.Sequential(*layers)
