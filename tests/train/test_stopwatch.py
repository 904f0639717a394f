"""Seconds by stage and bytes read: what they add up to, and where they are told."""

import html
import json
import re
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from embedshard import stages as module
from embedshard.report.read import read_run
from embedshard.report.waterfall import waterfall_chart, waterfall_of
from embedshard.stages import BESIDE, STEP_STAGES, Laps, Waterfall
from embedshard.train import loop
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stopwatch import GROUPS, Stopwatch, grouped, over_ranks
from embedshard.train.tracking import JsonLinesReporter, Reporter
from embedshard.world import open_world


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by hand."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_laps_add_up_by_stage_and_what_is_let_go_counts_nowhere(clock):
    stopwatch, reader = Stopwatch(), Laps(BESIDE)
    stopwatch.watch_reader(reader)
    laps = (
        (1, "read_wait"),
        (4, "lookup"),
        (2, "table_backward"),
        (8, None),
        (2, "read_wait"),
        (32, "log"),
        (16, "checkpoint"),
    )
    for seconds, stage in laps:
        clock[0] += seconds
        if stage is None:
            stopwatch.restart()
        else:
            assert stopwatch.lap(stage) == seconds
    assert stopwatch.seconds == {"data": 3, "step": 6, "evaluate": 0, "checkpoint": 16}
    assert stopwatch.training_seconds == 9, "telling of a step is no part of it"
    reader.lap("decode")
    first = stopwatch.means(2, saved=10.0)
    assert list(first.stages) == list(STEP_STAGES)
    told = {"read_wait": 1.5, "lookup": 2, "table_backward": 1, "log": 16, "checkpoint": 8}
    assert first.stages == dict.fromkeys(STEP_STAGES, 0.0) | told
    assert first.beside == dict.fromkeys(BESIDE, 0.0) | {"decode": 65 / 2, "save": 5}
    assert first.wall == 28.5
    assert grouped(first.stages) == {"data": 1.5, "step": 3, "evaluate": 0, "checkpoint": 8}
    clock[0] += 6
    stopwatch.lap("dense_update")
    second_reader = Laps(BESIDE)
    stopwatch.watch_reader(second_reader)
    clock[0] += 9
    second_reader.lap("collate")
    second = stopwatch.means(5, saved=10.0)
    assert grouped(second.stages) == {"data": 0, "step": 2, "evaluate": 0, "checkpoint": 0}
    assert second.beside == dict.fromkeys(BESIDE, 0.0) | {"collate": 3}
    assert stopwatch.means(5).wall == 0


def test_a_waterfall_says_what_the_step_waits_for_and_what_runs_beside_it():
    behind = Waterfall({"read_wait": 0.003, "lookup": 0.001}, {"decode": 0.004}, 1)
    assert behind.sentences() == [
        "Of a step's 4 ms: read_wait 75%, lookup 25%.",
        "It waits 3 ms (75%) for data; the reader, in a thread beside it, works 100% of its time: reading holds training "
        "up.",
    ]
    ahead = Waterfall(
        {"lookup": 0.002, "agree": 0.001, "output_dist": 0.001}, {"order": 0.001, "ahead": 0.003, "save": 0.002}, 2
    )
    assert ahead.reader_share == 0.25
    assert ahead.sentences()[1:] == [
        "It waits 0 ms (0%) for data; the reader, in a thread beside it, works 25% of its time and is ahead for the rest.",
        "It waits 1 ms (25%) until all 2 workers agree, which is where the slowest is waited for, and 1 ms (25%) for ids "
        "and vectors on their way.",
        "Saves in the background take 2 ms of each step's time beside it.",
    ]
    assert Waterfall({}, {}).sentences() == []


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
WORK = set(STEP_STAGES) - {"metrics", "evaluate", "checkpoint", "log"}


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
        waterfall = {name: line[f"train/waterfall/{name}"] for name in STEP_STAGES}
        assert all(waterfall[name] > 0 for name in WORK), (
            "the model has tables, a dense part, and nothing that metrics watch"
        )
        assert grouped(waterfall) == pytest.approx({name: line[f"train/seconds/{name}"] for name in GROUPS})
        assert {f"train/beside/{name}" for name in BESIDE} <= line.keys()
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
    waterfall = waterfall_of(told)
    after_the_first = [sum(line[f"train/waterfall/{name}"] for name in STEP_STAGES) for line in trained[1:]]
    assert waterfall.wall == pytest.approx(sum(after_the_first) / 13)
    assert waterfall.workers == 1
    for words in ("Where a step", "table_backward", *(sentence[:20] for sentence in waterfall.sentences())):
        assert words in html.unescape(page)


def test_nothing_is_let_go_between_steps(make_config, tmp_path, monkeypatch):
    """The stages of all steps are the time from the first step's begin to the last one's end."""
    loaded = make_config({"train": {"log_every_steps": 5}, "checkpoint": {"every_steps": 3}, "evaluate": {"every_steps": 4}})
    run = RunDirectory.create(tmp_path / "run", loaded)
    spans = []

    class Watched(Stopwatch):
        def restart(self):
            super().restart()
            spans.append([self.laps._since, self.laps._since])

        def lap(self, stage):
            taken = super().lap(stage)
            spans[-1][1] = self.laps._since
            return taken

    monkeypatch.setattr(loop, "Stopwatch", Watched)
    told = []

    class Listener(Reporter):
        def measured(self, step, values):
            if "train/loss" in values:
                told.append({name: values[f"train/waterfall/{name}"] for name in STEP_STAGES})

    with open_world("cpu") as world:
        loop.train(loaded.config, world, run, Listener())
    assert len(spans) == 2, "before the first step, and before the test set"
    (first, last), (_, tested) = spans
    assert len(told) == 3
    of_steps = sum(steps * sum(stages.values()) for steps, stages in zip((5, 5, 4), told, strict=True))
    seconds = json.loads((tmp_path / "run" / "result.json").read_text())["seconds"]
    assert 0 < of_steps <= last - first, "what was told by the last step; what it still held up for comes after"
    assert sum(seconds.values()) < (last - first) + (tested - spans[1][0]) + 1e-9
    by_name = {name: sum(stages[name] for stages in told) for name in STEP_STAGES}
    assert by_name["checkpoint"] > 0
    assert by_name["evaluate"] > 0


def test_two_workers_tell_the_mean_of_both():
    own = Waterfall(dict.fromkeys(STEP_STAGES, 0.0) | {"lookup": 2.0}, dict.fromkeys(BESIDE, 0.0) | {"decode": 4.0})

    class World:
        world_size = 2

        def sum(self, tensor):
            return tensor + 1.0

    mean = over_ranks(own, World())
    assert mean.stages == dict.fromkeys(STEP_STAGES, 0.5) | {"lookup": 1.5}
    assert mean.beside == dict.fromkeys(BESIDE, 0.5) | {"decode": 2.5}
    assert mean.workers == 2


def test_a_report_draws_each_stage_that_took_time_where_the_former_ends():
    chart = waterfall_chart(Waterfall({"read_wait": 0.001, "lookup": 0.003, "log": 0.0}, {"order": 0.002, "ahead": 0.002}))
    bars = re.findall(r'class="dot (\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart)
    assert [kind for kind, _, _ in bars] == ["c1", "c0", "c5", "idle"]
    (_, wait_x, wait_width), (_, lookup_x, lookup_width), (_, order_x, _), _ = bars
    assert float(lookup_x) == pytest.approx(float(wait_x) + float(wait_width), abs=0.2)
    assert float(lookup_width) == pytest.approx(3 * float(wait_width), abs=0.3)
    assert order_x == wait_x
    assert "1.000 ms, 25.00 %" in chart
    assert "log" not in re.sub(r"<title>.*?</title>", "", chart)
