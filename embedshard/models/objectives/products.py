"""Dot products that pairs of lists need, with the gradients written out.

Contexts lie near their centres, so the logits of pairs are a band of the matrix of all centres and contexts: it is
computed as small products of blocks of centres with the contexts around them, and the pairs' places are read from it.
That reads each vector a few times from the cache; gathering two vectors for each pair writes and reads a hundred times as
much as there are logits. What is summed over candidates is summed in blocks of centres that stay in the cache.

Shapes: V places, D dim, P pairs, N candidates, R centres of a block, W places that a window reaches.
"""

from __future__ import annotations

__all__ = ["log_sums", "pair_logits", "softplus_sums"]

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

_CENTRES = 16  # of a small product
_BLOCK_ELEMENTS = 2**16  # logits of centres and candidates made at once: 256 KiB
_KEPT_ELEMENTS = 2**25  # of which slopes are kept: 128 MiB
_FACTORS = 64  # each from 1/2 to 1, whose product is no smaller than 2^-64


def pair_logits(
    centre_VD: torch.Tensor, context_VD: torch.Tensor, centres_P: torch.Tensor, contexts_P: torch.Tensor, window: int
) -> torch.Tensor:
    """Returns the dot product of each pair, (P,). Not collective.

    Args:
        centre_VD: vectors of places as centres.
        context_VD: of the same places as contexts.
        centres_P: places of centres.
        contexts_P: places of contexts.
        window: how far a context may be from its centre.
    """
    logits: Any = _PairLogits.apply  # torch gives it no type
    result: torch.Tensor = logits(
        centre_VD, context_VD, _Band(len(centre_VD), centre_VD.shape[1], centres_P, contexts_P, window)
    )
    return result


class _Band:
    """Blocks of centres, and for each block the contexts from `reach` before its first to `reach` after its last."""

    def __init__(self, num_places: int, dim: int, centres_P: torch.Tensor, contexts_P: torch.Tensor, reach: int) -> None:
        self.reach = reach
        self.width = _CENTRES + 2 * self.reach
        self.num_blocks = -(-num_places // _CENTRES)
        self.num_places, self.dim = num_places, dim
        blocks_P = centres_P // _CENTRES
        # Of (block, centre in it, context in it): a context's place in the block is its distance to where that begins.
        self.flat_P = centres_P * self.width + contexts_P - blocks_P * _CENTRES + self.reach

    def centres(self, centre_VD: torch.Tensor) -> torch.Tensor:
        """Returns the blocks of centres, zeros after the last, (blocks, R, D)."""
        missing = self.num_blocks * _CENTRES - self.num_places
        return F.pad(centre_VD, (0, 0, 0, missing)).view(self.num_blocks, _CENTRES, self.dim)

    def padded_contexts(self, context_VD: torch.Tensor) -> torch.Tensor:
        """Returns contexts with zeros before the first and after the last."""
        missing = self.num_blocks * _CENTRES - self.num_places
        return F.pad(context_VD, (0, 0, self.reach, missing + self.reach))

    def windows(self, padded: torch.Tensor) -> torch.Tensor:
        """Returns what each block's centres may have for contexts, (blocks, width, D): a view, whose parts overlap."""
        return padded.as_strided((self.num_blocks, self.width, self.dim), (_CENTRES * self.dim, self.dim, 1))


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centre_VD: torch.Tensor, context_VD: torch.Tensor, band: _Band) -> torch.Tensor:
        blocks, padded = band.centres(centre_VD), band.padded_contexts(context_VD)
        logits = torch.bmm(blocks, band.windows(padded).transpose(1, 2))
        ctx.band = band
        ctx.save_for_backward(blocks, padded)
        return logits.view(-1)[band.flat_P]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        band: _Band = ctx.band
        blocks, padded = ctx.saved_tensors
        slopes = padded.new_zeros(band.num_blocks, _CENTRES, band.width)
        slopes.view(-1)[band.flat_P] = gradients[0]
        for_centres = torch.bmm(slopes, band.windows(padded)).view(-1, band.dim)[: band.num_places]
        of_windows = torch.bmm(slopes.transpose(1, 2), blocks)
        for_contexts = torch.zeros_like(padded)
        # Neighbouring windows overlap, so they are added in two or more turns, none of whose windows do.
        turns = -(-band.width // _CENTRES)
        for turn in range(min(turns, band.num_blocks)):
            mine = of_windows[turn::turns]
            stride = turns * _CENTRES * band.dim
            target = for_contexts.as_strided(
                (len(mine), band.width, band.dim), (stride, band.dim, 1), turn * _CENTRES * band.dim
            )
            target += mine
        return for_centres, for_contexts[band.reach : band.reach + band.num_places], None


def softplus_sums(
    query_VD: torch.Tensor,
    candidate_ND: torch.Tensor,
    offset_N: torch.Tensor | None = None,
    groups: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns the sum over candidates of softplus(query . candidate + offset), (V,). Not collective.

    Args:
        query_VD: vectors of places.
        candidate_ND: vectors of candidates.
        offset_N: added to each candidate's products.
        groups: where each group of places begins, and V. Each meets its own candidates, as many and in the same order;
            None lets all places meet all candidates.
    """
    sums: Any = _Sums.apply
    result: torch.Tensor = sums(query_VD, candidate_ND, offset_N, groups, "softplus")
    return result


def log_sums(
    query_VD: torch.Tensor,
    candidate_ND: torch.Tensor,
    offset_N: torch.Tensor | None = None,
    groups: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns the log of the sum over candidates of exp(query . candidate + offset), (V,). Not collective.

    The arguments are those of `softplus_sums`.
    """
    sums: Any = _Sums.apply
    result: torch.Tensor = sums(query_VD, candidate_ND, offset_N, groups, "log")
    return result


class _Sums(torch.autograd.Function):
    """In blocks of queries. What a sum's slopes are is kept for the backward pass, or made again where it is too much."""

    @staticmethod
    def forward(
        ctx: Any,
        query_VD: torch.Tensor,
        candidate_ND: torch.Tensor,
        offset_N: torch.Tensor | None,
        groups: Sequence[int] | None,
        kind: Literal["softplus", "log"],
    ) -> torch.Tensor:
        sums_V = query_VD.new_empty(len(query_VD))
        blocks = list(_blocks(len(query_VD), len(candidate_ND), groups))
        keeps = sum((rows.stop - rows.start) * (met.stop - met.start) for rows, met in blocks) <= _KEPT_ELEMENTS
        kept = []
        for rows, met in blocks:
            logits_RN = _products(query_VD[rows], candidate_ND[met], offset_N if offset_N is None else offset_N[met])
            if kind == "softplus":
                slopes_RN = torch.sigmoid(logits_RN)
                sums_V[rows] = _softplus_sum(logits_RN, slopes_RN)
            else:
                sums_V[rows] = torch.logsumexp(logits_RN, dim=1)
                slopes_RN = logits_RN.sub_(sums_V[rows, None]).exp_() if keeps else logits_RN
            if keeps:
                kept.append(slopes_RN)
        ctx.kind, ctx.kept, ctx.blocks = kind, kept, blocks
        ctx.save_for_backward(query_VD, candidate_ND, offset_N, sums_V)
        return sums_V

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_VD, candidate_ND, offset_N, sums_V = ctx.saved_tensors
        for_queries, for_candidates = torch.empty_like(query_VD), torch.zeros_like(candidate_ND)
        for_offsets = torch.zeros_like(offset_N) if ctx.needs_input_grad[2] else None
        for number, (rows, met) in enumerate(ctx.blocks):
            if ctx.kept:
                slopes_RN = ctx.kept[number]
            else:
                slopes_RN = _products(query_VD[rows], candidate_ND[met], offset_N if offset_N is None else offset_N[met])
                slopes_RN = slopes_RN.sigmoid_() if ctx.kind == "softplus" else slopes_RN.sub_(sums_V[rows, None]).exp_()
            slopes_RN = slopes_RN * gradients[0][rows, None]
            torch.mm(slopes_RN, candidate_ND[met], out=for_queries[rows])
            for_candidates[met].addmm_(slopes_RN.T, query_VD[rows])
            if for_offsets is not None:
                for_offsets[met] += slopes_RN.sum(dim=0)
        return for_queries, for_candidates, for_offsets, None, None


def _products(query_RD: torch.Tensor, candidate_ND: torch.Tensor, offset_N: torch.Tensor | None) -> torch.Tensor:
    if offset_N is None:
        return torch.mm(query_RD, candidate_ND.T)
    return torch.addmm(offset_N, query_RD, candidate_ND.T)


def _softplus_sum(logits_RN: torch.Tensor, sigmoid_RN: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row's softplus, (R,): of max(x, 0) - log(sigmoid(|x|)), with one log for many factors."""
    num_rows, num_candidates = logits_RN.shape
    near_RN = torch.maximum(sigmoid_RN, 1.0 - sigmoid_RN)
    whole = num_candidates // _FACTORS * _FACTORS
    logs_R = near_RN[:, :whole].reshape(num_rows, -1, _FACTORS).prod(dim=2).log_().sum(dim=1)
    return logits_RN.clamp(min=0.0).sum(dim=1) - logs_R - near_RN[:, whole:].log().sum(dim=1)


def _blocks(num_queries: int, num_candidates: int, groups: Sequence[int] | None) -> Iterator[tuple[slice, slice]]:
    """Yields places with the candidates that they meet."""
    begins = [0, num_queries] if groups is None else groups
    share = num_candidates // (len(begins) - 1)
    size = max(128, _BLOCK_ELEMENTS // max(share, 1))
    for group, (begin, end) in enumerate(itertools.pairwise(begins)):
        for first in range(begin, end, size):
            yield slice(first, min(first + size, end)), slice(group * share, (group + 1) * share)
