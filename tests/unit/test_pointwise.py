"""Pointwise metrics against pair-by-pair references and scikit-learn."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from embedshard.errors import ConfigError, DataError, TrainingError
from embedshard.evaluate.pointwise import PointwiseSums, weighted_auc

ALL = ["rmse", "mae", "log_loss", "auc"]


def sums_of(logits, labels, weights=None, *, metrics=ALL, link="sigmoid", cuts=()):
    """One result from batches that are cut at `cuts`."""
    sums = PointwiseSums(metrics, link)
    edges = [0, *cuts, len(logits)]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        sums.update(logits[part], labels[part], None if weights is None else weights[part])
    return sums


rows = st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40)


@given(rows=rows)
def test_auc_counts_every_pair_and_ties_half(rows):
    scores, labels, weights = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    won = pairs = 0.0
    for score, label, weight in rows:
        for other, other_label, other_weight in rows:
            if label and not other_label:
                pairs += weight * other_weight
                won += weight * other_weight * ((score > other) + 0.5 * (score == other))
    result = weighted_auc(scores, labels == 1, weights)
    streamed = sums_of(scores, labels, weights, metrics=["auc"], cuts=(len(rows) // 3,)).result()["auc"]
    if pairs == 0:
        assert math.isnan(result)
        assert math.isnan(streamed)
    else:
        assert result == pytest.approx(won / pairs)
        assert streamed == pytest.approx(won / pairs)


@pytest.mark.parametrize("seed", range(5))
def test_all_metrics_agree_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-6, 7, 500) / 2
    labels = (rng.random(500) < 0.3).astype(np.float64)
    weights = rng.integers(0, 4, 500) / 2
    chance = 1 / (1 + np.exp(-logits))
    result = sums_of(logits, labels, weights, cuts=(7, 8, 8, 300)).result()
    assert result["rmse"] == pytest.approx(math.sqrt(mean_squared_error(labels, chance, sample_weight=weights)))
    assert result["mae"] == pytest.approx(mean_absolute_error(labels, chance, sample_weight=weights))
    assert result["log_loss"] == pytest.approx(log_loss(labels, chance, sample_weight=weights))
    assert result["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights))
    assert result["rows"] == (weights > 0).sum()


def test_ratings_are_compared_with_logits_as_they_are():
    result = sums_of(np.array([3.0, 5.0]), np.array([4.0, 2.0]), metrics=["rmse", "mae"], link="identity").result()
    assert result == {"rmse": pytest.approx(math.sqrt(5)), "mae": 2.0, "rows": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_any_precision_are_taken(dtype):
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
    result = sums_of(logits, torch.tensor([1, 0, 0]), torch.tensor([1.0, 1.0, 0.0])).result()
    assert result["auc"] == 1.0
    assert result["log_loss"] == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.0))) / 2)


@pytest.mark.parametrize("link", ["identity", "sigmoid"])
def test_rows_of_weight_0_do_not_exist(link):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=50), (rng.random(50) < 0.5).astype(float)
    weights = rng.integers(0, 3, 50).astype(float)
    spoilt_logits, spoilt_labels = logits.copy(), labels.copy()
    spoilt_logits[weights == 0], spoilt_labels[weights == 0] = np.nan, 17.0
    spoilt = sums_of(spoilt_logits, spoilt_labels, weights, link=link).result()
    assert spoilt == sums_of(logits, labels, weights, link=link).result()


def test_parts_of_several_workers_add_up():
    rng = np.random.default_rng(1)
    logits, labels = rng.integers(-3, 4, 90).astype(np.float32), (rng.random(90) < 0.5).astype(float)
    whole = sums_of(logits, labels).result()
    parts = [sums_of(logits[i::4], labels[i::4]) for i in (2, 0, 3, 1)]
    total = PointwiseSums(ALL, "sigmoid")
    for part in parts:
        total.add(pickle.loads(pickle.dumps(part)))
    assert total.result() == pytest.approx(whole)
    assert total.num_rows == 90


def test_log_loss_is_stable_far_out():
    def cost(logit, label):
        return sums_of(np.array([logit]), np.array([label]), metrics=["log_loss"]).result()["log_loss"]

    assert cost(1000.0, 0.0) == 1000.0
    assert cost(-1000.0, 1.0) == 1000.0
    assert cost(1000.0, 1.0) == 0.0
    assert cost(-40.0, 0.0) == pytest.approx(math.exp(-40), rel=1e-9)
    assert cost(0.0, 0.3) == pytest.approx(math.log(2))
    assert cost(np.inf, 1.0) == 0.0
    assert cost(-np.inf, 0.0) == 0.0
    assert cost(np.inf, 0.0) == np.inf
    assert cost(np.inf, 0.5) == np.inf


def test_soft_labels_have_a_log_loss():
    logits, labels = np.array([0.7, -0.2, 1.5]), np.array([0.25, 0.5, 1.0])
    chance = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(chance) + (1 - labels) * np.log(1 - chance))
    assert sums_of(logits, labels, metrics=["log_loss"]).result()["log_loss"] == pytest.approx(expected)


def test_values_without_a_meaning_are_nan():
    for label in (0.0, 1.0):
        result = sums_of(np.array([1.0, 2.0]), np.full(2, label)).result()
        assert math.isnan(result["auc"])
        assert math.isfinite(result["log_loss"])
    nothing = sums_of(np.array([1.0]), np.array([1.0]), np.array([0.0])).result()
    assert all(math.isnan(nothing[name]) for name in ALL)
    assert nothing["rows"] == 0


@pytest.mark.parametrize(
    ("metrics", "label", "says"),
    [
        (["log_loss"], 5.0, r"label is 5; log_loss needs labels that are in \[0, 1\]"),
        (["log_loss"], -0.5, "label is -0.5"),
        (["log_loss"], math.nan, "label is nan"),
        (["auc"], 0.5, "label is 0.5; auc needs labels that are 0 or 1"),
        (["rmse"], math.nan, "label is nan"),
        (["mae"], math.inf, "label is inf"),
    ],
)
def test_a_label_that_a_metric_can_not_use_is_named(metrics, label, says):
    with pytest.raises(DataError, match=says):
        sums_of(np.array([0.0, 0.0]), np.array([1.0, label]), metrics=metrics)


def test_bad_predictions_weights_and_names_are_refused():
    with pytest.raises(TrainingError, match="1 of 2 predictions are nan"):
        sums_of(np.array([0.0, np.nan]), np.array([0.0, 1.0]))
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=f"weight is {weight}"):
            sums_of(np.array([0.0]), np.array([0.0]), np.array([weight]))
    with pytest.raises(ConfigError, match="Did you mean 'rmse'"):
        PointwiseSums(["rmsee"])
