"""`--launcher ray` on a cluster of its own: the same run as without Ray, through deaths, faults and signals."""

import json
import os
import signal

import pytest

from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory
from tests.commands import run_command, run_ranks

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory, environment, saved_tensors):
    """The same run without Ray, in a world of two: its result, and its last tensors."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, "train", config_file, "--run-dir", path, env=environment)
    return json.loads((path / "result.json").read_text()), saved_tensors(path)


def test_a_killed_worker_is_replaced_and_the_run_is_as_one_without_ray(
    config_file, undisturbed, tmp_path, train, saved_tensors, assert_same_tensors
):
    training = train("run", config_file, "--run-dir", tmp_path / "run", "--workers", 2, "--ray")
    training.wait_for_step(33)
    os.kill(training.ray_workers()[-1], signal.SIGKILL)
    output = training.wait()
    assert training.process.returncode == 0, output
    for words in ("Starts 2 workers on a Ray cluster", "Resumes after step", "step 140/140", "Result: "):
        assert words in output
    assert len(training.attempts()) == 2
    theirs, tensors = undisturbed
    assert_same_tensors(saved_tensors(training.path), tensors)
    ours = training.result()
    for key in ("metrics", "baselines", "slices", "ids", "bad_rows", "steps", "workers"):
        assert theirs[key] == ours[key], key


def test_sigterm_of_the_driver_saves_and_the_run_goes_on_without_ray(
    config_file, undisturbed, tmp_path, train, saved_tensors, assert_same_tensors, slow_model, environment
):
    path = tmp_path / "run"
    training = train("run", config_file, "--run-dir", path, "--workers", 2, "--ray", **slow_model)
    training.wait_for_step(13)
    training.process.send_signal(signal.SIGTERM)
    output = training.wait()
    assert training.process.returncode == 143, output
    assert f"embedshard train --resume {path}" in output
    assert newest_intact(RunDirectory(path).checkpoints).step < 140
    resumed = run_command("train", "--resume", path, "--workers", 2, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_tensors(saved_tensors(path), undisturbed[1])


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_the_run_resumes(
    config_file, undisturbed, tmp_path, train, saved_tensors, assert_same_tensors, slow_model
):
    path = tmp_path / "run"
    training = train("run", config_file, "--run-dir", path, "--workers", 2, "--ray", **slow_model)
    training.wait_for_step(25)
    training.process.kill()
    training.wait()
    resumed = train("resumed", "--resume", path, "--workers", 2, "--ray")
    output = resumed.wait()
    assert resumed.process.returncode == 0, output
    assert_same_tensors(saved_tensors(path), undisturbed[1])
