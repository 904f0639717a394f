"""The tree against Huffman's own algorithm with a heap."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.data.huffman import HuffmanTree

fibonacci = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610]


def cheapest(counts):
    """The sum of counts times depths of a tree that no other is below: that of all joined weights."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        cost += joined
        heapq.heappush(heap, joined)
    return cost


def ways(tree, classes):
    found = tree.paths(np.array(classes, dtype=np.int64))
    spans = list(zip(found.offsets[:-1], found.offsets[1:], strict=True))
    return [list(zip(found.visited[found.nodes[a:b]].tolist(), found.signs[a:b].tolist(), strict=True)) for a, b in spans]


@given(st.one_of(*(st.lists(st.integers(0, most), min_size=2, max_size=60) for most in (0, 1, 5, 100, 10**12))))
@settings(max_examples=300, deadline=None)
def test_no_tree_is_cheaper_and_each_class_has_a_way_of_its_own(counts):
    tree = HuffmanTree(np.array(counts, dtype=np.int64))
    found = ways(tree, range(len(counts)))
    assert sum(count * len(way) for count, way in zip(counts, found, strict=True)) == cheapest(counts)
    assert sum(2.0 ** -len(way) for way in found) == 1.0
    assert len(set(map(tuple, found))) == len(counts)
    root = len(counts) - 2
    assert all(way[0][0] == root for way in found)
    assert {node for way in found for node, _ in way} == set(range(len(counts) - 1))
    both_ways_out = {step for way in found for step in way}
    assert len(both_ways_out) == 2 * (len(counts) - 1)


def test_depths_of_counts_like_fibonacci_numbers_grow_one_by_one():
    lengths = [len(way) for way in ways(HuffmanTree(np.array(fibonacci)), range(len(fibonacci)))]
    assert lengths == [14, 14, *range(13, 0, -1)]


def test_the_nodes_of_several_ways_are_visited_once():
    tree = HuffmanTree(np.array([5, 1, 9, 2, 2, 7], dtype=np.int64))
    assert ways(tree, [3, 0]) == [ways(tree, [3])[0], ways(tree, [0])[0]]
    visited = tree.paths(np.array([3, 0], dtype=np.int64)).visited.tolist()
    assert visited == sorted({node for way in ways(tree, [3, 0]) for node, _ in way})
    nothing = tree.paths(np.zeros(0, dtype=np.int64))
    assert len(nothing.nodes) == len(nothing.visited) == 0


@pytest.mark.parametrize("num_classes", [2**10, 2**16])
def test_of_even_counts_all_ways_are_as_long_as_the_logarithm(num_classes):
    found = HuffmanTree(np.full(num_classes, 3, dtype=np.int64)).paths(np.arange(num_classes))
    assert (np.diff(found.offsets) == np.log2(num_classes)).all()


def test_ways_are_the_same_whatever_was_asked_before():
    generator = np.random.default_rng(3)
    counts = generator.integers(0, 1000, 200)
    tree = HuffmanTree(counts)
    for size in (200, 0, 1, 30, 30):
        classes = np.sort(generator.permutation(200)[:size])
        found, anew = tree.paths(classes), HuffmanTree(counts).paths(classes)
        for name in ("offsets", "nodes", "signs", "visited"):
            np.testing.assert_array_equal(getattr(found, name), getattr(anew, name))
        np.testing.assert_array_equal(found.visited, np.unique(found.visited[found.nodes]))
