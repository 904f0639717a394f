"""What a run on Ray tells Prometheus, scraped where Prometheus would; and a run there whose folder is in a bucket."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
import uuid

import pytest
import yaml

from embedshard.train.audit import audit_run
from embedshard.train.run_directory import RunDirectory
from tests.manifests.test_monitoring import EXPORTED

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(1200)

TIMEOUT_S = 600


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def cluster(environment, tmp_path):
    """A cluster whose node exports its metrics; returns its address and their port. Ended with its processes."""
    port, metrics = free_port(), free_port()
    head = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
            f"--port={port}", f"--metrics-export-port={metrics}", f"--temp-dir=/tmp/ray-{uuid.uuid4().hex[:8]}",
        ],
        env=environment, stdout=(tmp_path / "ray.txt").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    yield f"127.0.0.1:{port}", metrics
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(timeout=60)
    finally:
        if head.poll() is None:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(timeout=60)


def scraped(port):
    """The names of our metrics that the node exports, with their samples."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            text = page.read().decode()
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(ray_embedshard_\w+)(\{.*\})? (\S+)", line)
        if match:
            found.setdefault(match[1], []).append((match[2] or "", float(match[3])))
    return found


@pytest.mark.slow
def test_prometheus_finds_the_metrics_of_a_run(cluster, make_config, tmp_path, train, slow_model):
    address, port = cluster
    changes = {
        "train": {"epochs": 200, "log_every_steps": 1},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "evaluate": {"every_steps": 1000},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    arguments = (path, "--run-dir", tmp_path / "run", "--workers", 2, "--ray", "--ray-address", address)
    training = train("run", *arguments, **slow_model)
    wanted = {f"ray_{name}" for name in EXPORTED} - {"ray_embedshard_restarts_total", "ray_embedshard_bad_rows_total"}
    deadline = time.monotonic() + TIMEOUT_S
    while not wanted <= {*(found := scraped(port))}:
        assert training.process.poll() is None, training.output
        assert time.monotonic() < deadline, f"only {sorted(found)} of {sorted(wanted)}"
        time.sleep(0.5)
    stages = {re.search('stage="([a-z]+)"', labels)[1] for labels, _ in found["ray_embedshard_step_seconds"]}
    assert stages == {"data", "step", "evaluate", "checkpoint"}
    assert all(value > 0 for _, value in found["ray_embedshard_bytes_read_total"])
    assert {*found} <= {f"ray_{name}" for name in EXPORTED}


@pytest.mark.slow
def test_ray_workers_share_a_run_in_a_bucket(config_file, tmp_path, train, saved_tensors, assert_same_tensors, s3):
    bucket, environment = s3
    uri = f"{bucket}/runs/a"
    training = train("run", config_file, "--run-dir", uri, "--workers", 2, "--ray", **environment)
    output = training.wait()
    assert training.process.returncode == 0, output
    assert f"Result: {uri}/result.json" in output
    undisturbed = train("undisturbed", config_file, "--run-dir", tmp_path / "undisturbed", "--workers", 2)
    assert undisturbed.wait(), undisturbed.output
    assert_same_tensors(saved_tensors(uri), saved_tensors(tmp_path / "undisturbed"))
    assert audit_run(RunDirectory.open(uri), {}).failures == []
    assert json.loads(RunDirectory(uri).folder.join("result.json").read_text())["workers"] == 2
