"""Marks on a sharded model that end the stages of a training step where the model's code cannot: around its lookups."""

from __future__ import annotations

__all__ = ["mark_lookups"]

from collections.abc import Callable
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardedModule

from embedshard.models.embeddings import EmbeddingLookup
from embedshard.stages import Laps


def mark_lookups(model: nn.Module, laps: Laps) -> None:
    """Makes a model's lookups end stages; in training alone. Call it once.

    `input_dist` ends where a collection begins to read its rows (where ids of managed vocabularies become rows, that is in
    it), `lookup` where the vectors are on their way, `output_dist` where all have come. What was before a lookup in the same
    forward pass is `dense_forward`.
    """
    for module in model.modules():
        if isinstance(module, EmbeddingLookup):
            mark = _Marks(laps)
            module.register_forward_pre_hook(mark.begin)
            module.register_forward_hook(mark.end)
            for collection in module.modules():
                if isinstance(collection, ShardedModule):
                    collection.register_forward_pre_hook(mark.begin_collection)
                    # A collection that is looked up directly (`alone.py`) has a forward pass of its own, and no exchange.
                    reads = "forward" if "forward" in vars(collection) else "compute_and_output_dist"
                    setattr(collection, reads, _timed(collection, getattr(collection, reads), laps))


class _Marks:
    """The marks of one lookup."""

    def __init__(self, laps: Laps) -> None:
        self._laps = laps
        self._is_first = False

    def begin(self, module: nn.Module, given: object) -> None:
        if module.training:
            self._laps.lap("dense_forward")
            self._is_first = True

    def begin_collection(self, module: nn.Module, given: object) -> None:
        """Ends the former collection's way back, where there is one."""
        if module.training and not self._is_first:
            self._laps.lap("output_dist")
        self._is_first = False

    def end(self, module: nn.Module, given: object, vectors: object) -> None:
        if module.training:
            self._laps.lap("output_dist")


def _timed(module: nn.Module, work: Callable[..., Any], laps: Laps) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        if not module.training:
            return work(*given, **named)
        laps.lap("input_dist")
        found = work(*given, **named)
        laps.lap("lookup")
        return found

    return timed
