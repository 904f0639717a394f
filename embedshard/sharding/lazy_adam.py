"""Adam where FBGEMM has none, which is on a CPU: for the rows that a batch looks up, and for no others.

The rule is torch.optim.SparseAdam's. A row that is not looked up keeps its weights and its moments; the bias correction
counts the steps that the table has taken, not those of the row. As with FBGEMM's fused optimizers, the backward pass adds up
the gradient of each distinct row and takes the step there and then: there never is a gradient of a table.

TorchRec builds the kernels, cuts tables, keeps weights and learning rates. It is told of SGD, which keeps no state, with
Adam's numbers beside it, and its kernels that were told so become `LazyAdamTables`. `ownership.py` proves that all did.
"""

from __future__ import annotations

__all__ = ["AdamSteps", "LazyAdamTables", "lazy_adam_shards", "pose_as_sgd", "take_over", "tell_fbgemm"]

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.autograd.function import once_differentiable

from embedshard.config.parts import TableOptimizerConfig
from embedshard.sharding.shards import Shard, fused_kernels

_ADAMS_OWN = "beta1"
"""By this parameter of a kernel that says SGD, the one that stands for Adam is known."""
_BLOCK_ELEMENTS = 2**14
"""Rows take their step in blocks of so many numbers: what is gathered of weights and moments stays in the cache."""


class LazyAdamTables(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's tables of one kernel, trained by lazy Adam in the backward pass.

    Attributes:
        moments: of each table, the running means of the gradient and of its square, (rows, columns) float32.
        steps: of each table, how many steps it has taken, (1,) int64. `AdamSteps` counts.
    """

    moments: list[tuple[torch.Tensor, torch.Tensor]]
    steps: list[torch.Tensor]

    def begin(self) -> None:
        """Makes the state, all zeros: what a constructor would do of a kernel that was not there already."""
        assert self.pooling_mode != PoolingMode.MEAN, "embedshard pools by weighted sums"
        self._anchor = torch.empty(0, requires_grad=True)
        self.moments, self.steps, self._features = [], [], []
        for table, weight in enumerate(self.split_embedding_weights()):
            self.moments.append((torch.zeros(weight.shape), torch.zeros(weight.shape)))
            self.steps.append(torch.zeros(1, dtype=torch.int64))
            first = self.feature_table_map.index(table)
            self._features.append((first, first + self.feature_table_map.count(table)))

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
        tables = zip(self.split_embedding_weights(), self.moments, self.steps, self._features, strict=True)
        for weight_RD, moments_RD, steps, (first, last) in tables:
            begins = offsets[first * batch_size : last * batch_size + 1]
            span = slice(int(begins[0]), int(begins[-1]))
            if span.start == span.stop:
                continue
            if self.pooling_mode == PoolingMode.NONE:
                vectors, sources_V = gradient[span], torch.arange(span.stop - span.start)
            else:
                columns = gradient[:, int(self.D_offsets[first]) : int(self.D_offsets[last])]
                vectors = columns.reshape(batch_size * (last - first), -1)
                bags_V = torch.repeat_interleave(begins.diff())  # feature by feature, as ids are; vectors are row by row
                sources_V = bags_V % batch_size * (last - first) + bags_V // batch_size
            rows_U, gradient_UD = _by_row(indices[span], sources_V, vectors, None if weights is None else weights[span])
            self._train(weight_RD, moments_RD, int(steps) + 1, rows_U, gradient_UD)

    def _train(
        self,
        weight_RD: torch.Tensor,
        moments_RD: tuple[torch.Tensor, torch.Tensor],
        step: int,
        rows_U: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        beta1, beta2, eps = self.optimizer_args.beta1, self.optimizer_args.beta2, self.optimizer_args.eps
        size = self.get_learning_rate() * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        block = max(1, _BLOCK_ELEMENTS // weight_RD.shape[1])
        for rows, gradient in zip(torch.split(rows_U, block), torch.split(gradient_UD, block), strict=True):
            mean, square = (moment.index_select(0, rows) for moment in moments_RD)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            for moment, moved in zip(moments_RD, (mean, square), strict=True):
                moment.index_copy_(0, rows, moved)
            weight = weight_RD.index_select(0, rows).float()
            weight.addcdiv_(mean, square.sqrt_().add_(eps), value=-size)
            weight_RD.index_copy_(0, rows, weight.to(weight_RD.dtype))


class _Lookup(torch.autograd.Function):
    """The lookup, whose backward pass is the step. The anchor has no elements: it makes autograd call the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tables: LazyAdamTables,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        assert weights is None or not weights.requires_grad, "weights of ids are data: lazy Adam gives them no gradient"
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
    ids_V: torch.Tensor, sources_V: torch.Tensor, vectors: torch.Tensor, weights_V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct ids, ascending, and the sum over each one's occurrences of weight times source vector."""
    ids_V, order_V = ids_V.sort(stable=True)
    rows_U, counts_U = torch.unique_consecutive(ids_V, return_counts=True)
    begins = F.pad(counts_U.cumsum(0), (1, 0))
    return rows_U, F.embedding_bag(
        sources_V[order_V],
        vectors.contiguous(),
        begins,
        mode="sum",
        per_sample_weights=None if weights_V is None else weights_V[order_V].to(vectors.dtype),
        include_last_offset=True,
    )


class AdamSteps:
    """How many steps each table under Adam has taken: the same on every rank, also where none of the table lies.

    Args:
        model: the sharded model.
        tables: the names of its tables under Adam, lazy or fused.

    Attributes:
        taken: by table, (1,) int64.
    """

    def __init__(self, model: nn.Module, tables: Iterable[str]) -> None:
        self.taken = {table: torch.zeros(1, dtype=torch.int64) for table in tables}
        self._fbgemm: list[tuple[Any, torch.Tensor]] = []
        for kernel in fused_kernels(model):
            names = [table.name for table in kernel.config.embedding_tables]
            if isinstance(kernel.emb_module, LazyAdamTables):
                kernel.emb_module.steps = [self.taken[name] for name in names]
            elif kernel.emb_module.optimizer == EmbOptimType.ADAM:
                self._fbgemm.append((kernel.emb_module, self.taken[names[0]]))

    def tell(self) -> None:
        """Tells FBGEMM's own Adam, before a step: it counts lookups, also evaluations', and begins anew on resume."""
        for tables, taken in self._fbgemm:
            tables.iter.copy_(taken)
            tables.iter_cpu.copy_(taken)

    def add(self) -> None:
        """Counts a step."""
        for taken in self.taken.values():
            taken.add_(1)


def tell_fbgemm(weight: Any, optimizer: TableOptimizerConfig) -> None:
    """Gives an unsharded table, which was given Adam, Adam's numbers by FBGEMM's names."""
    beta1, beta2 = optimizer.betas
    weight._optimizer_kwargs = [{"lr": optimizer.lr, "eps": optimizer.eps, "beta1": beta1, "beta2": beta2}]


def pose_as_sgd(model: nn.Module) -> None:
    """Has TorchRec make SGD's kernels for tables under Adam. After planning: a plan counts the state of Adam."""
    weights: Iterator[Any] = model.parameters()
    for weight in weights:
        if getattr(weight, "_optimizer_classes", None) == [torch.optim.Adam]:
            weight._optimizer_classes = [torch.optim.SGD]


def take_over(model: nn.Module) -> None:
    """Makes lazy Adam's of the kernels that were made for it in a sharded model."""
    for kernel in fused_kernels(model):
        is_sgd = kernel.emb_module.optimizer == EmbOptimType.EXACT_SGD
        if is_sgd and _ADAMS_OWN in (kernel.config.fused_params or {}):
            kernel.emb_module.__class__ = LazyAdamTables  # in place: TorchRec's optimizers and state dicts hold it
            kernel.emb_module.begin()


def lazy_adam_shards(model: nn.Module) -> Iterator[Shard]:
    """Yields this rank's blocks of lazy Adam's moments that are not empty, named as FBGEMM's Adam's are. Not collective."""
    for kernel in fused_kernels(model):
        if not isinstance(kernel.emb_module, LazyAdamTables):
            continue
        for table, moments in zip(kernel.config.embedding_tables, kernel.emb_module.moments, strict=True):
            offset, shape = tuple(table.local_metadata.shard_offsets), tuple(table.global_metadata.size)
            for kind, moment in zip(("momentum1", "momentum2"), moments, strict=True):
                if moment.numel():
                    yield Shard(table.name, kind, moment, offset, shape)
