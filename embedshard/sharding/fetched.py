"""Rows that are in the cache of a table ahead of their step, and FBGEMM's notes of where: what makes the notes void.

FBGEMM's kernels for tables behind a cache (`split_table_batched_embeddings_ops_training.py`) keep a list of where the rows
of fetched batches lie, and the next lookup takes its head, whatever is looked up. So the list may hold nothing but the
batch whose step comes next, and nothing that was noted before the cache was emptied.

FBGEMM also locks the slots of each batch from its fetching to its backward pass, so that what is fetched for one does not
take another's place; a batch without a backward pass would keep its slots for good. Here a batch is fetched after the
lookups of the step before, when no row that was fetched is still to be read, and begins without a lock. A row that loses
its place between a lookup and its backward pass is looked up anew by FBGEMM and updated where it lies by then.
"""

from __future__ import annotations

__all__ = ["fetches_ahead", "fetching", "let_go"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def fetches_ahead(kernel: Any) -> bool:
    """Returns whether a kernel's module is FBGEMM's of tables behind a cache, made for fetching (`train.prefetch`)."""
    cache = getattr(kernel, "lxu_cache_weights", None)
    return bool(getattr(kernel, "prefetch_pipeline", False)) and cache is not None and cache.numel() > 0


@contextmanager
def fetching(kernels: Iterable[Any]) -> Iterator[None]:
    """Is around what fetches for kernels' modules, on the stream that it is done on.

    Locks are set in it, from none on: by the flag FBGEMM also knows that rows are fetched beside other work, and leaves most
    of the GPU to that. Lookups that find their rows themselves set none.
    """
    fetched = [kernel for kernel in kernels if fetches_ahead(kernel)]
    for kernel in fetched:
        kernel.lock_cache_line = True
        kernel.lxu_cache_locking_counter.zero_()
        if kernel.uvm_cache_stats.is_cuda:  # FBGEMM puts another in its place, and this one is still to be read
            kernel.uvm_cache_stats.record_stream(torch.cuda.current_stream(kernel.uvm_cache_stats.device))
    try:
        yield
    finally:
        for kernel in fetched:
            kernel.lock_cache_line = False


def let_go(kernel: Any) -> None:
    """Has the next lookup find out itself where its rows lie. Not collective.

    To be called where no fetched batch is between its lookup and its backward pass, and before the cache is emptied: it
    waits for what is under way.

    Args:
        kernel: a kernel's module; one that was not made for fetching has nothing to let go of.
    """
    if not getattr(kernel, "prefetch_pipeline", False):
        return
    if kernel.prefetch_stream is not None:
        torch.cuda.current_stream(kernel.lxu_cache_weights.device).wait_stream(kernel.prefetch_stream)
    kernel.timesteps_prefetched.clear()
    kernel.lxu_cache_locations_list.clear()
    kernel.prefetched_info_list.clear()
