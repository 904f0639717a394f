"""Pointwise metrics against pair-by-pair references and scikit-learn."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from embedshard.errors import ConfigError, DataError, TrainingError
from embedshard.evaluate.discrimination import average_precision, grouped_auc, weighted_auc
from embedshard.evaluate.pointwise import PointwiseSums

ALL = ["rmse", "mae", "log_loss", "auc", "pr_auc", "normalised_entropy", "calibration"]


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


@given(rows=rows, groups=st.lists(st.integers(-1, 3), min_size=40, max_size=40))
def test_grouped_auc_is_the_weighted_mean_over_groups_with_both_classes(rows, groups):
    scores, labels, weights = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    groups = np.array(groups[: len(rows)])
    total = weight = 0.0
    known = 0
    for group in range(4):
        of = groups == group
        auc = weighted_auc(scores[of], labels[of] == 1, weights[of]) if of.any() else math.nan
        if not math.isnan(auc):
            total, weight, known = total + auc * weights[of].sum(), weight + weights[of].sum(), known + 1
    found, count = grouped_auc(scores, labels == 1, weights, groups)
    assert count == known
    assert found == pytest.approx(total / weight) if known else math.isnan(found)
    sums = PointwiseSums(["gauc"], "sigmoid")
    for part in (slice(0, len(rows) // 2), slice(len(rows) // 2, None)):
        sums.update(scores[part], labels[part], weights[part], groups[part])
    result = sums.result()
    assert result["gauc"] == pytest.approx(found, nan_ok=True)
    assert result.get("gauc_groups", 0) == known


def test_average_precision_by_hand():
    scores, labels = np.array([3.0, 2.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    # Thresholds 3, 2, 1: precision 1/1, 2/3, 3/4; recall grows by a third each time.
    assert average_precision(scores, labels == 1, np.ones(4)) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    weighted = average_precision(scores, labels == 1, np.array([1.0, 2.0, 1.0, 2.0]))
    assert weighted == pytest.approx((1 * 1 + 1 * 2 / 4 + 2 * 4 / 6) / 4)
    assert math.isnan(average_precision(scores, np.zeros(4, dtype=bool), np.ones(4)))


def test_normalised_entropy_and_calibration_by_hand():
    logits, labels = np.log(np.array([3.0, 1.0, 1 / 3, 1 / 9])), np.array([1.0, 0.0, 0.0, 1.0])
    weights = np.array([1.0, 2.0, 1.0, 0.0])
    result = sums_of(logits, labels, weights, metrics=["normalised_entropy", "calibration", "log_loss"], cuts=(2,)).result()
    losses = -np.log(np.array([0.75, 0.5, 0.5, 0.75]))
    nothing = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert result["log_loss"] == pytest.approx(losses.mean())
    assert result["normalised_entropy"] == pytest.approx(losses.mean() / nothing)
    assert result["calibration"] == pytest.approx((0.75 + 2 * 0.5 + 0.25) / 1.0)
    constant = sums_of(
        np.full(4, math.log(1 / 3)), np.array([1.0, 0.0, 0.0, 0.0]), metrics=["normalised_entropy", "calibration"]
    )
    assert constant.result() == {"normalised_entropy": pytest.approx(1.0), "calibration": pytest.approx(1.0), "rows": 4}


def test_normalised_entropy_and_calibration_are_torchrecs():
    from torchrec.metrics.calibration import compute_calibration
    from torchrec.metrics.ne import compute_ne, get_ne_states

    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=300), (rng.random(300) < 0.2).astype(float), rng.random(300)
    result = sums_of(logits, labels, weights, metrics=["normalised_entropy", "calibration"], cuts=(100,)).result()
    tensors = [torch.from_numpy(array) for array in (labels, 1 / (1 + np.exp(-logits)), weights)]
    states = get_ne_states(*tensors, eta=1e-12)
    theirs = compute_ne(
        *(states[name] for name in ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")), 1e-12
    )
    assert result["normalised_entropy"] == pytest.approx(theirs.item())
    shown = compute_calibration((tensors[2] * tensors[1]).sum(), (tensors[2] * tensors[0]).sum())
    assert result["calibration"] == pytest.approx(shown.item())


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
    assert result["pr_auc"] == pytest.approx(average_precision_score(labels, logits, sample_weight=weights))
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
        (["pr_auc"], 2.0, "label is 2; pr_auc needs labels that are 0 or 1"),
        (["calibration"], 2.0, r"label is 2; calibration needs labels that are in \[0, 1\]"),
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
