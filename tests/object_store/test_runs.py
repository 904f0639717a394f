"""Runs whose folder is in an object store: they are the runs that a disk would have, through kills and take-overs."""

import json
import signal
import time

import pytest
import yaml
from pyarrow import fs

from embedshard.errors import CheckpointError
from embedshard.storage import locate
from embedshard.train.audit import audit_run
from embedshard.train.checkpoint import find_steps, newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import JsonLinesReporter
from embedshard.world import open_world
from tests.commands import ranks_started, run_command, run_ranks, start_command

pytestmark = pytest.mark.timeout(3000)

TIMEOUT_S = 900
CHANGES = {
    "train": {"epochs": 8, "log_every_steps": 1},
    "checkpoint": {"every_steps": 8, "keep": 2},
    "evaluate": {"every_steps": 28},
}
OF_TIME = ("wall_seconds", "seconds", "samples_per_second", "peak_memory_bytes")


@pytest.fixture
def config_file(make_config, tmp_path):
    """A run of 56 steps that saves each eighth."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config({**CHANGES, "tracking": {"tensorboard": True}}).tree))
    return path


def files_of(folder):
    """The paths of the files below a folder, those of checkpoints and the names of event files left out."""
    selector = fs.FileSelector(folder.path, recursive=True)
    found = [info.path for info in folder.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    relative = [path.removeprefix(folder.path).strip("/") for path in found]
    return sorted(path.partition("events")[0] for path in relative if not path.startswith("checkpoints/"))


def lines_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in folder.join(name).read_text().splitlines()]


def untimed(lines):
    of_time = ("second", "bytes", "waterfall", "beside")
    return [
        {name: value for name, value in line.items() if name != "time" and not any(word in name for word in of_time)}
        for line in lines
    ]


def wait_for_checkpoint(uri, step, process):
    checkpoints = RunDirectory(uri).checkpoints
    deadline = time.monotonic() + TIMEOUT_S
    while not any(found >= step for found in find_steps(checkpoints)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{uri} never came to step {step}"
        time.sleep(0.02)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(config_file, bucket, tmp_path, saved_tensors, assert_same_tensors):
    disk, uri = tmp_path / "run", f"{bucket}/runs/a"
    for place in (disk, uri):
        done = run_command("train", config_file, "--run-dir", place)
        assert done.returncode == 0, done.stderr
        assert f"Run: {place}\n" in done.stdout
        assert f"Result: {place}/result.json\n" in done.stdout
        assert f"Report: {place}/report.html\n" in done.stdout
    assert_same_tensors(saved_tensors(uri), saved_tensors(disk))
    there, here = locate(uri), locate(disk)
    assert files_of(there) == files_of(here)
    assert {"attempts.jsonl", "config.yaml", "inventory.json", "ledger/0001-00000.jsonl", "tensorboard/"} <= {
        *files_of(there)
    }
    assert untimed(lines_of(there)) == untimed(lines_of(here))
    assert there.join("ledger", "0001-00000.jsonl").read_bytes() == here.join("ledger", "0001-00000.jsonl").read_bytes()
    results = [json.loads(folder.join("result.json").read_text()) for folder in (there, here)]
    for name in {*results[0], *results[1]} - {*OF_TIME}:
        assert results[0][name] == results[1][name], name

    measured = [json.loads(run_command("evaluate", place, "--json").stdout) for place in (uri, disk)]
    assert measured[0] == measured[1]
    audited = run_command("audit", uri)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert "Proved: each row was trained exactly once an epoch, in all 56 steps." in audited.stdout
    there.join("report.html").delete_file()
    reported = run_command("report", uri)
    assert reported.stdout == f"Report: {uri}/report.html\n", reported.stderr
    assert "finished" in there.join("report.html").read_text()
    compared = run_command("report", uri, disk, "--out", f"{bucket}/both.html")
    assert compared.stdout == f"Comparison: {bucket}/both.html\n", compared.stderr
    refused = run_command("train", config_file, "--run-dir", uri)
    assert refused.returncode == 2
    assert f"{uri} holds a run already" in refused.stderr


def test_kill_9_leaves_a_run_in_a_bucket_that_resumes_to_the_same_weights(
    config_file, bucket, tmp_path, saved_tensors, assert_same_tensors
):
    uri = f"{bucket}/runs/a"
    arguments = ("train", config_file, "--run-dir", uri)
    for step in (8, 16, 32):
        process = start_command(*arguments)
        try:
            wait_for_checkpoint(uri, step, process)
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT_S)
        arguments = ("train", "--resume", uri)
    before = lines_of(locate(uri))
    finished = run_command(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert "Resumes after step" in finished.stdout
    undisturbed = run_command("train", config_file, "--run-dir", tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_tensors(saved_tensors(uri), saved_tensors(tmp_path / "undisturbed"))
    assert len(lines_of(locate(uri), "attempts.jsonl")) == 4
    assert lines_of(locate(uri))[: len(before)] == before, "no attempt takes away what another wrote"
    audit = audit_run(RunDirectory.open(uri), {})
    assert audit.failures == []
    assert audit.is_finished


def test_two_workers_share_a_run_in_a_bucket(config_file, bucket, tmp_path, saved_tensors, assert_same_tensors):
    uri = f"{bucket}/runs/a"
    arguments = ("train", config_file, "--run-dir", uri, "--auto-resume")
    with ranks_started(2, *arguments) as ranks:
        wait_for_checkpoint(uri, 8, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)  # one alone, and all stop
        (out, _), (_, err) = (rank.communicate(timeout=TIMEOUT_S) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [143, 143], err
    assert f"embedshard train --resume {uri}" in out
    run_ranks(2, *arguments)
    run_ranks(2, "train", config_file, "--run-dir", tmp_path / "undisturbed")
    assert_same_tensors(saved_tensors(uri), saved_tensors(tmp_path / "undisturbed"))
    ledgers = [f"ledger/000{attempt}-0000{rank}.jsonl" for attempt in (1, 2) for rank in (0, 1)]
    assert [name for name in files_of(locate(uri)) if name.startswith("ledger/")] == ledgers
    assert audit_run(RunDirectory.open(uri), {}).failures == []


class TakenOver(JsonLinesReporter):
    """Sees, after a step, another start take the run over, which writes a metric of its own."""

    def __init__(self, run, after):
        super().__init__(run.folder.join("metrics.jsonl"), 1)
        self._run, self._after = run, after

    def measured(self, step, values):
        super().measured(step, values)
        if step == self._after and "train/loss" in values:
            self._run.begin_attempt(1, None)
            other = JsonLinesReporter(self._run.folder.join("metrics.jsonl"), 2)
            other.measured(1, {"train/loss": 0.5})
            other.finished()


@pytest.mark.parametrize("kind", ["bucket", "disk"])
def test_an_attempt_that_was_replaced_stops_and_writes_no_more(make_config, bucket, tmp_path, kind):
    folder = locate(f"{bucket}/runs/a" if kind == "bucket" else tmp_path / "run")
    loaded = make_config({**CHANGES, "data": {"on_bad_row": "quarantine", "max_bad_fraction": 0.5}})
    directory = RunDirectory.create(folder, loaded)
    reporter = TakenOver(directory, after=13)
    with open_world("cpu") as world, pytest.raises(CheckpointError, match="taken over by another start"):
        train(loaded.config, world, directory, reporter)
    reporter.finished()
    assert newest_intact(directory.checkpoints).step == 8
    # A disk takes each line at once, and an epoch ends at step 14.
    last = [line["last_step"] for line in lines_of(folder, "ledger/0001-00000.jsonl")][-1]
    assert last == (7 if kind == "bucket" else 13)
    assert not folder.join("result.json").exists()
    written = [(line["attempt"], line["step"]) for line in lines_of(folder)]
    assert (2, 1) in written, "its successor's line is there"
    assert (1, 8) in written


def test_a_bucket_that_is_missing_and_a_server_that_does_not_answer_are_told(config_file, bucket):
    missing = run_command("train", config_file, "--run-dir", f"{bucket}-missing/runs/a")
    unreachable = run_command("train", config_file, "--run-dir", f"{bucket}/runs/a", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    for done, uri in ((missing, f"{bucket}-missing/runs/a"), (unreachable, f"{bucket}/runs/a")):
        assert done.returncode == 2, done.stderr
        assert f"{uri} cannot be read or written" in done.stderr
        assert "AWS_ENDPOINT_URL" in done.stderr
        assert "Traceback" not in done.stderr
    for arguments in (("train", "--resume"), ("evaluate",), ("audit",), ("report",)):
        done = run_command(*arguments, f"{bucket}/runs/none")
        assert done.returncode == 2, done.stderr
        assert f"{bucket}/runs/none is not there" in done.stderr
    done = run_command("audit", f"{bucket}/runs/a", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ray_workers_share_a_run_in_a_bucket(config_file, bucket, tmp_path, saved_tensors, assert_same_tensors):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
    uri = f"{bucket}/runs/a"
    done = run_command(
        "train", config_file, "--run-dir", uri, "--workers", 2, "--ray", HOME=str(tmp_path), RAY_worker_niceness="0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Result: {uri}/result.json" in done.stdout
    run_ranks(2, "train", config_file, "--run-dir", tmp_path / "undisturbed")
    assert_same_tensors(saved_tensors(uri), saved_tensors(tmp_path / "undisturbed"))
    assert audit_run(RunDirectory.open(uri), {}).failures == []
    assert json.loads(locate(uri).join("result.json").read_text())["workers"] == 2
