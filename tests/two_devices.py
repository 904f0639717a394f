"""Trains and evaluates a config on the CPU and on a device that stands in for CUDA (`elsewhere.py`), for comparison.

Tables stay on the CPU, where FBGEMM has kernels: what is looked up is taken over to the device, and its gradient back. All
else lies there: batches, the dense part, objectives and what they estimate, optimizers, the streaming metrics, evaluation.

Run in a process of its own: `elsewhere.py` gives a process another kind of device.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import build_config
from embedshard.evaluate.evaluator import Evaluator
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.registry import build_objective
from embedshard.sharding.optimizers import Optimizers
from embedshard.sharding.shards import weight_shards
from embedshard.train.assembly import Assembly, _streaming, assemble
from embedshard.train.step import Stepper
from embedshard.world import open_world

CPU = torch.device("cpu")


class _Values:
    def __init__(self, vectors: torch.Tensor) -> None:
        self._vectors = vectors

    def values(self) -> torch.Tensor:
        return self._vectors


class _Vectors(dict[str, Any]):
    def to_dict(self) -> dict[str, torch.Tensor]:
        return {key: found.values() for key, found in self.items()}


def _bridged(look_up: Callable[[KeyedJaggedTensor], Any], device: torch.device) -> Callable[[KeyedJaggedTensor], Any]:
    def bridged(ids: KeyedJaggedTensor) -> _Vectors:
        assert ids.values().device == device, "what is looked up is on the device"
        found = look_up(ids.to(CPU))
        vectors = found.to_dict() if hasattr(found, "to_dict") else {key: found[key].values() for key in found}
        return _Vectors({key: _Values(of_key.to(device)) for key, of_key in vectors.items()})

    return bridged


def _moved(parts: Assembly, device: torch.device) -> Assembly:
    """Returns the parts of a run on the CPU with all but the tables on a device."""
    config, world = parts.config, replace(parts.world, device=device)
    tables: set[int] = set()
    for lookup in parts.model.modules():
        if isinstance(lookup, EmbeddingLookup):
            tables |= {id(module) for module in lookup.modules()}
            for collection in [lookup.plain, lookup.weighted, *lookup.sequences.values()]:
                if collection is not None:
                    collection.forward = _bridged(collection.forward, device)  # type: ignore[method-assign]
    for module in parts.model.modules():
        if id(module) in tables:
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach().to(device)))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                setattr(module, name, buffer.to(device))
        if hasattr(module, "_world"):
            module._world = world
    objective = build_objective(config, parts.specs, world).to(device)
    streaming = _streaming(config, parts.dataset, world)
    if streaming is not None:
        objective.add_module("streaming", streaming)
    optimizers = Optimizers(parts.model, config, parts.specs, world)
    describe = parts.dataset.describe_row
    stepper = Stepper(
        parts.model,
        objective,
        optimizers,
        parts.specs,
        world,
        config.seed,
        describe,
        streaming,
        None,
        config.train.precision,
    )
    evaluator = Evaluator(config, parts.dataset, parts.collator, world, objective)
    return replace(
        parts, world=world, objective=objective, streaming=streaming, optimizers=optimizers, stepper=stepper,
        evaluator=evaluator,
    )  # fmt: skip


def _run(tree: dict[str, Any], device: torch.device, steps: int) -> dict[str, Any]:
    config = build_config(tree, {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        if device != CPU:
            parts = _moved(parts, device)
        losses = []
        with parts.reader().batches(0, min(steps, parts.num_steps)) as batches:
            for batch in batches:
                parts.optimizers.set_learning_rates(batch.training_position.step, 100)
                losses.append(parts.stepper.take(batch, stop_asked=False).loss)
        weights = {shard.table: shard.tensor.clone() for shard in weight_shards(parts.model)}
        weights |= {
            name: value.detach().cpu().clone() for name, value in parts.model.named_parameters() if "embeddings" not in name
        }
        weights |= {f"objective.{name}": value.cpu().clone() for name, value in parts.objective.named_buffers()}
        metrics = parts.evaluator.evaluate(parts.model, "test", in_depth=True) if parts.evaluator.has("test") else {}
        measured = {} if parts.streaming is None else parts.streaming.measure()
    return {"losses": losses, "weights": weights, "metrics": metrics, "measured": measured}


def compare(tree: dict[str, Any], steps: int) -> None:
    """Asserts that a config trains the same on both, but for rounding.

    Raises:
        AssertionError: if it does not.
    """
    from tests.elsewhere import DEVICE

    ours, theirs = _run(tree, CPU, steps), _run(tree, DEVICE, steps)
    assert ours["losses"], "it is trained"
    torch.testing.assert_close(torch.tensor(theirs["losses"]), torch.tensor(ours["losses"]), rtol=1e-4, atol=1e-5)
    assert theirs["weights"].keys() == ours["weights"].keys()
    for name, value in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][name], value, rtol=1e-3, atol=2e-4, msg=name)
    for kind in ("metrics", "measured"):
        assert theirs[kind].keys() == ours[kind].keys()
        for name, value in ours[kind].items():
            torch.testing.assert_close(theirs[kind][name], value, rtol=1e-2, atol=1e-2, equal_nan=True, msg=name)


def refuses(tree: dict[str, Any]) -> None:
    """Asserts that a tower that adds a tensor of the CPU, or hands numpy what lies on the device, is refused there alone."""
    from embedshard.models.two_tower import Tower
    from tests.elsewhere import DEVICE

    forward = Tower.forward

    def adds_of_the_cpu(tower: Tower, vectors: Any) -> torch.Tensor:
        found = forward(tower, vectors)
        return found + torch.zeros(found.shape[1])

    def asks_numpy(tower: Tower, vectors: Any) -> torch.Tensor:
        vectors[0].detach().numpy()
        return forward(tower, vectors)

    for mistake, told in ((adds_of_the_cpu, "two devices"), (asks_numpy, "numpy")):
        Tower.forward = mistake  # type: ignore[method-assign]
        try:
            _run(tree, CPU, 1)
            with pytest.raises(RuntimeError, match=told):
                _run(tree, DEVICE, 1)
        finally:
            Tower.forward = forward  # type: ignore[method-assign]
