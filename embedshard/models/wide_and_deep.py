"""Wide & Deep: a linear model of ids and numbers, and dense layers over vectors, added up.

Shapes: B rows on this rank, F dense features.
"""

from __future__ import annotations

__all__ = ["WideAndDeep"]

from collections.abc import Sequence

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import WideAndDeepConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields, first_order_sum
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


class WideAndDeep(nn.Module):
    """The model of kind `wide_and_deep` (Cheng et al. 2016). Crossed features are columns of the data like any other.

    An id's weight in the linear model is a table of 4 columns whose first is used.

    Args:
        config: the config, whose model is a Wide & Deep.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, WideAndDeepConfig), "the registry builds it for this kind"
        self._wide = config.first_order()
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        wide_dense = [name for name in self.fields.dense if not model.wide or name in model.wide]
        self._wide_places = [self.fields.dense.index(name) for name in wide_dense]
        self.linear = nn.Linear(len(wide_dense), 1, bias=False) if wide_dense else None
        self.mlp = MLPMaker(model.norm, model.dropout, config.seed, world)(self.fields.width, model.mlp)
        self.head = nn.Linear(self.mlp.width, 1)

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns the logit of each row. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> LabelOutput:
        """Returns the same of what was looked up."""
        vectors, numbers_BF = self.fields(lookups, batch)
        logits_B = self.head(self.mlp(torch.cat([*vectors, numbers_BF], dim=1), batch))[:, 0]
        logits_B = logits_B + first_order_sum(lookups, self._wide)
        if self.linear is not None:
            logits_B = logits_B + self.linear(numbers_BF[:, self._wide_places])[:, 0]
        return LabelOutput(logits_B.unsqueeze(1), lookups)
