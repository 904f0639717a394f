"""What a config looks up where: the tables as they are built and the keys under which ids travel.

The data floor fills the keys, the model floor builds the tables; both read them here, so that they agree. Beside a
feature's own key there are derived ones, with a colon in their names: `item_id:bias` (the 4-column table of a bias) and
`item_id:negative0` (ids drawn beside the rows, in as many slots as they need). A model of kind `item_embedding` looks its
list `words` up twice, as centres under `words` and as contexts under `words:context`, and beside it `words:context:bias`
and `words:node` (nodes of a Huffman tree), as its objective asks.

A table lives in one collection, and all pooling is a sum. Where one of its features is a sequence, all of them are looked
up place by place, and the others are pooled afterwards. A table with a bag that is no sum is looked up with weights: 1 /
length for a mean, 1 / its root for `sqrtn`, 1 for the rest. TorchRec's own mean is wrong under GRID_SHARD (each piece
divides by the ids that it holds) and where a row-wise table with a mean has a table that is not row-wise beside it (whose
sums are divided too).

An id of a `quotient_remainder` or `double_hash` vocabulary travels as one number until a batch is made of it, and under a
key as two rows, whose vectors the sum adds up: the model sees nothing of it.
"""

from __future__ import annotations

__all__ = [
    "BIAS_DIM",
    "Lookup",
    "TableSpec",
    "bias_key",
    "context_key",
    "negative_key",
    "node_key",
    "num_negative_slots",
    "table_specs",
]

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from embedshard.config.composition import Composition
from embedshard.config.memory import memory_of_bias
from embedshard.config.parts import (
    DenseFeature,
    DrawsNegatives,
    Feature,
    HierarchicalSoftmaxConfig,
    InitConfig,
    ItemEmbeddingConfig,
    ManagedVocabulary,
    NCEConfig,
    SoftmaxConfig,
    TableMemoryConfig,
    TableOptimizerConfig,
    TableShardingConfig,
    TwoTowerConfig,
    WeightedBagFeature,
)
from embedshard.config.placement import sharding_of_bias
from embedshard.config.root import Config
from embedshard.errors import ConfigError

MOST_SOFTMAX_ROWS: Final = 65_536
"""Ids up to which a softmax over all of them is made: every place of a list is compared with each of them."""

BIAS_DIM = 4
"""Columns of a bias table: the least that FBGEMM takes. The first is the bias."""

_WEIGHT_BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Lookup:
    """One key of the KeyedJaggedTensor.

    Attributes:
        key: its name there.
        feature: the config's feature whose ids travel under it.
        slot: None for the row's own ids; i for the i-th slot of drawn ids. A sequence has one slot, which holds all.
        is_sequence: whether a vector a place is asked for.
        is_node: whether what travels are nodes of the tree over the feature's ids, instead of ids.
    """

    key: str
    feature: str
    slot: int | None = None
    is_sequence: bool = False
    is_node: bool = False


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
        lookups: the keys over it, in the order of the config's features.
        sharding: how it may be cut, or is.
        is_sequence: whether a vector a place is asked of it, by one feature at least.
        managed_by: the config's table whose managed vocabulary says which id holds which row; None where rows are fixed.
        composition: how an id becomes two rows; None where it becomes one.
        stochastic_rounding: whether updates of its fp16 weights are rounded at random.
        memory: where its rows lie, on CUDA.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    init: InitConfig
    optimizer: TableOptimizerConfig
    l2_lookup: float
    weighted: bool
    lookups: tuple[Lookup, ...]
    sharding: TableShardingConfig
    is_sequence: bool = False
    managed_by: str | None = None
    composition: Composition | None = None
    stochastic_rounding: bool = False
    memory: TableMemoryConfig = field(default_factory=TableMemoryConfig)

    @property
    def num_embeddings(self) -> int:
        """Rows as allocated: one more than ids."""
        return self.rows + 1

    @property
    def num_ids(self) -> int:
        """Ids that are told apart, and one for unknown ids."""
        return (self.rows if self.composition is None else self.composition.num_ids) + 1

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


def context_key(feature: str) -> str:
    """The key, and the table, of the vectors of a list's ids as contexts."""
    return f"{feature}:context"


def node_key(feature: str) -> str:
    """The key, and the table, of the inner nodes of the tree over a list's ids."""
    return f"{feature}:node"


def num_negative_slots(config: Config) -> int:
    """How many drawn ids a row must carry at most so that a batch holds all of a step's negatives.

    The rows of a sequence carry any number, so one slot is enough for them.
    """
    if isinstance(config.model, ItemEmbeddingConfig):
        return int(isinstance(config.objective, DrawsNegatives | SoftmaxConfig))
    if not isinstance(config.objective, DrawsNegatives):
        return 0
    return -(-config.objective.num_negatives // config.train.global_batch_size)


def table_specs(config: Config, rows: Mapping[str, int]) -> tuple[TableSpec, ...]:
    """Returns the tables in config order, derived ones last.

    Args:
        config: the config.
        rows: ids of each of the config's tables, as its vocabulary tells; those whose ids become two rows need none.

    Raises:
        ConfigError: if a softmax over all ids has too many.
    """
    slots = range(num_negative_slots(config))
    drawn = set(config.item_features()) if slots else set()  # of an item_embedding none: contexts are drawn
    specs = []
    for name, table in config.tables.items():
        lookups = []
        for feature_name, feature in config.features.items():
            if isinstance(feature, DenseFeature) or feature.table != name:
                continue
            lookups.append(Lookup(feature_name, feature_name, is_sequence=config.is_sequence(feature_name)))
            if feature_name in drawn:
                lookups += [Lookup(negative_key(feature_name, slot), feature_name, slot) for slot in slots]
        weighted = any(_has_weights(bag) for bag in config.bags(name))
        overrides = table.optimizer.model_dump(exclude_none=True)
        specs.append(
            TableSpec(
                name=name,
                rows=rows[name] if table.composition is None else table.composition.rows,
                dim=table.dim,
                dtype=table.dtype,
                init=table.init,
                optimizer=config.optimizer.tables.model_copy(update=overrides),
                l2_lookup=table.l2_lookup,
                weighted=weighted,
                is_sequence=config.is_sequence_table(name),
                lookups=tuple(lookups),
                sharding=table.sharding,
                managed_by=name if isinstance(table.vocabulary, ManagedVocabulary) else None,
                composition=table.composition,
                stochastic_rounding=table.stochastic_rounding,
                memory=table.memory,
            )
        )
    if isinstance(config.model, ItemEmbeddingConfig):
        (words,) = specs
        return (words, *_pair_specs(config, config.model.sequence, words))
    return (*specs, *_bias_specs(config, {spec.name: spec for spec in specs}))


def _pair_specs(config: Config, feature: str, words: TableSpec) -> list[TableSpec]:
    """Returns what centres are compared with: contexts and their biases, or inner nodes. They begin as zeros."""
    zeros, objective = InitConfig(kind="zeros"), config.objective
    if isinstance(objective, HierarchicalSoftmaxConfig):
        key = node_key(feature)
        lookup = Lookup(key, feature, is_sequence=True, is_node=True)
        # As many inner nodes as there are classes, less one; classes are all ids and the one for unknown ids.
        return [replace(words, name=key, rows=words.rows - 1, init=zeros, lookups=(lookup,))]
    if isinstance(objective, SoftmaxConfig) and words.num_embeddings > MOST_SOFTMAX_ROWS:
        raise ConfigError(
            f"objective 'softmax' compares every place with every id, and table '{words.name}' has {words.rows:,}; it takes "
            f"{MOST_SOFTMAX_ROWS - 1:,} at most. Choose 'sampled_softmax' or 'hierarchical_softmax'."
        )
    assert isinstance(config.model, ItemEmbeddingConfig), "nothing else has contexts"
    contexts = replace(
        words,
        name=context_key(feature),
        dim=words.dim * (2 if config.model.by_side else 1),  # before centres, then after them
        init=zeros,
        lookups=_with_slot(config, context_key(feature), feature),
    )
    if not isinstance(objective, NCEConfig):
        return [contexts]
    key = bias_key(contexts.name)
    biases = replace(
        contexts,
        name=key,
        dim=BIAS_DIM,
        dtype="fp32",
        lookups=_with_slot(config, key, feature),
        sharding=sharding_of_bias(words.sharding),
        stochastic_rounding=False,
        memory=memory_of_bias(words.memory),
    )
    return [contexts, biases]


def _with_slot(config: Config, key: str, feature: str) -> tuple[Lookup, ...]:
    slots = range(num_negative_slots(config))
    drawn = (Lookup(negative_key(key, slot), feature, slot, is_sequence=True) for slot in slots)
    return (Lookup(key, feature, is_sequence=True), *drawn)


def _bias_specs(config: Config, specs: Mapping[str, TableSpec]) -> list[TableSpec]:
    """Returns the tables of biases of a two-tower's user and item, or of the weights of a ranking model's linear part."""
    biased = {name: range(0) for name in config.first_order()}
    if isinstance(config.model, TwoTowerConfig):
        for side in ("user", "item"):
            if side in config.model.biases:
                feature_name = config.identity(f"{side}_id")
                assert feature_name is not None, "the config checks that a bias has an id feature"
                biased[feature_name] = range(num_negative_slots(config) if side == "item" else 0)
    biases = []
    for feature_name, slots in biased.items():
        feature = config.features[feature_name]
        assert not isinstance(feature, DenseFeature), "the config checks that a bias has ids"
        key = bias_key(feature_name)
        biases.append(
            TableSpec(
                name=key,
                rows=specs[feature.table].rows,
                dim=BIAS_DIM,
                dtype="fp32",
                init=InitConfig(kind="zeros"),
                optimizer=specs[feature.table].optimizer,
                l2_lookup=0.0,
                weighted=_has_weights(feature),
                lookups=(
                    Lookup(key, feature_name),
                    *(Lookup(negative_key(key, slot), feature_name, slot) for slot in slots),
                ),
                sharding=sharding_of_bias(specs[feature.table].sharding),
                managed_by=specs[feature.table].managed_by,
                composition=specs[feature.table].composition,
                memory=memory_of_bias(specs[feature.table].memory),
            )
        )
    return biases


def _has_weights(feature: Feature) -> bool:
    """Whether a feature's vectors are not just added up."""
    return isinstance(feature, WeightedBagFeature) or getattr(feature, "pooling", "sum") != "sum"
