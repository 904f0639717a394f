"""The Gowalla pipeline: the split, the official files' format, and the config over real data."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("gowalla_prepare", ROOT / "pipelines" / "gowalla" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_official_files_are_read_and_a_tenth_of_each_user_is_held_out(prepare, tmp_path):
    (tmp_path / "train.txt").write_text("0 " + " ".join(str(item) for item in range(25)) + "\n1 3 4\n2\n")
    train = prepare.read_official(tmp_path / "train.txt")
    assert train.num_rows == 27
    sets = {name: table.to_pylist() for name, table in prepare.split_validation(train).items()}
    assert [row["user_id"] for row in sets["validation"]] == [0, 0], "a tenth of 25 rounded down, none of two"
    assert sorted(row["item_id"] for part in sets.values() for row in part if row["user_id"] == 0) == list(range(25))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gowalla_reaches_its_floor_on_real_data(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    metrics = run(data_set("gowalla"), tmp_path, [])
    assert metrics["recall@20"] >= 0.180
    assert metrics["ndcg@20"] >= 0.148


@pytest.mark.timeout(900)
def test_a_short_gowalla_run_on_real_data_beats_item_knn(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDSHARD_DATA", str(tmp_path))
    small = ("train.epochs=3", "tables.user.dim=64", "tables.item.dim=64", "objective.num_negatives=1024")
    metrics = run(data_set("gowalla"), tmp_path, [word for setting in small for word in ("--set", setting)])
    assert metrics["recall@20"] > 0.1173, "ItemKNN cosine, measured on the same files"


def run(source, tmp_path, overrides):
    for command in (
        ["pipelines/gowalla/prepare.py", "--source", str(source)],
        [
            "-m",
            "embedshard.cli",
            "train",
            "pipelines/gowalla/two_tower.yaml",
            "--run-dir",
            str(tmp_path / "run"),
            *overrides,
        ],
    ):
        done = run_python(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "gowalla" / "test").num_rows == 217_242
    return json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
