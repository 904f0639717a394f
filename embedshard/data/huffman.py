"""A Huffman tree over classes, in two numbers a node: built without an object a class, walked for a batch at a time.

Huffman's algorithm (1952) joins the two lightest nodes again and again. Here many are joined at once: a joined node weighs
at least as much as the two lightest together, so all nodes up to that weight are joined with each other, in order, before
any that is new; each round takes them pair by pair. There are about as many rounds as the weights have binary orders.
"""

from __future__ import annotations

__all__ = ["LONGEST_WAY", "HuffmanTree", "VisitedPaths"]

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.compiled import compiled

IntArray = npt.NDArray[np.int64]

LONGEST_WAY = 90
"""Nodes on the way to a class, at most, however the classes are counted in 64 bits."""


@dataclass(frozen=True)
class VisitedPaths:
    """The ways from the root to some classes.

    Attributes:
        offsets: where each class's way begins in `nodes` and `signs`, and the end of the last, (n + 1,) int64.
        nodes: places in `visited`, from the root on, int64.
        signs: 1 for left, -1 for right, float32.
        visited: the inner nodes on any of the ways, each once, ascending, int64.
    """

    offsets: IntArray
    nodes: IntArray
    signs: npt.NDArray[np.float32]
    visited: IntArray


class HuffmanTree:
    """A binary tree whose leaves are classes: the more frequent, the nearer to the root.

    Inner nodes are numbered from 0, the root last. Of nodes that weigh the same, classes come before inner nodes and
    smaller numbers before larger ones, so the tree is a function of the counts.

    Args:
        counts: of each class, (C,) int64, at least 0; at least two classes.
    """

    def __init__(self, counts: IntArray) -> None:
        num_classes = len(counts)
        assert num_classes >= 2, "a tree has a decision to make"
        assert num_classes < 2**30, "a node and a side fit 32 bits"
        self.num_classes = num_classes
        # Of each class, then of each inner node: its parent's number, times two, plus one for the right-hand side.
        self._up = np.zeros(2 * num_classes - 1, dtype=np.int32)
        # Of each inner node, while ways are found: whether it was met, then its place among those that were. Else zeros.
        self._places = np.zeros(num_classes - 1, dtype=np.int32)
        self._places_are_free = threading.Lock()
        leaves = np.argsort(counts, kind="stable").astype(np.int64, copy=False)
        leaf_weights = counts[leaves]
        inner_weights = np.zeros(num_classes - 1, dtype=np.int64)
        leaf = inner = made = 0  # the next of each that is not joined yet, and how many inner nodes there are
        while made < num_classes - 1:
            most = np.concatenate([leaf_weights[leaf : leaf + 2], inner_weights[inner : min(inner + 2, made)]])
            limit = np.sort(most)[:2].sum()
            last_leaf = leaf + int(np.searchsorted(leaf_weights[leaf:], limit, side="right"))
            last_inner = inner + int(np.searchsorted(inner_weights[inner:made], limit, side="right"))
            weights = np.concatenate([leaf_weights[leaf:last_leaf], inner_weights[inner:last_inner]])
            nodes = np.concatenate([leaves[leaf:last_leaf], np.arange(inner, last_inner) + num_classes])
            order = np.argsort(weights, kind="stable")
            pairs = len(order) // 2
            if len(order) % 2:  # the heaviest waits for the next round
                if order[-1] < last_leaf - leaf:
                    last_leaf -= 1
                else:
                    last_inner -= 1
            left, right = order[0 : 2 * pairs : 2], order[1 : 2 * pairs : 2]
            parents = np.arange(made, made + pairs, dtype=np.int32)
            self._up[nodes[left]], self._up[nodes[right]] = parents * 2, parents * 2 + 1
            inner_weights[made : made + pairs] = weights[left] + weights[right]
            leaf, inner, made = last_leaf, last_inner, made + pairs

    def paths(self, classes: IntArray) -> VisitedPaths:
        """Returns the ways from the root to classes, (n,) int64."""
        offsets = np.zeros(len(classes) + 1, dtype=np.int64)
        met = np.empty(min(self.num_classes - 1, LONGEST_WAY * len(classes)), dtype=np.int64)
        with self._places_are_free:
            visited = np.sort(met[: _meet(self._up, classes, offsets, self._places, met)])
            nodes, signs = np.empty(offsets[-1], dtype=np.int64), np.empty(offsets[-1], dtype=np.float32)
            _walk(self._up, classes, offsets, self._places, visited, nodes, signs)
        return VisitedPaths(offsets, nodes, signs, visited)


@compiled
def _meet(up: Any, classes: Any, offsets: Any, is_met: Any, met: Any) -> int:
    """Fills in how long ways are, and which nodes are on any of them, in no order; returns how many these are.

    `is_met`, zeros, becomes 1 at these.
    """
    count, num_classes = 0, len(is_met) + 1
    root = num_classes - 2
    for number in range(len(classes)):
        at, length, parent = np.int64(classes[number]), 0, np.int64(-1)
        while parent != root:
            parent = np.int64(up[at]) >> 1
            if is_met[parent] == 0:
                is_met[parent] = 1
                met[count] = parent
                count += 1
            length += 1
            at = parent + num_classes
        offsets[number + 1] = offsets[number] + length
    return count


@compiled
def _walk(up: Any, classes: Any, offsets: Any, places: Any, visited: Any, nodes: Any, signs: Any) -> None:
    """Fills in the ways, from the root on, by the nodes' places in `visited`. `places` becomes zeros again."""
    for place in range(len(visited)):
        places[visited[place]] = place
    num_classes = len(places) + 1
    for number in range(len(classes)):
        at = np.int64(classes[number])
        for step in range(offsets[number + 1] - 1, offsets[number] - 1, -1):
            parent, side = np.int64(up[at]) >> 1, up[at] & 1
            nodes[step] = places[parent]
            signs[step] = 1 - 2 * side
            at = parent + num_classes
    for node in visited:
        places[node] = 0
