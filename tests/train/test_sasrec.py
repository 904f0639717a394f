"""SASRec through the trainer: it learns what follows what, in any world, and goes on where it stopped."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.errors import ConfigError, DataError
from embedshard.testing import assert_plan_invariant

ITEMS = 40


def write_walks(folder, rows, seed, with_negatives):
    """Walks in which each item has two that may follow it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    after = np.random.default_rng(0).integers(0, ITEMS, (ITEMS, 2))
    walks = []
    for _ in range(rows):
        walk = [int(generator.integers(ITEMS))]
        for _ in range(int(generator.integers(1, 12))):
            walk.append(int(after[walk[-1], generator.integers(2)]))
        walks.append(walk)
    columns = {
        "user_id": np.arange(rows) % 7,
        "history": [walk[:-1] for walk in walks],
        "item_id": [walk[-1] for walk in walks],
    }
    if with_negatives:
        columns["negatives"] = [[item for item in range(ITEMS) if item not in after[walk[-2]]][:20] for walk in walks]
    pq.write_table(pa.table(columns), folder / "part.parquet", row_group_size=50)


@pytest.fixture
def tree(tmp_path):
    for name, rows, seed in (("train", 403, 1), ("test", 150, 2)):
        write_walks(tmp_path / name, rows, seed, name == "test")
    return {
        "seed": 5,
        "data": {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "lanes": 4},
        "features": {
            "history": {"kind": "sequence", "table": "item", "max_length": 8},
            "item_id": {"kind": "id", "table": "item"},
        },
        "tables": {"item": {"rows": ITEMS, "dim": 16, "init": {"scale": 0.1}}},
        "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "heads": 2},
        "objective": {"kind": "sampled_softmax", "num_negatives": 20},
        "optimizer": {"tables": {"kind": "adagrad", "lr": 0.1}, "dense": {"kind": "adam", "lr": 0.003}},
        "train": {"global_batch_size": 16, "epochs": 1},
        "evaluate": {"metrics": ["hit_rate@2", "ndcg@2"], "candidates": "negatives"},
        "tracking": {"tensorboard": False},
    }


def test_it_learns_what_follows_what(run_tree, tree, tmp_path):
    tree["train"]["epochs"] = 15
    result = run_tree(tree, tmp_path / "run")
    assert result["metrics"]["hit_rate@2"] > 0.7, "2 of 21 by chance"
    assert result["metrics"]["hit_rate@2"] > result["baselines"]["popularity"]["hit_rate@2"] + 0.2


def test_a_stopped_run_goes_on_bit_for_bit(run_tree, tree, tmp_path, saved_tensors, assert_same_tensors):
    whole = run_tree(tree, tmp_path / "whole")
    path = tmp_path / "run"
    run_tree({**tree, "train": {**tree["train"], "max_steps": 7}}, path)
    (path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    resumed = run_tree(tree, path, resume_step=7)
    assert_same_tensors(saved_tensors(path), saved_tensors(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]


def test_lists_that_are_all_empty_train_nothing_and_say_so(run_tree, tree, tmp_path):
    empty = pa.array([[]] * 50, pa.list_(pa.int64()))
    pq.write_table(pa.table({"history": empty, "item_id": [1] * 50}), tmp_path / "empty.parquet")
    tree["data"]["train"] = str(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"no list with a place from which.*column 'history'.*A list needs one id"):
        run_tree(tree, tmp_path / "run")


def test_rows_without_weight_train_nothing_and_say_so(run_tree, tree, tmp_path):
    nothing = {"history": [[1, 2]] * 50, "item_id": [1] * 50, "weight": [0.0] * 50}
    pq.write_table(pa.table(nothing), tmp_path / "weightless.parquet")
    tree["data"] |= {"train": str(tmp_path / "weightless.parquet"), "weight": "weight"}
    with pytest.raises(DataError, match="nothing was learnt"):
        run_tree(tree, tmp_path / "run")


def test_what_looks_at_users_needs_to_know_them(tree):
    tree["evaluate"]["baselines"] = ["item_knn"]
    with pytest.raises(ConfigError, match=r"'item_knn' needs to know the user and the item: give model\.user_id"):
        build_config(tree, {}, "test")
    tree["evaluate"] = {"metrics": ["recall@2"]}
    with pytest.raises(ConfigError, match=r"'recall@2' ranks items for users, so model\.user_id must name"):
        build_config(tree, {}, "test")


@pytest.mark.parametrize("mask_list", [False, True])
def test_no_world_changes_what_is_trained(tree, groups, mask_list):
    tree["objective"]["mask_list"] = mask_list
    assert_plan_invariant(build_config(tree, {}, "test"), steps=6, worlds=(2,), types=["row_wise"], groups=groups)
