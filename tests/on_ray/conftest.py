"""What the tests of Ray share: an environment, a training as a process, and looking at the run that it leaves."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

TIMEOUT_S = 600


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of every process here. Ray leaves a token in the home folder, so this is another one."""
    return {
        **os.environ,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_worker_niceness": "0",  # else workers starve beside whatever else this machine does
    }


@pytest.fixture
def free_port():
    """A port that nobody listens at, below those that the system hands out: of those Ray's own processes take many."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("a hundred ports were tried, and none of them is free")


class Training:
    """`embedshard train` as a process, and its run's folder."""

    def __init__(self, path, environment, arguments, descendants):
        self.path, self._descendants = path, descendants
        command = [sys.executable, "-m", "embedshard.cli", "train", *map(str, arguments)]
        self._output = (path.parent / f"{path.name}-output.txt").open("w+")
        self.process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT, text=True, env=environment)

    @property
    def output(self):
        return Path(self._output.name).read_text()

    def wait(self):
        """Waits for its end; returns what it printed."""
        self.process.wait(timeout=TIMEOUT_S)
        return self.output

    def wait_for_step(self, step):
        """Waits until the run has logged a step."""
        log, deadline = self.path / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines()):
                return
            assert self.process.poll() is None, self.output
            time.sleep(0.02)
        raise AssertionError(f"{self.path} never came to step {step}: {self.output}")

    def attempts(self):
        return [json.loads(line) for line in (self.path / "attempts.jsonl").read_text().splitlines()]

    def result(self):
        return json.loads((self.path / "result.json").read_text())

    def ray_workers(self):
        """The processes of its own cluster that train."""
        return [
            pid
            for pid in self._descendants(self.process.pid)
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def end(self):
        """Ends it and what it started."""
        if self.process.poll() is None:
            for pid in [*self._descendants(self.process.pid), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait(timeout=60)
        self._output.close()


@pytest.fixture
def train(environment, tmp_path, descendants):
    """A function that starts a training; what is left of it is ended after the test."""
    started = []

    def train(name, *arguments, **more):
        started.append(Training(tmp_path / name, {**environment, **more}, arguments, descendants))
        return started[-1]

    yield train
    for training in started:
        training.end()


CHANGES = {
    "train": {"epochs": 20, "log_every_steps": 1},
    "checkpoint": {"every_steps": 10, "keep": 3},
    "evaluate": {"every_steps": 140},
}


@pytest.fixture(scope="module")
def config_file(make_config, tmp_path_factory):
    """A run of 140 steps that saves each tenth."""
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(CHANGES).tree))
    return path


@pytest.fixture
def slow_model(own_code):
    """Environment variables under which each step takes a tenth of a second more, so that slow events fall into a run."""
    return own_code(
        """
        def change(module):
            import time

            forward = module.TwoTower.forward

            def slowly(self, *given):
                time.sleep(0.1)
                return forward(self, *given)

            module.TwoTower.forward = slowly
        """,
        when_imported="embedshard.models.two_tower",
    )
