"""Day after day: a run goes on where another one ended, waits for days, and evaluates each before it is trained."""

import io
import json
import os
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from embedshard.config import Loaded, build_config
from embedshard.data.dataset import open_dataset
from embedshard.data.partitions import find_partitions
from embedshard.errors import CheckpointError, ConfigError, DataError
from embedshard.launch.extract import extract_here
from embedshard.launch.local import evaluate_here, train_in
from embedshard.launch.request import TrainRequest
from embedshard.sharding.optimizers import learning_rate_factor
from embedshard.train.audit import audit_run
from embedshard.train.checkpoint import find_steps
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import ConsoleReporter, Reporter, Reporters
from embedshard.world import open_world
from tests.commands import run_ranks, start_command

TIMEOUT_S = 240


@pytest.fixture
def days(tmp_path, interactions):
    """A function that lays a day of the tiny interactions down."""
    whole = pq.read_table(interactions / "train")

    def lay(number, rows=60):
        folder = tmp_path / "days" / f"day={number}"
        folder.mkdir(parents=True)
        first = (number - 1) * 50 % 140
        pq.write_table(whole.slice(first, rows), folder / "part.parquet", row_group_size=25)
        return folder

    for number in (1, 2):
        lay(number)
    return lay


@pytest.fixture
def day_config(make_config, tmp_path):
    """A function from changes to a config file over the days; click prediction, so that there is something to validate."""

    def make(name="days", **changes):
        tree = {
            "data": {
                "train": None, "partitions": {"each": str(tmp_path / "days" / "day=*")}, "label": "clicked",
                "validation": None, "test": None,
            },
            "objective": {"kind": "bce"},
            "train": {"epochs": 1},
            "evaluate": {"metrics": ["auc", "log_loss"]},
            "optimizer": {"schedule": {"decay": "none"}},
            **changes,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(make_config(tree, splits=()).tree))
        return path

    return make


class Told(Reporter):
    def __init__(self, then=lambda sentence: None):
        self.sentences, self.values, self.losses, self._then = [], [], [], then

    def said(self, message):
        self.sentences.append(message)
        self._then(message)

    def stepped(self, step, epoch, loss, samples_per_second):
        self.losses.append(loss)

    def measured(self, step, values):
        self.values.append((step, dict(values)))


def train(config, folder, teller=None, **options):
    request = TrainRequest(config=config, run_dir=folder, **options).resolved()
    with open_world("cpu") as world:
        return train_in(world, request, {}, teller or Told())


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_what_one_glob_names_are_the_partitions_in_the_order_of_their_numbers(days, day_config, tmp_path):
    for number in (10, 9):
        days(number)
    (tmp_path / "days" / "_day=3").mkdir()
    data = Loaded(build_config(yaml.safe_load(day_config().read_text()), {}, ""), {}, "").config.data
    assert [partition.name for partition in find_partitions(data)] == ["day=1", "day=2", "day=9", "day=10"]
    marked = data.model_copy(update={"partitions": data.partitions.model_copy(update={"marker": "_SUCCESS"})})
    with pytest.raises(DataError, match="none of the 4 that it names has a _SUCCESS yet"):
        find_partitions(marked)
    assert find_partitions(marked, waits=True) == []
    for number in (1, 2):
        (tmp_path / "days" / f"day={number}" / "_SUCCESS").touch()
    assert [partition.name for partition in find_partitions(marked)] == ["day=1", "day=2"]
    (tmp_path / "days" / "day=10" / "_SUCCESS").touch()
    with pytest.raises(DataError, match="'day=9' has no _SUCCESS yet, and 'day=10' after it has"):
        find_partitions(marked)
    assert [partition.name for partition in find_partitions(marked, waits=True)] == ["day=1", "day=2"]


def test_a_run_that_continues_another_ends_like_one_that_had_all_days(
    days, day_config, tmp_path, saved_tensors, assert_same_tensors
):
    """Days in order, one epoch: what is trained when does not depend on where the runs were cut."""
    config = day_config()
    tree = yaml.safe_load(config.read_text())
    tree["data"]["shuffle"] = False  # else each run numbers its partitions, and so their orders, from its own first
    tree["features"]["age"]["normalise"] = "log1p"  # statistics are those of the first run's days
    config.write_text(yaml.safe_dump(tree))
    train(config, tmp_path / "first")
    days(3)
    days(4)
    told = Told()
    train(config, tmp_path / "second", told, continues=tmp_path / "first")
    assert any(sentence.startswith("Continues") for sentence in told.sentences)
    train(config, tmp_path / "whole")
    step, tensors = saved_tensors(tmp_path / "whole")
    step_2, tensors_2 = saved_tensors(tmp_path / "second")
    assert step == saved_tensors(tmp_path / "first")[0] + step_2
    assert_same_tensors((0, tensors), (0, tensors_2))

    inventory = json.loads((tmp_path / "second" / "inventory.json").read_text())
    assert inventory["names"] == ["day=3", "day=4"]
    assert inventory["former"]["names"] == ["day=1", "day=2"]
    audit = audit_run(RunDirectory(tmp_path / "second"), {})
    assert audit.is_proved
    assert audit.is_finished
    assert [one.rows_trained for one in audit.passes] == [60, 60]
    assert len(find_steps(RunDirectory(tmp_path / "second").checkpoints)) == 2, "one at each day's end"

    days(5)  # and a third, which continues the second
    train(None, tmp_path / "third", continues=tmp_path / "second")
    inventory = json.loads((tmp_path / "third" / "inventory.json").read_text())
    assert inventory["names"] == ["day=5"]
    assert inventory["former"]["names"] == ["day=1", "day=2", "day=3", "day=4"]
    assert inventory["former"]["steps"] == step
    assert result_of(tmp_path / "third")["former_steps"] == step


def test_a_continuing_run_that_is_broken_off_resumes_bit_for_bit(
    days, day_config, tmp_path, saved_tensors, assert_same_tensors
):
    config = day_config(
        objective={"kind": "sampled_softmax", "num_negatives": 16, "distribution": "popularity"},
        evaluate={"metrics": ["recall@5"]},
    )
    train(config, tmp_path / "first")
    days(3)
    days(4)
    train(config, tmp_path / "whole", continues=tmp_path / "first")
    done = saved_tensors(tmp_path / "whole")
    for limit in (1, 3):
        folder = tmp_path / f"cut-{limit}"
        train(config, folder, continues=tmp_path / "first", overrides=(f"train.max_steps={limit}",))
        days_now = days(5 + limit)  # a day that comes meanwhile is not this run's, and is not even whole yet
        (days_now / "part.parquet").write_bytes(b"PAR1 and so on")
        told = Told()
        train(config, folder, told, resume=folder)
        assert any("left to one that continues it" in sentence for sentence in told.sentences)
        assert_same_tensors(done, saved_tensors(folder))
        (days_now / "part.parquet").unlink()
        days_now.rmdir()


def test_nothing_new_and_data_that_have_not_only_grown_are_refused(days, day_config, tmp_path):
    config = day_config()
    train(config, tmp_path / "first")
    with pytest.raises(DataError, match="nothing new: all 2 partitions"):
        train(config, tmp_path / "again", continues=tmp_path / "first")
    day_3 = days(3)
    part = tmp_path / "days" / "day=1" / "part.parquet"
    kept = part.read_bytes()
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(DataError, match=r"not only grown.*partition 1 \(day=1\): part.parquet has changed"):
        train(config, tmp_path / "changed", continues=tmp_path / "first")
    part.write_bytes(kept)
    day_3.rename(tmp_path / "days" / "day=1a")
    with pytest.raises(DataError, match=r"partition 2 \(day=2\): 'day=1a' is new, before 'day=2'"):
        train(config, tmp_path / "before", continues=tmp_path / "first")
    (tmp_path / "days" / "day=2").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"'day=2' is missing"):
        train(config, tmp_path / "missing", continues=tmp_path / "first")


def test_new_files_of_a_data_set_without_partitions_are_its_next_partition(days, day_config, tmp_path):
    config = day_config(data={"train": str(tmp_path / "days" / "*" / "*.parquet"), "label": "clicked"})
    train(config, tmp_path / "first")
    days(3)
    train(config, tmp_path / "second", continues=tmp_path / "first")
    assert json.loads((tmp_path / "second" / "inventory.json").read_text())["partition_rows"] == [60]
    with pytest.raises(DataError, match=r"part.parquet is new.*--continue"):
        train(config, tmp_path / "first", resume=tmp_path / "first")
    days(0)
    with pytest.raises(DataError, match="not only grown"):
        train(config, tmp_path / "third", continues=tmp_path / "second")


def test_a_config_under_which_weights_mean_something_else_is_refused(days, day_config, tmp_path):
    train(day_config(), tmp_path / "first")
    days(3)
    changes = ("tables.user.dim=4", "optimizer.tables.kind=sgd", "features.age.normalise=log1p", "model.biases=[]")
    with pytest.raises(ConfigError) as caught:
        train(day_config(), tmp_path / "second", continues=tmp_path / "first", overrides=changes)
    for path in ("tables.user.dim: 8 in the run, 4 now", "optimizer.tables.kind", "features.age.normalise", "model.biases"):
        assert path in str(caught.value)
    assert not (tmp_path / "second").exists()
    free = ("optimizer.tables.lr=0.01", "train.global_batch_size=16", "seed=5", "checkpoint.keep=1", "train.epochs=2")
    train(day_config(), tmp_path / "third", continues=tmp_path / "first", overrides=free)
    assert result_of(tmp_path / "third")["steps"] == 8


def test_a_run_that_has_not_ended_is_not_continued(days, day_config, tmp_path):
    config = day_config()

    class Stop(Told):
        def stepped(self, *about):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(config, tmp_path / "first", Stop()).stopped_by == "SIGTERM"
    days(3)
    with pytest.raises(CheckpointError, match=r"has not ended.*step 2 of 4.*--resume"):
        train(config, tmp_path / "second", continues=tmp_path / "first")
    tree = day_config("tree", objective={"kind": "bce"})
    with pytest.raises(ConfigError, match=r"--resume .* --continue"):
        train(tree, None, continues=tmp_path / "first", resume=tmp_path / "first")


@pytest.mark.parametrize(
    ("schedule", "former", "step", "steps", "expected"),
    [
        ({"warmup_steps": 10}, 0, 4, 100, 0.5),
        ({"warmup_steps": 10}, 4, 0, 100, 0.5),
        ({"warmup_steps": 10}, 50, 0, 100, 1.0),
        ({"decay": "linear"}, 50, 0, 100, 1.0),
        ({"decay": "linear"}, 50, 50, 100, 0.5),
        ({"decay": "linear", "decay_steps": 100}, 50, 0, 10, 0.5),
        ({"decay": "linear", "warmup_steps": 10}, 6, 4, 24, 1.0),
        ({"decay": "linear", "warmup_steps": 10}, 6, 14, 24, 0.5),
    ],
)
def test_schedules_go_on(schedule, former, step, steps, expected):
    from embedshard.config.parts import ScheduleConfig

    assert learning_rate_factor(ScheduleConfig(**schedule), step, steps, former) == pytest.approx(expected)


def test_a_schedule_that_has_fallen_to_nothing_is_refused(days, day_config, tmp_path):
    config = day_config(optimizer={"schedule": {"decay": "linear", "warmup_steps": 0, "decay_steps": 3, "final": 0.0}})
    train(config, tmp_path / "first")
    days(3)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        train(config, tmp_path / "second", continues=tmp_path / "first")


def test_each_partition_is_evaluated_before_it_is_trained(days, day_config, tmp_path):
    config = day_config(evaluate={"metrics": ["auc", "log_loss", "recall@5"], "progressive": True, "batch_size": 16})
    told = Told()
    train(config, tmp_path / "first", told)
    found = result_of(tmp_path / "first")["progressive"]
    assert [(one["partition"], one["name"], one["step"], one["rows"]) for one in found] == [
        (1, "day=1", 0, 60), (2, "day=2", 2, 60),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["progressive/auc"] for line in lines if "progressive/auc" in line] == [one["auc"] for one in found]
    assert all("recall@5" not in one and 0 <= one["auc"] <= 1 for one in found)
    days(3)
    train(config, tmp_path / "second", continues=tmp_path / "first")
    (third,) = result_of(tmp_path / "second")["progressive"]
    # The same day as a test set of the former run: what its weights say of it.
    overrides = (f"data.test={tmp_path / 'days' / 'day=3'}", "train.max_steps=0", "evaluate.metrics=[auc, log_loss]")
    overrides += ("evaluate.progressive=false",)
    train(config, tmp_path / "tested", continues=tmp_path / "first", overrides=overrides)
    metrics = result_of(tmp_path / "tested")["metrics"]
    assert third["auc"] == pytest.approx(metrics["auc"], abs=1e-12)
    assert third["log_loss"] == pytest.approx(metrics["log_loss"], rel=1e-6)
    page = (tmp_path / "second" / "report.html").read_text()
    assert "Progressive validation" in page
    assert "day=3" in page


def test_progressive_validation_needs_a_metric_of_predictions(day_config):
    with pytest.raises(ConfigError, match=r"evaluate\.progressive"):
        day_config(evaluate={"metrics": ["recall@5"], "progressive": True})


def wait_for(path, words, process):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if path.exists() and all(word in path.read_text() for word in words):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{path} never held {words}: {process.communicate()}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_watching_run_trains_days_as_they_come_until_it_is_told_to_stop(
    days, day_config, tmp_path, workers, saved_tensors, assert_same_tensors
):
    config = day_config(evaluate={"metrics": ["auc"], "progressive": True})
    spread = [] if workers == 1 else ["--workers", workers]
    run_ranks(1, "train", config, "--run-dir", tmp_path / "first", cwd=tmp_path)
    folder = tmp_path / "second"
    watching = ["--continue", tmp_path / "first", "--watch", "--poll", "0.3"]
    process = start_command("train", config, "--run-dir", folder, *watching, *spread, cwd=tmp_path)
    metrics = folder / "metrics.jsonl"
    try:
        days(3)
        wait_for(metrics, ['"progressive/partition": 1', '"checkpoint/seconds"'], process)
        unfinished = tmp_path / "days" / "day=4"
        unfinished.mkdir()
        whole = (tmp_path / "days" / "day=3" / "part.parquet").read_bytes()
        (unfinished / "part.parquet").write_bytes(whole[: len(whole) // 2])  # a writer that is at it
        time.sleep(1.5)
        assert '"progressive/partition": 2' not in metrics.read_text()
        (unfinished / "part.parquet").write_bytes(whole)
        wait_for(metrics, ['"progressive/partition": 2'], process)
        wait_for(folder / "inventory.json", ["day=4"], process)
        deadline = time.monotonic() + TIMEOUT_S
        while len(find_steps(RunDirectory(folder).checkpoints)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 143, process.communicate()
    finally:
        process.kill()
    out, _ = process.communicate()
    assert f"embedshard train --resume {folder} --watch" in out
    audit = audit_run(RunDirectory(folder), {})
    assert audit.is_proved
    assert [one.rows_trained for one in audit.passes] == [60, 60]
    # It is complete as it is, so it can be continued; and the days at once give the same weights.
    run_ranks(workers, "train", config, "--run-dir", tmp_path / "once", "--continue", tmp_path / "first", cwd=tmp_path)
    if workers == 1:
        assert_same_tensors(saved_tensors(folder), saved_tensors(tmp_path / "once"))
    else:
        for name, tensor in saved_tensors(folder)[1].items():
            torch.testing.assert_close(tensor, saved_tensors(tmp_path / "once")[1][name], msg=name)
    days(5)
    told = Told()
    train(config, tmp_path / "third", told, continues=folder)
    assert json.loads((tmp_path / "third" / "inventory.json").read_text())["former"]["names"] == [
        "day=1", "day=2", "day=3", "day=4",
    ]  # fmt: skip


def test_a_watching_run_that_is_resumed_waits_on_and_refuses_a_day_out_of_order(days, day_config, tmp_path):
    config, folder = day_config(), tmp_path / "run"

    def stop_when_waiting(sentence):
        if sentence.startswith("Waits for the partition after day=2"):
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, folder, Told(stop_when_waiting), poll_s=0.1).stopped_by == "SIGINT"
    again = Told(stop_when_waiting)
    assert train(None, folder, again, resume=folder, poll_s=0.1).stopped_by == "SIGINT"
    assert not again.losses

    def come_late(sentence):
        if sentence.startswith("Waits for the partition after day=2"):
            days(0)

    with pytest.raises(DataError, match="'day=0' is new, before 'day=1', which was trained"):
        train(None, folder, Told(come_late), resume=folder, poll_s=0.1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"epochs": 2}}, "train.epochs is 2"),
        ({"data": {"validation_fraction": 0.1}}, "validation_fraction"),
        ({"optimizer": {"schedule": {"decay": "linear"}}}, "no end"),
        ({"data": {"partitions": ["a"]}}, "by one pattern"),
    ],
)
def test_what_cannot_wait_is_refused(days, day_config, tmp_path, changes, says):
    tree = yaml.safe_load(day_config().read_text())
    for part, values in changes.items():
        tree[part].update(values)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=says):
        train(path, tmp_path / "run", poll_s=0.1)


def test_a_marker_says_that_a_day_is_complete(days, day_config, tmp_path):
    each = {"each": str(tmp_path / "days" / "day=*"), "marker": "_DONE"}
    config = day_config(data={"train": None, "partitions": each, "label": "clicked"})
    heard = []

    def follow(sentence):
        heard.append(sentence)
        if sentence.startswith("Waits for partitions"):
            (tmp_path / "days" / "day=1" / "_DONE").touch()
        if sentence.startswith("Waits for the partition after day=1"):
            (tmp_path / "days" / "day=2" / "_DONE").touch()
        if sentence.startswith("Waits for the partition after day=2"):
            os.kill(os.getpid(), signal.SIGTERM)

    told = Told(follow)
    assert train(config, tmp_path / "run", told, poll_s=0.1).stopped_by == "SIGTERM"
    assert json.loads((tmp_path / "run" / "inventory.json").read_text())["names"] == ["day=1", "day=2"]
    assert len(told.losses) == 4


def test_a_bar_on_a_terminal_grows_with_the_run(days, day_config, tmp_path):
    """A second live bar would be an error."""
    days(3).rename(tmp_path / "day=3")
    shown = io.StringIO()
    reporter = ConsoleReporter(Console(file=shown, force_terminal=True, width=100), 1)

    def follow(sentence):
        if sentence.startswith("Waits for the partition after day=2"):
            (tmp_path / "day=3").rename(tmp_path / "days" / "day=3")
        if sentence.startswith("Waits for the partition after day=3"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(day_config(), tmp_path / "run", Reporters([reporter, Told(follow)]), poll_s=0.1).step == 6
    reporter.finished()
    assert "step 6/6" in shown.getvalue()


def test_rows_are_held_out_of_the_days_that_are_new_and_the_run_is_evaluated_by_itself(days, day_config, tmp_path):
    data = {
        "train": None, "partitions": {"each": str(tmp_path / "days" / "day=*")}, "label": "clicked",
        "validation": None, "validation_fraction": 0.2, "test": None,
    }  # fmt: skip
    config = day_config(data=data, evaluate={"metrics": ["auc", "recall@5"]})
    train(config, tmp_path / "first")
    days(3)
    days(4)
    told = Told()
    train(config, tmp_path / "second", told, continues=tmp_path / "first")
    assert sum(json.loads((tmp_path / "second" / "inventory.json").read_text())["partition_rows"]) == 96
    assert result_of(tmp_path / "second")["evaluated"]["validation"]["rows"] == 24
    assert audit_run(RunDirectory(tmp_path / "second"), {}).is_proved
    days(5)  # a run is evaluated on its own data, whatever has come since
    found = evaluate_here(tmp_path / "second", None, "cpu", {})
    last = [values for _, values in told.values if "validation/auc" in values][-1]
    assert found["validation"] == {"auc": last["validation/auc"], "recall@5": last["validation/recall@5"]}


def test_what_former_runs_trained_is_known(days, day_config, tmp_path):
    """The items of a hashed table, and how often each is met, are those of all days."""
    changes = {
        "tables": {"item": {"rows": None, "vocabulary": {"kind": "hash", "rows": 1000}}},
        "objective": {"kind": "sampled_softmax", "num_negatives": 16, "distribution": "popularity"},
        "evaluate": {"metrics": ["recall@5"]},
    }
    config = day_config(**changes)
    train(config, tmp_path / "first")
    days(3, rows=8)
    train(config, tmp_path / "second", continues=tmp_path / "first")
    with open_world("cpu") as world:
        loaded = RunDirectory(tmp_path / "second").load_config({}).config
        kept = json.loads((tmp_path / "second" / "inventory.json").read_text())
        dataset = open_dataset(loaded, world, kept)
        counts = dataset.count_ids("item_id", 1000, world)
        assert counts.sum() == 60 + 60 + 8
        assert len(dataset.catalogue) == (counts > 0).sum() > 8
        assert sum(len(users) for users, _ in dataset.interactions(including_validation=False)) == 128


def test_rows_that_are_set_aside_are_not_validated(days, day_config, tmp_path):
    part = tmp_path / "days" / "day=2" / "part.parquet"
    table = pq.read_table(part)
    labels = [None if place < 4 else value for place, value in enumerate(table["clicked"].to_pylist())]
    place = table.schema.get_field_index("clicked")
    pq.write_table(table.set_column(place, "clicked", pa.array(labels, pa.int8())), part)
    data = {
        "train": None, "partitions": {"each": str(tmp_path / "days" / "day=*")}, "label": "clicked",
        "validation": None, "test": None, "on_bad_row": "quarantine", "max_bad_fraction": 0.1,
    }  # fmt: skip
    config = day_config(data=data, evaluate={"metrics": ["auc", "log_loss"], "progressive": True})
    train(config, tmp_path / "run")
    assert [one["rows"] for one in result_of(tmp_path / "run")["progressive"]] == [60, 56]


def test_several_classes_are_validated_by_day(days, day_config, tmp_path):
    data = {
        "train": None, "partitions": {"each": str(tmp_path / "days" / "day=*")}, "label": "clicked",
        "validation": None, "test": None,
    }  # fmt: skip
    tree = yaml.safe_load(day_config(data=data).read_text())
    tree["model"] = {"kind": "text_classifier", "features": ["user_id", "item_id", "history"]}
    tree["features"]["user_id"] = {"kind": "bag", "table": "user", "column": "history"}
    tree["features"]["item_id"] = {"kind": "bag", "table": "item", "column": "history"}
    tree["objective"] = {"kind": "cross_entropy", "classes": 3}
    tree["evaluate"] = {"metrics": ["accuracy", "f1", "log_loss"], "progressive": True}
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(tree))
    train(path, tmp_path / "run")
    found = result_of(tmp_path / "run")["progressive"]
    assert [one["rows"] for one in found] == [60, 60]
    assert {"accuracy", "f1", "log_loss", "f1:0", "f1:1"} <= set(found[0])


@pytest.mark.parametrize(
    "vocabulary", [{"kind": "auto", "min_count": 1}, {"kind": "managed", "rows": 64, "admission": {"min_count": 1}}]
)
def test_vocabularies_go_on(days, day_config, tmp_path, vocabulary):
    """The ids of the first days keep their rows; with a managed vocabulary the new days' ids get theirs."""
    config = day_config(tables={"item": {"rows": None, "vocabulary": vocabulary}})
    tree = yaml.safe_load(config.read_text())
    for name in ("item_id", "history"):
        tree["features"][name]["unknown"] = "oov"
    config.write_text(yaml.safe_dump(tree))
    train(config, tmp_path / "first")
    day_3 = days(3) / "part.parquet"
    table = pq.read_table(day_3)
    items = pa.array([1000 + place % 7 for place in range(len(table))], pa.int64())
    pq.write_table(table.set_column(table.schema.get_field_index("item_id"), "item_id", items), day_3)
    train(None, tmp_path / "second", continues=tmp_path / "first")
    assert audit_run(RunDirectory(tmp_path / "second"), {}).is_proved
    rows = {}
    for name in ("first", "second"):
        extract_here(tmp_path / name, tmp_path / f"{name}.parquet", {}, table="item")
        content = pq.read_table(tmp_path / f"{name}.parquet")
        rows[name] = dict(zip(content["id"].to_pylist(), content["row"].to_pylist(), strict=True))
    assert rows["first"].items() <= rows["second"].items()
    assert {id_ for id_ in rows["second"] if id_ >= 1000} == (
        set(range(1000, 1007)) if vocabulary["kind"] == "managed" else set()
    )
