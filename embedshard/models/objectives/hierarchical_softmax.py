"""Softmax over a tree: a class is a way of binary decisions from the root, its probability their product.

The probability of going left at a node is sigmoid(centre . node), of going right sigmoid(-centre . node), so those of all
classes sum to 1, and a class costs as many products as its way has nodes: about the log of the number of classes (Morin and
Bengio 2005), less for frequent ones in a Huffman tree (Mikolov et al. 2013).

Shapes: V places of lists, D dim, P pairs, U nodes that the batch visits, K contexts of a block, L nodes of their ways,
W centres that may be near a context.
"""

from __future__ import annotations

__all__ = ["HierarchicalSoftmax", "path_losses"]

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from embedshard.data.batch import Batch, Pairs, Paths
from embedshard.models.objectives.objective import Objective
from embedshard.models.objectives.path_kernels import (
    begins_of_decisions,
    by_context,
    path_excesses,
    path_gradients,
    path_sums,
)
from embedshard.models.output import PairOutput
from embedshard.registers import pieces

_BLOCK_CONTEXTS = 256
_LOOPED = (torch.float32, torch.float64)


class HierarchicalSoftmax(Objective):
    """-log of the probability of a pair's context, given its centre. Not collective."""

    def forward(self, output: PairOutput, batch: Batch) -> torch.Tensor:
        """Returns (P,) losses."""
        assert output.node_UD is not None, "the model looks up the nodes on the ways"
        return path_losses(output.centre_VD, output.node_UD, output.pairs)


def path_losses(centre_VD: torch.Tensor, node_UD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Returns the sum over the nodes on the way to each pair's context of softplus(-sign * centre . node), (P,)."""
    is_looped = centre_VD.device.type == "cpu" and centre_VD.dtype == node_UD.dtype and centre_VD.dtype in _LOOPED
    losses: Any = _LoopedPathLosses.apply if is_looped else _PathLosses.apply  # torch gives them no type
    result: torch.Tensor = losses(centre_VD, node_UD, pairs)
    return result


class _LoopedPathLosses(torch.autograd.Function):
    """On a CPU, by the loops of `path_kernels.py`."""

    @staticmethod
    def forward(ctx: Any, centre_VD: torch.Tensor, node_UD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        assert pairs.paths is not None, "the collator finds the ways"
        centre_VD, node_UD = centre_VD.contiguous(), node_UD.contiguous()
        centres, contexts, ids = pairs.centres.numpy(), pairs.contexts.numpy(), pairs.ids.numpy()
        offsets, nodes, signs = (part.numpy() for part in pairs.paths.tensors())
        begins = begins_of_decisions(ids, contexts, offsets)
        numbers = (*by_context(contexts, len(centre_VD)), begins, centres, contexts, ids, offsets, nodes)
        ways = (*(part.view(np.uint64) for part in numbers), signs)
        excesses_S, losses_P = centre_VD.new_zeros(int(begins[-1])), centre_VD.new_empty(len(centres))
        parts: Any = (centre_VD.detach().numpy(), node_UD.detach().numpy(), *ways, excesses_S.numpy())
        for piece in pieces(centre_VD.shape[1]):
            path_excesses(*piece, *parts)
        slopes_S = torch.sigmoid(excesses_S)
        path_sums(excesses_S.numpy(), slopes_S.numpy(), begins, losses_P.numpy())
        ctx.ways = ways
        ctx.save_for_backward(centre_VD, node_UD, slopes_S)
        return losses_P

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centre_VD, node_UD, slopes_S = (saved.detach() for saved in ctx.saved_tensors)
        for_centre, for_node = torch.zeros_like(centre_VD), torch.zeros_like(node_UD)
        parts = slopes_S, gradients[0].contiguous(), for_centre, for_node
        for piece in pieces(centre_VD.shape[1]):
            path_gradients(*piece, centre_VD.numpy(), node_UD.numpy(), *ctx.ways, *(part.numpy() for part in parts))
        return for_centre, for_node, None


class _PathLosses(torch.autograd.Function):
    """Contexts whose ways are equally long at once, each with all centres that may be near it.

    A way's nodes are so gathered once for all centres of a context, and the products are small matrices.
    """

    @staticmethod
    def forward(ctx: Any, centre_VD: torch.Tensor, node_UD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        assert pairs.paths is not None, "the collator finds the ways"
        width = 2 * pairs.window + 1
        padded = F.pad(centre_VD, (0, 0, pairs.window, pairs.window))
        near_W = torch.arange(width, device=padded.device)
        losses_VW = centre_VD.new_zeros(len(centre_VD), width)
        logits = []
        for contexts, nodes_KL, signs_KL in _blocks(pairs.ids, pairs.paths):
            centre_KWD = _gathered(padded, contexts.unsqueeze(1) + near_W)
            logits_KLW = torch.bmm(_gathered(node_UD, nodes_KL), centre_KWD.transpose(1, 2)).mul_(signs_KL.unsqueeze(2))
            losses_VW[contexts] = F.softplus(-logits_KLW).sum(dim=1)
            logits.append(logits_KLW)
        ctx.pairs, ctx.logits = pairs, logits
        ctx.save_for_backward(padded, node_UD)
        return losses_VW.view(-1)[_places(pairs, width)]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded, node_UD = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        assert pairs.paths is not None, "the collator finds the ways"
        width, dim = 2 * pairs.window + 1, padded.shape[1]
        num_places = len(padded) - 2 * pairs.window
        slopes_VW = padded.new_zeros(num_places, width)
        slopes_VW.view(-1)[_places(pairs, width)] = gradients[0]
        for_padded, for_nodes = torch.zeros_like(padded), torch.zeros_like(node_UD)
        near_W = torch.arange(width, device=padded.device)
        for (contexts, nodes_KL, signs_KL), logits_KLW in zip(_blocks(pairs.ids, pairs.paths), ctx.logits, strict=True):
            slopes_KLW = torch.sigmoid(-logits_KLW).mul_(slopes_VW[contexts].unsqueeze(1)).mul_(-signs_KL.unsqueeze(2))
            near_KW = contexts.unsqueeze(1) + near_W
            of_nodes = torch.bmm(slopes_KLW, _gathered(padded, near_KW))
            for_nodes.index_add_(0, nodes_KL.flatten(), of_nodes.view(-1, dim))
            of_centres = torch.bmm(slopes_KLW.transpose(1, 2), _gathered(node_UD, nodes_KL))
            for_padded.index_add_(0, near_KW.flatten(), of_centres.view(-1, dim))
        return for_padded[pairs.window : pairs.window + num_places], for_nodes, None


def _gathered(vector_RD: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns vectors at a matrix of rows: `vector_RD[rows]`, which is several times slower on a CPU."""
    return vector_RD.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _places(pairs: Pairs, width: int) -> torch.Tensor:
    """Returns where each pair is in (V contexts, W centres near each), flat."""
    return pairs.contexts * width + (pairs.centres - pairs.contexts + pairs.window)


def _blocks(ids_V: torch.Tensor, paths: Paths) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields contexts with equally long ways, (K,), the nodes of the ways, (K, L), and their signs, (K, L)."""
    lengths_V = torch.diff(paths.offsets)[ids_V]
    order_V = torch.argsort(lengths_V, stable=True)
    lengths, counts = torch.unique_consecutive(lengths_V[order_V], return_counts=True)
    first = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        for begin in range(first, first + count, _BLOCK_CONTEXTS):
            contexts = order_V[begin : min(begin + _BLOCK_CONTEXTS, first + count)]
            starts = paths.offsets[ids_V[contexts]]
            steps_KL = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
            yield contexts, paths.nodes[steps_KL], paths.signs[steps_KL]
        first += count
