"""The IMDB pipeline: what is held out, and in which layout."""

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.commands import run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("imdb_prepare", ROOT / "pipelines" / "imdb" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
