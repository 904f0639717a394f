"""The drifting stream: what prepare.py writes, and that a row of one's own is better than a shared one."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedshard.config import load_config
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world
from tests.commands import run_python

FOLDER = Path(__file__).parents[2] / "pipelines" / "drift"
SMALL = ("--days", "6", "--items", "300", "--users", "60", "--rows", "6000", "--test-rows", "6000")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    done = run_python(FOLDER / "prepare.py", "--out", root / "drift", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "6 days of 6,000 rows, 1,050 different items; 6,000 test rows" in done.stdout
    return root


def test_half_of_a_day_is_new(stream):
    days = [set(pq.read_table(day)["item_id"].to_pylist()) for day in sorted((stream / "drift").glob("day=*"))]
    assert len(days) == 6
    for before, day in itertools.pairwise(days):
        assert 120 < len(day - before) < 180, "a few of the others were not drawn the day before"
        assert 100 < len(day & before) <= 150
    for day, later in zip(days, days[2:], strict=False):
        assert not day & later
    clicked = pq.read_table(stream / "drift" / "test")["clicked"].to_numpy()
    assert 0.4 < np.mean(clicked) < 0.6


@pytest.mark.timeout(240)
def test_managed_rows_beat_hashed_ones(stream, tmp_path):
    results = {}
    for name in ("managed", "hash"):
        overrides = ["tables.item.vocabulary.rows=600", "tables.user.rows=60", "train.global_batch_size=128"]
        loaded = load_config(FOLDER / f"{name}.yaml", {"EMBEDSHARD_DATA": str(stream)}, overrides)
        run = RunDirectory.create(tmp_path / name, loaded)
        with open_world("cpu") as world:
            train(loaded.config, world, run, Reporter())
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert results["managed"]["metrics"]["auc"] > results["hash"]["metrics"]["auc"] + 0.01
    done = run_python(FOLDER / "compare.py", tmp_path / "managed", tmp_path / "hash", EMBEDSHARD_DATA=str(stream))
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if "managed" in line]
    assert "0.0%" in shown[0]
