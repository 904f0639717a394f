"""Slices of the catalogue, and the metrics of each, against loops in Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.evaluate.given import candidate_sums
from embedshard.evaluate.jagged import JaggedIds
from embedshard.evaluate.retrieval import catalogue_sums
from embedshard.evaluate.scores import DotProducts
from embedshard.evaluate.slices import ItemSlices

METRICS = ["recall@3", "precision@3", "ndcg@3", "hit_rate@2", "map@3", "mrr"]


def jagged(lists):
    return JaggedIds(np.array([i for one in lists for i in one], dtype=np.int64), np.cumsum([0] + [len(i) for i in lists]))


def slices_by_loop(counts):
    """The head is filled until it has half of the interactions, then the torso until both have 80 %."""
    slice_of, together = [2] * len(counts), 0
    for item in sorted(range(len(counts)), key=lambda item: (-counts[item], item)):
        if counts[item]:
            slice_of[item] = 0 if 2 * together < sum(counts) else 1 if 5 * together < 4 * sum(counts) else 2
        together += counts[item]
    return slice_of


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=25))
def test_slices_are_the_fewest_items_that_make_up_a_share(counts):
    found = ItemSlices.by_popularity(np.array(counts, dtype=np.int64))
    assert found.of_item.tolist() == slices_by_loop(counts)


def test_the_edges_of_slices_are_where_they_are_said_to_be():
    def of(counts):
        return "".join("HTt"[number] for number in ItemSlices.by_popularity(np.array(counts)).of_item)

    assert of([5, 3, 2]) == "HTt", "5 of 10 are half, 8 are 80 %"
    assert of([1] * 10) == "HHHHHTTTtt", "of equally popular items the first ones"
    assert of([1, 0, 9]) == "ttH"
    assert of([0, 0]) == "tt"
    found = ItemSlices.by_popularity(np.array([5, 3, 2]))
    assert found.of(np.array([2, 0, 3, 1, 9])).tolist() == [2, 0, 2, 1, 2], "what the catalogue does not hold is tail"


def values_of(hits, num_relevant):
    """One query's metrics; hits: whether each place of its list holds a relevant item of the slice."""
    places = [place for place, hit in enumerate(hits, 1) if hit]
    top = [place for place in places if place <= 3]
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(num_relevant, 3) + 1))
    return {
        "recall@3": len(top) / num_relevant,
        "precision@3": len(top) / 3,
        "ndcg@3": sum(1 / math.log2(place + 1) for place in top) / ideal,
        "hit_rate@2": float(any(place <= 2 for place in places)),
        "map@3": sum((i + 1) / place for i, place in enumerate(top)) / min(num_relevant, 3),
        "mrr": 1 / places[0] if places else 0.0,
    }


def assert_equal_means(found, values_of_queries, num_items):
    expected = {metric: [values[metric] for values in values_of_queries] for metric in METRICS}
    means = {metric: np.mean(values) if values else math.nan for metric, values in expected.items()}
    assert found == pytest.approx(means | {"queries": len(values_of_queries), "items": num_items}, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), block_rows=st.integers(1, 5), coverage=st.booleans())
def test_sliced_metrics_of_the_catalogue_equal_loops(seed, block_rows, coverage):
    rng = np.random.default_rng(seed)
    num_items, num_candidates, num_queries = 12, 15, 6  # the last three candidates: items that the catalogue has not
    query, candidate = rng.integers(-2, 3, (num_queries, 2)), rng.integers(-2, 3, (num_candidates, 2))
    relevant = [sorted(set(rng.integers(0, num_candidates, rng.integers(0, 7)).tolist())) for _ in range(num_queries)]
    seen = [sorted(set(rng.integers(0, num_items, rng.integers(0, 4)).tolist())) for _ in range(num_queries)]
    slices = ItemSlices.by_popularity(rng.integers(0, 6, num_items))
    sums = catalogue_sums(
        DotProducts(torch.from_numpy(query).float(), torch.from_numpy(candidate).float()),
        jagged(relevant),
        jagged(seen),
        [*METRICS, "coverage@2"] if coverage else METRICS,
        block_bytes=block_rows * num_candidates * 4,
        candidate_mask=np.arange(num_candidates) < num_items,
        slices=slices,
    )
    found = slices.values(sums)
    assert list(found) == ["head", "torso", "tail"]
    for number, name in enumerate(found):
        per_query = []
        for q in range(num_queries):
            liked = set(relevant[q]) - set(seen[q])
            scores = candidate @ query[q]
            listed = [i for i in range(num_items) if i not in seen[q]]
            order = sorted(listed, key=lambda i, scores=scores, liked=liked: (-scores[i], i in liked, i))
            mine = {i for i in liked if (slices.of_item[i] if i < num_items else 2) == number}
            if mine:
                per_query.append(values_of([i in mine for i in order], len(mine)))
        assert_equal_means(found[name], per_query, int((slices.of_item == number).sum()))


@pytest.mark.parametrize("seed", range(5))
def test_sliced_metrics_of_given_candidates_equal_loops(seed):
    rng = np.random.default_rng(seed)
    query, candidate = rng.integers(-2, 3, (9, 2)), rng.integers(-2, 3, (12, 2))
    positives, negatives = rng.integers(0, 12, 9), [rng.integers(0, 12, rng.integers(0, 6)).tolist() for _ in range(9)]
    slices = ItemSlices.by_popularity(rng.integers(0, 6, 12))
    sums = candidate_sums(
        DotProducts(torch.from_numpy(query).float(), torch.from_numpy(candidate).float()),
        positives,
        jagged(negatives),
        METRICS,
        slices=slices,
    )
    found = slices.values(sums)
    for number, name in enumerate(found):
        per_query = []
        for q in np.flatnonzero(slices.of_item[positives] == number):
            scores = candidate @ query[q]
            own = positives[q]
            before = sum(scores[i] >= scores[own] for i in negatives[q] if i != own)
            per_query.append(values_of([False] * before + [True], 1))
        assert_equal_means(found[name], per_query, int((slices.of_item == number).sum()))


def test_sums_of_slices_add_up_as_the_whole_does():
    rng = np.random.default_rng(4)
    query, candidate = torch.from_numpy(rng.normal(size=(8, 3))), torch.from_numpy(rng.normal(size=(20, 3)))
    relevant = [sorted(set(rng.integers(0, 20, 5).tolist())) for _ in range(8)]
    slices = ItemSlices.by_popularity(rng.integers(0, 9, 20))

    def sums(first, last):
        scores = DotProducts(query[first:last], candidate)
        return catalogue_sums(scores, jagged(relevant[first:last]), None, METRICS, slices=slices)

    whole, parts = sums(0, 8), sums(0, 3)
    parts.add(sums(3, 8))
    for name, values in slices.values(whole).items():
        assert slices.values(parts)[name] == pytest.approx(values)
