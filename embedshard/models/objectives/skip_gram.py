"""Losses of pairs of a centre and a context of a list, against contexts drawn for all pairs of a step or of a lane.

What is summed over candidates depends on the centre alone, so it is computed once for a centre, not for each of its
pairs. A candidate that happens to be the pair's own context has the logit that the pair has, so it is taken out of the
centre's sum again without another product.

Where contexts go by side, a pair's context is looked for on its side, and so are those drawn: all of them, on each side.

Shapes: V places of lists, I distinct ids of them, D dim, P pairs, S sides, N candidates of the global batch, or of all this
rank's lanes where each lane has its own.
"""

from __future__ import annotations

__all__ = ["PairNCE", "PairNegativeSampling", "PairSampledSoftmax", "PairSoftmax"]

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from embedshard.config.parts import NCEConfig, NegativeSamplingConfig, SampledSoftmaxConfig
from embedshard.data.batch import Batch
from embedshard.models.objectives.objective import Objective
from embedshard.models.objectives.products import log_sums, pair_logits, softplus_sums
from embedshard.models.output import PairOutput
from embedshard.world import World


class PairNegativeSampling(Objective):
    """Skip-gram with negative sampling (Mikolov et al. 2013).

    -log sigmoid(pair) + negative_weight * the mean over candidates of -log sigmoid(-candidate): in expectation what
    `negative_weight` draws for each pair give. Collective: gathers the drawn candidates over ranks, with gradient,
    unless each lane has its own.

    Args:
        config: as in the config.
        world: whose ranks train together.
    """

    def __init__(self, config: NegativeSamplingConfig, world: World) -> None:
        super().__init__()
        self._config, self._world = config, world

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        logits_P = _logits(output)
        drawn = _candidates(output, batch, self._world, self._config.drawn_for)
        as_positive_P = F.softplus(-logits_P)
        others_P = _of_centres(output, softplus_sums(output.centre_VD, drawn.vectors_ND, None, drawn.groups, drawn.sides))
        num_others_P: torch.Tensor | int = drawn.met
        if self._config.mask_accidental_hits:
            hits_P = _hits(output, drawn)
            others_P = others_P - hits_P * (as_positive_P + logits_P)  # softplus(x) = softplus(-x) + x
            num_others_P = (drawn.met - hits_P).clamp(min=1.0)
        return as_positive_P + self._config.negative_weight * others_P / num_others_P


class PairNCE(Objective):
    """Noise-contrastive estimation (Gutmann and Hyvarinen 2010; for words Mnih and Teh 2012).

    Tells a pair from `negatives_per_pair` = k draws of the noise q: with s = centre . context + bias - log(k q(context)),
    softplus(-s) + k * the mean over candidates of softplus(s). At its minimum centre . context + bias is the log of the
    conditional probability. Collective: gathers the drawn candidates over ranks, with gradient, unless each lane has its
    own.

    Args:
        config: as in the config.
        world: whose ranks train together.
    """

    def __init__(self, config: NCEConfig, world: World) -> None:
        super().__init__()
        self._config, self._world = config, world

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        assert output.bias_IS is not None, "the model looks biases up"
        noise = self._config.negatives_per_pair
        drawn = _candidates(output, batch, self._world, self._config.drawn_for)
        assert drawn.bias_N is not None, "the model looks up what was drawn"
        offset_N = drawn.bias_N - math.log(noise) - drawn.log_q_N
        own_IS = output.bias_IS - math.log(noise) - drawn.own_log_q_I.unsqueeze(1)
        logits_P = _logits(output) + _of_contexts(output, own_IS)
        sums_V = softplus_sums(output.centre_VD, drawn.vectors_ND, offset_N, drawn.groups, drawn.sides)
        return F.softplus(-logits_P) + _of_centres(output, sums_V) * (noise / drawn.met)


class PairSampledSoftmax(Objective):
    """Softmax over a pair's context and the drawn ones, corrected for how often they are drawn (Jean et al. 2015).

    Each candidate counts 1 / (times it is expected to be drawn), the pair's own context once, for certain. Collective:
    gathers the drawn candidates over ranks, with gradient, unless each lane has its own.

    Args:
        config: as in the config.
        world: whose ranks train together.
    """

    def __init__(self, config: SampledSoftmaxConfig, world: World) -> None:
        super().__init__()
        self._config, self._world = config, world

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        config = self._config
        drawn = _candidates(output, batch, self._world, config.drawn_for)
        centre_VD = output.centre_VD / config.temperature
        logits_P = _logits(output) / config.temperature
        offset_N, own_I1 = None, torch.zeros_like(drawn.own_log_q_I).unsqueeze(1)
        if config.log_q == "on":
            log_met = math.log(drawn.met)
            offset_N, own_I1 = -drawn.log_q_N - log_met, (-drawn.own_log_q_I - log_met).unsqueeze(1)
        sums_V = log_sums(centre_VD, drawn.vectors_ND, offset_N, drawn.groups, drawn.sides)
        excess_P = _of_centres(output, sums_V) - logits_P
        if not config.mask_accidental_hits:
            return F.softplus(excess_P)
        hits_P = _hits(output, drawn)
        # Never drawn means never hit, and has no finite weight.
        counted_P = torch.where(hits_P > 0, hits_P * torch.exp(_of_contexts(output, own_I1)), 0.0)
        return _log_of_one_plus(excess_P, counted_P)


class PairSoftmax(Objective):
    """Softmax over all ids: the log of the sum of exp(centre . id), less the pair's own logit.

    Collective: gathers the vectors of all ids over ranks, with gradient.

    Args:
        world: whose ranks train together.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        drawn = _candidates(output, batch, self._world, "batch")
        sums_V = log_sums(output.centre_VD, drawn.vectors_ND, -drawn.log_q_N, drawn.groups, drawn.sides)
        return _of_centres(output, sums_V) - _logits(output)


def _logits(output: PairOutput) -> torch.Tensor:
    assert output.context_VD is not None, "the model looks contexts up"
    pairs = output.pairs
    return pair_logits(output.centre_VD, output.context_VD, pairs.centres, pairs.contexts, pairs.window, before=pairs.before)


@dataclass
class _Candidates:
    """What the places of this rank meet.

    Attributes:
        vectors_ND, bias_N, log_q_N: of each candidate, as one of the contexts that a group meets before its places, then as
            one of those after them, where contexts go by side; biases if there are any.
        ids_N: of each candidate, once.
        own_log_q_I: the log of the probability of one draw, of the ids of the lists.
        groups: where the places that meet the same candidates begin, and V; None where all places meet all.
        met: how many candidates a place meets, on each side.
        sides: 2 where contexts go by side, else 1.
    """

    vectors_ND: torch.Tensor
    bias_N: torch.Tensor | None
    log_q_N: torch.Tensor
    ids_N: torch.Tensor
    own_log_q_I: torch.Tensor
    groups: tuple[int, ...] | None
    met: int
    sides: int


def _candidates(output: PairOutput, batch: Batch, world: World, drawn_for: Literal["batch", "lane"]) -> _Candidates:
    assert batch.draws is not None, "the reader draws what this objective asks for"
    assert output.candidate_ND is not None, "the model looks up what was drawn"
    draws, vectors_ND, bias_NS = batch.draws, output.candidate_ND, output.candidate_bias_NS
    log_q_N, ids_N, groups = draws.log_q, draws.ids, None
    if drawn_for == "lane":  # this rank's draws are those for its lanes, in their order
        groups = output.pairs.lanes
    else:
        vectors_ND, log_q_N, ids_N = world.gather(vectors_ND), world.gather(log_q_N), world.gather(ids_N)
        bias_NS = None if bias_NS is None else world.gather(bias_NS)
    sides, met = len(output.pairs.sides), len(ids_N) // (1 if groups is None else len(groups) - 1)
    if sides > 1:
        log_q_N = log_q_N.view(-1, met).repeat(1, sides).flatten()
        vectors_ND = _side_after_side(vectors_ND, met, sides)
    bias_N = None if bias_NS is None else _side_after_side(bias_NS, met, sides).squeeze(1)
    return _Candidates(vectors_ND, bias_N, log_q_N, ids_N, draws.own_log_q, groups, met, sides)


def _side_after_side(of_N: torch.Tensor, met: int, sides: int) -> torch.Tensor:
    """Returns (N * sides, D) of (N, sides * D), of each `met` candidates one side after the other."""
    return of_N.reshape(-1, met, sides, of_N.shape[1] // sides).transpose(1, 2).flatten(0, 2)


def _hits(output: PairOutput, drawn: _Candidates) -> torch.Tensor:
    """Returns how many of the drawn ids that a pair meets are its own context, (P,) float32."""
    ids_V, ids_N = output.ids_I[output.pairs.ids], drawn.ids_N
    if drawn.groups is not None:  # ids of other groups are others
        group_of_V = torch.arange(len(drawn.groups) - 1, device=ids_V.device).repeat_interleave(
            torch.tensor(drawn.groups, device=ids_V.device).diff()
        )
        group_of_N = torch.arange(len(ids_N), device=ids_N.device) // drawn.met
        ids_V, ids_N = (ids * (len(drawn.groups) - 1) + group for ids, group in ((ids_V, group_of_V), (ids_N, group_of_N)))
    in_order = ids_N.sort().values
    hits_V = torch.searchsorted(in_order, ids_V, right=True) - torch.searchsorted(in_order, ids_V)
    return hits_V.to(output.centre_VD.dtype)[output.pairs.contexts]


def _of_centres(output: PairOutput, sums_V: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each pair's centre, of those of the pair's side, (P,)."""
    pairs = output.pairs
    if len(pairs.sides) == 1:
        return sums_V[pairs.centres]
    before_V, after_V = sums_V.view(-1, 2).unbind(dim=1)
    before, after = pairs.sides
    return torch.cat([before_V[pairs.centres[before]], after_V[pairs.centres[after]]])


def _of_contexts(output: PairOutput, of_ids: torch.Tensor) -> torch.Tensor:
    """Returns what there is of each id, (I, 1), or of each on each side, (I, sides), for the context of each pair, (P,)."""
    pairs = output.pairs
    ids_P = pairs.ids[pairs.contexts]
    if of_ids.shape[1] == 1:
        return of_ids[:, 0][ids_P]
    return torch.cat([of_ids[:, number][ids_P[side]] for number, side in enumerate(pairs.sides)])


def _log_of_one_plus(excess_P: torch.Tensor, counted_P: torch.Tensor) -> torch.Tensor:
    """Returns log(1 + exp(excess) - counted), where exp(excess) is at least `counted` but for rounding.

    That is the softmax's loss where `excess` is the log of the candidates' sum less the pair's own logit, and the pair's own
    context is `counted` times among the candidates.
    """
    is_large = excess_P > 1.0
    small_P = torch.where(is_large, 0.0, excess_P)
    large_P = torch.where(is_large, excess_P, 1.0)
    of_small = torch.log1p(F.relu(small_P.exp() - counted_P))
    # What is counted cannot be more than all there is.
    of_large = large_P + torch.log1p(torch.maximum((1.0 - counted_P) * torch.exp(-large_P), torch.exp(-large_P) - 1.0))
    return torch.where(is_large, of_large, of_small)
