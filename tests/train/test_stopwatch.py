"""Seconds by stage and bytes read: what they add up to, and where they are told."""

import json
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from embedshard.report.read import read_run
from embedshard.train import stopwatch as module
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stopwatch import Stopwatch
from embedshard.train.tracking import JsonLinesReporter
from embedshard.world import open_world


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by hand."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_laps_add_up_by_stage_and_what_is_let_go_counts_nowhere(clock):
    stopwatch = Stopwatch()
    for seconds, stage in ((1, "data"), (4, "step"), (8, None), (2, "data"), (16, "checkpoint")):
        clock[0] += seconds
        if stage is None:
            stopwatch.restart()
        else:
            assert stopwatch.lap(stage) == seconds
    assert stopwatch.seconds == {"data": 3, "step": 4, "evaluate": 0, "checkpoint": 16}
    assert stopwatch.training_seconds == 7
    assert stopwatch.means(2) == {"data": 1.5, "step": 2, "evaluate": 0, "checkpoint": 8}
    clock[0] += 6
    stopwatch.lap("step")
    assert stopwatch.means(5) == {"data": 0, "step": 2, "evaluate": 0, "checkpoint": 0}
    assert stopwatch.means(5)["step"] == 0


def chunks(folder, columns):
    """The compressed bytes of some columns of all files of a folder."""
    total = 0
    for file in folder.glob("*.parquet"):
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            leaves = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            total += sum(leaf.total_compressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns)
    return total


COLUMNS = {"user_id", "item_id", "history", "age"}


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["cached", "streamed"])
def test_a_run_tells_where_its_time_went_and_what_it_read(make_config, interactions, tmp_path, cache_bytes):
    loaded = make_config({"data": {"cache_bytes": cache_bytes}, "train": {"log_every_steps": 1}})
    run = RunDirectory.create(tmp_path / "run", loaded)
    reporter = JsonLinesReporter(run.folder.join("metrics.jsonl"), 1)
    with open_world("cpu") as world:
        train(loaded.config, world, run, reporter)
    reporter.finished()
    lines = [json.loads(line) for line in run.folder.join("metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert len(trained) == 14
    for line in trained:
        assert line["train/seconds/step"] > 0
        assert line["train/seconds/data"] >= 0
    totals = [line["train/bytes_read"] for line in trained]
    assert totals == sorted(totals)
    once = chunks(interactions / "train", COLUMNS)
    assert totals[0] >= (once if cache_bytes else 1)
    assert {line["step"] for line in lines if "checkpoint/seconds" in line} == {7, 14}
    result = run.read_json("result.json")
    assert set(result["seconds"]) == {"data", "step", "evaluate", "checkpoint"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert sum(result["seconds"].values()) <= result["wall_seconds"]
    held_out = sum(
        chunks(interactions / split, {"user_id", "item_id", "history", "age"}) for split in ("validation", "test")
    )
    assert result["bytes_read"] >= once + held_out
    assert result["bytes_read"] >= totals[-1]
    if not cache_bytes:
        assert totals[-1] >= 2 * once, "each epoch reads the data again"
    page = run.folder.join("report.html").read_text()
    for words in ("waiting for data", "in steps", "saving", "bytes read", "seconds a step, by stage"):
        assert words in page
    told = read_run(run.folder, datetime.now(UTC))
    assert told.bytes_read == result["bytes_read"]
    assert told.stage_seconds == result["seconds"]
