"""The dot product of each row of a matrix with the same row of another.

Shapes: B rows, D numbers of each.
"""

from __future__ import annotations

__all__ = ["row_dots"]

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from embedshard.compiled import compiled


def row_dots(left_BD: torch.Tensor, right_BD: torch.Tensor) -> torch.Tensor:
    """Returns the products, (B,). On a CPU the gradients come of a loop without what torch does around it."""
    is_ours = left_BD.device.type == "cpu" and left_BD.dtype == right_BD.dtype == torch.float32 and left_BD.dim() == 2
    is_trained = torch.is_grad_enabled() and left_BD.requires_grad and right_BD.requires_grad
    if is_ours and is_trained and left_BD.shape == right_BD.shape and not _is_traced():
        return _apply(left_BD, right_BD)
    return (left_BD * right_BD).sum(dim=1)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]


class _RowDots(torch.autograd.Function):
    """What torch gives, forward and backward, bit for bit."""

    @staticmethod
    def forward(ctx: Any, left_BD: torch.Tensor, right_BD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left_BD, right_BD)
        return (left_BD * right_BD).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left_BD, right_BD = (side.contiguous() for side in ctx.saved_tensors)
        for_left, for_right = torch.empty_like(left_BD), torch.empty_like(right_BD)
        factors = gradient_B.contiguous().numpy()
        _scaled(factors, right_BD.numpy(), for_left.numpy())
        _scaled(factors, left_BD.numpy(), for_right.numpy())
        return for_left, for_right


_apply: Callable[..., torch.Tensor] = _RowDots.apply


@compiled
def _scaled(factors: Any, rows: Any, out: Any) -> None:
    """Fills in each row times its factor."""
    for row in range(len(factors)):
        factor = factors[row]
        for column in range(rows.shape[1]):
            out[row, column] = factor * rows[row, column]
