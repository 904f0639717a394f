"""Products of the dense part in bfloat16: what is rounded, what is not, and what comes of it."""

import pytest
import torch
from torch import nn

from embedshard.config import build_config
from embedshard.models.output import LabelOutput, in_full
from embedshard.sharding.shards import weight_shards
from embedshard.train.assembly import assemble
from embedshard.world import open_world

USER, ITEM = {"user_id": {"kind": "id", "table": "user"}}, {"item_id": {"kind": "id", "table": "item"}}
RANKING = {"objective": {"kind": "bce"}, "data": {"label": "clicked"}, "evaluate": {"metrics": ["auc"]}}
CASES = {
    "two towers": {},
    "two towers, repeats mapped once": {
        **RANKING,
        "model": {
            "user": {"features": ["user_id"], "mlp": [16, 8]},
            "item": {"features": ["item_id"], "mlp": [8]},
            "biases": [],
        },
    },
    **{
        kind: {**RANKING, "model": {"kind": kind, "mlp": [16], **more}}
        for kind, more in {
            "dlrm": {"dense_mlp": [8]},
            "dcn_v2": {},
            "deepfm": {},
            "wide_and_deep": {},
        }.items()
    },
    "dlrm, batch norm": {**RANKING, "model": {"kind": "dlrm", "mlp": [16], "dense_mlp": [8], "norm": "batch"}},
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_rounded_and_the_rest_is_not(make_config, case):
    losses, weights, seen = {}, {}, set()
    for precision in ("fp32", "bf16"):
        config = build_config(make_config({**CASES[case], "train": {"precision": precision}}).tree, {}, "test")
        with open_world("cpu") as world:
            parts = assemble(config, world)
            for module in parts.model.modules():
                if isinstance(module, nn.Linear) and precision == "bf16":
                    module.register_forward_hook(lambda _, given, made: seen.add(made.dtype))
            with parts.reader().batches(0, 8) as batches:
                for batch in batches:
                    parts.optimizers.set_learning_rates(batch.position.step, 14)
                    losses.setdefault(precision, []).append(parts.stepper.take(batch, stop_asked=False).loss)
            weights[precision] = {shard.table: shard.tensor.clone() for shard in weight_shards(parts.model)}
            assert {value.dtype for value in parts.model.parameters()} == {torch.float32}
            rounded = set(seen)
            parts.evaluator.evaluate(parts.model, "test")
            if precision == "bf16":
                assert rounded == {torch.bfloat16}
                assert seen == {torch.bfloat16, torch.float32}, "evaluation is in float32"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    for table, values in weights["fp32"].items():
        assert not torch.equal(values, weights["bf16"][table])
        moved = (values - weights["bf16"][table]).abs().mean()
        assert moved < 0.05 * values.abs().mean(), table


def test_an_output_is_in_full():
    output = LabelOutput(torch.ones(2, 1, dtype=torch.bfloat16), {"user": torch.ones(2, 3)})
    assert in_full(output).logits_BL.dtype == torch.float32
    assert in_full(output).lookups is output.lookups
    plain = LabelOutput(torch.ones(2, 1), {})
    assert in_full(plain) is plain
    assert in_full("of a custom model") == "of a custom model"
