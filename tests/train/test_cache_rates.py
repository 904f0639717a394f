"""A run whose tables' kernels are told of caches: on a CPU FBGEMM has none, so kernels train as ever, and counts are set."""

import json

import torch
from torchrec.distributed.types import CacheParams

from embedshard.sharding import shard as sharding
from embedshard.sharding.cache import CacheRates
from embedshard.sharding.recorded import read_plan
from embedshard.sharding.shards import fused_kernels
from embedshard.train import assembly
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import JsonLinesReporter
from embedshard.world import open_world


def counting(model, world):
    """As a cache whose rows are there three times of four in training, and never in an evaluation."""

    def count(tables, *_):
        tables.uvm_cache_stats += torch.tensor([1, 8, 4, 1 if torch.is_grad_enabled() else 4, 0, 0])

    for kernel in fused_kernels(model):
        kernel.emb_module.register_forward_pre_hook(count)
    return CacheRates(model, world)


def test_the_hit_rate_is_told_at_each_logged_step_and_is_that_of_training(make_config, tmp_path, monkeypatch):
    config = make_config(
        {
            "tables": {"item": {"memory": {"kind": "auto"}}},
            "evaluate": {"every_steps": 1},
            "checkpoint": {"every_steps": 2},
            "train": {"log_every_steps": 2, "max_steps": 4},
        }
    )
    make_plan, make_sharders = sharding.make_plan, sharding.make_sharders

    def as_on_cuda(*arguments):
        plan = make_plan(*arguments)
        for module_plan in plan.plan.values():
            for placed in module_plan.values():
                placed.compute_kernel, placed.cache_params = "fused_uvm_caching", CacheParams(load_factor=0.25)
        return plan

    plain = run(config, tmp_path / "plain")
    monkeypatch.setattr(sharding, "make_plan", as_on_cuda)
    monkeypatch.setattr(sharding, "make_sharders", lambda config, _: make_sharders(config, torch.device("cuda")))
    monkeypatch.setattr(assembly, "CacheRates", counting)
    for on_a_cpu_alone in ("take_over_tables", "look_up_directly"):
        monkeypatch.setattr(sharding, on_a_cpu_alone, lambda model: None)
    lines = run(config, tmp_path / "cached")
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        rates = {name: value for name, value in line.items() if name.startswith("train/cache/")}
        assert {name: value for name, value in rates.items() if name.endswith("hit_rate")} == {
            f"train/cache/{table}/hit_rate": 0.75 for table in ("user", "item", "item_id:bias")
        }
    assert [line["train/loss"] for line in logged] == [line["train/loss"] for line in plain if "train/loss" in line]
    assert not any("cache" in name for line in plain for name in line)
    tables = read_plan(tmp_path / "cached" / "plan.json").tables
    assert {(table.kernel, table.cache_ratio) for table in tables.values()} == {("fused_uvm_caching", 0.25)}


def run(config, folder):
    directory = RunDirectory.create(folder, config)
    reporter = JsonLinesReporter(directory.folder.join("metrics.jsonl"), 1)
    with open_world("cpu") as world:
        train(config.config, world, directory, reporter)
    reporter.finished()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
