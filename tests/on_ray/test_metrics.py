"""What a run on Ray tells Prometheus, scraped where Prometheus would."""

import re
import time
import urllib.request

import pytest
import yaml

from tests.manifests.test_monitoring import EXPORTED

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]

TIMEOUT_S = 600
EVENTS = {"embedshard_restarts_total", "embedshard_bad_rows_total"}
"""What is exported only once there is one."""


@pytest.fixture
def cluster(monkeypatch, environment, free_port):
    """A node of two CPUs; returns its address and the port where it exports its metrics."""
    from ray.cluster_utils import Cluster

    for name in ("HOME", "RAY_worker_niceness"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "metrics_export_port": free_port})
    yield made.address, free_port
    made.shutdown()


def scraped(port):
    """Returns the samples (labels, value) of each of our metrics that the node exports now."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            text = page.read().decode()
    except OSError:
        return {}
    found = {}
    for name, labels, value in re.findall(r"^(ray_embedshard_\w+)(\{.*\})? (\S+)$", text, re.MULTILINE):
        found.setdefault(name, []).append((labels, float(value)))
    return found


def test_prometheus_finds_the_metrics_that_the_dashboard_asks_for(cluster, make_config, tmp_path, train):
    address, port = cluster
    changes = {
        "train": {"epochs": 5000, "log_every_steps": 1},
        "checkpoint": {"every_steps": 20, "keep": 2},
        "evaluate": {"every_steps": 100_000},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(changes).tree))
    training = train("run", path, "--run-dir", tmp_path / "run", "--ray-address", address, "--ray", RAY_AUTH_MODE="disabled")
    wanted = {f"ray_{name}" for name in EXPORTED - EVENTS}
    deadline = time.monotonic() + TIMEOUT_S
    while not wanted <= {*(found := scraped(port))}:
        assert training.process.poll() is None, training.output
        assert time.monotonic() < deadline, f"only {sorted(found)} of {sorted(wanted)}: {training.output}"
        time.sleep(0.5)
    stages = {re.search('[,{]stage="([a-z]+)"', labels)[1] for labels, _ in found["ray_embedshard_step_seconds"]}
    assert stages == {"data", "step", "evaluate", "checkpoint"}
    assert all(value > 0 for _, value in found["ray_embedshard_bytes_read_total"])
    assert {*found} <= {f"ray_{name}" for name in EXPORTED}
