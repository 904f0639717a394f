"""What tests share: tiny data sets on disk, configs over them, runs of them."""

import copy
import json
import os
import textwrap
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("EMBEDSHARD_BIND_CORES", "0")  # tests share the cores; the one of binding says otherwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings

from embedshard.config import Loaded, build_config
from embedshard.launch.export import export_here
from embedshard.train.checkpoint import newest_intact, open_step
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world
from tests.commands import OWN_CODE
from tests.copied_groups import CopiedGroup

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")

USERS, ITEMS = 40, 30

FIRST = (
    "pipelines/test_gowalla.py",
    "on_ray/test_cluster.py",
    "distributed/test_parity.py",
    "distributed/test_workers.py",
    "on_ray/test_elastic.py",
    "distributed/test_managed.py",
    "fuzz/test_reader.py",
    "on_ray/test_ray.py",
    "object_store/test_runs.py",
    "distributed/test_bench.py",
    "train/test_programs.py",
    "on_ray/test_serve.py",
    "distributed/test_two_ranks.py",
    "train/test_faults.py",
    "manifests/test_drain.py",
)
"""The longest files: begun first, so that what ends the suite is short, and those that start Ray apart from each other."""


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def write_interactions(folder: Path, rows: int, seed: int, files: int = 2, row_group_rows: int = 50) -> None:
    """Interactions with every kind of column: ids, a bag, a weighted bag, numbers, labels, a weight."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number, count in enumerate(np.diff(np.linspace(0, rows, files + 1).astype(int))):
        lengths = generator.integers(0, 6, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = generator.integers(0, ITEMS, offsets[-1])
        user, item = generator.integers(0, USERS, count), generator.integers(0, ITEMS, count)
        table = pa.table(
            {
                "user_id": pa.array(user, pa.int32()),
                "item_id": pa.array(item, pa.int64()),
                "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids, pa.int32())),
                "history_weight": pa.ListArray.from_arrays(
                    pa.array(offsets), pa.array(generator.random(offsets[-1]).astype(np.float32))
                ),
                "age": pa.array(generator.random(count) * 80),
                "rating": pa.array(((user * 7 + item * 3) % 5 + 1).astype(np.int8)),
                "clicked": pa.array(((user + item) % 2).astype(np.int8)),
                "weight": pa.array(generator.random(count).astype(np.float32) + 0.1),
            }
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=row_group_rows)


@pytest.fixture(scope="session")
def interactions(tmp_path_factory):
    """A folder with train/, validation/ and test/ Parquet."""
    root = tmp_path_factory.mktemp("interactions")
    write_interactions(root / "train", 203, seed=1)
    write_interactions(root / "validation", 60, seed=2, files=1)
    write_interactions(root / "test", 60, seed=3, files=1)
    return root


TREE = {
    "seed": 11,
    "data": {"lanes": 4},
    "features": {
        "user_id": {"kind": "id", "table": "user"},
        "item_id": {"kind": "id", "table": "item"},
        "history": {"kind": "bag", "table": "item", "max_length": 4},
        "age": {"kind": "dense", "normalise": "standardise"},
    },
    "tables": {
        "user": {"rows": USERS, "dim": 8, "optimizer": {"kind": "adagrad"}},
        "item": {"rows": ITEMS, "dim": 8},
    },
    "model": {
        "kind": "two_tower",
        "user": {"features": ["user_id", "history", "age"], "mlp": [16, 8]},
        "item": {"features": ["item_id"]},
        "biases": ["item"],
    },
    "objective": {"kind": "in_batch_softmax", "temperature": 0.5},
    "optimizer": {"schedule": {"warmup_steps": 3, "decay": "linear", "final": 0.1}},
    "train": {"global_batch_size": 32, "epochs": 2},
    "evaluate": {"metrics": ["recall@5", "ndcg@5", "mrr"]},
    "tracking": {"tensorboard": False},
}


def merged(tree, changes):
    result = copy.deepcopy(tree)
    for key, value in changes.items():
        mergeable = isinstance(value, dict) and isinstance(result.get(key), dict) and "kind" not in value
        result[key] = merged(result[key], value) if mergeable else copy.deepcopy(value)
    return result


@pytest.fixture(scope="session")
def make_config(interactions):
    """A function from changes to a loaded config over the tiny interactions."""

    def make(changes=None, splits=("train", "validation", "test")) -> Loaded:
        data = {split: str(interactions / split / "*.parquet") for split in splits}
        tree = merged(merged(TREE, {"data": data}), changes or {})
        return Loaded(build_config(tree, {}, "test"), tree, "test")

    return make


def read_tensors(run_dir: Path):
    """The step and every tensor of a run's newest checkpoint."""
    checkpoint = newest_intact(RunDirectory(run_dir).checkpoints)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in checkpoint.tensors.items()}
    checkpoint.read_into([(name, (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()])
    return checkpoint.step, tensors


def compare_tensors(first, second):
    """Asserts that two checkpoints are of one step and equal bit for bit."""
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert tensor.equal(second[1][name]), name


@pytest.fixture(scope="session")
def saved_tensors():
    return read_tensors


@pytest.fixture(scope="session")
def assert_same_tensors():
    return compare_tensors


def run_to_result(tree, path, resume_step=None, reporter=None):
    """Trains a config's tree in a folder, from a checkpoint on if one is named; returns its result.json."""
    loaded = Loaded(build_config(tree, {}, "test"), tree, "test")
    directory = RunDirectory.create(path, loaded) if resume_step is None else RunDirectory.open(path)
    resume_from = None if resume_step is None else open_step(directory.checkpoints, resume_step)
    with open_world("cpu") as world:
        train(loaded.config, world, directory, reporter or Reporter(), resume_from)
    return json.loads((path / "result.json").read_text())


@pytest.fixture(scope="session")
def two_exports(interactions, tmp_path_factory):
    """Two exports of one run, of an earlier and of a later step: not to be changed."""
    root = tmp_path_factory.mktemp("exports")
    data = {split: str(interactions / split / "*.parquet") for split in ("train", "validation", "test")}
    changes = {"data": data, "train": {"epochs": 2}, "checkpoint": {"every_steps": 4, "keep": 5}}
    run_to_result(merged(TREE, changes), root / "run")
    steps = [4, newest_intact(RunDirectory(root / "run").checkpoints).step]
    for step, name in zip(steps, ("older", "newer"), strict=True):
        assert export_here(root / "run", root / name, {}, checkpoint_step=step).manifest is not None
    return root / "older", root / "newer"


@pytest.fixture(scope="session")
def groups():
    """Processes by world size, for all tests that bring no code of their own: each group is started when it is first used.
    Four stand for two machines of two.
    """
    made = {world_size: CopiedGroup(world_size, {4: 2}.get(world_size)) for world_size in (1, 2, 3, 4)}
    yield made
    for group in made.values():
        group.close()


@pytest.fixture(scope="session")
def run_tree():
    return run_to_result


def real_data(name: str) -> Path:
    """The folder of a real data set; skips the test where it is not."""
    candidates = [Path(__file__).parents[2] / "shared" / "data" / name]
    if os.environ.get("EMBEDSHARD_DATA"):
        candidates.insert(0, Path(os.environ["EMBEDSHARD_DATA"]) / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"the data set {name} is not here: neither {' nor '.join(str(path) for path in candidates)} exists")
    raise AssertionError


@pytest.fixture
def data_set():
    return real_data


WHEN_IMPORTED = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def then(module):
            execute(module)
            change(module)
        spec.loader.exec_module = then
        return spec

sys.meta_path.insert(0, Finder())
"""

WHERE_IMPORTED = """
if {module!r} in sys.modules:  # in a copy
    change(sys.modules[{module!r}])
"""


@pytest.fixture
def own_code(tmp_path):
    """A function from a module's source to environment variables under which every process runs it at its start: a fresh
    interpreter as its `sitecustomize`, a copy when it is made.

    Given a module's name, the source's `change(module)` is called when that module has been imported.
    """

    def own_code(source, when_imported=None):
        folder = tmp_path / "own_code"
        folder.mkdir()
        before = after = ""
        if when_imported is not None:
            before, after = WHEN_IMPORTED.format(module=when_imported), WHERE_IMPORTED.format(module=when_imported)
        file = folder / "sitecustomize.py"
        file.write_text(before + textwrap.dedent(source) + after)
        return {OWN_CODE: str(file), "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}

    return own_code


FAULTY_PLACES = {
    "reader": ("embedshard.data.reader", "BatchReader", "_batch", 10),
    "model": ("embedshard.models.two_tower", "TwoTower", "forward", 10),
    "evaluation": ("embedshard.evaluate.evaluator", "Evaluator", "evaluate", 1),
}


@pytest.fixture(params=FAULTY_PLACES)
def fault_on_one_rank(request, own_code):
    """Environment variables under which rank 1 alone, of two, meets a fault: in its reader, its model, or evaluating."""
    module, kind, method, number = FAULTY_PLACES[request.param]
    return own_code(
        f"""
        def change(module):
            kind, calls = module.{kind}, []
            original = kind.{method}

            def faulty(self, *given, **named):
                import torch.distributed as dist

                calls.append(1)
                if len(calls) == {number} and dist.is_initialized() and dist.get_rank() == 1:
                    raise KeyError("this worker alone met a fault")
                return original(self, *given, **named)

            kind.{method} = faulty
        """,
        when_imported=module,
    )


@pytest.fixture(scope="session")
def descendants():
    """A function from a process's id to those of the processes that it started, and theirs."""

    def descendants(pid):
        found, todo = [], [pid]
        while todo:
            for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                mine = [int(number) for number in task.read_text().split()]
                found += mine
                todo += mine
        return found

    return descendants
