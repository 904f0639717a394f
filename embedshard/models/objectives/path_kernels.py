"""Compiled loops down the ways of a tree, pair by pair: what hierarchical softmax costs on a CPU.

Nothing is gathered, and only pairs that there are are computed: context by context, so that the nodes on its way and the
centres near it stay in the nearest cache, where small products of both are taken as in BLAS: what is summed stays in
registers until it is whole.

Shapes: P pairs, V places of lists, K distinct contexts, U nodes that the batch visits, I ids, E nodes of the ways to all
ids, S decisions: those of all pairs, pair by pair, each from the root on; D dim.
"""

from __future__ import annotations

__all__ = ["begins_of_decisions", "by_context", "path_excesses", "path_gradients", "path_sums"]

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedshard.compiled import compiled
from embedshard.counting import sort_by_counting
from embedshard.data.huffman import LONGEST_WAY
from embedshard.registers import no_numbers, numbers_at, plus_scaled, product_with, put_numbers

_LONGEST = np.uint64(LONGEST_WAY)
_CENTRES = np.uint64(16)  # of a context at once
_ONE, _TWO = np.uint64(1), np.uint64(2)


def by_context(contexts: NDArray[np.int64], places: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the pairs in the order of their contexts, and where each context begins among them.

    Those of a context stay in their own order.

    Args:
        contexts: places, (P,) int64.
        places: V.

    Returns:
        The order, (P,) int64, and (K + 1,) int64, of which the last is P.
    """
    order, met, firsts = np.empty_like(contexts), np.empty_like(contexts), np.empty(len(contexts) + 1, np.int64)
    count = sort_by_counting(contexts, np.zeros(places, np.int64), order, met, firsts)
    return order, firsts[: count + 1]


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
def path_excesses(
    column: int, sixteens: Any, centre: Any, node: Any, order: Any, firsts: Any, begins: Any, centres: Any, contexts: Any,
    ids: Any, offsets: Any, nodes: Any, signs: Any, out: Any,
) -> None:  # fmt: skip
    """Adds -sign * centre . node to each decision, for a piece of the vectors.

    Whole numbers are unsigned: of others Numba asks each time whether they count from an array's end.

    Args:
        column: the piece's first.
        sixteens: of the piece, as `registers.pieces` gives them.
        centre: (V, D) vectors.
        node: (U, D) vectors.
        order: in which pairs are taken, (P,) uint64.
        firsts: where the pairs of each context begin in it, (K + 1,) uint64.
        begins: where each pair's decisions begin, (P + 1,) uint64.
        centres: places, (P,) uint64.
        contexts: places, (P,) uint64.
        ids: of each place, (V,) uint64.
        offsets: where each id's way begins in `nodes`, (I + 1,) uint64.
        nodes: of the ways, (E,) uint64.
        signs: of the ways, (E,).
        out: (S,).
    """
    nothing = no_numbers(centre.dtype.type(0), sixteens)
    for at in range(np.uint64(len(order))):
        pair = order[at]
        way = ids[contexts[pair]]
        first, begin = offsets[way], begins[pair]
        vector = numbers_at(centre, centres[pair], column, nothing)
        for step in range(begins[pair + _ONE] - begin):
            product = product_with(vector, node, nodes[first + step], column)
            out[begin + step] -= signs[first + step] * product


@compiled
def path_sums(excesses: Any, slopes: Any, begins: Any, out: Any) -> None:
    """Fills in each pair's sum of softplus(excess) = max(excess, 0) - log(sigmoid(|excess|)), with one log for a way.

    A sigmoid of something positive is at least a half, so those of a way have a product no smaller than 2^-90.

    Args:
        excesses: of decisions, (S,).
        slopes: their sigmoid, (S,).
        begins: where each pair's decisions begin, (P + 1,) int64.
        out: (P,).
    """
    zero, one = excesses.dtype.type(0), excesses.dtype.type(1)
    for pair in range(len(out)):
        total, product = zero, one
        for at in range(begins[pair], begins[pair + 1]):
            total += max(excesses[at], zero)
            product *= max(slopes[at], one - slopes[at])
        out[pair] = total - np.log(product)


@compiled
def path_gradients(
    column: int, sixteens: Any, centre: Any, node: Any, order: Any, firsts: Any, begins: Any, centres: Any, contexts: Any,
    ids: Any, offsets: Any, nodes: Any, signs: Any, slopes: Any, gradient: Any, for_centre: Any, for_node: Any,
) -> None:  # fmt: skip
    """Adds up the gradients of centres and nodes, for a piece of the vectors.

    Args:
        column: this and what follows, up to `signs`, are those of `path_excesses`.
        sixteens: see there.
        centre: see there.
        node: see there.
        order: see there.
        firsts: see there.
        begins: see there.
        centres: see there.
        contexts: see there.
        ids: see there.
        offsets: see there.
        nodes: see there.
        signs: see there.
        slopes: of each decision's loss by its excess, (S,).
        gradient: of each pair's loss, (P,).
        for_centre: (V, D), zeros.
        for_node: (U, D), zeros.
    """
    nothing = no_numbers(centre.dtype.type(0), sixteens)
    factors, near = np.empty(_CENTRES * _LONGEST, centre.dtype), np.empty(_CENTRES, np.uint64)
    for context in range(np.uint64(len(firsts) - 1)):
        way, after = ids[contexts[order[firsts[context]]]], firsts[context + _ONE]
        first, length = offsets[way], offsets[way + _ONE] - offsets[way]
        for begin in range(firsts[context], after, _CENTRES):
            count = min(_CENTRES, after - begin)
            for at in range(count):
                pair = order[begin + at]
                near[at] = centres[pair]
                total = numbers_at(for_centre, near[at], column, nothing)
                for step in range(length):
                    factor = -signs[first + step] * slopes[begins[pair] + step] * gradient[pair]
                    factors[at * length + step] = factor
                    total = plus_scaled(total, factor, node, nodes[first + step], column)
                put_numbers(for_centre, near[at], column, total)
            even = length - length % _TWO
            for step in range(np.uint64(0), even, _TWO):  # two nodes at once, for half as many loops over centres
                row, other = nodes[first + step], nodes[first + step + _ONE]
                total = numbers_at(for_node, row, column, nothing)
                other_total = numbers_at(for_node, other, column, nothing)
                for at in range(count):
                    factor, other_factor = factors[at * length + step], factors[at * length + step + _ONE]
                    total = plus_scaled(total, factor, centre, near[at], column)
                    other_total = plus_scaled(other_total, other_factor, centre, near[at], column)
                put_numbers(for_node, row, column, total)
                put_numbers(for_node, other, column, other_total)
            if even < length:
                row = nodes[first + even]
                total = numbers_at(for_node, row, column, nothing)
                for at in range(count):
                    total = plus_scaled(total, factors[at * length + even], centre, near[at], column)
                put_numbers(for_node, row, column, total)
