"""Generated interactions: what is known of them is true."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedshard.data.synthetic import SyntheticSpec, generate, is_written, truth, write
from embedshard.errors import ConfigError, DataError

TINY = SyntheticSpec(users=300, items=240, interactions=2400, topics=6, max_per_user=15, history_length=4, seed=3)


@pytest.fixture(scope="module")
def data():
    return generate(TINY)


def test_a_seed_makes_the_same_data_and_another_seed_others(data):
    again, other = generate(TINY), generate(dataclasses.replace(TINY, seed=4))
    np.testing.assert_array_equal(data.items, again.items)
    assert not np.array_equal(data.items, other.items)


def test_a_seed_writes_the_same_files(data, tmp_path):
    for name in ("one", "two"):
        write(data if name == "one" else generate(TINY), tmp_path / name)
    for split in ("train", "validation", "test"):
        assert pq.read_table(tmp_path / "one" / split).equals(pq.read_table(tmp_path / "two" / split))
    assert (tmp_path / "one" / "truth.json").read_bytes() == (tmp_path / "two" / "truth.json").read_bytes()
    assert len(list((tmp_path / "one" / "train").iterdir())) == 4


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


def test_truth_counts_what_there_is(data):
    assert truth(data)["counts"] == {"train": 1800, "validation": 300, "test": 300, "users": 300, "items": 240}


@pytest.mark.parametrize("nth", [0, 1])
def test_draws_follow_the_probabilities(nth):
    spec = SyntheticSpec(users=20_000, items=240, interactions=100_000, topics=6, max_per_user=15, seed=1)
    data = generate(spec)
    chances_of = np.zeros((spec.users, spec.items))
    for slot, share in enumerate(data.shares):
        np.put_along_axis(chances_of, data.item_of[data.user_topics[:, slot]], share * data.within[None, :], axis=1)
    if nth:  # the second draw: the first is left out, and the others' probabilities grow
        first = data.items[data.offsets[:-1]][:, None]
        np.put_along_axis(chances_of, first, 0.0, axis=1)
        chances_of /= chances_of.sum(axis=1, keepdims=True)
    expected = chances_of.sum(axis=0)
    observed = np.bincount(data.items[data.offsets[:-1] + nth], minlength=spec.items)
    assert ((observed - expected) ** 2 / expected).sum() < 240 + 5 * np.sqrt(2 * 240), "chi squared"


def test_a_history_holds_only_training_items_met_before_the_row(data, tmp_path):
    write(data, tmp_path / "out")
    order = {
        (user, int(item)): place
        for user in range(300)
        for place, item in enumerate(data.items[data.offsets[user] : data.offsets[user + 1]])
    }
    rows = {split: pq.read_table(tmp_path / "out" / split).to_pylist() for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 1800, "validation": 300, "test": 300}
    pairs = [(row["user_id"], row["item_id"]) for part in rows.values() for row in part]
    assert sorted(pairs) == sorted(order), "every interaction is in one split, once"
    for split, part in rows.items():
        for row in part:
            user, place = row["user_id"], order[row["user_id"], row["item_id"]]
            mine = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
            assert place == {"validation": len(mine) - 2, "test": len(mine) - 1}.get(split, min(place, len(mine) - 3))
            assert row["history"] == mine[:-2][:place][-4:]
    users = [row["user_id"] for row in rows["train"]]
    assert users != sorted(users), "rows are not sorted by user"


def test_ids_say_nothing_of_popularity(data):
    ids, popularity = np.arange(240), np.bincount(data.items, minlength=240)
    assert abs(np.corrcoef(ids, popularity)[0, 1]) < 0.25


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_the_default_proportions_keep_their_promises(seed):
    spec = SyntheticSpec(users=10_000, items=5_000, interactions=100_000, topics=25, seed=seed)
    test = truth(generate(spec))["test"]
    reachable = test["reachable_recall@20"]
    assert 0.25 <= reachable <= 0.60
    assert test["popularity_recall@20"] <= 0.35 * reachable
    assert test["random_recall@20"] <= 0.05 * reachable


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"items": 241}, "multiple"),
        ({"interactions": 300}, "1.0 each"),
        ({"max_per_user": 21}, "half of the 40 items"),
        ({"users": 0}, "users=0 .* at least 1"),
        ({"seed": -1}, "seed=-1 .* at least 0"),
        ({"min_per_user": 2}, "at least 3"),
        ({"topics": 0}, "topics=0"),
        ({"topics_per_user": 4}, "half of topics=6"),
        ({"affinity": 1.0}, "between 0 and 1"),
        ({"item_exponent": float("nan")}, "item_exponent=nan"),
        ({"activity_exponent": -0.5}, "from 0 to 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("exponent", [0.0, 4.0])
@pytest.mark.parametrize("name", ["topic_exponent", "item_exponent", "activity_exponent"])
def test_the_steepest_and_the_flattest_laws_make_all_interactions(name, exponent):
    spec = dataclasses.replace(TINY, topics_per_user=3, **{name: exponent})
    assert len(generate(spec).items) == 2400


@pytest.fixture
def prepare():
    path = Path(__file__).parents[2] / "pipelines" / "synthetic" / "prepare.py"
    spec = importlib.util.spec_from_file_location("synthetic_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(data, folder):
    write(data, folder)
    (folder / "truth.json").unlink()
    raise KeyboardInterrupt


def test_prepare_leaves_all_or_nothing(prepare, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare.make(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    prepare.make(TINY, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "truth.json").read_text())["spec"]["seed"] == 3
    capsys.readouterr()
    prepare.make(TINY, tmp_path / "out")
    assert "holds them already" in capsys.readouterr().out


def test_prepare_replaces_data_of_another_spec_only_when_the_new_are_whole(prepare, tmp_path, monkeypatch):
    out, other = tmp_path / "out", dataclasses.replace(TINY, seed=4)
    prepare.make(TINY, out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare.make(other, out)
    assert is_written(TINY, out)
    prepare.make(other, out)
    assert is_written(other, out)
    assert list(tmp_path.iterdir()) == [out]


def test_prepare_makes_data_of_an_earlier_format_anew(prepare, tmp_path):
    prepare.make(TINY, tmp_path / "out")
    path = tmp_path / "out" / "truth.json"
    found = json.loads(path.read_text())
    del found["format"]
    path.write_text(json.dumps(found))
    prepare.make(TINY, tmp_path / "out")
    assert "format" in json.loads(path.read_text())


def test_a_folder_of_other_things_is_not_touched(prepare, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"truth\.json"):
        prepare.make(TINY, tmp_path)
    with pytest.raises(DataError, match="not empty"):
        write(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
