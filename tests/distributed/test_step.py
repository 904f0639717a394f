"""What a step brings ahead and puts off: ids that travel a step early, gradients summed in buckets, tables moved last."""

import json
import textwrap

import pytest
import torch
import yaml
from torch import nn

from embedshard.config import build_config, table_specs
from embedshard.errors import TrainingError
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.registry import build_model
from embedshard.sharding.dense_gradients import DenseGradients
from embedshard.sharding.halves import LookedUp
from embedshard.sharding.shards import weight_shards
from embedshard.train.assembly import assemble
from embedshard.world import World, open_world
from tests.commands import start_python

BEGIN = """
    import json, os, sys
    from itertools import chain, pairwise
    import torch, torch.distributed as dist
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
"""
END = """
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""

AHEAD = """
    from torchrec.distributed.types import ShardedModule
    from embedshard.config import load_config
    from embedshard.sharding.shards import weight_shards
    from embedshard.train.assembly import assemble

    config = load_config(f"{folder}/config.yaml", {}).config
    found = {}
    for way in ("each in its step", "ahead", "dropped"):
        parts = assemble(config, world)
        collections = [module for module in parts.model.modules() if isinstance(module, ShardedModule)]
        asked = []
        for collection in collections:  # what the forward pass of TorchRec would call for ids that have not been sent
            send = collection.input_dist
            collection.input_dist = lambda context, ids, send=send: (asked.append(context), send(context, ids))[1]
        losses, sent = [], []
        with parts.reader().batches(0, 6) as batches:
            for batch, upcoming in pairwise(chain(batches, [None])):
                parts.optimizers.set_learning_rates(batch.position.step, 14)
                before = len(asked)
                told = None if way == "each in its step" else upcoming
                losses.append(parts.stepper.take(batch, stop_asked=False, upcoming=told).loss)
                sent.append(len(asked) - before)
                if way == "dropped" and batch.position.step % 2:
                    parts.stepper.end()
        weights = [(s.table, s.offset, s.tensor.tolist()) for s in weight_shards(parts.model)]
        found[way] = {"losses": losses, "sent": sent, "collections": len(collections), "weights": weights}
"""

DENSE = """
    from torch import nn
    from embedshard.sharding.dense_gradients import DenseGradients

    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 1))
    unused = nn.Parameter(torch.ones(2))
    parameters = {**dict(model.named_parameters()), "unused": unused}
    gradients = DenseGradients(parameters, world, bucket_bytes=80)
    found = {"begins": [value.tolist() for value in parameters.values()], "steps": []}
    rows = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(3))
    for step in range(3):
        gradients.clear()
        model(rows[step][rank * 4 : rank * 4 + 4]).sum().backward()
        gradients.finish(0.25)
        found["steps"].append([value.grad.tolist() for value in parameters.values()])
        if step == 1:  # as what makes an optimizer's state does
            for value in parameters.values():
                value.grad = torch.full_like(value, 7.0)
"""


def specs_of(tree):
    config = build_config(tree, {}, "test")
    return table_specs(config, {name: table.rows for name, table in config.tables.items()})


def run(program, folder, world_size=2):
    path = folder / "program.py"
    path.write_text(textwrap.dedent(BEGIN + program + END))
    processes = [start_python(path, rank, world_size, folder) for rank in range(world_size)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


WITH_WEIGHTS = {"features": {"history": {"pooling": "mean"}}}
REPEATS_MAPPED_ONCE = {
    "features": {"history": {"pooling": "mean"}},
    "model": {"user": {"features": ["user_id"], "mlp": [8]}, "item": {"features": ["item_id"], "mlp": [8]}, "biases": []},
    "objective": {"kind": "bce"},
    "data": {"label": "clicked"},
    "evaluate": {"metrics": ["auc"]},
}


@pytest.mark.parametrize(
    ("sharding", "changes", "number"),
    [("table_wise", WITH_WEIGHTS, 2), ("row_wise", WITH_WEIGHTS, 2), ("table_wise", REPEATS_MAPPED_ONCE, 1)],
    ids=["with weights and without", "cut by rows", "repeats mapped once"],
)
def test_ids_that_travel_a_step_early_change_nothing(make_config, tmp_path, sharding, changes, number):
    tables = {name: {"sharding": {"types": [sharding]}} for name in ("user", "item")}
    tree = make_config({**changes, "tables": tables}).tree
    if number == 1:
        del tree["features"]["history"], tree["features"]["age"]
        assert build_model(build_config(tree, {}, "test"), specs_of(tree)).ids_alone == (("user_id",), ("item_id",))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    for found in run(AHEAD, tmp_path):
        expected, ahead, dropped = found["each in its step"], found["ahead"], found["dropped"]
        assert expected["collections"] == number
        assert expected["sent"] == [number] * 6
        assert ahead["sent"] == [2 * number, *[number] * 4, 0], "the first sends its own; each the next one's"
        assert dropped["sent"] == [2 * number, number, 2 * number, number, 2 * number, 0]
        for other in (ahead, dropped):
            assert other["losses"] == expected["losses"], "bit for bit"
            assert other["weights"] == expected["weights"]


def test_dense_gradients_are_sums_over_the_ranks(tmp_path):
    first, second = run(DENSE, tmp_path)
    assert first == second
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 1))
    values = [torch.tensor(value) for value in first["begins"]]
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 1))
    assert all(torch.equal(a, b) for a, b in zip(values, reference.parameters(), strict=False)), "rank 0's"
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=False)))
    rows = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(3))
    for step in range(3):
        model.zero_grad()
        (model(rows[step]).sum() * 0.25).backward()
        *found, unused = [torch.tensor(gradient) for gradient in first["steps"][step]]
        torch.testing.assert_close(found, [value.grad for value in model.parameters()])
        assert unused.tolist() == [0.0, 0.0]


def test_dense_gradients_of_one_rank_are_its_own():
    weight = nn.Parameter(torch.ones(2))
    gradients = DenseGradients({"weight": weight}, World(0, 1, 0, 1, torch.device("cpu"), None))
    for _ in range(2):
        gradients.clear()
        (weight * torch.tensor([1.0, 3.0])).sum().backward()
        gradients.finish(0.5)
        assert weight.grad.tolist() == [0.5, 1.5]


class Lookup(EmbeddingLookup):
    """Looks up what is given, and counts the gradients that come back to it."""

    def __init__(self, vectors):
        super().__init__([])
        self.vectors, self.gradients = vectors, {}
        for key, tensor in vectors.items():
            tensor.register_hook(lambda gradient, key=key: self.gradients.__setitem__(key, gradient))

    def forward(self, batch):
        return self.hand_on(self.vectors)


def test_gradients_stop_at_what_was_looked_up_until_they_are_sent_on():
    vectors = {key: torch.randn(3, 2, requires_grad=True) for key in ("user", "item", "unused")}
    lookup = Lookup(vectors)
    looked_up = LookedUp(nn.Sequential(lookup))
    assert lookup(None) is vectors, "outside a step there are no halves"
    with looked_up.apart():
        handed_on = lookup(None)
    (handed_on["user"] * handed_on["item"]).sum().backward()
    assert lookup.gradients == {}
    looked_up.go_on(0.5)
    assert set(lookup.gradients) == {"user", "item"}
    torch.testing.assert_close(lookup.gradients["user"], vectors["item"].detach() * 0.5)
    torch.testing.assert_close(vectors["item"].grad, vectors["user"].detach() * 0.5)
    lookup.gradients.clear()
    with looked_up.apart():
        lookup(None)["user"].sum().backward()
    with looked_up.apart():
        pass
    looked_up.go_on()
    assert lookup.gradients == {}, "what the next step has let go of"


def test_a_loss_that_is_not_finite_moves_nothing(make_config):
    config = build_config(make_config({}).tree, {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        with torch.no_grad():
            next(parameter for name, parameter in parts.model.named_parameters() if "mlp" in name).fill_(float("nan"))
        before = [shard.tensor.clone() for shard in weight_shards(parts.model)]
        dense = {name: value.clone() for name, value in parts.model.named_parameters()}
        with parts.reader().batches(0, 2) as batches, pytest.raises(TrainingError, match="the loss is not finite"):
            parts.stepper.take(next(batches), stop_asked=False)
        assert all(torch.equal(a, b.tensor) for a, b in zip(before, weight_shards(parts.model), strict=True))
        for name, value in parts.model.named_parameters():
            torch.testing.assert_close(value, dense[name], equal_nan=True, rtol=0, atol=0)
