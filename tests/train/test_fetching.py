"""Rows behind a cache that are fetched for the next step (`train.prefetch`): whole trainings, without a GPU.

FBGEMM has tables behind a cache on CUDA alone. Its Python that fetches, notes where rows lie, and looks them up anew before
a backward pass is what runs here; the four kernels below it that move rows are written anew, one row after the other, with
sets of four slots, so that most batches find no place for some of their rows. What a wrong order of calls would read or
write, it reads and writes here.
"""

import json
from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    construct_cache_state,
)
from torchrec.distributed import batched_embedding_kernel
from torchrec.distributed.types import CacheParams

from embedshard.errors import ConfigError
from embedshard.sharding import ahead, shard
from embedshard.train import step
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import JsonLinesReporter
from embedshard.world import open_world

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of ids, which have no gradients; FBGEMM's
WAYS = 4
FBGEMM = "fbgemm_gpu.split_table_batched_embeddings_ops_training"


def row_of(weights, cache, row):
    return weights.view(-1, cache.shape[1])[row]


def populate(weights, _sums, _total, _of_row, _offsets, _columns, rows, state, cache, now, used, *more):
    """Brings rows into their sets, in the stead of those that were used longest ago and are not of this batch."""
    locks, locked = more[3:]
    if locks:
        assert not locked.any(), "what is fetched begins without a lock"
    for row in rows.unique().tolist():
        of_set, times = state[row % len(state)], used[row % len(state)]
        held = of_set.tolist()
        if row in held:
            times[held.index(row)] = now
            if locks:
                locked[row % len(state)][held.index(row)] += 1
    for row in rows.unique().tolist():
        of_set, times = state[row % len(state)], used[row % len(state)]
        free = [slot for slot in range(WAYS) if times[slot] < now and not (locks and locked[row % len(state)][slot] > 0)]
        if row in of_set.tolist() or not free:
            continue
        slot = min(free, key=lambda slot: int(times[slot]))
        place = row % len(state) * WAYS + slot
        if of_set[slot] >= 0:
            row_of(weights, cache, of_set[slot])[:] = cache[place]
        cache[place] = row_of(weights, cache, row)
        of_set[slot], times[slot] = row, now
        if locks:
            locked[row % len(state)][slot] += 1


def look_up(rows, state, _total, *_stats, num_uniq_cache_indices=None, lxu_cache_locations_output, **_more):
    """Writes where each row lies; -1 where it is not in the cache."""
    count = len(rows) if num_uniq_cache_indices is None else int(num_uniq_cache_indices)
    for at, row in enumerate(rows[:count].tolist()):
        held = state[row % len(state)].tolist()
        lxu_cache_locations_output[at] = row % len(state) * WAYS + held.index(row) if row in held else -1


def unlock(locked, places):
    for place in places.unique().tolist():
        if place >= 0:
            locked[place // WAYS][place % WAYS] -= 1


def flush(weights, _sums, _of_row, _offsets, _columns, _width, state, cache, _rounds):
    """Writes what is in the cache back."""
    for place, row in enumerate(state.flatten().tolist()):
        if row >= 0:
            row_of(weights, cache, row)[:] = cache[place]


class Cached(SplitTableBatchedEmbeddingBagsCodegen):
    """One of FBGEMM's tables behind a cache, on a CPU."""

    fetched_ahead = found_fetched = 0

    def __init__(self, *arguments, cache_load_factor, **others):
        super().__init__(*arguments, cache_load_factor=cache_load_factor, **others)
        (rows, columns, *_) = self.embedding_specs[0]
        assert len(self.embedding_specs) == 1, "a table behind a cache has a kernel of its own"
        self.use_cpu, self.max_D_cache = False, columns
        for name in ("lxu_cache_weights", "cache_hash_size_cumsum", "total_cache_hash_size", "cache_index_table_map",
                     "lxu_cache_state", "lxu_state", "cache_miss_counter", "lxu_cache_locking_counter"):  # fmt: skip
            delattr(self, name)
        slots = int(rows * cache_load_factor)
        self._apply_cache_state(
            construct_cache_state([rows], [EmbeddingLocation.MANAGED_CACHING], self.feature_table_map),
            CacheAlgorithm.LRU, cache_load_factor, -(-slots // WAYS), 0.0, self.weights_precision,
        )  # fmt: skip
        self.weights_uvm = self.weights_host.detach()

    def prefetch(self, *arguments, **others):
        Cached.fetched_ahead += 1
        assert self.lock_cache_line, "FBGEMM leaves most of the GPU to what it runs beside"
        super().prefetch(*arguments, **others)

    def forward(self, indices, offsets, per_sample_weights=None, **_others):
        indices, offsets, weights, _ = self.prepare_inputs(indices, offsets, per_sample_weights)
        self._indices, self._offsets, self._vbe_B_offsets, self._vbe_max_B = indices, offsets, None, -1
        Cached.found_fetched += bool(self.timesteps_prefetched)
        if not self.timesteps_prefetched:
            assert not self.lock_cache_line, "a batch without a backward pass would keep its slots"
            self._prefetch(indices, offsets)
        self.timesteps_prefetched.pop(0)
        self.lxu_cache_locations = self.lxu_cache_locations_list.pop(0)
        assert len(self.lxu_cache_locations) == len(indices), "what was fetched is what is looked up"
        return _Lookup.apply(self.placeholder_autograd_tensor, self, indices, offsets, weights, self.lxu_cache_locations)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _anchor, tables, rows, offsets, weights, places):
        ctx.tables, ctx.rows, ctx.offsets, ctx.places = tables, rows, offsets, places
        cache = tables.lxu_cache_weights
        found = [
            cache[at] if at >= 0 else row_of(tables.weights_uvm, cache, row) for row, at in zip(rows, places, strict=True)
        ]
        vectors = torch.stack(found) if found else cache[:0]
        ctx.weights = weights = torch.ones(len(rows)) if weights is None else weights
        vectors = vectors * weights.unsqueeze(1)
        features = len(tables.feature_table_map)
        bags = torch.segment_reduce(vectors, "sum", offsets=offsets, initial=0)
        return bags.view(features, -1, cache.shape[1]).transpose(0, 1).reshape(-1, features * cache.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        tables, cache = ctx.tables, ctx.tables.lxu_cache_weights
        of_bags = gradient.view(len(gradient), -1, cache.shape[1]).transpose(0, 1).reshape(-1, cache.shape[1])
        of_ids = of_bags.repeat_interleave(ctx.offsets.diff(), 0) * ctx.weights.unsqueeze(1)
        rows, inverse = ctx.rows.unique(return_inverse=True)
        sums = torch.zeros(len(rows), cache.shape[1]).index_add(0, inverse, of_ids)
        for at, row in enumerate(rows.tolist()):
            place = int(ctx.places[at if tables.use_uniq_cache_locations_bwd else int((inverse == at).nonzero()[0])])
            into = cache[place] if place >= 0 else row_of(tables.weights_uvm, cache, row)
            into -= float(tables.learning_rate_tensor) * sums[at]
        return None, None, None, None, None, None


@pytest.fixture
def behind_caches(monkeypatch):
    """Has tables lie behind caches on this CPU, in trainings of one worker that is sent its batches ahead."""
    make_plan, make_sharders = shard.make_plan, shard.make_sharders

    def plan_with_caches(*arguments, **others):
        plan = make_plan(*arguments, **others)
        for module_plan in plan.plan.values():
            for placed in module_plan.values():
                placed.compute_kernel, placed.cache_params = "fused_uvm_caching", CacheParams(load_factor=0.5)
        return plan

    monkeypatch.setattr(shard, "check_memory", lambda *_, **__: None)
    monkeypatch.setattr(shard, "make_plan", plan_with_caches)
    monkeypatch.setattr(shard, "make_sharders", lambda config, _device: make_sharders(config, torch.device("cuda")))
    monkeypatch.setattr(step, "Ahead", lambda model, world: ahead.Ahead(model, replace(world, world_size=2)))
    monkeypatch.setattr(batched_embedding_kernel, "SplitTableBatchedEmbeddingBagsCodegen", Cached)
    monkeypatch.setattr(f"{FBGEMM}.DEFAULT_ASSOC", WAYS)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)  # FBGEMM asks for it, to measure time on
    for name, kernel in {
        "lru_cache_populate": populate,
        "lxu_cache_lookup": look_up,
        "lxu_cache_flush": flush,
        "lxu_cache_locking_counter_decrement": unlock,
        "linearize_cache_indices": lambda _sums, rows, *_more: rows.clone(),
    }.items():
        monkeypatch.setattr(torch.ops.fbgemm, name, kernel)
    for count in ("fetched_ahead", "found_fetched"):
        monkeypatch.setattr(Cached, count, 0)


def changed(prefetch=False, memory=None):
    memory = memory or {"kind": "uvm_caching", "cache_ratio": 0.5}
    return {
        "optimizer": {"tables": {"kind": "sgd", "lr": 0.5}},
        "tables": {"user": {"optimizer": {"kind": "sgd"}, "memory": memory}, "item": {"memory": memory}},
        "evaluate": {"every_steps": 3},
        "checkpoint": {"every_steps": 4, "keep": 9},
        "train": {"epochs": 2, "log_every_steps": 1, "prefetch": prefetch, "deterministic": True},
    }


STEPS = 14  # two epochs of 203 rows by 32


@pytest.fixture
def run(saved_tensors):
    def run(config, folder):
        return _run(config, folder, saved_tensors)

    return run


def _run(config, folder, saved_tensors, device="cpu"):
    """Trains; returns the loss of each step, what was measured on the validation set, and the last checkpoint's tensors."""
    directory = RunDirectory.create(folder, config)
    reporter = JsonLinesReporter(directory.folder.join("metrics.jsonl"), 1)
    with open_world(device) as world:
        train(config.config, world, directory, reporter)
    reporter.finished()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line["train/loss"] for line in lines if "train/loss" in line]
    validated = [value for line in lines for name, value in line.items() if name.startswith("validation/")]
    return told, validated, saved_tensors(folder)


def test_what_is_fetched_ahead_changes_no_bit_over_evaluations_and_saves(
    run, behind_caches, make_config, tmp_path, assert_same_tensors
):
    runs = {}
    for fetches in (False, True):
        config = make_config(changed(prefetch=fetches))
        runs[fetches] = run(config, tmp_path / str(fetches))
        assert len(runs[fetches][0]) == STEPS
    tables = 3  # user, item, the items' bias
    assert Cached.fetched_ahead == tables * (STEPS - 1), "each step's rows but the first one's"
    # Those of the steps after 3, 4, 6, 8, 9 and 12 were let go of: an evaluation or a save came between.
    assert Cached.found_fetched == tables * (STEPS - 1 - 6)
    assert runs[True][:2] == runs[False][:2]
    assert_same_tensors(runs[True][2], runs[False][2])


def test_rows_behind_a_cache_are_trained_as_others_are(run, behind_caches, make_config, tmp_path, monkeypatch):
    cached = run(make_config(changed(prefetch=True)), tmp_path / "cached")
    monkeypatch.undo()
    plain = run(make_config(changed(memory={"kind": "device"})), tmp_path / "plain")
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    for name, tensor in plain[2][1].items():
        torch.testing.assert_close(cached[2][1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_steps_without_any_weight_leave_nothing_behind(
    run, behind_caches, make_config, tmp_path, assert_same_tensors, monkeypatch
):
    weighted = step._weighted

    def every_other_without_weight(losses, own_weights, batch):
        of_rows, total, rows = weighted(losses, own_weights, batch)
        counts = batch.training_position.step % 2
        return of_rows * counts, total * counts, rows

    monkeypatch.setattr(step, "_weighted", every_other_without_weight)
    runs = [run(make_config(changed(prefetch=fetches)), tmp_path / str(fetches)) for fetches in (0, 1)]
    assert Cached.found_fetched
    assert runs[0][:2] == runs[1][:2]
    assert_same_tensors(runs[0][2], runs[1][2])


def test_where_only_a_step_knows_what_it_looks_up_fetching_is_refused(make_config):
    custom = {"kind": "custom", "factory": "somewhere:build", "user_id": "user_id", "item_id": "item_id"}
    with pytest.raises(ConfigError, match=r"train\.prefetch .* only a custom model's own code knows .* Leave it out"):
        make_config({"model": custom, "train": {"prefetch": True}})
    of_labels = {"data": {"label": "clicked"}, "objective": {"kind": "bce"}, "evaluate": {"metrics": ["auc"]}}
    managed = {"user": {"vocabulary": {"kind": "managed"}}}
    with pytest.raises(ConfigError, match=r"train\.prefetch .* tables\.user, whose vocabulary is managed"):
        make_config({"tables": managed, "train": {"prefetch": True}} | of_labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: FBGEMM has tables behind a cache on CUDA alone")
def test_on_a_gpu_what_is_fetched_ahead_changes_no_bit(make_config, tmp_path, saved_tensors, assert_same_tensors):
    runs = []
    for fetches in (False, True):
        config = make_config(changed(prefetch=fetches))
        runs.append(_run(config, tmp_path / str(fetches), saved_tensors, "cuda"))
    assert runs[0][:2] == runs[1][:2]
    assert_same_tensors(runs[0][2], runs[1][2])


def test_without_a_cache_fetching_changes_nothing(run, make_config, tmp_path, assert_same_tensors):
    runs = [run(make_config({"train": {"prefetch": fetches}}), tmp_path / str(fetches)) for fetches in (False, True)]
    assert_same_tensors(runs[0][2], runs[1][2])
