"""FBGEMM's tables on a CPU with a backward pass of our own: sort ids, add up each distinct row's gradient, move the row.

FBGEMM's lookup and its memory of weights and state stay, which TorchRec goes on to shard, save and load. As there, the step
is taken in the backward pass: there never is a gradient of a table. Equal ids of a batch, in several features too, are one
row, whose gradient is summed in the order of the batch.

It serves tables whose optimizer FBGEMM does not have on a CPU (`lazy_adam.py`), and sequences: FBGEMM has their backward
pass (SGD, Adagrad, row-wise Adagrad; the rules here are the same) and is slow at it (docs/log.md). Bags are FBGEMM's own.
"""

from __future__ import annotations

__all__ = ["RowTables", "take_over_sequences"]

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.autograd.function import once_differentiable

from embedshard.sharding.shards import fused_kernels

_BLOCK_ELEMENTS = 2**16
"""Rows are moved in blocks of so many numbers: what is gathered of weights and state stays in the cache."""


class RowTables(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's tables of one kernel. A subclass says how rows are moved by their gradients."""

    def begin(self) -> None:
        """Does what a constructor would of a kernel that was not there already."""
        assert self.pooling_mode != PoolingMode.MEAN, "embedshard pools by weighted sums"
        self._anchor = torch.empty(0, requires_grad=True)
        self._weights_of_tables = self.split_embedding_weights()
        self._features, self._columns = [], []
        ends = self.D_offsets.tolist()
        for table in range(len(self._weights_of_tables)):
            first = self.feature_table_map.index(table)
            self._features.append((first, first + self.feature_table_map.count(table)))
            self._columns.append(slice(*(int(ends[feature]) for feature in self._features[-1])))

    def forward(
        self, indices: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Looks ids up.

        Args:
            indices: rows, (V,), feature by feature.
            offsets: where the ids of each feature's B rows begin, (features * B + 1,).
            per_sample_weights: of each id, (V,). It gets no gradient.

        Returns:
            Pooled vectors, (B, columns of all features); or those of all ids, (V, columns), where nothing is pooled.
        """
        return _lookup(self._anchor, self, indices, offsets, per_sample_weights)

    def look_up(self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Returns what FBGEMM's own kernel returns."""
        return super().forward(indices, offsets, weights)

    def take_step(
        self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, gradient: torch.Tensor
    ) -> None:
        """Takes the step of all rows that were looked up: arguments as of `forward`, and the gradient of its result."""
        batch_size = (len(offsets) - 1) // len(self.feature_table_map)
        for table, (first, last) in enumerate(self._features):
            begins = offsets[first * batch_size : last * batch_size + 1]
            span = slice(int(begins[0]), int(begins[-1]))
            if span.start == span.stop:
                continue
            if self.pooling_mode == PoolingMode.NONE:
                vectors, sources_V = gradient[span], None
            else:
                vectors = gradient[:, self._columns[table]].reshape(batch_size * (last - first), -1)
                bags_V = torch.repeat_interleave(begins.diff())  # feature by feature, as ids are; vectors are row by row
                sources_V = bags_V if last - first == 1 else bags_V % batch_size * (last - first) + bags_V // batch_size
            rows_U, gradient_UD = _by_row(indices[span], sources_V, vectors, None if weights is None else weights[span])
            for rows, of_rows in self._blocks(rows_U, gradient_UD):
                self.move(table, rows, of_rows)

    def move(self, table: int, rows_U: torch.Tensor, gradient_UD: torch.Tensor) -> None:
        """Takes the step of distinct rows of a table, and of their state. It may write to the gradient."""
        raise NotImplementedError

    def change(self, table: int, rows_U: torch.Tensor, change_UD: torch.Tensor, size: float | torch.Tensor = 1.0) -> None:
        """Adds `size`, one number or one a row, times the change to the weights of distinct rows."""
        weight_RD = self._weights_of_tables[table]
        weight_UD = weight_RD.index_select(0, rows_U).float()
        if isinstance(size, torch.Tensor):
            weight_UD.addcmul_(change_UD, size)
        else:
            weight_UD.add_(change_UD, alpha=size)
        weight_RD.index_copy_(0, rows_U, weight_UD.to(weight_RD.dtype))

    def _blocks(self, rows_U: torch.Tensor, gradient_UD: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        block = max(1, _BLOCK_ELEMENTS // gradient_UD.shape[1])
        return zip(torch.split(rows_U, block), torch.split(gradient_UD, block), strict=True)


class _SgdTables(RowTables):
    """weight -= lr * gradient."""

    def move(self, table: int, rows_U: torch.Tensor, gradient_UD: torch.Tensor) -> None:
        self.change(table, rows_U, gradient_UD, -self.get_learning_rate())


class _AdagradTables(RowTables):
    """sum += gradient^2; weight -= lr * gradient / (sqrt(sum) + eps)."""

    def begin(self) -> None:
        super().begin()
        self._sums = [states[0] for states in self.split_optimizer_states()]

    def move(self, table: int, rows_U: torch.Tensor, gradient_UD: torch.Tensor) -> None:
        sums_UD = self._sums[table].index_select(0, rows_U).addcmul_(gradient_UD, gradient_UD)
        self._sums[table].index_copy_(0, rows_U, sums_UD)
        step_UD = gradient_UD.div_(sums_UD.sqrt_().add_(self.optimizer_args.eps))
        self.change(table, rows_U, step_UD, -self.get_learning_rate())


class _RowwiseAdagradTables(RowTables):
    """sum += mean over columns of gradient^2; weight -= lr * gradient / (sqrt(sum) + eps)."""

    def begin(self) -> None:
        super().begin()
        self._sums = [states[0] for states in self.split_optimizer_states()]

    def move(self, table: int, rows_U: torch.Tensor, gradient_UD: torch.Tensor) -> None:
        sums_U = self._sums[table].index_select(0, rows_U).add_(gradient_UD.square().mean(dim=1))
        self._sums[table].index_copy_(0, rows_U, sums_U)
        sizes_U = sums_U.sqrt_().add_(self.optimizer_args.eps).reciprocal_().mul_(-self.get_learning_rate())
        self.change(table, rows_U, gradient_UD, sizes_U.unsqueeze(1))


_TABLES: dict[EmbOptimType, type[RowTables]] = {
    EmbOptimType.EXACT_SGD: _SgdTables,
    EmbOptimType.EXACT_ADAGRAD: _AdagradTables,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: _RowwiseAdagradTables,
}


def take_over_sequences(model: nn.Module) -> None:
    """Gives a sharded model's fused kernels of sequences this backward pass where they are on a CPU and have another."""
    for kernel in fused_kernels(model):
        tables = kernel.emb_module
        is_sequence = tables.pooling_mode == PoolingMode.NONE
        if tables.use_cpu and is_sequence and not isinstance(tables, RowTables) and tables.optimizer in _TABLES:
            tables.__class__ = _TABLES[tables.optimizer]  # in place: TorchRec's optimizers and state dicts hold it
            tables.begin()


class _Lookup(torch.autograd.Function):
    """The lookup, whose backward pass is the step. The anchor has no elements: it makes autograd call the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tables: RowTables,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        assert weights is None or not weights.requires_grad, "weights of ids are data: they get no gradient"
        ctx.tables = tables
        ctx.save_for_backward(indices, offsets, weights)
        return tables.look_up(indices, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        indices, offsets, weights = ctx.saved_tensors
        ctx.tables.take_step(indices, offsets, weights, gradient)
        return (None,) * 5


_lookup: Callable[..., torch.Tensor] = _Lookup.apply


def _by_row(
    ids_V: torch.Tensor, sources_V: torch.Tensor | None, vectors: torch.Tensor, weights_V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct ids, ascending, and the sum over each one's occurrences of weight times source vector.

    An id's source is the vector in its own place where `sources_V` is None.
    """
    rows_U, order_V, begins = _grouped(ids_V)
    return rows_U, F.embedding_bag(
        order_V if sources_V is None else sources_V[order_V],
        vectors.contiguous(),
        begins,
        mode="sum",
        per_sample_weights=None if weights_V is None else weights_V[order_V].to(vectors.dtype),
        include_last_offset=True,
    )


def _grouped(ids_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the distinct ids, ascending, the places of all by id and then in order, and where each one's places begin.

    An id and its place are sorted as one number where they fit into one: numpy sorts numbers several times as fast as torch
    finds out their order.
    """
    ids, bits = ids_V.numpy(), len(ids_V).bit_length()
    if ids_V.dtype == torch.int64 and int(ids.max()) < 2 ** (62 - bits):
        keys = ids << bits
        keys |= np.arange(len(ids))
        keys.sort()
        order, ids = keys & ((1 << bits) - 1), keys >> bits
    else:
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
    changes = np.flatnonzero(ids[1:] != ids[:-1])
    begins = np.empty(len(changes) + 2, dtype=np.int64)
    begins[0], begins[-1] = 0, len(ids)
    np.add(changes, 1, out=begins[1:-1])
    return torch.from_numpy(ids[begins[:-1]]), torch.from_numpy(order), torch.from_numpy(begins)
