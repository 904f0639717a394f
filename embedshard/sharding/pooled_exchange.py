"""Pooled vectors on their way from the tables' ranks to the rows' ranks, between workers that share memory.

TorchRec's exchange lays vectors out for sending, receives them rank by rank and joins them: four copies in each direction
that the memory itself makes needless, as each rank's vectors can be read from it to where they belong (docs/performance.md
has what that saves). The vectors are the same.

Shapes: W ranks, B rows of this rank, G rows of all ranks, D columns of all tables, L columns of this rank's tables.
"""

from __future__ import annotations

__all__ = ["exchange_directly"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from embedshard.neighbours import Neighbours
from embedshard.world import World


def exchange_directly(model: nn.Module, world: World) -> None:
    """Gives the tables of a sharded model that are whole, or cut by columns, this exchange, if the workers share memory.

    Vectors that are rounded on their way (`sharding.communication`) keep TorchRec's.
    """
    if not isinstance(world.group, Neighbours):
        return
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for way in module._output_dists:
                if isinstance(way, TwPooledEmbeddingDist) and way._codecs is None and way._pg is world.group:
                    exchange = _Exchange(world.group, way._dim_sum_per_rank, way._callbacks or [])
                    way._dist = exchange


class _Exchange(nn.Module):
    """What TorchRec's `PooledEmbeddingsAllToAll` does.

    Args:
        group: the ranks.
        columns: of the tables of each rank.
        callbacks: what is done with the vectors when they are there.
    """

    def __init__(self, group: Neighbours, columns: Sequence[int], callbacks: Sequence[Callable[[Any], Any]]) -> None:
        super().__init__()
        self._group, self._columns, self._callbacks = group, list(columns), list(callbacks)

    def forward(self, vectors_GL: torch.Tensor, batch_size_per_rank: list[int] | None = None) -> Awaitable[torch.Tensor]:
        """Sends vectors, pooled for all ranks' rows, in rank order; returns what waits for (B, D). Collective."""
        count = self._group.size()
        rows = batch_size_per_rank or [len(vectors_GL) // count] * count
        coming = _Coming(*_apply(vectors_GL, self._group, rows, self._columns))
        coming.callbacks.extend(self._callbacks)
        return coming


class _Coming(Awaitable[torch.Tensor]):
    """Vectors that are under way."""

    def __init__(self, vectors_BD: torch.Tensor, work: dist.Work) -> None:
        super().__init__()
        self._vectors_BD, self._work = vectors_BD, work

    def _wait_impl(self) -> torch.Tensor:
        self._work.wait()
        return self._vectors_BD


class _Across(torch.autograd.Function):
    """The exchange, and in the backward pass that of the gradients, the other way."""

    @staticmethod
    def forward(
        ctx: Any, vectors_GL: torch.Tensor, group: Neighbours, rows: list[int], columns: list[int]
    ) -> tuple[torch.Tensor, dist.Work]:
        ctx.group, ctx.rows, ctx.columns = group, rows, columns
        vectors_BD = vectors_GL.new_empty(rows[group.rank()], sum(columns))
        return vectors_BD, group.exchange(torch.split(vectors_GL, rows), torch.split(vectors_BD, columns, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BD: torch.Tensor, _of_work: None) -> tuple[torch.Tensor | None, ...]:
        gradient_GL = gradient_BD.new_empty(sum(ctx.rows), ctx.columns[ctx.group.rank()])
        ctx.group.exchange(torch.split(gradient_BD, ctx.columns, dim=1), torch.split(gradient_GL, ctx.rows)).wait()
        if get_gradient_division():
            gradient_GL.div_(len(ctx.rows))
        return gradient_GL, None, None, None


_apply: Callable[..., tuple[torch.Tensor, dist.Work]] = _Across.apply
