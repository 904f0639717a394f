"""Stochastic rounding of fp16 tables: offered where FBGEMM does it, refused elsewhere."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.utils import add_params_from_parameter_sharding

from embedshard.config import table_specs
from embedshard.errors import ConfigError
from embedshard.models.registry import build_model
from embedshard.models.summary import sharding_exceptions
from embedshard.sharding.optimizers import attach_table_optimizers
from embedshard.sharding.plan import make_plan
from embedshard.sharding.shard import make_sharders, round_at_random
from embedshard.world import open_world


@pytest.fixture
def rounded(make_config):
    return make_config({"tables": {"item": {"dtype": "fp16", "stochastic_rounding": True}}}).config


def test_a_table_that_asks_for_it_and_no_other_is_given_it(rounded):
    specs = table_specs(rounded, {"user": 40, "item": 30})
    assert [spec.name for spec in specs if spec.stochastic_rounding] == ["item"], "the bias is fp32"
    model = build_model(rounded, specs)
    attach_table_optimizers(model, specs)
    with open_world("cpu") as world:
        plan = make_plan(model, specs, make_sharders(rounded, torch.device("cuda")), "auto", world, 32)
    round_at_random(plan, specs)
    placed_tables = [pair for module_plan in plan.plan.values() for pair in module_plan.items()]
    assert len(placed_tables) == 3
    for name, placed in placed_tables:
        told = add_params_from_parameter_sharding({"stochastic_rounding": False}, placed)
        assert told["stochastic_rounding"] is (name == "item"), name
    assert "tables.item.stochastic_rounding rounds its updates at random." in sharding_exceptions(rounded, specs)


def test_it_is_refused_where_it_has_no_effect(rounded, make_config):
    with pytest.raises(ConfigError, match=r"tables\.item\.stochastic_rounding: FBGEMM rounds at random on CUDA alone"):
        make_sharders(rounded, torch.device("cpu"))
    with pytest.raises(ConfigError, match="dtype 'fp32' is not"):
        make_config({"tables": {"item": {"stochastic_rounding": True}}})


def test_on_a_cpu_fbgemm_rounds_to_the_nearest_whatever_it_is_told():
    """The reason for the refusal: an update of a quarter of the distance between two fp16 numbers is always lost."""
    kept = []
    for at_random in (False, True):
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(1000, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_SGD, learning_rate=2.0**-12, weights_precision=SparseType.FP16,
            output_dtype=SparseType.FP32, stochastic_rounding=at_random,
        )  # fmt: skip
        (weight,) = tables.split_embedding_weights()
        weight.fill_(1.0)  # neighbours below are 2**-11 apart
        tables(torch.arange(1000), torch.arange(1001)).sum().backward()
        kept.append(weight.clone())
    assert torch.equal(kept[0], torch.ones(1000, 8).half())
    assert torch.equal(kept[0], kept[1])
