"""Rows that are set aside: they keep their place, change nothing else, and are counted and recorded exactly."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from embedshard.data.quarantine import BadRowCounts
from embedshard.errors import DataError
from embedshard.launch.local import train_here
from embedshard.launch.request import TrainRequest
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import find_steps, newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import ConsoleReporter, JsonLinesReporter, Reporter, Reporters
from embedshard.world import open_world

BAD = {"user_id": (3, 77), "item_id": (10, None), "age": (20, float("nan")), "weight": (60, -1.0), "history": (70, [1, 500])}
"""Column to the row of a file that is spoilt and what it then holds."""
REASONS = {
    "user_id": "unknown id", "item_id": "null id", "age": "missing number", "weight": "negative weight",
    "history": "unknown id",
}  # fmt: skip


def spoil(path, values):
    table = pq.read_table(path)
    for column, (row, value) in values.items():
        cells = table[column].to_pylist()
        cells[row] = value
        table = table.set_column(table.column_names.index(column), column, pa.array(cells, table.schema.field(column).type))
    pq.write_table(table, path, row_group_size=50)


@pytest.fixture
def dirty(interactions, tmp_path):
    """The interactions with five bad rows in each training file."""
    root = tmp_path / "data"
    shutil.copytree(interactions, root)
    for path in (root / "train").iterdir():
        spoil(path, BAD)
    return root


@pytest.fixture
def config_over(make_config):
    def make(root, changes=None, **data):
        paths = {split: str(root / split / "*.parquet") for split in ("train", "validation", "test")}
        data = {**paths, "weight": "weight", "on_bad_row": "quarantine", "max_bad_fraction": 0.06, **data}
        return make_config({"data": data, **(changes or {})})

    return make


class StopAfter(Reporter):
    """Interrupts a run after a step, as a crash would: what was not saved is lost."""

    def __init__(self, step):
        self._step = step

    def stepped(self, step, epoch, loss, samples_per_second):
        if step == self._step:
            raise KeyboardInterrupt


def run(loaded, path, reporter=None, resume=False):
    directory = RunDirectory.open(path) if resume else RunDirectory.create(path, loaded)
    with open_world("cpu") as world:
        return train(
            loaded.config, world, directory, reporter or Reporter(), newest_intact(directory.checkpoints) if resume else None
        )


def recorded(path):
    parts = [pq.read_table(part) for part in sorted((path / "quarantine").glob("train-*.parquet"))]
    return sorted(pa.concat_tables(parts).to_pylist(), key=lambda row: (row["file"], row["row_group"], row["row"]))


def result_of(path):
    return json.loads((path / "result.json").read_text())


def expected_counts(epochs):
    return {f"{column}: {reason}": 2 * epochs for column, reason in REASONS.items()}


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["cached", "streamed"])
def test_a_bad_row_is_a_row_of_weight_0_bit_for_bit(
    dirty, config_over, tmp_path, saved_tensors, assert_same_tensors, cache_bytes
):
    changes = {"features": {"age": {"kind": "dense", "normalise": "standardise", "missing": "zero"}}}
    harmless = tmp_path / "harmless"
    shutil.copytree(dirty, harmless)
    for path in (dirty / "train").iterdir():
        spoil(path, {"age": (20, float("inf"))})
    for path in (harmless / "train").iterdir():
        rows = {row for row, _ in BAD.values()}
        table = pq.read_table(path).to_pylist()
        for row in rows:
            table[row] |= {"user_id": 5, "item_id": 6, "history": [7], "history_weight": [1.0], "age": None, "weight": 0.0}
        pq.write_table(pa.Table.from_pylist(table, pq.read_schema(path)), path, row_group_size=50)
    data = {"cache_bytes": cache_bytes, "window_steps": 3}
    run(config_over(dirty, changes, **data), tmp_path / "dirty")
    run(config_over(harmless, changes, **data), tmp_path / "run")
    assert_same_tensors(saved_tensors(tmp_path / "dirty"), saved_tensors(tmp_path / "run"))
    assert result_of(tmp_path / "dirty")["metrics"] == result_of(tmp_path / "run")["metrics"]
    ledgers = [
        [json.loads(line) for line in next((tmp_path / name / "ledger").iterdir()).read_text().splitlines()]
        for name in ("dirty", "run")
    ]
    assert ledgers[0] == ledgers[1], "the same rows, as many of them without weight"
    assert sum(line["weightless_rows"] for line in ledgers[0]) == 20
    assert result_of(tmp_path / "run")["bad_rows"]["train"]["quarantined"] == 0
    assert not (tmp_path / "run" / "quarantine").exists()


def test_what_was_set_aside_is_recorded_once_and_counted_each_epoch(dirty, config_over, tmp_path):
    run(config_over(dirty), tmp_path / "run")
    found = recorded(tmp_path / "run")
    assert [(row["file"].rsplit("/")[-1], row["row_group"], row["row"], row["column"], row["reason"]) for row in found] == [
        (f"part-{file}.parquet", BAD[column][0] // 50, BAD[column][0] % 50, column, REASONS[column])
        for file in (0, 1)
        for column in BAD
    ]
    assert [row["value"] for row in found[:5]] == ["77", None, "nan", "-1.0", "500"]
    assert {row["epoch"] for row in found} == {0}
    assert all(1 <= row["step"] <= 7 for row in found)
    bad_rows = result_of(tmp_path / "run")["bad_rows"]
    assert bad_rows["train"] == {
        "rows": 406, "quarantined": 20, "by_reason": expected_counts(2), "oov": {}, "ids": {}, "null": {},
    }  # fmt: skip
    assert bad_rows["test"] == {"rows": 60, "quarantined": 0, "by_reason": {}, "oov": {}, "ids": {}, "null": {}}


def test_records_and_totals_of_a_run_that_was_broken_off_and_rolled_back_are_those_of_an_undisturbed_one(
    dirty, config_over, tmp_path, saved_tensors, assert_same_tensors
):
    loaded = config_over(dirty, {"checkpoint": {"every_steps": 2, "keep": 100}, "evaluate": {"metrics": []}})
    run(loaded, tmp_path / "whole")
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(loaded, path, StopAfter(1))
    assert find_steps(RunDirectory(path).checkpoints) == []
    for stop in (3, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            run(loaded, path, StopAfter(stop), resume=True)
        newest = find_steps(RunDirectory(path).checkpoints)[-1]
        shutil.rmtree(path / "checkpoints" / f"step-{newest:08d}")  # a save that did not finish
    run(loaded, path, resume=True)
    assert recorded(path) == recorded(tmp_path / "whole")
    assert len(recorded(path)) == 10
    assert result_of(path)["bad_rows"] == result_of(tmp_path / "whole")["bad_rows"]
    assert_same_tensors(saved_tensors(path), saved_tensors(tmp_path / "whole"))


def test_too_many_bad_rows_stop_the_run_as_soon_as_it_is_certain_and_more_may_be_allowed(dirty, config_over, tmp_path):
    run(config_over(dirty), tmp_path / "whole")
    steps = sorted(row["step"] for row in recorded(tmp_path / "whole"))
    path = tmp_path / "run"
    with pytest.raises(DataError) as caught:
        run(config_over(dirty, max_bad_fraction=4 / 203), path)
    message = str(caught.value)
    for word in [
        f"step {steps[4]}, epoch 1", "max_bad_fraction=0.0197044 of 203 rows allows 4", "commonest", "For example",
        "row group", str(path / "quarantine"), f"--resume {path} --set data.max_bad_fraction",
    ]:  # fmt: skip
        assert word in message, message
    so_far = recorded(path)
    assert so_far == [row for row in recorded(tmp_path / "whole") if row["step"] <= steps[4]]
    more = config_over(dirty, max_bad_fraction=0.06)
    RunDirectory(path).check_same_run(more, {})
    run(more, path, resume=True)
    assert recorded(path) == recorded(tmp_path / "whole")
    assert result_of(path)["bad_rows"] == result_of(tmp_path / "whole")["bad_rows"]


def test_without_leave_the_first_bad_row_stops_the_run(dirty, config_over, tmp_path):
    with pytest.raises(DataError, match=r"row 20: column 'age' is nan.*'quarantine'"):
        run(config_over(dirty, on_bad_row="error"), tmp_path / "run")


def test_bad_rows_of_held_out_sets_are_left_out_and_counted(dirty, config_over, tmp_path, interactions):
    for split in ("validation", "test"):
        spoil(dirty / split / "part-0.parquet", {"item_id": (5, -3), "user_id": (6, 1000)})
    features = {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}}
    loaded = config_over(dirty, {"features": features})
    run(loaded, tmp_path / "run")
    found = result_of(tmp_path / "run")["bad_rows"]
    for split in ("validation", "test"):
        assert found[split] == {
            "rows": 60, "quarantined": 1, "by_reason": {"item_id: unknown id": 1}, "oov": {"user_id": 1},
            "ids": {"user_id": 59}, "null": {},
        }  # fmt: skip
        (row,) = pq.read_table(tmp_path / "run" / "quarantine" / f"{split}.parquet").to_pylist()
        assert (row["row"], row["column"], row["value"], row["step"]) == (5, "item_id", "-3", None)
    assert found["train"]["oov"] == {"user_id": 4}
    with open_world("cpu") as world:
        parts = assemble(loaded.config, world)
        whole = parts.evaluator.evaluate(parts.model, "test")
        table = pq.read_table(dirty / "test" / "part-0.parquet")
        kept = table.take([i for i in range(60) if i != 5])
        pq.write_table(kept, dirty / "test" / "part-0.parquet")
        parts = assemble(loaded.config, world)
        assert parts.evaluator.evaluate(parts.model, "test") == whole
    strict = config_over(dirty, {"features": features}, max_bad_fraction=0.0)
    with open_world("cpu") as world:
        parts = assemble(strict.config, world)
        with pytest.raises(DataError, match=r"data\.validation: 1 rows were set aside.*row 5: column 'item_id' is '-3'"):
            parts.evaluator.evaluate(parts.model, "validation")


def test_rows_without_a_user_or_an_item_are_no_queries(dirty, config_over, interactions):
    ids = {name: {"kind": "id", "table": name[:4], "null": "empty"} for name in ("user_id", "item_id")}
    spoil(dirty / "test" / "part-0.parquet", {"item_id": (5, None), "user_id": (6, None)})
    spoil(dirty / "validation" / "part-0.parquet", {"item_id": (8, None), "user_id": (9, None)})
    changes = {"features": ids, "objective": {"kind": "mse"}}
    with open_world("cpu") as world:
        parts = assemble(config_over(dirty, changes, label="rating").config, world)
        whole = parts.evaluator.evaluate(parts.model, "test")
        for split, left_out in (("test", (5, 6)), ("validation", (8, 9))):
            path = dirty / split / "part-0.parquet"
            pq.write_table(pq.read_table(path).take([i for i in range(60) if i not in left_out]), path)
        parts = assemble(config_over(dirty, changes, label="rating").config, world)
        assert parts.evaluator.evaluate(parts.model, "test") == whole


def test_statistics_counts_and_seen_items_know_nothing_of_bad_rows(dirty, config_over):
    objective = {"kind": "sampled_softmax", "num_negatives": 16, "distribution": "popularity", "alpha": 1.0}
    with open_world("cpu") as world:
        parts = assemble(config_over(dirty, {"objective": objective}).config, world)
    rows = [
        row
        for path in sorted((dirty / "train").iterdir())
        for place, row in enumerate(pq.read_table(path).to_pylist())
        if place not in {bad for bad, _ in BAD.values()}
    ]
    ages = [row["age"] for row in rows]
    assert parts.dataset.statistics.moments["age"] == pytest.approx((np.mean(ages), np.std(ages)))
    seen = [pair for users, items in parts.dataset.interactions(False) for pair in zip(users, items, strict=True)]
    assert seen == [(row["user_id"], row["item_id"]) for row in rows]
    counts = np.bincount([row["item_id"] for row in rows], minlength=30)
    drawn = parts.dataset.sampler.draw(0, 0, 1)
    np.testing.assert_allclose(np.exp(drawn.log_q), counts[drawn.ids] / counts.sum(), rtol=1e-6)


def test_bad_rows_of_a_catalogue_are_dropped_and_counted(dirty, config_over, tmp_path):
    pq.write_table(pa.table({"item_id": [0, 1, None, 2, 31]}), tmp_path / "items.parquet")
    loaded = config_over(dirty, catalogue=str(tmp_path / "items.parquet"), max_bad_fraction=0.5)
    with open_world("cpu") as world:
        parts = assemble(loaded.config, world)
    assert parts.dataset.catalogue.ids.tolist() == [0, 1, 2]
    counts = parts.dataset.set_aside["catalogue"].counts.by_reason
    assert counts == {"item_id: null id": 1, "item_id: unknown id": 1}


def test_progress_metrics_and_result_tell_what_is_bad_and_skipped(dirty, config_over, tmp_path):
    (dirty / "train" / "README.txt").write_text("not data")
    (dirty / "train" / "_SUCCESS").write_text("")
    features = {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}}
    loaded = config_over(dirty, {"features": features, "train": {"log_every_steps": 7}}, train=str(dirty / "train" / "*"))
    console = Console(file=io.StringIO(), width=200)
    reporters = Reporters([ConsoleReporter(console, 7), JsonLinesReporter(tmp_path / "metrics.jsonl", 1)])
    run(loaded, tmp_path / "run", reporters)
    out = console.file.getvalue()
    assert "bad 8 (3.9%)  oov 1%" in out, out
    skipped = [str(dirty / "train" / name) for name in ("README.txt", "_SUCCESS")]
    assert f"Skipped 2 files that are not Parquet: {', '.join(skipped)}." in out
    assert result_of(tmp_path / "run")["skipped_files"] == skipped
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 14 and "train/loss" in line]
    assert last["train/quarantined"] == 16
    assert last["train/oov/user_id"] == pytest.approx(4 / (406 - 16))


@pytest.mark.parametrize(("share", "text"), [(0.00003, "0.003%"), (0.012, "1.2%"), (1.0, "100%"), (0.123, "12%")])
def test_small_shares_are_shown_with_two_digits(share, text):
    rows = 10**6
    bad_rows = BadRowCounts(by_reason={"x": round(share * rows)})
    console = Console(record=True, width=120, file=io.StringIO())
    reporter = ConsoleReporter(console, 1)
    reporter.counted(rows, bad_rows)
    reporter.stepped(1, 0, 0.5, 1.0)
    assert f"({text})" in console.export_text()


def test_a_run_that_was_stopped_by_bad_rows_goes_on_as_its_error_says(dirty, config_over, tmp_path):
    loaded = config_over(dirty, {"train": {"epochs": 1}}, max_bad_fraction=0.0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(loaded.tree))
    path, console = tmp_path / "run", Console(file=io.StringIO())
    with pytest.raises(DataError, match="were set aside") as caught:
        train_here(TrainRequest(tmp_path / "config.yaml", run_dir=path, device="cpu"), {}, console)
    assert f"--resume {path} --set data.max_bad_fraction=SHARE" in str(caught.value)
    train_here(TrainRequest(None, ("data.max_bad_fraction=0.1",), resume=path, device="cpu"), {}, console)
    assert result_of(tmp_path / "run")["bad_rows"]["train"]["by_reason"] == expected_counts(1)
    assert len(recorded(tmp_path / "run")) == 10
