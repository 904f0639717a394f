"""What the rows of a batch ask of each table: how many vectors, of how many ids, and which of its rows.

Measured on the data where they are there; else one id for an `id` feature and a guess for a bag, evenly over all rows.
"""

from __future__ import annotations

__all__ = ["ASSUMED_BAG_LENGTH", "Demand", "key_lengths", "table_demands"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.config import Config, Lookup, TableSpec
from embedshard.config.parts import BagFeature, DrawsNegatives, SequenceFeature, TextFeature, WeightedBagFeature
from embedshard.data.id_counts import IdCounts
from embedshard.data.lookup_sample import LookupSample

Shares = npt.NDArray[np.float64]

ASSUMED_BAG_LENGTH: Final = 10
"""Ids of a bag that has no `max_length`, where there are no data to measure it on."""


@dataclass(frozen=True)
class Demand:
    """What one row of a batch asks of a table.

    Attributes:
        keys: under which ids travel, with a length each.
        vectors: that come back: one for each key, one for each id of a table that is looked up place by place.
        is_pooled: whether a rank that has some of the rows sends a part of each vector, and not some of them.
        ids: looked up for them, on average.
        id_bytes: what an id is on its way, its weight included.
        shares: a function from ascending row bounds to the share of the lookups between each two of them.
    """

    keys: int
    vectors: float
    is_pooled: bool
    ids: float
    id_bytes: int
    shares: Callable[[Sequence[int]], Shares]


def key_lengths(config: Config, specs: Sequence[TableSpec], sample: LookupSample | None) -> dict[str, float]:
    """Returns the mean number of ids that a row has under each key."""
    return {lookup.key: _length(config, lookup, spec.rows, sample) for spec in specs for lookup in spec.lookups}


def table_demands(config: Config, specs: Sequence[TableSpec], sample: LookupSample | None) -> dict[str, Demand]:
    """Returns what a row asks of each table, by name."""
    lengths = key_lengths(config, specs, sample)
    return {
        spec.name: Demand(
            keys=len(spec.lookups),
            vectors=sum(lengths[lookup.key] if spec.is_sequence else 1 for lookup in spec.lookups),
            is_pooled=not spec.is_sequence,
            ids=sum(lengths[lookup.key] for lookup in spec.lookups),
            id_bytes=12 if spec.weighted and not spec.is_sequence else 8,
            shares=_shares(config, spec, lengths, sample),
        )
        for spec in specs
    }


def _length(config: Config, lookup: Lookup, rows: int, sample: LookupSample | None) -> float:
    feature = config.features[lookup.feature]
    if sample is not None:
        ids = sample.features[lookup.feature].ids_per_row
    elif isinstance(feature, BagFeature | WeightedBagFeature | SequenceFeature | TextFeature):
        ids = float(feature.max_length or ASSUMED_BAG_LENGTH)
    else:
        ids = 1.0
    if lookup.is_node:
        return ids * np.log2(rows + 2)  # at most: a batch asks for each node once, and an even tree is the deepest
    if lookup.slot is None:
        return ids
    if lookup.is_sequence:
        drawn = config.objective.num_negatives if isinstance(config.objective, DrawsNegatives) else rows + 1
        return drawn / config.train.global_batch_size
    return ids * _filled(config, lookup.slot)


def _filled(config: Config, slot: int) -> float:
    """Returns the share of a batch's rows that carry a drawn candidate in a slot."""
    assert isinstance(config.objective, DrawsNegatives), "nothing else has slots"
    batch = config.train.global_batch_size
    return min(max(config.objective.num_negatives - slot * batch, 0), batch) / batch


def _shares(
    config: Config, spec: TableSpec, lengths: Mapping[str, float], sample: LookupSample | None
) -> Callable[[Sequence[int]], Shares]:
    parts: list[tuple[float, IdCounts | None]] = []
    for lookup in spec.lookups:
        counts = None if sample is None or lookup.is_node else sample.features[lookup.feature].counts
        parts.append((lengths[lookup.key], counts if lookup.slot is None else _drawn(config, lookup, counts)))

    def shares(bounds: Sequence[int]) -> Shares:
        evenly = np.diff(np.asarray(bounds, dtype=np.float64)) / spec.num_embeddings
        total = np.zeros(len(evenly))
        for weight, counts in parts:
            found = None if counts is None else counts.lookups_between((0, *bounds, spec.num_embeddings))
            met = 0 if found is None else found.sum()
            total += weight * (evenly if found is None or not met else found[1:-1] / met)
        asked = sum(weight for weight, _ in parts)
        return total / asked if asked else evenly

    return shares


def _drawn(config: Config, lookup: Lookup, counts: IdCounts | None) -> IdCounts | None:
    """Returns what candidates are distributed by; None for evenly. Their other features are as those of the rows."""
    if counts is None or lookup.feature != config.drawn_feature():
        return counts
    if not isinstance(config.objective, DrawsNegatives):  # a softmax over all
        return None
    return None if config.objective.distribution == "uniform" else counts.to_the_power(config.objective.alpha)
