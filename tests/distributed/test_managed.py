"""Managed vocabularies: the same rows, evictions and weights in every world and plan; resumed; ids of all kinds."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.config import Loaded, build_config
from embedshard.errors import CheckpointError, ConfigError, DataError
from embedshard.launch.checkpoint_diff import diff_here
from embedshard.launch.resize import resize_here
from embedshard.launch.similar import vectors_here
from embedshard.launch.verify import verify_plans
from embedshard.models.objectives.frequency import FrequencyEstimate
from embedshard.sharding.initialise import scattered_rows
from embedshard.sharding.slots import FREE
from embedshard.train.assembly import assemble
from embedshard.train.audit import audit_run
from embedshard.train.checkpoint import find_steps, newest_intact
from embedshard.train.continuation import keep_continuation, take_over
from embedshard.train.loop import train
from embedshard.train.rehearsal import Rehearsal
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world

ROWS, DRIFT = 24, 2**40


def write_drifting(folder, rows=600, strings=False):
    """Interactions whose ids are large numbers (or strings) that drift, in the row itself and in a list."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(4)
    place = np.arange(rows)
    item = DRIFT + place // 12 + generator.zipf(1.5, rows) % 20
    user = generator.integers(0, 50, rows) * 7919
    lists = DRIFT + place.repeat(3) // 12 + generator.zipf(1.5, 3 * rows) % 20
    names = [f"item {number}" for number in item] if strings else item
    items = pa.array([f"item {number}" for number in lists]) if strings else pa.array(lists, pa.int64())
    table = pa.table(
        {
            "user": user,
            "item": names,
            "history": pa.ListArray.from_arrays(pa.array(np.arange(0, 3 * rows + 1, 3), pa.int32()), items),
            "clicked": ((item * 5 + user) % 3 == 0).astype(np.int8),
        }
    )
    pq.write_table(table, folder / "part-0.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    return write_drifting(tmp_path_factory.mktemp("drifting") / "train")


def tree_of(folder, managed=None, **changes):
    vocabulary = {"kind": "managed", "rows": ROWS, "admission": {"min_count": 2}} | (managed or {})
    tree = {
        "seed": 5,
        "data": {"train": str(folder / "*.parquet"), "lanes": 4, "label": "clicked", "shuffle": False},
        "features": {
            "user": {"kind": "id", "table": "user"},
            "item": {"kind": "id", "table": "item"},
            "history": {"kind": "bag", "table": "item"},
        },
        "tables": {
            "user": {"dim": 8, "vocabulary": {"kind": "managed", "rows": 16, "eviction": "lru"}},
            "item": {"dim": 8, "vocabulary": vocabulary},
        },
        "model": {
            "kind": "two_tower",
            "user": {"features": ["user", "history"], "mlp": [8]},
            "item": {"features": ["item"], "mlp": [8]},
            "biases": ["item"],
        },
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "adagrad", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}},
        "train": {"global_batch_size": 24, "epochs": 2},
        "evaluate": {"metrics": ["auc"], "baselines": []},
        "tracking": {"tensorboard": False},
    }
    return tree | changes


def with_plan(tree, kind):
    tables = {name: table | {"sharding": {"type": kind}} for name, table in tree["tables"].items()}
    return tree | {"tables": tables, "sharding": {"planner": "explicit"}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("eviction", "ttl_steps"), [("lfu", None), ("distance_lfu", 6)])
def test_the_same_in_every_world_and_plan(groups, drifting, eviction, ttl_steps):
    managed = {"eviction": eviction, "ttl_steps": ttl_steps}
    outcomes = {}
    for world, kind in ((1, "table_wise"), (2, "row_wise"), (2, "table_wise"), (4, "table_row_wise"), (4, "grid_shard")):
        config = build_config(with_plan(tree_of(drifting, managed), kind), {}, "test")
        outcomes[world, kind] = groups[world].run(Rehearsal(config, last=40, notes_state=True))
    expected = outcomes.pop((1, "table_wise"))
    held = expected.after["vocabularies/item/ids"]
    assert (held != FREE).sum() >= ROWS // 2
    assert len(np.intersect1d(held, np.arange(DRIFT, DRIFT + 10))) < 10, "ids of the beginning have lost their rows"
    for case, found in outcomes.items():
        np.testing.assert_allclose(found.losses[0], expected.losses[0], atol=1e-5, err_msg=str(case))
        assert found.after.keys() == expected.after.keys()
        for name, whole in expected.after.items():
            if name.startswith("vocabularies/"):
                assert np.array_equal(found.after[name], whole), (case, name)
            else:
                np.testing.assert_allclose(found.after[name], whole, atol=1e-5, err_msg=f"{case} {name}")


@pytest.mark.timeout(120)
def test_a_row_that_is_taken_begins_anew(drifting):
    config = build_config(tree_of(drifting, {"admission": {"min_count": 1}}), {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        shards = {(shard.table, shard.kind): shard.tensor for shard in parts.managed._shards()}
        specs = {spec.name: spec for spec in parts.specs}
        slots = parts.managed.by_table["item"].slots
        first = {name: scattered_rows(config.seed, specs[name], np.arange(ROWS)) for name in ("item", "item:bias")}
        checked = 0
        with parts.reader().batches(0, 40) as batches:
            for batch in batches:
                before = slots.ids.copy()
                parts.managed.to_rows(batch, is_training=True)
                changed = np.flatnonzero((before != FREE) & (slots.ids != before))
                for table, values in first.items():
                    assert np.array_equal(shards[table, "weight"][changed].numpy(), values[changed])
                    assert not shards[table, "momentum1"][changed].any()
                rows = parts.managed.to_rows(batch, is_training=False)
                for key, kind in (("item", "weighted"), ("item:bias", "sparse")):
                    ids, held = (getattr(each, kind)[key].values().numpy() for each in (batch, rows))
                    known = held < ROWS
                    assert np.array_equal(slots.ids[held[known]], ids[known]), "no two ids share a row"
                parts.stepper.take(batch, stop_asked=False)
                moved = rows.weighted["item"].values().unique()
                assert shards["item", "momentum1"][moved].any(), "what was looked up was trained"
                checked += len(changed)
        assert checked > 20
        counts = parts.managed.take_counts()["item"]
        assert counts.evicted >= checked
        assert counts.admitted - counts.evicted == counts.used


def run(tree, path, reporter=None, resume=None):
    loaded = Loaded(build_config(tree, {}, "test"), tree, "test")
    directory = RunDirectory.create(path, loaded) if resume is None else RunDirectory.open(path)
    with open_world("cpu") as world:
        return train(loaded.config, world, directory, reporter or Reporter(), resume)


class StopAt(Reporter):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def stepped(self, step, epoch, loss, samples_per_second):
        if step == self.last:
            raise KeyboardInterrupt


class Noting(Reporter):
    def __init__(self):
        super().__init__()
        self.noted = []

    def measured(self, step, values):
        self.noted.append((step, dict(values)))


@pytest.mark.timeout(200)
def test_resumes_exactly(drifting, tmp_path, saved_tensors, assert_same_tensors):
    tree = tree_of(drifting, {"ttl_steps": 9}, checkpoint={"every_steps": 10})
    tree["data"]["validation"] = tree["data"]["train"]
    noting = Noting()
    run(tree, tmp_path / "whole", noting)
    with pytest.raises(KeyboardInterrupt):
        run(tree, tmp_path / "cut", StopAt(27))
    resumed_from = newest_intact(RunDirectory(tmp_path / "cut").checkpoints)
    assert resumed_from.step == 25, "the best so far, at the end of an epoch"
    run(tree, tmp_path / "cut", resume=resumed_from)
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "cut"))
    told = [values for _, values in noting.noted if "train/vocabulary/item/admitted" in values]
    assert sum(values["train/vocabulary/item/admitted"] for values in told) > ROWS
    assert sum(values["train/vocabulary/item/evicted"] for values in told) > 0
    assert told[-1]["train/vocabulary/item/used_rows"] <= ROWS


@pytest.mark.timeout(120)
def test_strings(tmp_path):
    folder = write_drifting(tmp_path / "train", strings=True)
    result = run(tree_of(folder), tmp_path / "run")
    assert result.step == 50


@pytest.mark.timeout(120)
def test_negative_ids_are_refused_or_unknown(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    count = 48
    table = pa.table(
        {
            "user": np.arange(count),
            "item": np.where(np.arange(count) % 4 == 0, -3, np.arange(count)),
            "history": pa.array([[1, 2, 3]] * count),
            "clicked": np.arange(count) % 2,
        }
    )
    pq.write_table(table, folder / "part-0.parquet")
    with pytest.raises(DataError, match=r"'item' is -3, which is not among integers of at least 0, or strings"):
        run(tree_of(folder), tmp_path / "refused")
    tree = tree_of(folder)
    tree["features"]["item"] = tree["features"]["item"] | {"unknown": "oov"}
    run(tree, tmp_path / "unknown")
    result = json.loads((tmp_path / "unknown" / "result.json").read_text())
    assert result["bad_rows"]["train"]["oov"]["item"] == 2 * count // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"managed": {"rows": 3}}, r"shares its rows out among 4 buckets, and there are 3"),
        ({"evaluate": {"metrics": ["recall@5"]}}, r"'recall@5' ranks all items for users by their rows"),
        ({"objective": {"kind": "bpr", "num_negatives": 8}}, r"'bpr' draws items by their rows"),
        ({"evaluate": {"metrics": ["auc"], "baselines": [{"kind": "bias"}]}}, r"'bias' learns a number for each row"),
    ],
)
def test_what_does_not_go_with_it(drifting, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_config(tree_of(drifting, **changes), {}, "test")


def test_buffers_are_torchrecs_interface(drifting):
    config = build_config(tree_of(drifting), {}, "test")
    with open_world("cpu") as world:
        rows = assemble(config, world).managed.by_table["item"]
        assert rows.output_size() == ROWS + 1
        assert rows.buckets() == 4
        assert rows.open_slots().item() == ROWS
        half = rows.rebuild_with_output_id_range((0, ROWS // 2), [0, ROWS])
        assert half.open_slots().item() == ROWS // 2
        assert isinstance(rows.get_buffer("ids"), torch.Tensor)


def vectors(path):
    ids, vectors_of = vectors_here(path, {}, table="item")
    return {id_: vector for id_, vector in zip(ids, vectors_of, strict=True) if id_ is not None}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("rows", [61, 11])
def test_another_number_of_rows(drifting, tmp_path, rows, saved_tensors):
    tree = tree_of(drifting, checkpoint={"every_steps": 10, "keep": 2})
    tree["tables"]["user"]["vocabulary"]["rows"] = 50
    tree["data"]["validation"] = tree["data"]["train"]
    with pytest.raises(KeyboardInterrupt):
        run(tree, tmp_path / "run", StopAt(44))
    _, before = saved_tensors(tmp_path / "run")
    had = vectors(tmp_path / "run")
    found = diff_here(tmp_path / "run", 30, 40, {})
    item = next(table for table in found.tables if table.table == "item")
    assert item.changed_hands > 0
    assert item.moved + item.changed_hands <= ROWS + 1
    assert {moved.id for moved in item.most_moved} <= {*had, None}
    assert not any(tensor.name.startswith("vocabularies/") for tensor in found.tensors)
    steps = find_steps(RunDirectory(tmp_path / "run").checkpoints)
    done = resize_here(tmp_path / "run", "item", rows, {})
    assert [one.step for one in done] == steps
    _, after = saved_tensors(tmp_path / "run")
    has = vectors(tmp_path / "run")
    assert len(has) == done[-1].kept == (len(had) if rows > ROWS else rows)
    assert done[-1].lost == len(had) - len(has)
    for id_, vector in has.items():
        assert np.array_equal(vector, had[id_])
    assert torch.equal(after["tables/item/weight"][-1], before["tables/item/weight"][-1]), "unknown ids' row"
    ids, old_ids = after["vocabularies/item/ids"].numpy(), before["vocabularies/item/ids"].numpy()
    for row in np.flatnonzero(ids != FREE):
        old = int(np.flatnonzero(old_ids == ids[row])[0])
        for state in ("tables/item/momentum1", "tables/item:bias/weight", "vocabularies/item/counts"):
            assert torch.equal(after[state][row], before[state][old])
    kept_counts = after["vocabularies/item/counts"].sum()
    assert kept_counts <= before["vocabularies/item/counts"].sum()
    free = np.flatnonzero(ids == FREE)
    assert not after["tables/item/momentum1"][free].any()
    directory = RunDirectory.open(tmp_path / "run")
    config = directory.load_config({}).config
    with open_world("cpu") as world:
        result = train(config, world, directory, Reporter(), newest_intact(directory.checkpoints))
    assert result.step == 50
    assert audit_run(directory, {}).is_proved


def test_only_a_managed_table_can_be_resized(drifting, tmp_path):
    tree = tree_of(drifting)
    tree["tables"]["user"] = {"dim": 8, "vocabulary": {"kind": "hash", "rows": 30}}
    directory = RunDirectory.create(tmp_path / "run", Loaded(build_config(tree, {}, "test"), tree, "test"))
    with pytest.raises(ConfigError, match="'user' has the vocabulary 'hash'"):
        resize_here(directory.folder, "user", 40, {})
    with pytest.raises(ConfigError, match=r"there is no table 'itme'\. Did you mean 'item'"):
        resize_here(directory.folder, "itme", 40, {})
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet\. Start it anew .* tables\.item\.vocabulary\.rows=40"):
        resize_here(directory.folder, "item", 40, {})


@pytest.mark.timeout(300)
def test_verify_covers_it(drifting, groups):
    config = build_config(tree_of(drifting), {}, "test")
    found = verify_plans(config, steps=6, worlds=(1, 2), types=("row_wise", "data_parallel"), groups=groups)
    by_status = {status: [case for case in found.cases if case.status == status] for status in ("pass", "fail", "n/a")}
    assert not by_status["fail"]
    assert any("change hands" in case.describe() for case in by_status["n/a"])
    assert by_status["pass"]


@pytest.mark.timeout(200)
def test_continues_with_the_ids_it_has(drifting, tmp_path):
    folder = tmp_path / "days"
    for day in (1, 2):
        write_drifting(folder / f"day={day}", rows=240)
    tree = tree_of(drifting, {"ttl_steps": 8})
    tree["data"] = {"partitions": [str(folder / "day=1" / "*.parquet")], "lanes": 4, "label": "clicked", "shuffle": False}
    tree["train"] = {"global_batch_size": 24, "epochs": 1}
    run(tree, tmp_path / "first")
    before = RunDirectory.open(tmp_path / "first")
    both = json.loads(json.dumps(tree))
    both["data"]["partitions"].append(str(folder / "day=2" / "*.parquet"))
    other = json.loads(json.dumps(both))
    other["data"]["lanes"] = 8
    with pytest.raises(ConfigError, match=r"tables\.item\.vocabulary\.buckets: 4 in the run, 8 now"):
        take_over(before, Loaded(build_config(other, {}, "test"), other, "test"), {})
    both["train"]["metrics"] = ["auc"]  # begins with this run, though the former had none
    loaded = Loaded(build_config(both, {}, "test"), both, "test")
    continues, _ = take_over(before, loaded, {})
    directory = RunDirectory.create(tmp_path / "second", loaded)
    keep_continuation(directory, continues)
    with open_world("cpu") as world:
        train(loaded.config, world, directory, Reporter())
    ids, _ = vectors_here(tmp_path / "second", {}, table="item")
    assert len([id_ for id_ in ids if id_ is not None]) > 3
    last = newest_intact(directory.checkpoints)
    steps = torch.empty(last.tensors["vocabularies/item/last_steps"].shape, dtype=torch.int64)
    last.read_into([("vocabularies/item/last_steps", (0,), steps)])
    assert steps.max() == last.step - 1, "steps are this run's"


def test_ids_with_the_same_low_bits_are_told_apart_by_log_q():
    estimate = FrequencyEstimate(None, 2**10, None)
    ids = torch.arange(100) << 22
    estimate.update(ids)
    assert (estimate.probability(ids) < 0.05).all()
    assert FrequencyEstimate(200, 2**10, None).buckets == 200
