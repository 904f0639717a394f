"""What a config looks up where: the tables as they are built and the keys under which ids travel.

The data floor fills the keys, the model floor builds the tables; both read them here, so that they agree. Beside a
feature's own key there are derived ones, with a colon in their names: `item_id:bias` (the 4-column table of a bias) and
`item_id:negative0` (ids drawn beside the rows, in as many slots as they need).

A table lives in one collection, and all pooling is a sum. Where one of its features is a sequence, all of them are looked
up place by place, and the others are pooled afterwards. A table with a bag that is no sum is looked up with weights: 1 /
length for a mean, 1 / its root for `sqrtn`, 1 for the rest. TorchRec's own mean is wrong under GRID_SHARD (each piece
divides by the ids that it holds) and where a row-wise table with a mean has a table that is not row-wise beside it (whose
sums are divided too).
"""

from __future__ import annotations

__all__ = ["BIAS_DIM", "Lookup", "TableSpec", "bias_key", "negative_key", "num_negative_slots", "table_specs"]

from collections.abc import Mapping
from dataclasses import dataclass

from embedshard.config.parts import (
    BagFeature,
    DenseFeature,
    DrawsNegatives,
    InitConfig,
    SequenceFeature,
    TableOptimizerConfig,
    TableShardingConfig,
    TwoTowerConfig,
    WeightedBagFeature,
)
from embedshard.config.placement import sharding_of_bias
from embedshard.config.root import Config

BIAS_DIM = 4
"""Columns of a bias table: the least that FBGEMM takes. The first is the bias."""

_WEIGHT_BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Lookup:
    """One key of the KeyedJaggedTensor.

    Attributes:
        key: its name there.
        feature: the config's feature whose ids travel under it.
        slot: None for the row's own ids; i for the i-th slot of drawn ids.
        is_sequence: whether a vector a place is asked for.
    """

    key: str
    feature: str
    slot: int | None = None
    is_sequence: bool = False


@dataclass(frozen=True)
class TableSpec:
    """A table as it is built.

    Attributes:
        name: the config's, or derived from a feature's for a bias.
        rows: ids with a row of their own; row `rows` is shared by unknown ids.
        dim: columns.
        dtype: `fp32` or `fp16`.
        init: how rows begin.
        optimizer: the fused optimizer, overrides applied.
        l2_lookup: penalty on looked-up vectors.
        weighted: whether it is looked up with weights; pooling is always a sum.
        is_sequence: whether a vector a place is asked of it, by one feature at least.
        lookups: the keys over it, in the order of the config's features.
        sharding: how it may be cut, or is.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    init: InitConfig
    optimizer: TableOptimizerConfig
    l2_lookup: float
    weighted: bool
    is_sequence: bool
    lookups: tuple[Lookup, ...]
    sharding: TableShardingConfig

    @property
    def num_embeddings(self) -> int:
        """Rows as allocated: one more than ids."""
        return self.rows + 1

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return self.num_embeddings * self.dim

    @property
    def weight_bytes(self) -> int:
        """The weights' size, unsharded."""
        return self.parameters * _WEIGHT_BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """The size of what the optimizer keeps for them, unsharded; always fp32."""
        numbers = {
            "sgd": 0,
            "adagrad": self.parameters,
            "rowwise_adagrad": self.num_embeddings,
            "adam": 2 * self.parameters,
        }
        return 4 * numbers[self.optimizer.kind]


def bias_key(feature: str) -> str:
    """The key, and the table, of the bias of an id feature."""
    return f"{feature}:bias"


def negative_key(key: str, slot: int) -> str:
    """The key under which the drawn ids of one slot travel."""
    return f"{key}:negative{slot}"


def num_negative_slots(config: Config) -> int:
    """How many drawn ids a row must carry at most so that a batch holds all of a step's negatives."""
    if not isinstance(config.objective, DrawsNegatives):
        return 0
    return -(-config.objective.num_negatives // config.train.global_batch_size)


def table_specs(config: Config, rows: Mapping[str, int]) -> tuple[TableSpec, ...]:
    """Returns the tables in config order, biases last.

    Args:
        config: the config.
        rows: ids of each of the config's tables, as its vocabulary tells.
    """
    slots = range(num_negative_slots(config))
    drawn = set(config.item_features()) if slots else set()
    specs = []
    for name, table in config.tables.items():
        lookups = []
        for feature_name, feature in config.features.items():
            if isinstance(feature, DenseFeature) or feature.table != name:
                continue
            lookups.append(Lookup(feature_name, feature_name, is_sequence=config.is_sequence(feature_name)))
            if feature_name in drawn:
                lookups += [Lookup(negative_key(feature_name, slot), feature_name, slot) for slot in slots]
        weighted = any(isinstance(bag, WeightedBagFeature) or bag.pooling != "sum" for bag in config.bags(name))
        overrides = table.optimizer.model_dump(exclude_none=True)
        specs.append(
            TableSpec(
                name=name,
                rows=rows[name],
                dim=table.dim,
                dtype=table.dtype,
                init=table.init,
                optimizer=config.optimizer.tables.model_copy(update=overrides),
                l2_lookup=table.l2_lookup,
                weighted=weighted,
                is_sequence=config.is_sequence_table(name),
                lookups=tuple(lookups),
                sharding=table.sharding,
            )
        )
    return (*specs, *_bias_specs(config, {spec.name: spec for spec in specs}))


def _bias_specs(config: Config, specs: Mapping[str, TableSpec]) -> list[TableSpec]:
    if not isinstance(config.model, TwoTowerConfig):
        return []
    biases = []
    for side in ("user", "item"):
        if side not in config.model.biases:
            continue
        feature_name = config.identity(f"{side}_id")
        assert feature_name is not None, "the config checks that a bias has an id feature"
        feature = config.features[feature_name]
        assert not isinstance(feature, DenseFeature | BagFeature | SequenceFeature)
        key = bias_key(feature_name)
        slots = range(num_negative_slots(config)) if side == "item" else ()
        biases.append(
            TableSpec(
                name=key,
                rows=specs[feature.table].rows,
                dim=BIAS_DIM,
                dtype="fp32",
                init=InitConfig(kind="zeros"),
                optimizer=specs[feature.table].optimizer,
                l2_lookup=0.0,
                weighted=False,
                is_sequence=False,
                lookups=(
                    Lookup(key, feature_name),
                    *(Lookup(negative_key(key, slot), feature_name, slot) for slot in slots),
                ),
                sharding=sharding_of_bias(specs[feature.table].sharding),
            )
        )
    return biases
