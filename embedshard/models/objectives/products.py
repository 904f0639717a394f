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
_TIMES_ON_A_GPU = 2**10  # as many more there, where each kernel is to have enough to do
_KEPT_ELEMENTS = 2**25  # of which slopes are kept: 128 MiB
_FACTORS = 64  # each from 1/2 to 1, whose product is no smaller than 2^-64


def pair_logits(
    centre_VD: torch.Tensor,
    context_VD: torch.Tensor,
    centres_P: torch.Tensor,
    contexts_P: torch.Tensor,
    window: int,
    before: int | None = None,
) -> torch.Tensor:
    """Returns the dot product of each pair, (P,). Not collective.

    Args:
        centre_VD: vectors of places as centres.
        context_VD: of the same places as contexts; where contexts go by side, (V, 2 * D), what they are before a centre and
            beside it what they are after one.
        centres_P: places of centres.
        contexts_P: places of contexts.
        window: how far a context may be from its centre.
        before: where contexts go by side, how many pairs have their context before their centre; those come first.
    """
    if before is None:
        sides = [(slice(None), -window, window)]
    else:
        sides = [(slice(before), -window, -1), (slice(before, None), 1, window)]
    bands = [_Band(window, first, last, centres_P[pairs], contexts_P[pairs]) for pairs, first, last in sides]
    logits: Any = _PairLogits.apply  # torch gives it no type
    result: torch.Tensor = logits(centre_VD, context_VD, window, bands)
    return result


class _Band:
    """Blocks of centres, and for each block the contexts from `first` behind its first to `last` behind its last."""

    def __init__(self, window: int, first: int, last: int, centres_P: torch.Tensor, contexts_P: torch.Tensor) -> None:
        self.begin = window + first  # of the first block's contexts, the zeros before them counted
        self.width = _CENTRES + last - first
        blocks_P = centres_P // _CENTRES
        # Of (block, centre in it, context in it): a context's place in the block is its distance to where that begins.
        self.flat_P = centres_P * self.width + contexts_P - blocks_P * _CENTRES - first

    def windows(self, padded: torch.Tensor, turn: int = 0, turns: int = 1) -> torch.Tensor:
        """Returns what blocks' centres may have for contexts, (blocks, width, D): a view, whose parts overlap.

        Args:
            padded: contexts with zeros before the first and after the last, (places, D), rows of which may be apart.
            turn: the first block.
            turns: the next is so many blocks on.
        """
        stride = padded.stride(0)
        begin = self.begin + turn * _CENTRES
        blocks = len(range(begin, len(padded) - self.width + 1, turns * _CENTRES))
        return padded[begin:].as_strided((blocks, self.width, padded.shape[1]), (turns * _CENTRES * stride, stride, 1))


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, centre_VD: torch.Tensor, context_VD: torch.Tensor, window: int, bands: Sequence[_Band]
    ) -> torch.Tensor:
        num_places, dim = centre_VD.shape
        num_blocks = -(-num_places // _CENTRES)
        missing = num_blocks * _CENTRES - num_places
        blocks = F.pad(centre_VD, (0, 0, 0, missing)).view(num_blocks, _CENTRES, dim)
        padded = F.pad(context_VD, (0, 0, window, missing + window))
        ctx.bands, ctx.window, ctx.num_places = bands, window, num_places
        ctx.save_for_backward(blocks, padded)
        logits = [
            torch.bmm(blocks, band.windows(part)[:num_blocks].transpose(1, 2)).view(-1)[band.flat_P]
            for band, part in zip(bands, padded.chunk(len(bands), dim=1), strict=True)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bands: Sequence[_Band] = ctx.bands
        blocks, padded = ctx.saved_tensors
        num_blocks, _, dim = blocks.shape
        for_blocks, for_contexts = torch.zeros_like(blocks), torch.zeros_like(padded)
        given = torch.split(gradients[0], [len(band.flat_P) for band in bands])
        parts = zip(padded.chunk(len(bands), dim=1), for_contexts.chunk(len(bands), dim=1), strict=True)
        for band, gradient_P, (part, for_part) in zip(bands, given, parts, strict=True):
            slopes = padded.new_zeros(num_blocks, _CENTRES, band.width)
            slopes.view(-1)[band.flat_P] = gradient_P
            for_blocks.baddbmm_(slopes, band.windows(part)[:num_blocks])
            of_windows = torch.bmm(slopes.transpose(1, 2), blocks)
            # Neighbouring windows overlap, so they are added in two or more turns, none of whose windows do.
            turns = -(-band.width // _CENTRES)
            for turn in range(min(turns, num_blocks)):
                mine = of_windows[turn::turns]
                band.windows(for_part, turn, turns)[: len(mine)].add_(mine)
        for_centres = for_blocks.view(-1, dim)[: ctx.num_places]
        return for_centres, for_contexts[ctx.window : ctx.window + ctx.num_places], None, None


def softplus_sums(
    query_VD: torch.Tensor,
    candidate_ND: torch.Tensor,
    offset_N: torch.Tensor | None = None,
    groups: Sequence[int] | None = None,
    sides: int = 1,
) -> torch.Tensor:
    """Returns the sum over candidates of softplus(query . candidate + offset), (V * sides,). Not collective.

    Args:
        query_VD: vectors of places.
        candidate_ND: vectors of candidates.
        offset_N: added to each candidate's products.
        groups: where each group of places begins, and V. Each meets its own candidates, as many and in the same order;
            None lets all places meet all candidates.
        sides: into how many equal parts what a place meets is divided, each of which has a sum of its own. A place's sums
            are one after the other.
    """
    sums: Any = _Sums.apply
    result: torch.Tensor = sums(query_VD, candidate_ND, offset_N, groups, sides, "softplus")
    return result


def log_sums(
    query_VD: torch.Tensor,
    candidate_ND: torch.Tensor,
    offset_N: torch.Tensor | None = None,
    groups: Sequence[int] | None = None,
    sides: int = 1,
) -> torch.Tensor:
    """Returns the log of the sum over candidates of exp(query . candidate + offset), (V * sides,). Not collective.

    The arguments are those of `softplus_sums`.
    """
    sums: Any = _Sums.apply
    result: torch.Tensor = sums(query_VD, candidate_ND, offset_N, groups, sides, "log")
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
        sides: int,
        kind: Literal["softplus", "log"],
    ) -> torch.Tensor:
        sums_V = query_VD.new_empty(len(query_VD) * sides)
        blocks = list(_blocks(len(query_VD), len(candidate_ND), groups, query_VD.device))
        keeps = sum((rows.stop - rows.start) * (met.stop - met.start) for rows, met in blocks) <= _KEPT_ELEMENTS
        kept = []
        for rows, met in blocks:
            logits_RN = _products(query_VD[rows], candidate_ND[met], offset_N if offset_N is None else offset_N[met])
            logits_RN, mine = _by_side(logits_RN, sides), _sums_of(rows, sides)
            if kind == "softplus":
                slopes_RN = torch.sigmoid(logits_RN)
                sums_V[mine] = _softplus_sum(logits_RN, slopes_RN)
            else:
                sums_V[mine] = torch.logsumexp(logits_RN, dim=1)
                slopes_RN = logits_RN.sub_(sums_V[mine, None]).exp_() if keeps else logits_RN
            if keeps:
                kept.append(slopes_RN)
        ctx.kind, ctx.kept, ctx.blocks, ctx.sides = kind, kept, blocks, sides
        ctx.save_for_backward(query_VD, candidate_ND, offset_N, sums_V)
        return sums_V

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_VD, candidate_ND, offset_N, sums_V = ctx.saved_tensors
        for_queries, for_candidates = torch.empty_like(query_VD), torch.zeros_like(candidate_ND)
        for_offsets = torch.zeros_like(offset_N) if ctx.needs_input_grad[2] else None
        for number, (rows, met) in enumerate(ctx.blocks):
            mine = _sums_of(rows, ctx.sides)
            if ctx.kept:
                slopes_RN = ctx.kept[number]
            else:
                slopes_RN = _products(query_VD[rows], candidate_ND[met], offset_N if offset_N is None else offset_N[met])
                slopes_RN = _by_side(slopes_RN, ctx.sides)
                slopes_RN = slopes_RN.sigmoid_() if ctx.kind == "softplus" else slopes_RN.sub_(sums_V[mine, None]).exp_()
            slopes_RN = (slopes_RN * gradients[0][mine, None]).view(rows.stop - rows.start, met.stop - met.start)
            torch.mm(slopes_RN, candidate_ND[met], out=for_queries[rows])
            for_candidates[met].addmm_(slopes_RN.T, query_VD[rows])
            if for_offsets is not None:
                for_offsets[met] += slopes_RN.sum(dim=0)
        return for_queries, for_candidates, for_offsets, None, None, None


def _by_side(logits_RN: torch.Tensor, sides: int) -> torch.Tensor:
    """Returns a row for each sum."""
    return logits_RN.view(len(logits_RN) * sides, logits_RN.shape[1] // sides)


def _sums_of(rows: slice, sides: int) -> slice:
    return slice(rows.start * sides, rows.stop * sides)


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


def _blocks(
    num_queries: int, num_candidates: int, groups: Sequence[int] | None, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Yields places with the candidates that they meet."""
    begins = [0, num_queries] if groups is None else groups
    share = num_candidates // (len(begins) - 1)
    elements = _BLOCK_ELEMENTS * (1 if device.type == "cpu" else _TIMES_ON_A_GPU)
    size = max(128, elements // max(share, 1))
    for group, (begin, end) in enumerate(itertools.pairwise(begins)):
        for first in range(begin, end, size):
            yield slice(first, min(first + size, end)), slice(group * share, (group + 1) * share)
