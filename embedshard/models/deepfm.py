"""DeepFM: a factorization machine and dense layers over the same vectors.

Shapes: B rows on this rank, D dim of all vectors, F features.
"""

from __future__ import annotations

__all__ = ["DeepFM", "pair_products"]

from collections.abc import Sequence

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DeepFMConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields, first_order_sum
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


def pair_products(vectors_BFD: torch.Tensor) -> torch.Tensor:
    """Returns (B,): the sum of the dot products of all pairs of a row's vectors (Rendle 2010, in O(F D)).

    TorchRec's FactorizationMachine lays the vectors end to end first, so that it multiplies each number with all others,
    those of the same vector and of other columns too: another function than the paper's.
    """
    return 0.5 * (vectors_BFD.sum(dim=1).square() - vectors_BFD.square().sum(dim=1)).sum(dim=1)


_DENSE_SCALE = 0.01  # numbers that are not scaled, squared, are large before anything is learnt


class DeepFM(nn.Module):
    """The model of kind `deepfm` (Guo et al. 2017): first order + products of pairs + dense layers.

    A dense feature has a vector that is learnt, times its number. An id's weight of the first order is a table of 4
    columns whose first is used.

    Args:
        config: the config, whose model is a DeepFM.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, DeepFMConfig), "the registry builds it for this kind"
        self._first_order = config.first_order()
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        num_dense, dim = self.fields.num_dense, self.fields.dims[0]
        self.dense_vectors = nn.Parameter(torch.randn(num_dense, dim) * _DENSE_SCALE) if num_dense else None
        self.linear = nn.Linear(num_dense, 1) if num_dense else None
        self.mlp = MLPMaker(model.norm, model.dropout, config.seed, world)(self.fields.width, model.mlp)
        self.head = nn.Linear(self.mlp.width, 1)

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns the logit of each row. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> LabelOutput:
        """Returns the same of what was looked up."""
        vectors, numbers_BF = self.fields(lookups, batch)
        deep_B = self.head(self.mlp(torch.cat([*vectors, numbers_BF], dim=1), batch))[:, 0]
        vectors_BFD = torch.stack(vectors, dim=1)
        logits_B = deep_B + first_order_sum(lookups, self._first_order)
        if self.dense_vectors is not None and self.linear is not None:
            logits_B = logits_B + self.linear(numbers_BF)[:, 0]
            vectors_BFD = torch.cat([vectors_BFD, numbers_BF.unsqueeze(2) * self.dense_vectors], dim=1)
        return LabelOutput((logits_B + pair_products(vectors_BFD)).unsqueeze(1), lookups)
