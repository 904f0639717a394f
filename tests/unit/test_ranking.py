"""Metric names, and metrics from positions against a reference that walks down the list."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from embedshard.config import Metric, parse_metric
from embedshard.errors import ConfigError
from embedshard.evaluate.ranking import UNRANKED, higher_is_better, largest_k, metric_values

NAMES = ("recall", "precision", "ndcg", "hit_rate", "map")


def walk(name: str, k: int, positions: list[int]) -> float:
    """The metric of one query, by its definition, walking down a list of hits and misses."""
    if not positions:
        return math.nan
    n = len(positions)
    hits = [place + 1 in positions for place in range(k)]
    if name == "recall":
        return sum(hits) / n
    if name == "precision":
        return sum(hits) / k
    if name == "hit_rate":
        return float(any(hits))
    if name == "ndcg":
        ideal = sum(1 / math.log2(place + 2) for place in range(min(n, k)))
        return sum(1 / math.log2(place + 2) for place in range(k) if hits[place]) / ideal
    assert name == "map"
    return sum(sum(hits[: place + 1]) / (place + 1) for place in range(k) if hits[place]) / min(n, k)


position_lists = st.lists(
    st.lists(st.integers(1, 30), max_size=12, unique=True).flatmap(
        lambda found: st.integers(0, 3).map(lambda lost: found + [UNRANKED] * lost)
    ),
    max_size=8,
)


@pytest.mark.parametrize("name", NAMES)
@given(lists=position_lists, k=st.integers(1, 40))
def test_a_metric_equals_its_definition(name, lists, k):
    positions = np.array([p for one in lists for p in one], dtype=np.int64)
    offsets = np.cumsum([0] + [len(one) for one in lists])
    expected = [walk(name, k, one) for one in lists]
    np.testing.assert_allclose(metric_values(Metric(name, k), positions, offsets), expected, rtol=1e-12)


@given(lists=position_lists)
def test_mrr_is_one_over_the_best_position(lists):
    positions = np.array([p for one in lists for p in one], dtype=np.int64)
    offsets = np.cumsum([0] + [len(one) for one in lists])
    best = [min(one) if one else None for one in lists]
    expected = [math.nan if b is None else 0.0 if b == UNRANKED else 1 / b for b in best]
    np.testing.assert_array_equal(metric_values(Metric("mrr"), positions, offsets), expected)


def test_ndcg_and_map_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = rng.random(15) < 0.3
        labels[rng.integers(15)] = True
        scores = rng.permutation(15)
        positions = (15 - scores)[labels].astype(np.int64)
        offsets = np.array([0, len(positions)])
        for k in (1, 5, 15, 40):
            ours = metric_values(Metric("ndcg", k), positions, offsets)[0]
            assert ours == pytest.approx(ndcg_score([labels], [scores], k=k))
        ours = metric_values(Metric("map", 15), positions, offsets)[0]
        assert ours == pytest.approx(average_precision_score(labels, scores))


def test_no_query_gives_no_value():
    empty = np.empty(0, dtype=np.int64)
    for name in (*NAMES, "mrr"):
        metric = Metric(name, None if name == "mrr" else 3)
        assert metric_values(metric, empty, np.zeros(1, np.int64)).shape == (0,)
        assert np.isnan(metric_values(metric, empty, np.zeros(3, np.int64))).all()


@pytest.mark.parametrize("text", ["recall@20", "precision@1", "ndcg@100", "hit_rate@10", "map@7", "coverage@5", "mrr"])
def test_a_name_is_read_and_written_back(text):
    assert str(parse_metric(text)) == text
    assert not parse_metric(text).is_pointwise
    assert higher_is_better(text)


def test_pointwise_metrics_know_their_direction():
    assert [higher_is_better(name) for name in ("rmse", "mae", "log_loss", "auc")] == [False, False, False, True]
    assert parse_metric("rmse") == Metric("rmse")
    assert parse_metric("rmse").is_pointwise


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recal@20", "Did you mean 'recall@20'"),
        ("hitrate@5", "Did you mean 'hit_rate@5'"),
        ("ndgc", "Did you mean 'ndcg@20'"),
        ("logloss", "Did you mean 'log_loss'"),
        ("MRR", "Known names|Did you mean"),
        ("", "Known names"),
        ("@", "Known names"),
        ("recall", r"Write 'recall@20'"),
        ("recall@", "not a whole number"),
        ("recall@0", "'0' is not a whole number"),
        ("recall@-1", "not a whole number"),
        ("recall@2.5", "not a whole number"),
        ("recall@10@20", "not a whole number"),
        ("recall@ 5", "not a whole number"),
        ("recall@5\n", "not a whole number"),
        ("recall@٣", "not a whole number"),
        ("mrr@10", "takes no k"),
        ("auc@5", "takes no k"),
    ],
)
def test_a_wrong_name_is_refused_with_advice(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_metric(text)


def test_largest_k():
    assert largest_k([Metric("recall", 20), Metric("mrr"), Metric("ndcg", 50)]) == 50
    assert largest_k([Metric("mrr")]) == 1
