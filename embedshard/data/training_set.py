"""Opens the training files of a config: the rows that are trained, and those that are held out of them for validation."""

from __future__ import annotations

__all__ = ["held_out_of_training", "open_held_out_of_training", "open_training", "without_held_out"]

from collections.abc import Sequence
from dataclasses import replace

from embedshard.config import Config
from embedshard.config.parts import DataConfig
from embedshard.data.decode import Decoder
from embedshard.data.source import Inventory, Source, joined, open_source
from embedshard.data.split import Selection, Split
from embedshard.errors import DataError


def open_training(config: Config, decoder: Decoder) -> list[Source]:
    """Opens each partition of the training set, without the rows that are held out for validation.

    Raises:
        DataError: as `open_source` does, or if `data.validation_fraction` of the rows is none.
    """
    sources = [open_source(patterns, decoder) for patterns in config.data.train_partitions]
    inventories = without_held_out(config.data, [source.inventory for source in sources])
    return [source.of(inventory) for source, inventory in zip(sources, inventories, strict=True)]


def open_held_out_of_training(config: Config, decoder: Decoder) -> Source:
    """Opens the rows that `data.validation_fraction` holds out, of all partitions one after the other.

    Raises:
        DataError: as `open_training` does.
    """
    source = joined([open_source(patterns, decoder) for patterns in config.data.train_partitions])
    return source.of(held_out_of_training(config.data, source.inventory))


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
