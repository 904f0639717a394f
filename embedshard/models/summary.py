"""What a config builds: tables and layers with shapes, parameters and bytes, and what law 1 does not cover."""

from __future__ import annotations

__all__ = ["Row", "Summary", "sharding_exceptions", "summarise"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.composition import colliding_ids, collision_share
from embedshard.config.parts import (
    AutoVocabulary,
    DoubleHashVocabulary,
    HashVocabulary,
    InBatchSoftmaxConfig,
    QuotientRemainderVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from embedshard.config.placement import changed_optimizer
from embedshard.models.embeddings import table_modules
from embedshard.models.registry import build_model
from embedshard.quantities import share

_DENSE_STATES = {"sgd": 0, "adagrad": 1, "adam": 2, "adamw": 2, "rmsprop": 1}


@dataclass(frozen=True)
class Row:
    """A table or a layer.

    Attributes:
        name: as in the config, or the parameter's path in the model.
        shape: of the weights.
        parameters: how many numbers are learnt.
        weight_bytes: their size.
        state_bytes: the size of what the optimizer keeps for them.
        note: dtype, optimizer and features of a table; the optimizer of a layer.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    weight_bytes: int
    state_bytes: int
    note: str


@dataclass(frozen=True)
class Summary:
    """A model, unsharded.

    Attributes:
        tables: in config order.
        layers: the dense part, by parameter.
        exceptions: in which ways the result may depend on more than config, data and seed.
    """

    tables: tuple[Row, ...]
    layers: tuple[Row, ...]
    exceptions: tuple[str, ...]

    @property
    def total(self) -> Row:
        """All of it."""
        rows = (*self.tables, *self.layers)
        return Row(
            "total",
            (),
            sum(row.parameters for row in rows),
            sum(row.weight_bytes for row in rows),
            sum(row.state_bytes for row in rows),
            "",
        )


def summarise(config: Config, specs: Sequence[TableSpec], ids: Mapping[str, int] | None = None) -> Summary:
    """Describes what a config builds, without allocating its tables.

    Args:
        config: the config.
        specs: its tables.
        ids: how many different ids a table is to hold, for the share of them that collide; for those of which it is known.

    Raises:
        ConfigError: if a custom model cannot be built.
    """
    model = build_model(config, specs)
    inside_tables = {id(parameter) for _, module in table_modules(model) for parameter in module.parameters()}
    return Summary(
        tables=tuple(_table_row(spec, config, (ids or {}).get(spec.name)) for spec in specs),
        layers=tuple(
            _layer_row(name, parameter, config)
            for name, parameter in model.named_parameters()
            if id(parameter) not in inside_tables
        ),
        exceptions=tuple(_exceptions(config, specs)),
    )


def _table_row(spec: TableSpec, config: Config, num_ids: int | None) -> Row:
    vocabulary = config.tables[spec.name].vocabulary if spec.name in config.tables else None
    is_open = isinstance(vocabulary, TokenizerVocabulary) and vocabulary.path is None
    most = "; so many rows at most: a run makes the tokenizer" if is_open else ""
    if isinstance(vocabulary, AutoVocabulary):
        most = "; so many rows at most: a run counts the ids"
    features = ", ".join(lookup.key for lookup in spec.lookups if lookup.slot is None)
    optimizer = "adam (lazy kernel on CPU, FBGEMM's on CUDA)" if spec.optimizer.kind == "adam" else spec.optimizer.kind
    penalty = f", l2_lookup {spec.l2_lookup:g}" if spec.l2_lookup else ""
    return Row(
        name=spec.name,
        shape=(spec.num_embeddings, spec.dim),
        parameters=spec.parameters,
        weight_bytes=spec.weight_bytes,
        state_bytes=spec.state_bytes,
        note=f"{spec.dtype}, {optimizer} lr {spec.optimizer.lr:g}{penalty}; looked up by {features}{most}"
        f"{_collisions(spec, vocabulary, num_ids)}",
    )


def _collisions(spec: TableSpec, vocabulary: Vocabulary | None, num_ids: int | None) -> str:
    """Returns how many ids are expected to have all their rows in common with another."""
    if isinstance(vocabulary, QuotientRemainderVocabulary):
        assert spec.composition is not None, "it has two parts"
        return f"; {spec.composition.first:,} quotients + {spec.composition.second:,} remainders: no two ids share both"
    if not isinstance(vocabulary, HashVocabulary | DoubleHashVocabulary):
        return ""
    places, shared = spec.num_ids - 1, "its row"
    halves = ""
    if spec.composition is not None:
        shared = "both rows"
        halves = f"; {spec.composition.first:,} + {spec.composition.second:,} rows, a hash for each"
    if num_ids is not None:
        return f"{halves}; of {num_ids:,} ids {share(collision_share(places, num_ids))} share {shared} with another"
    known = [f"{part:.0%} of {colliding_ids(places, part):,.0f}" for part in (0.01, 0.1, 0.5)]
    return f"{halves}; of N ids 1 - (1 - 1/{places:,})^(N-1) share {shared} with another: {', '.join(known)}"


def _layer_row(name: str, parameter: nn.Parameter, config: Config) -> Row:
    dense = config.optimizer.dense
    states = _DENSE_STATES[dense.kind] + (1 if dense.options.get("momentum") else 0)
    return Row(
        name=name,
        shape=tuple(parameter.shape),
        parameters=parameter.numel(),
        weight_bytes=parameter.numel() * parameter.element_size(),
        state_bytes=parameter.numel() * 4 * states,
        note=f"{dense.kind} lr {dense.lr:g}",
    )


def _exceptions(config: Config, specs: Sequence[TableSpec]) -> list[str]:
    found = []
    objective = config.objective
    if isinstance(objective, InBatchSoftmaxConfig) and objective.negatives == "local":
        found.append("objective.negatives is 'local': each worker sees its own rows' items, so the world changes the loss.")
    found += sharding_exceptions(config, specs)
    if names := ", ".join(spec.name for spec in specs if spec.optimizer.kind == "adam"):
        found.append(
            f"Tables under adam ({names}): eps counts before the bias correction on a CPU, as in torch's SparseAdam, and "
            f"after it on CUDA, where FBGEMM has a kernel of its own."
        )
    if not config.train.deterministic:
        found.append("On CUDA without train.deterministic, sums are added in any order. (On a CPU they are not.)")
    return found


def sharding_exceptions(config: Config, specs: Sequence[TableSpec]) -> list[str]:
    """Returns in which ways the config allows sharding to change the result."""
    found = []
    for spec in specs:
        for kind in spec.sharding.asked:
            if why := changed_optimizer(kind, spec.optimizer.kind):
                found.append(f"tables.{spec.name}.sharding allows another optimizer: {why}.")
        if spec.stochastic_rounding:
            found.append(f"tables.{spec.name}.stochastic_rounding rounds its updates at random.")
    if config.sharding.communication != "fp32":
        found.append(
            f"sharding.communication is '{config.sharding.communication}': embeddings and gradients are rounded on their "
            f"way between workers, so the world and the plan change the result."
        )
    return found
