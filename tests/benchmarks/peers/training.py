"""Trains a model in one way and prints its samples a second. Started by run.py, a fresh process (or two) each time.

    python training.py CONFIG torchrec|pytorch STEPS      batches in memory; under torchrun for more workers

`embedshard train` itself is started by run.py: Parquet to the end of the run.
"""

from __future__ import annotations

import json
import os
import sys
import time

from embedshard.launch.cores import shares
from embedshard.world import set_process_environment

set_process_environment()
bound = shares(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), os.environ)
if bound is not None:  # cores of their own, as `--workers` gives them
    os.sched_setaffinity(0, bound[int(os.environ["LOCAL_RANK"])])

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torchrec.distributed import DistributedModelParallel  # noqa: E402
from torchrec.distributed.types import ShardingEnv, ShardingPlan  # noqa: E402
from torchrec.models.dlrm import InteractionArch  # noqa: E402
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward  # noqa: E402
from torchrec.optim.keyed import KeyedOptimizerWrapper  # noqa: E402
from torchrec.optim.optimizers import in_backward_optimizer_filter  # noqa: E402
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad  # noqa: E402

from embedshard.config.load import load_config  # noqa: E402
from embedshard.models.dlrm import DLRM  # noqa: E402
from embedshard.models.embeddings import table_modules, table_weights  # noqa: E402
from embedshard.models.output import LabelOutput  # noqa: E402
from embedshard.models.registry import build_model  # noqa: E402
from embedshard.models.two_tower import TwoTower  # noqa: E402
from embedshard.train.assembly import assemble  # noqa: E402
from embedshard.world import open_world  # noqa: E402

WARM_UP, BATCHES = 20, 24
CLASSES = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


class PlainLookup(nn.Module):
    """Tables as torch has them, `EmbeddingBag(sparse=True)`, behind the interface of a model's lookup."""

    def __init__(self, specs) -> None:
        super().__init__()
        self._keys = [(lookup.key, spec.name) for spec in specs for lookup in spec.lookups]
        self.tables = nn.ModuleDict(
            {
                spec.name: nn.EmbeddingBag(spec.num_embeddings, spec.dim, mode="sum", sparse=True, include_last_offset=True)
                for spec in specs
            }
        )

    def forward(self, batch):
        found = {}
        for key, table in self._keys:
            ids = batch.sparse[key]
            found[key] = self.tables[table](ids.values(), ids.offsets())
        return found


class WithLoss(nn.Module):
    """A model and its loss in one, as in TorchRec's examples.

    DDP looks for the loss in what its module returns. Of a module that returns a dataclass it sees nothing, and shares no
    gradient under the static graph that TorchRec asks it for: each worker then trains a dense part of its own.
    """

    def __init__(self, model, objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch):
        return self.objective(self.model(batch), batch).mean()


def bare_torchrec(config, parts, world):
    """Returns a model that TorchRec shards by the same plan, with no more than its examples do, and its dense optimizer."""
    plan = ShardingPlan({f"model.{path}": placed for path, placed in parts.model.plan.plan.items()})
    model = WithLoss(build_as_peers_do(config, parts, world), parts.objective)
    optimizer = config.optimizer.tables
    arguments = {"lr": optimizer.lr} | ({"eps": optimizer.eps} if optimizer.kind != "sgd" else {})
    for _, module in table_modules(model):
        for weight in table_weights(module).values():
            apply_optimizer_in_backward(CLASSES[optimizer.kind], [weight], arguments)
    sharded = DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(world.group), device=world.device, plan=plan
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.optimizer.dense.lr),
    )
    return sharded, [dense]


def plain_pytorch(config, parts, world):
    """Returns a model over `EmbeddingBag(sparse=True)`, and its optimizers."""
    model = build_as_peers_do(config, parts, world)
    model.embeddings = PlainLookup(parts.specs)
    tables = list(model.embeddings.parameters())
    of_tables = {id(weight) for weight in tables}
    dense = [weight for weight in model.parameters() if id(weight) not in of_tables]
    optimizer = config.optimizer.tables
    arguments = {"lr": optimizer.lr} | ({"eps": optimizer.eps} if optimizer.kind != "sgd" else {})
    dense_optimizer = torch.optim.Adam(dense, lr=config.optimizer.dense.lr)
    return WithLoss(model, parts.objective), [CLASSES[optimizer.kind](tables, **arguments), dense_optimizer]


def build_as_peers_do(config, parts, world):
    """Returns a model without what is embedshard's own: two towers map each row, a DLRM multiplies by TorchRec's module."""
    if config.model.kind == "dlrm":
        return TorchRecDLRM(config, parts.specs, world)
    model = build_model(config, parts.specs, world)
    if isinstance(model, TwoTower):
        model.ids_alone = ((), ())
    return model


class TorchRecDLRM(DLRM):
    """A DLRM around TorchRec's `InteractionArch`."""

    def __init__(self, config, specs, world) -> None:
        super().__init__(config, specs, world)
        self.interaction = InteractionArch(len(self.fields.embedded))

    def forward(self, batch):
        lookups = self.embeddings(batch)
        vectors, numbers = self.fields(lookups, batch)
        joined = self.interaction(self.dense_mlp(numbers, batch), torch.stack(vectors, dim=1))
        return LabelOutput(self.head(self.mlp(joined, batch)), lookups)


def main() -> None:
    """Trains, on batches that are in memory already."""
    path, way, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open_world("cpu") as world:
        config = load_config(path, os.environ, []).config
        parts = assemble(config, world)
        with parts.reader().batches(0, BATCHES) as read:
            batches = list(read)
        model, optimizers = (bare_torchrec if way == "torchrec" else plain_pytorch)(config, parts, world)

        def step(batch) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(batch).backward()
            for optimizer in optimizers:
                optimizer.step()

        for number in range(WARM_UP):
            step(batches[number % BATCHES])
        world.barrier()
        begin = time.perf_counter()
        for number in range(steps):
            step(batches[number % BATCHES])
        world.barrier()
        seconds = time.perf_counter() - begin
        if world.rank == 0:
            print(json.dumps({"samples_per_second": steps * config.train.global_batch_size / seconds}))
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
