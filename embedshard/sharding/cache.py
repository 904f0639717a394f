"""The caches of tables in the host's memory: how often they hold the rows that are looked up.

FBGEMM counts for each kernel; a table behind a cache has a kernel of its own (`keep_apart`), so its cache is of the size
that the config says and its count is its own.
"""

from __future__ import annotations

__all__ = ["CacheRates", "cache_rates", "keep_apart"]

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import UVMCacheStatsIndex
from torch import nn
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from embedshard.models.embeddings import table_modules, table_weights
from embedshard.sharding.shards import fused_kernels
from embedshard.world import World

_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING


def cache_rates(stats: Sequence[int]) -> dict[str, float]:
    """Returns what FBGEMM's six counts say; nothing where no row was looked up.

    Args:
        stats: calls, ids asked for, distinct rows of each call, those of them that were not in the cache, those of these for
            which it had no slot, and lookups of the latter, which read the host's memory.

    Returns:
        `hit_rate`: the share of the distinct rows of a batch that were in the cache. `unplaced`: the share of lookups that
        went past it, since all slots of the row's set held rows of the same batch.
    """
    asked, distinct = stats[UVMCacheStatsIndex.num_requested_indices], stats[UVMCacheStatsIndex.num_unique_indices]
    if not distinct or not asked:
        return {}
    return {
        "hit_rate": 1 - stats[UVMCacheStatsIndex.num_unique_misses] / distinct,
        "unplaced": stats[UVMCacheStatsIndex.num_conflict_misses] / asked,
    }


def keep_apart(model: nn.Module, plan: ShardingPlan) -> None:
    """Has TorchRec make a kernel of its own for each table behind a cache; else it shares one, of a mean size."""
    for path, module in table_modules(model):
        weights: Iterable[tuple[str, Any]] = table_weights(module).items()
        for name, weight in weights:
            if plan.plan[path][name].compute_kernel == _CACHING.value:
                weight._optimizer_kwargs[0][USE_ONE_TBE_PER_TABLE] = True


class CacheRates:
    """Counts the lookups of training, from one reading to the next; where rows are fetched ahead, when they are.

    Args:
        model: the sharded model.
        world: whose ranks share it.
    """

    def __init__(self, model: DistributedModelParallel, world: World) -> None:
        self._world = world
        self._tables = sorted(
            name
            for module_plan in model.plan.plan.values()
            for name, placed in module_plan.items()
            if placed.compute_kernel == _CACHING.value
        )
        self._kernels = [
            (kernel.config.embedding_tables[0].name, kernel.emb_module)
            for kernel in fused_kernels(model)
            if any(table.compute_kernel == _CACHING for table in kernel.config.embedding_tables)
        ]
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0] * len(UVMCacheStatsIndex))
        self._start()

    def measure(self) -> dict[str, float]:
        """Returns `<table>/<rate>` since the last time, over all ranks. Collective, if a table is behind a cache."""
        if not self._tables:
            return {}
        self._add()
        gathered = self._world.gather_objects(dict(self._counts))
        self._counts.clear()
        self._start()
        return {
            f"{table}/{name}": rate
            for table in self._tables
            for name, rate in cache_rates(
                [sum(counts) for counts in zip(*(found[table] for found in gathered if table in found), strict=True)]
                or [0] * len(UVMCacheStatsIndex)
            ).items()
        }

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves the lookups of an evaluation out."""
        self._add()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._before = [_read(tables) for _, tables in self._kernels]

    def _add(self) -> None:
        for (table, kernel), before in zip(self._kernels, self._before, strict=True):
            now = _read(kernel)
            self._counts[table] = [a + b - c for a, b, c in zip(self._counts[table], now, before, strict=True)]
        self._start()


def _read(tables: nn.Module) -> list[int]:
    counts: torch.Tensor = tables.get_uvm_cache_stats()  # type: ignore[operator]
    return [int(count) for count in counts.tolist()]
