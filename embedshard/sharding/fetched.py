"""Rows that are in the cache of a table ahead of their step, and FBGEMM's notes of where: what makes the notes void.

FBGEMM's kernels for tables behind a cache (`split_table_batched_embeddings_ops_training.py`) keep a list of where the rows
of fetched batches lie, and the next lookup takes its head, whatever is looked up. So the list may hold nothing but the
batch whose step comes next, and nothing that was noted before the cache was emptied.

FBGEMM also counts, for each slot of a cache, the batches that are between their fetching and their backward pass, so that
what is fetched for one does not take another's place; a batch without a backward pass would keep its slots for good. Here
a batch is fetched after the lookups of the step before, when no row that was fetched is still to be read, and slots are
not locked. A row that loses its place between a lookup and its backward pass is looked up anew by FBGEMM and updated where
it lies by then.
"""

from __future__ import annotations

__all__ = ["fetches_ahead", "let_go"]

from typing import Any

import torch


def fetches_ahead(tables: Any) -> bool:
    """Returns whether a kernel's module is FBGEMM's of tables behind a cache, made for fetching (`train.prefetch`)."""
    cache = getattr(tables, "lxu_cache_weights", None)
    return bool(getattr(tables, "prefetch_pipeline", False)) and cache is not None and cache.numel() > 0


def let_go(tables: Any) -> None:
    """Has the next lookup find out itself where its rows lie. To be called between steps; not collective.

    Args:
        tables: a kernel's module; one that was not made for fetching has nothing to let go of.
    """
    if not getattr(tables, "prefetch_pipeline", False):
        return
    if tables.prefetch_stream is not None:  # what is under way may still move rows
        torch.cuda.current_stream(tables.lxu_cache_weights.device).wait_stream(tables.prefetch_stream)
    tables.timesteps_prefetched.clear()
    tables.lxu_cache_locations_list.clear()
    tables.prefetched_info_list.clear()
