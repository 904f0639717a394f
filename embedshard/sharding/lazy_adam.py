"""Adam where FBGEMM has none, which is on a CPU: for the rows that a batch looks up, and for no others.

The rule is torch.optim.SparseAdam's. A row that is not looked up keeps its weights and its moments; the bias correction
counts the steps that the table has taken, not those of the row. The backward pass is that of `row_tables.py`: it adds up the
gradient of each distinct row and takes the step there and then.

TorchRec builds the kernels, cuts tables, keeps weights and learning rates. It is told of SGD, which keeps no state, with
Adam's numbers beside it, and its kernels that were told so become `LazyAdamTables`. `ownership.py` proves that all did.
"""

from __future__ import annotations

__all__ = ["AdamSteps", "LazyAdamTables", "lazy_adam_shards", "pose_as_sgd", "take_over", "tell_fbgemm"]

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from embedshard.config.parts import TableOptimizerConfig
from embedshard.sharding.row_kernels import NO_STATE, Rule, State
from embedshard.sharding.row_tables import RowTables
from embedshard.sharding.shards import Shard, fused_kernels

_ADAMS_OWN = "beta1"
"""By this parameter of a kernel that says SGD, the one that stands for Adam is known."""


class LazyAdamTables(RowTables):
    """FBGEMM's tables of one kernel, trained by lazy Adam in the backward pass.

    Attributes:
        moments: of each table, the running means of the gradient and of its square, (rows, columns) float32.
        steps: of each table, how many steps it has taken, (1,) int64. `AdamSteps` counts.
    """

    rule = Rule.ADAM
    moments: list[tuple[torch.Tensor, torch.Tensor]]
    steps: list[torch.Tensor]

    def begin(self, names: Sequence[str]) -> None:
        """Makes the state, all zeros."""
        super().begin(names)
        self.moments, self.steps = [], []
        for weight in self.split_embedding_weights():
            self.moments.append((torch.zeros(weight.shape), torch.zeros(weight.shape)))
            self.steps.append(torch.zeros(1, dtype=torch.int64))

    def state(self, table: int) -> State:
        """Returns a table's moments, as `move_rows` takes them."""
        means, squares = self.moments[table]
        return NO_STATE[0], squares.numpy(), means.numpy()

    def numbers(self, table: int) -> tuple[float, float, float, float, float]:
        """Returns the rate of a table's next step, its bias correction included, and Adam's numbers."""
        beta1, beta2 = self.optimizer_args.beta1, self.optimizer_args.beta2
        step = int(self.steps[table]) + 1
        size = self.get_learning_rate() * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return size, self.optimizer_args.eps, 1 - beta1, beta2, 1 - beta2


class AdamSteps:
    """How many steps each table under Adam has taken: the same on every rank, also where none of the table lies.

    Args:
        model: the sharded model.
        tables: the names of its tables under Adam, lazy or fused.

    Attributes:
        taken: by table, (1,) int64.
    """

    def __init__(self, model: nn.Module, tables: Iterable[str]) -> None:
        self.taken = {table: torch.zeros(1, dtype=torch.int64) for table in tables}
        self._fbgemm: list[tuple[Any, torch.Tensor]] = []
        for kernel in fused_kernels(model):
            names = [table.name for table in kernel.config.embedding_tables]
            if isinstance(kernel.emb_module, LazyAdamTables):
                kernel.emb_module.steps = [self.taken[name] for name in names]
            elif kernel.emb_module.optimizer == EmbOptimType.ADAM:
                self._fbgemm.append((kernel.emb_module, self.taken[names[0]]))

    def tell(self) -> None:
        """Tells FBGEMM's own Adam, before a step: it counts lookups, also evaluations', and begins anew on resume."""
        for tables, taken in self._fbgemm:
            tables.iter.fill_(int(taken))  # a copy would wait for the GPU
            tables.iter_cpu.fill_(int(taken))

    def add(self) -> None:
        """Counts a step."""
        for taken in self.taken.values():
            taken.add_(1)


def tell_fbgemm(weight: Any, optimizer: TableOptimizerConfig) -> None:
    """Gives an unsharded table, which was given Adam, Adam's numbers by FBGEMM's names."""
    beta1, beta2 = optimizer.betas
    weight._optimizer_kwargs = [{"lr": optimizer.lr, "eps": optimizer.eps, "beta1": beta1, "beta2": beta2}]


def pose_as_sgd(model: nn.Module) -> None:
    """Has TorchRec make SGD's kernels for tables under Adam. After planning: a plan counts the state of Adam."""
    weights: Iterator[Any] = model.parameters()
    for weight in weights:
        if getattr(weight, "_optimizer_classes", None) == [torch.optim.Adam]:
            weight._optimizer_classes = [torch.optim.SGD]


def take_over(model: nn.Module) -> None:
    """Makes lazy Adam's of the kernels that were made for it in a sharded model."""
    for kernel in fused_kernels(model):
        is_sgd = kernel.emb_module.optimizer == EmbOptimType.EXACT_SGD
        if is_sgd and _ADAMS_OWN in (kernel.config.fused_params or {}):
            kernel.emb_module.__class__ = LazyAdamTables  # in place: TorchRec's optimizers and state dicts hold it
            kernel.emb_module.begin([table.name for table in kernel.config.embedding_tables])


def lazy_adam_shards(model: nn.Module) -> Iterator[Shard]:
    """Yields this rank's blocks of lazy Adam's moments that are not empty, named as FBGEMM's Adam's are. Not collective."""
    for kernel in fused_kernels(model):
        if not isinstance(kernel.emb_module, LazyAdamTables):
            continue
        for table, moments in zip(kernel.config.embedding_tables, kernel.emb_module.moments, strict=True):
            offset, shape = tuple(table.local_metadata.shard_offsets), tuple(table.global_metadata.size)
            for kind, moment in zip(("momentum1", "momentum2"), moments, strict=True):
                if moment.numel():
                    yield Shard(table.name, kind, moment, offset, shape)
