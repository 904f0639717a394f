"""Plans without the hardware: what they say is true, what they refuse, and what they suggest."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard.config import build_config, table_specs
from embedshard.data.collate import Collator
from embedshard.data.dataset import open_dataset
from embedshard.data.huffman import HuffmanTree
from embedshard.data.id_counts import IdCounts
from embedshard.data.lookup_sample import sample_lookups
from embedshard.data.reader import BatchReader
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.errors import ConfigError, PlanError
from embedshard.launch.planning import plan_here
from embedshard.sharding.demand import Demand, key_lengths, places_per_row, table_demands
from embedshard.sharding.draft import PROCESS_BYTES, draft_plan
from embedshard.sharding.footprint import DenseCost, footprint_of
from embedshard.sharding.hardware import Cluster, Machine, cluster_of, find_machine, named_machines
from embedshard.sharding.recorded import RecordedPlan, RecordedShard, RecordedTable, describe_table, read_plan
from embedshard.world import open_world
from tests.commands import run_command

NOTHING = DenseCost(weight_bytes=0, state_bytes=0, numbers_per_row=0, numbers_gathered=0, process_bytes=0)
CPU = Machine(device="cpu", host_memory=64, host_bandwidth=50, within_machine=2, between_machines=1)
GPU = Machine(
    device="cuda", devices=2, memory=1, host_memory=8, device_bandwidth=900, host_bandwidth=50, within_machine=100,
    between_machines=10,
)  # fmt: skip


def specs_of(config):
    return table_specs(config, table_rows(load_vocabularies(config)))


@pytest.fixture
def config(make_config):
    return make_config({"data": {"lanes": 8}}).config


def draft(config, workers=4, machine=CPU, sample=None, explains=False):
    return draft_plan(config, specs_of(config), cluster_of("test", machine, workers), sample, explains=explains)


# ------------------------------------------------------------------------------------------------------------ hardware
def test_every_named_machine_makes_a_topology():
    for name, machine in named_machines().items():
        cluster = cluster_of(name, machine, 2 * (machine.devices or 1))
        devices = cluster.topology().devices
        memory = devices[0].storage.hbm if machine.device == "cuda" else devices[0].storage.ddr
        assert len(devices) == cluster.world_size
        assert memory == cluster.memory_bytes > 0
    assert {"h200x8", "h100x8", "a100x8", "cpu"} <= set(named_machines())


@pytest.mark.parametrize(("workers", "local"), [(1, 1), (6, 6), (8, 8), (12, 6), (16, 8), (24, 8)])
def test_workers_are_equally_many_on_as_few_machines_as_hold_them(workers, local):
    cluster = cluster_of("h200x8", named_machines()["h200x8"], workers)
    assert (cluster.local_world_size, cluster.num_machines) == (local, workers // local)


def test_workers_that_machines_cannot_share_are_refused():
    with pytest.raises(ConfigError, match=r"--workers 9: .* Use 8 or 16"):
        cluster_of("h200x8", named_machines()["h200x8"], 9)


def test_a_file_of_machines_is_read_like_the_named_ones(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"big": GPU.model_dump(), "small": CPU.model_dump(exclude_none=True)}))
    assert find_machine(f"{path}:big") == ("big", GPU)
    with pytest.raises(ConfigError, match=r"describes big, small\. Choose one"):
        find_machine(str(path))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"m": {"device": "cuda", "host_bandwidth": 1, "within_machine": 1, "between_machines": 1}},
            "needs devices and memory",
        ),
        ({"m": {**CPU.model_dump(exclude_none=True), "memmory": 3}}, "m.memmory: unknown key"),
        ({"m": {"device": "cpu", "host_bandwidth": -1, "within_machine": 1, "between_machines": 1}}, "m.host_bandwidth: -1"),
        ({"m": {"device": "cpu"}}, "m.host_bandwidth: is missing"),
        ([1], "must hold machines by name"),
    ],
)
def test_a_wrong_description_is_told_with_its_place(tmp_path, tree, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        find_machine(str(path))


def test_an_unknown_machine_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'h200x8'"):
        find_machine("h200x9")


# ---------------------------------------------------------------------------------------------------------------- skew
@pytest.mark.parametrize("num_rows", [100, 2**23])
def test_lookups_are_counted_between_rows(num_rows):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, num_rows + 1, 5000)
    counts = IdCounts("item", num_rows)
    counts.add(rows)
    bounds = [0, 0, num_rows // 3, num_rows // 2, num_rows, num_rows + 1]
    expected = [int(((rows >= low) & (rows < high)).sum()) for low, high in pairwise(bounds)]
    assert counts.lookups_between(bounds).tolist() == expected
    root = counts.to_the_power(0.5).lookups_between(bounds)
    assert root[1] == sum(int(np.sqrt(n) * 1e6) for n in np.unique(rows[rows < num_rows // 3], return_counts=True)[1])


def test_shares_are_those_of_the_data(config):
    sample = sample_lookups(config, load_vocabularies(config))
    rows = [sample.features[name].counts.lookups_between([0, 10, 31]) for name in ("item_id", "history")]
    asked = table_demands(config, specs_of(config), sample, 8)["item"]
    assert sample.sampled_rows == sample.rows == 203
    assert asked.ids == pytest.approx(sum(sum(found) for found in rows) / 203)
    assert asked.shares([0, 10, 31]) == pytest.approx(sum(rows) / sum(sum(found) for found in rows))


def test_without_data_bags_have_their_greatest_length(config):
    lengths = key_lengths(config, specs_of(config), None, 8)
    assert lengths == {"user_id": 1.0, "item_id": 1.0, "history": 4.0, "item_id:bias": 1.0}


def test_drawn_candidates_are_counted_with_the_rows(make_config):
    config = make_config({"data": {"lanes": 8}, "objective": {"kind": "sampled_softmax", "num_negatives": 40}}).config
    lengths = key_lengths(config, specs_of(config), None, 8)
    assert (lengths["item_id:negative0"], lengths["item_id:negative1"]) == (1.0, 0.25)  # 40 in batches of 32 rows


def test_hot_ids_side_by_side_make_one_rank_slow(config):
    plan = placed(config, user=("row_wise", [0, 1]))
    demands = {
        "user": Demand(
            keys=1,
            vectors=1,
            is_pooled=True,
            ids=2.0,
            id_bytes=8,
            shares=lambda bounds: np.array([1.0 if bounds[0] == 0 else 0.0]),
        )
    }
    found = footprint_of(plan, specs_of(config)[:1], demands, Cluster("test", CPU, 2, 2), NOTHING, 32, "fp32")
    assert found.skew["user"].max_to_mean == 2.0
    assert found.lookups == (64.0, 0.0)


# --------------------------------------------------------------------------------------------------- bytes and traffic
def placed(config, workers=2, local=2, **tables):
    """A plan of the config's first tables: {name: (type, ranks)}; rows are cut evenly, rounded up."""
    specs = {spec.name: spec for spec in specs_of(config)}
    found = {}
    for name, (kind, ranks) in tables.items():
        rows, cuts = specs[name].num_embeddings, kind in ("row_wise", "table_row_wise")
        block = -(-rows // len(ranks)) if cuts else rows
        spans = [(i * block, min((i + 1) * block, rows)) if cuts else (0, rows) for i in range(len(ranks))]
        kernel = "dense" if kind == "data_parallel" else "fused"
        shards = tuple(RecordedShard(rank, span, (0, 8)) for rank, span in zip(ranks, spans, strict=True))
        found[name] = RecordedTable(kind, kernel, shards)
    return RecordedPlan(workers, local, {name: describe_table(specs[name]) for name in found}, found)


@pytest.mark.parametrize(
    ("kind", "ranks", "sent"),
    [
        # 32 rows, 4 ranks on 2 machines: 8 rows a rank, a vector is 32 bytes. Within the machine, between machines:
        ("table_wise", [0], (8 * 32 * 1, 8 * 32 * 2)),
        ("row_wise", [0, 1, 2, 3], (8 * 32 * 1, 8 * 32 * 2)),
        # Halves are summed within the machine; then rank 0 sends to its counterpart on the other machine alone.
        ("table_row_wise", [0, 1], (8 * 32 * 2, 8 * 32 * 1)),
    ],
)
def test_vectors_travel_as_the_type_says(config, kind, ranks, sent):
    plan, cluster = placed(config, 4, 2, user=(kind, ranks)), Cluster("test", CPU, 4, 2)
    demands = {
        "user": Demand(keys=1, vectors=1, is_pooled=True, ids=0.0, id_bytes=0, shares=lambda bounds: np.array([0.25]))
    }
    traffic = footprint_of(plan, specs_of(config)[:1], demands, cluster, NOTHING, 32, "fp32").traffic
    lengths = 8 * 8  # of 8 rows, to each rank with a shard
    received = {"table_wise": 0, "row_wise": sum(sent), "table_row_wise": sent[0]}[kind]  # whose gradients go back
    assert traffic.vectors == sum(sent) + received
    assert traffic.ids == lengths * (len(ranks) - 1)
    half = footprint_of(plan, specs_of(config)[:1], demands, cluster, NOTHING, 32, "fp16").traffic
    assert half.vectors == traffic.vectors / 2


def test_replicated_tables_cost_gradients_instead_of_ids(config):
    plan, cluster = placed(config, user=("data_parallel", [0, 1])), Cluster("test", CPU, 2, 2)
    demands = table_demands(config, specs_of(config), None, 8)
    found = footprint_of(plan, specs_of(config)[:1], demands, cluster, NOTHING, 32, "fp32")
    assert (found.traffic.ids, found.traffic.vectors, found.traffic.gradients) == (0, 0, 41 * 8 * 4)
    assert {(rank.weights, rank.state, rank.dense) for rank in found.ranks} == {(41 * 32, 41 * 32, 41 * 32)}


# --------------------------------------------------------------------------------------------------------- what is said
def test_tables_of_billions_of_rows_are_planned_without_memory_for_them(make_config):
    config = make_config({"data": {"lanes": 16}, "tables": {"user": {"rows": 3_000_000_000, "dim": 64}}}).config
    found = draft(config, 16, named_machines()["h200x8"], explains=True)
    assert found.fits
    assert found.plan.tables["user"].sharding_type in ("row_wise", "table_row_wise")
    assert "table_wise" in found.reasons["user"].misfits
    assert sum(rank.weights for rank in found.footprint.ranks) == sum(spec.weight_bytes for spec in specs_of(config))


def test_reasons_are_the_configs_where_it_decides(make_config):
    sharding = {"user": {"type": "row_wise"}, "item": {"type": "table_wise", "ranks": [3]}}
    tables = {name: {"sharding": value} for name, value in sharding.items()}
    config = make_config({"data": {"lanes": 8}, "sharding": {"planner": "explicit"}, "tables": tables}).config
    reasons = draft(config, explains=True).reasons
    assert reasons["user"].why == "the config says so"
    assert reasons["item"].why == "the config says so, on these ranks"
    config = make_config({"data": {"lanes": 8}, "tables": {"user": {"sharding": {"types": ["row_wise"]}}}}).config
    reasons = draft(config, explains=True).reasons
    assert reasons["user"].why == "the only type that the config allows"
    assert reasons["item"].runner_up is not None
    assert reasons["item"].runner_up_ms >= reasons["item"].estimated_ms


# ------------------------------------------------------------------------------------------------------------ plan.json
@pytest.mark.parametrize(
    ("changes", "workers", "line"),
    [
        ({"tables": {"user": {"rows": 99}}}, 4, "table 'user': rows 41 in the plan, 100 in the config"),
        ({"tables": {"item": {"dtype": "fp16"}}}, 4, "table 'item': dtype fp32 in the plan, fp16 in the config"),
        (
            {"tables": {"item": {"optimizer": {"kind": "sgd"}}}},
            4,
            "optimizer rowwise_adagrad in the plan, sgd in the config",
        ),
        ({"model": {"biases": []}}, 4, "table 'item_id:bias': in the plan, not in the config"),
        ({"tables": {"user": {"sharding": {"types": ["table_row_wise"]}}}}, 4, "the config allows table_row_wise"),
        ({}, 2, "workers: 4 in the plan, 2 now"),
    ],
)
def test_another_config_is_refused_with_what_differs(make_config, config, changes, workers, line):
    plan = draft(config).plan
    assert plan.applies(specs_of(config), "auto", 4, 4)
    specs = specs_of(make_config({"data": {"lanes": 8}} | changes).config)
    with pytest.raises(PlanError, match="was made for another config or other workers") as refused:
        plan.applies(specs, "auto", workers, workers)
    assert line in str(refused.value)
    own = RecordedPlan.from_json(plan.to_json(), "plan.json", is_binding=False)
    assert not own.applies(specs, "auto", workers, workers)


def test_a_saved_plan_is_the_plan(config, tmp_path):
    plan = draft(config).plan
    plan.save(tmp_path / "plan.json")
    found = read_plan(tmp_path / "plan.json")
    assert (found.tables, found.fingerprint) == (plan.tables, plan.fingerprint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: value.update(version=2), "has version 2"),
        (lambda value: value.update(format="x"), "is not a plan of embedshard"),
        (lambda value: value["depends_on"].update(workers=8), "was changed after it was saved"),
        (lambda value: value["tables"]["user"]["shards"].pop(), "are not its 41 rows x 8 columns, each once"),
        (lambda value: value["tables"]["user"].update(kernel="dense"), "its own optimizer would not train it"),
        (lambda value: value["tables"].pop("user"), "says nothing of table 'user'"),
        (lambda value: value["tables"]["user"].pop("shards"), "is damaged"),
    ],
)
def test_a_plan_that_was_changed_is_refused(config, damage, message):
    value = draft(config).plan.to_json()
    damage(value)
    with pytest.raises(PlanError, match=message):
        RecordedPlan.from_json(value, "plan.json")


# ----------------------------------------------------------------------------------------------------- the command line
@pytest.fixture
def too_large(make_config, tmp_path):
    """A config whose tables are too large for two GPUs of 1 GiB, and the file that describes them."""
    tables = {"user": {"rows": 6_000_000, "dim": 64, "optimizer": {"kind": "adagrad"}}, "item": {"dim": 8}}
    tree = make_config({"data": {"lanes": 16, "train": str(tmp_path / "none")}, "tables": tables}).tree
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump({"gpu": GPU.model_dump()}))
    return tmp_path / "config.yaml", str(tmp_path / "gpu.yaml")


def command(*arguments):
    return run_command("plan", *arguments)


def test_what_is_suggested_fits(too_large):
    from rich.console import Console

    path, gpu = too_large
    report = plan_here(path, (), 2, gpu, {}, Console(quiet=True))
    assert not report.draft.fits
    assert "no file matches" in report.unread
    whats = " ".join(suggestion.what for suggestion in report.suggestions)
    for word in ("4 workers", "as many workers on", "row-wise Adagrad", "narrower tables"):
        assert word in whats
    for suggestion in report.suggestions:
        options = dict(zip(suggestion.arguments[::2], suggestion.arguments[1::2], strict=True))
        sets = [
            value
            for name, value in zip(suggestion.arguments[::2], suggestion.arguments[1::2], strict=True)
            if name == "--set"
        ]
        workers, hardware = int(options.get("--workers", 2)), options.get("--hardware", gpu)
        again = plan_here(path, sets, workers, hardware, {}, Console(quiet=True))
        assert again.draft.fits, suggestion
        assert max(rank.total for rank in again.draft.footprint.ranks) == suggestion.needs


def test_the_command_ends_with_1_where_it_does_not_fit_and_0_where_it_does(too_large, tmp_path):
    path, gpu = too_large
    done = command(path, "--workers", 2, "--hardware", gpu, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"]
    assert found["suggestions"]
    done = command(path, "--workers", 2, "--hardware", "h100x8", "--save", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "It fits" in done.stdout
    assert read_plan(tmp_path / "plan.json").workers == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--hardware", "h300x8"), "there is no machine of that name"), (("--workers", "3"), "cannot share data.lanes=16")],
)
def test_a_mistake_ends_with_2(too_large, arguments, message):
    done = command(too_large[0], *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_table_whose_vocabulary_is_not_there_needs_its_rows(make_config, tmp_path):
    from rich.console import Console

    from embedshard.errors import DataError

    tree = make_config({"data": {"lanes": 8}}).tree
    tree["tables"]["item"] = {"dim": 8, "vocabulary": {"kind": "file", "path": str(tmp_path / "none.parquet")}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    build_config(tree, {}, "test")
    with pytest.raises(DataError, match=r"--set tables.item.rows=1000000"):
        plan_here(path, (), 2, "cpu", {}, Console(quiet=True))
    assert (
        plan_here(path, ["tables.item.rows=30"], 2, "cpu", {}, Console(quiet=True)).draft.plan.depends_on["item"]["rows"]
        == 31
    )


# -------------------------------------------------------------------------------------------------- an item_embedding
def embedding_config(folder, objective, subsample=None, rows=4096, lists=8000, ids=5000):
    """Lists of Zipfian ids, drawn one by one."""
    if not folder.exists():
        folder.mkdir()
        generator = np.random.default_rng(5)
        popularity = 1 / (np.arange(ids) + 3.0)
        drawn = generator.permutation(ids)[generator.choice(ids, lists * 12, p=popularity / popularity.sum())]
        lengths = generator.integers(2, 20, lists)
        offsets = np.minimum(np.concatenate([[0], np.cumsum(lengths)]), len(drawn)).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(drawn))
        pq.write_table(pa.table({"words": column}), folder / "a.parquet", row_group_size=1000)
    tree = {
        "data": {"train": str(folder), "lanes": 8},
        "features": {"words": {"kind": "sequence", "table": "word"}},
        "tables": {"word": {"dim": 8, "rows": ids}},
        "model": {"kind": "item_embedding", "sequence": "words", "subsample": subsample},
        "objective": objective,
        "train": {"global_batch_size": rows},
    }
    return build_config(tree, {}, "test")


def looked_up(config, world_size):
    """The mean over batches of rank 0's ids under each key, of its places, and which ids they are."""
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None)
    specs = table_specs(config, dataset.table_rows)
    collator = Collator(config, specs, None, dataset.pair_maker, dataset.tree)
    reader = BatchReader(
        dataset.order, dataset.train, dataset.cached, config.data.cache_bytes, collator, dataset.sampler, 0, world_size
    )
    full = len(pq.read_table(config.data.train[0])) // config.train.global_batch_size
    with reader.batches(0, full) as batches:
        found = [(batch.sequences.to_dict(), len(batch.pairs.ids)) for batch in batches]
    keys = {key: np.mean([len(jagged[key].values()) for jagged, _ in found]) for key in found[0][0]}
    return keys, np.mean([places for _, places in found]), [jagged["words"].values().numpy() for jagged, _ in found]


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("subsample", [None, 1e-3])
@pytest.mark.parametrize("objective", ["softmax", "hierarchical_softmax"])
def test_an_embedding_is_asked_for_each_id_of_a_batch_once(tmp_path, world_size, subsample, objective):
    config = embedding_config(tmp_path / "lists", {"kind": objective}, subsample, rows=1024)
    vocabularies = load_vocabularies(config)
    sample, batch = sample_lookups(config, vocabularies), 1024 // world_size
    estimated = key_lengths(config, specs_of(config), sample, batch)
    counted, places, ids = looked_up(config, world_size)
    assert estimated["words"] * batch == pytest.approx(counted["words"], rel=0.02)
    assert places_per_row(config, sample) * batch == pytest.approx(places, rel=0.03), "but for places that are alone"
    assert counted["words"] < places / 1.5, "or there would be nothing to tell"
    if objective == "softmax":
        assert estimated["words:context"] == estimated["words"]
    else:
        assert estimated["words:node"] * batch == pytest.approx(counted["words:node"], rel=0.05)
    # A hot id is looked up once a batch, as others are: shares of rows are those of different ids.
    demand = table_demands(config, specs_of(config), sample, batch)["word"]
    shares = np.mean([np.histogram(found, bins=[0, 700, 3000, 5001])[0] / len(found) for found in ids], axis=0)
    assert demand.shares([0, 700, 3000, 5001]) == pytest.approx(shares, abs=0.01)


def test_without_data_an_embeddings_ids_are_drawn_evenly(tmp_path):
    config = embedding_config(tmp_path / "lists", {"kind": "hierarchical_softmax"})
    lengths = key_lengths(config, specs_of(config), None, 4096)
    generator = np.random.default_rng(0)
    drawn = np.unique(generator.integers(0, 5001, 4096 * 10))
    assert lengths["words"] * 4096 == pytest.approx(len(drawn), rel=0.01)
    visited = HuffmanTree(np.ones(5001, dtype=np.int64)).paths(drawn).visited
    assert lengths["words:node"] * 4096 == pytest.approx(len(visited), rel=0.01)
    few = key_lengths(config, specs_of(config), None, 8)
    drawn = [np.unique(generator.integers(0, 5001, 80)) for _ in range(50)]
    nodes = [len(HuffmanTree(np.ones(5001, dtype=np.int64)).paths(each).visited) for each in drawn]
    assert few["words:node"] * 8 == pytest.approx(np.mean(nodes), rel=0.1)


@pytest.mark.parametrize(
    ("objective", "model", "bytes_per_id"),
    [
        ({"kind": "negative_sampling", "num_negatives": 16, "distribution": "popularity"}, {}, 40),
        ({"kind": "negative_sampling", "num_negatives": 16, "distribution": "uniform"}, {"subsample": None}, 0),
        ({"kind": "negative_sampling", "num_negatives": 16, "distribution": "uniform"}, {}, 40),
        ({"kind": "hierarchical_softmax"}, {"subsample": None}, 61),
    ],
    ids=["popularity", "uniform", "sub-sampled", "tree"],
)
def test_what_each_worker_keeps_of_all_ids_is_counted(objective, model, bytes_per_id):
    rows = 100_000_000
    tree = {
        "data": {"train": "nowhere.parquet", "lanes": 8},
        "features": {"words": {"kind": "sequence", "table": "word"}},
        "tables": {"word": {"rows": rows, "dim": 4}},
        "model": {"kind": "item_embedding", "sequence": "words", **model},
        "objective": objective,
        "train": {"global_batch_size": 64},
    }
    found = draft(build_config(tree, {}, "test"), 2)
    assert [rank.process for rank in found.footprint.ranks] == [PROCESS_BYTES + bytes_per_id * (rows + 1)] * 2
