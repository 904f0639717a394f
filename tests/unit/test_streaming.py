"""Metrics of training rows from fixed sums, beside those of rows that are kept; slices and intervals of a set."""

import math

import numpy as np
import pytest
import torch

from embedshard.evaluate import label_rows
from embedshard.evaluate.label_metrics import LabelSums
from embedshard.evaluate.label_rows import LabelRows
from embedshard.evaluate.pointwise import PointwiseSums
from embedshard.evaluate.streaming import StreamingMetrics
from embedshard.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
METRICS = ["auc", "pr_auc", "log_loss", "normalised_entropy", "calibration", "accuracy"]


def some_rows(count, seed=0, labels=1):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, labels)) * 2 - 1
    chosen = (generator.random((count, labels)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weights = generator.integers(0, 3, count).astype(np.float32)
    return torch.from_numpy(logits).float(), torch.from_numpy(chosen), torch.from_numpy(weights)


def exact(rows, metrics=METRICS, link="sigmoid"):
    sums = PointwiseSums(metrics, link)
    sums.update(rows[0][:, 0], rows[1][:, 0], rows[2])
    return sums.result()


def test_a_window_and_the_run_are_what_kept_rows_give():
    first, second = some_rows(2000, 1), some_rows(3000, 2)
    streaming = StreamingMetrics(METRICS, ["click"], True, ALONE)
    for part in (slice(0, 700), slice(700, None)):
        streaming.update(*(column[part] for column in first))
    found = streaming.measure()
    expected = exact(first)
    assert list(found) == [f"{scope}/{name}" for scope in ("window", "run") for name in METRICS]
    for name in METRICS:
        tolerance = {"auc": 2e-4, "pr_auc": 1e-3}.get(name, 1e-6)
        assert found[f"window/{name}"] == pytest.approx(expected[name], abs=tolerance)
        assert found[f"run/{name}"] == found[f"window/{name}"]
    streaming.update(*second)
    found, both = streaming.measure(), exact([torch.cat(pair) for pair in zip(first, second, strict=True)])
    for name in METRICS:
        assert found[f"window/{name}"] == pytest.approx(exact(second)[name], abs=1e-3)
        assert found[f"run/{name}"] == pytest.approx(both[name], abs=1e-3)
    assert all(math.isnan(value) for name, value in streaming.measure().items() if name.startswith("window")), "no rows yet"


def test_the_order_of_adding_up_changes_nothing():
    rows = some_rows(900)
    whole, parts = (StreamingMetrics(METRICS, ["click"], True, ALONE) for _ in range(2))
    for streaming in (whole, parts):
        for begin in range(0, 900, 100):
            streaming.update(*(column[begin : begin + 100] for column in rows))
            if streaming is parts:
                streaming.gather()  # as a checkpoint does
    whole.gather()
    assert whole.window.equal(parts.window)
    resumed = StreamingMetrics(METRICS, ["click"], True, ALONE)
    resumed.load_state_dict(parts.state_dict())
    assert resumed.measure() == whole.measure()


def test_each_of_several_labels_has_its_own():
    rows = some_rows(500, labels=2)
    streaming = StreamingMetrics(["auc", "rmse"], ["click", "buy"], True, ALONE)
    streaming.update(*rows)
    found = streaming.measure()
    for place, label in enumerate(("click", "buy")):
        sums = PointwiseSums(["auc", "rmse"], "sigmoid")
        sums.update(rows[0][:, place], rows[1][:, place], rows[2])
        assert found[f"window/auc:{label}"] == pytest.approx(sums.result()["auc"], abs=1e-3)
        assert found[f"run/rmse:{label}"] == pytest.approx(sums.result()["rmse"])


def test_numbers_are_predicted_as_they_are_and_rows_without_weight_hold_anything():
    logits, labels = torch.tensor([[3.0], [5.0], [math.nan]]), torch.tensor([[4.0], [2.0], [math.inf]])
    streaming = StreamingMetrics(["rmse", "mae"], ["rating"], False, ALONE)
    streaming.update(logits, labels, torch.tensor([1.0, 1.0, 0.0]))
    assert streaming.measure()["run/rmse"] == pytest.approx(math.sqrt(5))
    streaming.update(logits, labels, torch.tensor([3.0, 1.0, 0.0]))
    assert streaming.measure()["window/mae"] == pytest.approx(6 / 4)


def within_users(rows, users, place=0):
    sums = PointwiseSums(["gauc"], "sigmoid")
    sums.update(rows[0][:, place], rows[1][:, place], rows[2], users)
    return sums.result()["gauc"]


def test_auc_within_users_is_exact_in_a_window_and_the_mean_of_windows_over_the_run():
    generator = np.random.default_rng(3)
    windows = [(some_rows(count, seed), torch.from_numpy(generator.integers(-1, 20, count)))
               for seed, count in ((1, 300), (2, 100))]  # fmt: skip
    streaming = StreamingMetrics(["auc", "gauc"], ["click"], True, ALONE, None, 300)
    found = []
    for rows, users in windows:
        for part in (slice(0, 40), slice(40, None)):
            streaming.update(*(column[part] for column in rows), users[part])
        found.append(streaming.measure())
    assert list(found[0]) == ["window/auc", "window/gauc", "run/auc", "run/gauc"]
    values, sizes = [within_users(*window) for window in windows], []
    for rows, users in windows:  # the rows of users who have both labels
        has = rows[2] > 0
        both = [user for user in users[has].unique().tolist() if user >= 0
                and len(rows[1][has & (users == user)].unique()) == 2]  # fmt: skip
        sizes.append(float(rows[2][torch.isin(users, torch.tensor(both))].sum()))
    assert [one["window/gauc"] for one in found] == pytest.approx(values, abs=1e-12)
    assert found[0]["run/gauc"] == found[0]["window/gauc"]
    assert found[1]["run/gauc"] == pytest.approx(np.average(values, weights=sizes), abs=1e-12)
    after = streaming.measure()
    assert math.isnan(after["window/gauc"])
    assert after["run/gauc"] == found[1]["run/gauc"]


def test_when_rows_are_gathered_changes_no_bit_of_auc_within_users():
    rows, users = some_rows(400, labels=2), torch.arange(400) % 9
    whole, parts = (StreamingMetrics(["gauc"], ["click", "buy"], True, ALONE, None, 400) for _ in range(2))
    whole.update(*rows, users)
    for begin in (200, 0, 300, 100):
        part = slice(begin, begin + 100)
        parts.update(*(column[part] for column in rows), users[part])
        parts.gather()
    resumed = StreamingMetrics(["gauc"], ["click", "buy"], True, ALONE, None, 400)
    resumed.load_state_dict(parts.state_dict())
    expected = whole.measure()
    assert resumed.measure() == expected
    assert expected["window/gauc:buy"] == pytest.approx(within_users(rows, users, 1), abs=1e-12)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(one.equal(other) for one, other in zip(resumed.within.buffers(), whole.within.buffers(), strict=True))


# ------------------------------------------------------------------------------------------------- slices and intervals
def kept(rows, metrics=METRICS, groups=None, labels=("click",)):
    whole = LabelRows(metrics, lambda: LabelSums(metrics, "sigmoid", labels))
    for part in (slice(0, 50), slice(50, None)):
        whole.update(rows[0][part], rows[1][part], rows[2][part], None if groups is None else groups[part])
    return whole


def test_slices_are_the_metrics_of_their_rows(monkeypatch):
    rows = some_rows(300)
    codes = np.random.default_rng(3).choice([-1, 0, 1, 2], 300, p=[0.1, 0.5, 0.3, 0.1])
    found = kept(rows).slices(codes, ["de", "fr", "it"])
    assert list(found)[:2] == ["de", "fr"], "most rows first"
    for value, code in (("de", 0), ("fr", 1), ("it", 2), ("null", -1)):
        expected = exact([column[codes == code] for column in rows])
        assert found[value] == pytest.approx(expected)
    monkeypatch.setattr(label_rows, "MOST_SLICES", 2)
    found = kept(rows).slices(codes, ["de", "fr", "it"])
    assert list(found) == ["de", "other"]
    assert found["other"] == pytest.approx(exact([column[codes != 0] for column in rows]))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["de", "null"], ["null", "de", '"null"']),
        (["other", '"null"'], ["null", '"other"', '""null""']),
        ([1, "1", "0"], ["null", "1", "0"]),
    ],
)
def test_no_two_slices_have_one_name_unless_they_are_one(values, names):
    """A column with nulls and the string `null` had one slice of two lost, its rows with it."""
    rows = some_rows(300)
    rows = (rows[0], rows[1], torch.ones(300))
    codes = np.random.default_rng(3).integers(-1, len(values), 300)
    found = kept(rows).slices(codes, values)
    assert set(found) == set(names)
    assert sum(part["rows"] for part in found.values()) == 300
    assert found["null"]["rows"] == (codes == -1).sum()


def test_what_is_called_other_is_not_the_others(monkeypatch):
    monkeypatch.setattr(label_rows, "MOST_SLICES", 2)
    rows = some_rows(300)
    rows = (rows[0], rows[1], torch.ones(300))
    codes = np.random.default_rng(3).choice([-1, 0, 1], 300, p=[0.2, 0.5, 0.3])
    found = kept(rows).slices(codes, ["other", "it"])
    assert {name: part["rows"] for name, part in found.items()} == {
        '"other"': (codes == 0).sum(), "other": (codes != 0).sum(),
    }  # fmt: skip


def test_several_labels_and_their_mean_have_slices_and_intervals():
    rows, labels = some_rows(400, labels=2), ("click", "buy")
    whole = kept(rows, ["auc", "log_loss"], labels=labels)
    codes = np.arange(400) % 2
    found = whole.slices(codes, ["a", "b"])
    for code, value in enumerate(("a", "b")):
        for place, label in enumerate(labels):
            sums = PointwiseSums(["auc", "log_loss"], "sigmoid")
            sums.update(*(column[codes == code][:, place] for column in rows[:2]), rows[2][codes == code])
            assert found[value][f"auc:{label}"] == sums.result()["auc"]
        assert found[value]["auc"] == pytest.approx((found[value]["auc:click"] + found[value]["auc:buy"]) / 2)
    intervals = whole.intervals(50, 3)
    assert list(intervals) == ["auc", "auc:click", "auc:buy", "log_loss", "log_loss:click", "log_loss:buy"]
    widths = {name: high - low for name, (low, high) in intervals.items()}
    assert 0 < widths["auc"] < max(widths["auc:click"], widths["auc:buy"]), "the labels are drawn apart"


def test_each_label_tells_how_many_groups_it_is_from():
    rows = some_rows(60, labels=2)
    rows[1][:, 1] = 0.0
    rows[1][:4, 1] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    sums = LabelSums(["gauc"], "sigmoid", ("click", "buy"))
    sums.update(rows[0], rows[1], torch.ones(60), torch.arange(60) // 4)
    found = sums.result()
    assert found["gauc_groups:buy"] == 1
    assert found["gauc_groups:click"] > 5
    assert found["rows"] == 60


def test_intervals_cover_what_other_samples_give():
    """Of 60 samples, the intervals of about 57 hold the value that a very large sample has."""
    truth = exact(some_rows(400_000, 99))
    covered = {name: 0 for name in ("auc", "log_loss", "calibration")}
    for seed in range(60):
        intervals = kept(some_rows(400, seed), list(covered)).intervals(100, seed)
        for name in covered:
            low, high = intervals[name]
            assert low < high
            covered[name] += low <= truth[name] <= high
    assert all(50 <= count <= 60 for count in covered.values()), covered


def test_intervals_are_the_same_each_time_and_leave_out_what_has_no_value():
    rows = some_rows(200)
    groups = torch.from_numpy(np.random.default_rng(0).integers(0, 20, 200))
    first = kept(rows, ["gauc", "auc"], groups).intervals(20, 3)
    assert first == kept(rows, ["gauc", "auc"], groups).intervals(20, 3)
    assert first != kept(rows, ["gauc", "auc"], groups).intervals(20, 4)
    only = (rows[0], torch.ones_like(rows[1]), rows[2])
    assert list(kept(only, ["auc", "log_loss"]).intervals(20, 3)) == ["log_loss"]
