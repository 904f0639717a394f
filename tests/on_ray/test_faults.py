"""`--launcher ray`: deaths in the midst of saving, disks that fill up, faults on one rank alone, starts of what is done."""

import json
import os
import subprocess

import pytest
import yaml

from embedshard.train.checkpoint import find_steps, newest_intact, open_step
from embedshard.train.run_directory import RunDirectory

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

KILLS = 20

DIES_WHILE_SAVING = """
import os, random, signal, sys

folder = {folder!r}

if any("default_worker.py" in argument for argument in sys.argv):
    begun = []

    def passes(place, path):
        if "/checkpoints/" not in os.path.abspath(path):
            return
        if not begun:
            import torch.distributed as dist
            deaths = sorted(os.listdir(folder))
            draw = random.Random(len(deaths))
            begun.append((len(deaths), draw.randrange(2) == dist.get_rank(), draw.randint(1, {most})))
            counted.append(0)
        counted[0] += 1
        number, is_mine, moment = begun[0]
        if number < {kills} and is_mine and counted[0] == moment:
            with open(os.path.join(folder, f"{{number:02d}}"), "w") as file:
                file.write(f"{{place}} {{path}}")
            os.kill(os.getpid(), signal.SIGKILL)

    counted = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(file):
        path = os.readlink(f"/proc/self/fd/{{file}}")
        passes("before the bytes are on the disk", path)
        fsync(file)
        passes("after the bytes are on the disk", path)

    def watched_replace(source, target):
        passes("before the rename", target)
        replace(source, target)
        passes("after the rename", target)

    os.fsync, os.replace = watched_fsync, watched_replace
"""


def test_kill_9_at_twenty_moments_of_saving_always_leaves_an_earlier_checkpoint(
    config_file, tmp_path, train, own_code, saved_tensors, assert_same_tensors
):
    undisturbed = train("undisturbed", config_file, "--run-dir", tmp_path / "undisturbed", "--workers", 2)
    assert undisturbed.wait() is not None
    assert undisturbed.process.returncode == 0, undisturbed.output
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    code = own_code(DIES_WHILE_SAVING.format(folder=str(deaths), kills=KILLS, most=24))
    training = train(
        "run", config_file, "--run-dir", tmp_path / "run", "--workers", 2, "--ray", "--max-failures", 2 * KILLS,
        "--set", "checkpoint.every_steps=5", **code,
    )  # fmt: skip
    training.process.wait(timeout=1500)
    output = training.output
    assert training.process.returncode == 0, output
    assert len(list(deaths.iterdir())) == KILLS, "each kind of moment is met"
    attempts = training.attempts()
    assert len(attempts) == KILLS + 1
    begun_at = [0 if attempt["resumed_from"] is None else attempt["resumed_from"]["step"] for attempt in attempts]
    assert begun_at == sorted(begun_at), "no start loses what a former one had committed"
    assert_same_tensors(saved_tensors(training.path), saved_tensors(undisturbed.path))
    assert audit(training.path, training).returncode == 0


def audit(path, training):
    return subprocess.run(
        [*training.process.args[:3], "audit", str(path)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_disk_that_fills_up_ends_the_run_with_what_to_do_and_earlier_checkpoints_stay(make_config, tmp_path, train):
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)], check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        config = tmp_path / "config.yaml"
        changes = {
            "train": {"epochs": 20},
            "checkpoint": {"every_steps": 10, "keep": 20},
            "tables": {"item": {"rows": 8000}},
        }
        config.write_text(yaml.safe_dump(make_config(changes).tree))
        training = train("run", config, "--run-dir", path / "run", "--workers", 2, "--ray")
        output = training.wait()
        assert training.process.returncode == 2, output
        assert "cannot be saved: the disk is full" in " ".join(output.split()), output
        assert "Traceback" not in output
        run = RunDirectory(path / "run")
        steps = find_steps(run.checkpoints)
        assert steps, "some fitted"
        for step in steps:
            open_step(run.checkpoints, step).verify()
        assert len((path / "run" / "attempts.jsonl").read_text().splitlines()) == 1, "a full disk is not tried again"
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_an_exception_on_one_rank_ends_the_run_with_that_error_and_is_not_tried_again(
    config_file, tmp_path, train, fault_on_one_rank
):
    training = train("run", config_file, "--run-dir", tmp_path / "run", "--workers", 2, "--ray", **fault_on_one_rank)
    output = training.wait()
    assert training.process.returncode == 1, output
    assert "Error: TrainingError: worker 1: Traceback" in output
    assert "this worker alone met a fault" in output
    assert len(training.attempts()) == 1


def test_a_finished_run_that_is_started_again_ends_cleanly(config_file, tmp_path, train):
    path = tmp_path / "run"
    first = train("run", config_file, "--run-dir", path, "--workers", 2, "--ray", "--set", "train.epochs=2")
    assert first.wait() is not None
    assert first.process.returncode == 0, first.output
    before = json.loads((path / "result.json").read_text())
    again = train(
        "again", config_file, "--run-dir", path, "--auto-resume", "--workers", 2, "--ray", "--set", "train.epochs=2"
    )
    output = again.wait()
    assert again.process.returncode == 0, output
    assert "Resumes after step 14." in output
    after = json.loads((path / "result.json").read_text())
    for key in ("metrics", "steps", "samples_seen", "selected_step"):
        assert after[key] == before[key], key
    assert newest_intact(RunDirectory(path).checkpoints).step == 14
