"""Rows that begin with another run's vectors: in any world, under any plan, once."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.config import build_config
from embedshard.errors import ConfigError, DataError
from embedshard.launch.extract import extract_here
from embedshard.sharding.shards import weight_shards
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.rehearsal import Rehearsal
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.train.warm_start import warm_start
from embedshard.world import open_world

DIM = 8


def vectors(ids, seed=0, kind=np.float32):
    return np.random.default_rng(seed).normal(size=(len(ids), DIM)).astype(kind)


def write(path, ids, values, fixed=False, **options):
    flat = pa.array(values.ravel())
    lists = (
        pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        if fixed
        else pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1) * values.shape[1], pa.int32()), flat)
    )
    pq.write_table(pa.table({"key": ids, "vec": lists}), path, **options)


@pytest.fixture
def start(make_config):
    """A function that assembles a config, warm; returns the counts and the item table before and after."""

    def start(parquet, **item):
        source = {"parquet": str(parquet), "id": "key", "vector": "vec"}
        config = make_config({"tables": {"item": {"init_from": source, **item}}}).config
        with open_world("cpu") as world:
            parts = assemble(config, world)
            (weight,) = [shard.tensor for shard in weight_shards(parts.model) if shard.table == "item"]
            before = weight.clone()
            found = warm_start(config, parts.dataset.vocabularies, parts.model, world)
            return found["item"], before, weight.clone()

    return start


@pytest.mark.parametrize(("dtype", "kind", "fixed"), [("fp32", np.float32, False), ("fp16", np.float64, True)])
def test_rows_begin_with_the_vectors_of_their_ids_and_the_others_as_init_says(start, tmp_path, dtype, kind, fixed):
    for number, ids in enumerate(([3, 29, 5], [0, 400, 7, 30])):
        write(tmp_path / f"{number}.parquet", pa.array(ids, pa.int32()), vectors(ids, number, kind), fixed, row_group_size=2)
    found, before, after = start(tmp_path / "*.parquet", dtype=dtype)
    assert (found.files, found.vectors, found.matched, found.missing, found.not_in_vocabulary) == (2, 7, 5, 25, 2)
    for number, ids in enumerate(([3, 29, 5], [0, 400, 7, 30])):
        for place, id_ in enumerate(ids):
            if id_ < 30:  # 30 is the row for unknown ids: nobody's vector
                assert torch.equal(after[id_], torch.from_numpy(vectors(ids, number, kind)[place]).to(after))
                before[id_] = after[id_]
    assert torch.equal(before, after)


def test_ids_of_a_file_and_words_are_found_by_their_vocabulary(make_config, start, tmp_path):
    pq.write_table(pa.table({"id": np.arange(30)[::-1]}), tmp_path / "items.parquet")
    write(tmp_path / "v.parquet", pa.array([0, 28]), vectors([0, 28]))
    vocabulary = {"kind": "file", "path": str(tmp_path / "items.parquet")}
    found, _, after = start(tmp_path / "v.parquet", rows=None, vocabulary=vocabulary)
    assert (found.matched, found.missing) == (2, 28)
    assert torch.equal(after[[29, 1]], torch.from_numpy(vectors([0, 28])))

    texts = pa.table({"text": ["red wine", "red car", "blue wine"] * 40, "label": [0, 1, 0] * 40})
    pq.write_table(texts, tmp_path / "texts.parquet")
    write(tmp_path / "words.parquet", pa.array(["wine", "green"]), vectors("ab"))
    tree = {
        "data": {"train": str(tmp_path / "texts.parquet"), "label": "label", "lanes": 4},
        "features": {"text": {"kind": "text", "table": "words", "pooling": "mean"}},
        "tables": {
            "words": {
                "dim": DIM, "vocabulary": "words",
                "init_from": {"parquet": str(tmp_path / "words.parquet"), "id": "key", "vector": "vec"},
            }
        },
        "model": {"kind": "text_classifier", "features": ["text"]},
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 32},
    }  # fmt: skip
    config = build_config(tree, {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        found = warm_start(config, parts.dataset.vocabularies, parts.model, world)["words"]
        assert (found.matched, found.missing, found.not_in_vocabulary) == (1, 3, 1)
        row = int(parts.dataset.vocabularies["words"].map_strings(pa.array(["wine"], pa.large_string()))[0])
        (weight,) = [shard.tensor for shard in weight_shards(parts.model)]
        assert torch.equal(weight[row], torch.from_numpy(vectors("ab")[0]))


@pytest.mark.parametrize(
    ("ids", "values", "says"),
    [
        ([1, 2, 1], vectors("abc"), r"1 ids have a vector already: 1\."),
        ([1, 2, 3], vectors("abc")[:, :4], r"vectors of 4 numbers, and tables.item.dim is 8"),
        ([1, 2, 3], np.where(vectors("abc") > 0, np.nan, 0), "holds nan"),
        ([1, 2, 3], vectors("abc") * 1e6, "which a table of fp16 does not"),
        (["a", "b", "c"], vectors("abc"), "holds strings"),
        ([1, None, 3], vectors("abc"), "1 ids are null"),
    ],
)
def test_what_a_row_cannot_begin_with_is_an_error(start, tmp_path, ids, values, says):
    write(tmp_path / "v.parquet", pa.array(ids), values)
    with pytest.raises(DataError, match=says) as caught:
        start(tmp_path / "v.parquet", dtype="fp16")
    assert re.search(r"tables.item.init_from: .*v\.parquet", str(caught.value))


def test_an_id_in_two_files_and_a_column_that_is_not_there_are_errors(start, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", pa.array([1, 2 if name == "a" else 3]), vectors("ab"))
    with pytest.raises(DataError, match=r"b\.parquet, rows 0 to 1: 1 ids have a vector already: 1\."):
        start(tmp_path / "*.parquet")
    pq.write_table(pa.table({"key": [1], "vector": [[0.0] * DIM]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"has no column 'vec'\. Did you mean 'vector'"):
        start(tmp_path / "b.parquet")


@pytest.mark.parametrize("kind", ["hash", "managed"])
def test_where_a_row_is_not_one_ids_it_is_refused(make_config, kind):
    vocabulary = {"kind": kind, "rows": 9}
    with pytest.raises(ConfigError, match="a row is not one id's"):
        make_config({"tables": {"item": {"rows": None, "vocabulary": vocabulary, "init_from": {"parquet": "x"}}}})


def test_a_round_trip_through_extract_and_a_resumed_run_that_does_not_read_again(
    make_config, run_tree, tmp_path, saved_tensors, assert_same_tensors
):
    changes = {"train": {"epochs": 1}, "evaluate": {"metrics": []}}
    run_tree(make_config(changes).tree, tmp_path / "first")
    extract_here(tmp_path / "first", tmp_path / "v.parquet", {}, table="item")
    extract_here(tmp_path / "first", tmp_path / "u.parquet", {}, table="user", ids=["1", "2", "3"])
    files = {"item": str(tmp_path / "v.parquet"), "user": str(tmp_path / "u.parquet")}
    warm = {"tables": {name: {"init_from": {"parquet": file}} for name, file in files.items()}}
    loaded = make_config(changes | warm | {"train": {"max_steps": 0}})
    result = run_tree(loaded.tree, tmp_path / "started")
    assert result["warm_start"]["item"] | {"files": 1} == {
        "table": "item", "files": 1, "vectors": 30, "matched": 30, "missing": 0, "not_in_vocabulary": 0,
    }  # fmt: skip
    assert result["warm_start"]["user"]["missing"] == 37

    loaded = make_config(changes | warm | {"train": {"epochs": 1}})
    run_tree(loaded.tree, tmp_path / "whole")
    run = RunDirectory.create(tmp_path / "cut", loaded)

    class Stop(Reporter):
        def stepped(self, step, epoch, loss, samples_per_second):
            notices.stop = "SIGTERM"

    notices = Notices()
    with open_world("cpu") as world:
        assert train(loaded.config, world, run, Stop(), notices=notices).step == 2
    (tmp_path / "v.parquet").unlink()
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporter(), newest_intact(run.checkpoints))
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "cut"))
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["warm_start"]["item"]["matched"] == 30


def test_every_plan_in_every_world_begins_with_the_same_rows(make_config, groups, tmp_path):
    ids = list(range(0, 30, 2))
    write(tmp_path / "v.parquet", pa.array(ids), vectors(ids))
    begun = {}
    for size, kinds in ((1, ["table_wise"]), (2, ["table_wise", "row_wise", "column_wise", "data_parallel"])):
        for kind in kinds:
            sharding = {"type": kind}
            source = {"parquet": str(tmp_path / "v.parquet"), "id": "key", "vector": "vec"}
            item = {"init_from": source, "sharding": sharding, "optimizer": {"kind": "adagrad"}}
            changes = {
                "tables": {"item": item, "user": {"sharding": {"type": "table_wise"}}},
                "sharding": {"planner": "explicit"}, "model": {"biases": []},
            }  # fmt: skip
            outcome = groups[size].run(Rehearsal(make_config(changes).config, last=1))
            begun[size, kind] = outcome.before["tables/item/weight"]
    expected = begun[1, "table_wise"]
    assert np.array_equal(expected[ids], vectors(ids))
    for case, weight in begun.items():
        assert np.array_equal(weight, expected), case
