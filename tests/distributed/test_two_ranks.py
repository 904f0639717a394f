"""Two processes over gloo take the steps that one takes: the same rows, losses and weights."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import yaml

PROGRAM = """
    import json, os, sys
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.sharding.shards import weight_shards
    from embedshard.train.assembly import assemble
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    parts = assemble(load_config(f"{folder}/config.yaml", {}).config, world)
    losses = []
    with parts.reader().batches(0, 10) as batches:
        for batch in batches:
            parts.optimizers.set_learning_rates(batch.position.step, 14)
            losses.append(parts.stepper.take(batch, stop_asked=False).loss)
    shards = [(s.table, s.offset, s.tensor.tolist()) for s in weight_shards(parts.model)]
    metrics = parts.evaluator.evaluate(parts.model, "test")
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({"losses": losses, "shards": shards, "metrics": metrics}, file)
    dist.barrier()
    dist.destroy_process_group()
"""


def train(tree, folder, world_size):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(world_size), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    tables = {}
    for rank in ranks:
        for table, (row, column), values in rank["shards"]:
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    tables[table, row + i, column + j] = value
    return ranks, tables


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "in_batch_softmax", "temperature": 0.5},
        {"kind": "sampled_softmax", "num_negatives": 16, "mixed": True},
        {"kind": "bpr", "num_negatives": 16},
    ],
    ids=["in batch", "sampled, mixed", "pairwise"],
)
def test_two_ranks_train_as_one_does(make_config, tmp_path, sharding, objective):
    tables = {name: {"sharding": {"types": [sharding]}} for name in ("user", "item")}
    tables["user"]["optimizer"] = {"kind": "rowwise_adagrad"}
    changes = {"objective": objective, "tables": tables, "data": {"weight": "weight"}}
    changes["optimizer"] = {"dense": {"kind": "sgd", "lr": 0.05}}
    tree = make_config(changes).tree
    alone, weights = train(tree, tmp_path / "one", 1)
    both, others = train(tree, tmp_path / "two", 2)
    assert both[0]["losses"] == both[1]["losses"], "all ranks know the same loss"
    assert both[0]["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
    assert weights.keys() == others.keys()
    worst = max(abs(weights[place] - others[place]) for place in weights)
    assert worst < 1e-6
    assert both[0]["metrics"] == pytest.approx(alone[0]["metrics"], abs=1e-3)
