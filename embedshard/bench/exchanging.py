"""Between workers: ids to the rows' workers and vectors back, beside a plain all-to-all of as many bytes."""

from __future__ import annotations

__all__ = ["SentBytes", "exchange_measures"]

from itertools import cycle
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from embedshard.bench.computing import OWN_LOOKUP, lookup_of, take_batches
from embedshard.bench.machine import copied_memory
from embedshard.bench.measure import Limit, Measure, Timer, waiting
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.neighbours import Neighbours
from embedshard.train.assembly import Assembly
from embedshard.world import World

_NAMES: Final = ("input all-to-all", "output all-to-all")
_RAW: Final = "plain all-to-all"


class SentBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base is untyped
    """Counts the bytes that this rank gives to collectives for other ranks, whatever calls them.

    Args:
        world: whose rank this is.
    """

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_torch = 0.0
        self._rank, self._world_size = world.rank, world.world_size
        self._neighbours = world.group if isinstance(world.group, Neighbours) else None
        self._before = self._by_memory

    @property
    def total(self) -> float:
        """The bytes so far."""
        return self._by_torch + self._by_memory - self._before

    @property
    def _by_memory(self) -> int:
        return 0 if self._neighbours is None else self._neighbours.sent_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a collective and lets it go on."""
        name = func.name().partition("::")
        if name[0] in ("c10d", "_c10d_functional"):
            self._by_torch += self._sent(name[2].partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> float:
        others = (self._world_size - 1) / self._world_size
        if name == "alltoall_base_":
            return self._of_splits(args[1], args[4])
        if name == "all_to_all_single":
            return self._of_splits(args[0], args[2])
        if name in ("_reduce_scatter_base_", "_allgather_base_"):
            given, is_gathered = args[1], name == "_allgather_base_"
            return _bytes(given) * (self._world_size - 1 if is_gathered else others)
        if name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            return _bytes(args[0]) * (self._world_size - 1 if name == "all_gather_into_tensor" else others)
        if name == "reduce_scatter_":
            return sum(_bytes(part) for parts in args[1] for place, part in enumerate(parts) if place != self._rank)
        return 0.0

    def _of_splits(self, tensor: torch.Tensor, splits: list[int]) -> float:
        if not splits:
            return _bytes(tensor) * (self._world_size - 1) / self._world_size
        row = _bytes(tensor) / max(sum(splits), 1)
        return row * (sum(splits) - splits[self._rank])


def _bytes(tensor: torch.Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def exchange_measures(parts: Assembly, timer: Timer) -> list[Measure]:
    """Measures the two all-to-alls of a forward pass in a world of several. Collective.

    The rates are this rank's: bytes that it sends to others. They are from the marks that training's waterfall is of; all
    ranks begin each pass together.
    """
    world, lookup = parts.world, lookup_of(parts.model)
    if lookup is None:
        return [Measure(name, f"{world.world_size} workers", not_applicable=OWN_LOOKUP) for name in _NAMES]
    batches = cycle(take_batches(parts))
    names, laps = ("input_dist", "output_dist"), parts.laps
    taken: dict[str, list[float]] = {name: [] for name in names}

    def look_up() -> None:
        before = dict(laps.seconds)
        laps.restart()
        with torch.no_grad():
            lookup(next(batches))
        for name in names:
            taken[name].append(laps.seconds[name] - before[name])

    sent = _counted(parts, lookup)
    raw = {name: _AllToAll(sent[name], world) for name in names}
    with waiting(laps, world.device):
        turns = timer.in_turns([(look_up, None), (raw["input_dist"], None), (raw["output_dist"], None)])
    peak = timer.peak_bytes
    measures = [_plain(raw["output_dist"], turns[2], timer, world)]
    for name, shown, limit in zip(names, _NAMES, turns[1:], strict=True):
        local = parts.config.train.global_batch_size // world.world_size
        what = f"{sent[name] / 2**20:,.2f} MiB to other workers, of {world.world_size}, for {local:,} samples each"
        if not sent[name]:
            why = (
                "the plan sends nothing: all tables lie on every worker"
                if name == "output_dist"
                else "the plan sends no ids"
            )
            measures.append(Measure(shown, what, not_applicable=why))
            continue
        note = "ids are told apart by worker in it" if name == "input_dist" else "from when the vectors were read"
        own = tuple(taken[name][1:])  # without the warm-up
        measures.append(Measure(shown, what, "B", sent[name], own, Limit(_RAW, raw[name].size_bytes, limit), peak, note))
    return measures


def _counted(parts: Assembly, lookup: EmbeddingLookup) -> dict[str, float]:
    """Returns the bytes that a forward pass sends with ids, and with vectors. Collective."""
    counter, [batch] = SentBytes(parts.world), take_batches(parts, 1)
    sent, told = {"input_dist": 0.0, "output_dist": 0.0}, [0.0]

    def at_lap(stage: str) -> float:
        sent["input_dist" if stage == "input_dist" else "output_dist"] += counter.total - told[0]
        told[0] = counter.total
        return 0.0

    parts.laps.lap = at_lap  # type: ignore[method-assign]  # the marks call it; of this one alone, for a while
    try:
        with counter, torch.no_grad():
            lookup(batch)
    finally:
        del parts.laps.lap
    return sent


class _AllToAll:
    """Sends each other rank an equal part of as many bytes as the rank gives that gives most."""

    def __init__(self, size_bytes: float, world: World) -> None:
        each = max(1, round(size_bytes / 4 / max(world.world_size - 1, 1)))
        each = max(int(number) for number in world.gather_objects(each))  # all send alike
        self.size_bytes = 4.0 * each * (world.world_size - 1)
        self._given = torch.ones(each * world.world_size, device=world.device)
        self._taken = torch.empty_like(self._given)
        self._world = world

    def __call__(self) -> None:
        dist.all_to_all_single(self._taken, self._given, group=self._world.group)


def _plain(raw: _AllToAll, seconds: tuple[float, ...], timer: Timer, world: World) -> Measure:
    copied = copied_memory(timer, world.device)
    first = Limit("memory copy", copied.work, copied.seconds[: len(seconds)])
    pairs = min(len(seconds), len(first.seconds))
    return Measure(
        _RAW,
        f"{raw.size_bytes / 2**20:,.2f} MiB to other workers, of {world.world_size}, by torch.distributed",
        "B",
        raw.size_bytes,
        seconds[:pairs],
        Limit(first.name, first.work, first.seconds[:pairs]),
        note="as many bytes as the worker that sends most gives to the output all-to-all",
    )
