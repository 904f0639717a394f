import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from embedshard.sharding import row_tables
from embedshard.sharding.row_tables import RowTables, take_over_tables

ROWS, DIM, BATCH = (7, 300), 8, 16


class Kernel(nn.Module):
    """What TorchRec's fused kernels look like from outside."""

    def __init__(self, optimizer, pooling, dtype):
        super().__init__()
        self.fused_optimizer = None
        self.config = SimpleNamespace(embedding_tables=[SimpleNamespace(name="small"), SimpleNamespace(name="large")])
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


def trained(is_taken_over, optimizer, pooling=PoolingMode.NONE, dtype=SparseType.FP32, steps=4, is_weighted=False):
    model = Lookups(optimizer, pooling, dtype)
    if is_taken_over:
        take_over_tables(model)
    tables = model._lookups[0].emb_module
    generator = np.random.default_rng(5)
    losses = []
    for _ in range(steps):
        lengths = generator.integers(0, 4, 3 * BATCH)
        per_feature = lengths.reshape(3, BATCH).sum(axis=1)
        limits = np.repeat([ROWS[0], ROWS[0], ROWS[1]], per_feature)
        ids = torch.from_numpy((generator.random(len(limits)) * limits).astype(np.int64))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        weights = torch.from_numpy(generator.random(len(ids), dtype=np.float32)) if is_weighted else None
        found = tables(ids, offsets, weights)
        loss = (found.sin() * torch.arange(1, found.shape[1] + 1)).sum() / 20
        loss.backward()
        losses.append(loss.item())
    states = tables.split_optimizer_states()
    return tables, losses, [*tables.split_embedding_weights(), *(state for of_table in states for state in of_table)]


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(SparseType.FP32, 4, 1e-5), (SparseType.FP16, 1, 4e-3)])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
@pytest.mark.parametrize("optimizer", ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"])
def test_tables_are_trained_as_fbgemm_trains_them(optimizer, pooling, is_weighted, dtype, steps, tolerance):
    if is_weighted and pooling == PoolingMode.NONE:
        pytest.skip("a sequence has no weights")
    arguments = EmbOptimType[optimizer], pooling, dtype, steps, is_weighted
    tables, losses, tensors = trained(True, *arguments)
    assert isinstance(tables, RowTables)
    kernel, expected_losses, expected = trained(False, *arguments)
    assert not isinstance(kernel, RowTables)
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance, atol=tolerance)
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.float(), other.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
@pytest.mark.parametrize("optimizer", ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"])
@pytest.mark.parametrize("rows", [[2, 5, 40, 299], [2, 5, 5, 299], [5, 2, 40, 299]], ids=["different", "twice", "unsorted"])
def test_rows_that_are_different_and_in_order_are_moved_as_others(optimizer, pooling, rows, monkeypatch):
    grouped, group = [], row_tables._grouped
    monkeypatch.setattr(row_tables, "_grouped", lambda ids, count: (grouped.append(ids.tolist()), group(ids, count))[1])
    tensors = []
    for is_taken_over in (True, False):
        model = Lookups(EmbOptimType[optimizer], pooling, SparseType.FP32)
        if is_taken_over:
            take_over_tables(model)
        tables = model._lookups[0].emb_module
        lengths = [0] * 2 * BATCH + [1] * len(rows) + [0] * (BATCH - len(rows))  # of the large table's feature alone
        found = tables(torch.tensor(rows), torch.tensor(np.concatenate([[0], np.cumsum(lengths)])))
        (found.sin() * torch.arange(1, found.shape[1] + 1)).sum().backward()
        states = [state for of_table in tables.split_optimizer_states() for state in of_table]
        tensors.append([*tables.split_embedding_weights(), *states])
    assert grouped == ([] if rows == sorted(set(rows)) else [rows])
    for tensor, other in zip(*tensors, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
@pytest.mark.parametrize("dtype", [SparseType.FP32, SparseType.FP16])
def test_more_threads_give_the_same_bits(pooling, dtype, monkeypatch):
    arguments = True, EmbOptimType.EXACT_ROWWISE_ADAGRAD, pooling, dtype
    alone = trained(*arguments)[1:]
    monkeypatch.setattr(row_tables, "_LEAST_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    spans = []
    move = row_tables.move_rows
    monkeypatch.setattr(row_tables, "move_rows", lambda *given: (spans.append(given[-2:]), move(*given)))
    losses, tensors = trained(*arguments)[1:]
    assert any(first > 0 for first, _ in spans)
    assert losses == alone[0]
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, alone[1], strict=True))


@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
@pytest.mark.parametrize("wrong", [-1, ROWS[1]])
def test_an_id_that_is_no_row_is_an_error(pooling, wrong):
    model = Lookups(EmbOptimType.EXACT_SGD, pooling, SparseType.FP32)
    take_over_tables(model)
    with pytest.raises(
        IndexError, match=f"row {wrong} was looked up in table 'large', of which this rank has {ROWS[1]} rows"
    ):
        model._lookups[0].emb_module(torch.tensor([0, 1, wrong]), torch.tensor([0, 1, 2, 3]))


def test_the_same_batches_give_the_same_bits():
    for tensor, other in zip(
        trained(True, EmbOptimType.EXACT_ROWWISE_ADAGRAD)[2],
        trained(True, EmbOptimType.EXACT_ROWWISE_ADAGRAD)[2],
        strict=True,
    ):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize(("rows_an_id", "num_rows"), [(8, 40), (0, 40), (0, 2**62)], ids=["counted", "packed", "sorted"])
def test_ids_are_grouped_the_same_in_all_ways(rows_an_id, num_rows, monkeypatch):
    monkeypatch.setattr(row_tables, "_ROWS_AN_ID", rows_an_id)
    ids = np.random.default_rng(3).integers(0, 40, 200)
    rows, places, begins = row_tables._grouped(ids, num_rows)
    assert rows.tolist() == sorted(set(ids.tolist()))
    assert [places[begin:end].tolist() for begin, end in pairwise(begins)] == [
        np.flatnonzero(ids == row).tolist() for row in rows
    ]


@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
def test_a_batch_of_no_rows_has_no_vectors_and_moves_nothing(pooling):
    model = Lookups(EmbOptimType.EXACT_SGD, pooling, SparseType.FP32)
    take_over_tables(model)
    tables = model._lookups[0].emb_module
    before = [weight.clone() for weight in tables.split_embedding_weights()]
    found = tables(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0, DIM if pooling == PoolingMode.NONE else 3 * DIM)
    assert all(torch.equal(weight, former) for weight, former in zip(tables.split_embedding_weights(), before, strict=True))


def test_without_a_folder_to_write_to_loops_are_compiled_and_not_kept(tmp_path):
    program = """
import numpy as np
from embedshard.sharding.row_kernels import bags_of_ids
print(bags_of_ids(np.array([0, 2, 3])).tolist())
"""
    for cache in (tmp_path / "kept", "/dev/full/none"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(cache)], capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        )  # fmt: skip
        assert (done.returncode, done.stdout.strip()) == (0, "[0, 0, 1]"), done.stderr
    assert any((tmp_path / "kept").rglob("*.nbi"))


def test_all_tables_that_are_looked_up_together_take_a_step_if_one_has_a_gradient(monkeypatch):
    kernels = [Lookups(EmbOptimType.EXACT_SGD, PoolingMode.SUM, SparseType.FP32) for _ in range(2)]
    for model in kernels:
        take_over_tables(model)
    tables = [model._lookups[0].emb_module for model in kernels]
    stepped = []
    move = row_tables.move_rows
    monkeypatch.setattr(row_tables, "move_rows", lambda *given: (stepped.append(len(given[7])), move(*given)))
    ids, offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])
    found = row_tables.look_up_by_feature([(one, ids, offsets, None) for one in tables])
    found[0][0].sum().backward()
    # A row of each feature, two features on one table: Adam would move them all, as with TorchRec's joined vectors.
    assert stepped == [2, 1, 2, 1]
