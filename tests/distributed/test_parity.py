"""The same result under every sharding type and in every world; checkpoints of each load into each other.

One group of processes for each world size runs all of its cases.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from embedshard.config import build_config
from embedshard.errors import ConfigError
from embedshard.launch.rehearsing import CaseError
from embedshard.storage import locate
from embedshard.testing import assert_plan_invariant
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import open_step
from embedshard.train.rehearsal import Rehearsal
from embedshard.world import open_world

STEPS, SAVED, RESUMED = 20, 8, 14
TYPES = ("table_wise", "row_wise", "table_row_wise", "column_wise", "table_column_wise", "grid_shard", "data_parallel")
CASES = [
    *[("adagrad", kind) for kind in TYPES],
    *[("sgd", kind) for kind in ("row_wise", "column_wise", "grid_shard", "data_parallel")],
    *[("adam", kind) for kind in ("table_wise", "row_wise", "table_row_wise", "grid_shard", "piled")],
    *[("rowwise_adagrad", kind) for kind in ("table_wise", "row_wise", "table_row_wise", "data_parallel", "mixed", "piled")],
]

IDS_ALONE = "ids alone, "  # towers that map what repeats in a batch once, on some ranks more rows than on others


class Lab:
    """Groups of processes, and what their cases gave."""

    def __init__(self, make_tree, folder, groups):
        self.make_tree, self.folder, self.groups = make_tree, folder, groups
        self.outcomes = {}

    def run(self, world, optimizer, sharding, **options):
        key = json.dumps([world, optimizer, sharding, options], default=str)
        if key not in self.outcomes:
            config = build_config(self.make_tree(optimizer, sharding), {}, "test")
            options = {"last": STEPS, "notes_state": True} | options
            self.outcomes[key] = self.groups[world].run(Rehearsal(config, **options))
        return self.outcomes[key]

    def save(self, world, optimizer, sharding, **changes):
        folder = str(self.folder / f"{world}-{optimizer}-{sharding}")
        self.run(world, optimizer, sharding, last=SAVED, save_to=folder)
        return folder


@pytest.fixture(scope="module")
def lab(interactions, tmp_path_factory, groups):
    def make_tree(optimizer, sharding):
        ids_alone = sharding.startswith(IDS_ALONE)
        sharding = sharding.removeprefix(IDS_ALONE)
        tables = {
            "user": {"rows": 40, "dim": 8},  # 41 rows: uneven
            "item": {"rows": 30, "dim": 8, "l2_lookup": 0.01},
            "group": {"rows": 2, "dim": 8},  # 3 rows, fewer than four workers: a piece would be empty
        }
        placed = {
            "mixed": {
                "user": {"type": "table_wise"},
                "item": {"type": "row_wise"},
                "group": {"type": "data_parallel"},
            },
            "piled": {name: {"type": "table_wise", "ranks": [0]} for name in tables},  # other ranks own nothing
            "columns, by name": {name: {"type": "column_wise", "allow_changed_optimizer": True} for name in tables},
        }.get(sharding, {name: {"type": sharding} for name in tables})
        for name, table in tables.items():
            table["sharding"] = placed[name]
        tree = {
            "seed": 11,
            "data": {"train": str(interactions / "train" / "*.parquet"), "lanes": 12, "weight": "weight"},
            "features": {
                "user_id": {"kind": "id", "table": "user"},
                "item_id": {"kind": "id", "table": "item"},
                "group": {"kind": "id", "table": "group", "column": "clicked"},
                "history": {"kind": "bag", "table": "item", "max_length": 4},
                "friends": {"kind": "bag", "table": "user", "column": "history", "pooling": "sum"},
                "age": {"kind": "dense", "normalise": "standardise"},
            },
            "tables": tables,
            "model": {
                "kind": "two_tower",
                "user": {"features": ["user_id", "history", "friends", "group", "age"], "mlp": [16, 8]},
                "item": {"features": ["item_id"]},
                "biases": ["item"],
            },
            "objective": {"kind": "in_batch_softmax", "temperature": 0.5},
            "optimizer": {
                "tables": {"kind": optimizer, "lr": 0.01 if optimizer == "adam" else 0.05},
                "dense": {"kind": "sgd", "lr": 0.05, "clip_norm": 1.0},
                "schedule": {"warmup_steps": 3, "decay": "linear", "final": 0.1},
            },
            "sharding": {"planner": "explicit"},
            "train": {"global_batch_size": 24, "epochs": 3},
        }
        if ids_alone:
            del (
                tables["item"]["l2_lookup"],
                tree["features"]["history"],
                tree["features"]["friends"],
                tree["features"]["age"],
            )
            tree["model"]["user"]["features"] = ["user_id", "group"]
            tree["model"]["item"]["mlp"] = [16, 8]
        return tree

    return Lab(make_tree, tmp_path_factory.mktemp("checkpoints"), groups)


def assert_same_result(found, expected, optimizer):
    for losses in found.losses:
        assert losses == found.losses[0], "all ranks know the same loss"
    assert len(found.losses[0]) == len(expected.losses[0])
    np.testing.assert_allclose(found.losses[0], expected.losses[0], rtol=0, atol=1e-5)
    assert found.after.keys() == expected.after.keys()
    for name, values in found.after.items():
        difference = np.abs(values.astype(np.float64) - expected.after[name])
        if name.startswith(("tables/", "dense/")) and "momentum" not in name:
            by_element = optimizer in ("adagrad", "adam")
            assert np.quantile(difference, 0.999 if by_element else 1.0) <= (1e-5 if by_element else 1e-6), name
        elif "momentum" in name:
            np.testing.assert_allclose(values, expected.after[name], rtol=1e-3, atol=1e-6, err_msg=name)


OF_NODES = ("table_row_wise", "table_column_wise", "grid_shard")
"""On one node of two workers they place nothing that row-wise and column-wise tables do not."""


def case(world, optimizer, sharding):
    """In a world of two, `make test` leaves those of several nodes out, and SGD, which has no state."""
    is_slow = world == 2 and (sharding in OF_NODES or optimizer == "sgd")
    return pytest.param(world, optimizer, sharding, marks=pytest.mark.slow if is_slow else ())


def tables_of_ids_alone(world):
    sharding = [*TYPES, "mixed"]
    return [pytest.param(world, one, marks=pytest.mark.slow if world == 2 and one in OF_NODES else ()) for one in sharding]


@pytest.mark.parametrize(("world", "sharding"), [*tables_of_ids_alone(2), *tables_of_ids_alone(4)])
def test_rows_that_are_mapped_once_change_no_result_under_any_plan(lab, world, sharding):
    optimizer = "rowwise_adagrad" if sharding in ("row_wise", "table_row_wise", "mixed") else "adagrad"
    reference = lab.run(1, optimizer, f"{IDS_ALONE}table_wise")
    assert_same_result(lab.run(world, optimizer, f"{IDS_ALONE}{sharding}"), reference, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sharding"), [(1, "table_wise"), (2, "table_wise"), (2, "row_wise")])
def test_a_compiled_dense_part_changes_no_result(lab, world, sharding):
    reference = lab.run(1, "rowwise_adagrad", f"{IDS_ALONE}table_wise")
    tree = lab.make_tree("rowwise_adagrad", f"{IDS_ALONE}{sharding}")
    tree["train"]["compile"] = True
    found = lab.groups[world].run(Rehearsal(build_config(tree, {}, "test"), last=STEPS, notes_state=True))
    assert_same_result(found, reference, "rowwise_adagrad")


@pytest.mark.parametrize(("world", "optimizer", "sharding"), [case(world, *one) for one in CASES for world in (2, 4)])
def test_no_plan_and_no_world_changes_the_result(lab, world, optimizer, sharding):
    reference = lab.run(1, optimizer, "table_wise")
    found = lab.run(world, optimizer, sharding)
    for name, values in reference.before.items():
        np.testing.assert_array_equal(found.before[name], values, err_msg=name)
    assert_same_result(found, reference, optimizer)
    for table in ("user", "item", "group", "item_id:bias"):
        assert not np.array_equal(found.after[f"tables/{table}/weight"], found.before[f"tables/{table}/weight"])
        if optimizer == "sgd":
            assert f"tables/{table}/momentum1" not in found.after
        else:
            rows = len(found.after[f"tables/{table}/weight"])
            columns = found.after[f"tables/{table}/weight"].shape[1]
            shape = (rows,) if optimizer == "rowwise_adagrad" else (rows, columns)
            assert found.after[f"tables/{table}/momentum1"].shape == shape


def test_the_steps_of_adam_are_counted_for_each_table(lab):
    for world in (1, 2):
        after = lab.run(world, "adam", "table_wise").after
        assert {name: int(count[0]) for name, count in after.items() if name.endswith("/step")} == {
            f"tables/{table}/step": STEPS for table in ("user", "item", "group", "item_id:bias")
        }
        assert after["tables/item/momentum2"].shape == (31, 8)


SAVES = [
    (1, "table_wise"),
    (2, "row_wise"),
    (2, "column_wise"),
    (4, "row_wise"),
    (4, "data_parallel"),
    *[pytest.param(*save, marks=pytest.mark.slow) for save in ((2, "table_wise"), (4, "table_wise"), (4, "column_wise"))],
]
OTHER = {
    "row_wise": "column_wise",
    "table_wise": "row_wise",
    "column_wise": "data_parallel",
    "data_parallel": "table_row_wise",
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("saved_world", "saved_as"), SAVES)
def test_a_checkpoint_of_any_plan_loads_into_any_other(lab, world, saved_world, saved_as):
    folder = lab.save(saved_world, "adagrad", saved_as)
    is_same = world == saved_world
    sharding = saved_as if is_same else OTHER[saved_as]
    resumed = lab.run(world, "adagrad", sharding, last=RESUMED, resume_from=(folder, SAVED))
    assert_as_saved(resumed.before, folder)
    whole = lab.run(saved_world, "adagrad", saved_as, last=RESUMED)
    if is_same:
        assert resumed.losses[0] == whole.losses[0][SAVED:]
        for name, values in whole.after.items():
            np.testing.assert_array_equal(resumed.after[name], values, err_msg=name)
    else:
        np.testing.assert_allclose(resumed.losses[0], whole.losses[0][SAVED:], rtol=0, atol=1e-6)
        for name, values in whole.after.items():
            if name.endswith("/weight"):
                assert np.quantile(np.abs(resumed.after[name] - values), 0.99) <= 1e-6, name


@pytest.mark.parametrize(
    ("saved_world", "saved_as", "world", "sharding"),
    [(2, "data_parallel", 4, "row_wise"), (4, "row_wise", 3, "data_parallel"), (3, "data_parallel", 1, "table_wise")],
)
def test_a_row_wise_statistic_moves_between_fused_and_data_parallel_tables(lab, saved_world, saved_as, world, sharding):
    folder = lab.save(saved_world, "rowwise_adagrad", saved_as)
    resumed = lab.run(world, "rowwise_adagrad", sharding, last=RESUMED, resume_from=(folder, SAVED))
    assert_as_saved(resumed.before, folder)
    whole = lab.run(saved_world, "rowwise_adagrad", saved_as, last=RESUMED)
    np.testing.assert_allclose(resumed.losses[0], whole.losses[0][SAVED:], rtol=0, atol=1e-6)
    for name, values in whole.after.items():
        if name.endswith("/weight"):
            np.testing.assert_allclose(resumed.after[name], values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("saved_world", "saved_as", "world", "sharding"),
    [
        *[
            (1, "table_wise", world, sharding)
            for world, sharding in ((1, "table_wise"), (2, "row_wise"), (4, "column_wise"))
        ],
        *[(4, "row_wise", world, sharding) for world, sharding in ((4, "row_wise"), (2, "table_wise"), (1, "table_wise"))],
    ],
)
def test_moments_and_steps_of_adam_move_between_plans_and_worlds(lab, saved_world, saved_as, world, sharding):
    folder = lab.save(saved_world, "adam", saved_as)
    resumed = lab.run(world, "adam", sharding, last=RESUMED, resume_from=(folder, SAVED))
    assert_as_saved(resumed.before, folder)
    whole = lab.run(saved_world, "adam", saved_as, last=RESUMED)
    if world == saved_world and sharding == saved_as:
        assert resumed.losses[0] == whole.losses[0][SAVED:]
        for name, values in whole.after.items():
            np.testing.assert_array_equal(resumed.after[name], values, err_msg=name)
    else:
        assert_same_result(resumed, replace(whole, losses=[losses[SAVED:] for losses in whole.losses]), "adam")


def assert_as_saved(found, folder):
    checkpoint = open_step(locate(folder), SAVED)
    assert found.keys() == checkpoint.tensors.keys(), "nothing is left out and nothing is made up"
    import torch

    for name, spec in checkpoint.tensors.items():
        saved = torch.empty(spec.shape, dtype=spec.dtype)
        checkpoint.read_into([(name, (0,) * len(spec.shape), saved)])
        np.testing.assert_array_equal(found[name], saved.numpy(), err_msg=name)


def test_statistics_of_column_blocks_load_into_the_same_blocks_and_into_no_others(lab):
    whole = lab.run(4, "rowwise_adagrad", "columns, by name", last=RESUMED)
    assert whole.after["tables/item/momentum1"].shape == (31, 2), "one statistic per row and block"
    reference = lab.run(1, "rowwise_adagrad", "table_wise")
    assert abs(whole.losses[0][-1] - reference.losses[0][RESUMED - 1]) > 1e-5, "it is another optimizer"
    folder = lab.save(4, "rowwise_adagrad", "columns, by name")
    for world in (4, 2):
        resumed = lab.run(world, "rowwise_adagrad", "columns, by name", last=RESUMED, resume_from=(folder, SAVED))
        assert_as_saved(resumed.before, folder)
        np.testing.assert_allclose(resumed.losses[0], whole.losses[0][SAVED:], rtol=0, atol=0 if world == 4 else 1e-6)
    with pytest.raises(CaseError, match=r"table 'group' kept its statistics per row and block.*2 blocks there, none in"):
        lab.run(2, "rowwise_adagrad", "row_wise", last=RESUMED, resume_from=(folder, SAVED))


def test_quantised_communication_trains_nearly_the_same(lab):
    reference = lab.run(1, "sgd", "table_wise")
    tree = lab.make_tree("sgd", "row_wise")
    tree["sharding"]["communication"] = "fp16"
    found = lab.groups[2].run(Rehearsal(build_config(tree, {}, "test"), STEPS))
    difference = np.abs(np.array(found.losses[0]) - reference.losses[0]).max()
    assert 1e-6 < difference < 1e-2
    tree["sharding"]["communication"] = "bf16"
    with open_world("cpu") as world, pytest.raises(ConfigError, match=r"gloo.*has no bf16.*Choose fp16"):
        assemble(build_config(tree, {}, "test"), world)


MODEL = """
import torch
from torch import nn
from embedshard.models.output import RetrievalOutput

class Own(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.embeddings, self.looks_at_rank = context.lookup(), context.options["looks_at_rank"]

    def forward(self, batch):
        found = self.embeddings(batch)
        share = 1 + self.looks_at_rank * torch.distributed.get_rank()
        return RetrievalOutput(found["user_id"] * share, found["item_id"], lookups=found)
"""


@pytest.mark.parametrize("looks_at_rank", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_of_ones_own_is_held_to_it(interactions, tmp_path, monkeypatch, looks_at_rank):
    (tmp_path / "own_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = {
        "data": {"train": str(interactions / "train" / "*.parquet"), "lanes": 4},
        "features": {"user_id": {"kind": "id", "table": "user"}, "item_id": {"kind": "id", "table": "item"}},
        "tables": {"user": {"rows": 40, "dim": 8}, "item": {"rows": 30, "dim": 8}},
        "model": {
            "kind": "custom", "factory": "own_model:Own", "user_id": "user_id", "item_id": "item_id",
            "options": {"looks_at_rank": looks_at_rank},
        },
        "objective": {"kind": "in_batch_softmax"},
        "train": {"global_batch_size": 32},
    }  # fmt: skip
    config = build_config(tree, {}, "test")
    if not looks_at_rank:
        assert_plan_invariant(config, steps=5, types=["row_wise"])
        return
    with pytest.raises(AssertionError, match=r"row_wise, 2 workers: fail\. losses differ by .*allowed are 1e-05"):
        assert_plan_invariant(config, steps=5, types=["row_wise"])
