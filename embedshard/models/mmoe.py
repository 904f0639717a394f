"""MMoE: experts that all labels share, mixed for each label by a gate of its own.

Shapes: B rows on this rank, E experts, H numbers of an expert's output, L labels.
"""

from __future__ import annotations

__all__ = ["MMoE"]

from collections.abc import Sequence

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import MMoEConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


class MMoE(nn.Module):
    """The model of kind `mmoe` (Ma et al. 2018).

    Args:
        config: the config, whose model is an MMoE.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, MMoEConfig), "the registry builds it for this kind"
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        make = MLPMaker(model.norm, model.dropout, config.seed, world)
        width, labels = self.fields.width, list(config.data.label_columns)
        self.experts = nn.ModuleList([make(width, model.expert_mlp) for _ in range(model.experts)])
        self.gates = nn.ModuleList([nn.Linear(width, model.experts, bias=False) for _ in labels])
        self.towers = nn.ModuleList([make(model.expert_mlp[-1], model.mlp) for _ in labels])
        self.heads = nn.ModuleList([nn.Linear((model.mlp or model.expert_mlp)[-1], 1) for _ in labels])

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns each label's logit of each row. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> LabelOutput:
        """Returns the same of what was looked up."""
        vectors, numbers_BF = self.fields(lookups, batch)
        joined = torch.cat([*vectors, numbers_BF], dim=1)
        experts_BEH = torch.stack([expert(joined, batch) for expert in self.experts], dim=1)
        logits = []
        for gate, tower, head in zip(self.gates, self.towers, self.heads, strict=True):
            shares_BE = torch.softmax(gate(joined), dim=1)
            mixed_BH = (shares_BE.unsqueeze(2) * experts_BEH).sum(dim=1)
            logits.append(head(tower(mixed_BH, batch)))
        return LabelOutput(torch.cat(logits, dim=1), lookups)
