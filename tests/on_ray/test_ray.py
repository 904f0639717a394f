"""`--launcher ray` on real Ray clusters: the same run as without Ray, through deaths of workers, nodes and the driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(900)

TIMEOUT_S = 600
SHORT = {"epochs": 20, "log_every_steps": 1}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of every process here. Ray leaves a token in the home folder, so this is another one."""
    return {
        **os.environ,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


def command(*arguments):
    return [sys.executable, "-m", "embedshard.cli", "train", *map(str, arguments)]


@pytest.fixture
def run(environment):
    def run(*arguments):
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )

    return run


@pytest.fixture
def start(environment):
    """Starts a training; ends what is left of it, and of its cluster, after the test."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [*descendants(process.pid), process.pid]:
            if Path(f"/proc/{pid}").exists() and process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.fixture
def config_file(make_config, tmp_path):
    """A run of 140 steps, long enough to be met by a fault, that saves each tenth."""
    changes = {"train": SHORT, "checkpoint": {"every_steps": 10, "keep": 3}, "evaluate": {"every_steps": 140}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    return path


@pytest.fixture
def slow_config_file(make_config, tmp_path):
    """The same run, whose model takes a twentieth of a second a step, so that slower events fall into it."""
    (tmp_path / "slow_models.py").write_text(
        "import time\n"
        "from embedshard.models.two_tower import TwoTower\n"
        "forward = TwoTower.forward\n"
        "def slowly(self, *given):\n"
        "    time.sleep(0.05)\n"
        "    return forward(self, *given)\n"
        "TwoTower.forward = slowly\n"
    )
    changes = {"train": SHORT, "checkpoint": {"every_steps": 10, "keep": 3}, "evaluate": {"every_steps": 140}}
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    return path


@pytest.fixture
def undisturbed(config_file, tmp_path, run, saved_tensors):
    """The tensors at the end of the same run without Ray, in a world of two."""
    done = run(config_file, "--run-dir", tmp_path / "undisturbed", "--workers", 2)
    assert done.returncode == 0, done.stderr
    return saved_tensors(tmp_path / "undisturbed")


def wait_for_step(path, step, process):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"{path} never came to step {step}")


def descendants(pid):
    found, todo = [], [pid]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            mine = [int(number) for number in task.read_text().split()]
            found += mine
            todo += mine
    return found


def ray_workers(pid):
    return [child for child in descendants(pid) if b"RayTrainWorker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def attempts_of(path):
    return [json.loads(line) for line in (path / "attempts.jsonl").read_text().splitlines()]


def test_ray_workers_train_what_local_ones_do(config_file, undisturbed, tmp_path, run, saved_tensors, assert_same_tensors):
    path = tmp_path / "run"
    done = run(config_file, "--run-dir", path, "--workers", 2, "--ray")
    assert done.returncode == 0, done.stderr
    assert "Starts 2 workers on a Ray cluster" in done.stdout
    assert "step 140/140" in done.stdout
    assert f"Result: {path / 'result.json'}" in done.stdout
    assert_same_tensors(saved_tensors(path), undisturbed)
    theirs, ours = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("undisturbed", "run"))
    for key in ("metrics", "baselines", "slices", "ids", "bad_rows", "steps", "workers"):
        assert theirs[key] == ours[key], key


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    config_file, undisturbed, tmp_path, start, saved_tensors, assert_same_tensors
):
    path = tmp_path / "run"
    process = start(config_file, "--run-dir", path, "--workers", 2, "--ray")
    wait_for_step(path / "metrics.jsonl", 33, process)
    os.kill(ray_workers(process.pid)[-1], signal.SIGKILL)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, out
    assert "Resumes after step" in out
    assert len(attempts_of(path)) == 2
    assert_same_tensors(saved_tensors(path), undisturbed)


def test_an_exception_ends_the_run_with_that_error_and_is_not_tried_again(make_config, tmp_path, run):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "faulty_models.py").write_text(
        "import torch.distributed as dist\n"
        "from embedshard.models.two_tower import TwoTower\n"
        "class Faulty(TwoTower):\n"
        "    calls = 0\n"
        "    def forward(self, *given):\n"
        "        self.calls += 1\n"
        "        if self.calls == 10 and dist.get_rank() == 1:\n"
        "            raise KeyError('this worker alone met a fault')\n"
        "        return super().forward(*given)\n"
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config({"train": SHORT}).tree))
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'embedshard.models.registry':\n"
        "            import embedshard.models.two_tower as module, faulty_models\n"
        "            module.TwoTower = faulty_models.Faulty\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    os.environ["PYTHONPATH"] = str(folder)
    try:
        done = subprocess.run(
            command(path, "--run-dir", tmp_path / "run", "--workers", 2, "--ray"),
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
    finally:
        del os.environ["PYTHONPATH"]
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Error: TrainingError: worker 1: Traceback" in done.stderr
    assert "this worker alone met a fault" in done.stderr
    assert len(attempts_of(tmp_path / "run")) == 1
    assert newest_intact(RunDirectory(tmp_path / "run").checkpoints).step == 7


def test_sigterm_of_the_driver_saves_and_the_run_goes_on_without_ray(
    config_file, undisturbed, tmp_path, start, run, saved_tensors, assert_same_tensors
):
    path = tmp_path / "run"
    process = start(config_file, "--run-dir", path, "--workers", 2, "--ray")
    wait_for_step(path / "metrics.jsonl", 13, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143, out
    assert f"embedshard train --resume {path}" in out
    assert newest_intact(RunDirectory(path).checkpoints).step < 140
    resumed = run("--resume", path, "--workers", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_tensors(saved_tensors(path), undisturbed)
