"""Towers and models as `torch.export` programs, which load without embedshard and take looked-up vectors by keyword.

The model is built as for training, but for its tables, which stay where they cost nothing (torch's `meta` device); its dense
part comes from the checkpoint. In place of the lookup stands what was looked up outside. Sequences are given padded, with
lengths: of one behind the other, a program would have to ask how many there are, and shapes would depend on values.

The batch, and the length of sequences, are free. What cannot be: a recurrent layer over places (its operator unrolls them)
and `flatten`, which has a weight a place; they are given as many as the feature's `max_length`.

Shapes: B rows, L places of the longest row, D dim.
"""

from __future__ import annotations

__all__ = ["make_programs"]

import copy
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from embedshard.config import Config, TableSpec, bias_key, table_specs
from embedshard.config.parts import (
    CrossEntropyConfig,
    CustomModelConfig,
    DenseFeature,
    FlattenEncoder,
    ItemEmbeddingConfig,
    PointwiseConfig,
    RankingModel,
    RecurrentEncoder,
    SASRecConfig,
    TargetAttention,
    TextClassifierConfig,
    TwoTowerConfig,
    WeightedBagFeature,
)
from embedshard.data.statistics import Statistics
from embedshard.data.vocabulary import Vocabulary, table_rows
from embedshard.errors import CheckpointError
from embedshard.export.parts import kept_vocabulary
from embedshard.export.signature import ExportedProgram, Pooling, ProgramInput, ProgramOutput
from embedshard.export.towers import has_towers, tower_features
from embedshard.export.tracing import UNTRACEABLE, LookedUp, Traced, vector_of
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.padded import pad_layers
from embedshard.models.registry import build_model
from embedshard.train.checkpoint_reader import Checkpoint


# --------------------------------------------------------------------------------------------------------- all of a run
def make_programs(
    config: Config,
    checkpoint: Checkpoint,
    vocabularies: Mapping[str, Vocabulary],
    files: Mapping[str, str],
    statistics: Statistics,
) -> tuple[dict[str, tuple[Traced, ExportedProgram]], list[str]]:
    """Returns what becomes programs, by name (`user` and `item`, or `model`), and why one is missing.

    Args:
        config: the run's.
        checkpoint: whose dense part it is.
        vocabularies: of the config's tables.
        files: of vocabularies in the export, by table.
        statistics: of standardised features.

    Raises:
        CheckpointError: if it lacks something of the model.
    """
    if isinstance(config.model, ItemEmbeddingConfig):
        return {}, []  # it has nothing but tables
    if why := _why_not(config):
        return {}, [f"There is no program: {why}"]
    rows = table_rows(vocabularies)
    specs = table_specs(config, rows)
    model = _restored(checkpoint, build_model(config, specs))
    maker = _Maker(config, {spec.name: spec for spec in specs}, files, statistics)
    dense = [name for name, feature in config.features.items() if isinstance(feature, DenseFeature)]
    dims = {spec.feature: spec.dim for spec in maker.inputs(list(config.features)) if spec.dim is not None}
    made, notes = {}, []
    for name, keys, outputs, left_out, run in _parts(config, model, dims):
        inputs = maker.inputs(keys)
        traced = Traced(inputs, dense, _without(model, left_out), run)
        if not outputs:
            try:
                outputs = [vector_of(traced.eval(), inputs)]
            except UNTRACEABLE as error:
                notes.append(f"There is no program '{name}': it does not run by itself: {type(error).__name__}: {error}")
                continue
        program = ExportedProgram(file=f"programs/{name}.pt2", torch=torch.__version__, inputs=inputs, outputs=outputs)
        made[name] = (traced.eval().requires_grad_(False), program)
    return made, notes


def _why_not(config: Config) -> str:
    model = config.model
    if isinstance(model, CustomModelConfig) and any(config.is_sequence(name) for name in config.features):
        return "the model is your own and reads sequences, and a program is given them padded."
    if isinstance(model, TextClassifierConfig) and isinstance(model.encoder, RecurrentEncoder):
        text = model.text
        if text is not None and config.max_length(text) is None:
            return f"one of a recurrent encoder reads a known number of places, and features.{text} has no max_length."
    return ""


Part = tuple[str, list[str], list[ProgramOutput], list[str], Callable[[Any, Any], dict[str, torch.Tensor]]]


def _parts(config: Config, made: nn.Module, dims: Mapping[str, int]) -> Iterator[Part]:
    """Yields each program's name, the keys that it reads, what it returns, the modules that it lacks, and how it runs.

    Args:
        config: the run's.
        made: its model.
        dims: of what is looked up for each feature.
    """
    model = config.model
    learns_labels = isinstance(config.objective, PointwiseConfig | CrossEntropyConfig)
    if isinstance(model, CustomModelConfig) and has_towers(made) and config.identity("item_id") is not None:
        methods = _encode_queries, _encode_candidates
        for side, features, run in zip(("user", "item"), tower_features(config), methods, strict=True):
            yield side, features, [], [], partial(_with_absent, run, dims)
        if not learns_labels:
            return
    if isinstance(model, TwoTowerConfig):
        width = config.tower_width(model.user) + (2 if model.biases else 0)
        vector = [ProgramOutput(name="vector", shape=["batch", width], link="product")]
        for side, tower, others in (("user", model.user, ["item_tower"]), ("item", model.item, ["user_tower", "poolings"])):
            identity = config.identity(f"{side}_id")
            biases = [bias_key(identity)] if side in model.biases and identity is not None else []
            yield side, [*tower.features, *biases], vector, others, _encode_queries if side == "user" else _encode_candidates
    elif isinstance(model, SASRecConfig):
        vector = [ProgramOutput(name="vector", shape=["batch", config.width(model.item_id)], link="product")]
        everything = ["places", "blocks", "norm", "dropout"]
        name = model.sequence
        yield (
            "user",
            [name],
            vector,
            [],
            lambda made, given: {"vector": made.encode_padded(given.lookups[name], given.sequence_lengths(name), given)},
        )
        yield "item", [model.item_id], vector, everything, lambda _, given: {"vector": given.lookups[model.item_id].clone()}
    else:
        labels = list(config.data.label_columns)
        yield "model", _read(config), _outputs(config, labels), [], lambda made, given: _by_label(labels, made(given))


def _with_absent(run: Callable[[Any, Any], dict[str, torch.Tensor]], dims: Mapping[str, int], model: Any, given: Any) -> Any:
    """Runs a tower of a model that may look all features up: those that the tower does not read are empty, as in a batch."""
    given.lookups = {name: given.lookups.get(name, torch.zeros(given.dense.shape[0], dim)) for name, dim in dims.items()}
    return run(model, given)


def _encode_queries(model: Any, given: Any) -> dict[str, torch.Tensor]:
    return {"vector": model.encode_queries(given)}


def _encode_candidates(model: Any, given: Any) -> dict[str, torch.Tensor]:
    return {"vector": model.encode_candidates(given)}


def _read(config: Config) -> list[str]:
    """Returns the keys that a model without towers reads."""
    model = config.model
    if isinstance(model, RankingModel):
        targets = [pooling.target for pooling in model.sequences.values() if isinstance(pooling, TargetAttention)]
        read = [*config.read_features(model), *targets, *(bias_key(name) for name in config.first_order())]
    elif isinstance(model, TextClassifierConfig):
        read = [*([] if model.text is None else [model.text]), *model.features]
    else:
        read = list(config.features)
    return list(dict.fromkeys(read))


def _outputs(config: Config, labels: Sequence[str]) -> list[ProgramOutput]:
    objective = config.objective
    if isinstance(objective, CrossEntropyConfig) and config.num_logits > 1:
        return [ProgramOutput(name=name, shape=["batch", config.num_logits], link="softmax") for name in labels or ["logit"]]
    is_number = isinstance(objective, PointwiseConfig) and objective.kind == "mse"
    link = "identity" if is_number else "sigmoid"
    return [ProgramOutput(name=name, shape=["batch"], link=link) for name in labels or ["logit"]]  # type: ignore[arg-type]


def _by_label(labels: Sequence[str], output: Any) -> dict[str, torch.Tensor]:
    if (logits_BL := getattr(output, "logits_BL", None)) is not None:
        return {name: logits_BL[:, place] for place, name in enumerate(labels)}
    logits_BC: torch.Tensor | None = getattr(output, "logits_BC", None)
    name = labels[0] if labels else "logit"
    return {name: output.logits if logits_BC is None or logits_BC.shape[1] == 1 else logits_BC}


# ------------------------------------------------------------------------------------------------------------ the model
def _restored(checkpoint: Checkpoint, model: nn.Module) -> nn.Module:
    """Returns a model with the checkpoint's dense part, without tables, over padded sequences."""
    kept = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    for name, tensor in kept.items():
        if f"dense/{name}" not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.folder.uri} does not hold '{name}' of the model's dense part.")
        kept[name] = torch.empty_like(tensor)
    checkpoint.read_into([(f"dense/{name}", (0,) * tensor.dim(), tensor) for name, tensor in kept.items()])
    model.load_state_dict(kept, strict=False)
    for path, module in list(model.named_modules()):
        if isinstance(module, EmbeddingLookup):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, LookedUp())
    pad_layers(model)
    return model


def _without(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Returns a model without some of its parts, which nothing calls."""
    if not names:
        return model
    less = copy.copy(model)
    less._modules, less._parameters = dict(model._modules), dict(model._parameters)
    for name in names:
        less._modules.pop(name, None)
        less._parameters.pop(name, None)
    return less


# -------------------------------------------------------------------------------------------------------- the signature
class _Maker:
    """Describes inputs by the keys under which a model finds them."""

    def __init__(
        self, config: Config, specs: Mapping[str, TableSpec], files: Mapping[str, str], statistics: Statistics
    ) -> None:
        self._config, self._specs, self._files, self._statistics = config, specs, files, statistics

    def inputs(self, keys: Sequence[str]) -> list[ProgramInput]:
        """Returns an input for each key, two of a sequence."""
        self._names: set[str] = set()
        return [one for key in keys for one in self._of_key(key)]

    def _of_key(self, key: str) -> Iterator[ProgramInput]:
        feature_name = key.partition(":")[0]
        feature = self._config.features[feature_name]
        kept: dict[str, Any] = {"feature": feature_name, "config": feature.model_dump(mode="json")}
        if isinstance(feature, DenseFeature):
            moments = self._statistics.moments.get(feature_name)
            yield ProgramInput(
                name=self._name(key), kind="dense", shape=["batch"], dtype="float64",
                mean=None if moments is None else moments[0], deviation=None if moments is None else moments[1], **kept,
            )  # fmt: skip
            return
        spec = self._specs[feature.table if key == feature_name else key]
        kept |= {"table": spec.name, "dim": spec.dim, "unknown_row": spec.rows}
        kept["vocabulary"] = kept_vocabulary(self._config, feature.table, self._files)
        if spec.composition is not None:
            pair = spec.composition
            kept["pair"] = {"num_ids": pair.num_ids, "first": pair.first, "second": pair.second}
        if self._config.is_sequence(feature_name):
            places: int | str = self._fixed_places(feature_name) or "length"
            shape = ["batch", places, spec.dim]
            yield ProgramInput(name=self._name(key), kind="sequence", shape=shape, dtype="float32", **kept)  # type: ignore[arg-type]
            yield ProgramInput(
                name=self._name(f"{key}_lengths"), feature=feature_name, kind="lengths", shape=["batch"], dtype="int64",
                config=kept["config"],
            )  # fmt: skip
            return
        pooling: Pooling = getattr(feature, "pooling", None) or "sum"
        if isinstance(feature, WeightedBagFeature):
            pooling = "weighted_mean" if feature.pooling == "mean" else "weighted_sum"
        shape = ["batch", spec.dim]
        yield ProgramInput(name=self._name(key), kind="pooled", shape=shape, dtype="float32", pooling=pooling, **kept)  # type: ignore[arg-type]

    def _fixed_places(self, feature: str) -> int | None:
        model = self._config.model
        is_fixed = isinstance(model, TextClassifierConfig) and isinstance(model.encoder, FlattenEncoder | RecurrentEncoder)
        most = self._config.max_length(feature)
        return most if is_fixed or most == 1 else None

    def _name(self, key: str) -> str:
        """Returns a keyword of Python, no other's: the key's letters, `_` for all else."""
        name = "".join(letter if letter.isalnum() else "_" for letter in key)
        while name in self._names or keyword.iskeyword(name) or name == "self":
            name += "_"
        self._names.add(name)
        return name
