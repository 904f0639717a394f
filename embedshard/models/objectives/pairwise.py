"""Losses of a row's item and of each of the items drawn for the step, one by one.

All are a mean over candidates of a function of one score each: softplus(candidate's - own) for Bayesian personalised
ranking, softplus(candidate's) for negative sampling, relu(cosine - margin) for the cosine contrastive loss. Candidates
are drawn once a step for all rows: what is estimated is the same as with draws for each row, from as many lookups as
there are candidates. A candidate that happens to be the row's own item is left out.

Shapes: B rows on this rank, N candidates, D vectors.
"""

from __future__ import annotations

__all__ = ["BPR", "CosineContrastive", "NegativeSampling"]

from typing import Any, Literal

import torch
import torch.nn.functional as F

from embedshard.config.parts import BPRConfig, CosineContrastiveConfig, NegativeSamplingConfig
from embedshard.data.batch import Batch
from embedshard.models.objectives.objective import Objective, row_blocks, valid_ids
from embedshard.models.output import RetrievalOutput
from embedshard.world import World

Cost = Literal["softplus", "relu"]


class _MeanCost(torch.autograd.Function):
    """The mean over each row's candidates of cost(score - threshold), in blocks of rows.

    The scores of a block stay in the cache; what the backward pass needs of them is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: torch.Tensor,
        candidate_ND: torch.Tensor,
        threshold_B: torch.Tensor,
        own_B: torch.Tensor,
        candidate_N: torch.Tensor,
        cost: Cost,
    ) -> torch.Tensor:
        total_B, count_B = torch.empty_like(threshold_B), torch.empty_like(threshold_B)
        for rows in row_blocks(len(query_BD), len(candidate_ND)):
            excess, left_out = _excess(query_BD[rows], candidate_ND, threshold_B[rows], own_B[rows], candidate_N)
            costs = F.softplus(excess) if cost == "softplus" else excess.relu_()
            total_B[rows] = costs.masked_fill_(left_out, 0.0).sum(dim=1)
            count_B[rows] = (len(candidate_N) - left_out.sum(dim=1)).to(total_B.dtype)
        count_B.clamp_(min=1.0)
        ctx.cost = cost
        ctx.save_for_backward(query_BD, candidate_ND, threshold_B, own_B, candidate_N, count_B)
        return total_B / count_B

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BD, candidate_ND, threshold_B, own_B, candidate_N, count_B = ctx.saved_tensors
        scale_B = gradients[0] / count_B
        for_queries, for_candidates = torch.empty_like(query_BD), torch.zeros_like(candidate_ND)
        for_thresholds = torch.empty_like(threshold_B)
        for rows in row_blocks(len(query_BD), len(candidate_ND)):
            excess, left_out = _excess(query_BD[rows], candidate_ND, threshold_B[rows], own_B[rows], candidate_N)
            slopes = excess.sigmoid_() if ctx.cost == "softplus" else (excess > 0).to(excess.dtype)
            slopes.masked_fill_(left_out, 0.0).mul_(scale_B[rows, None])
            torch.mm(slopes, candidate_ND, out=for_queries[rows])
            for_candidates.addmm_(slopes.T, query_BD[rows])
            for_thresholds[rows] = -slopes.sum(dim=1)
        return for_queries, for_candidates, for_thresholds, None, None, None


def _excess(
    query_RD: torch.Tensor,
    candidate_ND: torch.Tensor,
    threshold_R: torch.Tensor,
    own_R: torch.Tensor,
    candidate_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how far each candidate's score is above the row's threshold, and which candidates are left out, (R, N)."""
    return torch.mm(query_RD, candidate_ND.T).sub_(threshold_R[:, None]), own_R[:, None] == candidate_N[None, :]


def _mean_cost(
    output: RetrievalOutput, batch: Batch, threshold_B: torch.Tensor, item_id: str, masked: bool, world: World, cost: Cost
) -> torch.Tensor:
    """Returns the mean cost of each row's candidates, (B,). Collective: gathers the drawn candidates, with gradient."""
    assert batch.draws is not None, "the reader draws what this objective asks for"
    assert output.negative_ND is not None, "the model looks up what was drawn"
    own_B, candidate_N = valid_ids(batch, item_id), world.gather(batch.draws.ids)
    if not masked:
        own_B = torch.full_like(own_B, -1)
    mean_cost: Any = _MeanCost.apply  # torch gives it no type
    candidate_ND = world.gather(output.negative_ND)
    result: torch.Tensor = mean_cost(output.query_BD, candidate_ND, threshold_B, own_B, candidate_N, cost)
    return result


class BPR(Objective):
    """Bayesian personalised ranking (Rendle et al. 2009): -log sigmoid(own score - candidate's), mean over candidates.

    Collective: gathers the drawn candidates over ranks, with gradient.

    Args:
        config: as in the config.
        item_id: the feature that names the item.
        world: whose ranks train together.
    """

    def __init__(self, config: BPRConfig, item_id: str, world: World) -> None:
        super().__init__()
        self._config, self._item_id, self._world = config, item_id, world

    def forward(self, output: RetrievalOutput, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        masked = self._config.mask_accidental_hits
        return _mean_cost(output, batch, output.logits, self._item_id, masked, self._world, "softplus")


class NegativeSampling(Objective):
    """Cross entropy of the own item as a positive and of the drawn ones as negatives.

    -log sigmoid(own score) + negative_weight * the mean over candidates of -log sigmoid(-score): what skip-gram with
    negative sampling minimises (Mikolov et al. 2013), and matrix factorisation in Rendle et al. (2020).

    Collective: gathers the drawn candidates over ranks, with gradient.

    Args:
        config: as in the config.
        item_id: the feature that names the item.
        world: whose ranks train together.
    """

    def __init__(self, config: NegativeSamplingConfig, item_id: str, world: World) -> None:
        super().__init__()
        self._config, self._item_id, self._world = config, item_id, world

    def forward(self, output: RetrievalOutput, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        config, own_B = self._config, output.logits
        zero_B = torch.zeros_like(own_B)
        others_B = _mean_cost(output, batch, zero_B, self._item_id, config.mask_accidental_hits, self._world, "softplus")
        return F.softplus(-own_B) + config.negative_weight * others_B


class CosineContrastive(Objective):
    """The cosine contrastive loss of SimpleX (Mao et al. 2021).

    1 - own cosine + negative_weight * the mean over candidates of relu(cosine - margin). Vectors must have length 1.

    Collective: gathers the drawn candidates over ranks, with gradient.

    Args:
        config: as in the config.
        item_id: the feature that names the item.
        world: whose ranks train together.
    """

    def __init__(self, config: CosineContrastiveConfig, item_id: str, world: World) -> None:
        super().__init__()
        self._config, self._item_id, self._world = config, item_id, world

    def forward(self, output: RetrievalOutput, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        config = self._config
        margin_B = torch.full_like(output.logits, config.margin)
        above_B = _mean_cost(output, batch, margin_B, self._item_id, config.mask_accidental_hits, self._world, "relu")
        return 1.0 - output.logits + config.negative_weight * above_B
