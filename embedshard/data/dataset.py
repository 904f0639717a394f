"""Opens all the data of a config: sources, vocabularies, statistics, catalogue, and the order in which rows are trained.

What is found out about the data on the way (inventory, window lengths, statistics) is kept with the run, so that a resumed
run neither finds it out again nor goes on with other data.
"""

from __future__ import annotations

__all__ = ["Dataset", "open_dataset"]

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.config import Config
from embedshard.config.parts import HashVocabulary, SampledSoftmaxConfig
from embedshard.data.catalogue import Catalogue, catalogue_from_columns, catalogue_from_rows
from embedshard.data.columns import Columns, concatenate
from embedshard.data.decode import Decoder, column_specs
from embedshard.data.negatives import CandidateSampler
from embedshard.data.order import Order
from embedshard.data.source import Inventory, Source, check_unchanged, open_source
from embedshard.data.statistics import Statistics, compute_statistics, count_ids
from embedshard.data.vocabulary import Vocabulary, load_vocabularies, table_rows
from embedshard.errors import DataError
from embedshard.world import World

IntArray = npt.NDArray[np.int64]

_WINDOW_ROWS = 2**20  # rows of a window over all lanes, where the data do not fit the cache


@dataclass
class Dataset:
    """The opened data of a run.

    Attributes:
        config: the config.
        train: a source for each partition.
        cached: whether each partition's decoded columns fit the cache.
        order: in which they are trained.
        table_rows: ids of each of the config's tables.
        vocabularies: of each of the config's tables.
        statistics: of standardised features.
        catalogue: the items, where a metric or a sampler needs them.
        sampler: draws candidates, where the objective asks for them.
    """

    config: Config
    train: list[Source]
    cached: list[bool]
    order: Order
    table_rows: dict[str, int]
    vocabularies: Mapping[str, Vocabulary]
    statistics: Statistics
    catalogue: Catalogue | None
    sampler: CandidateSampler | None

    @property
    def fingerprint(self) -> str:
        """Of all training files."""
        return _fingerprint([source.inventory for source in self.train])

    def vocabulary_fingerprints(self) -> dict[str, str]:
        """Of each table's vocabulary."""
        return {table: vocabulary.fingerprint for table, vocabulary in self.vocabularies.items()}

    def resolved(self) -> dict[str, Any]:
        """Returns what a run keeps of its data, as JSON."""
        return {
            "fingerprint": self.fingerprint,
            "window_steps": list(self.order.window_steps),
            "epoch_steps": self.order.epoch_steps,
            "table_rows": dict(self.table_rows),
            "statistics": self.statistics.to_json(),
            "vocabularies": self.vocabulary_fingerprints(),
            "partitions": [source.inventory.to_json() for source in self.train],
        }

    def describe_row(self, partition: int, row: int) -> str:
        """Returns the file, row group and row of a partition's row number."""
        return self.train[partition].describe_row(row)

    def has(self, split: str) -> bool:
        """Returns whether there is a validation or a test set."""
        return getattr(self.config.data, split) is not None

    def read_held_out(self, split: str) -> Columns:
        """Reads the validation or the test set whole, in file order."""
        return _read_all(self._held_out(split, None))

    def interactions(self, including_validation: bool) -> Iterator[tuple[IntArray, IntArray]]:
        """Yields (rows of the user's table, rows of the item's table) of the training set, a row group at a time."""
        names = [name for role in ("user_id", "item_id") if (name := self.config.identity(role)) is not None]
        assert len(names) == 2, "asked for where the config knows users and items"
        sources = [source.narrowed(names) for source in self.train]
        if including_validation and self.has("validation"):
            sources.append(self._held_out("validation", names))
        for source in sources:
            for group in range(len(source.inventory.row_groups)):
                columns = source.read_row_group(group)
                yield columns[names[0]].values, columns[names[1]].values

    def _held_out(self, split: str, names: Sequence[str] | None) -> Source:
        patterns = getattr(self.config.data, split)
        decoder = Decoder(column_specs(self.config, "evaluation"), self.vocabularies, self.statistics)
        source = open_source(patterns, decoder)
        return source if names is None else source.narrowed(names)


def open_dataset(config: Config, world: World, resolved: Mapping[str, Any] | None) -> Dataset:
    """Opens the data of a config. Collective: rank 0 finds out what has to be counted, for all.

    Args:
        config: the config.
        world: the processes that train together.
        resolved: what the run has kept of its data; None for a new run.

    Raises:
        DataError: if a file cannot be read, is not what the config says, or has changed since the run began.
        ConfigError: if vocabularies and tables disagree.
    """
    vocabularies = load_vocabularies(config)
    rows = table_rows(vocabularies)
    specs = column_specs(config, "train")
    statistics = Statistics.from_json(resolved["statistics"]) if resolved is not None else None
    train = [
        open_source(patterns, Decoder(specs, vocabularies, statistics or Statistics()))
        for patterns in config.data.train_partitions
    ]
    if resolved is not None:
        _check_resumable(resolved, train, vocabularies)
    if statistics is None:
        computed = compute_statistics(train).to_json() if world.is_rank_zero else None
        statistics = Statistics.from_json(world.broadcast_object(computed))
    train = [source.with_statistics(statistics) for source in train]
    fits = [source.decoded_bytes() <= config.data.cache_bytes for source in train]
    windows = resolved["window_steps"] if resolved is not None else [_window_steps(config, fit) for fit in fits]
    order = Order(
        seed=config.seed,
        lanes=config.data.lanes,
        global_batch_size=config.train.global_batch_size,
        window_steps=tuple(windows),
        row_groups=tuple(tuple(group.num_rows for group in source.inventory.row_groups) for source in train),
        shuffle=config.data.shuffle,
    )
    order.lane_block(world.rank, world.world_size)
    dataset = Dataset(config, train, fits, order, rows, vocabularies, statistics, None, None)
    _open_items(dataset, world)
    return dataset


def _window_steps(config: Config, fits_cache: bool) -> int:
    if config.data.window_steps != "auto":
        return config.data.window_steps
    return 0 if fits_cache else max(1, _WINDOW_ROWS // config.train.global_batch_size)


def _check_resumable(resolved: Mapping[str, Any], train: Sequence[Source], vocabularies: Mapping[str, Vocabulary]) -> None:
    saved = [Inventory.from_json(inventory) for inventory in resolved["partitions"]]
    for before, source in zip(saved, train, strict=True):
        check_unchanged(before, source.inventory)
    for table, fingerprint in resolved["vocabularies"].items():
        if vocabularies[table].fingerprint != fingerprint:
            raise DataError(
                f"table '{table}': its vocabulary is another than when the run began, so ids would mean other rows. "
                f"Put the former vocabulary back, or start a new run."
            )


def _open_items(dataset: Dataset, world: World) -> None:
    """Opens the catalogue and the sampler, if anything asks for them."""
    config = dataset.config
    ranks = any(name not in ("rmse", "mae", "log_loss", "auc") for name in config.evaluate.metrics)
    objective = config.objective if isinstance(config.objective, SampledSoftmaxConfig) else None
    if not ranks and objective is None:
        return
    item_id = config.identity("item_id")
    assert item_id is not None, "the config checks that what needs items knows them"
    table = next(feature.table for name, feature in config.features.items() if name == item_id)  # type: ignore[union-attr]
    num_rows = dataset.table_rows[table]
    hashed = isinstance(config.tables[table].vocabulary, HashVocabulary) and config.data.catalogue is None
    by_popularity = objective is not None and objective.distribution == "popularity"
    counts = None
    if hashed or by_popularity:
        counted = sum(count_ids(source, item_id, num_rows) for source in dataset.train) if world.is_rank_zero else None
        counts = np.asarray(world.broadcast_object(counted))
    if config.data.catalogue is not None:
        decoder = Decoder(column_specs(config, "catalogue"), dataset.vocabularies, dataset.statistics)
        columns = _read_all(open_source(config.data.catalogue, decoder))
        dataset.catalogue = catalogue_from_columns(item_id, columns, num_rows + 1, ", ".join(config.data.catalogue))
    elif hashed:
        assert counts is not None
        dataset.catalogue = catalogue_from_rows(item_id, np.flatnonzero(counts).astype(np.int64), num_rows + 1)
    else:
        dataset.catalogue = catalogue_from_rows(item_id, np.arange(num_rows, dtype=np.int64), num_rows + 1)
    if objective is not None:
        dataset.sampler = CandidateSampler(objective, config.seed, dataset.catalogue, counts)


def _read_all(source: Source) -> Columns:
    return concatenate([source.read_row_group(i) for i in range(len(source.inventory.row_groups))])


def _fingerprint(inventories: Sequence[Inventory]) -> str:
    digest = hashlib.sha256()
    for inventory in inventories:
        digest.update(inventory.fingerprint.encode())
    return digest.hexdigest()
