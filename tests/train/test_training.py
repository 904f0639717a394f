"""What a step does: who trains what, at which rate, over which features; and what stops it."""

import json
import math
import sys
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from embedshard.config import parse_config, table_specs
from embedshard.config.parts import ScheduleConfig
from embedshard.errors import CheckpointError, ConfigError, DataError, PlanError, TrainingError
from embedshard.launch.local import train_here
from embedshard.launch.request import TrainRequest
from embedshard.sharding.explicit import Placement
from embedshard.sharding.optimizers import Optimizers, learning_rate_factor
from embedshard.sharding.ownership import check_ownership
from embedshard.sharding.shards import optimizer_shards, weight_shards
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import JsonLinesReporter, Reporter, Reporters, TensorBoardReporter
from embedshard.world import open_world


def weights(parts):
    return {shard.table: shard.tensor.clone() for shard in weight_shards(parts.model)}


def one_step(config, step=0):
    """Takes one step; returns the assembly, the batch, the loss, and the tables before and after."""
    with open_world("cpu") as world:
        parts = assemble(config, world)
        before = weights(parts)
        dense_before = {name: p.detach().clone() for name, p in parts.optimizers._dense_parameters.items()}
        with parts.reader().batches(step, step + 1) as batches:
            batch = next(batches)
            parts.optimizers.set_learning_rates(step, 100)
            result = parts.stepper.take(batch, stop_asked=False)
        dense_after = {name: p.detach().clone() for name, p in parts.optimizers._dense_parameters.items()}
        return parts, batch, result, before, weights(parts), dense_before, dense_after


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 3), (2, 1.0), (3, 1.0), (8, 0.55), (13, 0.1), (99, 0.1)])
def test_the_schedule_warms_up_and_decays(step, factor):
    schedule = ScheduleConfig(warmup_steps=3, decay="linear", decay_steps=10, final=0.1)
    assert learning_rate_factor(schedule, step, 1000) == pytest.approx(factor)


def test_the_cosine_schedule_ends_with_the_run():
    schedule = ScheduleConfig(decay="cosine")
    assert learning_rate_factor(schedule, 0, 100) == 1.0
    assert learning_rate_factor(schedule, 50, 100) == pytest.approx(0.5)
    assert learning_rate_factor(schedule, 100, 100) == pytest.approx(0.0)


def test_the_schedule_acts_on_tables_and_on_the_dense_part(make_config):
    base = {"optimizer": {"tables": {"kind": "sgd", "lr": 1.0}, "dense": {"kind": "sgd", "lr": 0.5}}}
    base |= {"tables": {"user": {"optimizer": {"kind": "sgd"}}}}
    moved = {}
    for steps in (1, 4):  # warm-up over 4 steps: the first step's rate is a quarter
        changes = {**base, "optimizer": {**base["optimizer"], "schedule": {"warmup_steps": steps, "decay": "none"}}}
        _, _, _, before, after, dense_before, dense_after = one_step(make_config(changes).config)
        moved[steps] = {
            **{name: after[name] - before[name] for name in before},
            **{name: dense_after[name] - dense_before[name] for name in dense_before},
        }
    for name, change in moved[1].items():
        assert change.abs().max() > 0, name
        torch.testing.assert_close(moved[4][name], change / 4, rtol=1e-4, atol=1e-7)


def test_tables_follow_their_own_optimizers(make_config):
    changes = {
        "tables": {
            "user": {"optimizer": {"kind": "sgd", "lr": 0.5}},
            "item": {"optimizer": {"kind": "adagrad", "eps": 0.1}},
        },
        "optimizer": {"schedule": {"warmup_steps": 0, "decay": "none"}},
    }
    with open_world("cpu") as world:
        parts = assemble(make_config(changes).config, world)
        assert {shard.table for shard in optimizer_shards(parts.model)} == {"item", "item_id:bias"}, "SGD keeps no state"
        state = {shard.table: shard for shard in optimizer_shards(parts.model)}
        assert state["item"].shape == (31, 8), "Adagrad keeps a number for each weight"
        assert state["item"].kind == "momentum1"


def test_the_ownership_check_refuses_another_optimizer(make_config):
    config = make_config().config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        wanted = make_config({"tables": {"user": {"optimizer": {"kind": "rowwise_adagrad"}}}}).config
        specs = table_specs(wanted, parts.dataset.table_rows)
        with pytest.raises(PlanError, match=r"table 'user' is trained by FBGEMM's 'exact_adagrad'.*'rowwise_adagrad'"):
            check_ownership(parts.model, specs, {}, {}, world)
        wanted = make_config({"tables": {"user": {"optimizer": {"eps": 0.5}}}}).config
        specs = table_specs(wanted, parts.dataset.table_rows)
        with pytest.raises(PlanError, match=r"table 'user' is trained with eps=1e-08, its config names eps=0\.5"):
            check_ownership(parts.model, specs, {}, {}, world)


def test_the_ownership_check_refuses_a_data_parallel_table_that_the_dense_side_would_train(make_config, monkeypatch):
    monkeypatch.setattr("embedshard.sharding.plan.place_tables", everywhere)
    monkeypatch.setattr("embedshard.sharding.optimizers.replicated_tables", lambda model: {})
    with open_world("cpu") as world, pytest.raises(PlanError, match=r"table 'user' is trained by the dense optimizer"):
        assemble(make_config().config, world)


def everywhere(specs, world_size, local_world_size):
    return {spec.name: Placement("data_parallel", tuple(range(world_size))) for spec in specs}


def test_a_table_under_adam_belongs_to_the_lazy_kernel_alone_on_a_cpu(make_config, monkeypatch):
    config = make_config({"optimizer": {"tables": {"kind": "adam"}}}).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        wanted = make_config({"optimizer": {"tables": {"kind": "adam", "betas": [0.5, 0.999]}}}).config
        with pytest.raises(PlanError, match=r"table 'item' is trained with betas=\(0\.9, 0\.999\), its config names \(0\.5"):
            check_ownership(parts.model, table_specs(wanted, parts.dataset.table_rows), {}, {}, world)
        with pytest.raises(PlanError, match=r"table 'item' is trained by the lazy Adam, its config names 'rowwise_adagrad'"):
            check_ownership(parts.model, table_specs(make_config().config, parts.dataset.table_rows), {}, {}, world)
        monkeypatch.setattr("embedshard.sharding.shard.take_over", lambda model: None)  # SGD's kernels would remain
        with pytest.raises(PlanError, match=r"table 'item' is trained by FBGEMM's 'exact_sgd', its config names 'adam'"):
            assemble(config, world)


def test_an_option_that_the_dense_optimizer_does_not_take_is_refused(make_config):
    config = make_config({"optimizer": {"dense": {"kind": "sgd", "options": {"betas": [0.9, 0.99]}}}}).config
    with open_world("cpu") as world, pytest.raises(ConfigError, match=r"optimizer\.dense\.options.*betas"):
        assemble(config, world)


def test_l2_lookup_is_the_gradient_of_the_penalty(make_config):
    changes = {
        "data": {"label": "rating"},
        "objective": {"kind": "mse"},
        "evaluate": {"metrics": ["rmse"]},
        "optimizer": {"tables": {"kind": "sgd", "lr": 1.0}, "schedule": {"warmup_steps": 0, "decay": "none"}},
        "tables": {"user": {"optimizer": {"kind": "sgd"}}},
    }
    _, batch, _, before, plain, *_ = one_step(make_config(changes).config)
    changes["tables"]["user"]["l2_lookup"] = 0.25
    _, again, _, _, penalised, *_ = one_step(make_config(changes).config)
    assert batch.ids["user_id"].equal(again.ids["user_id"])
    counts = torch.bincount(batch.ids["user_id"], minlength=41).float()
    expected = -2 * 0.25 * before["user"] * counts[:, None] / batch.size
    torch.testing.assert_close(penalised["user"] - plain["user"], expected, rtol=1e-4, atol=1e-7)


def test_gradient_clipping_bounds_the_dense_step(make_config):
    changes = {"optimizer": {"dense": {"kind": "sgd", "lr": 1.0, "clip_norm": 1e-3}, "schedule": {"warmup_steps": 0}}}
    *_, before, after = one_step(make_config(changes).config)
    squared = sum(float((after[name] - before[name]).square().sum()) for name in before)
    assert 0 < math.sqrt(squared) <= 1e-3 * 1.001


def test_bags_pool_as_the_config_says_even_two_ways_over_one_table(make_config):
    changes = {
        "data": {"label": "rating"},
        "objective": {"kind": "mse"},
        "evaluate": {"metrics": ["rmse"]},
        "features": {
            "summed": {"kind": "bag", "table": "item", "column": "history", "pooling": "sum"},
            "weighted": {"kind": "weighted_bag", "table": "item", "column": "history", "weights": "history_weight"},
            "weighted_mean": {
                "kind": "weighted_bag", "table": "item", "column": "history", "weights": "history_weight", "pooling": "mean",
            },
        },
        "model": {"user": {"features": ["user_id", "history", "summed", "weighted", "weighted_mean"], "mlp": [8]}},
    }  # fmt: skip
    config = make_config(changes).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        assert [spec.name for spec in parts.specs if spec.weighted] == ["item"]
        table = weights(parts)["item"]
        with parts.reader().batches(0, 1) as batches:
            batch = next(batches)
        vectors = parts.model.module.embeddings(batch)
        files = [pq.read_table(parts.dataset.train[0]._locations[i].path) for i in (0, 1)]
        rows = [row for file in files for row in file.to_pylist()]
        for place, number in enumerate(batch.rows.tolist()):
            row = rows[number]
            ids, row_weights = row["history"], np.array(row["history_weight"])
            zero = torch.zeros(8)
            picked = [table[i] for i in ids]
            total = sum(picked, zero)
            weighted = sum((w * vector for w, vector in zip(row_weights.tolist(), picked, strict=True)), zero)
            kept = picked[-4:]
            expected = {
                "item_id": table[row["item_id"]],
                "history": sum(kept, zero) / max(len(kept), 1),
                "summed": total,
                "weighted": weighted,
                "weighted_mean": weighted / row_weights.sum() if ids else zero,
            }
            for key, vector in expected.items():
                torch.testing.assert_close(vectors[key][place], vector, rtol=1e-5, atol=1e-6, msg=key)


def test_each_table_has_one_storage(make_config):
    with open_world("cpu") as world:
        parts = assemble(make_config().config, world)
        pointers = [shard.tensor.data_ptr() for shard in weight_shards(parts.model)]
        names = [shard.table for shard in weight_shards(parts.model)]
    assert sorted(names) == ["item", "item_id:bias", "user"]
    assert len(set(pointers)) == 3


def test_half_precision_tables_train(make_config):
    config = make_config({"tables": {"item": {"dtype": "fp16"}}}).config
    _, _, result, before, after, *_ = one_step(config)
    assert before["item"].dtype == torch.float16
    assert math.isfinite(result.loss)
    assert not before["item"].equal(after["item"])


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw", "rmsprop"])
def test_a_run_with_each_dense_optimizer_resumes(make_config, tmp_path, name):
    options = {"momentum": 0.9} if name == "sgd" else {}
    changes = {"optimizer": {"dense": {"kind": name, "lr": 0.01, "options": options}}}
    ends = []
    for folder, steps in (("whole", (14,)), ("parts", (5, 14))):
        run = RunDirectory.create(tmp_path / folder, make_config(changes))
        for stop in steps:
            loaded = make_config({**changes, "train": {"max_steps": stop}, "optimizer": changes["optimizer"] | {
                "schedule": {"decay": "none", "warmup_steps": 0}}})  # fmt: skip
            with open_world("cpu") as world:
                train(loaded.config, world, run, Reporter(), newest_intact(run.checkpoints))
        checkpoint = newest_intact(run.checkpoints)
        tensors = {}
        for key, spec in checkpoint.tensors.items():
            tensors[key] = torch.empty(spec.shape, dtype=spec.dtype)
            checkpoint.read_into([(key, (0,) * len(spec.shape), tensors[key])])
        ends.append(tensors)
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        assert ends[0][key].equal(ends[1][key]), key


CUSTOM = """
    import torch
    from torch import nn
    from embedshard.models.output import RetrievalOutput

    class Wide(nn.Module):
        def __init__(self, context):
            super().__init__()
            self.embeddings = context.lookup()
            self.age = context.dense_column("age")
            self.scale = nn.Parameter(torch.ones(8))
            self.poison = context.options.get("poison")
        def forward(self, batch):
            found = self.embeddings(batch)
            query = self.query(found, batch)
            if batch.position is not None and batch.position.step == self.poison:
                query = torch.where(batch.ids["user_id"][:, None] % 7 == 3, torch.inf, query)
            return RetrievalOutput(query, found["item_id"], lookups=found)
        def query(self, found, batch):
            return found["user_id"] * self.scale + batch.dense[:, self.age, None] * 0.01
        def encode_queries(self, batch):
            return self.query(self.embeddings(batch), batch)
        def encode_candidates(self, batch):
            return self.embeddings(batch)["item_id"]
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(textwrap.dedent(CUSTOM))
    monkeypatch.syspath_prepend(tmp_path)
    yield {"kind": "custom", "factory": "my_model:Wide", "user_id": "user_id", "item_id": "item_id"}
    sys.modules.pop("my_model", None)


def test_a_module_of_ones_own_trains_evaluates_and_resumes(make_config, custom, tmp_path):
    loaded = make_config({"model": custom})
    run = RunDirectory.create(tmp_path / "run", loaded)
    with open_world("cpu") as world:
        result = train(loaded.config, world, run, Reporter())
    assert set(result.metrics) == {"recall@5", "ndcg@5", "mrr"}
    with open_world("cpu") as world:
        again = train(loaded.config, world, run, Reporter(), newest_intact(run.checkpoints))
    assert again.metrics == result.metrics


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("my_model", "package.module:callable"),
        ("my_modle:Wide", "cannot be imported"),
        ("my_model:Wyde", "has no 'Wyde'"),
        ("builtins:dict", "torch.nn.Module|cannot"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(make_config, custom, factory, words):
    config = make_config({"model": {**custom, "factory": factory}}).config
    if factory.startswith("builtins"):
        (config_words, error) = ("torch.nn.Module", (ConfigError, TypeError))
        with open_world("cpu") as world, pytest.raises(error):
            assemble(config, world)
        assert config_words
        return
    with open_world("cpu") as world, pytest.raises(ConfigError, match=words):
        assemble(config, world)


def test_a_loss_that_is_not_finite_stops_before_the_tables_are_touched(make_config, custom, tmp_path):
    loaded = make_config({"model": custom | {"options": {"poison": 8}}, "checkpoint": {"every_steps": 2}})
    run = RunDirectory.create(tmp_path / "run", loaded)
    seen = {}

    class Watch(Reporter):
        def stepped(self, step, epoch, loss, samples_per_second):
            seen["step"] = step

    with open_world("cpu") as world, pytest.raises(TrainingError) as caught:
        train(loaded.config, world, run, Watch())
    message = str(caught.value)
    assert "step 9 (epoch 2, partition 1)" in message
    assert "row group" in message
    assert ".parquet" in message
    assert "no table was changed" in message
    assert seen["step"] == 8, "the eight steps before it were whole"
    assert newest_intact(run.checkpoints).step == 8

    config = make_config({"model": custom | {"options": {"poison": 0}}}).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        before = weights(parts)
        with parts.reader().batches(0, 1) as batches, pytest.raises(TrainingError):
            parts.stepper.take(next(batches), stop_asked=False)
        for name, tensor in weights(parts).items():
            assert tensor.equal(before[name]), name


def test_an_error_in_the_reader_surfaces_in_the_loop(make_config, interactions, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    table = pq.read_table(interactions / "train" / "part-0.parquet")
    pq.write_table(table, folder / "a.parquet", row_group_size=50)
    path = folder / "b.parquet"
    columns = ["user_id", "item_id", "history", "age"]
    pq.write_table(table.select(columns), path, row_group_size=50, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 4 + 200] = b"\xff" * 200
    path.write_bytes(bytes(data))
    for cache_bytes in (0, 2**30):
        changes = {"data": {"train": str(folder / "*.parquet"), "cache_bytes": cache_bytes}}
        with open_world("cpu") as world, pytest.raises(DataError, match=r"b\.parquet, row group \d"):
            train(
                make_config(changes).config,
                world,
                RunDirectory.create(tmp_path / f"{cache_bytes}", make_config(changes)),
                Reporter(),
            )


def test_changed_data_are_refused_on_resume(make_config, interactions, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    table = pq.read_table(interactions / "train" / "part-0.parquet")
    pq.write_table(table, folder / "a.parquet")
    loaded = make_config({"data": {"train": str(folder / "*.parquet")}, "train": {"max_steps": 2}})
    run = RunDirectory.create(tmp_path / "run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporter())
    pq.write_table(table.slice(1), folder / "a.parquet")
    pq.write_table(table, folder / "b.parquet")
    with open_world("cpu") as world, pytest.raises(DataError, match=r"b\.parquet is new; a\.parquet has changed"):
        train(loaded.config, world, run, Reporter(), newest_intact(run.checkpoints))


def test_another_config_is_no_resumption(make_config, tmp_path):
    run = RunDirectory.create(tmp_path / "run", make_config())
    run.check_same_run(make_config({"train": {"epochs": 9}, "tracking": {"tensorboard": True}}), {})
    run.check_same_run(make_config({"train": {"prefetch": True}, "data": {"threads": 4}}), {})
    with pytest.raises(ConfigError) as caught:
        run.check_same_run(make_config({"seed": 12, "tables": {"item": {"rows": 31}}}), {})
    assert "seed: 11 in the run, 12 now" in str(caught.value)
    assert "tables.item.rows: 30 in the run, 31 now" in str(caught.value)


def test_a_variable_that_means_something_else_now_is_no_resumption(make_config, interactions, tmp_path):
    changes = {
        "seed": "${SEED:-3}",
        "data": {"train": "${ROOT}/train/*.parquet"},
        "train": {"epochs": "${EPOCHS:-2}"},
        "checkpoint": {"keep": 2},
    }
    tree = make_config().tree
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    text = yaml.safe_dump(tree)
    begun = {"ROOT": str(interactions)}
    run = RunDirectory.create(tmp_path / "run", parse_config(text, "test", begun), begun)
    assert "interactions" not in (tmp_path / "run" / "variables.json").read_text()
    for same in (begun, {"ROOT": "/moved"}, {**begun, "EPOCHS": "9"}, {**begun, "SEED": "3"}):
        run.check_same_run(run.load_config(same), same)
    other = {**begun, "SEED": "4"}
    with pytest.raises(ConfigError, match=r"seed: \$\{SEED:-3\} is '4' now, and was something else when the run began"):
        run.check_same_run(run.load_config(other), other)


@pytest.mark.parametrize("name", ["inventory.json", "plan.json", "variables.json"])
def test_a_damaged_file_of_the_run_is_named(make_config, tmp_path, name):
    loaded = make_config()
    run = RunDirectory.create(tmp_path / "run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporter())
    path = tmp_path / "run" / name
    path.write_text(path.read_text()[:-3])
    with pytest.raises(CheckpointError, match=f"{name} is not the JSON file that the run wrote"):
        train_here(TrainRequest(resume=tmp_path / "run"), {}, Console(quiet=True))


def test_a_run_leaves_behind_what_it_says(make_config, tmp_path):
    loaded = make_config({"tracking": {"tensorboard": False}})
    run = RunDirectory.create(tmp_path / "run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporter())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["samples_seen"] == 406
    for key in ("wall_seconds", "samples_per_second", "peak_memory_bytes"):
        assert result[key] > 0
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "config.yaml", "inventory.json", "attempts.jsonl", "checkpoints", "ledger", "result.json",
    }  # fmt: skip


def test_what_cannot_be_measured_is_null_and_curves_are_written(make_config, interactions, tmp_path):
    changes = {
        "data": {"test": str(interactions / "train" / "*.parquet")},  # all of it was seen in training
        "tracking": {"tensorboard": True},
        "train": {"log_every_steps": 1},
    }
    loaded = make_config(changes)
    run = RunDirectory.create(tmp_path / "run", loaded)
    reporters = [JsonLinesReporter(run.folder.join("metrics.jsonl"), 1), TensorBoardReporter(run.folder.join("tensorboard"))]
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporters(reporters))
    Reporters(reporters).finished()

    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    assert strict(run.folder.join("result.json").read_text())["metrics"]["recall@5"] is None
    lines = [strict(line) for line in run.folder.join("metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == list(range(1, 15))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run.folder.join("tensorboard").path)
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("train/loss")}
    assert curve == pytest.approx(losses)


def test_the_dense_optimizer_owns_what_no_table_does(make_config):
    with open_world("cpu") as world:
        parts = assemble(make_config().config, world)
        assert isinstance(parts.optimizers, Optimizers)
        names = set(parts.optimizers._dense_parameters)
    assert names == {f"user_tower.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
