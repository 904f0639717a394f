"""`cluster/` on real Ray: a local cluster of two nodes, jobs on it, who is let in, and that nothing is left behind."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
import requests

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def marked():
    """The processes of all local clusters, by the mark in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        for word in words:
            if word.startswith(b"EMBEDSHARD_CLUSTER="):
                found[int(path.parent.name)] = word.decode().partition("=")[2]
    return found


def processes_of(folder):
    name = json.loads((folder / "cluster.json").read_text())["id"]
    return [pid for pid, mark in marked().items() if mark.startswith(f"{name}/")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of every process here: without what a shell may have of another Ray."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EMBEDSHARD_"))}
    return {
        **ours,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


@pytest.fixture(scope="module")
def local(environment):
    """Runs `cluster/local.py`."""

    def local(*arguments, check=True):
        done = subprocess.run(
            [sys.executable, str(ROOT / "cluster" / "local.py"), *map(str, arguments)],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return local


@pytest.fixture(scope="module")
def cluster(local, tmp_path_factory):
    """A cluster of two nodes: its folder, and what `start` said to export."""
    folder = tmp_path_factory.mktemp("cluster")
    out = local("start", "--nodes", 2, "--cpus", 1, "--dashboard-port", 0, "--folder", folder).stdout
    exports = dict(re.findall(r"^  export (\w+)=(\S+)$", out, re.MULTILINE))
    yield folder, exports
    if (folder / "cluster.json").exists():
        local("stop", "--folder", folder)


@pytest.fixture
def job_folder(make_config, interactions, tmp_path):
    """A working directory with a config, whose data are named by ${EMBEDSHARD_DATA}."""

    def make(**changes):
        folder = tmp_path / "job"
        folder.mkdir()
        loaded = make_config({"train": {"log_every_steps": 1}, **changes})
        text = yaml.safe_dump(loaded.tree).replace(str(interactions), "${EMBEDSHARD_DATA}")
        (folder / "config.yaml").write_text(text)
        return folder

    return make


@pytest.fixture
def submit_environment(environment, cluster, interactions):
    return {**environment, **cluster[1], "EMBEDSHARD_DATA": str(interactions)}


def submit_command(*arguments):
    return [sys.executable, str(ROOT / "cluster" / "submit.py"), *map(str, arguments)]


@pytest.fixture
def submit(submit_environment):
    def submit(*arguments, cwd=None, **changes):
        env = {name: value for name, value in {**submit_environment, **changes}.items() if value is not None}
        return subprocess.run(
            submit_command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env, cwd=cwd
        )

    return submit


class DroppingProxy:
    """Forwards TCP to a port; drops each connection that carried so many bytes back and was told to be dropped."""

    def __init__(self, port, drop_after):
        self.target, self.drop_after, self.dropped = port, drop_after, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            is_tail = client.recv(65536, socket.MSG_PEEK).find(b"/logs/tail") >= 0
            threading.Thread(target=self.pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self.pump, args=(server, client, is_tail), daemon=True).start()

    def pump(self, source, sink, is_tail):
        carried = 0
        try:
            while data := source.recv(4096):
                sink.sendall(data)
                carried += len(data)
                if is_tail and self.dropped < len(self.drop_after) and carried > self.drop_after[self.dropped]:
                    self.dropped += 1
                    break
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_start_makes_nodes_that_ask_for_a_token_of_the_owner_alone(cluster, local):
    folder, exports = cluster
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    out = local("status", "--folder", folder).stdout
    assert re.findall(r"^(\S+) .* alive", out, re.MULTILINE) == ["head", "node-1"]
    jobs, token = f"{exports['RAY_API_SERVER_ADDRESS']}/api/jobs/", (folder / "token").read_text()
    assert requests.get(jobs, timeout=60).status_code == 401
    assert requests.get(jobs, headers={"Authorization": "Bearer other"}, timeout=60).status_code == 403
    assert requests.get(jobs, headers={"Authorization": f"Bearer {token}"}, timeout=60).status_code == 200
    again = local("start", "--folder", folder, check=False)
    assert again.returncode == 2
    assert "Stop it first: python cluster/local.py stop --folder" in again.stderr


def test_a_job_is_followed_over_dropped_connections_and_ends_with_0(cluster, submit, job_folder):
    folder, exports = cluster
    proxy = DroppingProxy(int(exports["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]), drop_after=[150, 900])
    job = job_folder()
    done = submit(
        "--address", f"http://127.0.0.1:{proxy.port}", "--workers", 2, "--working-dir", job, job / "config.yaml",
        "--set", "seed=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert proxy.dropped == 2  # also: the address is the one given, not RAY_ADDRESS, which Ray's client takes before it
    assert done.stdout.count("The connection is lost") >= 1
    assert done.stdout.count("Running entrypoint for job") == 1
    assert re.findall(r"^step (\d+)/14", done.stdout, re.MULTILINE)[-1] == "14"
    assert done.stdout.count("step 14/14") == 1
    assert "succeeded, exit code 0" in done.stdout
    (run,) = re.findall(r"^Run: (\S+), on the cluster", done.stdout, re.MULTILINE)
    assert Path(run).parent == folder / "runs"
    assert f"--resume {run}" in done.stdout
    assert json.loads((Path(run) / "result.json").read_text())["workers"] == 2
    assert "${EMBEDSHARD_DATA}" in (Path(run) / "config.yaml").read_text()


@pytest.mark.slow
def test_a_job_that_fails_ends_with_its_own_exit_code_and_the_command_that_resumes_it(submit, job_folder):
    job = job_folder()
    done = submit("--workers", 3, "--working-dir", job, job / "config.yaml")
    assert "--workers 3: they cannot share data.lanes=4 lanes evenly" in done.stdout
    assert "failed, exit code 2" in done.stdout
    assert done.returncode == 2, done.stdout + done.stderr
    (run,) = re.findall(r"^Run: (\S+), on the cluster", done.stdout, re.MULTILINE)
    assert done.stdout.strip().splitlines()[-1].strip() == shlex.join(
        ["python", "cluster/submit.py", "--address", submit_address(done), "--workers", "3", "--working-dir", str(job),
         "--resume", run, str(job / "config.yaml")]
    )  # fmt: skip
    (name,) = re.findall(r"^Job (\S+):", done.stdout, re.MULTILINE)
    followed = submit("--follow", name)
    assert followed.returncode == 2
    assert "they cannot share data.lanes=4 lanes evenly" in followed.stdout
    assert f"--resume {run}" in followed.stdout


def submit_address(done):
    return re.search(r"--address (\S+)", done.stdout).group(1)


def test_a_missing_and_a_wrong_token_are_told_apart(submit, job_folder, tmp_path):
    job = job_folder()
    missing = submit("--working-dir", job, job / "config.yaml", RAY_AUTH_TOKEN_PATH=None)
    assert missing.returncode == 2
    assert "asks for a token (401) and there is none here" in missing.stderr
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = submit("--working-dir", job, job / "config.yaml", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 2
    assert f"refuses the token (403) of {wrong}" in refused.stderr
    assert "0000" not in refused.stdout + refused.stderr


@pytest.mark.slow
def test_ray_s_own_command_submits_a_training_too(cluster, submit_environment, job_folder):
    folder, _ = cluster
    runtime_env = {"env_vars": {"EMBEDSHARD_DATA": submit_environment["EMBEDSHARD_DATA"]}}
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(job_folder()),
            "--runtime-env-json", json.dumps(runtime_env),
            "--", "embedshard", "train", "config.yaml", "--launcher", "ray", "--workers", "2",
            "--run-dir", str(folder / "runs/plain"),
        ],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=submit_environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs/plain/result.json").exists()


def wait_for(path, text, process):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"'{text}' never came: {path.read_text()}")


def listen_to_ctrl_c():
    """For a child process: what a shell starts in the background, these tests too perhaps, ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


LONG = {
    "train": {"epochs": 60, "log_every_steps": 1},
    "checkpoint": {"every_steps": 20, "keep": 3},
    "evaluate": {"every_steps": 420},
}


@pytest.mark.slow
def test_ctrl_c_asks_what_a_stop_saves_and_the_printed_command_resumes(submit_environment, job_folder, tmp_path):
    job = job_folder(**LONG)
    out = tmp_path / "out"
    ours, theirs = pty.openpty()
    with out.open("w") as file:
        process = subprocess.Popen(
            submit_command("--workers", 2, "--working-dir", job, job / "config.yaml"),
            stdin=theirs, stdout=file, stderr=subprocess.STDOUT, env={**submit_environment, "PYTHONUNBUFFERED": "1"},
            preexec_fn=listen_to_ctrl_c,
        )  # fmt: skip
    try:
        wait_for(out, "step 30/", process)
        process.send_signal(signal.SIGINT)
        wait_for(out, "Leave it running, stop it, or follow on?", process)
        os.write(ours, b"s\n")
        code = process.wait(timeout=TIMEOUT_S)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    text = out.read_text()
    assert code == 143, text
    (stopped,) = re.findall(r"Stopped by SIGTERM after step (\d+)", text)
    assert 30 <= int(stopped) < 420
    command = shlex.split(text.strip().splitlines()[-1])
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=submit_environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Resumes after step {stopped}." in done.stdout
    assert "step 420/420" in done.stdout


@pytest.mark.slow
def test_ctrl_c_without_a_terminal_leaves_the_job_running(submit_environment, submit, job_folder, tmp_path):
    job = job_folder()
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            submit_command("--working-dir", job, job / "config.yaml"),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**submit_environment, "PYTHONUNBUFFERED": "1"}, preexec_fn=listen_to_ctrl_c,
        )  # fmt: skip
    try:
        wait_for(out, "Running entrypoint", process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    (name,) = re.findall(r"--follow (\S+)", out.read_text())
    followed = submit("--follow", name)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "step 14/14" in followed.stdout


@pytest.mark.slow
def test_an_open_dashboard_is_refused_elsewhere_and_noted_on_loopback(
    environment, submit, job_folder, tmp_path, tmp_path_factory
):
    other = own_address()
    job = job_folder()
    home = tmp_path_factory.mktemp("h")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port=0", "--dashboard-host=0.0.0.0",
            f"--dashboard-port={port}", "--dashboard-agent-listen-port=0", "--num-cpus=0", "--object-store-memory=80000000",
            f"--temp-dir={home}",
        ],
        env={**environment, "RAY_AUTH_MODE": "disabled"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(home / "ray_current_cluster", ":", process)
        elsewhere = submit("--address", f"http://{other}:{port}", "--working-dir", job, job / "config.yaml")
        assert elsewhere.returncode == 2
        assert "is open: it asks for no token and is not on this machine's loopback" in elsewhere.stderr
        here = submit("--address", f"http://127.0.0.1:{port}", "--follow", "no-such-job")
        assert "asks for no token: every user of this machine" in here.stdout
        assert "does not know job no-such-job" in here.stderr
        assert here.returncode == 1
    finally:
        process.terminate()
        process.wait(timeout=60)


def own_address():
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


@pytest.mark.slow
def test_a_run_outlives_the_kill_of_a_node(cluster, local, submit_environment, job_folder, tmp_path):
    folder, _ = cluster
    job = job_folder(**LONG)
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            submit_command("--workers", "1:2", "--working-dir", job, job / "config.yaml"),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**submit_environment, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        wait_for(out, "step 30/", process)
        local("kill", "node-1", "--folder", folder)
        assert process.wait(timeout=TIMEOUT_S) == 0, out.read_text()
    finally:
        process.kill()
    assert "Resumes after step" in out.read_text()


def test_a_start_that_fails_leaves_nothing(environment, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import os, local\n"
        "try: local.Cluster(Path(sys.argv[2])).start(2, 1, -1, 0, os.environ)\n"
        "except local.ClusterError as error: sys.exit(f'said: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "cluster"), str(tmp_path)],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment,
    )  # fmt: skip
    assert "said: head: 'ray start' ended with" in done.stderr
    assert not (tmp_path / "cluster.json").exists()


def test_stop_ends_what_a_killed_start_left(environment, local, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cluster/local.py"), "start", "--dashboard-port", "0", "--folder", str(tmp_path)],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "cluster.json").exists() or len(processes_of(tmp_path)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    mine = set(processes_of(tmp_path))
    assert mine
    local("stop", "--folder", tmp_path)
    assert not mine & set(marked())
    assert not (tmp_path / "cluster.json").exists()
    assert local("stop", "--folder", tmp_path, check=False).returncode == 2


def test_kill_ends_a_node_and_stop_leaves_no_process(cluster, local):
    """The last of this file, for it takes the cluster away."""
    folder, _ = cluster
    state = json.loads((folder / "cluster.json").read_text())
    assert (
        "There is no node 'node-7'. There are: head, node-1."
        in local("kill", "node-7", "--folder", folder, check=False).stderr
    )
    if "node-1" in alive(local, folder):
        local("kill", "node-1", "--folder", folder)
    assert alive(local, folder) == ["head"]
    assert f"{state['id']}/node-1/" not in marked().values()
    assert local("kill", "node-1", "--folder", folder, check=False).returncode == 2
    mine = set(processes_of(folder))
    assert mine
    local("stop", "--folder", folder)
    assert not mine & set(marked())
    assert not Path(state["temporary"]).exists()
    assert (folder / "runs").is_dir()


def alive(local, folder):
    return re.findall(r"^(\S+) .* alive", local("status", "--folder", folder).stdout, re.MULTILINE)
