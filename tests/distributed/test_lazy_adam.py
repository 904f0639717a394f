"""Lazy Adam against torch's SparseAdam, on TorchRec's own collections; in one process and in several."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType

from embedshard.config.parts import TableOptimizerConfig
from embedshard.sharding.lazy_adam import AdamSteps, LazyAdamTables, lazy_adam_shards, pose_as_sgd, take_over, tell_fbgemm
from embedshard.sharding.optimizers import fuse_optimizer
from embedshard.sharding.plan import AnyTypeSharder
from embedshard.sharding.shards import fused_kernels
from embedshard.world import open_world
from tests.commands import start_python

OPTIMIZER = TableOptimizerConfig(kind="adam", lr=0.02, eps=1e-6, betas=(0.8, 0.95))
TABLES = {"a": (("x", "y"), 11, 8), "b": (("z",), 7, 8)}  # features, rows, columns: one kernel for both, two features for a
FEATURES = ("x", "y", "z")
RATES = (0.02, 0.02, 0.01, 0.03, 0.03, 0.005)


def lookups(is_weighted, batch_size=6):
    """Batches with ids that repeat in a bag, in a batch and over features, with empty bags, and one without any id."""
    generator = np.random.default_rng(3)
    for step in range(len(RATES)):
        lengths = generator.integers(0, 4 if step != 2 else 1, (3, batch_size))
        high = np.repeat([11, 11, 7], lengths.sum(axis=1))
        ids = torch.from_numpy(generator.integers(0, np.minimum(high, 5)))
        weights = torch.from_numpy(generator.random(len(ids)).astype(np.float32) + 0.5)
        yield KeyedJaggedTensor(
            keys=list(FEATURES),
            values=ids,
            lengths=torch.from_numpy(lengths.reshape(-1)).int(),
            weights=weights if is_weighted else None,
        )


def make_collection(is_weighted=False, is_pooled=True, dtype=DataType.FP32):
    device = torch.device("meta")
    shapes = [(name, features, rows, columns) for name, (features, rows, columns) in TABLES.items()]
    if not is_pooled:
        return EmbeddingCollection(
            device=device,
            tables=[
                EmbeddingConfig(name=n, num_embeddings=r, embedding_dim=c, feature_names=list(f), data_type=dtype)
                for n, f, r, c in shapes
            ],
        )
    return EmbeddingBagCollection(
        device=device,
        is_weighted=is_weighted,
        tables=[
            EmbeddingBagConfig(
                name=n,
                num_embeddings=r,
                embedding_dim=c if n == "a" else 4,
                feature_names=list(f),
                pooling=PoolingType.SUM,
                data_type=dtype,
            )
            for n, f, r, c in shapes
        ],
    )


def shard(collection, sharding):
    """Shards as `sharding/shard.py` does; works for either collection."""
    bags = collection.embedding_bags if isinstance(collection, EmbeddingBagCollection) else collection.embeddings
    for bag in bags.values():
        fuse_optimizer(bag.weight, torch.optim.Adam, {"lr": OPTIMIZER.lr, "eps": OPTIMIZER.eps, "betas": OPTIMIZER.betas})
        tell_fbgemm(bag.weight, OPTIMIZER)
    pose_as_sgd(collection)
    sharder = AnyTypeSharder if isinstance(collection, EmbeddingBagCollection) else EmbeddingCollectionSharder
    size = dist.get_world_size()
    per_table = (
        {"a": row_wise(), "b": row_wise()} if sharding == "row_wise" else {"a": table_wise(0), "b": table_wise(size - 1)}
    )
    holder = nn.Sequential(collection)
    plan = construct_module_sharding_plan(
        collection, per_table, sharder=sharder(), local_size=size, world_size=size, device_type="cpu"
    )
    model = DistributedModelParallel(
        holder,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"0": plan}),
        sharders=[sharder(fused_params={"stochastic_rounding": False})],
    )
    take_over(model)
    return model


def table_pieces(model):
    """Yields each table's local pieces of weights."""
    for key, value in model.state_dict().items():
        for piece in value.local_shards():
            yield key.split(".")[-2], piece.metadata.shard_offsets, piece.tensor


def fill(model):
    """Gives every element a value that tells its place."""
    for name, (row, column), tensor in table_pieces(model):
        rows = torch.arange(row, row + tensor.shape[0])[:, None]
        columns = torch.arange(column, column + tensor.shape[1])
        tensor.copy_(torch.sin(rows * 7.0 + columns + len(name)))


def vectors_of(output):
    """Returns what was looked up, by feature."""
    found = output if isinstance(output, dict) else output.to_dict()
    return {name: value if isinstance(value, torch.Tensor) else value.values() for name, value in found.items()}


def train(model, batches, steps):
    for rate, batch in zip(RATES, batches, strict=True):
        for group in (group for _, optimizer in model.fused_optimizer.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        model.fused_optimizer.zero_grad()
        vectors = vectors_of(model(batch).wait())
        # A gradient that depends on the place and on the weights.
        loss = sum((vector * (1 + number) - 0.1).pow(2).sum() for number, vector in enumerate(vectors.values()))
        loss.backward()
        steps.add()


def reference(is_weighted, is_pooled):
    """Returns the tables as torch.optim.SparseAdam trains them."""
    tables = {}
    for name, (_, rows, columns) in TABLES.items():
        columns = columns if name == "a" or not is_pooled else 4
        values = torch.sin(torch.arange(rows)[:, None] * 7.0 + torch.arange(columns) + len(name))
        tables[name] = nn.Parameter(values)
    optimizer = torch.optim.SparseAdam(tables.values(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    of_feature = {feature: name for name, (features, *_) in TABLES.items() for feature in features}
    for rate, batch in zip(RATES, lookups(is_weighted), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = 0.0
        for number, (feature, bags) in enumerate(batch.to_dict().items()):
            table = tables[of_feature[feature]]
            if is_pooled:
                vector = nn.functional.embedding_bag(
                    bags.values(), table, bags.offsets().long(), mode="sum", sparse=True, include_last_offset=True,
                    per_sample_weights=bags.weights() if is_weighted else None,
                )  # fmt: skip
            else:
                vector = nn.functional.embedding(bags.values(), table, sparse=True)
            loss = loss + (vector * (1 + number) - 0.1).pow(2).sum()
        loss.backward()
        optimizer.step()
    return tables, optimizer


@pytest.mark.parametrize(("is_weighted", "is_pooled"), [(False, True), (True, True), (False, False)])
def test_in_one_process_it_is_sparse_adam(is_weighted, is_pooled):
    expected, sparse_adam = reference(is_weighted, is_pooled)
    with open_world("cpu"):
        model = shard(make_collection(is_weighted, is_pooled), "table_wise")
        assert sum(isinstance(kernel.emb_module, LazyAdamTables) for kernel in fused_kernels(model)) == 1
        steps = AdamSteps(model, TABLES)
        fill(model)
        train(model, lookups(is_weighted), steps)
        for name, _, tensor in table_pieces(model):
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-6, atol=1e-6)
        states = {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"}
        for piece in lazy_adam_shards(model):
            state = sparse_adam.state[expected[piece.table]]
            torch.testing.assert_close(
                piece.tensor, state[states[piece.kind]], rtol=1e-6, atol=2e-6
            )  # of gradients of up to 10
        assert {name: int(taken) for name, taken in steps.taken.items()} == {"a": len(RATES), "b": len(RATES)}


def test_rows_that_are_not_looked_up_stay_where_they_are():
    with open_world("cpu"):
        model = shard(make_collection(), "table_wise")
        fill(model)
        before = {name: tensor.clone() for name, _, tensor in table_pieces(model)}
        train(model, lookups(is_weighted=False), AdamSteps(model, TABLES))
        for name, _, tensor in table_pieces(model):
            assert tensor[5:].equal(before[name][5:]), "ids are below 5"
            assert not (tensor[:5] == before[name][:5]).all(dim=1).any()
        for piece in lazy_adam_shards(model):
            assert piece.tensor[5:].count_nonzero() == 0


def test_half_precision_tables_keep_state_in_full_and_follow_to_within_their_rounding():
    expected, _ = reference(is_weighted=False, is_pooled=True)
    with open_world("cpu"):
        model = shard(make_collection(dtype=DataType.FP16), "table_wise")
        fill(model)
        train(model, lookups(is_weighted=False), AdamSteps(model, TABLES))
        assert {piece.tensor.dtype for piece in lazy_adam_shards(model)} == {torch.float32}
        for name, _, tensor in table_pieces(model):
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.float(), expected[name].detach(), rtol=0, atol=5e-3)


PROGRAM = """
    import json, os, sys
    import torch, torch.distributed as dist
    rank, size, folder, sharding, tests = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    sys.path.insert(0, tests)
    import test_lazy_adam as lab
    from torchrec import KeyedJaggedTensor

    def mine(batch):  # this rank's rows of the batch
        keys = batch.to_dict()
        rows = {key: bags.to_dense()[rank * 6 // size : (rank + 1) * 6 // size] for key, bags in keys.items()}
        flat = [row for key in lab.FEATURES for row in rows[key]]
        lengths = torch.tensor([len(row) for row in flat], dtype=torch.int32)
        return KeyedJaggedTensor(keys=list(lab.FEATURES), values=torch.cat(flat), lengths=lengths)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    from torchrec.distributed.comm_ops import set_gradient_division
    set_gradient_division(False)  # the loss is a sum here
    model = lab.shard(lab.make_collection(is_pooled=False), sharding)
    lab.fill(model)
    steps = lab.AdamSteps(model, lab.TABLES)
    lab.train(model, map(mine, lab.lookups(False)), steps)
    pieces = [(name, "weight", list(offset), tensor.tolist()) for name, offset, tensor in lab.table_pieces(model)]
    pieces += [(p.table, p.kind, list(p.offset), p.tensor.tolist()) for p in lab.lazy_adam_shards(model)]
    json.dump(pieces, open(f"{folder}/{rank}.json", "w"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


@pytest.mark.parametrize(("size", "sharding"), [(2, "row_wise"), (3, "table_wise")])  # of three, one rank owns nothing
def test_sequences_in_several_processes_are_trained_as_in_one(tmp_path, size, sharding):
    """Pooled lookups in several processes are in `test_parity.py`."""
    expected, sparse_adam = reference(is_weighted=False, is_pooled=False)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    workers = [start_python(program, rank, size, tmp_path, sharding, Path(__file__).parent) for rank in range(size)]
    try:
        words = [worker.communicate(timeout=120)[1][-1500:] for worker in workers]
        assert not any(worker.returncode for worker in workers), "\n".join(words)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    found = [piece for rank in range(size) for piece in json.loads((tmp_path / f"{rank}.json").read_text())]
    names = {"weight": None, "momentum1": "exp_avg", "momentum2": "exp_avg_sq"}
    for table, parameter in expected.items():
        for kind, state in names.items():
            whole = parameter.detach() if state is None else sparse_adam.state[parameter][state]
            parts = sorted((offset, values) for name, its, offset, values in found if (name, its) == (table, kind))
            joined = torch.cat([torch.tensor(values) for _, values in parts])
            torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)
