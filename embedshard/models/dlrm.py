"""DLRM: dot products of all pairs of features' vectors, the dense features made one vector among them.

Shapes: B rows on this rank, D dim of all vectors, F features with a table.
"""

from __future__ import annotations

__all__ = ["DLRM"]

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.models.dlrm import InteractionArch

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DLRMConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


class DLRM(nn.Module):
    """The model of kind `dlrm` (Naumov et al. 2019).

    Args:
        config: the config, whose model is a DLRM.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, DLRMConfig), "the registry builds it for this kind"
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        make = MLPMaker(model.norm, model.dropout, config.seed, world)
        num_vectors, dim = len(self.fields.embedded), self.fields.dims[0]
        self.dense_mlp = make(self.fields.num_dense, [*model.dense_mlp, dim]) if self.fields.num_dense else None
        # Without dense features the first vector stands in their place, and only products are used.
        others = num_vectors if self.dense_mlp is not None else num_vectors - 1
        self.interaction = InteractionArch(others)
        num_products = (others + 1) * others // 2
        self.mlp = make(num_products + (dim if self.dense_mlp is not None else 0), model.mlp)
        self.head = nn.Linear(self.mlp.width, 1)

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns the logit of each row. Collective where tables are sharded."""
        lookups = self.embeddings(batch)
        vectors, numbers_BF = self.fields(lookups, batch)
        if self.dense_mlp is not None:
            joined = self.interaction(self.dense_mlp(numbers_BF, batch), torch.stack(vectors, dim=1))
        else:
            joined = self.interaction(vectors[0], torch.stack(vectors[1:], dim=1))[:, vectors[0].shape[1] :]
        return LabelOutput(self.head(self.mlp(joined, batch)), lookups)
