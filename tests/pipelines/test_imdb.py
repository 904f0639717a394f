"""The IMDB pipeline: what is held out, and in which layout."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.commands import run_python

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"imdb_{name}", ROOT / "pipelines" / "imdb" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare():
    return script("prepare")


@pytest.fixture(scope="module")
def weigh():
    return script("weigh")


def reviews(rows):
    labels = [int(row >= rows // 4) for row in range(rows)]
    return pa.table({"text": [f"review {row}" for row in range(rows)], "label": pa.array(labels, pa.int64())})


def test_a_share_of_each_label_is_held_out_by_the_seed(prepare):
    train = reviews(200)
    sets = prepare.split_validation(train, 0.1, 7)
    assert sets["validation"]["label"].to_pylist().count(0) == 5
    assert sets["validation"]["label"].to_pylist().count(1) == 15
    texts = [text for part in sets.values() for text in part["text"].to_pylist()]
    assert sorted(texts) == sorted(train["text"].to_pylist())
    assert {name: part.equals(sets[name]) for name, part in prepare.split_validation(train, 0.1, 7).items()} == {
        "train": True, "validation": True,
    }  # fmt: skip
    assert not prepare.split_validation(train, 0.1, 8)["validation"].equals(sets["validation"])
    assert prepare.split_validation(train, 0.0, 7)["validation"].num_rows == 0
    with pytest.raises(ValueError, match="share"):
        prepare.split_validation(train, 1.0, 7)


def test_the_command_line_writes_every_set(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, rows in (("train", 6000), ("test", 2600)):
        pq.write_table(reviews(rows), source / f"{name}.parquet")
    command = ["pipelines/imdb/prepare.py", "--source", source, "--out", out, "--seed", "3"]
    done = run_python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train 5,400 rows, validation 600 rows, test 2,600 rows" in done.stdout
    train = pq.ParquetFile(out / "train" / "part-00000.parquet")
    assert [train.metadata.row_group(group).num_rows for group in range(train.num_row_groups)] == [2500, 2500, 400]
    assert train.schema_arrow.field("label").type == pa.int8()
    again = run_python(*command, "--validation-share", "1.5", cwd=ROOT)
    assert again.returncode == 1
    assert "prepare.py: --validation-share 1.5 is no share" in again.stderr


def test_the_real_reviews_are_split_evenly(prepare, data_set):
    train = prepare.read_reviews(data_set("imdb") / "train.parquet")
    sets = prepare.split_validation(train, prepare.VALIDATION_SHARE, prepare.SEED)
    assert {name: part.num_rows for name, part in sets.items()} == {"train": 22_500, "validation": 2_500}
    assert pc.sum(sets["validation"]["label"]).as_py() == 1_250


def test_a_key_weighs_how_far_it_tells_labels_apart(weigh):
    keys = np.array([5, 9, 5, 9, 5, 7, 7, 3, 9, 1, 5], dtype=np.uint64)
    lengths = np.array([3, 2, 1, 2, 0, 3])
    labels = np.array([True, True, False, False, True, False])
    learnt_from = np.array([True, True, True, True, True, False])
    bags, weights, count = weigh.weighed_bags(keys, lengths, labels, learnt_from, 1, 1.0)
    assert count == 4  # by number of reviews: 5, 7 and 9 have two each, 3 one; 1 is not learnt
    assert bags.to_pylist() == [[0, 2], [0, 2], [1], [3, 1], [], [0, 2]]
    # One more than the reviews of label 1: 3 of 5, 3 of 9, 1 of 7, 1 of 3, 8 in all; of label 0: 1, 1, 3, 2, 7 in all.
    by_id = np.abs(np.log(np.array([3 / 1, 1 / 3, 3 / 1, 1 / 2]) * 7 / 8))
    for bag, given in zip(bags.to_pylist(), weights.to_pylist(), strict=True):
        np.testing.assert_allclose(given, by_id[bag] / np.linalg.norm(by_id[bag]), rtol=1e-6)


def test_a_key_of_few_reviews_is_left_out(weigh):
    keys, lengths = np.array([4, 4, 6, 4, 2], dtype=np.int64), np.array([3, 2])
    labels, learnt_from = np.array([True, False]), np.array([True, True])
    bags, weights, count = weigh.weighed_bags(keys, lengths, labels, learnt_from, 2, 1.0)
    assert (count, bags.to_pylist()) == (1, [[0], [0]])
    assert [len(given) for given in weights.to_pylist()] == [1, 1]
    bags, _, count = weigh.weighed_bags(keys, lengths, labels, np.array([False, False]), 1, 1.0)
    assert (count, bags.to_pylist()) == (0, [[], []])


def test_bags_take_the_place_of_texts(tmp_path):
    sets = {"train": reviews(40), "validation": reviews(8), "test": reviews(20)}
    for name, table in sets.items():
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "part-00000.parquet")
    told = {}
    for options in ((), ("--hold-out",)):
        done = run_python("pipelines/imdb/weigh.py", "--source", tmp_path, *options, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        told[options] = done.stdout
        for name, table in sets.items():
            written = pq.read_table(tmp_path / "nbsvm" / name)
            assert written["label"].to_pylist() == table["label"].to_pylist()
            assert pc.list_value_length(written["words"]).equals(pc.list_value_length(written["words_weights"]))
    # "review" and the numbers; the run "review N" is one that two reviews have where validation counts too.
    assert "41 words, 8 runs" in told[()]
    assert "41 words, 0 runs" in told["--hold-out",]
    done = run_python("pipelines/imdb/weigh.py", "--source", tmp_path, "--smoothing", "0", cwd=ROOT)
    assert done.returncode == 2
    assert "--smoothing must be above 0" in done.stderr
    done = run_python("pipelines/imdb/weigh.py", "--source", tmp_path / "none", cwd=ROOT)
    assert done.returncode == 1
    assert "weigh.py: " in done.stderr
