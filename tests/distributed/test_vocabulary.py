"""Counted and compositional vocabularies on one rank and on two: the same file, the same losses, the same weights."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from embedshard.config import build_config
from embedshard.sharding.shards import weight_shards
from embedshard.train.assembly import assemble
from embedshard.world import open_world

PROGRAM = """
    import json, os, sys
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.data.dataset import open_dataset
    from embedshard.sharding.shards import weight_shards
    from embedshard.storage import locate
    from embedshard.train.assembly import assemble
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    heard, found = [], {}
    try:
        config = load_config(f"{folder}/config.yaml", {}).config
        parts = assemble(
            config, world, progress=lambda *told: heard.append(told), vocabularies=locate(f"{folder}/vocabularies")
        )
        losses = []
        with parts.reader().batches(0, 8) as batches:
            for batch in batches:
                parts.optimizers.set_learning_rates(batch.position.step, 14)
                losses.append(parts.stepper.take(batch, stop_asked=False).loss)
        alone = open_dataset(config, world, None).vocabulary_fingerprints()  # in a folder of its own, as verify counts
        assert alone == parts.dataset.vocabulary_fingerprints(), alone
        found = {"losses": losses, "shards": [(s.table, s.offset, s.tensor.tolist()) for s in weight_shards(parts.model)]}
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({**found, "heard": heard}, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


@pytest.fixture(scope="module")
def launch():
    path = Path(__file__).with_name("test_two_ranks.py")
    spec = importlib.util.spec_from_file_location("two_ranks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launch


def tree(folder):
    return {
        "data": {"train": f"{folder}/*.parquet", "label": "label", "lanes": 2},
        "features": {
            "user": {"kind": "id", "table": "user"},
            "seen": {"kind": "bag", "table": "seen", "pooling": "mean", "unknown": "oov"},
            "item": {"kind": "id", "table": "item"},
        },
        "tables": {
            "user": {"dim": 4, "vocabulary": {"kind": "double_hash", "rows": 15}},
            "seen": {"dim": 4, "vocabulary": {"kind": "quotient_remainder", "ids": 30}},
            "item": {"dim": 4, "vocabulary": {"kind": "auto", "min_count": 1}},
        },
        "model": {
            "kind": "two_tower",
            "user": {"features": ["user", "seen"], "combine": "sum"},
            "item": {"features": ["item"]},
            "biases": ["user"],
        },
        "objective": {"kind": "mse"},
        "optimizer": {"tables": {"kind": "sgd", "lr": 0.5}},
        "train": {"global_batch_size": 8},
    }


def write(folder, rows=96):
    generator = np.random.default_rng(5)
    folder.mkdir(exist_ok=True)
    for number in range(3):
        table = {
            "user": [f"user {i}" for i in generator.integers(0, 25, rows)],
            "seen": [generator.integers(0, 32, size).tolist() for size in generator.integers(0, 5, rows)],
            "item": [f"item {i % 17}" for i in generator.zipf(1.4, rows)],
            "label": generator.normal(size=rows).astype(np.float32),
        }
        pq.write_table(pa.table(table), folder / f"{number}.parquet", row_group_size=20)


def trained(launch, folder, world_size, changes=None):
    folder.mkdir()
    config = tree(folder.parent / "data")
    for table, sharding in (changes or {}).items():
        config["tables"][table]["sharding"] = {"types": [sharding]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    launch(PROGRAM, folder, world_size)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    weights = {}
    for rank in ranks:
        assert "error" not in rank, rank["error"]
        for table, offset, values in rank["shards"]:
            weights.setdefault(table, {})[tuple(offset)] = np.array(values, np.float32)
    whole = {table: np.concatenate([pieces[key] for key in sorted(pieces)]) for table, pieces in weights.items()}
    kept = sorted(path.name for path in (folder / "vocabularies").iterdir())
    assert kept == ["item.parquet"], "the workers' shares are gone"
    return ranks, whole, hashlib.sha256((folder / "vocabularies" / "item.parquet").read_bytes()).hexdigest()


def test_worlds_of_one_and_two_count_the_same_file_and_train_the_same_weights(launch, tmp_path):
    write(tmp_path / "data")
    (one,), weights, file = trained(launch, tmp_path / "one", 1)
    sharding = {"user": "row_wise", "seen": "row_wise", "item": "table_wise"}
    both, others, other_file = trained(launch, tmp_path / "two", 2, sharding)
    assert other_file == file
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert len(both[0]["shards"]) > 2, "rows lie on both"
    for table, values in weights.items():
        assert np.allclose(others[table], values, atol=1e-6), table
    assert one["heard"][-1] == ["vocabulary of table 'item'", 288, 288]
    assert both[0]["heard"][-1][2] < 288, "rank 0 tells of its share"
    assert both[1]["heard"] == []


def test_a_share_that_cannot_be_counted_stops_both_ranks(launch, tmp_path):
    write(tmp_path / "data")
    path = tmp_path / "data" / "0.parquet"
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(2)  # a row group of rank 1
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    content[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree(tmp_path / "data")))
    launch(PROGRAM, folder, 2)
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text())["error"] for rank in (0, 1))
    assert second.startswith("DataError:")
    assert "0.parquet, row group 1: cannot be read" in second
    assert first.startswith("PeerError: rank 1 failed in its share of what all did:")
    assert "row group 1: cannot be read" in first


def test_two_rows_an_id_give_the_sums_and_gradients_of_a_computation_by_hand(tmp_path):
    write(tmp_path / "data")
    config = build_config(tree(tmp_path / "data"), {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        before = {shard.table: shard.tensor.clone().requires_grad_() for shard in weight_shards(parts.model)}
        rows = pa.concat_tables([pq.read_table(tmp_path / "data" / f"{number}.parquet") for number in range(3)])
        parts.optimizers.set_learning_rates(0, 14)
        with parts.reader().batches(0, 1) as batches:
            batch = next(batches)
            loss = parts.stepper.take(batch, stop_asked=False).loss
        after = {shard.table: shard.tensor for shard in weight_shards(parts.model)}
        read = rows.take(pa.array(batch.rows.numpy()))
        hashed = parts.dataset.vocabularies["user"].map_strings(read["user"].combine_chunks())
        items = parts.dataset.vocabularies["item"].map_strings(read["item"].combine_chunks())
    first, second = config.tables["user"].composition.first, config.tables["user"].composition.second
    quotients, remainders = config.tables["seen"].vocabulary.parts
    total = 0.0
    for row in range(8):
        pair = [int(hashed[row]) // second, first + int(hashed[row]) % second]
        vector = before["user"][pair[0]] + before["user"][pair[1]]
        seen = [
            before["seen"][quotients + remainders]
            if id_ >= 30
            else before["seen"][id_ // remainders] + before["seen"][quotients + id_ % remainders]
            for id_ in read["seen"][row].as_py()
        ]
        vector = vector + (torch.stack(seen).mean(dim=0) if seen else 0.0)
        bias = before["user:bias"][pair[0], 0] + before["user:bias"][pair[1], 0]
        total = total + (vector @ before["item"][int(items[row])] + bias - read["label"][row].as_py()) ** 2
    mean = total / 8
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for table, weight in before.items():
        assert weight.grad.abs().sum() > 0, table
        assert torch.allclose(after[table], weight.detach() - 0.5 * weight.grad, atol=1e-6), table
