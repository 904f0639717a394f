"""A Ray cluster of several nodes on this machine, for trying things out: start it, kill a node, stop it.

    python cluster/local.py start --nodes 3 --cpus 1
    python cluster/local.py status
    python cluster/local.py kill node-2
    python cluster/local.py stop

Each node is `ray start --block` with an address, ports and a folder for temporary files of its own. All processes of a
node carry a mark in their environment, which children inherit: so `stop` ends exactly what `start` started, also what was
left by a start that failed half-way, or by a node whose first process is gone. Linux only, as are Ray's several nodes.
"""

from __future__ import annotations

__all__ = ["Cluster", "app"]

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from embedshard.errors import ConfigError, EmbedshardError

MARK: Final = "EMBEDSHARD_CLUSTER"
"""Environment variable of every process of a cluster: its id, a slash, the node's name, a slash."""

_START_S: Final = 300.0
_END_S: Final = 20.0
_ANSWER_S: Final = 30.0
"""Within which a busy head says that it is well."""
_POLL_S: Final = 0.1
_OBJECT_STORE_BYTES: Final = 200_000_000
_PATIENCE: Final = {
    # Several nodes on few cores are slow to answer: Ray would take them for dead, and they it.
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_gcs_server_port_wait_time_s": "300",
}
_TOO_SLOW: Final = ("timed out during startup", "Timed out waiting for node info")
"""What Ray says when a node was not there within 30 s, which cannot be set: then it is started again."""
_SETTLE_S: Final = 2.0
"""Within which a `ray start` that has lost one of its processes ends."""
_ATTEMPTS: Final = 3

app = typer.Typer(
    help="A Ray cluster of several nodes on this machine, for trying things out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Folder = Annotated[
    Path, typer.Option(help="Where the cluster's token, its state and the runs of its jobs lie.", show_default=True)
]
DEFAULT_FOLDER: Final = Path("~/.cache/embedshard/cluster")


class ClusterError(EmbedshardError):
    """A node did not start, or a process would not end."""

    exit_code = 1


@dataclass(frozen=True)
class Node:
    """A node as it was started.

    Attributes:
        name: `head`, `node-1`, ...
        ip: its address, on this machine.
        pid: of its `ray start`.
        started: when that began, in the kernel's ticks, so that a pid which was given anew is not mistaken for it.
    """

    name: str
    ip: str
    pid: int
    started: int


class Cluster:
    """A cluster whose state is `cluster.json` in a folder.

    Attributes:
        folder: holds the state, the token and the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._state_path = self.folder / "cluster.json"
        self._state: dict[str, Any] = {}
        if self._state_path.exists():
            self._state = json.loads(self._state_path.read_text(encoding="utf-8"))

    @property
    def nodes(self) -> list[Node]:
        """The nodes that were started."""
        return [Node(**node) for node in self._state.get("nodes", [])]

    @property
    def address(self) -> str:
        """Where drivers join: `IP:PORT`."""
        return str(self._state["address"])

    @property
    def dashboard(self) -> str:
        """The URL of the dashboard, and so of the jobs API."""
        return f"http://127.0.0.1:{self._state['dashboard_port']}"

    @property
    def token_path(self) -> Path:
        """The file that holds the token."""
        return self.folder / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What a shell must export to use it."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "EMBEDSHARD_RUNS": str(self.folder / "runs"),
        }

    def start(self, nodes: int, cpus: int, gpus: int, dashboard_port: int, environment: Mapping[str, str]) -> None:
        """Starts a head and the other nodes; if one does not start, stops all of them.

        Args:
            nodes: the head among them.
            cpus: that each node offers.
            gpus: that each node offers.
            dashboard_port: on 127.0.0.1; 0 for one that is free.
            environment: of the nodes' processes.

        Raises:
            ConfigError: if a cluster of this folder is there already, or the port is taken.
            ClusterError: if a node does not start.
        """
        if self._state:
            raise ConfigError(
                f"{self._state_path} says that a cluster was started. Stop it first: {_command(self.folder, 'stop')}."
            )
        port = _free_port(dashboard_port)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "runs").mkdir(exist_ok=True)
        _write_token(self.token_path)
        self._state = {
            "id": secrets.token_hex(8),
            # short, since the path of a socket has at most 107 characters
            "temporary": tempfile.mkdtemp(prefix="es-", dir="/tmp"),
            "dashboard_port": port,
            "nodes": [],
        }
        self._save()
        shared = {
            **_PATIENCE,
            **{name: value for name, value in environment.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            # so that a job finds `embedshard`, also when this was started without activating the environment
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
        }
        shared.pop("RAY_AUTH_TOKEN", None)  # which would go before the file
        size = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        try:
            head = [
                "--head",
                "--no-monitor",
                "--port=0",
                f"--dashboard-port={port}",
                f"--ray-client-server-port={_free_port(0)}",
            ]
            self._start_node("head", [*head, *size], shared)
            self._state["address"] = self._joined("head").read_text(encoding="utf-8").strip()
            self._save()
            for number in range(1, nodes):
                self._start_node(f"node-{number}", [f"--address={self.address}", *size], shared)
        except BaseException:
            self.stop()
            raise

    def _start_node(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        temporary = Path(self._state["temporary"])
        log = temporary / f"{name}.log"
        ip = f"127.0.0.{11 + len(self.nodes)}"
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--temp-dir={temporary / name}", f"--node-ip-address={ip}", f"--node-name={name}",
            "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false",
            *arguments,
        ]  # fmt: skip
        others = self._state["nodes"]
        for attempt in range(_ATTEMPTS):
            with log.open("w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    command,
                    env={**environment, MARK: f"{self._state['id']}/{name}/"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # a Ctrl-C in this shell is not meant for it
                )
            self._state["nodes"] = [*others, asdict(Node(name, ip, process.pid, _started(process.pid) or 0))]
            self._save()
            is_over = self._wait_for_start(name, process)
            if is_over and not _ends(process, _SETTLE_S):
                return
            said = log.read_text(encoding="utf-8", errors="replace")
            if not any(words in said for words in _TOO_SLOW) or attempt == _ATTEMPTS - 1:
                what = f"ended with {process.returncode}" if is_over else f"did not start within {_START_S:.0f} s"
                last = "\n".join(said.splitlines()[-15:])
                raise ClusterError(f"{name}: 'ray start' {what}; the cluster is stopped. It said:\n{last}")
            typer.echo(f"{name} was too slow for Ray, which waits 30 s; it is started again.")
            self._end(lambda: self.processes(name))
            shutil.rmtree(temporary / name, ignore_errors=True)

    def _wait_for_start(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        def is_over() -> bool:
            if name != "head" and not self.is_alive("head"):
                raise ClusterError(f"The head died while {name} was starting; the cluster is stopped. Try fewer nodes.")
            return self._joined(name).exists() or process.poll() is not None

        return _wait_until(is_over, _START_S)

    def _joined(self, name: str) -> Path:
        """The file that Ray writes when a node is up: the cluster's address."""
        return Path(self._state["temporary"]) / name / "ray_current_cluster"

    def is_alive(self, name: str) -> bool:
        """Whether the node's raylet lives."""
        return self._raylet(name) is not None

    def processes(self, name: str) -> list[int]:
        """Returns the pids of a node's processes."""
        return list(_marked(f"{self._state['id']}/{name}/"))

    def kill(self, name: str) -> None:
        """Kills a node's raylet, as a machine that is gone, and waits until all of the node has ended.

        Raises:
            ConfigError: if there is no such node, or it is dead.
        """
        names = [node.name for node in self.nodes]
        if name not in names:
            raise ConfigError(f"There is no node '{name}'. There are: {', '.join(names) or 'none, no cluster was started'}.")
        raylet = self._raylet(name)
        if raylet is None:
            raise ConfigError(f"{name} is dead already.")
        os.kill(raylet, signal.SIGKILL)
        if not _wait_until(lambda: not self.processes(name), _END_S):
            self._end(lambda: self.processes(name))

    def stop(self) -> int:
        """Ends all processes of the cluster, removes its temporary files, and returns how many processes there were.

        Raises:
            ConfigError: if no cluster was started.
            ClusterError: if a process does not end.
        """
        if not self._state:
            raise ConfigError(f"No cluster was started in {self.folder}: there is no {self._state_path.name}.")
        found = [pid for node in self.nodes for pid in self.processes(node.name)]
        for node in reversed(self.nodes):
            if _started(node.pid) == node.started:
                _signal(node.pid, signal.SIGTERM)  # `ray start` ends what it started
        self._end(lambda: list(_marked(f"{self._state['id']}/")))
        shutil.rmtree(self._state["temporary"], ignore_errors=True)
        self._state_path.unlink()
        self._state = {}
        return len(found)

    def _end(self, left: Callable[[], list[int]]) -> None:
        if _wait_until(lambda: not left(), _END_S):
            return
        for pid in left():
            _signal(pid, signal.SIGKILL)
        if not _wait_until(lambda: not left(), _END_S):
            raise ClusterError(f"Processes {left()} do not end. {self._state_path} is kept; try to stop it again.")

    def _raylet(self, name: str) -> int | None:
        is_raylet = (pid for pid in self.processes(name) if _read(pid, "comm").strip() == b"raylet")
        return next(is_raylet, None)

    def _save(self) -> None:
        unfinished = self._state_path.with_suffix(".part")
        unfinished.write_text(json.dumps(self._state, indent=2), encoding="utf-8")
        unfinished.rename(self._state_path)


# -------------------------------------------------------------------------------------------------------- processes
def _marked(mark: str) -> Iterator[int]:
    """Yields the processes whose mark begins so; those that have ended and are not waited for are no longer there."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and any(line.startswith(wanted) for line in _read(int(entry.name), "environ").split(b"\0")):
            yield int(entry.name)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it ended, or belongs to somebody else
        return b""


def _started(pid: int) -> int | None:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields else None


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    return _wait_until(lambda: process.poll() is not None, seconds)


def _free_port(wanted: int) -> int:
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ConfigError(
                f"--dashboard-port {wanted} is taken ({error.strerror}). Is another Ray running? Give another port, or 0 "
                f"for a free one."
            ) from error
        return int(bound.getsockname()[1])


def _write_token(path: Path) -> None:
    """Writes a new token into a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


# ---------------------------------------------------------------------------------------------------- command line
def _command(folder: Path, *arguments: str) -> str:
    own = [] if folder == DEFAULT_FOLDER.expanduser().resolve() else ["--folder", str(folder)]
    return f"python cluster/local.py {shlex.join([*arguments, *own])}"


@app.command()
def start(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, the head among them.")] = 3,
    cpus: Annotated[int, typer.Option(min=0, help="CPUs that each offers; they are not held apart.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that each offers.")] = 0,
    dashboard_port: Annotated[int, typer.Option(help="Of the dashboard, on 127.0.0.1; 0: a free one.")] = 8265,
    folder: Folder = DEFAULT_FOLDER,
) -> None:
    """Start a cluster, and print how to use it."""
    cluster = Cluster(folder)
    cluster.start(nodes, cpus, gpus, dashboard_port, os.environ)
    typer.echo(
        f"Started {nodes} {'node' if nodes == 1 else 'nodes'} of {cpus} CPUs: {', '.join(n.name for n in cluster.nodes)}."
    )
    _explain(cluster)


def _explain(cluster: Cluster) -> None:
    config = "pipelines/synthetic/two_tower.yaml"
    exports = "\n".join(f"  export {name}={shlex.quote(value)}" for name, value in cluster.environment.items())
    typer.echo(
        f"Dashboard: {cluster.dashboard} (it asks for the token in {cluster.token_path})\n\n"
        f"To use it, in your shell:\n{exports}\n\n"
        f"A job, with its driver on the cluster; a training, with its driver in your shell:\n"
        f"  python cluster/submit.py --workers 2 {config}\n"
        f"  embedshard train {config} --workers 2 --ray-address $RAY_ADDRESS\n\n"
        f"Take a node away; end all:\n"
        f"  {_command(cluster.folder, 'kill', cluster.nodes[-1].name)}\n"
        f"  {_command(cluster.folder, 'stop')}"
    )


@app.command()
def status(folder: Folder = DEFAULT_FOLDER) -> None:
    """Show the nodes, and how to use the cluster. Exit code 1 if the head is dead or there is none."""
    cluster = Cluster(folder)
    if not cluster.nodes:
        typer.echo(f"No cluster was started in {cluster.folder}.")
        raise typer.Exit(1)
    for node in cluster.nodes:
        processes = len(cluster.processes(node.name))
        typer.echo(
            f"{node.name:8} {node.ip:12} {'alive' if cluster.is_alive(node.name) else 'dead':5} {processes} processes"
        )
    health = f"{cluster.dashboard}/api/gcs_healthz"
    if not cluster.is_alive("head") or not _wait_until(lambda: _answers(health), _ANSWER_S):
        typer.echo(f"The head does not answer. Stop the rest: {_command(cluster.folder, 'stop')}")
        raise typer.Exit(1)
    _explain(cluster)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@app.command()
def kill(
    node: Annotated[str, typer.Argument(help="head, node-1, ...", show_default=False)], folder: Folder = DEFAULT_FOLDER
) -> None:
    """Kill a node's raylet with SIGKILL, so that the node is gone as a machine that lost its power."""
    Cluster(folder).kill(node)
    what = (
        "The cluster is without its head: its jobs end."
        if node == "head"
        else "Runs on it go on from their newest checkpoint."
    )
    typer.echo(f"{node} is gone. {what}")


@app.command()
def stop(folder: Folder = DEFAULT_FOLDER) -> None:
    """End all processes that start started, and remove the cluster's temporary files. Runs stay."""
    cluster = Cluster(folder)
    typer.echo(f"Ended {cluster.stop()} processes. The runs of its jobs stay in {cluster.folder / 'runs'}.")


def main() -> None:
    """Runs the command line; a user's mistake is shown without a traceback."""
    try:
        app()
    except EmbedshardError as error:
        typer.echo(f"Error: {error.shown}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
