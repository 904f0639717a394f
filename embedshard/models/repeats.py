"""Rows of a batch that have the same ids, mapped once.

What a tower makes of ids alone is the same for all rows that have them. Frequent ids stand in a batch many times, so much of
what is computed for each row is computed again: looked up, multiplied, and multiplied in the backward pass. Here each
different row of ids is looked up and mapped once; its gradient is the sum of those of its rows, in the order of the batch.
The weights are those that mapping each row would give, but for the order in which sums are rounded.

Shapes: K keys, B rows on this rank, U different ones among them, D dim.
"""

from __future__ import annotations

__all__ = ["Repeats", "without_repeats"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.data.batch import Batch

_WORTH_IT = 0.9
"""Share of the rows that are different, up to which the others are worth being found."""
_BITS = 62


@dataclass(frozen=True)
class Repeats:
    """Which rows are the same.

    Attributes:
        firsts: the first row of each kind, (U,) int64, in an order of their ids.
        kinds: of each row, (B,) int64.
        order: the rows, those of a kind beside each other and in the order of the batch, (B,) int64.
        begins: where those of each kind begin there, and the end, (U + 1,) int64.
    """

    firsts: torch.Tensor
    kinds: torch.Tensor
    order: torch.Tensor
    begins: torch.Tensor

    @property
    def count(self) -> int:
        """U."""
        return len(self.firsts)

    @classmethod
    def among(cls, ids_KB: Sequence[NDArray[np.int64]]) -> Repeats | None:
        """Finds the rows that have the same ids under all keys.

        Args:
            ids_KB: of each key one id a row, at least 0.

        Returns:
            None where too few rows are the same, or ids are too large to be sorted as numbers.
        """
        codes = ids_KB[0]
        found = _sorted(codes)
        for ids in ids_KB[1:]:
            if found is None:
                return None
            largest = int(ids.max(initial=0)) + 1
            if largest > 2**_BITS // max(found.count, 1):
                return None
            found = _sorted(found.kinds.numpy() * largest + ids)
        return found if found is not None and found.count <= _WORTH_IT * len(codes) else None

    def spread(self, vectors_UD: torch.Tensor) -> torch.Tensor:
        """Returns each row's vector, (B, D), of those of the kinds. With gradient."""
        return _apply(vectors_UD, self.kinds, self.order, self.begins)


def _sorted(codes: NDArray[np.int64]) -> Repeats | None:
    """Finds equal codes by sorting each and its place as one number, which numpy does several times as fast as `unique`."""
    size = len(codes)
    bits = size.bit_length()
    if not size or int(codes.min()) < 0 or int(codes.max()) >= 2 ** (_BITS - bits):
        return None
    keys = codes << bits
    keys |= np.arange(size)
    keys.sort()
    order, sorted_codes = keys & ((1 << bits) - 1), keys >> bits
    is_new = np.empty(size, dtype=np.bool_)
    is_new[0] = True
    np.not_equal(sorted_codes[1:], sorted_codes[:-1], out=is_new[1:])
    begins = np.flatnonzero(is_new)
    kinds = np.empty(size, dtype=np.int64)
    kinds[order] = np.cumsum(is_new) - 1
    return Repeats(*map(torch.from_numpy, (order[begins], kinds, order, np.append(begins, size))))


def without_repeats(batch: Batch, groups: Sequence[Sequence[str]], is_shorter: bool) -> tuple[Batch, list[Repeats | None]]:
    """Returns a batch for the lookup, whose first U rows have the different ids of each group of keys.

    Args:
        batch: on the CPU.
        groups: keys of `batch.sparse`, each in one group at most. Other keys stay as they are.
        is_shorter: whether it has no more rows than are needed; else B, the last ones empty.

    Returns:
        The batch, of which nothing else than `sparse` is another; and each group's repeats, None where its keys are as they
        were: where a row has not one id under each of them, or too few rows are the same.
    """
    sparse = batch.sparse
    if sparse is None:
        return batch, [None] * len(groups)
    keys = list(sparse.keys())
    lengths_KB = sparse.lengths().numpy().reshape(len(keys), -1)
    values = sparse.values().numpy()
    ends = np.cumsum(lengths_KB.sum(axis=1))
    begins = np.append(0, ends[:-1])
    ids = {key: values[begin:end] for key, begin, end in zip(keys, begins.tolist(), ends.tolist(), strict=True)}
    has_one = dict(zip(keys, (lengths_KB == 1).all(axis=1).tolist(), strict=True))
    found = [
        Repeats.among([ids[key] for key in group]) if group and all(has_one[key] for key in group) else None
        for group in groups
    ]
    of_key = {key: repeats for group, repeats in zip(groups, found, strict=True) for key in group if repeats is not None}
    if not of_key:
        return batch, found
    # All keys of a KeyedJaggedTensor have equally many rows: the last ones of a group that needs fewer are empty.
    size = lengths_KB.shape[1]
    if is_shorter and of_key.keys() >= set(keys):
        size = max(repeats.count for repeats in of_key.values())
    lengths = np.zeros((len(keys), size), dtype=lengths_KB.dtype)
    parts = []
    for place, key in enumerate(keys):
        repeats = of_key.get(key)
        if repeats is None:
            lengths[place] = lengths_KB[place]
            parts.append(ids[key])
        else:
            lengths[place, : repeats.count] = 1
            parts.append(ids[key][repeats.firsts.numpy()])
    shorter = KeyedJaggedTensor(
        keys=keys, values=torch.from_numpy(np.concatenate(parts)), lengths=torch.from_numpy(lengths.reshape(-1))
    )
    return replace(batch, sparse=shorter), found


class _Spread(torch.autograd.Function):
    """Rows by their kind. The backward pass sums by torch's `embedding_bag`, several times as fast as `index_add_`."""

    @staticmethod
    def forward(
        ctx: Any, vectors_UD: torch.Tensor, kinds: torch.Tensor, order: torch.Tensor, begins: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, begins)
        return vectors_UD.index_select(0, kinds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order, begins), dtype = ctx.saved_tensors, gradient_BD.dtype
        gradient_BD = gradient_BD.contiguous() if dtype != torch.bfloat16 else gradient_BD.float()
        sums_UD = F.embedding_bag(order, gradient_BD, begins, mode="sum", include_last_offset=True)
        return sums_UD.to(dtype), None, None, None


_apply: Callable[..., torch.Tensor] = _Spread.apply
