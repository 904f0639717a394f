"""Ranking models through the trainer: every kind learns, in any world, and goes on where it stopped."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard.config import build_config
from embedshard.errors import ConfigError
from embedshard.launch.local import evaluate_here
from embedshard.testing import assert_plan_invariant
from embedshard.train.tracking import Reporter
from tests.commands import run_ranks

USERS, ITEMS = 12, 9

MODELS = {
    "dlrm": {"kind": "dlrm", "dense_mlp": [8], "mlp": [16, 8]},
    "dcn_v2": {"kind": "dcn_v2", "cross_layers": 2, "mlp": [16]},
    "dcn_v2 low rank": {"kind": "dcn_v2", "low_rank": 4, "structure": "parallel", "mlp": [16]},
    "deepfm": {"kind": "deepfm", "mlp": [16]},
    "wide_and_deep": {"kind": "wide_and_deep", "mlp": [16]},
    "mmoe": {"kind": "mmoe", "experts": 3, "expert_mlp": [16], "mlp": [8]},
}


def write_clicks(folder, rows, seed):
    """Clicks that depend on pairs of user and item, on a number and on what was seen; purchases among them."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    taste = np.random.default_rng(0).normal(size=(USERS, ITEMS)) * 2
    user, item = generator.integers(0, USERS, rows), generator.integers(0, ITEMS, rows)
    seen = [generator.integers(0, ITEMS, generator.integers(0, 5)).tolist() for _ in range(rows)]
    hour = generator.normal(size=rows)
    met = np.array([float(wanted in before) for wanted, before in zip(item, seen, strict=True)])
    logit = taste[user, item] + hour + 2 * met
    click = generator.random(rows) < 1 / (1 + np.exp(-logit))
    table = pa.table(
        {
            "user": user, "item": item, "seen": seen, "tags": seen, "hour": hour, "price": np.abs(hour) * 100,
            "shop": np.array(["north", "south", None], dtype=object)[item // 3],
            "click": click.astype(np.int8), "buy": (click & (hour > 0)).astype(np.int8),
            "weight": generator.integers(1, 3, rows).astype(np.float32),
        }
    )  # fmt: skip
    pq.write_table(table, folder / "part.parquet", row_group_size=97)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    root = tmp_path_factory.mktemp("clicks")
    write_clicks(root / "train", 3203, 1)
    write_clicks(root / "test", 400, 2)
    return root


@pytest.fixture
def make_tree(clicks):
    def make(model, **changes):
        several = model["kind"] == "mmoe"
        return {
            "seed": 5,
            "data": {
                "train": str(clicks / "train"), "test": str(clicks / "test"), "lanes": 4, "weight": "weight",
                **({"labels": {"click": "click", "buy": "buy"}} if several else {"label": "click"}),
            },
            "features": {
                "user": {"kind": "id", "table": "user"},
                "hour": {"kind": "dense"},
                "item": {"kind": "id", "table": "item"},
                "tags": {"kind": "bag", "table": "tag", "pooling": "mean"},
                "price": {"kind": "dense", "normalise": "standardise"},
                "seen": {"kind": "sequence", "table": "item"},
            },
            "tables": {
                "user": {"rows": USERS, "dim": 8}, "item": {"rows": ITEMS, "dim": 8}, "tag": {"rows": ITEMS, "dim": 8},
            },
            "model": {"sequences": {"seen": {"kind": "target_attention", "target": "item", "mlp": [8]}}, **model},
            "objective": {"kind": "bce"},
            "optimizer": {"tables": {"lr": 0.1}, "dense": {"kind": "adam", "lr": 0.01}},
            "train": {"global_batch_size": 64, "epochs": 1},
            "evaluate": {"metrics": ["auc", "log_loss"]},
            "tracking": {"tensorboard": False},
            **changes,
        }  # fmt: skip

    return make


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_learns(run_tree, make_tree, tmp_path, kind):
    tree = make_tree(MODELS[kind], train={"global_batch_size": 64, "epochs": 6})
    result = run_tree(tree, tmp_path / "run")
    assert result["metrics"]["auc"] > 0.75
    if kind == "mmoe":
        assert list(result["metrics"]) == ["auc", "auc:click", "auc:buy", "log_loss", "log_loss:click", "log_loss:buy"]
        assert result["metrics"]["auc:buy"] > 0.75
        assert result["metrics"]["auc"] == pytest.approx((result["metrics"]["auc:click"] + result["metrics"]["auc:buy"]) / 2)
        assert result["baselines"] == {}
    else:
        assert result["metrics"]["log_loss"] < result["baselines"]["mean"]["log_loss"]
    assert evaluate_here(tmp_path / "run", None, "cpu", {})["test"] == result["metrics"]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_stopped_run_goes_on_bit_for_bit(run_tree, make_tree, tmp_path, saved_tensors, assert_same_tensors, norm):
    tree = make_tree({**MODELS["dlrm"], "norm": norm, "dropout": 0.2})
    whole = run_tree(tree, tmp_path / "whole")
    path = tmp_path / "run"
    run_tree({**tree, "train": {**tree["train"], "max_steps": 7}}, path)
    (path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    resumed = run_tree(tree, path, resume_step=7)
    assert_same_tensors(saved_tensors(path), saved_tensors(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]
    moments = [name for name in saved_tensors(path)[1] if name.endswith(("running_mean", "running_variance"))]
    assert len(moments) == (8 if norm == "batch" else 0)


def test_no_world_changes_batch_norm_and_dropout(make_tree, groups):
    tree = make_tree({**MODELS["deepfm"], "norm": "batch", "dropout": 0.2})
    assert_plan_invariant(build_config(tree, {}, "test"), steps=6, worlds=(2,), types=["row_wise"], groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_no_world_and_no_cut_changes_what_is_trained(make_tree, kind, groups):
    assert_plan_invariant(
        build_config(make_tree(MODELS[kind]), {}, "test"), steps=6, worlds=(2,), types=["row_wise"], groups=groups
    )


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("dlrm", {"features": ["user", "items"]}, "there is no feature 'items'. Did you mean 'item'"),
        ("dlrm", {"features": ["user", "user"]}, "'user' is there twice"),
        ("dlrm", {"features": ["user"], "sequences": {}}, "there is one vector. Give it more features"),
        ("dlrm", {"features": ["hour"], "sequences": {}}, "none of its features has a table"),
        ("dcn_v2", {"low_rank": 42}, "low_rank=42 is no less than the 34 numbers"),
        ("wide_and_deep", {"wide": ["seen"]}, "'seen' is a sequence"),
        ("wide_and_deep", {"features": ["user", "seen"], "wide": ["item"]}, "does not read a feature 'item'"),
        ("dlrm", {"sequences": {"tags": "mean"}}, "feature 'tags' is a bag, one vector already"),
        ("dlrm", {"sequences": {"sean": "mean"}}, "does not read a feature 'sean'. Did you mean 'seen'"),
        (
            "dlrm",
            {"sequences": {"seen": {"kind": "target_attention", "target": "tags"}}},
            "'tags' is a bag; it must be an id",
        ),
        ("dlrm", {"sequences": {"seen": {"kind": "target_attention", "target": "itm"}}}, "there is no feature 'itm'"),
    ],
)
def test_what_a_model_cannot_read_is_refused(make_tree, kind, changes, words):
    with pytest.raises(ConfigError, match=words):
        build_config(make_tree(MODELS[kind] | changes), {}, "test")


def test_what_does_not_go_with_a_ranking_model_is_refused(make_tree):
    with pytest.raises(ConfigError, match=r"'in_batch_softmax' is not for a model of kind 'deepfm'.*Choose 'bce'"):
        build_config(make_tree(MODELS["deepfm"], objective={"kind": "in_batch_softmax"}), {}, "test")
    with pytest.raises(ConfigError, match="'recall@5' ranks items by the product of two vectors"):
        build_config(make_tree(MODELS["deepfm"], evaluate={"metrics": ["recall@5"]}), {}, "test")
    tree = make_tree(MODELS["deepfm"])
    tree["tables"]["user"]["dim"] = 4
    with pytest.raises(ConfigError, match=r"differ in size \(user: 4, item: 8"):
        build_config(tree, {}, "test")
    tree["model"] = MODELS["dcn_v2"] | {"sequences": {"seen": {"kind": "target_attention", "target": "user"}}}
    with pytest.raises(ConfigError, match="'user' has vectors of 4 numbers, 'seen' of 8"):
        build_config(tree, {}, "test")
    tree = make_tree(MODELS["deepfm"])
    tree["data"]["labels"] = {"click": "click", "buy": "buy"}
    del tree["data"]["label"]
    with pytest.raises(ConfigError, match="learns one label, data names 2"):
        build_config(tree, {}, "test")
    with pytest.raises(ConfigError, match=r"objective\.label_weights: there is no label 'bye'. Did you mean 'buy'"):
        build_config(make_tree(MODELS["mmoe"], objective={"kind": "bce", "label_weights": {"bye": 2}}), {}, "test")


# --------------------------------------------------------------------------------------------------------------- metrics
LOOKED_AT = ["auc", "pr_auc", "gauc", "log_loss", "normalised_entropy", "calibration"]


def launch(tree, path, workers):
    config = path.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    run_ranks(workers, "train", config, "--run-dir", path)


def watched(values):
    return {name: value for name, value in values.items() if name.startswith(("train/window", "train/run"))}


class Recorder(Reporter):
    """Keeps what was measured of training rows."""

    def __init__(self):
        self.found = []

    def measured(self, step, values):
        self.found += [watched(values)] if watched(values) else []


def test_metrics_slices_and_intervals_are_in_the_result_and_the_report(run_tree, make_tree, tmp_path):
    tree = make_tree({**MODELS["dcn_v2"], "user_id": "user"})
    tree["evaluate"] = {"metrics": LOOKED_AT, "slice_by": ["item", "shop"], "bootstrap": 40}
    tree["train"] |= {"epochs": 3}
    result = run_tree(tree, tmp_path / "run")
    metrics, intervals, slices = result["metrics"], result["intervals"], result["column_slices"]
    assert list(metrics) == list(intervals) == LOOKED_AT
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert metrics["normalised_entropy"] < 1.0
    assert result["evaluated"]["test"] == {"rows": 400, "gauc_groups": USERS}
    assert sorted(slices["item"], key=int) == [str(item) for item in range(ITEMS)]
    assert sum(values["rows"] for values in slices["item"].values()) == 400
    assert list(slices["shop"]) == ["north", "null", "south"]
    parts = slices["shop"].values()
    assert sum(part["rows"] * part["log_loss"] for part in parts) / 400 == pytest.approx(metrics["log_loss"])
    again = evaluate_here(tmp_path / "run", None, "cpu", {})
    assert (again["intervals"], again["column_slices"]) == (intervals, slices)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By shop" in page
    assert "north" in page
    assert "95 %" in page


def test_users_who_are_unknown_are_nobody(run_tree, make_tree, tmp_path):
    """All that the vocabulary does not know share a row of the table, and were one user to AUC within users."""
    tree = make_tree({**MODELS["dcn_v2"], "user_id": "user"})
    tree["features"]["user"]["unknown"] = "oov"
    tree["tables"]["user"]["rows"] = USERS - 3
    tree["train"] |= {"max_steps": 4, "metrics": ["gauc"]}
    tree["evaluate"] = {"metrics": ["gauc"]}
    recorder = Recorder()
    result = run_tree(tree, tmp_path / "run", reporter=recorder)
    assert result["evaluated"]["test"]["gauc_groups"] == USERS - 3
    assert 0 < recorder.found[-1]["train/window/gauc"] < 1


def test_training_rows_are_measured_as_they_are_predicted(run_tree, make_tree, tmp_path):
    tree = make_tree({**MODELS["dcn_v2"], "user_id": "user"})
    tree["train"] |= {"metrics": ["auc", "normalised_entropy", "calibration", "gauc"], "log_every_steps": 10, "epochs": 2}
    tree["checkpoint"] = {"every_steps": 24, "keep": 9}
    recorder = Recorder()
    run_tree(tree, tmp_path / "whole", reporter=recorder)
    whole = recorder.found
    assert len(whole) == 11
    assert whole[-1]["train/window/auc"] > whole[0]["train/window/auc"] + 0.1
    for name in ("auc", "gauc"):
        assert whole[0][f"train/run/{name}"] < whole[-1][f"train/run/{name}"] < whole[-1][f"train/window/{name}"]
    recorder = Recorder()
    run_tree(tree, tmp_path / "whole", resume_step=24, reporter=recorder)
    assert recorder.found == whole[2:], "the checkpoint has the sums, and the rows of the window that it lies in"
    # A run that ends within a window measures it, and the next window begins there.
    path = tmp_path / "shorter"
    run_tree({**tree, "train": {**tree["train"], "max_steps": 24}}, path)
    (path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    recorder = Recorder()
    run_tree(tree, path, resume_step=24, reporter=recorder)
    names = [name for name in whole[0] if name.startswith("train/run") and "gauc" not in name]
    for one, other in zip(recorder.found, whole[2:], strict=True):
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
    without_gauc = [[{name: value for name, value in one.items() if name != "train/run/gauc"} for one in run]
                    for run in (recorder.found[1:], whole[3:])]  # fmt: skip
    assert without_gauc[0] == without_gauc[1], "the window was measured at step 24, the shorter run's last"


def test_two_workers_measure_training_rows_as_one(make_tree, tmp_path):
    tree = make_tree({**MODELS["mmoe"], "user_id": "user"})
    tree["train"] |= {"metrics": ["auc", "gauc", "log_loss"], "log_every_steps": 20, "max_steps": 40}
    found = []
    for workers in (1, 2):
        path = tmp_path / f"workers-{workers}"
        launch(tree, path, workers)
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        found.append([watched(line) for line in lines if watched(line)])
    alone, together = found
    names = {f"{name}:{label}" for name in ("auc", "gauc", "log_loss") for label in ("click", "buy")}
    assert set(alone[0]) == {f"train/{scope}/{name}" for scope in ("window", "run") for name in names}
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("kind", ["mmoe", "dcn_v2"])
def test_a_partition_is_validated_by_label_and_within_users(run_tree, make_tree, clicks, tmp_path, kind):
    """A model of several labels was refused by an assertion, and AUC within users was not told of any."""
    tree = make_tree({**MODELS[kind], "user_id": "user"})
    days = [str(clicks / "train"), str(clicks / "test")]
    for name in ("train", "test", "weight"):  # held-out rows have no weight, training rows have
        del tree["data"][name]
    tree["data"]["partitions"] = days
    tree["evaluate"] = {"metrics": ["auc", "gauc", "log_loss"], "progressive": True, "batch_size": 150}
    _, second = run_tree(tree, tmp_path / "run")["progressive"]
    names = ["auc", "gauc", "log_loss"]
    if kind == "mmoe":
        names = [part for name in names for part in (name, f"{name}:click", f"{name}:buy")]
    assert [name for name in second if name not in ("partition", "name", "step")] == [*names, "rows"]
    # The same day as a test set, by what the first day alone has taught.
    tree["data"]["test"], tree["evaluate"]["progressive"] = days[1], False
    tree["train"] |= {"max_steps": second["step"]}
    tested = run_tree(tree, tmp_path / "tested")
    assert tested["evaluated"]["test"]["rows"] == second["rows"] == 400
    assert {name: second[name] for name in names} == pytest.approx(tested["metrics"], abs=1e-6)


class Listener(Reporter):
    """Keeps what was said."""

    def __init__(self):
        self.sentences = []

    def said(self, message):
        self.sentences.append(message)


def test_the_best_step_is_that_of_one_label_where_it_is_selected(run_tree, make_tree, clicks, tmp_path):
    """A mean over labels, one of which has one class alone, selected the last step without a word."""
    table = pq.read_table(clicks / "test" / "part.parquet")
    place = table.schema.get_field_index("buy")
    (tmp_path / "validation").mkdir()
    nothing = table.set_column(place, "buy", pa.array([0] * len(table), pa.int8()))
    pq.write_table(nothing, tmp_path / "validation" / "part.parquet")
    tree = make_tree({**MODELS["mmoe"], "user_id": "user"})
    tree["data"]["validation"] = str(tmp_path / "validation")
    tree["train"]["max_steps"] = 12
    tree["evaluate"] = {"metrics": ["auc", "gauc"], "every_steps": 6, "slice_by": "shop", "bootstrap": 20}
    listener = Listener()
    result = run_tree(tree, tmp_path / "mean", reporter=listener)
    assert (result["selected_step"], result["best_validation"]) == (12, None)
    (said,) = [one for one in listener.sentences if "evaluate.select" in one]
    assert "'auc' has no value on the validation set after step 6: auc:buy has none" in said
    assert "rows of both labels" in said
    assert "such as 'auc:click'" in said
    groups = result["evaluated"]["test"]
    assert groups["gauc_groups:click"] == USERS
    assert 0 < groups["gauc_groups:buy"] <= USERS
    assert list(result["intervals"]) == list(result["metrics"])
    assert all(set(result["metrics"]) | {"rows"} == set(values) for values in result["column_slices"]["shop"].values())

    tree["evaluate"] |= {"select": "auc:click", "slice_by": [], "bootstrap": 0}
    listener, recorder = Listener(), []
    listener.measured = lambda step, values: recorder.append((step, values))
    result = run_tree(tree, tmp_path / "click", reporter=listener)
    found = {step: values["validation/auc:click"] for step, values in recorder if "validation/auc:click" in values}
    assert result["best_validation"] == max(found.values())
    assert result["selected_step"] == max(found, key=found.get)
    assert not [one for one in listener.sentences if "evaluate.select" in one]


def test_what_is_no_part_of_a_metric_is_not_selected(make_tree):
    for select, words in (
        ("auc:bye", r"'auc:bye' is not among evaluate\.metrics\. Did you mean 'auc:buy'"),
        ("calibration:buy", "'calibration:buy' is best at 1"),
    ):
        tree = make_tree(MODELS["mmoe"], evaluate={"metrics": ["auc", "calibration"], "select": select})
        tree["data"]["validation"] = tree["data"]["test"]
        with pytest.raises(ConfigError, match=words):
            build_config(tree, {}, "test")
    tree["evaluate"]["select"] = "auc:buy"
    build_config(tree, {}, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"metrics": ["gauc"]}}, r"'gauc' is a mean over users: give model\.user_id"),
        ({"evaluate": {"metrics": [], "bootstrap": 5}}, r"evaluate\.bootstrap looks at labels"),
        ({"evaluate": {"metrics": [], "slice_by": "shop"}}, r"evaluate\.slice_by looks at labels"),
        ({"train": {"metrics": ["gauc"]}}, r"train\.metrics: 'gauc' is a mean over users: give model\.user_id"),
        ({"train": {"metrics": ["f1"]}}, "there is no 'f1' with objective 'bce'. Choose among auc, pr_auc"),
        ({"train": {"metrics": ["auc"]}, "objective": {"kind": "mse"}}, "Choose among rmse, mae"),
        ({"evaluate": {"metrics": ["pr_auc"]}, "objective": {"kind": "mse"}}, "'pr_auc' does not go with objective 'mse'"),
    ],
)
def test_metrics_that_cannot_be_are_refused(make_tree, changes, words):
    with pytest.raises(ConfigError, match=words):
        build_config(make_tree(MODELS["dcn_v2"], **changes), {}, "test")


def test_a_window_of_more_rows_than_can_be_kept_is_refused(make_tree):
    tree = make_tree({**MODELS["dcn_v2"], "user_id": "user"})
    tree["train"] = {"metrics": ["gauc"], "global_batch_size": 2**16, "log_every_steps": 65}
    with pytest.raises(
        ConfigError, match=r"65 steps of 65,536, .* more than 4,194,304\. Set train\.log_every_steps to 64 or"
    ):
        build_config(tree, {}, "test")
    tree["train"]["log_every_steps"] = 64
    build_config(tree, {}, "test")


def test_nothing_is_selected_by_what_has_no_better(make_tree):
    tree = make_tree(MODELS["dcn_v2"], evaluate={"metrics": ["calibration", "auc"]})
    tree["data"]["validation"] = tree["data"]["test"]
    with pytest.raises(ConfigError, match="'calibration' is best at 1"):
        build_config(tree, {}, "test")
    tree["evaluate"]["select"] = "auc"
    build_config(tree, {}, "test")
