"""Tables beyond the GPU's memory: what is planned, counted, kept and refused. No GPU is here: kernels are not run."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from rich.console import Console
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, compute_kernel_to_embedding_location
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import CacheParams, ShardingEnv

from embedshard.config import table_specs
from embedshard.errors import ConfigError, PlanError
from embedshard.launch.plan_view import show
from embedshard.launch.planning import plan_here
from embedshard.models.registry import build_model
from embedshard.sharding.cache import CacheRates, cache_rates, keep_apart
from embedshard.sharding.draft import draft_plan
from embedshard.sharding.hardware import Machine, cluster_of, named_machines
from embedshard.sharding.memory import fewest_spilled, has_ssd_kernels, lying
from embedshard.sharding.optimizers import attach_table_optimizers
from embedshard.sharding.plan import make_plan
from embedshard.sharding.recorded import RecordedPlan, read_plan
from embedshard.sharding.shard import make_sharders, shard_model
from embedshard.sharding.shards import fused_kernels, weight_shards
from embedshard.world import open_world

GIB = 1024**3
GPU = Machine(
    device="cuda", devices=2, memory=1, host_memory=16, device_bandwidth=900, host_bandwidth=50, within_machine=100,
    between_machines=10,
)  # fmt: skip
LARGE, SMALL = {"rows": 20_000_000, "dim": 32}, {"rows": 100_000, "dim": 8}


@pytest.fixture
def sized(make_config):
    """A config of two tables, `user` and `item`, with these changes to each."""

    def make(user=None, item=None, **others):
        tables = {"user": LARGE | (user or {}), "item": SMALL | (item or {})}
        return make_config({"data": {"lanes": 8}, "tables": tables} | others).config

    return make


def specs_of(config):
    return table_specs(config, {name: table.rows for name, table in config.tables.items()})


def draft(config, workers=2, machine=GPU, explains=False):
    return draft_plan(config, specs_of(config), cluster_of("test", machine, workers), None, explains=explains)


def kernels(found):
    return {name: table.kernel for name, table in found.plan.tables.items()}


# ------------------------------------------------------------------------------------------------------------ the config
@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"memory": {"kind": "uvm", "cache_ratio": 0.1}}, r"tables\.user\.memory\.cache_ratio .* 'uvm' has none"),
        ({"memory": {"kind": "device", "cache_ratio": 0.1}}, "cache_ratio is of a cache on the GPU"),
        ({"memory": {"kind": "uvm_caching", "cache_ratio": 1.0}}, "less than 1"),
        ({"memory": {"kind": "ssd"}}, r"memory\.ssd_path is missing"),
        ({"memory": {"kind": "uvm", "ssd_path": "/ssd"}}, "ssd_path is of memory.kind 'ssd', and it is 'uvm'"),
        ({"memory": {"kind": "ssd", "ssd_path": "/ssd"}, "optimizer": {"kind": "adagrad"}}, "and 'user' by 'adagrad'"),
        ({"memory": {"kind": "uvm"}, "sharding": {"types": ["data_parallel"]}}, "memory of every device"),
        ({"memory": {"kind": "auto"}, "sharding": {"types": ["data_parallel"]}}, "choose 'device'"),
        ({"memory": {"kind": "auto"}, "vocabulary": {"kind": "managed"}}, "a managed vocabulary resets rows"),
    ],
)
def test_what_makes_no_sense_is_refused(sized, user, message):
    with pytest.raises(ConfigError, match=message):
        sized(user=user)


def test_a_bias_lies_where_its_table_does(sized):
    memories = {spec.name: spec.memory.kind for spec in specs_of(sized(item={"memory": {"kind": "uvm_caching"}}))}
    assert memories == {"user": "device", "item": "uvm_caching", "item_id:bias": "uvm_caching"}
    on_ssd = sized(item={"memory": {"kind": "ssd", "ssd_path": "/ssd"}})
    assert {spec.name: spec.memory.kind for spec in specs_of(on_ssd)}["item_id:bias"] == "device"


# -------------------------------------------------------------------------------------------------------------- the plan
def test_what_the_gpus_do_not_hold_goes_behind_a_cache_if_it_may_and_the_plan_says_so(sized):
    assert not draft(sized()).fits
    found = draft(sized(user={"memory": {"kind": "auto"}}, item={"memory": {"kind": "auto"}}), explains=True)
    assert found.fits
    assert kernels(found) == {"user": "fused_uvm_caching", "item": "fused", "item_id:bias": "fused"}
    assert found.plan.tables["user"].cache_ratio == 0.2
    assert "no room for all tables" in found.reasons["user"].memory
    assert found.reasons["item"].memory == "the GPUs' memory has room for it"


@pytest.mark.parametrize("planner", ["auto", "explicit"])
@pytest.mark.parametrize("workers", [1, 2])
def test_on_larger_gpus_all_tables_stay_there(sized, planner, workers):
    tables = {"memory": {"kind": "auto"}} | ({"sharding": {"type": "row_wise"}} if planner == "explicit" else {})
    config = sized(tables, tables, sharding={"planner": planner})
    large = named_machines()["h200x8"]
    assert set(kernels(draft(config, workers, large)).values()) == {"fused"}
    assert kernels(draft(config, workers))["user"] == "fused_uvm_caching", "and on small ones it leaves them"
    assert kernels(draft(config, workers))["item"] == "fused"


def test_on_a_cpu_auto_is_the_memory_that_there_is(sized):
    found = draft(sized(user={"memory": {"kind": "auto"}}), machine=named_machines()["cpu"], explains=True)
    assert kernels(found)["user"] == "fused"
    assert found.reasons["user"].memory is None
    assert {rank.host for rank in found.footprint.ranks} == {0}


def test_as_few_as_it_takes_leave_those_with_the_most_bytes_a_lookup_first(sized):
    spec = specs_of(sized(user={"memory": {"kind": "auto"}}))[0]
    specs = [replace(spec, name=f"t{i}", rows=10 ** (i + 2)) for i in range(9)]
    tried = []

    def attempt(told):
        tried.append(told)
        inside = sum(spec.weight_bytes for spec in told if spec.memory.kind == "device")
        if inside > most:
            raise PlanError("too much")
        return [spec.name for spec in told if spec.memory.kind == "uvm_caching"]

    for leaving in range(10):
        most = sum(sorted(spec.weight_bytes for spec in specs)[: 9 - leaving])
        assert fewest_spilled(specs, {}, attempt) == [f"t{i}" for i in range(9 - leaving, 9)]
    assert len(tried) < 10 * 7
    frequent = {lookup.key: 10.0**9 for lookup in specs[8].lookups}
    busy = [*specs[:8], replace(specs[8], lookups=tuple(replace(found, key="hot") for found in specs[8].lookups))]
    assert fewest_spilled(busy, {"hot": 10.0**9} | dict.fromkeys(frequent, 1.0), lambda told: _few(told, 3)) == [
        "t5", "t6", "t7",
    ]  # fmt: skip


def _few(told, count):
    outside = [spec.name for spec in told if spec.memory.kind == "uvm_caching"]
    if len(outside) < count:
        raise PlanError("too few")
    return outside


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("uvm", "adagrad"), ("uvm_caching", "adagrad"), ("uvm_caching", "rowwise_adagrad"), ("ssd", "rowwise_adagrad")],
)
def test_bytes_add_up(sized, kind, optimizer):
    memory = {"kind": kind} | ({} if kind == "uvm" else {"cache_ratio": 0.05})
    memory |= {"ssd_path": "/ssd"} if kind == "ssd" else {}
    found = draft(sized({"memory": memory, "dtype": "fp16", "optimizer": {"kind": optimizer}}))
    ranks, places, rows = found.footprint.ranks, found.footprint.lying, 20_000_001
    for ours, theirs in (("weights", "device_weights"), ("state", "device_state"), ("host", "host"), ("ssd", "ssd")):
        assert sum(getattr(rank, ours) for rank in ranks) == sum(getattr(place, theirs) for place in places.values())
    user = places["user"]
    away = rows * 32 * 2 + (rows * 32 * 4 if optimizer == "adagrad" else 0)
    assert (user.host, user.ssd) == ((0, away) if kind == "ssd" else (away, 0))
    assert user.device_state == (rows * 4 if optimizer == "rowwise_adagrad" else 0)
    slots = user.cache / (32 * 2)
    if kind == "uvm":
        assert user.device_weights == 0
    else:
        assert slots == pytest.approx(0.05 * rows, rel=1e-4)
        assert slots % 32 == 0
        assert user.device_weights == user.cache + slots * 16 + (rows * 4 if kind == "uvm_caching" else 0)


def test_a_small_table_has_one_set_of_the_cache(sized):
    spec = specs_of(sized(user={"memory": {"kind": "uvm_caching"}}))[0]
    assert lying(spec, "fused_uvm_caching", 0.001, 100, 32).cache == 32 * 32 * 4


def test_the_hosts_memory_can_be_too_small_too(sized):
    config = sized(user={"memory": {"kind": "uvm"}})
    assert draft(config).fits
    assert not draft(config, machine=GPU.model_copy(update={"host_memory": 1.0})).fits
    on_ssd = sized(
        user={"memory": {"kind": "ssd", "ssd_path": "/ssd", "cache_ratio": 0.01}, "optimizer": {"kind": "rowwise_adagrad"}}
    )
    assert draft(on_ssd, machine=GPU.model_copy(update={"host_memory": 1.0})).fits
    assert not draft(on_ssd, machine=GPU.model_copy(update={"ssd": 1.0})).fits


def written(config_tree, tmp_path, machine=GPU):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_tree))
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump({"gpu": machine.model_dump()}))
    return tmp_path / "config.yaml", str(tmp_path / "gpu.yaml")


def test_the_command_tells_where_and_why_and_suggests_it(make_config, tmp_path):
    data = {"lanes": 2, "train": str(tmp_path / "none")}
    tree = make_config({"data": data, "tables": {"user": LARGE, "item": SMALL}}).tree
    config, machine = written(tree, tmp_path)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    without = plan_here(config, [], 2, machine, {}, console)
    assert not without.draft.fits
    (suggested,) = [found for found in without.suggestions if "behind a cache" in found.what]
    assert suggested.arguments == ("--set", "tables.user.memory.kind=auto")
    report = plan_here(config, [suggested.arguments[1]], 2, machine, {}, console)
    assert report.draft.fits
    assert max(rank.total for rank in report.draft.footprint.ranks) == suggested.needs
    show(report, console)
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "user: uvm_caching" in line]
    assert "20 % of its rows in a cache on the GPUs (488 MiB), 4.8 GiB on the host, since the GPUs' memory has no" in line
    assert "on the host a rank needs 2.4 GiB of 6.8 GiB" in text
    told = json.loads(json.dumps(report.to_json()))["memory"]["user"]
    assert (told["kind"], told["cache_ratio"], told["host"]) == ("uvm_caching", 0.2, 20_000_001 * 32 * (4 + 4))


# ------------------------------------------------------------------------------------------------------------ plan.json
def test_a_saved_plan_keeps_kernel_and_ratio_and_gives_them_to_torchrec(sized, tmp_path):
    config = sized(user={"memory": {"kind": "auto", "cache_ratio": 0.1}})
    plan = draft(config).plan
    plan.save(tmp_path / "plan.json")
    found = read_plan(tmp_path / "plan.json")
    assert (found.tables, found.fingerprint) == (plan.tables, plan.fingerprint)
    specs = specs_of(config)
    assert found.applies(specs, "auto", 2, 2)
    model = build_model(config, specs)
    (placed,) = [tables["user"] for tables in found.to_torchrec(model, "cuda").plan.values() if "user" in tables]
    assert (placed.compute_kernel, placed.cache_params) == ("fused_uvm_caching", CacheParams(load_factor=0.1))
    for changed, line in (
        (sized(), "table 'user': memory uvm_caching in the plan, the config allows device"),
        (sized(user={"memory": {"kind": "auto"}}), "table 'user': cache_ratio 0.1 in the plan, 0.2 in the config"),
    ):
        with pytest.raises(PlanError, match="was made for another config") as refused:
            found.applies(specs_of(changed), "auto", 2, 2)
        assert line in str(refused.value)
    with pytest.raises(PlanError, match="table 'user': uvm_caching in the plan, which needs CUDA; this is a CPU"):
        found.applies(specs, "auto", 2, 2, "cpu")


@pytest.mark.parametrize("damage", [{"cache_ratio": 1.5}, {"cache_ratio": None}, {"kernel": "fused_uvm"}])
def test_a_ratio_that_was_changed_into_nonsense_is_refused(sized, damage):
    value = draft(sized(user={"memory": {"kind": "uvm_caching"}})).plan.to_json()
    value["tables"]["user"].update(damage)
    with pytest.raises(PlanError, match="a share between 0 and 1 belongs to"):
        RecordedPlan.from_json(value, "plan.json")


# -------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("kind", ["uvm", "uvm_caching", "ssd"])
def test_on_a_cpu_what_is_a_gpus_is_refused(make_config, kind):
    memory = {"kind": kind} | ({"ssd_path": "/ssd"} if kind == "ssd" else {})
    config = make_config({"tables": {"item": {"memory": memory}}}).config
    specs = table_specs(config, {"user": 40, "item": 30})
    with open_world("cpu") as world, pytest.raises(ConfigError, match=rf"tables\.item\.memory\.kind is '{kind}', .* GPU's"):
        shard_model(build_model(config, specs), config, specs, world)


def test_this_build_says_whether_it_has_tables_on_an_ssd():
    assert not has_ssd_kernels(), "a build with them: then 'ssd' is to be trained, and docs/config.md to be changed"


@pytest.fixture
def behind_caches(make_config):
    """A model on this CPU whose kernels were told of caches, as TorchRec tells them: here they do nothing but count."""
    memory = {"user": {"kind": "uvm_caching", "cache_ratio": 0.5}, "item": {"kind": "uvm_caching", "cache_ratio": 0.25}}
    tables = {name: {"memory": value} for name, value in memory.items()}
    config = make_config({"tables": tables, "model": {"biases": ["item"]}}).config
    specs = table_specs(config, {"user": 40, "item": 30})
    model = build_model(config, specs)
    attach_table_optimizers(model, specs)
    sharders = make_sharders(config, torch.device("cuda"))
    with open_world("cpu") as world:
        plan = make_plan(model, specs, sharders, "auto", world, 32)
        ratios = {spec.name: spec.memory.ratio for spec in specs}
        for module_plan in plan.plan.values():
            for name, placed in module_plan.items():
                placed.compute_kernel = "fused_uvm_caching"
                placed.cache_params = CacheParams(load_factor=ratios[name])
        keep_apart(model, plan)
        env = ShardingEnv.from_process_group(world.group)
        yield (
            DistributedModelParallel(model, env=env, device=world.device, plan=plan, sharders=list(sharders)),
            world,
        )


def test_each_table_behind_a_cache_has_its_own_of_the_size_that_the_config_says(behind_caches):
    model, _ = behind_caches
    found = {
        tuple(table.name for table in kernel.config.embedding_tables): kernel.config.fused_params
        for kernel in fused_kernels(model)
    }
    assert {names: params["cache_load_factor"] for names, params in found.items()} == {
        ("user",): 0.5, ("item",): 0.25, ("item_id:bias",): 0.25,
    }  # fmt: skip
    assert all(params["gather_uvm_cache_stats"] for params in found.values())
    assert (
        compute_kernel_to_embedding_location(EmbeddingComputeKernel.FUSED_UVM_CACHING) == EmbeddingLocation.MANAGED_CACHING
    )


def test_caches_are_written_back_and_emptied_before_rows_are_seen(behind_caches, monkeypatch):
    model, _ = behind_caches
    done = []
    for kernel in fused_kernels(model):
        name = kernel.config.embedding_tables[0].name
        monkeypatch.setattr(kernel.emb_module, "flush", lambda name=name: done.append((name, "flush")))
        monkeypatch.setattr(kernel.emb_module, "reset_cache_states", lambda name=name: done.append((name, "reset")))
    names = [shard.table for shard in weight_shards(model)]
    assert sorted(names) == ["item", "item_id:bias", "user"]
    for name in names:
        of_table = [what for table, what in done if table == name]
        assert of_table[:2] == ["flush", "reset"]
        assert all(pair != ("reset", "reset") for pair in pairwise(of_table))


def test_hit_rates_are_fbgemms_counts():
    # Two calls asked for 100 ids, 40 of them distinct in their call; 10 missed, for 4 there was no slot: 9 lookups of those.
    assert cache_rates([2, 100, 40, 10, 4, 9]) == {"hit_rate": 0.75, "unplaced": 0.09}
    assert cache_rates([2, 0, 0, 0, 0, 0]) == {}


def test_rates_are_of_training_since_the_last_reading(behind_caches):
    model, world = behind_caches
    rates = CacheRates(model, world)

    def look_up(table, *counts):
        for kernel in fused_kernels(model):
            if kernel.config.embedding_tables[0].name == table:
                kernel.emb_module.uvm_cache_stats += torch.tensor(counts)

    assert rates.measure() == {}
    look_up("user", 1, 10, 10, 5, 0, 1)
    look_up("item", 1, 10, 4, 4, 0, 0)
    look_up("user", 1, 10, 10, 0, 0, 0)
    with rates.left_out():
        look_up("item", 9, 900, 900, 900, 0, 0)
    assert rates.measure() == {
        "item/hit_rate": 0.0, "item/unplaced": 0.0, "user/hit_rate": 0.75, "user/unplaced": 0.05,
    }  # fmt: skip
    look_up("item", 1, 4, 4, 1, 0, 0)
    assert rates.measure() == {"item/hit_rate": 0.75, "item/unplaced": 0.0}
