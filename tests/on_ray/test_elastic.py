"""`--launcher ray` on a cluster of several nodes that come and go."""

import time

import pytest

from embedshard.train.checkpoint import find_steps
from embedshard.train.run_directory import RunDirectory
from tests.commands import run_command

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(900)

NO_TOKEN = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
"""Of a driver here. The second: how long it takes to see that a lost node's place is not there, else a minute."""


@pytest.fixture
def cluster(monkeypatch, environment):
    """A head without CPUs, on which the driver runs."""
    from ray.cluster_utils import Cluster

    for name in ("HOME", "RAY_worker_niceness"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory, environment, saved_tensors):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command("train", config_file, "--run-dir", path, env=environment)
    assert done.returncode == 0, done.stderr
    return saved_tensors(path)


def assert_close(first, second):
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert tensor.sub(second[1][name]).abs().max() < 1e-4, name


def test_four_workers_of_which_one_is_lost_go_on_as_two_and_every_row_is_trained_once(
    cluster, config_file, undisturbed, tmp_path, train, slow_model, saved_tensors
):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(4)]
    training = train(
        "run", config_file, "--run-dir", tmp_path / "run", "--workers", "1:4", "--ray-address", cluster.address, "--ray",
        **NO_TOKEN, **slow_model,
    )  # fmt: skip
    training.wait_for_step(33)
    cluster.remove_node(nodes[-1], allow_graceful=False)
    output = training.wait()
    assert training.process.returncode == 0, output
    assert [attempt["world_size"] for attempt in training.attempts()] == [4, 2]
    result = training.result()
    assert (result["workers"], result["idle_workers"]) == (2, 1)
    assert_close(saved_tensors(training.path), undisturbed)
    audit = run_command("audit", training.path)
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.slow
def test_notice_of_a_node_that_leaves_saves_at_once_and_the_run_goes_on_from_there(
    cluster, config_file, undisturbed, tmp_path, train, slow_model, saved_tensors
):
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    training = train(
        "run", config_file, "--run-dir", tmp_path / "run", "--workers", "1:2", "--ray-address", cluster.address, "--ray",
        "--set", "checkpoint.every_steps=1000", **NO_TOKEN, **slow_model,
    )  # fmt: skip
    training.wait_for_step(13)
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    accepted, refusal = GcsClient(address=cluster.address).drain_node(
        nodes[-1].node_id, reason, "a test", int((time.time() + 60) * 1000)
    )
    assert accepted, refusal
    checkpoints = RunDirectory(training.path).checkpoints
    deadline = time.monotonic() + 120
    while not find_steps(checkpoints) and time.monotonic() < deadline:
        time.sleep(0.1)
    [saved] = find_steps(checkpoints)
    assert 13 <= saved < 140
    cluster.remove_node(nodes[-1], allow_graceful=False)
    output = training.wait()
    assert training.process.returncode == 0, output
    assert f"Resumes after step {saved}." in output
    assert [attempt["world_size"] for attempt in training.attempts()] == [2, 1]
    assert_close(saved_tensors(training.path), undisturbed)
