"""A two-tower's history as a sequence: the mean is the bag's, attention learns, no world changes it."""

import pytest

from embedshard.errors import ConfigError
from embedshard.testing import assert_plan_invariant


def as_sequence(pooling):
    sequences = {} if pooling is None else {"history": pooling}
    return {
        "features": {"history": {"kind": "sequence", "table": "item", "max_length": 4}},
        "model": {
            "kind": "two_tower",
            "user": {"features": ["user_id", "history", "age"], "mlp": [16, 8], "sequences": sequences},
            "item": {"features": ["item_id"]},
        },
    }


def test_the_mean_of_a_sequence_is_the_bags(run_tree, make_config, tmp_path, saved_tensors):
    bag = {"model": {**as_sequence(None)["model"], "user": {"features": ["user_id", "history", "age"], "mlp": [16, 8]}}}
    runs = {"bag": make_config(bag).tree, "sequence": make_config(as_sequence("mean")).tree}
    results = {name: run_tree(tree, tmp_path / name) for name, tree in runs.items()}
    assert results["sequence"]["metrics"] == pytest.approx(results["bag"]["metrics"])
    ours, theirs = (saved_tensors(tmp_path / name)[1] for name in ("sequence", "bag"))
    for name in ("tables/item/weight", "tables/user/weight"):
        assert (ours[name] - theirs[name]).abs().max() < 1e-5


def test_attention_is_the_default_and_is_trained(run_tree, make_config, tmp_path, saved_tensors):
    tree = make_config(as_sequence(None)).tree
    run_tree({**tree, "train": {**tree["train"], "max_steps": 1}}, tmp_path / "before")
    run_tree(tree, tmp_path / "after")
    before, after = (saved_tensors(tmp_path / name)[1] for name in ("before", "after"))
    name = "dense/poolings.history.score.weight"
    assert not before[name].equal(after[name])


@pytest.mark.slow
def test_no_world_changes_what_is_trained(make_config, groups):
    assert_plan_invariant(
        make_config(as_sequence("attention")).config, steps=6, worlds=(2,), types=["row_wise"], groups=groups
    )


def test_sequences_are_the_users_alone(make_config):
    changes = as_sequence("mean")
    changes["model"]["item"] = {"features": ["item_id", "history"], "mlp": [8]}
    with pytest.raises(ConfigError, match=r"model\.item\.features: 'history' is a sequence"):
        make_config(changes)
    changes = as_sequence("mean")
    changes["model"]["user"]["sequences"] = {"user_id": "mean"}
    with pytest.raises(ConfigError, match=r"model\.user\.sequences: 'user_id' is no sequence among the features"):
        make_config(changes)
    changes = as_sequence({"kind": "target_attention", "target": "item_id"})
    with pytest.raises(ConfigError, match=r"model\.two_tower\.user\.sequences|sequences\.history"):
        make_config(changes)
