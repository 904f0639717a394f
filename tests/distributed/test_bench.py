"""`embedshard bench` as a user runs it, with two workers: what it prints, what it counts, and that it leaves nothing."""

import json

import pytest
import yaml

from embedshard.stages import STEP_STAGES
from tests.commands import run_command

ALONE = [
    "memory copy", "Parquet decode", "decode, order, collate", "host to device", "random rows", "lookup",
    "backward, fused update", "dense forward, backward", "checkpoint write", "checkpoint read", "exact top-k",
]  # fmt: skip
TOGETHER = ["plain all-to-all", "input all-to-all", "output all-to-all"]
KEYS = {
    "name", "what", "status", "why", "unit", "rate", "rate_quartiles", "work", "seconds", "limit", "limit_rate",
    "limit_work", "limit_seconds", "share", "peak_bytes", "note",
}  # fmt: skip


@pytest.fixture(scope="module")
def kept():
    """What was measured once for all tests of this module."""
    return {}


@pytest.fixture
def measured(kept, make_config, tmp_path_factory):
    """What it says of a config whose two tables lie on one worker each, and its folder."""
    if kept:
        return kept["found"], kept["folder"]
    folder = tmp_path_factory.mktemp("bench")
    tables = {name: {"sharding": {"type": "table_wise", "ranks": [rank]}} for rank, name in enumerate(("user", "item"))}
    changes = {"tables": tables, "sharding": {"planner": "explicit"}, "model": {"biases": []}}
    (folder / "config.yaml").write_text(yaml.safe_dump(make_config(changes).tree))
    (folder / "scratch").mkdir()
    done = run_command("bench", folder / "config.yaml", "--json", "--seconds", "0.05", TMPDIR=str(folder / "scratch"))
    assert done.returncode == 0, done.stderr
    kept.update(found=json.loads(done.stdout), folder=folder)
    return kept["found"], folder


def test_it_tells_each_measure_as_a_rate_and_a_share_of_its_limit(measured):
    found, folder = measured
    assert set(found) == {"format", "config", "machine", "workers", "seconds_per_measure", "measures", "steps", "left_out"}
    assert (found["format"], found["config"], found["workers"]) == (1, str(folder / "config.yaml"), 2)
    machine = found["machine"]
    assert {
        "date",
        "cpu",
        "cores",
        "cores_allowed",
        "threads",
        "load",
        "memory_bytes",
        "device",
        "versions",
        "computing",
    } <= set(machine)
    assert {"torch", "torchrec", "pyarrow", "python", "embedshard"} <= set(machine["versions"])
    assert [measure["name"] for measure in found["measures"]] == ALONE + TOGETHER
    for measure in found["measures"]:
        assert set(measure) == KEYS
        if measure["name"] == "host to device":
            assert (measure["status"], measure["rate"]) == ("not applicable", None)
            assert "no device" in measure["why"]
            continue
        assert measure["status"] == "measured", measure
        assert measure["unit"] in {"B/s", "rows/s", "FLOP/s", "pairs/s"}
        assert min(measure["seconds"]) > 0
        low, high = measure["rate_quartiles"]
        assert 0 < low <= measure["rate"] <= high
        assert measure["work"] / max(measure["seconds"]) <= low * (1 + 1e-9)
        has_limit = measure["name"] not in {"memory copy", "Parquet decode", "random rows"}
        assert (measure["limit"] is not None) is has_limit
        if has_limit:
            assert measure["share"] > 0
            assert len(measure["limit_seconds"]) == len(measure["seconds"])


def test_bytes_that_workers_send_are_those_counted_by_hand(measured):
    """Rank 0 holds the user's table: it sends a vector of 8 for each of rank 1's 16 rows, and the ids of two features."""
    by_name = {measure["name"]: measure for measure in measured[0]["measures"]}
    assert by_name["output all-to-all"]["work"] == 16 * 8 * 4
    ids, lengths = 16 * 8, 2 * 16 * 4
    assert by_name["input all-to-all"]["work"] >= ids + lengths
    assert by_name["output all-to-all"]["limit_work"] == 2 * 16 * 8 * 4, "what rank 1 sends, which holds two features' table"
    assert by_name["plain all-to-all"]["work"] == 2 * 16 * 8 * 4


def test_steps_are_told_alone_and_together_and_their_stages_are_all_of_them(measured):
    alone, together = measured[0]["steps"]
    assert (alone["workers"], together["workers"]) == (1, 2)
    for steps in (alone, together):
        assert list(steps["stages"]) == list(STEP_STAGES)
        assert steps["global_batch_size"] == 32
        assert steps["steps"] >= 30
        for stage in ("lookup", "dense_forward", "loss", "dense_backward", "table_backward", "dense_update", "count"):
            assert steps["stages"][stage] > 0
        assert sum(steps["wall_seconds"]) > 0
        assert steps["samples_per_second"] > 0
    mean = sum(alone["wall_seconds"]) / len(alone["wall_seconds"])
    assert alone["remainder"] == pytest.approx(1 - sum(alone["stages"].values()) / mean)
    assert abs(alone["remainder"]) < 0.2
    assert any("2 workers agree" in sentence for sentence in together["sentences"])


def test_nothing_is_left(measured):
    assert list((measured[1] / "scratch").iterdir()) == []
