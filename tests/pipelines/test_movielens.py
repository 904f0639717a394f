"""The MovieLens pipeline: the split, the official files' format, and the config over real data."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands import run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("movielens_prepare", ROOT / "pipelines" / "movielens" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_source(folder, users=6, items=150):
    generator = np.random.default_rng(0)
    rows = [
        (user, int(item), place)
        for user in range(users)
        for place, item in enumerate(generator.permutation(items)[: 5 + user])
    ]
    order = generator.permutation(len(rows))
    columns = list(zip(*(rows[i] for i in order), strict=True))
    folder.mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(("user_id", "item_id", "seq_pos"), columns, strict=True))), folder / "train.parquet")
    test = pa.table({"user_id": [0, 1], "item_id": [149, 148], "negatives": [[1, 2], [3, 4]]})
    pq.write_table(test, folder / "test.parquet")
    return rows


def test_the_validation_set_is_each_users_last_training_row(prepare, tmp_path, monkeypatch):
    rows = tiny_source(tmp_path / "source")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")])
    prepare.main()
    train, validation = (pq.read_table(tmp_path / "out" / part).to_pylist() for part in ("train", "validation"))
    assert len(train) + len(validation) == len(rows)
    for row in validation:
        mine = [(place, item) for user, item, place in rows if user == row["user_id"]]
        assert row["item_id"] == max(mine)[1]
        assert len(set(row["negatives"])) == 99
        assert not set(row["negatives"]) & {item for _, item in mine}
    assert {(row["user_id"], row["item_id"]) for row in train}.isdisjoint(
        (row["user_id"], row["item_id"]) for row in validation
    )
    assert pq.read_table(tmp_path / "out" / "test").num_rows == 2


def test_the_official_files_are_read(prepare, tmp_path):
    (tmp_path / "ml-1m.train.rating").write_text("0\t32\t4\t978824330\n0\t34\t4\t978824331\n1\t4\t5\t978300174\n")
    (tmp_path / "ml-1m.test.negative").write_text("(0,25)\t1064\t174\t2791\n(1,133)\t1072\t3154\t3368\n")
    train, test = prepare.read_official(tmp_path / "ml-1m.train.rating", tmp_path / "ml-1m.test.negative")
    assert train.to_pylist()[1] == {"user_id": 0, "item_id": 34, "time": 978824331}
    assert test.to_pylist()[1] == {"user_id": 1, "item_id": 133, "negatives": [1072, 3154, 3368]}


def test_ratings_are_split_by_the_stated_permutation(prepare, tmp_path, monkeypatch):
    columns = {"user_id": range(100), "movie_id": range(100), "rating": [place % 5 + 1 for place in range(100)]}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "ratings.parquet")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", str(tmp_path), "--out", str(tmp_path / "out")])
    prepare.main()
    users = {part: pq.read_table(tmp_path / "out" / part)["user_id"].to_pylist() for part in ("train", "validation", "test")}
    order = np.random.default_rng(0).permutation(100).tolist()
    assert users["test"] == order[90:]
    assert users["train"] + users["validation"] == order[:90]
    assert len(users["validation"]) == 4


def test_the_official_archive_is_read_in_file_order(prepare, tmp_path):
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n2::1357::5::978298709\n")
        archive.writestr(
            "ml-1m/movies.dat",
            "3::Grumpier Old Men (1995)::Comedy|Romance\n73::Misérables, Les (1995)::Drama\n".encode("latin-1"),
        )
    read = prepare.read_archive(tmp_path / "ml-1m.zip").to_pylist()
    assert read[1] == {"user_id": 1, "movie_id": 661, "rating": 3, "time": 978302109}
    assert prepare.read_movies(None, tmp_path).to_pylist() == [
        {"movie_id": 3, "title": "Grumpier Old Men (1995)", "genres": ["Comedy", "Romance"]},
        {"movie_id": 73, "title": "Misérables, Les (1995)", "genres": ["Drama"]},
    ]
    histories = prepare.prepare("histories", None, tmp_path)["train"]
    assert histories.to_pylist() == [{"user_id": 1, "movies": [1193, 661]}, {"user_id": 2, "movies": [1357]}]


def test_histories_are_the_movies_of_a_user_in_order_of_time(prepare, tmp_path, monkeypatch):
    rows = [(7, 30, 1), (2, 10, 2), (7, 20, 0), (2, 11, 0), (2, 12, 1), (9, 30, 0)]
    columns = dict(zip(("user_id", "movie_id", "seq_pos"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table({**columns, "rating": [1] * len(rows)}), tmp_path / "ratings.parquet")
    movies = pa.table({"movie_id": [10, 11], "title": ["a", "b"], "genres": [["x"], []]})
    pq.write_table(movies, tmp_path / "movies.parquet")
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path / "data"))
    for protocol in ("ratings", "histories"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", str(tmp_path), "--protocol", protocol])
        prepare.main()
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", str(tmp_path), "--protocol", "next"])
    with pytest.raises(SystemExit, match="no movie has 5 ratings"):
        prepare.main()
    written = tmp_path / "data" / "movielens" / "histories"
    assert pq.read_table(written / "train").to_pylist() == [
        {"user_id": 2, "movies": [11, 12, 10]}, {"user_id": 7, "movies": [20, 30]}, {"user_id": 9, "movies": [30]},
    ]  # fmt: skip
    assert pq.read_table(written / "movies.parquet").equals(movies)
    assert (tmp_path / "data" / "movielens" / "ratings" / "train").is_dir(), "the source is for both"
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", str(tmp_path), "--out", str(tmp_path / "one")])
    with pytest.raises(SystemExit, match="--out is one folder, for one of ratings, histories"):
        prepare.main()


def test_a_source_that_is_not_there_is_said_without_a_traceback(tmp_path):
    shown = subprocess.run(
        [sys.executable, str(ROOT / "pipelines/movielens/prepare.py"), "--source", str(tmp_path / "no")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert str(tmp_path / "no") in shown.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ncf_reaches_its_floor_on_real_data(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    run_pipeline(data_set("ncf-ml-1m"), "ncf", tmp_path, [])
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["hit_rate@10"] >= 0.715
    assert metrics["ndcg@10"] >= 0.440


def test_a_short_ncf_run_on_real_data_beats_popularity(data_set, tmp_path, monkeypatch):
    source = data_set("ncf-ml-1m")
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    run_pipeline(source, "ncf", tmp_path, ["--set", "train.max_steps=240"])
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["hit_rate@10"] > 0.4538, "TopPopular, measured on the same files"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ratings_reach_their_floor_on_real_data(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    run_pipeline(data_set("ml-1m"), "ratings", tmp_path, [])
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["rmse"] <= 0.850
    assert metrics["mae"] <= 0.668


def test_a_short_ratings_run_on_real_data_beats_the_biases(data_set, tmp_path, monkeypatch):
    source = data_set("ml-1m")
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    run_pipeline(source, "ratings", tmp_path, ["--set", "train.epochs=3", "--set", "optimizer.tables.lr=0.1"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for metric in ("rmse", "mae"):
        assert result["metrics"][metric] < result["baselines"]["bias"][metric] < result["baselines"]["mean"][metric]


def run_pipeline(source, name, tmp_path, overrides):
    for command in (
        ["pipelines/movielens/prepare.py", "--source", str(source)],
        [
            "-m",
            "embedshard.cli",
            "train",
            f"pipelines/movielens/{name}.yaml",
            "--run-dir",
            str(tmp_path / "run"),
            *overrides,
        ],
    ):
        done = run_python(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def attribute_source(folder):
    ratings = {
        "user_id": [1, 1, 2, 2, 2],
        "movie_id": [10, 20, 10, 30, 20],
        "rating": [5, 3, 1, 4, 2],
        "seq_pos": [0, 1, 0, 1, 2],
    }
    pq.write_table(pa.table(ratings), folder / "ratings.parquet")
    users = {"user_id": [2, 1], "gender": ["M", "F"], "age": [25, 1], "occupation": [3, 4], "zip": ["12345", "00001"]}
    pq.write_table(pa.table(users), folder / "users.parquet")
    movies = {"movie_id": [10, 20, 30], "title": ["A", "B", "C"], "genres": [["Drama"], ["War", "Drama"], []]}
    pq.write_table(pa.table(movies), folder / "movies.parquet")


def test_likes_have_the_users_and_the_movies_attributes(prepare, tmp_path):
    attribute_source(tmp_path)
    sets = prepare.prepare("ctr", tmp_path, tmp_path)
    rows = sorted(
        (row for table in sets.values() for row in table.to_pylist()), key=lambda row: (row["user_id"], row["movie_id"])
    )
    first = {
        "user_id": 1,
        "movie_id": 10,
        "gender": "F",
        "age": 1,
        "occupation": 4,
        "zip": "00001",
        "genres": ["Drama"],
        "liked": 1,
    }
    assert rows[0] == first
    assert [(row["user_id"], row["movie_id"], row["liked"]) for row in rows[1:]] == [(2, 10, 0), (2, 20, 0), (2, 30, 1)]
    assert [table.num_rows for table in sets.values()] == [3, 0, 1]


def test_what_comes_next_is_held_out_from_the_end(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FEWEST_RATINGS", 2)
    monkeypatch.setattr(prepare, "NUM_RANDOM", 2)
    # Movies 10 to 80 are rated twice or more, movie 99 once: it is no item. Times are not in file order.
    rows = [(7, 10, 1), (7, 99, 0), (7, 20, 2), (7, 30, 4), (7, 40, 3), (7, 50, 5)]
    rows += [(8, movie, 100 - movie) for movie in range(30, 90, 10)] + [(9, movie, movie) for movie in (60, 70, 80, 10, 20)]
    ratings = pa.table(dict(zip(("user_id", "movie_id", "seq_pos"), zip(*rows, strict=True), strict=True)))
    sets = prepare.next_items(ratings, "seq_pos", "seq_pos")
    movies = [10, 20, 30, 40, 50, 60, 70, 80]
    raw = {
        name: [[movies[place] for place in [*row["history"], row["item_id"]]] for row in table.to_pylist()]
        for name, table in sets.items()
    }
    assert raw["test"][0] == [10, 20, 40, 30, 50]
    assert raw["validation"][0] == [10, 20, 40, 30]
    assert raw["train"] == [[10, 20, 40], [80, 70, 60, 50], [10, 20, 60]]
    for name in ("validation", "test"):
        for row, met in zip(sets[name].to_pylist(), raw["test"], strict=True):
            assert not {movies[place] for place in row["negatives"]} & set(met)
    titles = pa.table({"movie_id": [*movies, 99], "title": list("abcdefghx"), "genres": [[]] * 9})
    assert prepare.numbered(titles, sets)["title"].to_pylist() == list("abcdefgh")


def test_long_lists_are_trained_in_pieces_and_each_rating_is_told_once(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "FEWEST_RATINGS", 1)
    monkeypatch.setattr(prepare, "NUM_RANDOM", 2)
    monkeypatch.setattr(prepare, "LONGEST", 3)
    # Users 1 to 9 rate 4 to 12 of 23 movies, so that 2 to 10 are left to train.
    rows = [(user, (7 * user + 3 * place) % 23, place) for user in range(1, 10) for place in range(user + 3)]
    rows += [(10, movie, movie) for movie in range(20)] + [(11, movie, movie) for movie in range(19, 23)]
    ratings = pa.table(dict(zip(("user_id", "movie_id", "seq_pos"), zip(*rows, strict=True), strict=True)))
    sets = prepare.next_items(ratings, "seq_pos", "seq_pos")
    train = sets["train"].to_pylist()
    assert [row for row in train if row["user_id"] == 10] == [
        {"user_id": 10, "history": list(range(max(0, end - 3), end)), "item_id": end} for end in (17, 14, 11, 8, 5, 2)
    ]
    for user in range(1, 10):
        met = [movie for of, movie, _ in rows if of == user]
        mine = [row for row in train if row["user_id"] == user]
        assert mine[0]["item_id"] == met[-3]
        told = [movie for row in reversed(mine) for movie in [*row["history"][1:], row["item_id"]]]
        assert told == met[1:-2]
        assert [sets[name]["history"][user - 1].as_py() for name in ("validation", "test")] == [met[:-2], met[:-1]]


def test_ratings_of_the_same_second_are_put_in_a_drawn_order(prepare):
    nan = float("nan")
    # User 0's second 5 ends with the user: rows after the latest known time are of it. User 1's rows between two of second 3
    # are of it, and the one before, whose time is not known, keeps its place.
    times = [1, nan, 5, nan, nan, nan, nan, 3, nan, nan, 3, 4]
    users, places = np.repeat([0, 1], 6), np.tile(np.arange(6), 2)
    shuffled = np.random.default_rng(1).permutation(12)
    seconds = prepare.seconds_of(users[shuffled], places[shuffled], np.array(times)[shuffled])
    assert seconds[np.argsort(shuffled)].tolist()[1:6:4] == [pytest.approx(nan, nan_ok=True), 5]
    order = shuffled[prepare.chronological(users[shuffled], places[shuffled], seconds)]
    assert order[:2].tolist() == [0, 1]
    assert set(order[2:6].tolist()) == {2, 3, 4, 5}
    assert order[6] == 6
    assert set(order[7:11].tolist()) == {7, 8, 9, 10}
    assert order[11] == 11
    many = prepare.chronological(np.zeros(1000, int), np.arange(1000), np.zeros(1000))
    assert sorted(many.tolist()) == list(range(1000))
    assert abs(np.corrcoef(many, np.arange(1000))[0, 1]) < 0.15
