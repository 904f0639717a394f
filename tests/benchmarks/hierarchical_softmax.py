"""What a pair costs by the number of classes: down a Huffman tree, and with a softmax over all of them.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/hierarchical_softmax.py
Times are of the forward and the backward pass of the losses, the best of several, without lookups.
"""

import time

import numpy as np
import torch

from embedshard.data.batch import Pairs, Paths
from embedshard.data.huffman import HuffmanTree
from embedshard.data.pairs import KeptPlaces, Ragged
from embedshard.models.objectives.hierarchical_softmax import path_losses
from embedshard.models.objectives.products import log_sums, pair_logits

PLACES, WINDOW, DIM, ROUNDS = 4096, 5, 100, 7
SOFTMAX_UP_TO = 2**13


def seconds(make_losses, *leaves):
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        make_losses().sum().backward()
        best = min(best, time.perf_counter() - begin)
        for leaf in leaves:
            leaf.grad = None
    return best


def main():
    generator = np.random.default_rng(0)
    offsets = np.arange(0, PLACES + 1, 32)
    rows = np.repeat(np.arange(len(offsets) - 1), 32)
    print(f"{PLACES} places, window {WINDOW} (dynamic), dim {DIM}, ids and counts by Zipf's law")
    print("classes | build of the tree, s | mean way | tree, us a pair | softmax, us a pair")
    for exponent in (10, 13, 16, 19, 22):
        classes = 2**exponent
        weights = 1.0 / np.arange(1, classes + 1)
        begin = time.perf_counter()
        tree = HuffmanTree((weights * 1e9).astype(np.int64))
        built = time.perf_counter() - begin
        values = generator.choice(classes, PLACES, p=weights / weights.sum())
        centres, contexts = KeptPlaces(Ragged(values, offsets), rows, generator.integers(1, WINDOW + 1, PLACES)).pairs()
        distinct, ids = np.unique(values, return_inverse=True)
        found = tree.paths(distinct)
        paths = Paths(*map(torch.from_numpy, (found.offsets, found.nodes, found.signs)))
        ids, centres, contexts = map(torch.from_numpy, (ids, centres, contexts))
        pairs = Pairs(ids, centres, contexts, centres, torch.ones(len(centres)), (0, PLACES), WINDOW, paths)
        centre, nodes = (torch.randn(n, DIM, requires_grad=True) for n in (PLACES, len(found.visited)))
        tree_time = seconds(lambda c=centre, n=nodes, p=pairs: path_losses(c, n, p), centre, nodes)
        softmax = "-"
        if classes <= SOFTMAX_UP_TO:
            context, table = (torch.randn(n, DIM, requires_grad=True) for n in (PLACES, classes))

            def full(c=centre, o=context, t=table, p=pairs):
                return log_sums(c, t)[p.centres] - pair_logits(c, o, p.centres, p.contexts, WINDOW)

            softmax = f"{seconds(full, centre, context, table) / len(centres) * 1e6:.2f}"
        way = float(np.diff(found.offsets)[ids.numpy()].mean())
        print(f"{classes} | {built:.2f} | {way:.1f} | {tree_time / len(centres) * 1e6:.2f} | {softmax}", flush=True)


if __name__ == "__main__":
    main()
