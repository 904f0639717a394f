"""Makes the vocabularies of a config that are counted from its training set, and keeps them as Parquet files.

Each worker counts its share of the row groups; rank 0 merges the counts, so every world makes the same file.
"""

from __future__ import annotations

__all__ = ["DEFAULT_MEMORY_BYTES", "build_vocabularies", "counted_tables", "kept_vocabularies", "loaded_anew"]

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from embedshard.config import Config
from embedshard.config.parts import AutoVocabulary, DenseFeature
from embedshard.data.decode import Decoder, column_specs
from embedshard.data.partitions import Partition
from embedshard.data.source import Source
from embedshard.data.statistics import Statistics
from embedshard.data.tokenizer_training import PreparationProgress, train_tokenizers
from embedshard.data.training_set import open_training
from embedshard.data.vocabulary import Vocabulary, load_vocabularies
from embedshard.errors import DataError
from embedshard.storage import Location, locate, reaching
from embedshard.world import World

if TYPE_CHECKING:
    from embedshard.data.vocabulary_counts import Share

DEFAULT_MEMORY_BYTES: Final = 2 * 1024**3
"""That a process may take while it counts."""


def counted_tables(config: Config) -> dict[str, AutoVocabulary]:
    """Returns the tables whose vocabularies are counted from the training set."""
    return {name: table.vocabulary for name, table in config.tables.items() if isinstance(table.vocabulary, AutoVocabulary)}


def build_vocabularies(
    config: Config,
    folder: Location,
    world: World | None = None,
    progress: PreparationProgress | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    tables: Collection[str] | None = None,
    partitions: Sequence[Partition] | None = None,
) -> dict[str, Location]:
    """Makes the vocabulary of each table that has an `auto` one: <folder>/<table>.parquet. Collective.

    Args:
        config: the config.
        folder: where they are kept; all workers reach it.
        world: the processes that share the work; None is this one alone.
        progress: hears on rank 0 how far its share is.
        memory_bytes: that a process may take.
        tables: which; None is all that have an `auto` vocabulary.
        partitions: of the training set, the same for all; None looks for them.

    Raises:
        DataError: if a file cannot be read, or a vocabulary has no ids.
        StorageError: if the folder, or that of temporary files, cannot be written or is full.
    """
    wanted = {name: each for name, each in counted_tables(config).items() if tables is None or name in tables}
    if not wanted:
        return {}
    if world is None or world.is_rank_zero:
        with reaching(folder):
            folder.make_dirs()
    kept = {}
    for table, vocabulary in wanted.items():
        sources = _open(config, table, partitions)
        kept[table] = folder.join(f"{table}.parquet")
        _build(config, table, vocabulary, sources, kept[table], world, progress, memory_bytes)
    return kept


def kept_vocabularies(config: Config, folder: Location) -> dict[str, Location]:
    """Returns the vocabularies that `build_vocabularies` has made in a folder.

    Raises:
        DataError: if one is not there.
    """
    kept = {table: folder.join(f"{table}.parquet") for table in counted_tables(config)}
    for table, location in kept.items():
        with reaching(location):
            is_there = location.exists()
        if not is_there:
            raise DataError(
                f"{location.uri} is not there: the vocabulary of table '{table}', which was counted when the run began. "
                f"Restore it from a backup, or start a new run."
            )
    return kept


@contextmanager
def loaded_anew(config: Config, progress: PreparationProgress | None = None) -> Iterator[dict[str, Vocabulary]]:
    """Makes the tokenizers and the vocabularies of a config that is not a run's, for as long as they are looked at.

    Raises:
        DataError: as `train_tokenizers`, `build_vocabularies` and `load_vocabularies` do.
        ConfigError: if a table's rows and its vocabulary's differ.
    """
    tokenizers = train_tokenizers(config, progress)
    with tempfile.TemporaryDirectory(prefix="embedshard-vocabularies-") as folder:
        counted = build_vocabularies(config, locate(folder), None, progress)
        yield load_vocabularies(config, tokenizers, counted)


def _open(config: Config, table: str, partitions: Sequence[Partition] | None = None) -> list[Source]:
    """Opens the training set for the ids of one table."""
    names = [name for name, _ in _features(config, table)]
    decoder = Decoder(column_specs(config, "train"), load_vocabularies(config), Statistics(), config.data.on_bad_row)
    return open_training(config, decoder.narrowed(names), partitions)


def _features(config: Config, table: str) -> list[tuple[str, Any]]:
    return [
        (name, feature)
        for name, feature in config.features.items()
        if not isinstance(feature, DenseFeature) and feature.table == table
    ]


def _build(
    config: Config,
    table: str,
    vocabulary: AutoVocabulary,
    sources: Sequence[Source],
    kept: Location,
    world: World | None,
    progress: PreparationProgress | None,
    memory_bytes: int,
) -> None:
    # Here, since DuckDB takes a moment and 17 MiB, and most runs count nothing.
    from embedshard.data.vocabulary_counts import count_share, merge_shares

    features = {name: feature.model_dump(mode="json") for name, feature in _features(config, table)}
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)

    def told(done: int, total: int) -> None:
        if progress is not None and rank == 0:
            progress(f"vocabulary of table '{table}'", done, total)

    def part_of(number: int) -> Location:
        return kept.parent.join(f".{table}-{number}.counts.parquet")

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedshard-counts-")))

        def count() -> Share:
            share = count_share(sources, table, rank, world_size, memory_bytes, scratch, told)
            if rank:
                with reaching(part_of(rank)):
                    part_of(rank).put_file(share.path)
                share.path.unlink()
            return share

        def merge(shares: Sequence[Share]) -> None:
            for number, share in enumerate(shares[1:], start=1):
                with reaching(part_of(number)):
                    part_of(number).get_file(scratch / share.path.name)
                    part_of(number).delete_file()
            own = [replace(share, path=scratch / share.path.name) for share in shares]
            path = merge_shares(own, vocabulary, sources, table, features, memory_bytes, scratch)
            with reaching(kept):
                kept.put_file(path)

        if world is None:
            merge([count()])
        else:
            shares = world.on_all_ranks(count)
            world.from_rank_zero(lambda: merge(shares))
