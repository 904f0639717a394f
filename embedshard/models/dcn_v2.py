"""DCN V2: layers that multiply all features with each other, and dense layers after or beside them.

Shapes: B rows on this rank, N numbers of all features side by side.
"""

from __future__ import annotations

__all__ = ["DCNv2"]

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DCNv2Config
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


class DCNv2(nn.Module):
    """The model of kind `dcn_v2` (Wang et al. 2021): x' = x0 * (W x + b) + x, W full or a product of two thin matrices.

    Args:
        config: the config, whose model is a DCN V2.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, DCNv2Config), "the registry builds it for this kind"
        self._is_stacked = model.structure == "stacked"
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        width = self.fields.width
        if model.low_rank is None:
            self.cross = CrossNet(width, model.cross_layers)
        else:
            self.cross = LowRankCrossNet(width, model.cross_layers, model.low_rank)
        self.mlp = MLPMaker(model.norm, model.dropout, config.seed, world)(width, model.mlp)
        self.head = nn.Linear(self.mlp.width if self._is_stacked else width + self.mlp.width, 1)

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns the logit of each row. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> LabelOutput:
        """Returns the same of what was looked up."""
        vectors, numbers_BF = self.fields(lookups, batch)
        joined_BN = torch.cat([*vectors, numbers_BF], dim=1)
        crossed_BN = self.cross(joined_BN)
        if self._is_stacked:
            last = self.mlp(crossed_BN, batch)
        else:
            last = torch.cat([crossed_BN, self.mlp(joined_BN, batch)], dim=1)
        return LabelOutput(self.head(last), lookups)
