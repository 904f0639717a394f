"""Optimizers: fused ones for tables, torch's for the rest, one schedule for both, and the proof of who trains what.

TorchRec decides by the plan whether a table keeps the optimizer that it was given, and does not say so. So after
sharding, and before the first step, `check_ownership` compares each table's kernel with what the config names.
"""

from __future__ import annotations

__all__ = ["Optimizers", "attach_table_optimizers", "learning_rate_factor"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DenseOptimizerConfig, ScheduleConfig, TableOptimizerConfig
from embedshard.errors import ConfigError, PlanError
from embedshard.world import World

_TABLE_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
_FUSED_TYPES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}
_ON_CPU = ("sgd", "adagrad", "rowwise_adagrad")
_DENSE_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def learning_rate_factor(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Returns the factor on all learning rates at a 0-based step of a run of `num_steps`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    span = schedule.decay_steps or max(num_steps - schedule.warmup_steps, 1)
    done = min((step - schedule.warmup_steps) / span, 1.0)
    left = 1.0 - done if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final + (1.0 - schedule.final) * left


def _arguments(optimizer: TableOptimizerConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"lr": optimizer.lr}
    if optimizer.kind != "sgd":
        arguments["eps"] = optimizer.eps
    if optimizer.kind == "adam":
        arguments["betas"] = optimizer.betas
    return arguments


def attach_table_optimizers(model: nn.Module, specs: Sequence[TableSpec], device: torch.device) -> None:
    """Tells each unsharded table which optimizer its kernel is to fuse.

    Raises:
        ConfigError: if FBGEMM does not have the optimizer on this device.
    """
    by_name = {spec.name: spec for spec in specs}
    for module in model.modules():
        if not isinstance(module, EmbeddingBagCollection):
            continue
        for name, bag in module.embedding_bags.items():
            optimizer = by_name[name].optimizer
            if device.type == "cpu" and optimizer.kind not in _ON_CPU:
                raise ConfigError(
                    f"table '{name}': FBGEMM has no fused '{optimizer.kind}' on CPU. "
                    f"Choose one of {', '.join(_ON_CPU)}, or train on CUDA."
                )
            # A dict of its own: sharding writes into it.
            _apply_optimizer_in_backward(_TABLE_CLASSES[optimizer.kind], [bag.weight], _arguments(optimizer))


class Optimizers:
    """All optimizers of a sharded model as one.

    Args:
        model: the sharded model.
        config: the config.
        specs: its tables.
        world: whose ranks train together.

    Raises:
        ConfigError: if the dense optimizer does not take its options.
        PlanError: if a table is not trained by the optimizer that the config names.
    """

    def __init__(self, model: DistributedModelParallel, config: Config, specs: Sequence[TableSpec], world: World) -> None:
        self._schedule = config.optimizer.schedule
        self._clip_norm = config.optimizer.dense.clip_norm
        self._fused = model.fused_optimizer
        self._dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        check_ownership(model, specs, self._dense_parameters, world)
        self.dense = _dense_optimizer(config.optimizer.dense, self._dense_parameters)
        groups = [group for _, fused in self._fused.optimizers for group in fused.param_groups]
        groups += self.dense.param_groups if self.dense is not None else []
        self._base_rates = [(group, float(group["lr"])) for group in groups]
        self._factor: float | None = None

    def set_learning_rates(self, step: int, num_steps: int) -> float:
        """Sets the learning rates of a 0-based step; returns the schedule's factor.

        FBGEMM's kernels read theirs when the fused optimizer's `zero_grad` is called.
        """
        factor = learning_rate_factor(self._schedule, step, num_steps)
        if factor != self._factor:
            for group, base in self._base_rates:
                group["lr"] = base * factor
            self._fused.zero_grad()
            self._factor = factor
        return factor

    def make_dense_state(self) -> None:
        """Makes the dense optimizer's state, which torch makes at the first step, so that it can be loaded into.

        Takes a step without gradients: parameters must be loaded afterwards.
        """
        if self.dense is not None:
            self.dense.init_state()

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Returns the dense optimizer's tensors as live views, by `<parameter>/<state>`."""
        if self.dense is None:
            return {}
        return {
            f"{parameter}/{kind}": value
            for parameter, values in self.dense.state_dict()["state"].items()
            for kind, value in values.items()
            if isinstance(value, torch.Tensor)
        }

    def zero_grad(self) -> None:
        """Forgets the dense gradients."""
        if self.dense is not None:
            self.dense.zero_grad(set_to_none=False)

    def step(self) -> None:
        """Takes the dense step; tables have taken theirs in the backward pass."""
        if self.dense is None:
            return
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._dense_parameters.values(), self._clip_norm)
        self.dense.step()


def _dense_optimizer(dense: DenseOptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> KeyedOptimizerWrapper | None:
    if not parameters:
        return None
    try:
        return KeyedOptimizerWrapper(
            dict(parameters), lambda values: _DENSE_CLASSES[dense.kind](values, lr=dense.lr, **dense.options)
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.dense.options: torch.optim.{_DENSE_CLASSES[dense.kind].__name__} refuses "
            f"{dense.options}: {error}. See its arguments in torch's documentation."
        ) from error


def check_ownership(
    model: DistributedModelParallel,
    specs: Sequence[TableSpec],
    dense_parameters: Mapping[str, nn.Parameter],
    world: World,
) -> None:
    """Checks that each table is trained by the fused optimizer that its config names, and nothing else by two. Collective.

    Raises:
        PlanError: naming the table, what trains it, what should, and what to do.
    """
    found = {name: kind for owned in world.gather_objects(dict(_fused_tables(model))) for name, kind in owned.items()}
    for spec in specs:
        kind, eps = found.get(spec.name, (None, None))
        by_dense = [name for name in dense_parameters if f".embedding_bags.{spec.name}." in f".{name}."]
        expected = _FUSED_TYPES[spec.optimizer.kind]
        if kind is None or by_dense:
            owner = "the dense optimizer" if by_dense else "no optimizer"
            raise PlanError(
                f"table '{spec.name}' is trained by {owner} under this plan, its config names "
                f"'{spec.optimizer.kind}'. Allow it other sharding types (tables.{spec.name}.sharding.types)."
            )
        if kind != expected.value:
            raise PlanError(
                f"table '{spec.name}' is trained by FBGEMM's '{kind}', its config names '{spec.optimizer.kind}'. "
                f"This is a bug of embedshard or a new release of TorchRec: please report it with 'embedshard doctor'."
            )
        if spec.optimizer.kind != "sgd" and eps is not None and not math.isclose(eps, spec.optimizer.eps):
            raise PlanError(
                f"table '{spec.name}' is trained with eps={eps}, its config names eps={spec.optimizer.eps}. "
                f"This is a bug of embedshard or a new release of TorchRec: please report it with 'embedshard doctor'."
            )


def _fused_tables(model: nn.Module) -> Iterator[tuple[str, tuple[str, float]]]:
    """Yields each table whose fused kernel is on this rank, with its optimizer's type and eps."""
    for kernel in fused_kernels(model):
        optimizer_type = kernel.emb_module.optimizer
        eps = float(kernel.emb_module.optimizer_args.eps)
        for table in kernel.config.embedding_tables:
            yield table.name, (optimizer_type.value, eps)


def fused_kernels(model: nn.Module) -> Iterator[Any]:
    """Yields TorchRec's fused kernels on this rank. They hang on lookups, which `modules()` does not reach."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            for kernel in lookup.modules():
                if hasattr(kernel, "fused_optimizer") and hasattr(kernel, "emb_module"):
                    yield kernel
