"""A process group of workers of one machine, which exchange tensors through memory that they share.

It is gloo's group with the collectives of training done otherwise: those that every step has. All else stays gloo's.
Sums are added up in rank order, so that all ranks have the same bits.

Shapes: W ranks.
"""

from __future__ import annotations

__all__ = ["SHARE_MEMORY", "Neighbours", "as_neighbours"]

import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from embedshard.errors import ConfigError
from embedshard.shared_memory import Letter, Post, open_post

SHARE_MEMORY: Final = "EMBEDSHARD_SHARE_MEMORY"
"""Environment variable: 0 leaves all collectives to gloo."""

_BACKEND: Final = "neighbours"
_MOST_READERS: Final = 4
"""Ranks, up to which each adds up whatever all have sent."""
_LARGE_SUM_BYTES: Final = 2**20
_logger = logging.getLogger(__name__)


def as_neighbours(
    group: dist.ProcessGroup, environment: Mapping[str, str], timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """Returns a group of the same processes that shares memory, or the group itself where they cannot. Collective.

    Args:
        group: all processes of this run, of which there are several; gloo's.
        environment: may say that no memory is to be shared: the same on all ranks.
        timeout: of a collective.

    Raises:
        ConfigError: if the environment says neither 0 nor 1.
    """
    wish = environment.get(SHARE_MEMORY, "1")
    if wish not in ("0", "1"):
        raise ConfigError(
            f"{SHARE_MEMORY} is '{wish}'. It must be 1, by which workers of one machine exchange vectors in memory, or 0."
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    if "0" in gather(wish):
        return group
    post = open_post(rank, size, timeout.total_seconds(), gather)
    if isinstance(post, str):
        _logger.info("Workers exchange vectors by gloo and share no memory: %s.", post)
        return group
    neighbours = Neighbours(post, group)
    dist.Backend.register_backend(_BACKEND, lambda *_: neighbours, devices=["cpu"])
    made = dist.new_group(backend=_BACKEND, timeout=timeout)
    assert made is neighbours, "torch takes a group of Python's as it is"
    # TorchRec asks for groups of fewer ranks, by this one's backend: those of a machine, and those across machines.
    dist.Backend.register_backend(_BACKEND, _gloo, devices=["cpu"])
    return neighbours


def _gloo(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


class _Delivery(dist.Work):
    """A collective that is under way: what it leaves in tensors is there after `wait`."""

    def __init__(self, post: Post, letter: Letter, results: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._post, self._letter, self._results = post, letter, results

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Waits for it, as long as the group's time-out says."""
        del timeout
        with torch.no_grad():
            self._post.finish(self._letter)
        return True

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Waits, and returns what is done: DDP, which TorchRec trains tables that all ranks hold by, asks for it."""
        self.wait()
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(list(self._results))
        return future

    def is_completed(self) -> bool:
        """Returns whether it was waited for."""
        return self._letter.is_done


class Neighbours(dist.ProcessGroup):
    """The group.

    Args:
        post: through which parts are sent.
        gloo: gloo's group, for all other collectives.
    """

    def __init__(self, post: Post, gloo: dist.ProcessGroup) -> None:
        super().__init__(post.rank, post.count)  # type: ignore[call-arg]  # the one that a subclass can call
        self._post, self._gloo = post, gloo
        cpu = torch.device("cpu")
        self._register_backend(cpu, dist.ProcessGroup.BackendType.GLOO, gloo._get_backend(cpu))

    @property
    def sent_bytes(self) -> int:
        """The bytes that this rank has sent to others through memory, so far."""
        return self._post.sent_bytes

    def exchange(self, parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> dist.Work:
        """Sends each rank a tensor, and puts what it sends here into a place.

        Args:
            parts: for each rank, of any strides.
            places: for what each rank sends, of any strides; of the part's shape and dtype.
        """
        own = self._post.rank
        return self._deliver([None if rank == own else part for rank, part in enumerate(parts)], parts[own], places)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        _options: Any = None,
    ) -> dist.Work:
        """Sends each rank its rows of a tensor; see `torch.distributed.all_to_all_single`."""
        return self.exchange(_rows(given, input_sizes, self._post.count), _rows(output, output_sizes, self._post.count))

    def allgather(self, outputs: Any, given: Any, options: Any = None, *more: Any) -> Any:
        """Gives all a tensor of each rank."""
        if isinstance(given, torch.Tensor) or len(given) != 1:
            return self._gloo.allgather(outputs, given, options, *more)
        return self._give_all(given[0], outputs[0])

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, _options: Any = None) -> dist.Work:
        """Gives all a tensor of each rank, one after another."""
        return self._give_all(given, _rows(output, [], self._post.count))

    def allreduce(self, tensors: Any, options: Any = None, *more: Any) -> Any:
        """Makes a tensor the sum of all ranks' in place. What is no sum is gloo's."""
        if (
            isinstance(tensors, torch.Tensor)
            or len(tensors) != 1
            or not _is_sum(options)
            or self._is_better_in_a_ring(tensors[0])
        ):
            return self._gloo.allreduce(tensors, options, *more)
        (total,) = tensors
        return self._send([total], lambda taken: _sum(total, taken), [total])

    def reduce_scatter(self, outputs: Any, given: Any, options: Any = None, *more: Any) -> Any:
        """Gives each rank the sum of all ranks' tensors for it."""
        if isinstance(outputs, torch.Tensor) or len(outputs) != 1 or not _is_sum(options):
            return self._gloo.reduce_scatter(outputs, given, options, *more)
        return self._send(given[0], lambda taken: _sum(outputs[0], taken), outputs)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, options: Any = None) -> dist.Work:
        """Gives each rank the sum of all ranks' rows for it."""
        return self.reduce_scatter([output], [_rows(given, [], self._post.count)], options)

    # The names that torch 2.11 has for the same.
    alltoall_base = all_to_all_single  # type: ignore[assignment]
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def _is_better_in_a_ring(self, tensor: torch.Tensor) -> bool:
        """Whether a sum is gloo's, where each rank reads two tensors' worth of bytes and not as many as there are ranks."""
        return self._post.count > _MOST_READERS and tensor.numel() * tensor.element_size() > _LARGE_SUM_BYTES

    def _give_all(self, given: torch.Tensor, places: Sequence[torch.Tensor]) -> dist.Work:
        return self._deliver([given], given, places)

    def _deliver(
        self, sent: Sequence[torch.Tensor | None], own_part: torch.Tensor, places: Sequence[torch.Tensor]
    ) -> dist.Work:
        """Puts what each rank sends into its place; this rank's own part at once, without a way through shared memory."""
        own = self._post.rank
        with torch.no_grad():
            places[own].copy_(own_part)

        def take(taken: Sequence[torch.Tensor]) -> None:
            for rank, (place, part) in enumerate(zip(places, taken, strict=True)):
                if rank != own:
                    place.copy_(_like(rank, place, part))

        return self._send(sent, take, places)

    def _send(
        self,
        parts: Sequence[torch.Tensor | None],
        take: Callable[[Sequence[torch.Tensor]], None],
        results: Sequence[torch.Tensor],
    ) -> dist.Work:
        with torch.no_grad():
            return _Delivery(self._post, self._post.send(parts, take), results)


def _of_gloo(name: str) -> Callable[..., Any]:
    def collective(self: Neighbours, *arguments: Any, **more: Any) -> Any:
        return getattr(self._gloo, name)(*arguments, **more)

    return collective


# A group of Python's calls these of its own with the interpreter's lock held, for which a thread of gloo's may wait while it
# holds gloo's: so they are called of gloo's group, which lets it go.
for _name in (
    "all_gather_single_coalesced", "allgather_into_tensor_coalesced", "allreduce_coalesced", "barrier", "broadcast", "recv",
    "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "send",
):  # fmt: skip
    if hasattr(dist.ProcessGroup, _name):  # torch 2.11 has not all
        setattr(Neighbours, _name, _of_gloo(_name))


def _is_sum(options: Any) -> bool:
    return options is not None and options.reduceOp == dist.ReduceOp.SUM


def _rows(tensor: torch.Tensor, sizes: Sequence[int], count: int) -> list[torch.Tensor]:
    """Returns each rank's rows of a tensor, by their numbers; of as many each where none are told."""
    num_rows = tensor.shape[0]
    if not sizes:
        if num_rows % count:
            raise ValueError(f"{num_rows} rows cannot be shared equally among {count} ranks.")
        sizes = [num_rows // count] * count
    if sum(sizes) != num_rows or len(sizes) != count:
        raise ValueError(f"rows for {count} ranks, {list(sizes)}, are not all rows of a tensor of {num_rows}.")
    return list(torch.split(tensor.detach(), list(sizes)))


def _sum(total: torch.Tensor, taken: Sequence[torch.Tensor]) -> None:
    """Adds up parts in rank order."""
    total = total.detach()
    for rank, part in enumerate(taken):
        if rank:
            total.add_(_like(rank, total, part))
        else:
            total.copy_(_like(rank, total, part))


def _like(rank: int, place: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Returns bytes as a tensor like the one that they are for."""
    expected = place.numel() * place.element_size()
    if len(part) != expected:
        raise RuntimeError(
            f"rank {rank} sent {len(part):,} bytes where {expected:,} were expected: not all ranks do the same."
        )
    return part.view(place.dtype).view(place.shape)
