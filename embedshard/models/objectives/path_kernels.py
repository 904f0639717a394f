"""Compiled loops down the ways of a tree, pair by pair: what hierarchical softmax costs on a CPU.

Nothing is gathered, and only pairs that there are are computed: context by context, so that the nodes on its way and the
centres near it stay in the nearest cache.

Shapes: P pairs, V places of lists, U nodes that the batch visits, I ids, E nodes of the ways to all ids, S decisions: those
of all pairs, pair by pair, each from the root on; D dim.
"""

from __future__ import annotations

__all__ = ["begins_of_decisions", "by_context", "path_gradients", "path_logits", "path_sums"]

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedshard.compiled import compiled
from embedshard.counting import sort_by_counting


def by_context(contexts: NDArray[np.int64], places: int) -> NDArray[np.int64]:
    """Returns the pairs in the order of their contexts, and among those of a context in their own, (P,) int64.

    Args:
        contexts: places, (P,) int64.
        places: V.
    """
    order, met, begins = np.empty_like(contexts), np.empty_like(contexts), np.empty(len(contexts) + 1, np.int64)
    sort_by_counting(contexts, np.zeros(places, np.int64), order, met, begins)
    return order


@compiled
def begins_of_decisions(ids: Any, contexts: Any, offsets: Any) -> Any:
    """Returns where the decisions of each pair begin, and S, (P + 1,) int64.

    Args:
        ids: of each place, (V,) int64.
        contexts: places, (P,) int64.
        offsets: where each id's way begins, (I + 1,) int64.
    """
    begins = np.empty(len(contexts) + 1, np.int64)
    begins[0] = 0
    for pair in range(len(contexts)):
        way = ids[contexts[pair]]
        begins[pair + 1] = begins[pair] + offsets[way + 1] - offsets[way]
    return begins


@compiled
def path_logits(
    centre: Any, node: Any, order: Any, begins: Any, centres: Any, contexts: Any, ids: Any, offsets: Any, nodes: Any,
    signs: Any, out: Any,
) -> None:  # fmt: skip
    """Fills in sign * centre . node for each decision.

    Args:
        centre: (V, D) vectors.
        node: (U, D) vectors.
        order: in which pairs are taken, (P,) int64.
        begins: where each pair's decisions begin, (P + 1,) int64.
        centres: places, (P,) int64.
        contexts: places, (P,) int64.
        ids: of each place, (V,) int64.
        offsets: where each id's way begins in `nodes`, (I + 1,) int64.
        nodes: of the ways, (E,) int64.
        signs: of the ways, (E,).
        out: (S,).
    """
    dim, zero = centre.shape[1], centre.dtype.type(0)
    for at in range(len(order)):
        pair = order[at]
        vector, first = centre[centres[pair]], offsets[ids[contexts[pair]]]
        for step in range(begins[pair + 1] - begins[pair]):
            other, product = node[nodes[first + step]], zero
            for column in range(dim):
                product += vector[column] * other[column]
            out[begins[pair] + step] = signs[first + step] * product


@compiled
def path_sums(logits: Any, certainties: Any, begins: Any, out: Any) -> None:
    """Fills in each pair's sum of softplus(-logit) = max(-logit, 0) - log(certainty), with one log for a way.

    A way has fewer than 91 nodes, however the classes are counted in 64 bits, and a certainty is at least a half, so their
    product is no smaller than 2^-90.

    Args:
        logits: of decisions, (S,).
        certainties: sigmoid(|logit|), (S,).
        begins: where each pair's decisions begin, (P + 1,) int64.
        out: (P,).
    """
    zero = logits.dtype.type(0)
    for pair in range(len(out)):
        total, product = zero, logits.dtype.type(1)
        for at in range(begins[pair], begins[pair + 1]):
            total += max(-logits[at], zero)
            product *= certainties[at]
        out[pair] = total - np.log(product)


@compiled
def path_gradients(
    centre: Any, node: Any, order: Any, begins: Any, centres: Any, contexts: Any, ids: Any, offsets: Any, nodes: Any,
    signs: Any, slopes: Any, gradient: Any, for_centre: Any, for_node: Any,
) -> None:  # fmt: skip
    """Adds up the gradients of centres and nodes.

    Args:
        centre: this and what follows, up to `signs`, are those of `path_logits`.
        node: see there.
        order: see there.
        begins: see there.
        centres: see there.
        contexts: see there.
        ids: see there.
        offsets: see there.
        nodes: see there.
        signs: see there.
        slopes: sigmoid(-logit) of each decision, (S,).
        gradient: of each pair's loss, (P,).
        for_centre: (V, D), zeros.
        for_node: (U, D), zeros.
    """
    dim = centre.shape[1]
    for at in range(len(order)):
        pair = order[at]
        vector, total, first = centre[centres[pair]], for_centre[centres[pair]], offsets[ids[contexts[pair]]]
        for step in range(begins[pair + 1] - begins[pair]):
            row = nodes[first + step]
            other, other_total = node[row], for_node[row]
            slope = -signs[first + step] * slopes[begins[pair] + step] * gradient[pair]
            for column in range(dim):  # a loop for each: two sums in one are slower
                total[column] += slope * other[column]
            for column in range(dim):
                other_total[column] += slope * vector[column]
