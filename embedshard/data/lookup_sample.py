"""How often a config's rows look their tables up, and where in them: measured on a sample of the training set.

What a plan is judged by: how many ids a row has under each feature, and which shares of the lookups fall on which rows.
"""

from __future__ import annotations

__all__ = ["FeatureLookups", "LookupSample", "sample_lookups"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.config import Config
from embedshard.config.parts import DenseFeature
from embedshard.data.columns import Flat, good_rows
from embedshard.data.decode import Decoder, column_specs
from embedshard.data.hashing import hash_integers
from embedshard.data.id_counts import FeatureIds, IdCounts
from embedshard.data.spacing import evenly_spaced
from embedshard.data.statistics import Statistics
from embedshard.data.training_set import open_training
from embedshard.data.vocabulary import ManagedIds, Vocabulary, table_rows

IntArray = npt.NDArray[np.int64]

_SAMPLED_ROWS: Final = 1_000_000


@dataclass(frozen=True)
class FeatureLookups:
    """The lookups of a feature.

    Attributes:
        ids_per_row: their mean number.
        counts: of each row that is met.
        found: what the counts come to.
    """

    ids_per_row: float
    counts: IdCounts
    found: FeatureIds


@dataclass(frozen=True)
class LookupSample:
    """What a sample of the training set holds.

    Attributes:
        rows: of the training set.
        sampled_rows: those that were looked at; they lie in evenly spaced row groups.
        decoded_bytes: of the training set, decoded.
        features: by name.
        hottest_ids: by feature, the ids of `found.hottest` as in the data; None where a vocabulary does not keep them.
    """

    rows: int
    sampled_rows: int
    decoded_bytes: int
    features: Mapping[str, FeatureLookups]
    hottest_ids: Mapping[str, Sequence[int | str | None]]


def sample_lookups(config: Config, vocabularies: Mapping[str, Vocabulary]) -> LookupSample:
    """Reads the ids of a sample of the training set.

    Raises:
        DataError: if the data are not there, cannot be read, or are not what the config says.
    """
    decoder = Decoder(column_specs(config, "train"), vocabularies, Statistics(), config.data.on_bad_row)
    sources = open_training(config, decoder)
    tables = {name: feature.table for name, feature in config.features.items() if not isinstance(feature, DenseFeature)}
    rows = table_rows(vocabularies)
    compositions = {name: config.tables[table].composition for name, table in tables.items()}
    counts = {
        name: IdCounts(table, rows[table] if composition is None else composition.rows)
        for (name, table), composition in zip(tables.items(), compositions.values(), strict=True)
    }
    groups = [(source, group) for source in sources for group in range(len(source.inventory.row_groups))]
    sizes = [source.inventory.row_groups[group].num_rows for source, group in groups]
    sampled = sorted(evenly_spaced(sizes, _SAMPLED_ROWS))
    for number in sampled:
        source, group = groups[number]
        columns = good_rows(source.narrowed(list(tables)).read_row_group(group))
        for name, counter in counts.items():
            column, table, composition = columns[name], tables[name], compositions[name]
            ids = column.values if isinstance(column, Flat) else column.values[column.offsets[0] : column.offsets[-1]]
            if isinstance(vocabularies[table], ManagedIds):
                ids = _any_rows(ids, rows[table])
            counter.add(ids if composition is None else composition.rows_of(ids[ids >= 0])[0])
    sampled_rows = sum(sizes[number] for number in sampled)
    found = {name: counter.result() for name, counter in counts.items()}
    return LookupSample(
        rows=sum(sizes),
        sampled_rows=sampled_rows,
        decoded_bytes=sum(source.decoded_bytes() for source in sources),
        features={name: FeatureLookups(found[name].lookups / sampled_rows, counts[name], found[name]) for name in tables},
        hottest_ids={
            name: [None] * len(found[name].hottest)
            if isinstance(vocabularies[table], ManagedIds)
            else vocabularies[table].ids_of(np.array([row for row, _ in found[name].hottest], dtype=np.int64))
            if compositions[name] is None
            else [None] * len(found[name].hottest)
            for name, table in tables.items()
        },
    )


def _any_rows(ids: IntArray, rows: int) -> IntArray:
    """Returns rows for ids that have none before training: which they are does not matter to how skewed the lookups are."""
    return np.where(ids < 0, -1, (hash_integers(ids, 0) % np.uint64(rows)).astype(np.int64))
