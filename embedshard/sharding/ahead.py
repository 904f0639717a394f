"""The next batch on its way while one is trained: to the device, and its ids to the workers that hold their rows.

What TorchRec's `TrainPipelineSparseDist` does for models that `torch.fx` can trace, done here for any model: ids depend on
nothing that a step changes, so that what is trained is the same bit for bit. Vectors are read when their step has come;
with `train.prefetch`, rows of tables behind a cache are in it by then (`fetched.py`).
"""

from __future__ import annotations

__all__ = ["Ahead"]

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.sharding.fetched import fetches_ahead, fetching, let_go
from embedshard.sharding.shards import fused_kernels
from embedshard.world import World


class Ahead:
    """Brings batches to a sharded model ahead of their steps, at most one at a time.

    In a world of one on a CPU there is nothing to bring. Nothing can be sent before its step where ids of managed
    vocabularies become rows as they are looked up, and where nobody knows what a custom model looks up: then a batch is
    taken as it is.

    Args:
        model: the sharded model, whose collections are looked up by it from now on. Make it once.
        world: whose ranks train together.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._device = world.device
        self._lookups = [module for module in model.modules() if isinstance(module, EmbeddingLookup)]
        self._sends = world.world_size > 1 or world.device.type == "cuda"
        self._stream, self._fetching = _stream(world.device), _stream(world.device)
        self._coming: _Coming | None = None
        self._arrived: dict[nn.Module, _Request] = {}
        self._fetching_kernels: dict[nn.Module, list[Any]] = {}  # of each collection of which some fetch ahead
        self._read: torch.cuda.Event | None = None  # when the last lookups had read their rows
        if self._sends:
            for lookup in self._lookups:
                for collection in lookup.modules():
                    if isinstance(collection, ShardedModule):
                        kernels = [kernel.emb_module for kernel in fused_kernels(collection)]
                        self._fetching_kernels[collection] = kernels if any(map(fetches_ahead, kernels)) else []
                        setattr(collection, "forward", self._looked_up_by(collection, collection.forward))  # noqa: B010
        for kernel in self._all_fetching:
            kernel.lock_cache_line = False
        assert self._is_known or not self._all_fetching, "the config checks that it is known what a step looks up"

    def send(self, batch: Batch) -> None:
        """Begins to bring a batch: tells the workers how many ids each will get. Collective."""
        if not self._sends or not self._is_known:
            return
        with self._beside():
            self._coming = coming = _Coming(batch, batch.to(self._device, non_blocking=True))
            for lookup in self._lookups:
                assert lookup.looked_up_as is not None, "nothing is sent of what nobody knows"
                for collection, ids in lookup.requests(lookup.looked_up_as(coming.on_device)):
                    assert isinstance(collection, ShardedModule), "the model is sharded"
                    context = collection.create_context()
                    coming.under_way[collection] = _Request(ids, context, collection.input_dist(context, ids))

    def send_ids(self) -> None:
        """Sends the ids of a batch that was begun, if one was. Collective."""
        if self._coming is not None:
            with self._beside():
                for request in self._coming.under_way.values():
                    request.answer = request.answer.wait()

    def fetch(self) -> None:
        """Has the rows of a batch whose ids were sent brought into the caches of tables that fetch ahead.

        To be called after this step's lookups, which read the caches first, and before the backward pass of what was looked
        up. Not collective: ranks without such tables do nothing.
        """
        if self._coming is None:
            return
        for collection, request in self._coming.under_way.items():
            kernels = self._fetching_kernels[collection]
            if not kernels:
                continue
            arrived, stream, now = self._ids_of(request), self._fetching, None
            if stream is not None:
                assert self._stream is not None, "there are both or none"
                now = torch.cuda.current_stream(self._device)
                stream.wait_stream(self._stream)
                if self._read is not None:
                    stream.wait_event(self._read)
                arrived.record_stream(stream)
            assert isinstance(collection, ShardedModule), "the model is sharded"
            with nullcontext() if stream is None else torch.cuda.stream(stream), fetching(kernels):
                collection.prefetch(dist_input=arrived, forward_stream=now, ctx=request.context)

    def wait_for_fetching(self) -> None:
        """Has what comes after this step wait for the fetching, as the backward pass of a table does that has one."""
        if self._fetching is not None and self._all_fetching:
            torch.cuda.current_stream(self._device).wait_stream(self._fetching)

    def take(self, batch: Batch) -> Batch:
        """Returns a batch on the device. The model's next forward pass looks it up; if its ids were sent, by these."""
        coming, self._coming = self._coming, None
        if coming is None or coming.batch is not batch:
            self._arrived = {}
            self._let_go()
            return batch.to(self._device)
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            coming.on_device.record_stream(now)
        self._arrived = coming.under_way
        return coming.on_device

    def drop(self) -> None:
        """Lets go of a batch that was begun and whose step will not be taken. Collective."""
        coming, self._coming = self._coming, None
        if coming is not None:
            with self._beside():
                for request in coming.under_way.values():
                    if request.arrived is None:
                        request.answer.wait()
            self._let_go()

    @property
    def _is_known(self) -> bool:
        """Whether it is known, before a step, which rows the step looks up."""
        return all(lookup.to_rows is None and lookup.looked_up_as is not None for lookup in self._lookups)

    @property
    def _all_fetching(self) -> list[Any]:
        return list(chain.from_iterable(self._fetching_kernels.values()))

    def _let_go(self) -> None:
        for kernel in self._all_fetching:
            let_go(kernel)

    def _ids_of(self, request: _Request) -> Any:
        """Returns a request's ids as they arrived, on the stream beside."""
        if request.arrived is None:
            with self._beside():
                request.arrived = request.answer.wait()
        return request.arrived

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _looked_up_by(self, collection: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a collection's forward pass that goes on with what has arrived for it."""

        def look_up(ids: KeyedJaggedTensor) -> Any:
            request = self._arrived.pop(collection, None)
            if request is None:
                for kernel in self._fetching_kernels[collection]:
                    let_go(kernel)  # it is of a step that is still to come: this is an evaluation
                found = forward(ids)
            else:
                assert request.is_of(ids), "a model looks up what its lookup's `looked_up_as` says"
                arrived = self._ids_of(request)
                if self._stream is not None:
                    now = torch.cuda.current_stream(self._device)
                    now.wait_stream(self._stream)
                    if self._fetching is not None and self._fetching_kernels[collection]:
                        now.wait_stream(self._fetching)
                    arrived.record_stream(now)
                    request.context.record_stream(now)
                found = collection.compute_and_output_dist(request.context, arrived)
            if self._fetching is not None and self._fetching_kernels[collection]:
                self._read = torch.cuda.current_stream(self._device).record_event()
            return found

        return look_up


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@dataclass
class _Request:
    """What a collection was asked for ahead of its step.

    Attributes:
        ids: that were sent.
        context: TorchRec's of this lookup.
        answer: what is to be waited for: how many ids come to each worker, then the ids themselves.
        arrived: the ids, once they were waited for.
    """

    ids: KeyedJaggedTensor
    context: Any
    answer: Any
    arrived: Any = None

    def is_of(self, ids: KeyedJaggedTensor) -> bool:
        """Returns whether these ids were sent: whether as many of as many rows were."""
        ours = self.ids.keys(), self.ids.values().numel(), self.ids.lengths().numel()
        return ours == (ids.keys(), ids.values().numel(), ids.lengths().numel())


@dataclass
class _Coming:
    """A batch that is on its way.

    Attributes:
        batch: as it was given.
        on_device: the same on the device.
        under_way: what each collection was asked for.
    """

    batch: Batch
    on_device: Batch
    under_way: dict[nn.Module, _Request] = field(default_factory=dict)
