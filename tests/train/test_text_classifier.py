"""Sequences through the trainer: every encoder in any world, padding that changes nothing, exact resumption."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.errors import ConfigError
from embedshard.launch.local import evaluate_here
from embedshard.testing import assert_plan_invariant

WORDS = 60


def write_texts(folder, rows, seed, padding=None, length=None):
    """Texts of 0 to 9 words; a label that depends on them; padded with zeros to a length, on one side or the other."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    texts = [generator.integers(1, WORDS, generator.integers(0, 10)).tolist() for _ in range(rows)]
    columns = {
        "words": texts,
        "positive": [int(sum(word % 2 for word in text) * 2 > len(text)) for text in texts],
        "topic": [int(np.bincount(np.array(text, dtype=int) % 3, minlength=3).argmax()) for text in texts],
        "user": generator.integers(0, 5, rows).tolist(),
        "age": generator.random(rows).tolist(),
    }
    if padding is not None:
        zeros = [[0] * (length - len(text)) for text in texts]
        pairs = zip(texts, zeros, strict=True)
        columns["words"] = [text + fill if padding == "post" else fill + text for text, fill in pairs]
    table = pa.table(columns)
    pq.write_table(table, folder / "part.parquet", row_group_size=50)


@pytest.fixture
def make_tree(tmp_path):
    def make(encoder, name="data", objective=None, features=(), **written):
        root = tmp_path / name
        if not root.exists():
            for split, rows, seed in (("train", 203, 1), ("test", 80, 2)):
                write_texts(root / split, rows, seed, **written)
        objective = objective or {"kind": "bce"}
        is_binary = objective["kind"] == "bce"
        return {
            "seed": 5,
            "data": {
                "train": str(root / "train"), "test": str(root / "test"), "lanes": 4,
                "label": "positive" if is_binary else "topic",
            },
            "features": {
                "words": {"kind": "sequence", "table": "word", "max_length": 12, "mask_zero": True},
                "user": {"kind": "id", "table": "user"},
                "age": {"kind": "dense"},
            },
            "tables": {
                "word": {"rows": WORDS, "dim": 8, "init": {"scale": 0.5}},
                "user": {"rows": 5, "dim": 4},
            },
            "model": {
                "kind": "text_classifier", "text": "words", "features": ["user", "age"], "encoder": encoder, "mlp": [6],
                "dropout": 0.2,
            },
            "objective": objective,
            "optimizer": {"tables": {"lr": 0.2}, "dense": {"kind": "adam", "lr": 0.02}},
            "train": {"global_batch_size": 32, "epochs": 1},
            "evaluate": {"metrics": ["accuracy", "f1", "log_loss"]},
            "tracking": {"tensorboard": False},
        }  # fmt: skip

    return make


ENCODERS = [
    {"kind": "flatten", "padding": "pre"},
    "mean",
    "max",
    "attention",
    {"kind": "conv", "widths": [2, 3], "channels": 5},
    {"kind": "gru", "hidden": 6},
    {"kind": "lstm", "hidden": 6, "bidirectional": True},
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder if isinstance(encoder, str) else encoder["kind"])
def test_zeros_before_and_after_the_text_change_nothing(
    run_tree, make_tree, tmp_path, saved_tensors, assert_same_tensors, encoder
):
    run_tree(make_tree(encoder), tmp_path / "bare")
    bare = saved_tensors(tmp_path / "bare")
    for padding, length in (("pre", 9), ("post", 9), ("post", 14)):
        name = f"{padding}{length}"
        run_tree(make_tree(encoder, name, padding=padding, length=length), tmp_path / f"run-{name}")
        assert_same_tensors(saved_tensors(tmp_path / f"run-{name}"), bare)


def test_the_row_of_the_padding_is_never_trained(run_tree, make_tree, tmp_path, saved_tensors):
    tree = make_tree("mean", "padded", padding="pre", length=12)
    tree["train"]["epochs"] = 2
    run_tree({**tree, "train": {**tree["train"], "max_steps": 1}}, tmp_path / "before")
    run_tree(tree, tmp_path / "after")
    before, after = (saved_tensors(tmp_path / name)[1]["tables/word/weight"] for name in ("before", "after"))
    moved = (before != after).any(dim=1)
    assert not moved[0]
    assert moved[1:WORDS].all()


@pytest.mark.parametrize("encoder", ["attention", {"kind": "conv", "widths": [2, 3]}, {"kind": "lstm", "hidden": 6}])
def test_a_stopped_run_goes_on_bit_for_bit(run_tree, make_tree, tmp_path, saved_tensors, assert_same_tensors, encoder):
    tree = make_tree(encoder)
    whole = run_tree(tree, tmp_path / "whole")
    path = tmp_path / "run"
    run_tree({**tree, "train": {**tree["train"], "max_steps": 5}}, path)
    (path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    resumed = run_tree(tree, path, resume_step=5)
    assert_same_tensors(saved_tensors(path), saved_tensors(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_no_world_and_no_cut_changes_what_is_trained(make_tree, groups):
    tree = make_tree({"kind": "gru", "hidden": 6})
    tree["features"]["spoken"] = {"kind": "bag", "table": "word", "column": "words", "pooling": "mean", "mask_zero": True}
    tree["model"]["features"].append("spoken")
    assert_plan_invariant(build_config(tree, {}, "test"), steps=8, worlds=(2,), types=["row_wise"], groups=groups)


def test_several_classes_are_told_apart(run_tree, make_tree, tmp_path):
    tree = make_tree("mean", objective={"kind": "cross_entropy", "classes": 3})
    tree["train"]["epochs"] = 12
    tree["evaluate"] |= {"metrics": [*tree["evaluate"]["metrics"], "auc"], "slice_by": "user", "bootstrap": 20}
    result = run_tree(tree, tmp_path / "run")
    metrics, slices, intervals = result["metrics"], result["column_slices"]["user"], result["intervals"]
    parts = [f"auc:{number}" for number in range(3)]
    assert list(metrics) == ["accuracy", "f1", "f1:0", "f1:1", "f1:2", "log_loss", "auc", *parts]
    assert metrics["accuracy"] > 0.6, "a third by chance"
    assert metrics["auc"] == pytest.approx(sum(metrics[name] for name in parts) / 3)
    assert metrics["auc"] > 0.75
    assert list(intervals) == list(metrics)
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    rows = result["evaluated"]["test"]["rows"]
    assert sum(part["rows"] for part in slices.values()) == rows
    assert sum(part["rows"] * part["accuracy"] for part in slices.values()) / rows == pytest.approx(metrics["accuracy"])
    again = evaluate_here(tmp_path / "run", None, "cpu", {})
    assert (again["test"], again["column_slices"], again["intervals"]) == (metrics, result["column_slices"], intervals)


def test_two_classes_have_one_auc_and_training_rows_of_classes_no_metrics(make_tree):
    tree = make_tree("mean", objective={"kind": "cross_entropy", "classes": 2})
    tree["evaluate"] = {"metrics": ["auc", "f1"]}
    assert build_config(tree, {}, "test").measured() == ["auc", "f1", "f1:0", "f1:1"]
    tree["train"]["metrics"] = ["auc"]
    with pytest.raises(
        ConfigError, match=r"one logit a label, and objective 'cross_entropy' gives a row 2, one a class.*'bce'"
    ):
        build_config(tree, {}, "test")
    tree["train"]["metrics"], tree["evaluate"]["metrics"] = [], ["pr_auc"]
    with pytest.raises(ConfigError, match=r"'pr_auc' does not go with objective 'cross_entropy'\. .*: log_loss, auc"):
        build_config(tree, {}, "test")


def test_a_text_is_learnt(run_tree, make_tree, tmp_path):
    tree = make_tree("mean")
    tree["train"]["epochs"] = 12
    tree["evaluate"]["metrics"].append("auc")
    result = run_tree(tree, tmp_path / "run")
    assert result["metrics"]["auc"] > 0.85
    assert result["metrics"]["accuracy"] > result["baselines"]["mean"]["accuracy"] + 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "user"}, "model.text: feature 'user' is pooled"),
        ({"features": ["words"]}, "model.features: 'words' is a sequence"),
        ({"text": "word"}, "there is no feature 'word'. Did you mean 'words'"),
        ({"text": None, "features": []}, "it reads nothing"),
    ],
)
def test_what_cannot_be_encoded_is_refused(make_tree, changes, words):
    tree = make_tree("mean")
    tree["model"] |= changes
    with pytest.raises(ConfigError, match=words):
        build_config(tree, {}, "test")


def test_what_does_not_go_with_a_text_is_refused(make_tree):
    tree = make_tree({"kind": "flatten"})
    del tree["features"]["words"]["max_length"]
    with pytest.raises(ConfigError, match=r"as many inputs as the longest text: give features\.words\.max_length"):
        build_config(tree, {}, "test")
    tree = make_tree("mean")
    tree["objective"] = {"kind": "in_batch_softmax"}
    with pytest.raises(ConfigError, match=r"compares items, and a text_classifier has none\. Choose 'bce'"):
        build_config(tree, {}, "test")
    tree = make_tree("mean")
    tree["tables"]["word"]["sharding"] = {"types": ["table_row_wise"]}
    with pytest.raises(ConfigError, match="TorchRec has no table_row_wise for tables that a sequence looks up"):
        build_config(tree, {}, "test")
    tree = make_tree("mean")
    tree["evaluate"]["metrics"] = ["rmse", "recall@5"]
    with pytest.raises(ConfigError, match=r"'recall@5' ranks items for users"):
        build_config(tree, {}, "test")
