"""Towers and models as `torch.export` programs, which load without embedshard and take looked-up vectors by keyword.

The model is built as for training, but for its tables, which stay where they cost nothing (torch's `meta` device); its dense
part comes from the checkpoint. In place of the lookup stands what was looked up outside. Sequences are given padded, with
lengths: of one behind the other, a program would have to ask how many there are, and shapes would depend on values.

The batch, and the length of sequences, are free. What cannot be: a recurrent layer over places (its operator unrolls them)
and `flatten`, which has a weight a place; they are given as many as the feature's `max_length`.

Shapes: B rows, L places of the longest row, D dim.
"""

from __future__ import annotations

__all__ = ["Traced", "make_programs", "save_program"]

import copy
import inspect
import io
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

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
from embedshard.errors import CheckpointError, ExportError
from embedshard.export.parts import kept_vocabulary
from embedshard.export.program_file import check_archive
from embedshard.export.signature import ExportedProgram, Pooling, ProgramInput, ProgramOutput
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.padded import pad_layers
from embedshard.models.registry import build_model
from embedshard.storage import Location
from embedshard.train.checkpoint_reader import Checkpoint

Inputs = Mapping[str, torch.Tensor]

_TRACED_ROWS: Final = 4
_TRACED_PLACES: Final = 3
_LOOKUP: Final = "embeddings."


# ------------------------------------------------------------------------------------------ what stands in for a batch
class _Sequence:
    def __init__(self, lengths_B: torch.Tensor) -> None:
        self._lengths_B = lengths_B

    def lengths(self) -> torch.Tensor:
        return self._lengths_B


class _Given:
    """What a model reads of a batch, and what was looked up for it."""

    def __init__(self, dense: torch.Tensor, lookups: dict[str, torch.Tensor], lengths: Inputs) -> None:
        self.dense, self.lookups = dense, lookups
        self.sequences = {name: _Sequence(lengths_B) for name, lengths_B in lengths.items()}
        self.draws = None


class _LookedUp(nn.Module):
    """In the place of the tables."""

    def forward(self, batch: _Given) -> dict[str, torch.Tensor]:
        return batch.lookups


class Traced(nn.Module):
    """What becomes a program: a model, or one of its towers, without tables.

    Args:
        inputs: what it takes.
        dense: the config's dense features, in order.
        model: what it is made of, over padded sequences.
        run: from the model and what stands in for a batch to tensors by name.
    """

    def __init__(
        self,
        inputs: Sequence[ProgramInput],
        dense: Sequence[str],
        model: nn.Module,
        run: Callable[[Any, Any], dict[str, torch.Tensor]],
    ) -> None:
        super().__init__()
        self.model, self._inputs, self._dense, self._run = model, tuple(inputs), list(dense), run

        def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.outputs(inputs)

        names = (inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY) for spec in inputs)
        forward.__signature__ = inspect.Signature(list(names))  # type: ignore[attr-defined]  # torch wants them by name
        self.forward = forward

    def outputs(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Returns tensors by name of tensors by name."""
        size = inputs[self._inputs[0].name].shape[0]
        numbers, lookups, lengths = {}, {}, {}
        for spec in self._inputs:
            value = inputs[spec.name]
            if spec.kind == "dense":
                numbers[spec.feature] = _normalised(spec, value)
            elif spec.kind == "lengths":
                lengths[spec.feature] = value
            else:
                lookups[_key(spec)] = value
        for name, lengths_B in lengths.items():
            places_L = torch.arange(lookups[name].shape[1], device=lengths_B.device)
            lookups[name] = torch.where((places_L < lengths_B.unsqueeze(1)).unsqueeze(2), lookups[name], 0.0)
        columns = [numbers[name] if name in numbers else torch.zeros(size) for name in self._dense]
        dense = torch.stack(columns, dim=1) if columns else torch.zeros(size, 0)
        return self._run(self.model, _Given(dense, lookups, lengths))


def _key(spec: ProgramInput) -> str:
    """Returns under which key a model finds vectors: the feature's, but of biases the table's, which has its name."""
    return spec.table if spec.table == bias_key(spec.feature) else spec.feature


def _normalised(spec: ProgramInput, value_B: torch.Tensor) -> torch.Tensor:
    """Returns numbers as the model reads them, (B,), of float64 as they are in the data, as the reader makes them."""
    normalise, found_B = spec.config["normalise"], value_B
    if normalise == "log1p":
        found_B = torch.sign(value_B) * torch.log1p(torch.abs(value_B))
    elif normalise == "standardise":
        assert spec.mean is not None, "the run keeps what it standardises by"
        assert spec.deviation is not None, "the run keeps what it standardises by"
        found_B = (value_B - spec.mean) / spec.deviation
    if spec.config["missing"] == "zero":
        found_B = torch.where(torch.isnan(value_B), 0.0, found_B)
    return found_B.to(torch.float32)


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
    made = {}
    for name, keys, outputs, left_out, run in _parts(config):
        inputs = maker.inputs(keys)
        traced = Traced(inputs, dense, _without(model, left_out), run)
        program = ExportedProgram(file=f"programs/{name}.pt2", torch=torch.__version__, inputs=inputs, outputs=outputs)
        made[name] = (traced.eval().requires_grad_(False), program)
    return made, []


def save_program(traced: Traced, program: ExportedProgram, folder: Location) -> None:
    """Traces a program and writes it.

    Raises:
        ExportError: if it does what no program can.
        StorageError: if it cannot be written.
    """
    given, dynamic = {}, {}
    batch = torch.export.Dim("batch", min=1)
    for number, spec in enumerate(program.inputs):
        free: dict[int, Any] = {place: batch for place, size in enumerate(spec.shape) if size == "batch"}
        shape = [{"batch": _TRACED_ROWS, "length": _TRACED_PLACES}.get(str(size), size) for size in spec.shape]
        if "length" in spec.shape:
            most = spec.config.get("max_length")
            shape[1] = min(_TRACED_PLACES, most or _TRACED_PLACES)
            free[1] = torch.export.Dim(f"length_{number}", min=1, **({} if most is None else {"max": most}))
        dtype = getattr(torch, spec.dtype)
        given[spec.name] = torch.ones([cast(int, size) for size in shape], dtype=dtype)
        dynamic[spec.name] = free
    try:
        with torch.no_grad():
            exported = torch.export.export(traced, (), given, dynamic_shapes=dynamic, strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"torch.export cannot trace the model: {type(error).__name__}: {reason}") from error
    exported.example_inputs = None  # they would be pickled
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for origin in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):  # paths of this machine
                node.meta.pop(origin, None)
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    place = folder.join(*program.file.split("/"))
    check_archive(stream.getvalue(), place.uri)
    place.parent.make_dirs()
    place.write_bytes_atomically(stream.getvalue())


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


def _parts(config: Config) -> Iterator[Part]:
    """Yields each program's name, the keys that it reads, what it returns, the modules that it lacks, and how it runs."""
    model = config.model
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
            lambda made, given: {"vector": made.encode_padded(given.lookups[name], given.sequences[name].lengths(), given)},
        )
        yield "item", [model.item_id], vector, everything, lambda _, given: {"vector": given.lookups[model.item_id].clone()}
    else:
        labels = list(config.data.label_columns)
        yield "model", _read(config), _outputs(config, labels), [], lambda made, given: _by_label(labels, made(given))


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
            setattr(model.get_submodule(parent), own, _LookedUp())
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
