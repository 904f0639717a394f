"""Retrieval metrics against a brute-force reference that sorts every query's whole list in Python."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.errors import ConfigError, DataError, TrainingError
from embedshard.evaluate.given import candidate_sums, rank_candidates
from embedshard.evaluate.jagged import JaggedIds
from embedshard.evaluate.lists import topk
from embedshard.evaluate.ranking import UNRANKED
from embedshard.evaluate.retrieval import catalogue_positions, catalogue_sums, rank_catalogue
from embedshard.evaluate.scores import DotProducts

KS = (1, 3, 5, 20)
METRICS = [f"{name}@{k}" for name in ("recall", "precision", "ndcg", "hit_rate", "map", "coverage") for k in KS]
METRICS.append("mrr")


def jagged(lists) -> JaggedIds:
    values = np.array([item for one in lists for item in one], dtype=np.int64)
    return JaggedIds(values, np.cumsum([0] + [len(one) for one in lists]))


def metrics_of_hits(hits_of_queries, num_relevant_of_queries):
    """Means over queries with relevant items; hits: for each query, whether each place of its list is a hit."""
    sums = {name: 0.0 for name in METRICS if not name.startswith("coverage")}
    count = 0
    for hits, num_relevant in zip(hits_of_queries, num_relevant_of_queries, strict=True):
        if not num_relevant:
            continue
        count += 1
        sums["mrr"] += 1 / (hits.index(True) + 1) if any(hits) else 0.0
        for k in KS:
            head = hits[:k]
            ideal = sum(1 / math.log2(place + 2) for place in range(min(num_relevant, k)))
            sums[f"recall@{k}"] += sum(head) / num_relevant
            sums[f"precision@{k}"] += sum(head) / k
            sums[f"hit_rate@{k}"] += any(head)
            sums[f"ndcg@{k}"] += sum(hit / math.log2(place + 2) for place, hit in enumerate(head)) / ideal
            precisions = [sum(head[: place + 1]) / (place + 1) for place, hit in enumerate(head) if hit]
            sums[f"map@{k}"] += sum(precisions) / min(num_relevant, k)
    return {name: value / count if count else math.nan for name, value in sums.items()} | {"queries": count}


def brute_force(query, candidate, relevant, seen, mask=None):
    """All metrics, by sorting: relevant items behind others of the same score, for coverage by number alone."""
    num_candidates = len(candidate)
    allowed = [i for i in range(num_candidates) if mask is None or mask[i]]
    all_hits, nums, covered, also_seen = [], [], {k: set() for k in KS}, 0
    for vector, liked, known in zip(query, relevant, seen, strict=True):
        also_seen += len(set(liked) & set(known))
        liked = set(liked) - set(known)
        scores = [sum(float(a) * float(b) for a, b in zip(vector, row, strict=True)) for row in candidate]
        listed = [i for i in allowed if i not in set(known)]
        order = sorted(listed, key=lambda i: (-scores[i], i in liked, i))
        all_hits.append([i in liked for i in order])
        nums.append(len(liked))
        for k in KS:
            covered[k].update(sorted(listed, key=lambda i: (-scores[i], i))[:k])
    expected = metrics_of_hits(all_hits, nums)
    for k in KS:
        expected[f"coverage@{k}"] = len(covered[k]) / len(allowed) if allowed else math.nan
    return expected | {
        "queries_without_relevant": len(query) - expected["queries"],
        "relevant_also_seen": also_seen,
        "relevant_not_recommendable": sum(
            i not in allowed for liked, known in zip(relevant, seen, strict=True) for i in set(liked) - set(known)
        ),
    }


def random_lists(rng, num_queries, num_candidates, most):
    return [
        rng.integers(0, num_candidates, rng.integers(0, most + 1)).tolist() if num_candidates else []
        for _ in range(num_queries)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_queries=st.integers(0, 9),
    num_candidates=st.integers(1, 40),
    spread=st.integers(0, 3),
    block_rows=st.integers(1, 5),
    masked=st.booleans(),
)
def test_the_catalogue_agrees_with_brute_force(seed, num_queries, num_candidates, spread, block_rows, masked):
    rng = np.random.default_rng(seed)
    query = rng.integers(-spread, spread + 1, (num_queries, 3))  # whole numbers: sums are exact, ties are many
    candidate = rng.integers(-spread, spread + 1, (num_candidates, 3))
    relevant = random_lists(rng, num_queries, num_candidates, 6)
    seen = random_lists(rng, num_queries, num_candidates, num_candidates)
    mask = rng.random(num_candidates) < 0.6 if masked else None
    result = rank_catalogue(
        DotProducts(torch.from_numpy(query).float(), torch.from_numpy(candidate).float()),
        jagged(relevant),
        jagged(seen),
        METRICS,
        block_bytes=block_rows * num_candidates * 4,
        candidate_mask=mask,
    )
    assert result == pytest.approx(brute_force(query, candidate, relevant, seen, mask), nan_ok=True)
    # Without coverage, another code path counts: nothing but coverage may go.
    plain = [name for name in METRICS if not name.startswith("coverage")]
    again = rank_catalogue(
        DotProducts(torch.from_numpy(query).double(), torch.from_numpy(candidate).double()),
        jagged(relevant),
        jagged(seen),
        plain,
        candidate_mask=None if mask is None else torch.from_numpy(mask),
    )
    assert again == pytest.approx({name: v for name, v in result.items() if "coverage" not in name}, nan_ok=True)


@pytest.mark.parametrize("block_bytes", [1, 4 * 700 * 7, 2**28])
def test_float_vectors_agree_with_brute_force_in_every_block_size(block_bytes):
    rng = np.random.default_rng(3)
    query, candidate = rng.normal(size=(23, 8)), rng.normal(size=(700, 8))
    relevant, seen = random_lists(rng, 23, 700, 30), random_lists(rng, 23, 700, 200)
    result = rank_catalogue(
        DotProducts(torch.from_numpy(query), torch.from_numpy(candidate)),
        jagged(relevant),
        jagged(seen),
        METRICS,
        block_bytes=block_bytes,
    )
    assert result == pytest.approx(brute_force(query, candidate, relevant, seen))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    query, candidate = torch.full((5, 13), value), torch.full((1001, 13), value)
    result = rank_catalogue(
        DotProducts(query, candidate), jagged([[0, 7, 1000]] * 5), None, ["recall@500", "ndcg@20", "mrr"]
    )
    assert result["recall@500"] == result["ndcg@20"] == 0.0
    assert result["mrr"] == pytest.approx(1 / 999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_candidates", [37, 1003, 4099])
@pytest.mark.parametrize("num_queries", [1, 8, 100])
def test_identical_vectors_tie_wherever_they_stand(num_queries, num_candidates, dtype):
    """A matrix product's kernels round differently at its edges, which let a relevant item pass its own twins."""
    generator = torch.Generator().manual_seed(num_candidates)
    distinct = torch.randn(num_candidates // 3, 33, generator=generator, dtype=dtype)
    which = torch.randint(len(distinct), (num_candidates,), generator=generator)
    which[-1] = which[0]
    distinct[:, 0] = 0.0
    candidate = distinct[which]
    candidate[-2:, 0] = -0.0  # the same number, in other bits
    query = distinct[which[0]].repeat(num_queries, 1)  # its best are the copies of candidate 0
    copies = torch.nonzero(which == which[0]).squeeze(1).tolist()
    for item in (copies[0], copies[-1]):
        found = catalogue_positions(DotProducts(query, candidate), jagged([[item]] * num_queries), max_k=num_candidates)
        assert (found.positions >= len(copies)).all()
        assert len(set(found.positions.tolist())) == 1
    ids, scores = topk(DotProducts(query, candidate), len(copies))
    assert (scores == scores[:, :1]).all()
    assert (ids == copies).all()


def test_positions_are_exact_up_to_max_k_and_give_no_credit_beyond():
    candidate = torch.arange(10, dtype=torch.float32)[:, None]
    found = catalogue_positions(DotProducts(torch.ones(1, 1), candidate), jagged([[9, 6, 2, 0]]), max_k=2)
    assert found.relevant.values.tolist() == [0, 2, 6, 9]
    assert found.positions.tolist() == [UNRANKED, UNRANKED, UNRANKED, 1]
    found = catalogue_positions(DotProducts(torch.ones(1, 1), candidate), jagged([[2, 0]]), max_k=2, exact_best=True)
    assert found.positions.tolist() == [UNRANKED, 8]


def test_lists_may_be_longer_than_the_catalogue():
    query, candidate = torch.ones(2, 1), torch.tensor([[3.0], [1.0], [2.0]])
    result = rank_catalogue(
        DotProducts(query, candidate), jagged([[1], [0]]), jagged([[0], []]), ["recall@50", "ndcg@50", "map@50"]
    )
    assert result["recall@50"] == 1.0
    assert result["map@50"] == pytest.approx((1 / 2 + 1) / 2)
    ids, scores = topk(DotProducts(query, candidate), 5, jagged([[0], []]))
    assert ids.tolist() == [[2, 1, -1, -1, -1], [0, 2, 1, -1, -1]]
    assert scores[0].tolist() == [2.0, 1.0, -np.inf, -np.inf, -np.inf]


def test_when_everything_was_seen_nothing_is_listed():
    query, candidate = torch.ones(2, 2), torch.randn(4, 2)
    seen = jagged([range(4)] * 2)
    result = rank_catalogue(DotProducts(query, candidate), jagged([[1, 2], []]), seen, ["recall@2", "mrr", "coverage@2"])
    assert math.isnan(result["recall@2"])
    assert math.isnan(result["mrr"])
    assert result["coverage@2"] == 0.0
    assert (result["queries"], result["queries_without_relevant"], result["relevant_also_seen"]) == (0, 2, 2)
    assert (topk(DotProducts(query, candidate), 2, seen)[0] == -1).all()


def test_a_relevant_item_that_may_not_be_recommended_is_a_miss():
    query, candidate = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0]])
    mask = np.array([False, True, True])
    result = rank_catalogue(
        DotProducts(query, candidate), jagged([[0, 1]]), None, ["recall@3", "mrr", "coverage@3"], candidate_mask=mask
    )
    assert result["recall@3"] == 0.5
    assert result["mrr"] == 1.0
    assert result["coverage@3"] == 1.0
    assert result["relevant_not_recommendable"] == 1
    only = rank_catalogue(DotProducts(query, candidate), jagged([[0]]), None, ["recall@3", "mrr"], candidate_mask=mask)
    assert only["recall@3"] == only["mrr"] == 0.0


def test_shares_of_the_queries_add_up():
    rng = np.random.default_rng(5)
    query, candidate = torch.from_numpy(rng.integers(-2, 3, (17, 3))).float(), torch.randn(30, 3).round()
    relevant, seen = random_lists(rng, 17, 30, 5), random_lists(rng, 17, 30, 9)
    mask = rng.random(30) < 0.8
    whole = rank_catalogue(DotProducts(query, candidate), jagged(relevant), jagged(seen), METRICS, candidate_mask=mask)
    parts = [
        catalogue_sums(
            DotProducts(query[share], candidate),
            jagged([relevant[i] for i in share]),
            jagged([seen[i] for i in share]),
            METRICS,
            candidate_mask=mask,
        )
        for share in ([0, 5, 9], [], range(10, 17), [1, 2, 3, 4, 6, 7, 8])
    ]
    total = parts[1]
    for part in (parts[2], parts[0], parts[3]):
        total.add(pickle.loads(pickle.dumps(part)))
    assert total.result() == pytest.approx(whole)


@pytest.mark.parametrize("coverage", [[], ["coverage@5"]])
@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (("candidate", 1), "query 0 and candidate 1 is nan"),  # relevant for query 0
        (("candidate", 10), "query 0 and candidate 10 is nan"),  # seen by query 0
        (("candidate", 40), "query 0 is nan"),
        (("query", 1), "query 1"),
    ],
)
def test_a_nan_score_is_refused(spoilt, says, coverage):
    query, candidate = torch.ones(3, 2), torch.rand(50, 2)
    which, row = spoilt
    {"query": query, "candidate": candidate}[which][row, 1] = math.nan
    relevant, seen = jagged([[1], [1], [1]]), jagged([[10], [10], [10]])
    with pytest.raises(TrainingError, match=says):
        rank_catalogue(DotProducts(query, candidate), relevant, seen, ["recall@5", *coverage])
    with pytest.raises(TrainingError, match="is nan"):
        topk(DotProducts(query, candidate), 5, seen)
    with pytest.raises(TrainingError, match="is nan"):
        rank_candidates(DotProducts(query, candidate), np.array([1, 2, 3]), jagged([[2, 10, 40]] * 3), ["recall@5"])


def test_a_nan_in_a_candidate_that_may_not_be_recommended_is_not_looked_at():
    candidate = torch.tensor([[1.0], [math.nan], [2.0]])
    mask = np.array([True, False, True])
    result = rank_catalogue(DotProducts(torch.ones(1, 1), candidate), jagged([[0]]), None, ["mrr"], candidate_mask=mask)
    assert result["mrr"] == 0.5


@pytest.mark.parametrize("item", [-1, 4])
def test_an_item_outside_of_the_catalogue_is_refused(item):
    query, candidate = torch.ones(1, 1), torch.ones(4, 1)
    bad, good = jagged([[item]]), jagged([[1]])
    says = rf"item numbers are outside of 0 .. 3, such as {item}"
    with pytest.raises(DataError, match=says):
        rank_catalogue(DotProducts(query, candidate), bad, None, ["mrr"])
    with pytest.raises(DataError, match=says):
        rank_catalogue(DotProducts(query, candidate), good, bad, ["mrr"])
    with pytest.raises(DataError, match=says):
        topk(DotProducts(query, candidate), 2, bad)
    with pytest.raises(DataError, match=says):
        rank_candidates(DotProducts(query, candidate), np.array([1]), bad, ["mrr"])
    with pytest.raises(DataError, match=says):
        rank_candidates(DotProducts(query, candidate), np.array([item]), good, ["mrr"])


def test_metrics_that_do_not_fit_are_refused():
    query, candidate, one = torch.ones(1, 1), torch.ones(4, 1), jagged([[1]])
    with pytest.raises(ConfigError, match="'rmse' compares predictions with labels"):
        rank_catalogue(DotProducts(query, candidate), one, None, ["recall@1", "rmse"])
    with pytest.raises(ConfigError, match="'coverage@3' looks at lists over the whole catalogue"):
        rank_candidates(DotProducts(query, candidate), np.array([1]), one, ["coverage@3"])


def test_from_pairs_sorts_and_drops_repetitions():
    ids = JaggedIds.from_pairs(np.array([2, 0, 2, 2, 0]), np.array([5, 9, 1, 5, 3]), 4)
    assert ids.values.tolist() == [3, 9, 1, 5]
    assert ids.offsets.tolist() == [0, 2, 2, 4, 4]
    assert ids.query_index.tolist() == [0, 0, 2, 2]
    assert ids.pick(np.array([2, 1, 0])).values.tolist() == [1, 5, 3, 9]
    assert ids.span(1, 3).offsets.tolist() == [0, 0, 2]
    with pytest.raises(DataError, match=r"query numbers are outside of 0 .. 3, such as 4"):
        JaggedIds.from_pairs(np.array([4]), np.array([0]), 4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_candidates=st.integers(1, 60),
    k=st.integers(1, 70),
    spread=st.integers(0, 3),
    block_rows=st.integers(1, 9),
)
def test_topk_agrees_with_a_full_sort(seed, num_candidates, k, spread, block_rows):
    rng = np.random.default_rng(seed)
    query = rng.integers(-spread, spread + 1, (6, 2))
    candidate = rng.integers(-spread, spread + 1, (num_candidates, 2))
    seen = random_lists(rng, 6, num_candidates, 10)
    ids, scores = topk(
        DotProducts(torch.from_numpy(query).float(), torch.from_numpy(candidate).float()),
        k,
        jagged(seen),
        block_bytes=block_rows * num_candidates * 4,
    )
    for i, all_scores in enumerate(query @ candidate.T):
        left = [item for item in range(num_candidates) if item not in seen[i]]
        best = sorted(left, key=lambda item, s=all_scores: (-s[item], item))[:k]
        assert ids[i].tolist() == best + [-1] * (k - len(best))
        assert scores[i].tolist() == [all_scores[item] for item in best] + [-math.inf] * (k - len(best))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_queries=st.integers(0, 9),
    spread=st.integers(0, 3),
    block_bytes=st.sampled_from([1, 200, 1000, 2**28]),
)
def test_given_candidates_agree_with_brute_force(seed, num_queries, spread, block_bytes):
    rng = np.random.default_rng(seed)
    query = rng.integers(-spread, spread + 1, (num_queries, 3))
    candidate = rng.integers(-spread, spread + 1, (12, 3))
    positive = rng.integers(0, 12, num_queries)
    negatives = random_lists(rng, num_queries, 12, 30)
    plain = [name for name in METRICS if not name.startswith("coverage")]
    result = rank_candidates(
        DotProducts(torch.from_numpy(query).float(), torch.from_numpy(candidate).float()),
        positive,
        jagged(negatives),
        plain,
        block_bytes=block_bytes,
    )
    hits, lonely = [], 0
    for vector, item, others in zip(query, positive, negatives, strict=True):
        others = [other for other in others if other != item]  # duplicates stay
        lonely += not others
        ahead = sum(vector @ candidate[other] >= vector @ candidate[item] for other in others)
        hits.append([place == ahead for place in range(len(others) + 1)])
    expected = metrics_of_hits(hits, [1] * num_queries) | {
        "queries_without_relevant": 0,
        "queries_without_negatives": lonely,
        "ignored_negatives": sum(others.count(item) for item, others in zip(positive, negatives, strict=True)),
    }
    assert result == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("dim", [1, 3, 33, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_candidates_with_identical_vectors_tie(dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    vectors = torch.randn(5, dim, generator=generator, dtype=dtype)
    candidate = vectors[torch.arange(1000) % 5]
    query = vectors[:1].repeat(40, 1)
    copies = np.arange(0, 1000, 5)
    positive = copies[:40]
    negatives = jagged([np.setdiff1d(copies, positive[i])[: 150 + i] for i in range(40)])
    sums = candidate_sums(
        DotProducts(query, candidate), positive, negatives, ["recall@150", "mrr"], block_bytes=300 * dim * 8
    )
    assert sums.result()["recall@150"] == 0.0
    assert sums.result()["mrr"] == pytest.approx(np.mean(1 / (151 + np.arange(40))))
