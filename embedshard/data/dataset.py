"""Opens all the data of a config: sources, vocabularies, statistics, catalogue, and the order in which rows are trained.

What is found out about the data on the way (inventory, window lengths, statistics) is kept with the run, so that a resumed
run neither finds it out again nor goes on with other data.
"""

from __future__ import annotations

__all__ = ["Dataset", "SetAside", "open_dataset"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedshard.config import POINTWISE_METRICS, Config
from embedshard.config.parts import (
    DrawsNegatives,
    HashVocabulary,
    HierarchicalSoftmaxConfig,
    ItemEmbeddingConfig,
    SoftmaxConfig,
    TokenizerVocabulary,
)
from embedshard.data.catalogue import Catalogue, catalogue_from_columns, catalogue_from_rows
from embedshard.data.columns import Columns, concatenate, good_rows, num_rows
from embedshard.data.decode import Decoder, column_specs, slice_column
from embedshard.data.huffman import HuffmanTree
from embedshard.data.negatives import AllRows, CandidateSampler, RowSampler, Sampler
from embedshard.data.order import Order
from embedshard.data.pairs import PairMaker
from embedshard.data.quarantine import BadRowCounts, Tally, example_of, most_allowed, record, too_many
from embedshard.data.source import Inventory, Source, check_unchanged, fingerprint_of, open_source
from embedshard.data.statistics import Statistics, compute_statistics, count_ids
from embedshard.data.tokenizer_training import PreparationProgress, train_tokenizers
from embedshard.data.training_set import open_held_out_of_training, open_training
from embedshard.data.vocabulary import MetVocabulary, Vocabulary, load_vocabularies, table_rows
from embedshard.errors import DataError
from embedshard.world import World

IntArray = npt.NDArray[np.int64]

_WINDOW_ROWS = 2**20  # rows of a window over all lanes, where the data do not fit the cache


@dataclass(frozen=True)
class SetAside:
    """What was wrong with a set that is read whole.

    Attributes:
        num_rows: of the set.
        counts: what was wrong with them.
        rows: the rows that were set aside, as `record` returns them.
    """

    num_rows: int
    counts: BadRowCounts
    rows: pa.Table


@dataclass
class Dataset:
    """The opened data of a run.

    Attributes:
        config: the config.
        train: a source for each partition.
        held_out: the validation and the test set, where they are evaluated.
        cached: whether each partition's decoded columns fit the cache.
        order: in which they are trained.
        table_rows: ids of each of the config's tables.
        vocabularies: of each of the config's tables.
        statistics: of standardised features.
        catalogue: the items, where a metric or a sampler needs them.
        sampler: draws candidates, where the objective asks for them.
        skipped_files: what lies among the data of all sets and is not read, since it is not Parquet.
        set_aside: what was wrong with the sets that were read whole so far: `validation`, `test` and `catalogue`.
        catalogue_bytes: that were read for the catalogue.
        tokenizers: the JSON of each table's tokenizer, where it has one.
        pair_maker: makes pairs of lists, where the model learns from them.
        tree: over the ids of these lists, where the objective goes down one.
        slice_values: what each column of `evaluate.slice_by` was seen to hold.
    """

    config: Config
    train: list[Source]
    held_out: dict[str, Source]
    cached: list[bool]
    order: Order
    table_rows: dict[str, int]
    vocabularies: Mapping[str, Vocabulary]
    statistics: Statistics
    catalogue: Catalogue | None
    sampler: Sampler | None
    skipped_files: list[str]
    set_aside: dict[str, SetAside] = field(default_factory=dict)
    catalogue_bytes: int = 0
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    pair_maker: PairMaker | None = None
    tree: HuffmanTree | None = None
    slice_values: Mapping[str, MetVocabulary] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes of Parquet, as compressed, that this process has read so far; footers are not counted."""
        return sum(source.byte_count.total for source in (*self.train, *self.held_out.values())) + self.catalogue_bytes

    @property
    def fingerprint(self) -> str:
        """Of all training files."""
        return fingerprint_of([source.inventory for source in self.train])

    def vocabulary_fingerprints(self) -> dict[str, str]:
        """Of each table's vocabulary."""
        return {table: vocabulary.fingerprint for table, vocabulary in self.vocabularies.items()}

    def resolved(self) -> dict[str, Any]:
        """Returns what a run keeps of its data, as JSON."""
        return {
            "fingerprint": self.fingerprint,
            "window_steps": list(self.order.window_steps),
            "epoch_steps": self.order.epoch_steps,
            "partition_rows": list(self.order.num_rows),
            "table_rows": dict(self.table_rows),
            "statistics": self.statistics.to_json(),
            "vocabularies": self.vocabulary_fingerprints(),
            "tokenizers": dict(self.tokenizers),
            "partitions": [source.inventory.to_json() for source in self.train],
        }

    def describe_row(self, partition: int, row: int) -> str:
        """Returns the file, row group and row of a partition's row number."""
        return self.train[partition].describe_row(row)

    def has(self, split: str) -> bool:
        """Returns whether there is a validation or a test set to evaluate."""
        return split in self.held_out

    def read_held_out(self, split: str) -> Columns:
        """Reads the validation or the test set whole, in file order, without the rows that are set aside.

        Raises:
            DataError: if it holds what the config does not allow, or more rows are set aside than may be.
        """
        return self.read_whole(split, self.held_out[split])

    def read_whole(self, name: str, source: Source) -> Columns:
        """Reads a set as `read_held_out` does, and notes what was wrong with it."""
        columns = concatenate([source.read_row_group(i) for i in range(len(source.inventory.row_groups))])
        rows, tally = num_rows(columns), Tally(source.decoder)
        counts = BadRowCounts()
        tally.add(tally.of(columns, 0, rows), counts)
        codes = columns["bad"].values if "bad" in columns else np.zeros(0, dtype=np.int16)
        fraction, bad = self.config.data.max_bad_fraction, np.flatnonzero(codes)
        if len(bad) > most_allowed(fraction, rows):
            example = example_of(record(source, bad[:1], codes[bad[:1]].astype(np.int64)))
            hints = [example, "Correct the rows or what the config says of them, or set data.max_bad_fraction higher."]
            raise too_many(f"data.{name}", len(bad), rows, fraction, counts, hints)
        self.set_aside[name] = SetAside(rows, counts, record(source, bad, codes[bad].astype(np.int64)))
        return good_rows(columns)

    def interactions(self, including_validation: bool) -> Iterator[tuple[IntArray, IntArray]]:
        """Yields (rows of the user's table, rows of the item's table) of the training set, a row group at a time.

        Rows that are set aside, and those without a user or an item, are left out.
        """
        names = [name for role in ("user_id", "item_id") if (name := self.config.identity(role)) is not None]
        assert len(names) == 2, "asked for where the config knows users and items"
        sources = [source.narrowed(names) for source in self.train]
        if including_validation and self.has("validation"):
            sources.append(self.held_out["validation"].narrowed(names))
        for source in sources:
            for group in range(len(source.inventory.row_groups)):
                columns = source.read_row_group(group)
                users, items = columns[names[0]].values, columns[names[1]].values
                known = (users >= 0) & (items >= 0)
                yield (users, items) if known.all() else (users[known], items[known])


def open_dataset(
    config: Config, world: World, resolved: Mapping[str, Any] | None, progress: PreparationProgress | None = None
) -> Dataset:
    """Opens the data of a config. Collective: rank 0 finds out what has to be counted, for all.

    Args:
        config: the config.
        world: the processes that train together.
        resolved: what the run has kept of its data; None for a new run.
        progress: hears on rank 0 how far it is with what takes long.

    Raises:
        DataError: if a file cannot be read, is not what the config says, or has changed since the run began.
        ConfigError: if vocabularies and tables disagree.
    """
    tokenizers = _tokenizers(config, world, resolved, progress)
    vocabularies = load_vocabularies(config, tokenizers)
    rows = table_rows(vocabularies)
    specs = column_specs(config, "train")
    statistics = Statistics.from_json(resolved["statistics"]) if resolved is not None else None
    train = open_training(config, Decoder(specs, vocabularies, statistics or Statistics(), config.data.on_bad_row))
    if resolved is not None:
        _check_resumable(resolved, train, vocabularies)
    if statistics is None:
        statistics = world.from_rank_zero(lambda: compute_statistics(train))
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
    slice_values = {column: MetVocabulary() for column in config.evaluate.slice_by}
    sliced: dict[str, Vocabulary] = {slice_column(column): values for column, values in slice_values.items()}
    held_out = _open_held_out(config, {**vocabularies, **sliced}, statistics)
    skipped = [location.uri for source in (*train, *held_out.values()) for location in source.skipped]
    dataset = Dataset(config, train, held_out, fits, order, rows, vocabularies, statistics, None, None, skipped)
    dataset.tokenizers, dataset.slice_values = tokenizers, slice_values
    if isinstance(config.model, ItemEmbeddingConfig):
        _open_lists(dataset, config.model, world)
    else:
        _open_items(dataset, world)
    return dataset


def _tokenizers(
    config: Config, world: World, resolved: Mapping[str, Any] | None, progress: PreparationProgress | None
) -> dict[str, str]:
    """Returns the tokenizers that the run has kept, or new ones where it has none."""
    if resolved is not None:
        return dict(resolved.get("tokenizers", {}))
    if not any(isinstance(table.vocabulary, TokenizerVocabulary) for table in config.tables.values()):
        return {}
    return world.from_rank_zero(lambda: train_tokenizers(config, progress))


def _open_held_out(config: Config, vocabularies: Mapping[str, Vocabulary], statistics: Statistics) -> dict[str, Source]:
    """Opens the sets that are evaluated, now: a run should not find out at its end that its test set is not there."""
    if not config.evaluate.metrics:
        return {}
    decoder = Decoder(column_specs(config, "evaluation"), vocabularies, statistics, config.data.on_bad_row)
    patterns = {"validation": config.data.validation, "test": config.data.test}
    held_out = {split: open_source(paths, decoder) for split, paths in patterns.items() if paths is not None}
    if config.data.validation_fraction is not None:
        held_out["validation"] = open_held_out_of_training(config, decoder)
    return held_out


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


def _open_lists(dataset: Dataset, model: ItemEmbeddingConfig, world: World) -> None:
    """Opens what makes pairs of lists, and what their objective draws or goes down."""
    config, objective = dataset.config, dataset.config.objective
    num_rows = dataset.table_rows[config.features[model.sequence].table]  # type: ignore[union-attr]  # checked: a list
    by_popularity = isinstance(objective, DrawsNegatives) and objective.distribution == "popularity"
    goes_down_a_tree = isinstance(objective, HierarchicalSoftmaxConfig)
    counts = None
    if model.subsample is not None or by_popularity or goes_down_a_tree:
        counts = _count(dataset, model.sequence, num_rows, world)
    dataset.pair_maker = PairMaker(model, config.seed, counts)
    if isinstance(objective, DrawsNegatives):
        dataset.sampler = RowSampler(objective, config.seed, num_rows + 1, counts)
    elif isinstance(objective, SoftmaxConfig):
        dataset.sampler = AllRows(num_rows + 1, config.data.lanes)
    elif goes_down_a_tree:
        assert counts is not None
        dataset.tree = HuffmanTree(counts)


def _count(dataset: Dataset, feature: str, num_rows: int, world: World) -> IntArray:
    """Returns how often each row of a feature's table is met in training, (num_rows + 1,). Collective."""
    counted = world.from_rank_zero(lambda: sum(count_ids(source, feature, num_rows) for source in dataset.train))
    return np.asarray(counted)


def _open_items(dataset: Dataset, world: World) -> None:
    """Opens the catalogue and the sampler, if anything asks for them."""
    config = dataset.config
    ranks = any(name not in POINTWISE_METRICS for name in config.evaluate.metrics)
    objective = config.objective if isinstance(config.objective, DrawsNegatives) else None
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
        counts = _count(dataset, item_id, num_rows, world)
    if config.data.catalogue is not None:
        described_by = column_specs(config, "catalogue")
        decoder = Decoder(described_by, dataset.vocabularies, dataset.statistics, config.data.on_bad_row)
        source = open_source(config.data.catalogue, decoder)
        dataset.skipped_files += [location.uri for location in source.skipped]
        columns = dataset.read_whole("catalogue", source)
        dataset.catalogue_bytes = source.byte_count.total
        dataset.catalogue = catalogue_from_columns(item_id, columns, num_rows + 1, ", ".join(config.data.catalogue))
    elif hashed:
        assert counts is not None
        dataset.catalogue = catalogue_from_rows(item_id, np.flatnonzero(counts).astype(np.int64), num_rows + 1)
    else:
        dataset.catalogue = catalogue_from_rows(item_id, np.arange(num_rows, dtype=np.int64), num_rows + 1)
    if objective is not None:
        dataset.sampler = CandidateSampler(objective, config.seed, dataset.catalogue, counts)
