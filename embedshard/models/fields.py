"""What a ranking model reads of a batch: a vector a row of each feature with a table, and the dense features' numbers.

Shapes: B rows on this rank, V values of a sequence in all rows, D dim, F features.
"""

from __future__ import annotations

__all__ = ["Fields", "TargetPooling", "first_order_sum"]

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from embedshard.config import Config, bias_key
from embedshard.config.parts import DenseFeature, RankingModel, TargetAttention
from embedshard.data.batch import Batch
from embedshard.models.layers import POOLINGS


class Fields(nn.Module):
    """The features of a ranking model, in the order in which it reads them.

    Args:
        config: the config.
        model: its model.

    Attributes:
        embedded: the features with a table, in order.
        dims: the size of each one's vector.
        dense: the dense features, in order.
    """

    def __init__(self, config: Config, model: RankingModel) -> None:
        super().__init__()
        read = config.read_features(model)
        all_dense = [name for name, feature in config.features.items() if isinstance(feature, DenseFeature)]
        self.embedded = [name for name in read if name not in all_dense]
        self.dims = [config.width(name) for name in self.embedded]
        self.dense = [name for name in read if name in all_dense]
        self._places = [all_dense.index(name) for name in self.dense]
        self._targets: dict[str, str] = {}
        self.poolings = nn.ModuleDict()
        for name, dim in zip(self.embedded, self.dims, strict=True):
            if not config.is_sequence(name):
                continue
            pooling = model.sequences.get(name)
            if isinstance(pooling, TargetAttention):
                self._targets[name] = pooling.target
                self.poolings[name] = TargetPooling(dim, pooling.mlp)
            else:
                self.poolings[name] = POOLINGS[pooling.kind if pooling is not None else "attention"](dim)

    @property
    def width(self) -> int:
        """The size of all vectors and numbers side by side."""
        return sum(self.dims) + self.num_dense

    @property
    def num_dense(self) -> int:
        """How many dense features there are."""
        return len(self.dense)

    def forward(self, lookups: Mapping[str, torch.Tensor], batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns a (B, D) for each of `embedded`, and the (B, F) numbers of the dense features."""
        vectors = [self._vector(name, lookups, batch) for name in self.embedded]
        return vectors, batch.dense[:, self._places]

    def _vector(self, name: str, lookups: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        if name not in self.poolings:
            return lookups[name]
        lengths_B, pooling = batch.sequence_lengths(name), self.poolings[name]
        if not isinstance(pooling, TargetPooling):
            return pooling(lookups[name], lengths_B)
        return pooling(lookups[name], lengths_B, lookups[self._targets[name]])


class TargetPooling(nn.Module):
    """A sum of a row's vectors, each weighted by what a small network makes of it and the row's target.

    DIN (Zhou et al. 2018): the network sees both, their difference and their product; its weights are no softmax, so that
    the sum tells how much of the history is about the target.

    Args:
        dim: D.
        sizes: of the network's layers.
    """

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 4 * dim
        for size in sizes:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.weight = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor, target_BD: torch.Tensor) -> torch.Tensor:
        """Returns (B, D); zeros for an empty row."""
        rows_V = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        target_VD = target_BD.index_select(0, rows_V)
        seen = torch.cat([values_VD, target_VD, values_VD - target_VD, values_VD * target_VD], dim=1)
        return torch.zeros_like(target_BD).index_add(0, rows_V, values_VD * self.weight(seen))


def first_order_sum(lookups: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor | float:
    """Returns (B,): the sum of the weights of the features' ids; 0 without features."""
    return sum(lookups[bias_key(name)][:, 0] for name in names)
