"""Opens the training files of a config: the rows that are trained, and those that are held out of them for validation."""

from __future__ import annotations

__all__ = ["TrainingSet", "held_out_of_training", "open_training", "open_training_set", "without_held_out"]

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedshard.config import Config
from embedshard.config.parts import DataConfig, EachPartition
from embedshard.data.decode import Decoder
from embedshard.data.inventory import Inventory
from embedshard.data.partitions import Former, Partition, divide, find_partitions
from embedshard.data.source import Source, joined, open_source
from embedshard.data.split import Selection, Split
from embedshard.errors import DataError


@dataclass(frozen=True)
class TrainingSet:
    """The training files, opened.

    Attributes:
        former: what former runs trained, a source for each partition, all rows of it.
        own: the run's partitions, without the rows that are held out for validation.
        names: of the run's partitions.
        newer: names of the partitions that came after the run had begun.
        held_out: the rows that are held out of the run's partitions; None where the config holds none out.
    """

    former: list[Source]
    own: list[Source]
    names: list[str]
    newer: list[str]
    held_out: Source | None


def open_training(config: Config, decoder: Decoder, partitions: Sequence[Partition] | None = None) -> list[Source]:
    """Opens all partitions of the training set, without the rows that are held out for validation.

    Args:
        config: the config.
        decoder: turns columns into arrays.
        partitions: those that there are; None looks for them.

    Raises:
        DataError: as `open_source` does, or if `data.validation_fraction` of the rows is none.
    """
    partitions = find_partitions(config.data) if partitions is None else partitions
    return open_training_set(config, decoder, partitions, Former(), None).own


def open_training_set(
    config: Config, decoder: Decoder, partitions: Sequence[Partition], former: Former, own: Sequence[Inventory] | None
) -> TrainingSet:
    """Opens the training set of a run.

    Args:
        config: the config.
        decoder: turns columns into arrays.
        partitions: those that there are.
        former: what former runs trained.
        own: what the run has kept of its files; None for a new run.

    Raises:
        DataError: as `open_training` does, or if the files are not those that were recorded.
    """
    wanted = partitions
    if own is not None and isinstance(config.data.partitions, EachPartition):
        wanted = partitions[: len(former.inventories) + len(own)]  # newer ones may not be complete yet
    sources = [open_source(partition.patterns, decoder) for partition in wanted]
    before, mine, names, newer = divide(config.data, partitions, sources, former, own)
    inventories = without_held_out(config.data, [source.inventory for source in mine])
    held_out = None
    if config.data.validation_fraction is not None:
        together = joined(mine)
        held_out = together.of(held_out_of_training(config.data, together.inventory))
    mine = [source.of(inventory) for source, inventory in zip(mine, inventories, strict=True)]
    return TrainingSet(before, mine, names, newer, held_out)


def without_held_out(data: DataConfig, inventories: Sequence[Inventory]) -> list[Inventory]:
    """Returns what is trained of each partition, given all that their files hold.

    Raises:
        DataError: if the wanted share of the rows is none.
    """
    split = _split(data, sum(inventory.num_file_rows for inventory in inventories))
    selected, first_row = [], 0
    for inventory in inventories:
        selection = None if split is None else Selection(split, is_held_out=False, first_row=first_row)
        selected.append(replace(inventory, selection=selection))
        first_row += inventory.num_file_rows
    return selected


def held_out_of_training(data: DataConfig, inventory: Inventory) -> Inventory:
    """Returns what is held out, given all files of the training set in the order of the partitions.

    Raises:
        DataError: if the wanted share of the rows is none.
    """
    split = _split(data, inventory.num_file_rows)
    assert split is not None, "asked for where rows are held out"
    return replace(inventory, selection=Selection(split, is_held_out=True, first_row=0))


def _split(data: DataConfig, num_rows: int) -> Split | None:
    if data.validation_fraction is None:
        return None
    split = Split(data.validation_fraction, data.validation_seed, num_rows)
    if not split.num_held_out(0, num_rows):
        raise DataError(
            f"data.validation_fraction={data.validation_fraction:g} of {num_rows} training rows is less than one row, which "
            f"leaves none for validation. Give a larger fraction, or more data."
        )
    return split
