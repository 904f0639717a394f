"""A share of the training rows is held out: never trained, and the validation set, in every world and however it is read."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config, table_specs
from embedshard.data.check import check_data
from embedshard.data.collate import Collator
from embedshard.data.columns import concatenate
from embedshard.data.dataset import open_dataset
from embedshard.data.lookup_sample import sample_lookups
from embedshard.data.reader import BatchReader
from embedshard.data.split import Split
from embedshard.data.survey import Wanted, take_survey
from embedshard.errors import ConfigError, DataError
from embedshard.train.audit import audit_run
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.world import open_world

ROWS, FRACTION = 203, 0.25
HELD = Split(FRACTION, 0, ROWS).held_out(0, ROWS)


@pytest.fixture
def numbered(interactions, tmp_path):
    """The training files with ages that are their rows' numbers."""
    root = tmp_path / "data"
    shutil.copytree(interactions, root)
    first = 0
    for path in sorted((root / "train").iterdir()):
        table = pq.read_table(path)
        ages = pa.array(np.arange(first, first + table.num_rows, dtype=np.float64))
        pq.write_table(table.set_column(table.column_names.index("age"), "age", ages), path, row_group_size=50)
        first += table.num_rows
    return root


@pytest.fixture
def split_config(make_config, numbered):
    def make(changes=None, **data):
        data = {"train": str(numbered / "train"), "test": str(numbered / "test"), "validation_fraction": FRACTION, **data}
        if "partitions" in data:
            del data["train"]
        changes = {"features": {"age": {"kind": "dense"}}, **(changes or {}), "data": data}
        return make_config(changes, splits=())

    return make


class Recorder(Reporter):
    def __init__(self, stop_after=None, notices=None):
        self.losses, self.validation, self._stop_after, self._notices = {}, {}, stop_after, notices

    def stepped(self, step, epoch, loss, samples_per_second):
        self.losses[step] = loss
        if step == self._stop_after:
            self._notices.stop = "SIGTERM"

    def measured(self, step, values):
        found = {name: value for name, value in values.items() if name.startswith("validation/")}
        if found:
            self.validation[step] = found


def run(loaded, path, stop_after=None):
    has_begun = path.exists()
    directory = RunDirectory.open(path) if has_begun else RunDirectory.create(path, loaded)
    notices = Notices()
    recorder = Recorder(stop_after, notices)
    with open_world("cpu") as world:
        checkpoint = newest_intact(directory.checkpoints) if has_begun else None
        train(loaded.config, world, directory, recorder, checkpoint, notices)
    return recorder


def read_all(config, rank=0, world_size=1):
    """The ages, which are rows' numbers, of an epoch's batches; of ranks of a larger world too."""
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None)
    collator = Collator(config, table_specs(config, dataset.table_rows))
    reader = BatchReader(
        dataset.order, dataset.train, dataset.cached, config.data.cache_bytes, collator, dataset.sampler, rank, world_size
    )
    with reader.batches(0, dataset.order.epoch_steps) as batches:
        return dataset, list(batches)


def ages(batches):
    return [batch.dense[batch.rows >= 0, 0].to(int).tolist() for batch in batches]


@pytest.mark.parametrize("data", [{}, {"cache_bytes": 0, "window_steps": 2}], ids=["cached", "streamed"])
def test_an_epoch_trains_every_other_row_once_and_the_held_out_rows_are_the_validation_set(split_config, data):
    dataset, batches = read_all(split_config(**data).config)
    trained = np.concatenate(ages(batches))
    np.testing.assert_array_equal(np.sort(trained), np.flatnonzero(~HELD))
    held_out = dataset.read_held_out("validation")
    np.testing.assert_array_equal(held_out["age"].values, np.flatnonzero(HELD))
    assert dataset.order.num_rows == (ROWS - int(ROWS * FRACTION),)
    # Row numbers count the rows that are trained, and lead back to the files.
    rows = np.concatenate([batch.rows[batch.rows >= 0].numpy() for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(~HELD)[rows], trained)
    for row in (0, 70, 152):
        number = int(np.flatnonzero(~HELD)[row])
        file, within = (0, number) if number < 101 else (1, number - 101)
        expected = f"part-{file}.parquet, row group {within // 50}, row {within % 50}"
        assert dataset.describe_row(0, row).endswith(expected), "files have 101 and 102 rows, in row groups of 50"


def test_reading_as_a_stream_in_two_ranks_gives_the_batches_of_one(split_config):
    _, whole = read_all(split_config().config)
    streamed = split_config(cache_bytes=0, window_steps=1000).config
    halves = [ages(read_all(streamed, rank, 2)[1]) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == ages(whole)


def test_partitions_are_split_as_the_files_one_after_another(split_config, numbered):
    partitions = [str(numbered / "train" / f"part-{number}.parquet") for number in (1, 0)]
    dataset, batches = read_all(split_config(partitions=partitions).config)
    number_in_set = np.concatenate([np.arange(101, 203), np.arange(101)])  # the second file comes first
    np.testing.assert_array_equal(dataset.read_held_out("validation")["age"].values, number_in_set[HELD])
    np.testing.assert_array_equal(np.sort(np.concatenate(ages(batches))), np.sort(number_in_set[~HELD]))


def test_another_seed_of_the_run_holds_out_the_same_rows_and_another_validation_seed_does_not(split_config):
    def held(**changes):
        config = split_config({"seed": changes.pop("seed", 11)}, **changes).config
        with open_world("cpu") as world:
            return open_dataset(config, world, None).read_held_out("validation")["age"].values.tolist()

    assert held() == held(seed=12)
    assert held() != held(validation_seed=1)


def test_a_run_is_proved_by_its_audit_and_goes_on_where_it_was_stopped_bit_for_bit(
    split_config, tmp_path, saved_tensors, assert_same_tensors
):
    loaded = split_config({"evaluate": {"metrics": ["recall@5"], "every_steps": 4}})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recorded = run(loaded, whole)
    assert set(recorded.validation) == {4, 8, 10}
    first, second = run(loaded, stopped, stop_after=2), run(loaded, stopped)
    assert set(first.losses) == {1, 2, 3}
    assert first.losses | second.losses == recorded.losses
    assert second.validation == recorded.validation
    assert_same_tensors(saved_tensors(whole), saved_tensors(stopped))
    for path in (whole, stopped):
        found = audit_run(RunDirectory.open(path), {})
        assert found.failures == []
        assert [(one.rows_expected, one.is_whole) for one in found.passes] == [(153, True)] * 2
        assert "50 rows of the training files are held out" in " ".join(found.notes)


def test_an_audit_finds_a_run_that_trained_rows_which_should_be_held_out(split_config, tmp_path):
    """The audit holds the ledger against the rows that the config leaves, not against whatever was read."""
    loaded = split_config({"train": {"epochs": 1}}, validation_seed=1)
    run(loaded, tmp_path / "run")
    config_file = tmp_path / "run" / "config.yaml"
    text = config_file.read_text()
    assert "validation_fraction: 0.25" in text
    config_file.write_text(text.replace("validation_fraction: 0.25", "validation_fraction: 0.2"))
    assert not audit_run(RunDirectory.open(tmp_path / "run"), {}).is_proved


def test_a_run_does_not_go_on_with_another_split(split_config, tmp_path):
    run(split_config({"train": {"max_steps": 3}}), tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    for data in ({"validation_fraction": 0.5}, {"validation_seed": 1}):
        with pytest.raises(ConfigError, match=r"data\.validation_"):
            directory.check_same_run(split_config(**data), {})


def test_what_is_fitted_on_training_rows_does_not_see_the_others(split_config, numbered):
    config = split_config({"features": {"age": {"kind": "dense", "normalise": "standardise"}}}).config
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None)
    assert dataset.statistics.moments["age"][0] == pytest.approx(np.flatnonzero(~HELD).mean())
    items = np.concatenate([pq.read_table(numbered / "train" / f"part-{i}.parquet")["item_id"] for i in (0, 1)])
    survey = take_survey(dataset, Wanted(item_counts=True, id_rows=1000))
    np.testing.assert_array_equal(survey.item_counts, np.bincount(items[~HELD], minlength=31))
    assert survey.rows == survey.rows_counted == 153
    sample = sample_lookups(config, dataset.vocabularies)
    assert (sample.rows, sample.sampled_rows, sample.features["item_id"].found.lookups) == (153, 153, 153)
    pairs = np.concatenate([items for _, items in dataset.interactions(including_validation=True)])
    np.testing.assert_array_equal(np.sort(pairs), np.sort(items))


def test_tokenizers_are_made_of_the_texts_that_are_trained(make_config, tmp_path):
    texts = [f"word{row}" for row in range(100)]
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"text": texts, "label": [0, 1] * 50}), tmp_path / "texts" / "a.parquet", row_group_size=7)
    tree = {
        "data": {"train": str(tmp_path / "texts"), "label": "label", "validation_fraction": 0.1, "lanes": 2},
        "features": {"text": {"kind": "text", "table": "words", "pooling": "mean"}},
        "tables": {"words": {"dim": 4, "vocabulary": {"kind": "words"}}},
        "model": {"kind": "text_classifier", "features": ["text"]},
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 10},
        "evaluate": {"metrics": ["accuracy"]},
    }
    with open_world("cpu") as world:
        dataset = open_dataset(build_config(tree, {}, "test"), world, None)
    held = Split(0.1, 0, 100).held_out(0, 100)
    assert dataset.table_rows["words"] == 90
    ids = dataset.read_held_out("validation")["text"].values
    assert ids.tolist() == [90] * held.sum(), "the words of held-out rows are unknown ones"


def test_bad_rows_are_named_as_the_files_have_them_on_either_side(split_config, numbered, tmp_path):
    path = numbered / "train" / "part-1.parquet"
    table = pq.read_table(path)
    held = HELD[101:]
    bad = [int(np.flatnonzero(~held)[40]), int(np.flatnonzero(held)[20])]
    users = table["user_id"].to_pylist()
    for row in bad:
        users[row] = None
    pq.write_table(table.set_column(0, "user_id", pa.array(users, pa.int32())), path, row_group_size=50)
    places = [(row // 50, row % 50) for row in bad]

    with open_world("cpu") as world:
        source = open_dataset(split_config().config, world, None).train[0]
    with pytest.raises(DataError) as refused:
        concatenate([source.read_row_group(group) for group in range(len(source.inventory.row_groups))])
    assert f"part-1.parquet, row group {places[0][0]}, row {places[0][1]}: column 'user_id'" in str(refused.value)

    loaded = split_config({"train": {"epochs": 1}}, on_bad_row="quarantine", max_bad_fraction=0.1, cache_bytes=0)
    run(loaded, tmp_path / "run")
    for name, place in (("train-*.parquet", places[0]), ("validation.parquet", places[1])):
        (file,) = (tmp_path / "run" / "quarantine").glob(name)
        (row,) = pq.read_table(file).to_pylist()
        assert (row["row_group"], row["row"], row["column"]) == (*place, "user_id")
        assert row["file"].endswith("part-1.parquet")

    report = check_data(split_config().config)
    found = {one.name: one for one in report.sets}
    assert {name: one.rows for name, one in found.items()} == {"train": 153, "validation": 50, "test": 60}
    for name, place in (("train", places[0]), ("validation", places[1])):
        (problem,) = found[name].problems
        assert (problem.reason, problem.rows) == ("null id", 1)
        assert f"part-1.parquet, row group {place[0]}, row {place[1]}: null" in problem.examples[0]
    assert ("validation", "train") in {(known.set_name, known.compared_with) for known in report.known}


def test_a_share_of_less_than_a_row_is_refused(split_config):
    config = split_config(validation_fraction=0.001).config
    with open_world("cpu") as world, pytest.raises(DataError, match=r"=0\.001 of 203 training rows is less than one row"):
        open_dataset(config, world, None)
    assert any("data.validation_fraction=0.001" in reason for reason in check_data(config).refused)
