"""Softmax over candidates that stand for the whole catalogue.

The loss of a row is log(sum over all items of exp(score)) minus its own item's score. The sum is estimated from
candidates: the row's own item is in it once, for certain; the others turn up at random, so each counts 1 / (how often
it is expected to turn up), which makes the sum right in expectation. In logits that is a subtraction of the log:
`log_q` correction (Bengio & Senecal 2008; for in-batch candidates Yi et al. 2019, whose form also corrects the row's own
item, which is not drawn; Khrylchenko et al. 2025 tell the difference). A candidate that happens to be the row's own item is
left out. Without correction all candidates count alike, and popular items are scored too low.

Shapes: B rows on this rank, G rows of the global batch, N candidates, D vectors.
"""

from __future__ import annotations

__all__ = ["InBatchSoftmax", "SampledSoftmax", "softmax_losses"]

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from embedshard.config.parts import InBatchSoftmaxConfig, SampledSoftmaxConfig
from embedshard.data.batch import Batch
from embedshard.models.dots import row_dots
from embedshard.models.objectives.frequency import FrequencyEstimate
from embedshard.models.objectives.objective import KEPT_ELEMENTS, Hits, Objective, OwnHits, row_blocks, valid_ids
from embedshard.models.output import RetrievalOutput
from embedshard.world import World


def softmax_losses(
    positive_B: torch.Tensor,
    query_BD: torch.Tensor,
    candidate_ND: torch.Tensor,
    offset_N: torch.Tensor,
    hits: Hits,
) -> torch.Tensor:
    """Returns the cross entropy of each row's own logit against candidates, (B,) in nats. Not collective.

    A row that no candidate is left for has loss 0.

    Args:
        positive_B: logits of the rows' own items.
        query_BD: query vectors, divided by the temperature.
        candidate_ND: vectors of the other candidates.
        offset_N: added to each candidate's logits; -inf leaves it out. Without gradient.
        hits: which candidates are left out of which rows.
    """
    log_sum: Any = _OthersLogSum.apply  # torch gives it no type
    others_B: torch.Tensor = log_sum(query_BD, candidate_ND, offset_N, hits)
    return F.softplus(others_B - positive_B)  # log(exp(own) + exp(others)) - own


class _OthersLogSum(torch.autograd.Function):
    """log(sum of exp(logits)) over the candidates of each row, in blocks of rows.

    A block's logits become exponentials where they lie: the whole B x N matrix, with the copies that autograd keeps of it,
    costs several times the products themselves. They are kept for the backward pass, or, where they are too many, made again
    to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: torch.Tensor,
        candidate_ND: torch.Tensor,
        offset_N: torch.Tensor,
        hits: Hits,
    ) -> torch.Tensor:
        most_B, sums_B = query_BD.new_empty(len(query_BD)), query_BD.new_empty(len(query_BD))
        keeps = len(query_BD) * len(candidate_ND) <= KEPT_ELEMENTS
        ctx.hits, ctx.kept = hits, []
        for rows in row_blocks(len(query_BD), len(candidate_ND), query_BD.device):
            logits_RN = _logits(query_BD, candidate_ND, offset_N, hits, rows)
            most_R = logits_RN.amax(dim=1)
            most_B[rows] = most_R.masked_fill_(torch.isneginf(most_R), 0.0)
            exponentials_RN = logits_RN.sub_(most_R[:, None]).exp_()
            sums_B[rows] = exponentials_RN.sum(dim=1)
            if keeps:
                ctx.kept.append(exponentials_RN)
        ctx.save_for_backward(query_BD, candidate_ND, offset_N, most_B, sums_B)
        return sums_B.log() + most_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_B: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BD, candidate_ND, offset_N, most_B, sums_B = ctx.saved_tensors
        # Where no candidate is left there is nothing to push away.
        slopes_B = torch.where(sums_B > 0, gradient_B / sums_B, 0.0)
        for_queries, for_candidates = torch.empty_like(query_BD), torch.zeros_like(candidate_ND)
        for number, rows in enumerate(row_blocks(len(query_BD), len(candidate_ND), query_BD.device)):
            if ctx.kept:
                exponentials_RN = ctx.kept[number]
            else:
                logits_RN = _logits(query_BD, candidate_ND, offset_N, ctx.hits, rows)
                exponentials_RN = logits_RN.sub_(most_B[rows, None]).exp_()
            slopes_RN = exponentials_RN.mul_(slopes_B[rows, None])
            torch.mm(slopes_RN, candidate_ND, out=for_queries[rows])
            for_candidates.addmm_(slopes_RN.T, query_BD[rows])
        ctx.kept = []
        return for_queries, for_candidates, None, None


def _logits(
    query_BD: torch.Tensor, candidate_ND: torch.Tensor, offset_N: torch.Tensor, hits: Hits, rows: slice
) -> torch.Tensor:
    return hits.leave_out(torch.addmm(offset_N, query_BD[rows], candidate_ND.T), rows)


class InBatchSoftmax(Objective):
    """The other rows' items are the candidates.

    Collective: gathers items over ranks, with gradient, unless `negatives` is `local`; the frequency estimate always
    counts the global batch.

    Args:
        config: as in the config.
        num_items: rows of the item's table, the one for unknown ids included; None where ids are any numbers.
        item_id: the feature that names the item.
        world: whose ranks train together.
    """

    def __init__(self, config: InBatchSoftmaxConfig, num_items: int | None, item_id: str, world: World) -> None:
        super().__init__()
        self._config, self._item_id, self._world = config, item_id, world
        self.frequency = (
            FrequencyEstimate(num_items, config.log_q_buckets, config.log_q_half_life_steps)
            if config.log_q == "streaming"
            else None
        )

    def forward(self, output: RetrievalOutput, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        config, world = self._config, self._world
        own_ids = valid_ids(batch, self._item_id)
        global_ids = world.gather(own_ids)
        if self.frequency is not None:
            self.frequency.update(global_ids)
        everywhere = config.negatives == "global"
        ids_N = global_ids if everywhere else own_ids
        candidate_ND = world.gather(output.candidate_BD) if everywhere else output.candidate_BD
        first = world.rank * batch.size if everywhere else 0

        offset_N = torch.zeros(len(ids_N), dtype=torch.float32, device=ids_N.device)
        if self.frequency is not None:
            others = (ids_N >= 0).sum().to(torch.float64) - 1
            offset_N = -torch.log(others.clamp(min=1) * self.frequency.probability(ids_N)).float()
        offset_N = offset_N.masked_fill(ids_N < 0, -math.inf)
        own_B, candidate_N = own_ids, ids_N
        if not config.mask_accidental_hits:  # a row's own place is no other candidate all the same
            candidate_N = torch.arange(len(ids_N), device=ids_N.device)
            own_B = candidate_N[first : first + batch.size]
        query_BD = output.query_BD / config.temperature
        positive_B = row_dots(query_BD, output.candidate_BD)
        return softmax_losses(positive_B, query_BD, candidate_ND, offset_N, OwnHits(own_B, candidate_N))


class SampledSoftmax(Objective):
    """Items drawn for the step, and with `mixed` the other rows' items too, are the candidates.

    With `mixed`, a candidate counts 1 / (times it is expected to be drawn + times it is expected in the batch), wherever
    it came from (the balance heuristic of Veach & Guibas 1995): right in expectation, as each of the two would be alone.

    Collective: gathers the drawn candidates, and with `mixed` the batch's items, over ranks with gradient.

    Args:
        config: as in the config.
        num_items: rows of the item's table, the one for unknown ids included.
        item_id: the feature that names the item.
        world: whose ranks train together.
    """

    def __init__(self, config: SampledSoftmaxConfig, num_items: int, item_id: str, world: World) -> None:
        super().__init__()
        self._config, self._item_id, self._world = config, item_id, world
        corrected = config.mixed and config.log_q == "on"
        self.frequency = FrequencyEstimate(num_items, num_items, None) if corrected else None

    def forward(self, output: RetrievalOutput, batch: Batch) -> torch.Tensor:
        """Returns (B,) losses."""
        config, world = self._config, self._world
        assert batch.draws is not None, "the reader draws what this objective asks for"
        assert output.negative_ND is not None, "the model looks up what was drawn"
        own_ids = valid_ids(batch, self._item_id)
        ids_N = world.gather(batch.draws.ids)
        candidate_ND = world.gather(output.negative_ND)
        expected_N = config.num_negatives * world.gather(batch.draws.log_q).double().exp()
        if config.mixed:
            batch_ids = world.gather(own_ids)
            others = ((batch_ids >= 0).sum() - 1).clamp(min=1)
            drawn_for_batch = config.num_negatives * world.gather(batch.draws.own_log_q).double().exp()
            if self.frequency is not None:
                self.frequency.update(batch_ids)
                expected_N = expected_N + others * self.frequency.probability(ids_N)
                drawn_for_batch = drawn_for_batch + others * self.frequency.probability(batch_ids)
            ids_N = torch.cat([ids_N, batch_ids])
            candidate_ND = torch.cat([candidate_ND, world.gather(output.candidate_BD)])
            expected_N = torch.cat([expected_N, drawn_for_batch])
        offset_N = -torch.log(expected_N).float() if config.log_q == "on" else torch.zeros_like(expected_N).float()
        offset_N = offset_N.masked_fill(ids_N < 0, -math.inf)
        own_B, candidate_N = own_ids, ids_N
        if not config.mask_accidental_hits:  # a row's own place in the batch is no other candidate all the same
            candidate_N = torch.arange(len(ids_N), device=ids_N.device)
            own_B = torch.arange(batch.size, device=ids_N.device) + config.num_negatives + world.rank * batch.size
        query_BD = output.query_BD / config.temperature
        positive_B = row_dots(query_BD, output.candidate_BD)
        return softmax_losses(positive_B, query_BD, candidate_ND, offset_N, OwnHits(own_B, candidate_N))
