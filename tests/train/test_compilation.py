"""The dense part through `torch.compile`: the same result, and no other trace of it."""

import re

import pytest
import torch
from torch import nn

from embedshard.config import build_config
from embedshard.errors import ConfigError, TrainingError
from embedshard.launch.export import export_here
from embedshard.models.dlrm import DLRM as Model
from embedshard.sharding.shards import weight_shards
from embedshard.train import compilation
from embedshard.train.assembly import assemble
from embedshard.world import open_world
from tests.train.test_precision import CASES, RANKING

REPEATS = CASES["two towers, repeats mapped once"]
DLRM = CASES["dlrm"]
COMPILED = {
    "two towers": {},
    "two towers, repeats mapped once": REPEATS,
    "two towers, drawn negatives": {"objective": {"kind": "sampled_softmax", "num_negatives": 16}},
    **{kind: CASES[kind] for kind in ("dlrm", "dcn_v2", "deepfm", "wide_and_deep")},
    "dlrm, bf16": {**DLRM, "train": {"precision": "bf16"}},
    "dlrm, dropout": {**DLRM, "model": {**DLRM["model"], "dropout": 0.4, "mlp": [8], "dense_mlp": []}},
    "dcn_v2, layer norm": {**CASES["dcn_v2"], "model": {**CASES["dcn_v2"]["model"], "norm": "layer"}},
    "mmoe": {
        **RANKING,
        "data": {"labels": {"click": "clicked", "other": "clicked"}},
        "model": {"kind": "mmoe", "mlp": [8], "expert_mlp": [8], "experts": 2},
    },
    "text_classifier": {
        **RANKING,
        "model": {"kind": "text_classifier", "features": ["user_id", "item_id", "age"], "mlp": [8]},
    },
}
FAST = ("two towers, repeats mapped once", "dlrm")
"""Each compiles for seconds: the others are for `make test-all`."""


def trained(tree, steps, between=None, **changes):
    """Trains some steps; returns losses, weights, the keys of what is saved, what was told, and the parts."""
    config = build_config({**tree, "train": {**tree["train"], **changes}}, {}, "test")
    with open_world("cpu") as world:
        parts, losses = assemble(config, world), []
        with parts.reader().batches(0, steps) as batches:
            for batch in batches:
                parts.optimizers.set_learning_rates(batch.position.step, 14)
                losses.append(parts.stepper.take(batch, stop_asked=False).loss)
                if between is not None:
                    between(parts)
        weights = {shard.table: shard.tensor.clone() for shard in weight_shards(parts.model)}
        weights |= {name: value.detach().clone() for name, value in parts.model.named_parameters()}
        keys = list(parts.model.state_dict())
        news = [] if parts.compiled is None else parts.compiled.news()
    return losses, weights, keys, news


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in COMPILED])
def test_a_compiled_dense_part_gives_the_same(make_config, case):
    tree = make_config(COMPILED[case]).tree
    drawn = []

    def evaluate(parts):
        drawn.append(parts.evaluator.evaluate(parts.model, "test"))

    expected, weights, keys, _ = trained(tree, 12)
    found, compiled, own_keys, news = trained(tree, 12, evaluate, compile=True)
    assert found == pytest.approx(expected, rel=0.02 if "bf16" in case else 1e-5)
    assert own_keys == keys, "parameters are named as ever"
    for name, values in weights.items():
        assert torch.allclose(compiled[name], values, rtol=0, atol=2e-3 if "bf16" in case else 2e-5), name
    graphs = "[123] graphs?" if "repeats" in case else "1 graph"
    assert len(drawn) == 12, "an evaluation after each step neither compiles nor needs another graph"
    (said,) = news
    assert re.fullmatch(rf"The dense part is compiled: {graphs} in [0-9.]+ s by now\.", said), said


def test_a_run_that_resumes_is_computed_by_the_same_graphs(
    make_config, tmp_path, run_tree, saved_tensors, assert_same_tensors, monkeypatch
):
    tree = make_config({**REPEATS, "train": {"compile": True}, "checkpoint": {"every_steps": 5, "keep": 9}}).tree
    run_tree(tree, tmp_path / "whole")
    run_tree(tree, tmp_path / "resumed")
    run_tree(tree, tmp_path / "resumed", resume_step=5)
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "resumed"))
    monkeypatch.setattr(torch, "compile", None)  # whoever exports or evaluates a run needs no compiler
    assert export_here(tmp_path / "whole", tmp_path / "export", {}).manifest is not None


def test_more_kinds_of_batches_than_torch_compiles_are_told_of_and_trained(make_config):
    tree = make_config(REPEATS).tree
    expected = trained(tree, 12)[0]
    with torch._dynamo.config.patch(recompile_limit=1):
        found, _, _, news = trained(tree, 12, compile=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert news[0].startswith("The dense part is compiled: 1 graph in")
    assert news[1].startswith(
        "The dense part is no longer compiled, and trained without from here on: torch compiles no more"
    )
    assert len(news) == 2


def test_without_a_compiler_it_is_said_what_is_needed(make_config, monkeypatch):
    def compile_nothing(*given, **named):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    tree = make_config(DLRM).tree
    with pytest.raises(ConfigError, match=r"train\.compile: .*\(RuntimeError: No working C\+\+ .* found\).* needs a C\+\+"):
        trained(tree, 1, compile=True)
    config = build_config({**tree, "train": {**tree["train"], "compile": True, "max_steps": 0}}, {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        assert parts.evaluator.evaluate(parts.model, "test"), "what trains nothing compiles nothing"


def test_cuda_graphs_are_refused_on_a_cpu(make_config):
    with pytest.raises(ConfigError, match=r"train\.compile\.mode is 'reduce-overhead'.* on a CPU\. Choose 'default'"):
        trained(make_config(DLRM).tree, 1, compile={"mode": "reduce-overhead"})


def test_what_torch_cannot_compile_ends_the_run_with_a_way_on(make_config, monkeypatch):
    monkeypatch.setattr(Model, "dense", lambda self, found, batch: torch._dynamo.graph_break())
    monkeypatch.setattr(compilation, "_check_compiler", lambda device: None)
    with pytest.raises(TrainingError, match=r"(?s)torch cannot compile the model's dense part.*train\.compile=false"):
        trained(make_config(DLRM).tree, 1, compile=True)


SEQUENCE = {"features": {"history": {"kind": "sequence", "table": "item", "max_length": 4}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (SEQUENCE, r"the model pools 'history' place by place.*'bag'"),
        ({**DLRM, **SEQUENCE}, r"the model pools 'history' place by place"),
        ({**DLRM, "model": {**DLRM["model"], "norm": "batch"}}, r"model\.norm 'batch'.*Choose 'layer' or 'none'"),
        (
            {"model": {"kind": "custom", "factory": "a:b", "user_id": "user_id", "item_id": "item_id"}},
            r"kind 'custom' may do anything",
        ),
    ],
)
def test_what_is_no_graph_is_refused(make_config, changes, says):
    with pytest.raises(ConfigError, match=rf"train\.compile: .*{says}"):
        make_config({**changes, "train": {"compile": True}})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("fast", r"train\.compile: 'fast' does not fit"),
        ({"mode": "fast"}, r"train\.compile\.mode: 'fast' is not allowed.*default, reduce-overhead"),
        ({"mod": "default"}, r"train\.compile\.mod: unknown key\. Did you mean 'mode'"),
    ],
)
def test_each_form_is_told_of_by_itself(make_config, given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make_config({"train": {"compile": given}})
    assert "1 thing to change" in str(caught.value)


def test_nothing_is_compiled_unless_it_is_asked_for(make_config):
    config = build_config(make_config().tree, {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        assert parts.compiled is None
        assert "dense" not in vars(parts.model.module)
        assert isinstance(parts.model.module, nn.Module)
