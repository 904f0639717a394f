"""What the rows of a batch ask of each table: how many vectors, of how many ids, and which of its rows.

Measured on the data where they are there; else one id for an `id` feature and a guess for a bag, evenly over all rows.

An item_embedding looks each distinct id of a rank's batch up once. How many those are is estimated as if every place of
the batch's lists drew its id by itself from the data's histogram: ids that come together make them fewer.
"""

from __future__ import annotations

__all__ = ["ASSUMED_BAG_LENGTH", "Demand", "key_lengths", "places_per_row", "table_demands"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.config import Config, Lookup, TableSpec
from embedshard.config.parts import DrawsNegatives, ItemEmbeddingConfig, ListFeature, TextFeature
from embedshard.data.id_counts import IdCounts
from embedshard.data.lookup_sample import LookupSample
from embedshard.data.pairs import keep_probability

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


def key_lengths(
    config: Config, specs: Sequence[TableSpec], sample: LookupSample | None, local_batch_size: int
) -> dict[str, float]:
    """Returns the mean number of ids that a row of a rank's batch of so many rows has under each key."""
    return {
        lookup.key: _length(config, lookup, spec.rows, sample, local_batch_size) for spec in specs for lookup in spec.lookups
    }


def table_demands(
    config: Config, specs: Sequence[TableSpec], sample: LookupSample | None, local_batch_size: int
) -> dict[str, Demand]:
    """Returns what a row of a rank's batch of so many rows asks of each table, by name."""
    lengths = key_lengths(config, specs, sample, local_batch_size)
    return {
        spec.name: Demand(
            keys=len(spec.lookups),
            vectors=sum(lengths[lookup.key] if spec.is_sequence else 1 for lookup in spec.lookups),
            is_pooled=not spec.is_sequence,
            ids=sum(lengths[lookup.key] for lookup in spec.lookups),
            id_bytes=12 if spec.weighted and not spec.is_sequence else 8,
            shares=_shares(config, spec, lengths, sample, local_batch_size),
        )
        for spec in specs
    }


def places_per_row(config: Config, sample: LookupSample | None) -> float:
    """Returns the mean number of places of an item_embedding's list that are kept as centres and contexts."""
    assert isinstance(config.model, ItemEmbeddingConfig), "nothing else makes pairs"
    ids = _ids_per_row(config, config.model.sequence, sample)
    if sample is None or config.model.subsample is None:
        return ids
    counts = sample.features[config.model.sequence].counts
    return ids * _kept(config.model, counts).total() / 1e6 / max(counts.total(), 1)


def _length(config: Config, lookup: Lookup, rows: int, sample: LookupSample | None, local_batch_size: int) -> float:
    if lookup.slot is None and isinstance(config.model, ItemEmbeddingConfig):
        draws = _independent_draws(config, sample, local_batch_size)
        counts = None if sample is None else _kept(config.model, sample.features[lookup.feature].counts)
        if lookup.is_node:
            return _expected_nodes(counts, rows + 2, draws) / local_batch_size  # a class more than nodes: see lookups.py
        return _expected_distinct(counts, rows + 1, draws) / local_batch_size
    if lookup.slot is None:
        return _ids_per_row(config, lookup.feature, sample)
    if lookup.is_sequence:
        drawn = config.objective.num_negatives if isinstance(config.objective, DrawsNegatives) else rows + 1
        return drawn / config.train.global_batch_size
    return _ids_per_row(config, lookup.feature, sample) * _filled(config, lookup.slot)


def _ids_per_row(config: Config, name: str, sample: LookupSample | None) -> float:
    feature = config.features[name]
    if sample is not None:
        return sample.features[name].ids_per_row
    table = getattr(feature, "table", None)
    rows_per_id = 1 if table is None or config.tables[table].composition is None else 2
    if isinstance(feature, ListFeature | TextFeature):
        return float(rows_per_id * (feature.max_length or ASSUMED_BAG_LENGTH))
    return float(rows_per_id)


def _kept(model: ItemEmbeddingConfig, counts: IdCounts) -> IdCounts:
    """Returns how often each id is expected to be kept, in millionths."""
    threshold = model.subsample
    if threshold is None:
        return counts.weighed(lambda met: met)
    return counts.weighed(lambda met: met * keep_probability(met.astype(np.int64), threshold))


def _independent_draws(config: Config, sample: LookupSample | None, local_batch_size: int) -> float:
    """Returns how many independent draws meet as many different ids as the places of a rank's batch.

    They are more than there are places, since rows of an epoch are drawn without repetition: of an id that the data hold
    n times, a batch with a share s of all places has none with probability (1 - s)^n.
    """
    per_row = places_per_row(config, sample)
    if sample is None or local_batch_size >= sample.rows:
        return local_batch_size * per_row if sample is None else math.inf
    return -sample.rows * per_row * math.log1p(-local_batch_size / sample.rows)


def _met_in(counts: IdCounts, draws: float) -> IdCounts:
    """Returns with which probability each id is among so many draws by these counts, in millionths."""
    return counts.weighed(lambda met: _is_met(met / met.sum(), draws))


def _is_met(shares: Shares, draws: float) -> Shares:
    return -np.expm1(-draws * shares)


def _expected_distinct(counts: IdCounts | None, rows: int, draws: float) -> float:
    """Returns how many different ids so many draws meet; evenly from so many rows where there are no counts."""
    if counts is None or not counts.total():
        return rows * float(_is_met(np.array([1 / rows]), draws)[0])
    return _met_in(counts, draws).total() / 1e6


def _expected_nodes(counts: IdCounts | None, classes: int, draws: float) -> float:
    """Returns how many different inner nodes of a Huffman tree lie on the ways to so many drawn ids.

    The tree is taken for what equal shares make of it, locally: an id with the share p lies between two depths, 2^-d being
    p at most and 2p at least; above it a node of depth d has a share of 2^-d, and of its neighbours as many are joined
    once more, to nodes of 2p, as it takes.
    """
    shares, ids = np.array([1 / classes]), np.array([float(classes)])
    if counts is not None and counts.total():
        shares = counts.shares()
        ids = np.ones(len(shares))
    nodes, depth = 0.0, 0
    while len(shares):
        parts = shares * 2.0**depth  # of a node of this depth
        is_above = parts <= 0.5
        nodes += float((ids * parts)[is_above].sum() * _is_met(np.array([2.0**-depth]), draws)[0])
        joined = ids * (1 - parts) * _is_met(np.minimum(2 * shares, 1.0), draws)
        nodes += float(joined[~is_above].sum())
        shares, ids, depth = shares[is_above], ids[is_above], depth + 1
    return min(nodes, classes - 1.0)


def _filled(config: Config, slot: int) -> float:
    """Returns the share of a batch's rows that carry a drawn candidate in a slot."""
    assert isinstance(config.objective, DrawsNegatives), "nothing else has slots"
    batch = config.train.global_batch_size
    return min(max(config.objective.num_negatives - slot * batch, 0), batch) / batch


def _shares(
    config: Config, spec: TableSpec, lengths: Mapping[str, float], sample: LookupSample | None, local_batch_size: int
) -> Callable[[Sequence[int]], Shares]:
    parts: list[tuple[float, IdCounts | None]] = []
    for lookup in spec.lookups:
        counts = None if sample is None or lookup.is_node else sample.features[lookup.feature].counts
        if lookup.slot is not None:
            counts = _drawn(config, lookup, counts)
        elif counts is not None and isinstance(config.model, ItemEmbeddingConfig):
            counts = _met_in(_kept(config.model, counts), _independent_draws(config, sample, local_batch_size))
        parts.append((lengths[lookup.key], counts))

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
