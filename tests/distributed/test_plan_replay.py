"""A plan that was made without the hardware is what training does: the same shards, the same bytes, on every rank."""

import json
import textwrap

import pytest
import yaml

from embedshard.config import build_config, table_specs
from embedshard.data.lookup_sample import sample_lookups
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.sharding.draft import draft_plan
from embedshard.sharding.hardware import Cluster, find_machine
from tests.commands import start_python

TIMEOUT_S = 290
SHARDINGS = {
    "planned": {},
    "whole": {name: {"type": "table_wise"} for name in ("user", "item", "group", "age")},
    "mixed": {
        "user": {"type": "row_wise"},
        "item": {"type": "table_row_wise"},
        "group": {"type": "data_parallel"},
        "age": {"type": "table_wise"},
    },
    "columns": {
        "user": {"type": "column_wise"},
        "item": {"type": "grid_shard", "allow_changed_optimizer": True},
        "group": {"type": "table_column_wise", "allow_changed_optimizer": True},
        "age": {"type": "row_wise"},
    },
}

# Assembles each config with its plan; tells the bytes that this rank holds, the plan that came of it, and what it sends
# in a step's all-to-alls: the parts of other ranks.
RANK = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    rank, world_size, local, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    from embedshard.world import open_local_group, set_process_environment
    set_process_environment()
    import torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.neighbours import Neighbours
    from embedshard.sharding.lazy_adam import lazy_adam_shards
    from embedshard.sharding.recorded import read_plan
    from embedshard.sharding.shards import optimizer_shards, weight_shards
    from embedshard.train.assembly import assemble

    sent = {"ids": 0, "vectors": 0}
    all_to_all = dist.all_to_all_single
    exchange = Neighbours.exchange
    def exchanging(group, parts, places):
        for rank, part in enumerate(parts):
            if rank != group.rank():
                sent["vectors" if part.dtype.is_floating_point else "ids"] += part.numel() * part.element_size()
        return exchange(group, parts, places)

    def counting(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        if isinstance(group, Neighbours):
            return all_to_all(output, input, output_split_sizes, input_split_sizes, group, async_op)
        size, own = dist.get_world_size(group), dist.get_rank(group)
        splits = input_split_sizes or [len(input) // size] * size
        numbers = input.numel() * (sum(splits) - splits[own]) // max(sum(splits), 1)
        sent["vectors" if input.dtype.is_floating_point else "ids"] += numbers * input.element_size()
        return all_to_all(output, input, output_split_sizes, input_split_sizes, group, async_op)

    found = {}
    with open_local_group(rank, world_size, local, folder / "rendezvous") as world:
        for name in sys.argv[5:]:
            config = load_config(folder / f"{name}.yaml", {}).config
            parts = assemble(config, world, plan=read_plan(folder / f"{name}-{world_size}.json"))
            def state():
                fused = [*optimizer_shards(parts.model), *lazy_adam_shards(parts.model)]
                return [*fused, *parts.optimizers.replicated_state()]
            with parts.reader().batches(0, 1) as batches:
                batch = next(batches)
                parts.optimizers.set_learning_rates(0, 10)
                sent.update(ids=0, vectors=0)
                dist.all_to_all_single, Neighbours.exchange = counting, exchanging
                parts.stepper.take(batch, stop_asked=False)
                dist.all_to_all_single, Neighbours.exchange = all_to_all, exchange
            found[name] = {
                "weights": sum(shard.tensor.nbytes for shard in weight_shards(parts.model)),
                "state": sum(shard.tensor.nbytes for shard in state()),
                "plan": parts.plan.to_json(),
                **sent,
            }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    """
)


@pytest.fixture(scope="module")
def trees(interactions):
    def tree(sharding):
        tables = {
            "user": {"rows": 40, "dim": 8, "optimizer": {"kind": "adagrad"}},
            "item": {"rows": 30, "dim": 8, "dtype": "fp16"},
            "group": {"rows": 4, "dim": 8},
            "age": {"rows": 9, "dim": 4, "optimizer": {"kind": "adam"}},
        }
        return {
            "data": {"train": str(interactions / "train" / "*.parquet"), "lanes": 4},
            "features": {
                "user_id": {"kind": "id", "table": "user"},
                "item_id": {"kind": "id", "table": "item"},
                "history": {"kind": "bag", "table": "item", "pooling": "sum", "max_length": 4},
                "group": {"kind": "id", "table": "group", "column": "clicked"},
                "age": {"kind": "id", "table": "age", "column": "rating"},
            },
            "tables": {name: table | {"sharding": sharding.get(name, {})} for name, table in tables.items()},
            "sharding": {"planner": "explicit" if sharding else "auto"},
            "model": {
                "kind": "two_tower",
                "user": {"features": ["user_id", "history", "age"], "mlp": [8]},
                "item": {"features": ["item_id", "group"], "mlp": [8]},
            },
            "objective": {"kind": "in_batch_softmax"},
            "train": {"global_batch_size": 32},
        }

    return {name: tree(sharding) for name, sharding in SHARDINGS.items()}


@pytest.mark.parametrize(("world_size", "local"), [(1, 1), (2, 2), (4, 2)])
def test_training_makes_the_shards_of_the_plan(trees, tmp_path, world_size, local):
    drafts = {}
    for name, tree in trees.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        config = build_config(tree, {}, name)
        vocabularies = load_vocabularies(config)
        specs, sample = table_specs(config, table_rows(vocabularies)), sample_lookups(config, vocabularies)
        cluster = Cluster("cpu", find_machine("cpu")[1], world_size, local)
        drafts[name] = draft_plan(config, specs, cluster, sample, explains=False)
        drafts[name].plan.save(tmp_path / f"{name}-{world_size}.json")
    program = tmp_path / "program.py"
    program.write_text(RANK)
    ranks = [start_python(program, rank, world_size, local, tmp_path, *trees) for rank in range(world_size)]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * world_size, "\n".join(errors)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    for name, draft in drafts.items():
        for rank, memory in enumerate(draft.footprint.ranks):
            there = found[rank][name]
            assert there["plan"] == draft.plan.to_json()
            assert (there["weights"], there["state"]) == (memory.weights, memory.state), (name, rank)
    if world_size > 1:
        traffic = drafts["whole"].footprint.traffic
        busiest = max((rank["whole"] for rank in found), key=lambda sent: sent["ids"] + sent["vectors"])
        assert busiest["vectors"] == traffic.vectors
        # The first step's histories are not of the mean length.
        assert busiest["ids"] == pytest.approx(traffic.ids, rel=0.3)
