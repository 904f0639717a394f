"""Gradients of the dense part, summed over the workers while the backward pass goes on.

DDP would do, but for three things. It lays its buckets out anew after its first step, so that a run that resumes would add
more than two workers' numbers up in another order than one that was not stopped. It does not where it looks for parameters
that a step did not use, which costs a collective a step. And it waits for its sums at the end of the backward pass's first
half.
"""

from __future__ import annotations

__all__ = ["DenseGradients"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from embedshard.world import World

BUCKET_BYTES: Final = 25 * 2**20
"""Of the gradients that travel together, where there are more: as in DDP."""


class DenseGradients:
    """Makes the gradients of parameters that every worker holds the same on all of them.

    They travel in buckets, those of the last parameters first, as those are whole first. Which are together depends on the
    parameters alone, and all workers send them in the same order.

    Args:
        parameters: by name, the same on all ranks; each gets rank 0's values. Collective.
        world: whose ranks train together.
        bucket_bytes: of a bucket; one that a parameter alone is larger than holds it alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world = world
        self._buckets = [_Bucket(together) for together in _in_buckets(list(parameters.values()), bucket_bytes)]
        self._num_sent = 0
        if world.world_size == 1:
            return  # there is nobody to send to
        for parameter in parameters.values():
            dist.broadcast(parameter.data, group=world.group, group_src=0)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                arrived = partial(self._arrived, bucket)
                parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Sets all gradients to zero, before a backward pass."""
        self._num_sent = 0
        for bucket in self._buckets:
            bucket.clear()

    def finish(self, factor: float = 1.0) -> None:
        """Waits until each gradient is the sum over the ranks, times a factor. Collective."""
        for bucket in self._buckets[self._num_sent :]:
            bucket.send(self._world)
        for bucket in self._buckets:
            bucket.wait(factor)

    def _arrived(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        """Sends the buckets that are whole, in their order."""
        bucket.num_missing -= 1
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].num_missing == 0:
            self._buckets[self._num_sent].send(self._world)
            self._num_sent += 1


def _in_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        num_bytes = parameter.numel() * parameter.element_size()
        if not buckets or size + num_bytes > bucket_bytes or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return buckets


@dataclass
class _Bucket:
    """Gradients that travel together.

    Attributes:
        parameters: whose gradients are views of `flat` during a backward pass.
        flat: the gradients, one after the other.
        num_missing: of gradients that are still to come.
    """

    parameters: list[nn.Parameter]
    num_missing: int = 0
    _work: Any = None
    flat: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.flat = first.new_zeros(sum(parameter.numel() for parameter in self.parameters), requires_grad=False)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._views = [
            part.view(parameter.shape)
            for part, parameter in zip(torch.split(self.flat, sizes), self.parameters, strict=True)
        ]

    def clear(self) -> None:
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view  # whoever made the optimizer's state has put another there
        self.num_missing, self._work = len(self.parameters), None

    def send(self, world: World) -> None:
        if world.world_size > 1:
            self._work = dist.all_reduce(self.flat, group=world.group, async_op=True)

    def wait(self, factor: float) -> None:
        if self._work is not None:
            self._work.wait()
        if factor != 1.0:
            self.flat.mul_(factor)
