"""Two processes over gloo take the steps that one takes: the same rows, losses and weights."""

import json
import shutil
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard.train.audit import audit_run
from embedshard.train.audit_report import StepRange
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train as train_run
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world
from tests.commands import start_python

PROGRAM = """
    import json, os, sys
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.sharding.shards import weight_shards
    from embedshard.train.assembly import assemble
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    parts = assemble(load_config(f"{folder}/config.yaml", {}).config, world)
    losses = []
    with parts.reader().batches(0, 10) as batches:
        for batch in batches:
            parts.optimizers.set_learning_rates(batch.position.step, 14)
            losses.append(parts.stepper.take(batch, stop_asked=False).loss)
    shards = [(s.table, s.offset, s.tensor.tolist()) for s in weight_shards(parts.model)]
    metrics = parts.evaluator.evaluate(parts.model, "test")
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({"losses": losses, "shards": shards, "metrics": metrics}, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


RUN = """
    import os, sys
    from pathlib import Path
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.train.checkpoint import newest_intact
    from embedshard.train.loop import train
    from embedshard.train.run_directory import RunDirectory
    from embedshard.train.tracking import Reporter
    from embedshard.world import World

    rank, world_size, folder, last = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

    class BreakOff(Reporter):
        def stepped(self, step, epoch, loss, samples_per_second):
            if step == last:
                os._exit(0)  # at once, as when it is killed

    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{last}", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    run = RunDirectory.open(folder)
    train(load_config(folder / "config.yaml", {}).config, world, run, BreakOff(), newest_intact(run.checkpoints))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


FROM_RANK_ZERO = """
    import json, os, sys, threading
    import torch, torch.distributed as dist
    import embedshard.world
    from embedshard.errors import DataError
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    embedshard.world._SIGN_OF_LIFE_S = 0.01
    sums, signs, has_gone_on = World.sum, [], threading.Event()

    def counted(self, tensor):
        total = sums(self, tensor)
        signs.append(total.item())
        if len(signs) == 3:
            has_gone_on.set()
        return total

    World.sum = counted
    ran = []

    def long_work():
        assert has_gone_on.wait(60), "the others are told that it goes on"
        ran.append("long")
        return {"value": [1, 2.5, None, "x"], "many": torch.arange(1000)}

    def failing_work():
        ran.append("failing")
        raise DataError("part-7.parquet is not there. Make it.")

    value = world.from_rank_zero(long_work)
    found = {"value": value["value"], "last": value["many"][-1].item(), "signs": signs[:3]}
    try:
        world.from_rank_zero(failing_work)
    except Exception as error:
        found["error"] = [type(error).__name__, str(error)]
    found["after"] = world.from_rank_zero(lambda: rank + 40)
    found["nothing"] = world.from_rank_zero(lambda: None)
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({**found, "ran": ran}, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


OPEN = """
    import os, sys
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.data.dataset import open_dataset
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    try:
        open_dataset(load_config(f"{folder}/config.yaml", {}).config, world, None)
    except Exception as error:
        with open(f"{folder}/rank-{rank}.txt", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


def launch(program, folder, world_size, *arguments):
    """Runs a program as every rank of a world, to its end."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    processes = [start_python(path, rank, world_size, folder, *arguments) for rank in range(world_size)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors


def train(tree, folder, world_size):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    launch(PROGRAM, folder, world_size)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    tables = {}
    for rank in ranks:
        for table, (row, column), values in rank["shards"]:
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    tables[table, row + i, column + j] = value
    return ranks, tables


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "in_batch_softmax", "temperature": 0.5},
        {"kind": "sampled_softmax", "num_negatives": 16, "mixed": True},
        {"kind": "bpr", "num_negatives": 16},
    ],
    ids=["in batch", "sampled, mixed", "pairwise"],
)
def test_two_ranks_train_as_one_does(make_config, tmp_path, sharding, objective):
    tables = {name: {"sharding": {"types": [sharding]}} for name in ("user", "item")}
    tables["user"]["optimizer"] = {"kind": "rowwise_adagrad"}
    changes = {"objective": objective, "tables": tables, "data": {"weight": "weight"}}
    changes["optimizer"] = {"dense": {"kind": "sgd", "lr": 0.05}}
    tree = make_config(changes).tree
    alone, weights = train(tree, tmp_path / "one", 1)
    both, others = train(tree, tmp_path / "two", 2)
    assert both[0]["losses"] == both[1]["losses"], "all ranks know the same loss"
    assert both[0]["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
    assert weights.keys() == others.keys()
    worst = max(abs(weights[place] - others[place]) for place in weights)
    assert worst < 1e-6
    assert both[0]["metrics"] == pytest.approx(alone[0]["metrics"], abs=1e-3)


def test_bad_rows_are_counted_and_recorded_alike_in_every_world_and_after_a_kill(make_config, interactions, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(interactions / "train", data)
    for path in data.iterdir():
        table = pq.read_table(path)
        users = [99 if row % 9 == 0 else user for row, user in enumerate(table["user_id"].to_pylist())]
        lists = [[*items, None] if row % 7 == 0 else items for row, items in enumerate(table["history"].to_pylist())]
        table = table.set_column(0, "user_id", pa.array(users, pa.int32()))
        table = table.set_column(2, "history", pa.array(lists, pa.list_(pa.int32())))
        pq.write_table(table, path, row_group_size=50)
    changes = {
        "data": {"train": str(data), "max_bad_fraction": 0.2, "cache_bytes": 0, "window_steps": 2},
        "features": {
            "user_id": {"kind": "id", "table": "user", "unknown": "quarantine"},
            "history": {"kind": "bag", "table": "item", "null": "empty"},
        },
        "checkpoint": {"every_steps": 2},
        "evaluate": {"metrics": []},
    }
    loaded = make_config(changes, splits=("train",))
    found = {}
    for name, worlds in (("one", [(1, 99)]), ("two", [(2, 99)]), ("killed", [(2, 5), (1, 99)])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(loaded.tree))
        for world_size, last in worlds:
            if world_size > 1:
                launch(RUN, folder, world_size, last)
                continue
            run = RunDirectory.open(folder)
            with open_world("cpu") as world:
                train_run(loaded.config, world, run, Reporter(), newest_intact(run.checkpoints))
        parts = [pq.read_table(part) for part in sorted((folder / "quarantine").iterdir())]
        rows = sorted(map(str, pa.concat_tables(parts).to_pylist()))
        found[name] = rows, json.loads((folder / "result.json").read_text())["bad_rows"]
    assert found["one"] == found["two"] == found["killed"]
    rows, bad_rows = found["one"]
    assert len(rows) == len(set(rows)) == 24
    nulls = sum(1 for count in (101, 102) for row in range(count) if row % 7 == 0 and row % 9)
    assert bad_rows["train"] == {
        "rows": 406, "quarantined": 48, "by_reason": {"user_id: unknown id": 48}, "oov": {}, "ids": {},
        "null": {"history": 2 * nulls},
    }  # fmt: skip


def test_what_rank_zero_does_for_all_reaches_all(tmp_path):
    launch(FROM_RANK_ZERO, tmp_path, 2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("ran"), second.pop("ran")) == (["long", "failing"], []), "rank 0 alone works"
    assert first.pop("error") == ["DataError", "part-7.parquet is not there. Make it."]
    kind, message = second.pop("error")
    assert kind == "PeerError"
    assert message.endswith("rank 0 failed in what it did for all: part-7.parquet is not there. Make it.")
    expected = {"value": [1, 2.5, None, "x"], "last": 999, "signs": [1, 1, 1], "after": 40, "nothing": None}
    assert first == second == expected


@pytest.mark.parametrize("what", ["statistics", "counts"])
def test_data_that_rank_zero_cannot_count_stop_all_ranks(make_config, interactions, tmp_path, what):
    data = tmp_path / "data"
    shutil.copytree(interactions / "train", data)
    for path in data.iterdir():
        table = pq.read_table(path)
        column, values = {
            "statistics": ("age", pa.array([None] * table.num_rows, pa.float64())),
            "counts": ("item_id", pa.array([99] * table.num_rows, pa.int64())),
        }[what]
        pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
    changes = {"data": {"train": str(data)}, "evaluate": {"metrics": []}}
    if what == "statistics":
        changes["features"] = {"age": {"kind": "dense", "normalise": "standardise", "missing": "zero"}}
    else:
        changes["features"] = {"age": {"kind": "dense"}}
        changes["objective"] = {"kind": "bpr", "num_negatives": 16, "distribution": "popularity"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(make_config(changes, splits=()).tree))
    launch(OPEN, tmp_path, 2)
    first, second = ((tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    words = {"statistics": "'age' is to be standardised", "counts": "99"}[what]
    assert first.startswith("DataError: ")
    assert words in first
    assert second == f"PeerError: rank 0 failed in what it did for all: {first.removeprefix('DataError: ')}"


@pytest.mark.parametrize("kind", ["ranking", "pointwise"])
def test_two_ranks_measure_the_baselines_that_one_does(make_config, tmp_path, kind):
    changes = {
        "ranking": {"evaluate": {"baselines": ["popularity", {"kind": "ease", "l2": 3}, "item_knn"]}},
        "pointwise": {"data": {"label": "rating"}, "objective": {"kind": "mse"}, "evaluate": {"metrics": ["rmse", "mae"]}},
    }[kind]
    loaded = make_config(changes | {"train": {"max_steps": 2}})
    results = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(loaded.tree))
        launch(RUN, folder, world_size, 99)
        results.append(json.loads((folder / "result.json").read_text()))
    one, two = results
    assert list(one["baselines"]) == (["popularity", "ease", "item_knn"] if kind == "ranking" else ["mean", "bias"])
    assert two["baselines"] == one["baselines"]
    assert two["ids"] == one["ids"]
    assert two["slices"].keys() == one["slices"].keys()
    for name, values in one["slices"].items():
        assert two["slices"][name] == pytest.approx(values, abs=1e-3)


@pytest.mark.parametrize("worlds", [[(2, 5), (1, 10), (2, 99)], [(1, 5), (2, 99)]], ids=["2, 1, 2", "1, 2"])
def test_the_audit_follows_a_run_through_worlds_of_different_sizes(make_config, tmp_path, worlds):
    changes = {"checkpoint": {"every_steps": 4, "mode": "blocking"}, "evaluate": {"metrics": []}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(make_config(changes, splits=("train",)).tree))
    for world_size, last in worlds:
        launch(RUN, tmp_path, world_size, last)
    run = RunDirectory.open(tmp_path)
    found = audit_run(run, {})
    assert found.failures == []
    assert [one.rows_trained for one in found.passes] == [203, 203]
    assert [attempt.world_size for attempt in found.attempts] == [world_size for world_size, _ in worlds]
    ends = [StepRange(1, 4), StepRange(5, 8), StepRange(9, 14)] if len(worlds) == 3 else [StepRange(1, 4), StepRange(5, 14)]
    assert [attempt.counted for attempt in found.attempts] == ends
    path = tmp_path / "ledger" / f"{len(worlds):04d}-00001.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["digest"] = lines[0]["digest"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (failure,) = audit_run(run, {}).failures
    assert (failure.epoch, failure.attempt, failure.rank, failure.steps) == (2, len(worlds), 1, StepRange(13, 14))
    path.unlink()
    told = [failure for failure in audit_run(run, {}).failures if failure.epoch == 2]
    assert {failure.rank for failure in told} == {1}
    assert f"ledger/{len(worlds):04d}-00001.jsonl is not there" in told[0].what
