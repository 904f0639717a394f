"""The preStop hook, in a real Ray cluster of three nodes: busy ones are told to leave and waited for, idle ones go."""

import os
import subprocess
import sys
import time

import pytest

from tests.manifests.conftest import ROOT

ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(280)
DEADLINE_S = 6


def drain(address, *arguments, deadline_s=DEADLINE_S, environment=None):
    command = [
        sys.executable,
        str(ROOT / "k8s" / "drain.py"),
        "--address",
        address,
        "--deadline",
        str(deadline_s),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or os.environ)


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A head, and workers at 127.0.0.2 and 127.0.0.3."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps its token
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    for ip in ("127.0.0.2", "127.0.0.3"):
        cluster.add_node(num_cpus=1, node_ip_address=ip, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def addresses_alive():
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def start_busy(ip):
    """Occupies a node, as a training process would; returns what does."""

    @ray.remote(num_cpus=1, resources={f"node:{ip}": 0.01})
    class Busy:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    actor = Busy.remote()
    return actor, ray.get(actor.node.remote(), timeout=120)


def test_one_node_then_all(cluster):
    actor, node = start_busy("127.0.0.2")
    began = time.time()
    done = drain(cluster.address, "--node-ip", "127.0.0.2")
    assert done.returncode == 0, done.stderr
    ended = time.time()
    deadlines = ray._private.state.state.get_draining_nodes()  # what Ray Train's get_preemption_info() looks at
    assert set(deadlines) == {node}
    assert began + DEADLINE_S <= deadlines[node] / 1000 + 0.001 <= ended  # it was busy to the end, and the hook waited
    assert {"127.0.0.2", "127.0.0.3"} <= addresses_alive()

    del actor  # what was busy has saved, and ends
    done = drain(cluster.address, "--all", deadline_s=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told to leave") >= 1
    assert not {"127.0.0.2", "127.0.0.3"} & addresses_alive()
    assert len(addresses_alive()) == 1  # the head


def test_without_an_address():
    done = drain(
        "", environment={name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "POD_IP")}
    )
    assert done.returncode == 2
    assert "RAY_ADDRESS" in done.stderr
