"""What becomes a program: a model without its tables, given what was looked up; and how torch traces and writes it.

Shapes: B rows, L places of the longest row, D dim.
"""

from __future__ import annotations

__all__ = ["UNTRACEABLE", "LookedUp", "Traced", "save_program", "vector_of"]

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import nn

from embedshard.config import bias_key
from embedshard.errors import ExportError
from embedshard.export.program_file import check_archive
from embedshard.export.signature import ExportedProgram, ProgramInput, ProgramOutput
from embedshard.storage import Location

Inputs = Mapping[str, torch.Tensor]

UNTRACEABLE: Final = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError)
"""What a model of one's own may raise where it does what no program can."""
_TRACED_ROWS: Final = 4
_TRACED_PLACES: Final = 3


class _Given:
    """What a model reads of a batch, and what was looked up for it."""

    def __init__(self, dense: torch.Tensor, lookups: dict[str, torch.Tensor], lengths: Inputs) -> None:
        self.dense, self.lookups = dense, lookups
        self._lengths = lengths
        self.draws = None

    def sequence_lengths(self, name: str) -> torch.Tensor:
        return self._lengths[name]


class LookedUp(nn.Module):
    """In the place of the tables."""

    def forward(self, batch: _Given) -> dict[str, torch.Tensor]:
        """Returns what was looked up, by key."""
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


def save_program(traced: Traced, program: ExportedProgram, folder: Location) -> None:
    """Traces a program and writes it.

    Raises:
        ExportError: if it does what no program can.
        StorageError: if it cannot be written.
    """
    given, dynamic = _example(program.inputs), {}
    batch = torch.export.Dim("batch", min=1)
    for number, spec in enumerate(program.inputs):
        free: dict[int, Any] = {place: batch for place, size in enumerate(spec.shape) if size == "batch"}
        if "length" in spec.shape:
            most = spec.config.get("max_length")
            free[1] = torch.export.Dim(f"length_{number}", min=1, **({} if most is None else {"max": most}))
        dynamic[spec.name] = free
    try:
        with torch.no_grad():
            exported = torch.export.export(traced, (), given, dynamic_shapes=dynamic, strict=False)
    except UNTRACEABLE as error:
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


def _example(inputs: Sequence[ProgramInput]) -> dict[str, torch.Tensor]:
    """Returns ones of the shapes that a program is traced with, by keyword."""
    given = {}
    for spec in inputs:
        places = min(_TRACED_PLACES, spec.config.get("max_length") or _TRACED_PLACES)
        shape = [{"batch": _TRACED_ROWS, "length": places}.get(str(size), size) for size in spec.shape]
        given[spec.name] = torch.ones([cast(int, size) for size in shape], dtype=getattr(torch, spec.dtype))
    return given


@torch.no_grad()
def vector_of(traced: Traced, inputs: Sequence[ProgramInput]) -> ProgramOutput:
    """Returns what a tower of a user's own model returns, whose width no config tells."""
    vector_BD = traced.outputs(_example(inputs))["vector"]
    if vector_BD.dim() != 2 or vector_BD.shape[0] != _TRACED_ROWS:
        raise ValueError(f"it returns {list(vector_BD.shape)} for {_TRACED_ROWS} rows, and not a vector each")
    return ProgramOutput(name="vector", shape=["batch", vector_BD.shape[1]], link="product")
