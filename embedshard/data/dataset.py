"""Opens all the data of a config: sources, vocabularies, statistics, catalogue, and the order in which rows are trained.

What is found out about the data on the way (inventory, window lengths, statistics) is kept with the run, so that a resumed
run neither finds it out again nor goes on with other data.
"""

from __future__ import annotations

__all__ = ["Dataset", "SetAside", "open_dataset"]

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from embedshard.data.footers import check_first_file
from embedshard.data.huffman import HuffmanTree
from embedshard.data.inventory import Inventory, changes, fingerprint_of
from embedshard.data.negatives import AllRows, CandidateSampler, RowSampler, Sampler
from embedshard.data.order import Order
from embedshard.data.pairs import PairMaker
from embedshard.data.partitions import Former, Partition, find_partitions
from embedshard.data.quarantine import BadRowCounts, Tally, example_of, most_allowed, record, too_many
from embedshard.data.source import Source, open_source
from embedshard.data.statistics import Statistics, compute_statistics, count_ids
from embedshard.data.tokenizer_training import PreparationProgress, train_tokenizers
from embedshard.data.training_set import open_training_set
from embedshard.data.vocabulary import MetVocabulary, Vocabulary, load_vocabularies, table_rows, unknown_number
from embedshard.data.vocabulary_building import build_vocabularies, counted_tables, kept_vocabularies
from embedshard.data.vocabulary_file import IdFile
from embedshard.data.windows import window_steps
from embedshard.errors import DataError
from embedshard.storage import Location, locate
from embedshard.world import World

IntArray = npt.NDArray[np.int64]


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
        former: what the runs trained that this one continues.
        former_train: a source for each of their partitions.
        names: of the run's partitions.
        newer: names of partitions that came after the run had begun.
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
    former: Former = field(default_factory=Former)
    former_train: list[Source] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    _counted: dict[str, tuple[int, IntArray]] = field(default_factory=dict)
    slice_values: Mapping[str, MetVocabulary] = field(default_factory=dict)

    @property
    def known(self) -> list[Source]:
        """All training data up to now, those of former runs in front."""
        return [*self.former_train, *self.train]

    @property
    def bytes_read(self) -> int:
        """Bytes of Parquet, as compressed, that this process has read so far; footers are not counted."""
        return sum(source.byte_count.total for source in (*self.known, *self.held_out.values())) + self.catalogue_bytes

    @property
    def fingerprint(self) -> str:
        """Of all training files."""
        return fingerprint_of([source.inventory for source in self.train])

    def unknown_number(self, table: str) -> int:
        """Returns the greatest number that stands for an id of a table: the row for unknown ids, or what becomes it."""
        return unknown_number(self.vocabularies[table])

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
            "names": list(self.names),
            **({"former": self.former.to_json()} if self.former.inventories else {}),
        }

    def known_counts(self, feature: str) -> IntArray | None:
        """Returns how often each row of a feature's table is met in training, (rows + 1,), as its vocabulary's file tells.

        None where the file was not counted, or counted something else: other features or files, or rows that are set aside.
        """
        config = self.config.features[feature]
        vocabulary = self.vocabularies[getattr(config, "table", "")]
        counted = vocabulary.counted if isinstance(vocabulary, IdFile) else None
        if counted is None or not counted.is_exact or self.train[0].decoder.quarantines or counted.data != self.fingerprint:
            return None
        if _as_counted({feature: config.model_dump(mode="json")}) != _as_counted(counted.features):
            return None
        assert isinstance(vocabulary, IdFile), "it was counted"
        return vocabulary.counts()

    def grow(self, partition: Partition, inventory: Inventory, world: World) -> None:
        """Adds a partition after the last one. Collective.

        What depends on how often ids are met in training (popularity, sub-sampling, the items of a hashed table) is found
        anew, with the partition's rows; whoever holds it takes it again.

        Args:
            partition: where it is.
            inventory: what its files are.
            world: the processes that train together.

        Raises:
            DataError: if it cannot be read, or its files are others by now.
        """
        source = open_source(partition.patterns, self.train[0].decoder)
        changed = changes(inventory, source.inventory)
        if changed:
            raise DataError(
                f"partition {partition.name} was complete and has changed while it was opened: {changed}. Write a partition "
                f"under another name and rename it when it is whole, or name a marker: data.partitions.marker."
            )
        size = source.decoded_bytes()
        self.train.append(source)
        self.names.append(partition.name)
        self.cached.append(size <= self.config.data.cache_bytes)
        self.order = replace(
            self.order,
            window_steps=(*self.order.window_steps, window_steps(self.config, size, source.inventory.num_rows)),
            row_groups=(*self.order.row_groups, tuple(group.num_rows for group in source.inventory.row_groups)),
        )
        _open_what_is_drawn(self, world)

    def count_ids(self, feature: str, num_rows: int, world: World) -> IntArray:
        """Returns how often each row of a feature's table is met in training up to now, (num_rows + 1,). Collective."""
        if not self.former.inventories:
            known = world.from_rank_zero(lambda: self.known_counts(feature))
            if known is not None:
                return known
        num_counted, counts = self._counted.get(feature, (0, np.zeros(num_rows + 1, dtype=np.int64)))
        sources = self.known[num_counted:]
        if sources:
            added = world.from_rank_zero(lambda: sum(count_ids(source, feature, num_rows) for source in sources))
            counts = counts + np.asarray(added)
            self._counted[feature] = len(self.known), counts
        return counts

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
        sources = [source.narrowed(names) for source in self.known]
        if including_validation and self.has("validation"):
            sources.append(self.held_out["validation"].narrowed(names))
        for source in sources:
            for group in range(len(source.inventory.row_groups)):
                columns = source.read_row_group(group)
                users, items = columns[names[0]].values, columns[names[1]].values
                known = (users >= 0) & (items >= 0)
                yield (users, items) if known.all() else (users[known], items[known])


def open_dataset(
    config: Config,
    world: World,
    resolved: Mapping[str, Any] | None,
    progress: PreparationProgress | None = None,
    folder: Location | None = None,
    partitions: Sequence[Partition] | None = None,
) -> Dataset:
    """Opens the data of a config. Collective: rank 0 finds out what has to be counted, for all.

    Args:
        config: the config.
        world: the processes that train together.
        resolved: what the run has kept of its data; None for a new run. Without `partitions` in it, it is what a new run
            takes over from the run that it continues.
        progress: hears on rank 0 how far it is with what takes long.
        folder: where vocabularies that are counted are kept with the run; None keeps them for as long as they are loaded,
            for processes of one machine.
        partitions: those that there are; None looks for them.

    Raises:
        DataError: if a file cannot be read, is not what the config says, or has changed since the run began.
        ConfigError: if vocabularies and tables disagree.
    """
    former, own = Former.from_json((resolved or {}).get("former")), None
    if resolved is not None and "partitions" in resolved:
        own = [Inventory.from_json(partition) for partition in resolved["partitions"]]
    if partitions is None:
        partitions = world.from_rank_zero(lambda: find_partitions(config.data, waits=own is not None))
    specs = column_specs(config, "train")
    if resolved is None and (counted_tables(config) or _has_tokenizers(config)):
        world.from_rank_zero(lambda: check_first_file(partitions[0].patterns, specs))
    tokenizers = _tokenizers(config, world, resolved, progress, partitions)
    vocabularies = _vocabularies(config, world, resolved, tokenizers, progress, folder, partitions)
    rows = table_rows(vocabularies)
    statistics = Statistics.from_json(resolved["statistics"]) if resolved is not None else None
    decoder = Decoder(specs, vocabularies, statistics or Statistics(), config.data.on_bad_row)
    training = open_training_set(config, decoder, partitions, former, own)
    train, former_train = training.own, training.former
    _check_vocabularies(resolved or {}, vocabularies)
    if statistics is None:
        statistics = world.from_rank_zero(lambda: compute_statistics(train))
    train, former_train = ([source.with_statistics(statistics) for source in part] for part in (train, former_train))
    sizes = [source.decoded_bytes() for source in train]
    fits = [size <= config.data.cache_bytes for size in sizes]
    windows = (
        resolved["window_steps"]
        if resolved is not None and own
        else [window_steps(config, size, source.inventory.num_rows) for source, size in zip(train, sizes, strict=True)]
    )
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
    held_out = _open_held_out(config, {**vocabularies, **sliced}, statistics, partitions, former, own)
    skipped = [location.uri for source in (*train, *held_out.values()) for location in source.skipped]
    dataset = Dataset(config, train, held_out, fits, order, rows, vocabularies, statistics, None, None, skipped)
    dataset.tokenizers, dataset.slice_values = tokenizers, slice_values
    dataset.former, dataset.former_train = former, former_train
    dataset.names, dataset.newer = training.names, training.newer
    _open_what_is_drawn(dataset, world)
    return dataset


def _open_what_is_drawn(dataset: Dataset, world: World) -> None:
    """Opens the catalogue, the sampler and the maker of pairs, as far as they are asked for."""
    if isinstance(dataset.config.model, ItemEmbeddingConfig):
        _open_lists(dataset, dataset.config.model, world)
    else:
        _open_items(dataset, world)


def _tokenizers(
    config: Config,
    world: World,
    resolved: Mapping[str, Any] | None,
    progress: PreparationProgress | None,
    partitions: Sequence[Partition],
) -> dict[str, str]:
    """Returns the tokenizers that the run has kept, or new ones where it has none."""
    if resolved is not None:
        return dict(resolved.get("tokenizers", {}))
    if not _has_tokenizers(config):
        return {}
    return world.from_rank_zero(lambda: train_tokenizers(config, progress, partitions))


def _has_tokenizers(config: Config) -> bool:
    return any(isinstance(table.vocabulary, TokenizerVocabulary) for table in config.tables.values())


def _vocabularies(
    config: Config,
    world: World,
    resolved: Mapping[str, Any] | None,
    tokenizers: Mapping[str, str],
    progress: PreparationProgress | None,
    folder: Location | None,
    partitions: Sequence[Partition],
) -> dict[str, Vocabulary]:
    """Returns all vocabularies: of counted ones those that the run has kept, or new ones where it has none. Collective."""
    tables = counted_tables(config)
    if not tables:
        return load_vocabularies(config, tokenizers)
    if resolved is not None:
        assert folder is not None, "what a run has resolved it has kept in a folder"
        return load_vocabularies(config, tokenizers, kept_vocabularies(config, folder))
    with ExitStack() as stack:
        if folder is None:
            prefix = "embedshard-vocabularies-"
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)) if world.is_rank_zero else None
            folder = locate(world.broadcast_object(own))
        counted = build_vocabularies(config, folder, world, progress, partitions=partitions)
        loaded = load_vocabularies(config, tokenizers, counted)
        world.barrier()  # all have loaded them
        return loaded


def _open_held_out(
    config: Config,
    vocabularies: Mapping[str, Vocabulary],
    statistics: Statistics,
    partitions: Sequence[Partition],
    former: Former,
    own: Sequence[Inventory] | None,
) -> dict[str, Source]:
    """Opens the sets that are evaluated, now: a run should not find out at its end that its test set is not there."""
    if not config.evaluate.metrics:
        return {}
    decoder = Decoder(column_specs(config, "evaluation"), vocabularies, statistics, config.data.on_bad_row)
    patterns = {"validation": config.data.validation, "test": config.data.test}
    held_out = {split: open_source(paths, decoder) for split, paths in patterns.items() if paths is not None}
    if config.data.validation_fraction is not None:
        of_training = open_training_set(config, decoder, partitions, former, own).held_out
        assert of_training is not None, "the config holds rows out"
        held_out["validation"] = of_training
    return held_out


def _check_vocabularies(resolved: Mapping[str, Any], vocabularies: Mapping[str, Vocabulary]) -> None:
    for table, fingerprint in resolved.get("vocabularies", {}).items():
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
        counts = dataset.count_ids(model.sequence, num_rows, world)
    dataset.pair_maker = PairMaker(model, config.seed, counts)
    if isinstance(objective, DrawsNegatives):
        dataset.sampler = RowSampler(objective, config.seed, num_rows + 1, counts)
    elif isinstance(objective, SoftmaxConfig):
        dataset.sampler = AllRows(num_rows + 1, config.data.lanes)
    elif goes_down_a_tree:
        assert counts is not None
        dataset.tree = HuffmanTree(counts)


def _as_counted(features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what of features decides which ids are counted."""
    decides = ("kind", "max_length", "keep", "mask_zero")
    return [{"column": one.get("column") or name} | {key: one.get(key) for key in decides} for name, one in features.items()]


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
        counts = dataset.count_ids(item_id, num_rows, world)
    if config.data.catalogue is not None:
        described_by = column_specs(config, "catalogue")
        decoder = Decoder(described_by, dataset.vocabularies, dataset.statistics, config.data.on_bad_row)
        source = open_source(config.data.catalogue, decoder)
        dataset.skipped_files += [location.uri for location in source.skipped if location.uri not in dataset.skipped_files]
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
