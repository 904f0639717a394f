"""The lookup of a world of one: straight to the tables, around an exchange that has no one to exchange with.

TorchRec's sharded collections go on to hold the tables, and to save and load them. Their own forward pass takes half a
millisecond or more of each step in a world of one (docs/performance.md); this one gives the same vectors.
"""

from __future__ import annotations

__all__ = ["look_up_directly"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.sharding.row_tables import RowTables, look_up_by_feature
from embedshard.sharding.shards import fused_kernels


def look_up_directly(model: nn.Module) -> None:
    """Gives the collections of a model that one process holds this forward pass.

    Those that have tables in other kernels than `RowTables`, or tables in several blocks, keep TorchRec's. As nothing
    travels, nothing is rounded on its way (`sharding.communication`).
    """
    for module in model.modules():
        if not isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            continue
        kernels = [kernel for kernel in fused_kernels(module) if isinstance(kernel.emb_module, RowTables)]
        held = [table for kernel in kernels for table in kernel.config.embedding_tables]
        are_whole = all(tuple(table.local_metadata.shard_sizes) == tuple(table.global_metadata.size) for table in held)
        if are_whole and sorted(table.name for table in held) == sorted(module.module_sharding_plan):
            looks_up = _Bags if isinstance(module, ShardedEmbeddingBagCollection) else _Sequences
            module.forward = looks_up(kernels).look_up


class _Lookup:
    """Kernels and the keys that each looks up.

    Args:
        kernels: TorchRec's fused kernels, which hold `RowTables`.
    """

    def __init__(self, kernels: Sequence[Any]) -> None:
        self._kernels = [(kernel.emb_module, kernel.config.feature_names()) for kernel in kernels]

    def _found(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        known, calls = ids.keys(), []
        for tables, keys in self._kernels:
            of_kernel = ids if known == keys else ids.permute([known.index(key) for key in keys])
            calls.append((tables, of_kernel.values(), of_kernel.offsets(), of_kernel.weights_or_none()))
        found = look_up_by_feature(calls)
        return {
            key: vectors
            for (_, keys), of_kernel in zip(self._kernels, found, strict=True)
            for key, vectors in zip(keys, of_kernel, strict=True)
        }


class _Bags(_Lookup):
    """The lookup of bags."""

    def look_up(self, ids: KeyedJaggedTensor) -> _Vectors:
        """Returns the pooled vectors, (B, D) of each key."""
        return _Vectors(self._found(ids))


class _Sequences(_Lookup):
    """The lookup of sequences."""

    def look_up(self, ids: KeyedJaggedTensor) -> dict[str, _Values]:
        """Returns the vectors of all ids, (V, D) of each key."""
        return {key: _Values(vectors) for key, vectors in self._found(ids).items()}


@dataclass(frozen=True)
class _Values:
    """Vectors of a sequence, as TorchRec's `JaggedTensor` hands them out."""

    vectors_VD: torch.Tensor

    def values(self) -> torch.Tensor:
        """Returns them."""
        return self.vectors_VD


class _Vectors(dict[str, torch.Tensor]):
    """Pooled vectors by key, as TorchRec's `KeyedTensor` hands them out."""

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Returns them."""
        return self
