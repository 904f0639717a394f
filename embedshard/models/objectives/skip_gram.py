"""Losses of pairs of a centre and a context of a list, against contexts drawn once a step for all pairs.

What is summed over candidates depends on the centre alone, so it is computed once for a centre, not for each of its
pairs. A candidate that happens to be the pair's own context has the logit that the pair has, so it is taken out of the
centre's sum again without another product.

Shapes: V places of lists, I distinct ids of them, D dim, P pairs, N candidates of the global batch.
"""

from __future__ import annotations

__all__ = ["PairNCE", "PairNegativeSampling", "PairSampledSoftmax", "PairSoftmax"]

import math

import torch
import torch.nn.functional as F

from embedshard.config.parts import NCEConfig, NegativeSamplingConfig, SampledSoftmaxConfig
from embedshard.data.batch import Batch, Draws
from embedshard.models.objectives.objective import Objective
from embedshard.models.objectives.products import log_sums, pair_logits, softplus_sums
from embedshard.models.output import PairOutput
from embedshard.world import World


class PairNegativeSampling(Objective):
    """Skip-gram with negative sampling (Mikolov et al. 2013).

    -log sigmoid(pair) + negative_weight * the mean over candidates of -log sigmoid(-candidate): in expectation what
    `negative_weight` draws for each pair give. Collective: gathers the drawn candidates over ranks, with gradient.

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
        candidate_ND, draws = _candidates(output, batch, self._world)
        as_positive_P = F.softplus(-logits_P)
        others_P = softplus_sums(output.centre_VD, candidate_ND)[output.pairs.centres]
        num_others_P: torch.Tensor | int = len(candidate_ND)
        if self._config.mask_accidental_hits:
            hits_P = _hits(output, self._world.gather(draws.ids))
            others_P = others_P - hits_P * (as_positive_P + logits_P)  # softplus(x) = softplus(-x) + x
            num_others_P = (len(candidate_ND) - hits_P).clamp(min=1.0)
        return as_positive_P + self._config.negative_weight * others_P / num_others_P


class PairNCE(Objective):
    """Noise-contrastive estimation (Gutmann and Hyvarinen 2010; for words Mnih and Teh 2012).

    Tells a pair from `negatives_per_pair` = k draws of the noise q: with s = centre . context + bias - log(k q(context)),
    softplus(-s) + k * the mean over candidates of softplus(s). At its minimum centre . context + bias is the log of the
    conditional probability. Collective: gathers the drawn candidates over ranks, with gradient.

    Args:
        config: as in the config.
        world: whose ranks train together.
    """

    def __init__(self, config: NCEConfig, world: World) -> None:
        super().__init__()
        self._noise, self._world = config.negatives_per_pair, world

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        assert output.bias_I is not None, "the model looks biases up"
        assert output.candidate_bias_N is not None, "the model looks up what was drawn"
        candidate_ND, draws = _candidates(output, batch, self._world)
        log_noise = math.log(self._noise)
        offset_N = self._world.gather(output.candidate_bias_N) - log_noise - self._world.gather(draws.log_q)
        own_I = output.bias_I - log_noise - draws.own_log_q
        logits_P = _logits(output) + _of_contexts(output, own_I)
        sums_V = softplus_sums(output.centre_VD, candidate_ND, offset_N)
        return F.softplus(-logits_P) + sums_V[output.pairs.centres] * (self._noise / len(candidate_ND))


class PairSampledSoftmax(Objective):
    """Softmax over a pair's context and the drawn ones, corrected for how often they are drawn (Jean et al. 2015).

    Each candidate counts 1 / (times it is expected to be drawn), the pair's own context once, for certain. Collective:
    gathers the drawn candidates over ranks, with gradient.

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
        candidate_ND, draws = _candidates(output, batch, self._world)
        centre_VD = output.centre_VD / config.temperature
        logits_P = _logits(output) / config.temperature
        offset_N, own_I = None, torch.zeros_like(draws.own_log_q)
        if config.log_q == "on":
            log_drawn = math.log(len(candidate_ND))
            offset_N, own_I = -self._world.gather(draws.log_q) - log_drawn, -draws.own_log_q - log_drawn
        excess_P = log_sums(centre_VD, candidate_ND, offset_N)[output.pairs.centres] - logits_P
        if not config.mask_accidental_hits:
            return F.softplus(excess_P)
        hits_P = _hits(output, self._world.gather(draws.ids))
        # Never drawn means never hit, and has no finite weight.
        counted_P = torch.where(hits_P > 0, hits_P * torch.exp(_of_contexts(output, own_I)), 0.0)
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
        candidate_ND, draws = _candidates(output, batch, self._world)
        sums_V = log_sums(output.centre_VD, candidate_ND, -self._world.gather(draws.log_q))
        return sums_V[output.pairs.centres] - _logits(output)


def _logits(output: PairOutput) -> torch.Tensor:
    assert output.context_VD is not None, "the model looks contexts up"
    pairs = output.pairs
    return pair_logits(output.centre_VD, output.context_VD, pairs.centres, pairs.contexts, pairs.window)


def _candidates(output: PairOutput, batch: Batch, world: World) -> tuple[torch.Tensor, Draws]:
    assert batch.draws is not None, "the reader draws what this objective asks for"
    assert output.candidate_ND is not None, "the model looks up what was drawn"
    return world.gather(output.candidate_ND), batch.draws


def _hits(output: PairOutput, drawn_N: torch.Tensor) -> torch.Tensor:
    """Returns how many of the drawn ids are the pair's own context, (P,) float32."""
    in_order = drawn_N.sort().values
    hits_I = torch.searchsorted(in_order, output.ids_I, right=True) - torch.searchsorted(in_order, output.ids_I)
    return _of_contexts(output, hits_I.to(output.centre_VD.dtype))


def _of_contexts(output: PairOutput, of_ids_I: torch.Tensor) -> torch.Tensor:
    """Returns what there is of each id, for the context of each pair, (P,)."""
    return of_ids_I[output.pairs.ids[output.pairs.contexts]]


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
