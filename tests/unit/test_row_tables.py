import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from embedshard.sharding.row_tables import RowTables, take_over_sequences

ROWS, DIM, BATCH = (7, 300), 8, 16


class Kernel(nn.Module):
    """What TorchRec's fused kernels look like from outside."""

    def __init__(self, optimizer, pooling, dtype):
        super().__init__()
        self.fused_optimizer = None
        self.emb_module = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
            feature_table_map=[0, 0, 1],
            optimizer=optimizer,
            pooling_mode=pooling,
            weights_precision=dtype,
            learning_rate=0.3,
            eps=1e-6,
            stochastic_rounding=False,
        )
        generator = torch.Generator().manual_seed(3)
        for weight in self.emb_module.split_embedding_weights():
            weight.copy_(torch.randn(weight.shape, generator=generator))


class Lookups(nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self._lookups = [Kernel(*arguments)]


def trained(is_taken_over, optimizer, pooling=PoolingMode.NONE, dtype=SparseType.FP32, steps=4):
    model = Lookups(optimizer, pooling, dtype)
    if is_taken_over:
        take_over_sequences(model)
    tables = model._lookups[0].emb_module
    generator = np.random.default_rng(5)
    losses = []
    for _ in range(steps):
        lengths = generator.integers(0, 4, 3 * BATCH)
        per_feature = lengths.reshape(3, BATCH).sum(axis=1)
        limits = np.repeat([ROWS[0], ROWS[0], ROWS[1]], per_feature)
        ids = torch.from_numpy((generator.random(len(limits)) * limits).astype(np.int64))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        found = tables(ids, offsets)
        loss = (found.sin() * torch.arange(1, found.shape[1] + 1)).sum()
        loss.backward()
        losses.append(loss.item())
    states = tables.split_optimizer_states()
    return tables, losses, [*tables.split_embedding_weights(), *(state for of_table in states for state in of_table)]


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(SparseType.FP32, 4, 1e-5), (SparseType.FP16, 1, 4e-3)])
@pytest.mark.parametrize("optimizer", ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"])
def test_sequences_are_trained_as_fbgemm_trains_them(optimizer, dtype, steps, tolerance):
    tables, losses, tensors = trained(True, EmbOptimType[optimizer], dtype=dtype, steps=steps)
    assert isinstance(tables, RowTables)
    _, expected_losses, expected = trained(False, EmbOptimType[optimizer], dtype=dtype, steps=steps)
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.float(), other.float(), rtol=tolerance, atol=tolerance)


def test_the_same_batches_give_the_same_bits():
    for tensor, other in zip(
        trained(True, EmbOptimType.EXACT_ROWWISE_ADAGRAD)[2],
        trained(True, EmbOptimType.EXACT_ROWWISE_ADAGRAD)[2],
        strict=True,
    ):
        assert torch.equal(tensor, other)


def test_bags_keep_fbgemms_own_kernel():
    assert not isinstance(trained(True, EmbOptimType.EXACT_SGD, PoolingMode.SUM)[0], RowTables)
