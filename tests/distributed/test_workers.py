"""`--workers N` and torchrun, as a user starts them: they end well, stop together, and a fault in one ends all."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory
from embedshard.world import TIMEOUT
from tests.commands import run_command, run_ranks, start_command

pytestmark = pytest.mark.timeout(900)
TIMEOUT_S = 240
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def torchrun(*arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "embedshard.cli"]
    return [sys.executable, *launcher, *map(str, arguments)]


def start(arguments):
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def config_file(make_config, tmp_path_factory):
    """A run of 140 steps that saves each tenth."""
    changes = {
        "train": {"epochs": 20, "log_every_steps": 1},
        "checkpoint": {"every_steps": 10, "keep": 2},
        "evaluate": {"every_steps": 140},
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    return path


@pytest.fixture(scope="module")
def undisturbed_run(config_file, tmp_path_factory):
    """Its folder: not to be changed."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command("train", config_file, "--run-dir", path, "--workers", 2)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run, saved_tensors):
    return saved_tensors(undisturbed_run)


def wait_for_step(path, step):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came to step {step}")


def is_worker(pid):
    return (
        b"embedshard.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    )


def assert_on_their_own_cores(pids):
    """All threads of a worker run where it does, and no other worker does."""
    usable = os.sched_getaffinity(0)
    if len(usable) < len(pids):
        return
    parts = []
    for pid in pids:
        found = set()
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # of a thread that has ended meanwhile
                found.add(frozenset(os.sched_getaffinity(int(thread.name))))
        assert len(found) == 1
        parts += found
    assert frozenset().union(*parts) == usable
    assert sum(map(len, parts)) == len(usable)


def wait_until_gone(pids):
    deadline = time.monotonic() + TIMEOUT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"some of {pids} were still there after {TIMEOUT_S} s")
        time.sleep(0.05)


def test_two_workers_leave_one_run(undisturbed_run):
    result = json.loads((undisturbed_run / "result.json").read_text())
    assert result["workers"] == 2
    assert result["steps"] == 140
    assert sorted(path.name for path in (undisturbed_run / "ledger").iterdir()) == [
        "0001-00000.jsonl",
        "0001-00001.jsonl",
    ]
    assert len((undisturbed_run / "attempts.jsonl").read_text().splitlines()) == 1


def workers(*arguments):
    return [sys.executable, "-m", "embedshard.cli", *map(str, arguments), "--workers", "2"]


@pytest.mark.parametrize("launched", [workers, torchrun])
def test_sigterm_stops_all_workers_at_one_step_and_the_run_goes_on(
    launched, config_file, undisturbed, tmp_path, saved_tensors, assert_same_tensors, descendants
):
    path = tmp_path / "run"
    process = start(launched("train", config_file, "--run-dir", path))
    try:
        wait_for_step(path / "metrics.jsonl", 23)
        ranks = [pid for pid in descendants(process.pid) if is_worker(pid)]
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    wait_until_gone(ranks)
    assert f"embedshard train --resume {path}" in out, err
    if launched is not torchrun:
        assert process.returncode == 143, err
    stopped_at = newest_intact(RunDirectory(path).checkpoints).step
    assert 23 <= stopped_at < 140
    last = [json.loads(part.read_text().splitlines()[-1])["last_step"] for part in (path / "ledger").iterdir()]
    assert last == [stopped_at - 1] * 2, "both ranks trained up to the same step"
    if launched is torchrun:
        resumed = start(launched("train", "--resume", path))
        try:
            _, err = resumed.communicate(timeout=TIMEOUT_S)
        finally:
            resumed.kill()
    else:  # that fresh processes start well was seen above
        resumed = run_command("train", "--resume", path, "--workers", 2)
        err = resumed.stderr
    assert resumed.returncode == 0, err
    assert_same_tensors(saved_tensors(path), undisturbed)


def test_a_killed_worker_ends_the_run_and_it_resumes_to_the_same_weights(
    config_file, undisturbed, tmp_path, saved_tensors, assert_same_tensors, descendants
):
    path = tmp_path / "run"
    process = start_command("train", config_file, "--run-dir", path, "--workers", 2, EMBEDSHARD_BIND_CORES="1")
    try:
        wait_for_step(path / "metrics.jsonl", 33)
        workers = descendants(process.pid)
        assert len(workers) == 2
        assert_on_their_own_cores(workers)
        os.kill(workers[1], signal.SIGKILL)
        assert TIMEOUT.total_seconds() > TIMEOUT_S, "so an end within it is not that of a collective that ran out"
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "was ended by SIGKILL" in err
    assert f"embedshard train --resume {path} --workers 2" in err
    assert "Traceback" not in err
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "the launcher waits for what it ends"
    assert "Resumes after step" in run_ranks(2, "train", "--run-dir", path, "--auto-resume")
    assert_same_tensors(saved_tensors(path), undisturbed)


def test_workers_whose_launcher_is_killed_save_and_stop(config_file, tmp_path, descendants):
    path = tmp_path / "run"
    process = start_command("train", config_file, "--run-dir", path, "--workers", 2)
    try:
        wait_for_step(path / "metrics.jsonl", 12)
        workers = descendants(process.pid)
        assert len(workers) == 2
    finally:
        process.kill()
    wait_until_gone(workers)
    last = [json.loads(part.read_text().splitlines()[-1])["last_step"] for part in (path / "ledger").iterdir()]
    assert last == [newest_intact(RunDirectory(path).checkpoints).step - 1] * 2


def test_an_exception_in_one_worker_ends_all_with_that_error(make_config, tmp_path, fault_on_one_rank):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config({"train": {"epochs": 20}}).tree))
    done = run_command("train", path, "--run-dir", tmp_path / "run", "--workers", 2, **fault_on_one_rank)
    assert done.returncode == 1
    assert "Error: worker 1: Traceback" in done.stderr
    assert "this worker alone met a fault" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr


def test_a_mistake_is_told_once(make_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config().tree))
    done = run_command("train", path, "--run-dir", tmp_path / "run", "--workers", 2, "--set", "data.lanes=1")
    assert done.returncode == 2
    assert done.stderr.count("2 workers cannot share data.lanes=1 lanes evenly") == 1, done.stderr
    done = run_command("train", path, "--workers", 2, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "Leave --workers out" in done.stderr
    for workers in ("0", "many", "4:2"):
        done = run_command("train", path, "--workers", workers)
        assert done.returncode == 2
        assert f"--workers {workers}: give a number" in done.stderr
