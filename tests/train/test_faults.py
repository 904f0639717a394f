"""Runs that are stopped, killed, or meet damage, as processes of their own through the command line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from embedshard.errors import CheckpointError
from embedshard.train.audit import audit_run
from embedshard.train.checkpoint import Checkpointer, Piece, find_steps, newest_intact, open_step
from embedshard.train.checkpoint_format import seal
from embedshard.train.run_directory import RunDirectory
from tests.commands import run_command, start_command

TIMEOUT_S = 240


def command(*arguments):
    return [sys.executable, "-m", "embedshard.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def config_file(make_config, tmp_path_factory):
    """A run of 140 steps that saves each fifth."""
    changes = {"train": {"epochs": 20, "log_every_steps": 1}, "checkpoint": {"every_steps": 5, "keep": 2}}
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    return path


def wait_for_step(path, step):
    """Waits until a run has logged a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came to step {step}")


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory, saved_tensors):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = run_command("train", config_file, "--run-dir", path)
    assert finished.returncode == 0, finished.stderr
    return saved_tensors(path)


def test_sigterm_saves_says_how_to_resume_and_exits_143(
    config_file, undisturbed, tmp_path, saved_tensors, assert_same_tensors
):
    path = tmp_path / "run"
    process = subprocess.Popen(
        command("train", config_file, "--run-dir", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_step(path / "metrics.jsonl", 13)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert f"embedshard train --resume {path}" in out
    stopped_at = newest_intact(RunDirectory(path).checkpoints).step
    assert f"after step {stopped_at}" in out
    assert f"stopped at step {stopped_at} of 140" in (path / "report.html").read_text(encoding="utf-8")
    resumed = run_command("train", "--resume", path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resumes after step {stopped_at}." in resumed.stdout
    assert_same_tensors(saved_tensors(path), undisturbed)


def test_kill_9_at_any_moment_leaves_a_run_that_resumes_to_the_same_weights(
    config_file, undisturbed, tmp_path, saved_tensors, assert_same_tensors
):
    path = tmp_path / "run"
    generator = random.Random(3)
    arguments = ("train", config_file, "--run-dir", path)
    kills = 0
    while kills < 4:
        if kills:
            process = start_command(*arguments)
        else:  # which has all to import still
            process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            begun = find_steps(RunDirectory(path).checkpoints)[-1] if (path / "checkpoints").exists() else 0
            if kills:  # the first is killed while it starts, the others some steps on
                wait_for_step(path / "metrics.jsonl", min(begun + generator.randint(1, 20), 139))
            else:
                time.sleep(generator.random() * 3)
            time.sleep(generator.random() * 0.05)
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT_S)
        kills += 1
        if (path / "config.yaml").exists():
            arguments = ("train", "--resume", path)
    finished = run_command(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert_same_tensors(saved_tensors(path), undisturbed)
    assert audit_run(RunDirectory.open(path), {}).failures == []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        if line:
            json.loads(line)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def swap(path):
    other = next(p for p in sorted(path.parent.glob("*.safetensors")) if p != path)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def leave_folder(path):
    manifest_path = path.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text().replace(path.name, f"../{path.name}"))
    del manifest["sha256"]
    manifest_path.write_bytes(seal(manifest))


def forget_manifest(path):
    (path.parent / "manifest.json").unlink()


def flip_manifest(path):
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples_seen": ', '"samples_seen": 1'))


def other_format(path):
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, ["is damaged", "SHA-256"]),
        (truncate, ["bytes", "manifest says"]),
        (lambda path: path.unlink(), ["is missing"]),
        (leave_folder, ["plain name within its folder"]),
        (forget_manifest, ["no manifest", "did not finish"]),
        (flip_manifest, ["manifest.json", "is damaged"]),
        (other_format, ["format 99"]),
    ],
    ids=["flipped bit", "truncated", "missing", "leaves its folder", "no manifest", "flipped manifest", "format"],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_newest_intact_one_offered(make_config, tmp_path, damage, words):
    path = saved(make_config, tmp_path)
    newest = path / "checkpoints" / "step-00000014"
    damage(next(iter(sorted(newest.glob("*.safetensors")))))
    with pytest.raises(CheckpointError) as caught:
        open_step(RunDirectory(path).checkpoints, 14).verify()
    message = str(caught.value)
    assert "step-00000014" in message
    for word in words:
        assert word in message, message
    if damage is not other_format:
        assert "step-00000007" in message, message
    told = []
    assert newest_intact(RunDirectory(path).checkpoints, told.append).step == 7
    if damage is not forget_manifest:
        assert len(told) == 1
    refused = run_command("evaluate", path, "--checkpoint", "14")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "step-00000014" in refused.stderr


def test_two_swapped_files_are_refused(tmp_path):
    root = RunDirectory(tmp_path).checkpoints
    tensors = {"a": torch.arange(64.0), "b": torch.arange(64.0) + 1}
    with Checkpointer(root, 0, 1, "0001", max_file_bytes=640) as checkpointer:
        checkpointer.save(1, lambda: [Piece(name, tensor, (0,), (64,)) for name, tensor in tensors.items()], {}, 3, set())
    files = sorted((tmp_path / "checkpoints" / "step-00000001").glob("*.safetensors"))
    assert len(files) == 2, "small files, so that there are two to swap"
    open_step(root, 1).verify()
    swap(files[0])
    with pytest.raises(CheckpointError, match=r"r00000-00000.safetensors is damaged"):
        open_step(root, 1).verify()


def saved(make_config, tmp_path):
    """A finished run with the checkpoints of steps 7 and 14."""
    from embedshard.train.loop import train
    from embedshard.train.tracking import Reporter
    from embedshard.world import open_world

    loaded = make_config()
    run_directory = RunDirectory.create(tmp_path / "run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, run_directory, Reporter())
    assert find_steps(run_directory.checkpoints) == [7, 14]
    return tmp_path / "run"


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_checkpoints(make_config, tmp_path):
    path = saved(make_config, tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(small)], check=False).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        shutil.copytree(path / "checkpoints" / "step-00000007", small / "checkpoints" / "step-00000007")
        root = RunDirectory(small).checkpoints
        tensor = torch.zeros(100_000)
        with (
            pytest.raises(CheckpointError, match=r"step-00000009 cannot be saved: the disk is full"),
            Checkpointer(root, 0, 1, "0001", mode="background") as checkpointer,
        ):
            checkpointer.save(9, lambda: [Piece("x", tensor, (0,), (100_000,))], {}, keep=3, protect=set())
        assert newest_intact(root).step == 7
        assert not list((small / "checkpoints" / "step-00000009").glob("*.safetensors"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
