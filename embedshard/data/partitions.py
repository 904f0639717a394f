"""The partitions of the training data: which there are, which of them a run has, and which came after it began.

A run's partitions are those of its inventory. In front of them are those that former runs trained, where it continues one;
after them may be some that are newer than the run. A data set that is not partitioned is one partition of all its files; of
one that has grown, the files after those that were trained are a partition of their own.
"""

from __future__ import annotations

__all__ = ["Former", "Partition", "divide", "find_partitions"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedshard.config.parts import DataConfig, EachPartition
from embedshard.data.inventory import Inventory, changes
from embedshard.data.source import Source
from embedshard.errors import DataError
from embedshard.storage import expand_each, reaching


@dataclass(frozen=True)
class Partition:
    """Where a partition's files are.

    Attributes:
        name: what names it wherever the data lie; empty where the data are not partitioned.
        patterns: of its files.
    """

    name: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Former:
    """What the runs trained that a run continues.

    Attributes:
        names: of their partitions.
        inventories: their files.
        steps: optimizer steps that were done.
    """

    names: tuple[str, ...] = ()
    inventories: tuple[Inventory, ...] = ()
    steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns what a run keeps of it."""
        partitions = [inventory.to_json() for inventory in self.inventories]
        return {"steps": self.steps, "names": list(self.names), "partitions": partitions}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any] | None) -> Former:
        """Returns what a run has kept; nothing where it continues none."""
        if kept is None:
            return cls()
        inventories = tuple(Inventory.from_json(partition) for partition in kept["partitions"])
        return cls(tuple(kept["names"]), inventories, kept["steps"])


def find_partitions(data: DataConfig, waits: bool = False) -> list[Partition]:
    """Returns the partitions that there are now, in order, up to the first whose marker is not there yet.

    Args:
        data: the config's part.
        waits: whether those that are not there are waited for, so that it is no error if there are none, or if one without
            a marker is before others that have it.

    Raises:
        DataError: if there are none, one is passed over, or the data cannot be looked through.
    """
    if data.train is not None:
        return [Partition("", tuple(data.train))]
    if not isinstance(data.partitions, EachPartition):
        return [Partition("/".join(glob.rstrip("/").split("/")[-2:]), (glob,)) for glob in data.partitions or ()]
    each, marker = data.partitions.each, data.partitions.marker
    found: list[Partition] = []
    unmarked: list[str] = []
    for name, location in expand_each(each):
        with reaching(location):
            if marker is not None and location.is_file():
                raise DataError(
                    f"data.partitions.each: {each} names the file {location.uri}, and data.partitions.marker is looked for "
                    "in folders. Let 'each' name folders, or leave 'marker' out."
                )
            is_marked = marker is None or location.join(marker).is_file()
        if not is_marked:
            unmarked.append(name)
        elif not unmarked:
            found.append(Partition(name, (location.uri,)))
        elif not waits:
            raise DataError(
                f"data.partitions.each: '{unmarked[0]}' has no {marker} yet, and '{name}' after it has. Partitions are "
                "trained in order: complete the former, or take it away."
            )
    if not found and not waits:
        why = f"none of the {len(unmarked)} that it names has a {marker} yet" if unmarked else "it names nothing"
        raise DataError(
            f"data.partitions.each: {each}: {why}. There must be a partition: correct the path, or make the data."
        )
    return found


def divide(
    data: DataConfig,
    partitions: Sequence[Partition],
    sources: Sequence[Source],
    former: Former,
    own: Sequence[Inventory] | None,
) -> tuple[list[Source], list[Source], list[str], list[str]]:
    """Divides the training data into what former runs trained, what this run has, and what is newer.

    Args:
        data: the config's part.
        partitions: those that there are.
        sources: of each that matters, opened.
        former: what former runs trained.
        own: the files of the run's own partitions; None for a new run, whose are all that are new.

    Returns:
        Former runs' sources, the run's, the names of the run's partitions, and the names of newer ones.

    Raises:
        DataError: if what was recorded is not in front as it was, or a new run has nothing new.
    """
    recorded = [*former.inventories, *(own or ())]
    names = [partition.name for partition in partitions]
    if data.train is not None:
        _check_files(sources[0], recorded, former, own is None)
        sources = _cut(sources[0], recorded)
        names = [""] * len(sources)
    for number, saved in enumerate(recorded):
        changed = changes(saved, sources[number].inventory) if number < len(sources) else "it is missing"
        if changed:
            _refuse(number, changed, names, former)
    first, last = len(former.inventories), len(recorded) if own is not None else len(sources)
    newer = sources[last:]
    if newer:
        new_files = "; ".join(f"{file.name} is new" for source in newer for file in source.inventory.files[:5])
        raise DataError(
            f"the training data have changed since the run began: {new_files}. A run resumes on the data it began with. To "
            f"train what is new when this run has ended: embedshard train --continue RUN_DIR."
        )
    if last == first and former.inventories:
        raise DataError(
            f"nothing new: all {first} partitions that there are were trained by the run that is continued. Continue it "
            "when there are more, or wait for them with --watch."
        )
    return list(sources[:first]), list(sources[first:last]), names[first:last], names[last:]


def _check_files(source: Source, recorded: Sequence[Inventory], former: Former, is_new: bool) -> None:
    """Checks that the files that were recorded are in front of all files of a data set that is not partitioned."""
    files, now = tuple(file for inventory in recorded for file in inventory.files), source.inventory.files
    if now[: len(files)] == files:
        return
    names = {file.name for file in files}
    end = 1 + max((place for place, file in enumerate(now) if file.name in names), default=-1)
    changed = changes(Inventory(files), Inventory(now[:end] if is_new else now))
    _refuse(0, changed, [""], former)


def _cut(source: Source, recorded: Sequence[Inventory]) -> list[Source]:
    """Returns the files of a data set that is not partitioned, as they were recorded, and those after them."""
    parts, first = [], 0
    for inventory in recorded:
        last = first + len(inventory.files)
        parts.append(source.part(first, last))
        first = last
    if first < len(source.inventory.files):
        parts.append(source.part(first, len(source.inventory.files)))
    return parts


def _refuse(number: int, changed: str, names: Sequence[str], former: Former) -> None:
    is_former = number < len(former.inventories)
    was = former.names[number] if is_former and number < len(former.names) else ""
    now = names[number] if number < len(names) else ""
    if is_former and was and now != was:
        missing = was not in names
        changed = f"'{was}' is missing" if missing else f"'{now}' is new, before '{was}'"
    what = f"partition {number + 1} ({was or now}): " if was or now else ""
    if is_former:
        raise DataError(
            f"the training data have not only grown since the run that is continued: {what}{changed}. What was trained must "
            f"be the same, in front of what is new: put it back, or start a new run without --continue."
        )
    raise DataError(
        f"the training data have changed since the run began: {what}{changed}. A run resumes on the "
        f"data it began with: put them back, or start a new run."
    )
