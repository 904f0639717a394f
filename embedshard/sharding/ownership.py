"""The proof of who trains what: every table by the optimizer that its config names, by nothing else, and by one.

TorchRec does not check it. The check is made after sharding and before the first step.
"""

from __future__ import annotations

__all__ = ["TABLE_CLASSES", "check_ownership"]

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizerWrapper

from embedshard.config import TableSpec
from embedshard.config.placement import changed_optimizer
from embedshard.errors import PlanError
from embedshard.sharding.lazy_adam import LazyAdamTables
from embedshard.sharding.shards import TABLE_HOLDERS, fused_kernels, num_column_blocks
from embedshard.world import World

TABLE_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
"""The class that stands for each optimizer of tables: TorchRec fuses it, or it trains a data-parallel table itself."""

_FUSED_TYPES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}
_LAZY_ADAM = "lazy_adam"
_REPORT = "This is a bug of embedshard or a new release of TorchRec: please report it with 'embedshard doctor'."


def check_ownership(
    model: DistributedModelParallel,
    specs: Sequence[TableSpec],
    replicated: Mapping[str, KeyedOptimizerWrapper],
    dense_parameters: Mapping[str, nn.Parameter],
    world: World,
) -> None:
    """Checks that each table is trained by the optimizer that its config names, and by nothing else. Collective.

    Args:
        model: the sharded model.
        specs: its tables.
        replicated: the optimizers of data-parallel tables, by table.
        dense_parameters: what the dense optimizer trains, by name.
        world: whose ranks hold the model.

    Raises:
        PlanError: naming the table, what trains it, what should, and what to do.
    """
    fused = defaultdict(set)
    for owned in world.gather_objects(sorted(_fused_tables(model))):
        for table, optimizer in owned:
            fused[table].add(optimizer)
    blocks = num_column_blocks(model)
    for spec in specs:
        of_table = tuple(f".{holder}.{spec.name}.weight" for holder in TABLE_HOLDERS)
        by_dense = any(f".{name}".endswith(of_table) for name in dense_parameters)
        _check_owner(spec, bool(fused[spec.name]), spec.name in replicated, by_dense)
        is_lazy = spec.optimizer.kind == "adam" and world.device.type == "cpu"
        needed = _LAZY_ADAM if is_lazy else _FUSED_TYPES[spec.optimizer.kind].value
        for name, eps, betas in fused[spec.name]:
            _check_optimizer(spec, f"FBGEMM's '{name}'" if name != _LAZY_ADAM else "the lazy Adam", name == needed, eps)
            if spec.optimizer.kind == "adam" and betas != spec.optimizer.betas:
                raise PlanError(
                    f"table '{spec.name}' is trained with betas={betas}, its config names {spec.optimizer.betas}. {_REPORT}"
                )
        if spec.name in replicated:
            optimizer = replicated[spec.name]._optimizer
            eps = float(optimizer.defaults.get("eps", 0.0))
            is_right = type(optimizer) is TABLE_CLASSES[spec.optimizer.kind]
            _check_optimizer(spec, f"a dense {type(optimizer).__name__}", is_right, eps)
        _check_columns(spec, blocks[spec.name])


def _check_owner(spec: TableSpec, is_fused: bool, is_replicated: bool, is_dense: bool) -> None:
    owners = [
        owner
        for owner, has in (
            ("a fused optimizer", is_fused),
            ("an optimizer of its own", is_replicated),
            ("the dense optimizer", is_dense),
        )
        if has
    ]
    if len(owners) != 1 or is_dense:
        raise PlanError(
            f"table '{spec.name}' is trained by {' and '.join(owners) or 'no optimizer'} under this plan, its config names "
            f"'{spec.optimizer.kind}'. Allow it other sharding types (tables.{spec.name}.sharding)."
        )


def _check_optimizer(spec: TableSpec, found: str, is_right: bool, eps: float) -> None:
    if not is_right:
        raise PlanError(f"table '{spec.name}' is trained by {found}, its config names '{spec.optimizer.kind}'. {_REPORT}")
    if spec.optimizer.kind != "sgd" and not math.isclose(eps, spec.optimizer.eps):
        raise PlanError(
            f"table '{spec.name}' is trained with eps={eps}, its config names eps={spec.optimizer.eps}. {_REPORT}"
        )


def _check_columns(spec: TableSpec, num_blocks: int) -> None:
    is_changed = num_blocks > 1 and changed_optimizer("column_wise", spec.optimizer.kind) is not None
    if is_changed and not spec.sharding.allow_changed_optimizer:
        raise PlanError(
            f"table '{spec.name}' is cut into {num_blocks} blocks of columns: '{spec.optimizer.kind}' would keep "
            f"{num_blocks} statistics per row instead of 1, which trains other weights. Choose a type that cuts no columns, "
            f"the optimizer 'adagrad' or 'sgd', or ask for it: tables.{spec.name}.sharding.allow_changed_optimizer: true."
        )


def _fused_tables(model: nn.Module) -> Iterator[tuple[str, tuple[str, float, tuple[float, float]]]]:
    """Yields each table whose kernel is on this rank, with the kernel's optimizer, eps and betas."""
    for kernel in fused_kernels(model):
        tables, numbers = kernel.emb_module, kernel.emb_module.optimizer_args
        name = _LAZY_ADAM if isinstance(tables, LazyAdamTables) else tables.optimizer.value
        for table in kernel.config.embedding_tables:
            yield table.name, (name, float(numbers.eps), (float(numbers.beta1), float(numbers.beta2)))
