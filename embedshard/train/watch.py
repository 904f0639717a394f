"""Waiting for partitions: which are complete, in what order they are taken, and that all ranks learn it together.

Rank 0 looks, all ranks wait. A partition with a marker (`data.partitions.marker`) is complete when the marker is there.
Without one it is complete when two looks, `poll_s` apart, have found the same files with the same sizes and times, and the
footer of each can be read.
"""

from __future__ import annotations

__all__ = ["Arrival", "Watch"]

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedshard.config.parts import DataConfig, EachPartition
from embedshard.data.inventory import Inventory
from embedshard.data.partitions import Former, Partition, find_partitions
from embedshard.data.source import inventory_of
from embedshard.errors import DataError
from embedshard.storage import expand
from embedshard.train.stop import Notices
from embedshard.world import World

_LOOK_AT_NOTICES_S = 0.2


@dataclass(frozen=True)
class Arrival:
    """A partition that is complete, and its files."""

    partition: Partition
    inventory: Inventory


@dataclass
class Watch:
    """Looks for partitions.

    Attributes:
        data: the config's part.
        poll_s: seconds between two looks.
        say: told on rank 0 why a partition whose files do not change any more is still waited for.
    """

    data: DataConfig
    poll_s: float
    say: Callable[[str], None] = lambda sentence: None
    _said: str = ""
    _seen: dict[str, Any] = field(default_factory=dict)
    _next_look: float = 0.0

    def wait(self, world: World, known: Sequence[str], notices: Notices) -> list[Arrival]:
        """Waits until there is a partition after those that are known, or a stop is asked for on any rank. Collective.

        Args:
            world: the processes that wait together.
            known: names of the partitions that were taken, by this run and those that it continues.
            notices: what this rank is asked from outside; entered.

        Returns:
            The complete partitions that follow, in order; empty if a stop was asked for.

        Raises:
            DataError: if what there is does not begin with what is known, or cannot be looked through.
        """
        while True:
            found: list[Arrival] = []
            if world.is_rank_zero and time.monotonic() >= self._next_look:
                found = self._look(known)
                # Where several are there, nobody need wait for those after the first.
                self._next_look = time.monotonic() + (self.poll_s if len(found) < 2 else 0.0)
            told = world.gather_objects((found, notices.stop is not None))
            if any(stop for _, stop in told):
                return []
            if told[0][0]:
                return list(told[0][0])
            time.sleep(min(_LOOK_AT_NOTICES_S, self.poll_s))

    def first(self, world: World, former: Former, notices: Notices) -> list[Partition]:
        """Waits for the first partitions of a run; returns them behind those that former runs trained. Collective."""
        with notices:
            arrived = self.wait(world, former.names, notices)
        if not arrived:
            return []
        before = world.from_rank_zero(lambda: find_partitions(self.data, waits=True)[: len(former.names)])
        return [*before, *(arrival.partition for arrival in arrived)]

    def _look(self, known: Sequence[str]) -> list[Arrival]:
        there = find_partitions(self.data, waits=True)
        for number, name in enumerate(known):
            now = there[number].name if number < len(there) else None
            if now != name:
                is_missing = name not in [partition.name for partition in there]
                met = f"'{name}' is missing" if is_missing else f"'{now}' is new, before '{name}', which was trained"
                raise DataError(
                    f"the training data have not only grown: {met}. What was trained must stay, in front of what is new: "
                    "put it back, or give new partitions names that come later, then resume."
                )
        arrived = []
        for partition in there[len(known) :]:
            inventory = self._inventory_if_complete(partition)
            if inventory is None:
                break
            arrived.append(Arrival(partition, inventory))
        return arrived

    def _inventory_if_complete(self, partition: Partition) -> Inventory | None:
        is_marked = isinstance(self.data.partitions, EachPartition) and self.data.partitions.marker is not None
        try:
            files = expand(partition.patterns).files
            signs = [(file.path, *file.version()) for file in files]
        except (DataError, FileNotFoundError):  # no file yet, or one that is renamed at this moment
            if is_marked:
                raise
            return None
        was, self._seen[partition.name] = self._seen.get(partition.name), signs
        if not is_marked and was != signs:
            return None
        try:
            return inventory_of(partition.patterns)
        except DataError as error:
            if is_marked:
                raise
            reason = f"Partition {partition.name} is not complete yet: {error}"
            if reason != self._said:
                self._said = reason
                self.say(reason)
            return None
