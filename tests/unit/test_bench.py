"""What `bench` says of what it measured: rates, shares, bytes that are counted by hand, and the shape of its JSON."""

import json
from itertools import count
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from embedshard.bench import measure as measure_module
from embedshard.bench.computing import _instead, computing_measures, lookup_of, take_batches, touched, touched_rows
from embedshard.bench.machine import PlainRows, raw_files
from embedshard.bench.measure import Limit, Measure, Timer
from embedshard.bench.ranking import ranking_measure
from embedshard.bench.reading import reading_measures
from embedshard.bench.saving import lack_of_room, saving_measures
from embedshard.bench.stepping import Steps, _Watch
from embedshard.bench.synthetic import synthetic_config, write_criteo_shape
from embedshard.config import build_config, table_specs
from embedshard.errors import ConfigError
from embedshard.launch.bench import Bench, bench_here, show
from embedshard.stages import BESIDE, STEP_STAGES, Waterfall
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint_files import MAX_FILE_BYTES
from embedshard.train.snapshot import pieces
from embedshard.train.stop import Notices
from embedshard.world import open_world

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ a measure
def test_a_rate_is_a_median_and_a_share_is_of_pairs_of_turns():
    measure = Measure("lookup", "x", "B", 100.0, (1.0, 4.0, 2.0), Limit("plain", 400.0, (1.0, 8.0, 2.0)))
    assert measure.rate == 50.0
    assert measure.spread == (100 / 3, 100 / 1.5)
    assert measure.limit.rate == 200.0
    assert measure.share == 0.25, "1/4, then twice as much beside a turn that was slow for both, then 1/4"
    assert Measure.from_json(json.loads(json.dumps(measure.to_json()))) == measure
    assert measure.to_json()["unit"] == "B/s"
    alone = Measure("memory", "x", "B", 100.0, (2.0,))
    assert (alone.rate, alone.spread, alone.share) == (50.0, (50.0, 50.0), None)
    absent = Measure("host to device", "x", not_applicable="there is no device")
    assert (absent.rate, absent.spread, absent.share) == (None, None, None)
    assert absent.to_json()["status"] == "not applicable"
    assert Measure.from_json(absent.to_json()) == absent


def test_works_take_turns_after_a_warm_up_and_what_makes_ready_is_not_timed(monkeypatch):
    clock = count()  # each look at it takes a second
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measure_module.time, "monotonic", lambda: 0.0)
    done, met = [], []

    def prepare():
        for _ in range(10):
            next(clock)
        return len(done)

    timer = Timer(1e-9, CPU, meet=lambda: met.append(len(done)))
    taken = timer.in_turns(
        [(lambda given: done.append(("own", given)), prepare), (lambda: done.append(("limit", None)), None)]
    )
    assert [len(seconds) for seconds in taken] == [1000, 1000], "time stands still: as many as there may be"
    assert set(taken[0]) == set(taken[1]) == {1.0}
    assert [kind for kind, _ in done] == ["own", "limit"] * 1001
    assert [given for kind, given in done if kind == "own"] == list(range(0, 2002, 2))
    assert met == list(range(2002)), "before each pass, the warm-up's too"


def test_processes_that_measure_together_take_as_many_turns():
    wishes = []

    def say_again(wish):
        wishes.append(wish)
        return len(wishes) < 7

    assert len(Timer(1e-9, CPU, say_again=say_again).alone(lambda: None)) == 7
    assert len(Timer(0.0, CPU).alone(lambda: None)) == 3, "those that take long are still done a few times"


def test_the_peak_is_what_a_pass_took_beyond_what_was_held():
    timer = Timer(0.0, CPU)
    timer.alone(lambda: torch.ones(2**24).sum())
    if timer.peak_bytes is None:
        pytest.skip("this system does not set the high-water mark back")
    assert 0.9 * 4 * 2**24 < timer.peak_bytes < 3 * 4 * 2**24


# ------------------------------------------------------------------------------------------------- bytes, counted by hand
def specs_of(make_config):
    tables = {
        "user": {"rows": 40, "dim": 8, "optimizer": {"kind": "adagrad"}},
        "item": {"rows": 30, "dim": 12, "dtype": "fp16", "optimizer": {"kind": "rowwise_adagrad"}},
    }
    model = {"biases": [], "item": {"features": ["item_id"], "mlp": [8]}}
    return table_specs(make_config({"tables": tables, "model": model}).config, {"user": 40, "item": 30})


def test_bytes_of_lookups_are_those_counted_by_hand(make_config):
    ids = {"user": [np.array([3, 3, 5])], "item": [np.array([0]), np.array([0, 7, 7, 30])]}
    found = touched_rows(specs_of(make_config), ids)
    assert found.rows.tolist() == [3, 3, 5, 41, 41, 48, 48, 71], "after the user's 40 rows and the one for unknown ids"
    assert found.distinct.tolist() == [3, 5, 41, 48, 71]
    assert found.read == 3 * 8 * 4 + 5 * 12 * 2
    assert found.changed == 2 * (2 * (8 * 4 + 8 * 4) + 3 * (12 * 2 + 4)), (
        "Adagrad keeps a number for each, row-wise one a row"
    )
    nothing = touched_rows(specs_of(make_config), {})
    assert (len(nothing.rows), nothing.read, nothing.changed) == (0, 0, 0)


def test_plain_rows_are_as_many_bytes_and_are_read_and_added_to():
    rows = PlainRows([torch.tensor([1, 2, 2]), torch.tensor([10**12])], 10 * 4.2, 7, CPU)
    assert rows.columns == 10
    assert rows.work == 2 * 40, "three rows, then one"
    assert rows.size_bytes >= 64 * 2**20 - 40, "no smaller than that: a cache is no memory"
    before = rows._table.clone()
    rows.read()
    rows._values.fill_(2.0)
    rows.add()
    rows.add()
    changed = torch.nonzero((rows._table != before).any(dim=1)).flatten().tolist()
    assert changed == sorted({1, 2, 10**12 % rows.num_rows})


def test_plain_files_have_as_many_bytes(tmp_path):
    files = raw_files(tmp_path / "raw", MAX_FILE_BYTES + 5)
    files.write()
    files.read()
    assert sorted(path.stat().st_size for path in (tmp_path / "raw").iterdir()) == [5, MAX_FILE_BYTES]


# -------------------------------------------------------------------------------------------------- on the run's own parts
@pytest.fixture
def parts(make_config):
    with open_world("cpu") as world:
        yield assemble(make_config({"model": {"biases": []}}).config, world)


def test_reading_counts_the_rows_that_are_trained(parts):
    raw, own = reading_measures(parts, Timer(0.0, CPU))
    assert (raw.work, own.work) == (203, 203)
    assert own.limit.name == raw.name
    assert own.share is not None  # how large it is the clock says: a turn takes few milliseconds here
    assert raw.rate > 0
    assert own.rate > 0
    assert "decode" in own.note


def test_a_pass_over_streamed_data_is_of_whole_windows(make_config):
    config = make_config({"data": {"cache_bytes": 0, "window_steps": 2}}).config
    with open_world("cpu") as world:
        _, own = reading_measures(assemble(config, world), Timer(0.0, CPU))
    assert own.work == 203, "less than it wants, so all of it"
    assert "streamed" in own.what


def test_what_a_batch_touches_is_what_its_lookups_are_given(parts):
    [batch] = take_batches(parts, 1)
    found = touched(parts, batch)
    user = batch.sparse["user_id"].values().numpy()
    item, history = (batch.weighted[key].values().numpy() for key in ("item_id", "history"))
    assert found.rows.tolist() == [*user, *(41 + item), *(41 + history)]
    assert found.read == 4 * 8 * (len(user) + len(item) + len(history))


def test_vectors_that_are_there_already_are_given_for_a_while_only(parts):
    lookup, given = lookup_of(parts.model), {"user_id": torch.ones(2, 8)}
    with _instead(lookup, given):
        assert lookup(None) == given
    assert "forward" not in vars(lookup)


def state_of(parts):
    found = pieces(parts.model, parts.optimizers, parts.objective, parts.world)
    return {piece.name: piece.tensor.detach().clone() for piece in found}


def test_a_checkpoint_comes_back_as_it_was_and_nothing_stays(parts, tmp_path):
    before = state_of(parts)
    written, read = saving_measures(parts, Timer(0.0, CPU), tmp_path)
    # Weights and row-wise or whole statistics of two tables, the tower, and the dense optimizer's state of it.
    tables = 4 * (41 * 8 + 41 * 8 + 31 * 8 + 31)
    assert written.work == read.work > tables
    assert written.limit.work == read.limit.work == written.work
    assert list(tmp_path.iterdir()) == []
    after = state_of(parts)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()


def test_a_disk_that_is_too_small_is_told(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("embedshard.bench.saving.shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    found = list(saving_measures(parts, Timer(0.0, CPU), tmp_path))
    assert [bool(measure.not_applicable) for measure in found] == [True, True]
    assert "TMPDIR" in found[0].not_applicable
    assert lack_of_room(parts, tmp_path) == found[0].not_applicable
    monkeypatch.undo()
    assert lack_of_room(parts, tmp_path) == ""


def test_ranking_scores_all_pairs_of_the_test_set(parts):
    found = ranking_measure(parts, Timer(0.0, CPU))
    users = np.unique(pq.read_table(parts.config.data.test[0].replace("*", "part-0"))["user_id"].to_numpy())
    assert found.work == len(users) * 30
    assert found.limit.work == found.work
    assert "recall@5" in found.what


def test_a_config_that_does_not_rank_has_no_top_k(make_config):
    changes = {
        "data": {"label": "clicked"},
        "model": {"biases": []},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["auc"]},
    }
    with open_world("cpu") as world:
        found = ranking_measure(assemble(make_config(changes).config, world), Timer(0.0, CPU))
    assert "no metric that ranks" in found.not_applicable


LABEL = {"data": {"label": "clicked"}, "objective": {"kind": "bce"}, "evaluate": {"metrics": ["auc"]}}
LIST = {"history": {"kind": "sequence", "table": "item", "max_length": 4}}
MODELS = {
    "two_tower, biases": {},
    "dlrm": LABEL | {"model": {"kind": "dlrm", "dense_mlp": [8], "mlp": [8]}},
    "sasrec": {
        "features": LIST | {"item_id": {"kind": "id", "table": "item"}, "user_id": None, "age": None},
        "tables": {"user": None},
        "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "heads": 2},
        "objective": {"kind": "sampled_softmax", "num_negatives": 8},
        "evaluate": {"metrics": []},
    },
    "item_embedding": {
        "features": LIST | {"item_id": None, "user_id": None, "age": None},
        "tables": {"user": None},
        "model": {"kind": "item_embedding", "sequence": "history", "window": 2},
        "objective": {"kind": "negative_sampling", "num_negatives": 4},
        "evaluate": {"metrics": []},
    },
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_is_measured(make_config, changes):
    tree = make_config().tree
    for part, values in changes.items():
        whole = values if "kind" in values else tree[part] | values
        tree[part] = {name: value for name, value in whole.items() if value is not None}
    with open_world("cpu") as world:
        found = list(computing_measures(assemble(build_config(tree, {}, "test"), world), Timer(0.0, CPU)))
    names = ["host to device", "random rows", "lookup", "backward, fused update", "dense forward, backward"]
    assert [measure.name for measure in found] == names
    assert all(measure.rate > 0 for measure in found[1:])


def test_a_model_that_looks_up_in_its_own_way_says_so(parts, monkeypatch):
    monkeypatch.setattr("embedshard.bench.computing.lookup_of", lambda model: None)
    found = list(computing_measures(parts, Timer(0.0, CPU)))
    assert all("a way of its own" in measure.not_applicable for measure in found[1:])


# ------------------------------------------------------------------------------------------------------------ the steps
def steps_of(workers=1, wall=(0.004, 0.002), window=None):
    stages = dict.fromkeys(STEP_STAGES, 0.0) | {"lookup": 0.001, "table_backward": 0.0017}
    return Steps(workers, 64, 20, wall, Waterfall(stages, dict.fromkeys(BESIDE, 0.0) | {"order": 0.001}, workers), window)


def test_the_part_of_a_step_that_is_in_no_stage_is_stated():
    steps = steps_of()
    assert steps.mean_wall == pytest.approx(0.003)
    assert steps.samples_per_second == pytest.approx(64 / 0.003), "the mean: a median would hide the steps that wait"
    assert steps.remainder == pytest.approx(0.1)
    told = json.loads(json.dumps(steps.to_json()))
    assert Steps.from_json(told) == steps
    assert told["sentences"] == steps.waterfall.sentences()


@pytest.mark.parametrize(("window", "stops_after"), [(0, 40), (16, 50), (64, 80)])
def test_steps_are_watched_in_whole_windows(monkeypatch, window, stops_after):
    """A line each ten steps and each second; two seconds are asked for: 20 steps after the first line."""
    now = [0.0]
    monkeypatch.setattr("embedshard.bench.stepping.time.monotonic", lambda: now[0])
    run = SimpleNamespace(read_json=lambda name: {"window_steps": [window], "epoch_steps": 1000})
    notices = Notices()
    watch = _Watch(notices, run, 2.0)
    for step in range(10, 1000, 10):
        now[0] += 1.0
        watch.measured(step, {"checkpoint/seconds": 1.0})
        watch.measured(step, {"train/loss": 1.0})
        if notices.stop is not None:
            break
    assert step == stops_after
    assert not watch.lacks_a_window


# --------------------------------------------------------------------------------------------------- data of its own
def test_its_own_data_have_the_shape_of_criteo_and_its_config_fits_them(tmp_path):
    write_criteo_shape(tmp_path, rows=3_000)
    table = pq.read_table(tmp_path / "train.parquet")
    assert table.column_names == [*(f"c{n}" for n in range(1, 27)), *(f"i{n}" for n in range(1, 14)), "label"]
    assert pq.read_metadata(tmp_path / "train.parquet").row_group(0).column(0).compression == "ZSTD"
    config = build_config(synthetic_config(tmp_path, batch_size=256), {}, "test")
    for name, of_table in config.tables.items():
        values = table[name].to_numpy()
        assert 0 <= values.min() <= values.max() < of_table.vocabulary.rows if hasattr(of_table.vocabulary, "rows") else True
    counts = np.sort(np.unique(table["c26"].to_numpy(), return_counts=True)[1])[::-1]
    assert counts[0] > 20 * np.median(counts), "a few ids have most of the rows"
    write_criteo_shape(tmp_path, rows=3_000)
    assert pq.read_table(tmp_path / "train.parquet").equals(table), "the same at each time"
    with open_world("cpu") as world:
        [batch] = take_batches(assemble(config, world), 1)
    assert (batch.size, batch.dense.shape[1], len(batch.sparse.keys())) == (256, 13, 26)


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_mistakes_are_told(make_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(make_config().tree))
    console = Console(stderr=True)
    with pytest.raises(ConfigError, match=r"--workers 3: data.lanes=4 fit 1, 2, 4"):
        bench_here(path, [], {}, workers=3, console=console)
    with pytest.raises(ConfigError, match="starts its own workers"):
        bench_here(path, [], {"RANK": "0", "WORLD_SIZE": "2"}, console=console)


@pytest.fixture
def found():
    machine = {
        "date": "2026-01-01", "cpu": "a processor", "cores": 2, "cores_allowed": 1, "threads": 1, "load": 0.5,
        "memory_bytes": 2**30, "device": "cpu", "system": "a system", "versions": {"torch": "2"}, "computing": 0.4,
    }  # fmt: skip
    measures = [
        Measure("lookup", "rows", "B", 2e9, (1.0, 2.0, 4.0), Limit("plain rows", 4e9, (1.0, 2.0, 4.0)), 2**20, "a note"),
        Measure("host to device", "a batch", not_applicable="there is no device"),
    ]
    steps = [steps_of(), steps_of(2, window=99)]
    return Bench("a.yaml", machine, 2, 1.0, measures, steps, ["Steps: no room."])


def test_a_table_shows_each_measure_and_what_is_not_measured(found, capsys):
    show(found, Console(width=120))
    shown = capsys.readouterr().out
    for words in (
        "1 GB/s",
        "50%",
        "plain rows, 2 GB/s",
        "1.0 MiB",
        "n/a",
        "there is no device",
        "a note",
        "1 of 2 cores",
        "40% of the time",
    ):
        assert words in shown
    for words in (
        "table_backward",
        "62.96 %",
        "10.00 % of the wall time is in no stage",
        "a window of 99 steps",
        "2 workers",
    ):
        assert words in shown


def test_tables_of_markdown_have_a_line_for_each_measure_and_stage(found, capsys):
    show(found, Console(width=120), as_markdown=True)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[2][:2] == ["lookup", "1 GB/s"]
    assert rows[2][3:] == ["50%", "plain rows, 2 GB/s", "1.0 MiB"]
    assert rows[3] == ["host to device", "n/a", "", "", "", ""]
    assert {len(row) for row in rows} == {6, 3}, "steps have no bars"
    assert "- host to device: a batch; there is no device." in lines
    assert any(row[0] == "table_backward" and row[2] == "62.96 %" for row in rows)
