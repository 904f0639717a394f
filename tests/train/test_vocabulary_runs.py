"""Runs whose vocabularies are counted: made once, kept with the run, found again by all that look at it."""

import json
import shutil
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from embedshard.cli import app
from embedshard.config import Loaded, build_config
from embedshard.data.check import check_data
from embedshard.data.dataset import Dataset, open_dataset
from embedshard.data.partitions import Partition
from embedshard.data.source import Source
from embedshard.data.survey import Wanted, take_survey
from embedshard.errors import ConfigError, DataError
from embedshard.launch.local import evaluate_here, summarise_config, train_in
from embedshard.launch.planning import plan_here
from embedshard.launch.request import TrainRequest
from embedshard.launch.similar import similar_here
from embedshard.storage import locate
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.world import open_world


def write_rows(folder, rows, seed, items):
    generator = np.random.default_rng(seed)
    table = {
        "user": [f"u{number}" for number in generator.zipf(1.5, rows) % 40],
        "item": (generator.zipf(1.3, rows) % items) * 1000 + 7,
        "label": generator.integers(0, 2, rows).astype(np.float32),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "part-0.parquet", row_group_size=50)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with train/ and test/; test has items that train has not."""
    root = tmp_path_factory.mktemp("rows")
    write_rows(root / "train", 203, 1, 30)
    write_rows(root / "test", 60, 2, 60)
    return root


def loaded(root, **changes):
    tree = {
        "data": {"train": f"{root}/train", "test": f"{root}/test", "lanes": 4},
        "features": {
            "user": {"kind": "id", "table": "user", "unknown": "oov"},
            "item": {"kind": "id", "table": "item", "unknown": "oov"},
        },
        "tables": {
            "user": {"dim": 4, "vocabulary": {"kind": "auto", "min_count": 2}},
            "item": {"dim": 4, "vocabulary": "auto"},
        },
        "model": {"kind": "two_tower", "user": {"features": ["user"]}, "item": {"features": ["item"]}},
        "objective": {"kind": "sampled_softmax", "num_negatives": 8, "distribution": "popularity"},
        "train": {"global_batch_size": 32, "epochs": 2},
        "evaluate": {"metrics": ["recall@5"]},
        "tracking": {"tensorboard": False},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for name in parents:
            node = node[name]
        node[last] = value
    return Loaded(build_config(tree, {}, "test"), tree, "test")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("lable", "has no column 'lable', which 'label:lable' needs. Did you mean 'label'?"),
        ("user", "column 'user' is string, 'label:user' needs"),
    ],
)
def test_a_wrong_column_is_told_before_vocabularies_are_counted(rows, monkeypatch, label, words):
    monkeypatch.setattr("embedshard.data.dataset.build_vocabularies", lambda *_, **__: pytest.fail("all data were read"))
    config = loaded(rows, data__label=label, objective={"kind": "bce"}, evaluate={"metrics": ["auc"]}).config
    with open_world("cpu") as world, pytest.raises(DataError) as caught:
        open_dataset(config, world, None)
    assert words in str(caught.value)


class StopAt(Reporter):
    """Asks for a stop after a step, and keeps what was told."""

    def __init__(self, notices, step):
        self._notices, self._step = notices, step
        self.prepared_rows, self.losses = [], {}

    def prepared(self, what, done, total):
        self.prepared_rows.append((what, done, total))

    def stepped(self, step, epoch, loss, samples_per_second):
        self.losses[step] = loss
        if step == self._step:
            self._notices.stop = "SIGTERM"


def run(config, run_directory, stop_at=None, resume_from=None):
    notices = Notices()
    reporter = StopAt(notices, stop_at)
    with open_world("cpu") as world:
        train(config.config, world, run_directory, reporter, resume_from, notices)
    return reporter


def test_a_run_keeps_its_vocabularies_and_goes_on_with_them_bit_for_bit(rows, tmp_path, saved_tensors, assert_same_tensors):
    config = loaded(rows)
    whole = RunDirectory.create(tmp_path / "whole", config)
    heard = run(config, whole)
    assert heard.prepared_rows[0] == ("vocabulary of table 'user'", 0, 203)
    assert heard.prepared_rows[-1] == ("vocabulary of table 'item'", 203, 203)
    folder = tmp_path / "whole" / "vocabularies"
    assert sorted(path.name for path in folder.iterdir()) == ["item.parquet", "user.parquet"]
    kept = pq.read_table(folder / "item.parquet")
    assert kept.column_names == ["id", "count", "row"]
    assert sum(kept["count"].to_pylist()) == 203
    assert whole.read_json("inventory.json")["table_rows"]["item"] == kept.num_rows
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    row, count, id_ = result["ids"]["features"]["item"]["hottest"][0]
    assert {"id": id_, "count": count, "row": row} == kept.slice(row, 1).to_pylist()[0]
    assert result["bad_rows"]["train"]["oov"]["user"] > 0, "users who are met once share a row"
    assert result["bad_rows"]["test"]["oov"]["item"] > 0

    stopped = RunDirectory.create(tmp_path / "stopped", config)
    first = run(config, stopped, stop_at=5)
    again = run(config, stopped, resume_from=newest_intact(stopped.checkpoints))
    assert first.prepared_rows
    assert not again.prepared_rows, "nothing is counted anew"
    assert first.losses | again.losses == heard.losses
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "stopped"))


def test_all_that_looks_at_a_run_uses_the_vocabulary_that_was_kept(rows, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(rows, data)
    config = loaded(data)
    directory = RunDirectory.create(tmp_path / "run", config)
    run(config, directory, stop_at=4)
    before = evaluate_here(tmp_path / "run", None, "cpu", {})
    kept = tmp_path / "run" / "vocabularies" / "item.parquet"
    ids = pq.read_table(kept)["id"].to_pylist()
    found = similar_here(tmp_path / "run", str(ids[3]), 2, {}, table="item")
    assert found.query.row == 3
    assert {near.id for near in found.neighbours} <= set(ids)
    content = kept.read_bytes()
    shutil.rmtree(data / "train")  # what is kept is not counted again
    assert similar_here(tmp_path / "run", str(ids[3]), 2, {}, table="item") == found
    shutil.copytree(rows / "train", data / "train")
    pq.write_table(pq.read_table(kept).take([1, 0, *range(2, len(ids))]), kept)
    with pytest.raises(DataError, match="table 'item': its vocabulary is another"):
        evaluate_here(tmp_path / "run", None, "cpu", {})
    kept.unlink()
    with pytest.raises(DataError, match=r"vocabularies/item\.parquet is not there"):
        evaluate_here(tmp_path / "run", None, "cpu", {})
    kept.write_bytes(content)
    assert evaluate_here(tmp_path / "run", None, "cpu", {}) == before


@pytest.mark.parametrize("item", [{"kind": "auto"}, {"kind": "auto", "max_size": 12}])
def test_popularity_and_slices_come_from_the_counts_and_are_what_a_pass_would_count(rows, tmp_path, monkeypatch, item):
    config = loaded(rows, tables__item__vocabulary=item).config
    wanted = Wanted(item_counts=True)
    with monkeypatch.context() as patched, open_world("cpu") as world:
        patched.setattr(Dataset, "known_counts", lambda *_: None)
        dataset = open_dataset(config, world, None, folder=locate(tmp_path))
        log_q, counts = dataset.sampler._log_q_of_row, take_survey(dataset, wanted).item_counts

    def no_pass(*_):
        raise AssertionError("a pass is made over the data")

    monkeypatch.setattr("embedshard.data.dataset.count_ids", no_pass)
    monkeypatch.setattr(Source, "read_row_group", no_pass)
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None, folder=locate(tmp_path))
        assert np.array_equal(dataset.sampler._log_q_of_row, log_q)
        assert np.array_equal(take_survey(dataset, wanted).item_counts, counts)
    assert counts.sum() == 203
    assert (counts[-1] > 0) == ("max_size" in item)


def test_counts_that_are_kept_nowhere_are_counted_again(rows):
    with open_world("cpu") as world:
        dataset = open_dataset(loaded(rows).config, world, None)
    assert dataset.known_counts("item") is None, "its file was there for as long as it was loaded"
    assert np.isfinite(dataset.sampler._log_q_of_row[:-1]).all()


def test_counts_that_mean_something_else_are_not_taken(rows, tmp_path):
    def known(made_from, folder):
        with open_world("cpu") as world:
            return open_dataset(made_from.config, world, None, folder=locate(folder)).known_counts("item")

    def from_file(**changes):
        vocabulary = {"kind": "file", "path": str(tmp_path / "a" / "item.parquet")}
        return loaded(rows, tables__item__vocabulary=vocabulary, **changes)

    assert known(loaded(rows), tmp_path / "a") is not None
    assert known(from_file(), tmp_path / "b") is not None
    assert known(from_file(data__on_bad_row="quarantine"), tmp_path / "b") is None, "rows may be set aside"
    assert known(from_file(data__train=f"{rows}/test"), tmp_path / "b") is None, "of other files"
    other = {"kind": "id", "table": "item", "column": "item", "unknown": "oov"}
    assert known(from_file(features__again=other), tmp_path / "b") is not None, "the file still says how often items are met"
    shared = loaded(rows, features__again=other)
    assert known(shared, tmp_path / "c") is None, "two features were counted together"
    table = pq.read_table(tmp_path / "a" / "item.parquet")
    pq.write_table(table.select(["id"]).replace_schema_metadata(table.schema.metadata), tmp_path / "a" / "item.parquet")
    assert known(from_file(), tmp_path / "b") is None, "its counts are gone"


def test_a_config_without_a_run_counts_for_itself_or_says_what_it_needs(rows, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(loaded(rows).tree))
    path = tmp_path / "config.yaml"
    distinct = len(set(pq.read_table(rows / "train")["item"].to_pylist()))
    planned = plan_here(path, [], 1, "cpu", {}, Console(file=StringIO()))
    assert planned.draft.plan.depends_on["item"]["rows"] == distinct + 1
    assert planned.sample.features["item"].found.distinct_rows == distinct
    with pytest.raises(DataError, match=r"--set tables\.user\.vocabulary\.max_size=1000000"):
        plan_here(path, ["data.train=nowhere"], 1, "cpu", {}, Console(file=StringIO()))
    sizes = [f"tables.{table}.vocabulary.max_size=5" for table in ("user", "item")]
    unread = plan_here(path, ["data.train=nowhere", *sizes], 1, "cpu", {}, Console(file=StringIO()))
    assert unread.draft.plan.depends_on["item"]["rows"] == 6
    with pytest.raises(ConfigError, match=r"user\.vocabulary is auto.*max_size=1000000; or count them"):
        summarise_config(path, [], {})
    found = {row.name: row for row in summarise_config(path, sizes, {}).tables}
    assert found["item"].shape == (6, 4)
    assert "a run counts the ids" in found["item"].note
    report = check_data(loaded(rows).config)
    assert not report.refused
    test = next(one for one in report.sets if one.name == "test")
    assert next(column for column in test.columns if column.name == "item").unknown > 0
    refused = check_data(loaded(rows, tables__user__vocabulary={"kind": "auto", "min_count": 1000}).config).refused
    assert any("no id is met 1000 times" in reason for reason in refused)
    with pytest.raises(ConfigError, match=r"leave it out\. vocabulary.max_size says how many"):
        loaded(rows, tables__item__rows=5)


def test_the_command_writes_vocabularies_that_a_config_reads_as_files(rows, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, ["vocabulary", "build", str(tmp_path / "config.yaml"), *arguments])

    changed = loaded(rows, tables__user__vocabulary={"kind": "file", "path": str(tmp_path / "made" / "u.parquet")})
    (tmp_path / "config.yaml").write_text(json.dumps(changed.tree))
    done = invoke("--table", "user", "--json", "--min-count", "2")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)[0]
    counts = pq.read_table(tmp_path / "made" / "u.parquet")["count"].to_pylist()
    assert (told["rows"], told["lookups"], told["known_share"]) == (len(counts), 203, sum(counts) / 203)
    again = invoke("--table", "user")
    assert "is there already" in str(again.exception)
    assert invoke("--table", "user", "--min-count", "2", "--replace").exit_code == 0
    assert invoke("--table", "item", "--out", str(tmp_path / "out")).exit_code == 0
    assert "no such table" in str(invoke("--table", "itm").exception)
    assert "give a number of bytes" in str(invoke("--memory", "much").exception)
    from_files = loaded(
        rows,
        tables__user__vocabulary={"kind": "file", "path": str(tmp_path / "made" / "u.parquet")},
        tables__item__vocabulary={"kind": "file", "path": str(tmp_path / "out" / "item.parquet")},
    )
    ready = run(from_files, RunDirectory.create(tmp_path / "ready", from_files), stop_at=3)
    counted = run(loaded(rows), RunDirectory.create(tmp_path / "counted", loaded(rows)), stop_at=3)
    assert ready.losses == counted.losses
    kept = [RunDirectory(tmp_path / name).read_json("inventory.json")["vocabularies"] for name in ("ready", "counted")]
    assert kept[0] == kept[1], "the same ids in the same rows are the same vocabulary"


def test_a_run_that_continues_another_looks_ids_up_by_the_vocabulary_that_the_former_counted(rows, tmp_path):
    days = tmp_path / "days"
    shutil.copytree(rows / "train", days / "day=1")
    tree = loaded(rows).tree
    tree["data"] = {"partitions": {"each": f"{days}/day=*"}, "lanes": 4}
    tree["train"] = {"global_batch_size": 32}
    tree["evaluate"] = {"metrics": []}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))

    def trained(name, continues=None):
        request = TrainRequest(config=tmp_path / "config.yaml", run_dir=tmp_path / name, continues=continues).resolved()
        with open_world("cpu") as world:
            train_in(world, request, {}, Reporter())
        directory = RunDirectory(tmp_path / name)
        return directory.read_json("inventory.json"), directory.read_json("result.json")

    first, _ = trained("first")
    shutil.copytree(rows / "test", days / "day=2")
    second, result = trained("second", continues=tmp_path / "first")
    assert second["names"] == ["day=2"]
    assert second["vocabularies"] == first["vocabularies"]
    files = [tmp_path / name / "vocabularies" / "item.parquet" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    known = set(pq.read_table(files[0])["id"].to_pylist())
    items = pq.read_table(days / "day=2")["item"].to_pylist()
    assert result["bad_rows"]["train"]["oov"]["item"] == sum(item not in known for item in items) > 0


def test_only_the_partitions_of_the_run_are_counted(tmp_path):
    write_rows(tmp_path / "day=1", 60, 3, 20)
    (tmp_path / "day=2").mkdir()
    (tmp_path / "day=2" / "part-0.parquet").write_bytes(b"PAR1 is being written")
    config = loaded(tmp_path, data={"partitions": {"each": f"{tmp_path}/day=*"}, "lanes": 4}, evaluate={}).config
    whole = Partition("day=1", (f"{tmp_path}/day=1",))
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None, partitions=[whole])
    met = set(pq.read_table(tmp_path / "day=1")["item"].to_pylist())
    assert dataset.table_rows["item"] == len(met)
    assert dataset.names == ["day=1"]
