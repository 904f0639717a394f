"""Losses of a row's item and of each of the items drawn for the step, one by one.

All are a mean over candidates of a function of one score each: softplus(candidate's - own) for Bayesian personalised
ranking, softplus(candidate's) for negative sampling, relu(cosine - margin) for the cosine contrastive loss. Candidates
are drawn once a step for all rows: what is estimated is the same as with draws for each row, from as many lookups as
there are candidates. A candidate that happens to be the row's own item is left out.

Shapes: B rows on this rank, N candidates, D vectors.
"""

from __future__ import annotations

__all__ = ["BPR", "CosineContrastive", "NegativeSampling"]

from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F

from embedshard.config.parts import BPRConfig, CosineContrastiveConfig, NegativeSamplingConfig
from embedshard.data.batch import Batch
from embedshard.models.objectives.objective import KEPT_ELEMENTS, Objective, OwnHits, row_blocks, valid_ids
from embedshard.models.output import RetrievalOutput
from embedshard.world import World

Cost = Literal["softplus", "relu"]

_FEW: Final = 0.05  # share of scores above their thresholds up to which they are taken one by one


class _MeanCost(torch.autograd.Function):
    """The mean over each row's candidates of cost(score - threshold), in blocks of rows that stay in the cache.

    A block's slopes are kept for the backward pass up to 128 MiB of a rank, else made again. The slopes of relu are 1 where
    a score is above its threshold: where that is rare, the backward pass adds up those vectors alone instead of
    multiplying by a matrix of zeros (on a CPU; a GPU would wait to know how many there are).
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
        hits = OwnHits(own_B, candidate_N)
        total_B = torch.empty_like(threshold_B)
        kept: list[_Few | torch.Tensor | None] = []
        for rows in row_blocks(len(query_BD), len(candidate_ND), query_BD.device):
            excess_RN = _excess(query_BD[rows], candidate_ND, threshold_B[rows], hits, rows)
            slopes = _slopes(excess_RN, cost)
            kept.append(slopes if isinstance(slopes, _Few) or _fits(query_BD, candidate_ND) else None)
            total_B[rows] = (F.softplus(excess_RN) if cost == "softplus" else excess_RN.relu_()).sum(dim=1)
        count_B = (len(candidate_N) - hits.count_B).clamp(min=1).to(total_B.dtype)
        ctx.cost, ctx.hits, ctx.kept = cost, hits, kept
        ctx.save_for_backward(query_BD, candidate_ND, threshold_B, count_B)
        return total_B / count_B

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BD, candidate_ND, threshold_B, count_B = ctx.saved_tensors
        scale_B = gradients[0] / count_B
        for_queries, for_candidates = torch.empty_like(query_BD), torch.zeros_like(candidate_ND)
        for_thresholds = torch.empty_like(threshold_B)
        for rows, kept in zip(row_blocks(len(query_BD), len(candidate_ND), query_BD.device), ctx.kept, strict=True):
            slopes = kept
            if slopes is None:
                excess_RN = _excess(query_BD[rows], candidate_ND, threshold_B[rows], ctx.hits, rows)
                slopes = _slopes(excess_RN, ctx.cost)
            scale_R = scale_B[rows, None]
            if isinstance(slopes, _Few):
                for_queries[rows] = slopes.of_rows(candidate_ND).mul_(scale_R)
                slopes.add_to_columns(for_candidates, query_BD[rows] * scale_R)
                for_thresholds[rows] = -scale_B[rows] * slopes.count_R
            else:
                slopes = slopes * scale_R
                torch.mm(slopes, candidate_ND, out=for_queries[rows])
                for_candidates.addmm_(slopes.T, query_BD[rows])
                for_thresholds[rows] = -slopes.sum(dim=1)
        return for_queries, for_candidates, for_thresholds, None, None, None


class _Few:
    """A matrix with few ones and else zeros, (R, N), on a CPU.

    Args:
        is_one_RN: where the ones are.

    Attributes:
        count_R: how many each row has.
    """

    def __init__(self, is_one_RN: torch.Tensor) -> None:
        num_rows, num_columns = is_one_RN.shape
        flat = torch.from_numpy(np.flatnonzero(is_one_RN.numpy()))  # ten times as fast as torch's
        self._offset_R = torch.searchsorted(flat, torch.arange(num_rows) * num_columns)
        self.count_R = torch.diff(self._offset_R, append=torch.tensor([len(flat)]))
        self._rows, self._columns = flat // num_columns, flat % num_columns

    def of_rows(self, vector_ND: torch.Tensor) -> torch.Tensor:
        """Returns the product with the vectors of columns, (R, D)."""
        return F.embedding_bag(self._columns, vector_ND, self._offset_R, mode="sum")

    def add_to_columns(self, target_ND: torch.Tensor, vector_RD: torch.Tensor) -> None:
        """Adds the transposed matrix's product with the vectors of rows."""
        columns, order = self._columns.sort(stable=True)
        met, counts = torch.unique_consecutive(columns, return_counts=True)
        sums = F.embedding_bag(self._rows[order], vector_RD, counts.cumsum(0) - counts, mode="sum")
        target_ND[met] += sums


def _slopes(excess_RN: torch.Tensor, cost: Cost) -> _Few | torch.Tensor:
    if cost == "softplus":
        return torch.sigmoid(excess_RN)
    is_above_RN = excess_RN > 0
    if excess_RN.device.type == "cpu" and int(is_above_RN.sum()) <= _FEW * is_above_RN.numel():
        return _Few(is_above_RN)
    return is_above_RN.to(excess_RN.dtype)


def _fits(query_BD: torch.Tensor, candidate_ND: torch.Tensor) -> bool:
    return len(query_BD) * len(candidate_ND) <= KEPT_ELEMENTS


def _excess(
    query_RD: torch.Tensor, candidate_ND: torch.Tensor, threshold_R: torch.Tensor, hits: OwnHits, rows: slice
) -> torch.Tensor:
    """Returns how far each candidate's score is above the row's threshold, -inf for what is left out, (R, N)."""
    excess_RN = torch.mm(query_RD, candidate_ND.T).sub_(threshold_R[:, None])
    hits.leave_out(excess_RN, rows)
    return excess_RN


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
