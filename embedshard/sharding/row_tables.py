"""FBGEMM's tables on a CPU with loops of our own: the lookup, and the backward pass that moves the rows.

FBGEMM's memory of weights and state stays, which TorchRec goes on to shard, save and load. As there, the step is taken in
the backward pass: there never is a gradient of a table. Ids are sorted; equal ids of a batch, in several features too, are
one row, whose gradient is summed in the order of the batch. The loops are torch's and those of `row_kernels.py`; what they
save is in docs/performance.md.

They serve all tables that FBGEMM's fused kernels would: bags and sequences, under SGD, Adagrad and row-wise Adagrad, whose
rules are FBGEMM's, and Adam, which FBGEMM does not have on a CPU (`lazy_adam.py`).
"""

from __future__ import annotations

__all__ = ["RowTables", "look_up_by_feature", "take_over_tables"]

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable

from embedshard.counting import sort_by_counting
from embedshard.sharding.row_kernels import (
    NO_STATE,
    Rule,
    State,
    are_ascending,
    are_single,
    bags_of_ids,
    group_rows,
    move_rows,
)
from embedshard.sharding.shards import fused_kernels

Ids = NDArray[np.int64]
_LEAST_OF_A_THREAD = 2**12
"""Rows for which a further thread is worth its while."""
_ROWS_AN_ID = 8
"""Rows of a table for each id of a batch, up to which ids are sorted by counting."""


class RowTables(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's tables of one kernel. A subclass says by which rule rows are moved, and what state it has.

    Attributes:
        rule: by which rows are moved.
    """

    rule: ClassVar[Rule]

    def begin(self, names: Sequence[str]) -> None:
        """Does what a constructor would of a kernel that was not there already.

        Args:
            names: of its tables.
        """
        assert self.pooling_mode != PoolingMode.MEAN, "embedshard pools by weighted sums"
        self._anchor = torch.empty(0, requires_grad=True)
        self._names = list(names)
        self._weights_of_tables = self.split_embedding_weights()
        self._features = []
        for table in range(len(self._weights_of_tables)):
            first = self.feature_table_map.index(table)
            self._features.append((first, first + self.feature_table_map.count(table)))
        self._dims = [int(end - begin) for begin, end in pairwise(self.D_offsets.tolist())]
        self._is_float32 = all(weight.dtype == torch.float32 for weight in self._weights_of_tables)

    def forward(
        self, indices: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Looks ids up, as FBGEMM does.

        Args:
            indices: rows, (V,), feature by feature.
            offsets: where the ids of each feature's B rows begin, (features * B + 1,).
            per_sample_weights: of each id, (V,). It gets no gradient.

        Returns:
            Pooled vectors, (B, columns of all features); or those of all ids, (V, columns), where nothing is pooled.

        Raises:
            IndexError: if an id is no row of its table.
        """
        (parts,) = look_up_by_feature([(self, indices, offsets, per_sample_weights)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0 if self.pooling_mode == PoolingMode.NONE else 1)

    def look_up(
        self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Returns for each feature what `forward` returns for all, side by side or one after the other; no backward pass."""
        all_begins = offsets.numpy()
        batch_size = (len(all_begins) - 1) // len(self.feature_table_map)
        is_pooled = self.pooling_mode != PoolingMode.NONE
        if not batch_size:
            return tuple(torch.empty(0, dim) for dim in self._dims)
        if not self._is_float32:
            found = super().forward(indices, offsets, weights)
            cuts = self._dims if is_pooled else offsets[::batch_size].diff().tolist()
            return tuple(part.contiguous() for part in torch.split(found, cuts, dim=1 if is_pooled else 0))
        parts: list[torch.Tensor] = []
        for name, weight, (first, last) in zip(self._names, self._weights_of_tables, self._features, strict=True):
            begins = all_begins[first * batch_size : last * batch_size + 1]
            span = slice(int(begins[0]), int(begins[-1]))
            cuts = [batch_size] * (last - first) if is_pooled else begins[::batch_size].tolist()
            if not is_pooled:
                cuts = [end - begin for begin, end in pairwise(cuts)]
            try:
                if not is_pooled or (weights is None and are_single(begins)):
                    vectors = weight.index_select(0, indices[span])
                else:
                    of_weights = None if weights is None else weights[span].float()
                    bags = torch.from_numpy(begins - span.start if span.start else begins)
                    vectors = _sums(weight, indices[span], bags, of_weights)
            except (IndexError, RuntimeError) as error:
                _check_rows(name, indices[span], weight, error)
                raise
            parts += [vectors] if len(cuts) == 1 else torch.split(vectors, cuts)
        return tuple(parts)

    def take_step(
        self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None,
        gradients: Sequence[torch.Tensor | None],
    ) -> None:  # fmt: skip
        """Takes the step of all rows that were looked up: arguments as of `look_up`, and the gradients of its results.

        A gradient that is None is zeros: a row that was looked up is moved, which Adam does by its moments alone.
        """
        begins = offsets.numpy()
        batch_size = (len(begins) - 1) // len(self.feature_table_map)
        is_pooled = self.pooling_mode != PoolingMode.NONE
        if not batch_size:
            return
        for table, (first, last) in enumerate(self._features):
            bags = begins[first * batch_size : last * batch_size + 1]
            span, dim = slice(int(bags[0]), int(bags[-1])), self._dims[first]
            if span.start == span.stop:
                continue
            sizes = [batch_size] * (last - first) if is_pooled else np.diff(bags[::batch_size]).tolist()
            parts = [
                torch.zeros(size, dim) if part is None else part.float()
                for size, part in zip(sizes, gradients[first:last], strict=True)
            ]
            ids_V = indices[span].numpy()
            if len(parts) == 1 and weights is None and _is_one_a_row(bags, ids_V):
                self._move(table, ids_V, parts[0].contiguous().numpy())  # those of further rows are of no id
                continue
            vectors, stride = _as_rows(parts[0]) if len(parts) == 1 else (torch.cat(parts), 1)
            rows_U, sources, ends = _grouped(ids_V, len(self._weights_of_tables[table]))
            of_weights = None if weights is None or not is_pooled else weights[span][torch.from_numpy(sources)].float()
            if is_pooled and not are_single(bags):
                sources = bags_of_ids(bags)[sources]
            places = torch.from_numpy(sources if stride == 1 else sources * stride)
            gradient_UD = _sums(vectors, places, torch.from_numpy(ends), of_weights)
            self._move(table, rows_U, gradient_UD.numpy())

    def state(self, table: int) -> State:
        """Returns a table's state: sums (R,), squares (R, D) and means (R, D); those that the rule has not are empty."""
        return NO_STATE

    def numbers(self, table: int) -> tuple[float, float, float, float, float]:
        """Returns the rate, epsilon, 1 - beta1, beta2 and 1 - beta2 of a table's next step."""
        return self.get_learning_rate(), self.optimizer_args.eps, 0.0, 0.0, 0.0

    def _move(self, table: int, rows_U: Ids, gradient_UD: NDArray[np.float32]) -> None:
        weight, state, numbers = self._weights_of_tables[table], self.state(table), np.array(self.numbers(table), np.float32)
        if weight.dtype == torch.float32:
            moved, slots = weight, rows_U
        else:  # the loops know float32 alone: they move a copy of the rows
            moved, slots = weight.index_select(0, torch.from_numpy(rows_U)).float(), np.arange(len(rows_U))
        values = moved.numpy()

        def run(first: int, last: int) -> None:
            move_rows(int(self.rule), values, slots, *state, rows_U, gradient_UD, numbers, first, last)

        _in_threads(run, len(rows_U))
        if moved is not weight:
            weight.index_copy_(0, torch.from_numpy(rows_U), moved.to(weight.dtype))


class _SgdTables(RowTables):
    rule = Rule.SGD


class _AdagradTables(RowTables):
    rule = Rule.ADAGRAD

    def begin(self, names: Sequence[str]) -> None:
        super().begin(names)
        self._sums = [states[0] for states in self.split_optimizer_states()]

    def state(self, table: int) -> State:
        return NO_STATE[0], self._sums[table].numpy(), NO_STATE[2]


class _RowwiseAdagradTables(RowTables):
    rule = Rule.ROWWISE_ADAGRAD

    def begin(self, names: Sequence[str]) -> None:
        super().begin(names)
        self._sums = [states[0] for states in self.split_optimizer_states()]

    def state(self, table: int) -> State:
        return self._sums[table].numpy(), *NO_STATE[1:]


_TABLES: dict[EmbOptimType, type[RowTables]] = {
    EmbOptimType.EXACT_SGD: _SgdTables,
    EmbOptimType.EXACT_ADAGRAD: _AdagradTables,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: _RowwiseAdagradTables,
}


def take_over_tables(model: nn.Module) -> None:
    """Gives a sharded model's fused kernels these loops where they are on a CPU and have others."""
    for kernel in fused_kernels(model):
        tables = kernel.emb_module
        if tables.use_cpu and not isinstance(tables, RowTables) and tables.optimizer in _TABLES:
            tables.__class__ = _TABLES[tables.optimizer]  # in place: TorchRec's optimizers and state dicts hold it
            tables.begin([table.name for table in kernel.config.embedding_tables])


class _Lookup(torch.autograd.Function):
    """The lookup, whose backward pass is the step. The anchor has no elements: it makes autograd call the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, kernels: Sequence[RowTables], *given: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        found: list[torch.Tensor] = []
        for tables, (indices, offsets, weights) in zip(kernels, _in_threes(given), strict=True):
            assert weights is None or not weights.requires_grad, "weights of ids are data: they get no gradient"
            assert indices is not None and offsets is not None, "only weights may be missing"  # noqa: PT018
            found += tables.look_up(indices, offsets, weights)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        first = 0
        for tables, (indices, offsets, weights) in zip(ctx.kernels, _in_threes(ctx.saved_tensors), strict=True):
            last = first + len(tables.feature_table_map)
            tables.take_step(indices, offsets, weights, gradients[first:last])
            first = last
        return (None,) * (2 + len(ctx.saved_tensors))


_apply: Callable[..., tuple[torch.Tensor, ...]] = _Lookup.apply


def look_up_by_feature(
    calls: Sequence[tuple[RowTables, torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> list[tuple[torch.Tensor, ...]]:
    """Looks ids up in several kernels, whose tables all take a step if any vector of them has a gradient.

    Args:
        calls: kernels, each with indices, offsets and weights, as `RowTables.forward` takes them.

    Returns:
        For each kernel the vectors of each of its features.

    Raises:
        IndexError: if an id is no row of its table.
    """
    given = [tensor for _, indices, offsets, weights in calls for tensor in (indices.long(), offsets.long(), weights)]
    found = iter(_apply(calls[0][0]._anchor, [tables for tables, *_ in calls], *given))
    return [tuple(next(found) for _ in tables.feature_table_map) for tables, *_ in calls]


def _in_threes(tensors: Sequence[torch.Tensor | None]) -> list[tuple[Any, Any, Any]]:
    return [(tensors[at], tensors[at + 1], tensors[at + 2]) for at in range(0, len(tensors), 3)]


def _sums(rows: torch.Tensor, places_V: torch.Tensor, ends: torch.Tensor, weights_V: torch.Tensor | None) -> torch.Tensor:
    """Returns sums of the rows at some places, from each of `ends` to the next, without the checks of torch's `F`."""
    found: torch.Tensor = torch.embedding_bag(rows, places_V, ends, False, 0, False, weights_V, True)[0]
    return found


def _is_one_a_row(begins: Ids, ids_V: Ids) -> bool:
    """Returns whether the first bags have an id each, all different and ascending, and further ones none."""
    count = len(ids_V)
    return are_ascending(ids_V) and count < len(begins) and are_single(begins[: count + 1])


def _as_rows(part: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns a matrix (., D) and a stride: row b * stride of it is row b of the part, (B, D).

    Where the part is columns of a matrix that has whole vectors side by side, it is that matrix, and nothing is copied.
    """
    size, dim = part.shape
    if part.stride(1) == 1 and part.stride(0) > dim and part.stride(0) % dim == 0:
        stride = part.stride(0) // dim
        return part.as_strided(((size - 1) * stride + 1, dim), (dim, 1)), stride
    return part.contiguous(), 1


def _check_rows(table: str, ids_V: torch.Tensor, weight_RD: torch.Tensor, error: Exception) -> None:
    wrong_V = ids_V[(ids_V < 0) | (ids_V >= len(weight_RD))]
    if len(wrong_V):
        raise IndexError(
            f"row {wrong_V[0]} was looked up in table '{table}', of which this rank has {len(weight_RD):,} rows. The reader "
            "lets no such row through: a model of your own that changes ids must keep them within the table."
        ) from error


def _grouped(ids_V: Ids, num_rows: int) -> tuple[Ids, Ids, Ids]:
    """Returns the distinct ids, ascending, the places of all by id and then in order, and where each one's places begin.

    In a table that is not much larger than the batch each row's ids are counted. Else an id and its place are sorted as one
    number where they fit into one: numpy sorts numbers several times as fast as it finds out their order.
    """
    bits = len(ids_V).bit_length()
    is_counted = num_rows <= _ROWS_AN_ID * len(ids_V)
    if is_counted or num_rows < 2 ** (62 - bits):
        places, rows, begins = np.empty_like(ids_V), np.empty_like(ids_V), np.empty(len(ids_V) + 1, np.int64)
        if is_counted:
            count = sort_by_counting(ids_V, np.zeros(num_rows, np.int64), places, rows, begins)
        else:
            keys = ids_V << bits
            keys |= np.arange(len(ids_V))
            keys.sort()
            count = group_rows(keys, bits, places, rows, begins)
        return rows[:count], places, begins[: count + 1]
    places = np.argsort(ids_V, kind="stable")
    rows = ids_V[places]
    begins = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    return rows[begins], places, np.append(begins, len(rows))


_pools: list[ThreadPoolExecutor] = []


def _in_threads(run: Callable[[int, int], None], count: int) -> None:
    """Runs a loop from 0 to a count, in as many threads as torch has."""
    threads = min(torch.get_num_threads(), count // _LEAST_OF_A_THREAD)
    if threads <= 1:
        run(0, count)
        return
    if not _pools:
        _pools.append(ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="rows"))
    cuts = [count * part // threads for part in range(threads + 1)]
    list(_pools[0].map(run, cuts[:-1], cuts[1:]))
