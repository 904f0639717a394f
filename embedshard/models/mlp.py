"""Dense layers of ranking models, with norms and dropout that no world changes.

Shapes: B rows on this rank, H numbers of a layer.
"""

from __future__ import annotations

__all__ = ["MLP", "BatchNorm", "MLPMaker"]

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from embedshard.data.batch import Batch
from embedshard.models.layers import Dropout
from embedshard.world import World

_EPS = 1e-5
_MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015) by the moments of the global batch, in which each row counts by its weight.

    torch's SyncBatchNorm refuses a CPU and knows no weights. Sums are float64, so that the world does not show in them.
    In evaluation the moments are running means over steps, of the variance without Bessel's correction.

    Args:
        width: H.
        world: whose ranks have a batch together; None where nothing is trained.
    """

    running_mean: torch.Tensor
    running_variance: torch.Tensor

    def __init__(self, width: int, world: World | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))
        self._world = world

    def forward(self, values_BH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns (B, H). Collective in training, with gradient."""
        if self.training:
            mean_H, variance_H = self._moments(values_BH, batch.weights)
        else:
            mean_H, variance_H = self.running_mean, self.running_variance
        return (values_BH - mean_H) * (torch.rsqrt(variance_H + _EPS) * self.weight) + self.bias

    def _moments(self, values_BH: torch.Tensor, weights_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._world is not None, "what is trained knows its world"
        wide_BH, weights_1B = values_BH.double(), weights_B.double().unsqueeze(0)
        sums = torch.cat([weights_1B @ wide_BH, weights_1B @ wide_BH.square()], dim=1)
        total_H = self._world.gather(sums).sum(dim=0).chunk(2)
        count = self._world.sum(weights_B.double().sum()).clamp(min=1e-12)
        mean_H = total_H[0] / count
        variance_H = (total_H[1] / count - mean_H.square()).clamp(min=0.0)
        with torch.no_grad():
            self.running_mean.lerp_(mean_H.float(), _MOMENTUM)
            self.running_variance.lerp_(variance_H.float(), _MOMENTUM)
        return mean_H.to(values_BH.dtype), variance_H.to(values_BH.dtype)


class MLP(nn.Module):
    """Linear layers, after each a norm, ReLU and dropout, as far as they are asked for.

    Args:
        width: of what comes in.
        sizes: of the layers; none where empty.
        norm: before each ReLU.
        rate: of the dropout.
        seed: the run's.
        first_stream: tells the draws of the first layer's dropout from all others of the model; each layer has the next one.
        world: whose ranks have a batch together; None where nothing is trained.

    Attributes:
        width: of what comes out.
    """

    def __init__(
        self,
        width: int,
        sizes: Sequence[int],
        norm: Literal["none", "layer", "batch"],
        rate: float,
        seed: int,
        first_stream: int,
        world: World | None,
    ) -> None:
        super().__init__()
        inputs = [width, *sizes]
        # Batch norm takes any bias away again; its gradient would be rounding, and Adam makes full steps of that.
        has_bias = norm != "batch"
        self.linears = nn.ModuleList([nn.Linear(*pair, bias=has_bias) for pair in zip(inputs, sizes, strict=False)])
        self.norms = nn.ModuleList()
        if norm != "none":
            self.norms.extend(nn.LayerNorm(size) if norm == "layer" else BatchNorm(size, world) for size in sizes)
        self.dropouts = nn.ModuleList([Dropout(rate, seed, first_stream + i) for i in range(len(sizes))])
        self.width = inputs[-1]

    def forward(self, values_BH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns (B, H). Collective in training where the norm is `batch`."""
        for i, linear in enumerate(self.linears):
            values_BH = linear(values_BH)
            if len(self.norms):
                norm = self.norms[i]
                values_BH = norm(values_BH, batch) if isinstance(norm, BatchNorm) else norm(values_BH)
            values_BH = self.dropouts[i](torch.relu(values_BH), batch)
        return values_BH


class MLPMaker:
    """Makes the MLPs of one model, each with draws of its own.

    Args:
        norm: of all layers.
        rate: of the dropout of all layers.
        seed: the run's.
        world: whose ranks have a batch together; None where nothing is trained.
    """

    def __init__(self, norm: Literal["none", "layer", "batch"], rate: float, seed: int, world: World | None) -> None:
        self._norm, self._rate, self._seed, self._world = norm, rate, seed, world
        self._next_stream = 1

    def __call__(self, width: int, sizes: Sequence[int]) -> MLP:
        """Returns one, from `width` numbers through layers of these sizes."""
        made = MLP(width, sizes, self._norm, self._rate, self._seed, self._next_stream, self._world)
        self._next_stream += len(sizes)
        return made
