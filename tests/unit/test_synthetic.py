"""Generated interactions: what is known of them is true."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedshard.data.synthetic import SyntheticSpec, generate, truth, write
from embedshard.errors import ConfigError

TINY = SyntheticSpec(users=300, items=240, interactions=2400, topics=6, max_per_user=15, history_length=4, seed=3)


@pytest.fixture(scope="module")
def data():
    return generate(TINY)


def test_a_seed_makes_the_same_data_and_another_seed_others(data):
    again, other = generate(TINY), generate(SyntheticSpec(**{**TINY.__dict__, "seed": 4}))
    np.testing.assert_array_equal(data.items, again.items)
    assert not np.array_equal(data.items, other.items)


def test_counts_are_as_asked_for_and_no_user_meets_an_item_twice(data):
    assert len(data.items) == 2400
    lengths = np.diff(data.offsets)
    assert lengths.min() >= 5
    assert lengths.max() <= 15
    for user in range(300):
        mine = data.items[data.offsets[user] : data.offsets[user + 1]]
        assert len(set(mine.tolist())) == len(mine)


def chances(data):
    matrix = np.zeros((TINY.users, TINY.items))
    for user in range(TINY.users):
        for topic, share in zip(data.user_topics[user], data.shares, strict=True):
            matrix[user, data.item_of[topic]] += share * data.within
    return matrix


def brute_force(data, scores, place):
    hits = 0
    for user in range(TINY.users):
        begin, end = data.offsets[user], data.offsets[user + 1]
        target, met = data.items[end + place], data.items[begin : end + place]
        mine = scores[user].copy()
        own = mine[target]
        mine[met] = -1
        mine[target] = -1
        hits += (mine >= own).sum() < 20
    return hits / TINY.users


def test_what_is_reachable_equals_a_loop_over_all_items(data):
    found = truth(data)
    matrix = chances(data)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    train = np.concatenate([data.items[a : b - 2] for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)])
    popularity = np.tile(np.bincount(train, minlength=TINY.items).astype(float), (TINY.users, 1))
    for split, place in (("validation", -2), ("test", -1)):
        assert found[split]["reachable_recall@20"] == pytest.approx(brute_force(data, matrix, place))
        assert found[split]["popularity_recall@20"] == pytest.approx(brute_force(data, popularity, place))


def test_draws_follow_the_probabilities():
    spec = SyntheticSpec(users=20_000, items=240, interactions=100_000, topics=6, max_per_user=15, seed=1)
    data = generate(spec)
    first = data.items[data.offsets[:-1]]  # nothing is left out of a user's first draw
    expected = np.zeros(240)
    for topic_place, share in enumerate(data.shares):
        counts = np.bincount(data.user_topics[:, topic_place], minlength=6)
        for topic in range(6):
            expected[data.item_of[topic]] += share * counts[topic] * data.within
    observed = np.bincount(first, minlength=240)
    assert ((observed - expected) ** 2 / expected).sum() < 240 + 5 * np.sqrt(2 * 240), "chi squared"


def test_a_history_is_what_was_met_before_the_row(data, tmp_path):
    write(data, tmp_path / "out")
    order = {
        (user, int(item)): place
        for user in range(300)
        for place, item in enumerate(data.items[data.offsets[user] : data.offsets[user + 1]])
    }
    rows = {split: pq.read_table(tmp_path / "out" / split).to_pylist() for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 1800, "validation": 300, "test": 300}
    pairs = [(row["user_id"], row["item_id"]) for part in rows.values() for row in part]
    assert sorted(pairs) == sorted(order)
    for part in rows.values():
        for row in part:
            user, place = row["user_id"], order[row["user_id"], row["item_id"]]
            mine = data.items[data.offsets[user] : data.offsets[user] + place].tolist()
            assert row["history"] == mine[-4:]
    users = [row["user_id"] for row in rows["train"]]
    assert users != sorted(users), "rows are not sorted by user"


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_the_default_proportions_keep_their_promises(seed):
    spec = SyntheticSpec(users=10_000, items=5_000, interactions=100_000, topics=50, seed=seed)
    test = truth(generate(spec))["test"]
    reachable = test["reachable_recall@20"]
    assert 0.25 <= reachable <= 0.60
    assert test["popularity_recall@20"] <= 0.35 * reachable
    assert test["random_recall@20"] <= 0.05 * reachable


@pytest.mark.parametrize(
    ("changes", "words"), [({"items": 241}, "multiple"), ({"interactions": 300}, "1.0 each"), ({"max_per_user": 21}, "half")]
)
def test_numbers_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        SyntheticSpec(**{**TINY.__dict__, **changes})


def test_prepare_leaves_all_or_nothing(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "pipelines" / "synthetic" / "prepare.py"
    spec = importlib.util.spec_from_file_location("synthetic_prepare", path)
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)

    def broken(data, folder):
        write(data, folder)
        (folder / "truth.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare.make(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(prepare, "write", write)
    prepare.make(TINY, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "truth.json").read_text())["spec"]["seed"] == 3
    capsys.readouterr()
    prepare.make(TINY, tmp_path / "out")
    assert "holds them already" in capsys.readouterr().out
