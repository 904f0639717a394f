"""Optimizers: fused ones for tables, torch's for the rest, one schedule for all.

TorchRec decides by the plan whether a table keeps the optimizer that it was given, and does not say so. A data-parallel
table loses it: here it gets its own back, as a dense optimizer. Then `ownership.py` proves who trains what.
"""

from __future__ import annotations

__all__ = ["Optimizers", "attach_table_optimizers", "fuse_optimizer", "learning_rate_factor"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DenseOptimizerConfig, ScheduleConfig, TableOptimizerConfig
from embedshard.errors import ConfigError
from embedshard.models.embeddings import table_modules, table_weights
from embedshard.sharding.dense_gradients import DenseGradients
from embedshard.sharding.lazy_adam import AdamSteps, tell_fbgemm
from embedshard.sharding.ownership import TABLE_CLASSES, check_ownership
from embedshard.sharding.shards import Shard, replicated_tables
from embedshard.world import World

_DENSE_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED_ON = {
    "sgd": {"cpu", "cuda"},
    "adagrad": {"cpu"},
    "adam": {"cpu", "cuda"},
    "adamw": {"cpu", "cuda"},
    "rmsprop": set(),
}
"""On which devices torch takes the step of all parameters in one kernel."""
_WAYS = {"foreach", "fused", "differentiable", "capturable"}
"""Arguments of torch's optimizers that say how the step is taken."""


def learning_rate_factor(schedule: ScheduleConfig, step: int, num_steps: int, former_steps: int = 0) -> float:
    """Returns the factor on all learning rates at a 0-based step of a run of `num_steps`.

    In a run that continues others, warm-up and `decay_steps` go on counting from their first step; a decay over the rest of
    the run is over the rest of this one, and begins at 1 again.
    """
    all_steps = former_steps + step
    if all_steps < schedule.warmup_steps:
        return (all_steps + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    if schedule.decay_steps is not None:
        done = min((all_steps - schedule.warmup_steps) / schedule.decay_steps, 1.0)
    else:
        warmup_left = max(schedule.warmup_steps - former_steps, 0)
        done = min((step - warmup_left) / max(num_steps - warmup_left, 1), 1.0)
    left = 1.0 - done if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final + (1.0 - schedule.final) * left


def _arguments(optimizer: TableOptimizerConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"lr": optimizer.lr}
    if optimizer.kind != "sgd":
        arguments["eps"] = optimizer.eps
    if optimizer.kind == "adam":
        arguments["betas"] = optimizer.betas
    return arguments


def fuse_optimizer(weight: Any, optimizer_class: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> None:
    """Leaves at an unsharded table what TorchRec's kernels ask a weight for.

    These are the marks of torch's `_apply_optimizer_in_backward`, whose package compiles eight optimizers by TorchScript as
    it is imported, 0.3 s. Its hooks and the optimizer that it makes would be dropped with the unsharded weight.
    """
    weight._in_backward_optimizers = []
    weight._optimizer_classes = [optimizer_class]
    weight._optimizer_kwargs = [dict(arguments)]  # of its own: sharding writes into it


def attach_table_optimizers(model: nn.Module, specs: Sequence[TableSpec]) -> None:
    """Tells each unsharded table which optimizer its kernel is to fuse."""
    by_name = {spec.name: spec for spec in specs}
    for _, module in table_modules(model):
        for name, weight in table_weights(module).items():
            optimizer = by_name[name].optimizer
            fuse_optimizer(weight, TABLE_CLASSES[optimizer.kind], _arguments(optimizer))
            if optimizer.kind == "adam":
                tell_fbgemm(weight, optimizer)


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
        rest = dict(in_backward_optimizer_filter(model.named_parameters()))
        self._replicated = _replicated_optimizers(model, rest, specs)
        owned = {name for optimizer in self._replicated.values() for name in optimizer.params}
        self._dense_parameters = {name: parameter for name, parameter in rest.items() if name not in owned}
        check_ownership(model, specs, self._replicated, self._dense_parameters, world)
        self._gradients = DenseGradients(self._dense_parameters, world)
        self._adam_steps = AdamSteps(model, [spec.name for spec in specs if spec.optimizer.kind == "adam"])
        self.dense = _dense_optimizer(config.optimizer.dense, self._dense_parameters)
        groups = [group for _, fused in self._fused.optimizers for group in fused.param_groups]
        groups += [group for optimizer in self._unfused for group in optimizer.param_groups]
        self._base_rates = [(group, float(group["lr"])) for group in groups]
        self._factor: float | None = None

    def set_learning_rates(self, step: int, num_steps: int, former_steps: int = 0) -> float:
        """Sets the learning rates of a 0-based step; returns the schedule's factor.

        `former_steps` are those of the runs that this one continues.

        FBGEMM's kernels read theirs when the fused optimizer's `zero_grad` is called.
        """
        factor = learning_rate_factor(self._schedule, step, num_steps, former_steps)
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

    def replicated_state(self) -> Iterator[Shard]:
        """Yields the state of data-parallel tables as live views, named and shaped as the fused optimizers' is."""
        for table, optimizer in sorted(self._replicated.items()):
            for values in optimizer.state_dict()["state"].values():
                if "sum" in values:  # Adagrad's (rows, dim), or row-wise Adagrad's (rows, 1)
                    state = values["sum"].squeeze(1) if isinstance(optimizer._optimizer, RowWiseAdagrad) else values["sum"]
                    yield Shard(table, "momentum1", state, (0,) * state.dim(), tuple(state.shape), is_replicated=True)

    def adam_steps(self) -> dict[str, torch.Tensor]:
        """Returns how many steps each table under Adam has taken, as live views, by `<table>/step`."""
        return {f"{table}/step": taken for table, taken in self._adam_steps.taken.items()}

    def zero_grad(self) -> None:
        """Makes ready for a step: forgets the gradients of all that is not fused."""
        self._adam_steps.tell()
        self._gradients.clear()
        for optimizer in self._replicated.values():
            optimizer.zero_grad(set_to_none=False)

    def sum_gradients(self, factor: float) -> None:
        """Makes the dense gradients the sum over the ranks, times a factor. Collective; once a backward pass."""
        self._gradients.finish(factor)

    def step(self) -> None:
        """Takes the step of all that is not fused; other tables have taken theirs in the backward pass."""
        if self.dense is not None and self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._dense_parameters.values(), self._clip_norm)
        for optimizer in self._unfused:
            optimizer.step()
        self._adam_steps.add()

    @property
    def _unfused(self) -> list[KeyedOptimizerWrapper]:
        return [*self._replicated.values(), *([] if self.dense is None else [self.dense])]


def _replicated_optimizers(
    model: DistributedModelParallel, parameters: Mapping[str, nn.Parameter], specs: Sequence[TableSpec]
) -> dict[str, KeyedOptimizerWrapper]:
    """Returns the optimizer of each data-parallel table, by its name: the one that its config names."""
    by_name = {spec.name: spec for spec in specs}
    found = {}
    for parameter, table in replicated_tables(model).items():
        optimizer = by_name[table].optimizer
        factory = partial(TABLE_CLASSES[optimizer.kind], **_arguments(optimizer))
        found[table] = KeyedOptimizerWrapper({parameter: parameters[parameter]}, factory)
    return found


def _dense_optimizer(dense: DenseOptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> KeyedOptimizerWrapper | None:
    if not parameters:
        return None
    options = dict(dense.options)
    devices = {parameter.device.type for parameter in parameters.values()}
    if devices <= _FUSED_ON[dense.kind] and not _WAYS & options.keys():
        options["fused"] = True
    try:
        return KeyedOptimizerWrapper(
            dict(parameters), lambda values: _DENSE_CLASSES[dense.kind](values, lr=dense.lr, **options)
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.dense.options: torch.optim.{_DENSE_CLASSES[dense.kind].__name__} refuses "
            f"{dense.options}: {error}. See its arguments in torch's documentation."
        ) from error
