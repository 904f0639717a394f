"""Loads `embedshard serve` over loopback with a real HTTP client, and puts a newer export in its place half-way.

    python tests/benchmarks/serve_load.py EXPORT NEWER_EXPORT [--connections 16 | --rate 100] [--seconds 30] [--replicas 1]

The two are copied into a folder of exports of its own, the newer one by a rename after half of the time. Closed loop: each
connection asks again as soon as it is answered. Open loop (`--rate`): requests begin when they are due, whether or not
others are answered, and their latency counts from then. A request fails if it is not answered with 200 and a list of the
length that was asked for. Prints one JSON object; the exit code is 1 if one failed or no newer export took over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import pyarrow.parquet as pq

START_S = 300.0


@dataclass
class Seen:
    """What the client saw: when each request began, in seconds from the start, how long it took, and what it was."""

    began: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    steps: Counter[int] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


class Client:
    """Asks for lists of random users, one request at a time on each connection."""

    def __init__(self, url: str, token: str, users: list[int | str], k: int, session: aiohttp.ClientSession) -> None:
        self._url, self._users, self._k, self._session = url, users, k, session
        self._headers = {"Authorization": f"Bearer {token}"}
        self._random = random.Random(7)
        self.wanted_step: int | None = None
        self.newer_since: float | None = None
        self.seen, self.start = Seen(), time.perf_counter()

    async def ask(self, due: float | None = None) -> None:
        body = {"user": self._random.choice(self._users), "k": self._k}
        began = time.perf_counter() if due is None else due
        try:
            async with self._session.post(f"{self._url}/recommend", json=body, headers=self._headers) as answer:
                content = await answer.json(content_type=None)
                if answer.status != 200 or len(content["results"][0]["items"]) != self._k:
                    self.seen.failed[f"{answer.status}: {str(content)[:200]}"] += 1
                    return
                self.seen.steps[content["step"]] += 1
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self.seen.failed[f"{type(error).__name__}: {error}"] += 1
            return
        self.seen.began.append(began - self.start)
        self.seen.took.append(time.perf_counter() - began)
        if content["step"] == self.wanted_step and self.newer_since is None:
            self.newer_since = time.perf_counter()

    def goes_on(self, seconds: float) -> bool:
        """Whether the time is not over; it goes on, up to five times as long, until the newer export has answered."""
        passed = time.perf_counter() - self.start
        waits = self.wanted_step is not None and self.wanted_step not in self.seen.steps
        return passed < seconds or (waits and passed < 5 * seconds)

    async def closed(self, connections: int, seconds: float) -> None:
        async def one() -> None:
            while self.goes_on(seconds):
                await self.ask()

        await asyncio.gather(*(one() for _ in range(connections)))

    async def open(self, rate: float, seconds: float) -> None:
        tasks: list[asyncio.Task[None]] = []
        while self.goes_on(seconds):
            due = self.start + len(tasks) / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(due)))
        await asyncio.gather(*tasks)


def quantiles(took: np.ndarray) -> dict[str, float]:
    """Returns latencies in milliseconds."""
    if not len(took):
        return {}
    return {f"p{q}_ms": round(1000 * float(np.quantile(took, q / 100)), 2) for q in (50, 90, 99)} | {
        "max_ms": round(1000 * float(took.max()), 2)
    }


def processor_seconds(pid: int) -> dict[str, float]:
    """Returns the time on a processor that a process and its descendants have used so far, by what they are."""
    used: dict[str, float] = {}
    todo = [pid]
    while todo:
        each = todo.pop()
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            name = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")[0].decode()
            children = [task.read_text().split() for task in Path(f"/proc/{each}/task").glob("*/children")]
        except FileNotFoundError:
            continue
        name = next((kind for kind in ("ProxyActor", "ServeReplica:embedshard:replica") if kind in name), "the rest")
        ticks = int(fields[11]) + int(fields[12])
        used[name] = used.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
        todo += [int(number) for numbers in children for number in numbers]
    return used


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve(out: Path, port: int, token: str, arguments: argparse.Namespace, log: Path) -> subprocess.Popen[bytes]:
    """Starts the service; it is the caller's to end."""
    command = [sys.executable, "-m", "embedshard.cli", "serve", str(out), "--port", str(port), "--poll", "1",
               "--replicas", str(arguments.replicas), "--max-batch", str(arguments.max_batch),
               "--batch-wait-ms", str(arguments.batch_wait_ms)]  # fmt: skip
    environment = {**os.environ, "EMBEDSHARD_SERVE_TOKEN": token}
    return subprocess.Popen(command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT)


async def wait_until_up(url: str, process: subprocess.Popen[bytes], session: aiohttp.ClientSession, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the service ended: {log.read_text()}")
        try:
            async with session.get(f"{url}/healthz") as answer:
                if answer.status == 200:
                    return
        except (aiohttp.ClientError, TimeoutError):
            pass  # not yet
        await asyncio.sleep(0.5)
    raise SystemExit(f"the service did not start in {START_S:.0f} s: {log.read_text()}")


async def replace(exports: Path, newer: Path, after_s: float) -> float:
    """Puts the newer export into the folder, all its files at once; returns when, as `perf_counter` has it."""
    await asyncio.sleep(after_s)
    newer.rename(exports / "newer")
    return time.perf_counter()


async def run(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    exports, newer, log = work / "exports", work / "newer", work / "log.txt"
    shutil.copytree(arguments.export, exports / "older")
    shutil.copytree(arguments.newer, newer)
    users = pq.read_table(exports / "older" / "users.parquet", columns=["id"])["id"].to_pylist()
    port, token = free_port(), secrets.token_hex(16)
    url, process = f"http://127.0.0.1:{port}", serve(exports, port, token, arguments, log)
    connector = aiohttp.TCPConnector(limit=arguments.connections if arguments.rate is None else 0)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
            await wait_until_up(url, process, session, log)
            warm = Client(url, token, users, arguments.k, session)
            await warm.closed(4, 3.0)
            client = Client(url, token, users, arguments.k, session)
            client.wanted_step = json.loads((newer / "manifest.json").read_text())["step"]
            began, used = time.perf_counter(), processor_seconds(process.pid)
            load = (
                client.closed(arguments.connections, arguments.seconds)
                if arguments.rate is None
                else client.open(arguments.rate, arguments.seconds)
            )
            put_at, _ = await asyncio.gather(replace(exports, newer, arguments.seconds / 2), load)
            lasted = time.perf_counter() - began
            used = {name: more - used.get(name, 0.0) for name, more in processor_seconds(process.pid).items()}
            async with session.get(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"}) as answer:
                page = await answer.text()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    seen = client.seen
    took, at = np.array(seen.took), np.array(seen.began)
    came = put_at - client.start
    changed = (client.newer_since or np.inf) - client.start
    near = (at + took >= came) & (at <= changed + 1)  # the look, the reading and the change are in it
    totals = {
        name: sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"embedshard_serve_{name}{{"))
        for name in ("batch_requests_sum", "batch_requests_count", "reloads_total", "reload_failures_total")
    }
    return {
        "loop": f"closed, {arguments.connections} connections" if arguments.rate is None else f"open, {arguments.rate:g}/s",
        "replicas": arguments.replicas,
        "k": arguments.k,
        "seconds": round(lasted, 1),
        "requests": len(took) + seen.failed.total(),
        "failed": seen.failed.total(),
        "failures": dict(seen.failed.most_common(5)),
        "requests_per_s": round(len(took) / lasted, 1),
        "all": quantiles(took),
        "without_reload": quantiles(took[~near]),
        "around_reload": quantiles(took[near]),
        "processor_ms_per_request": {
            name: round(1000 * seconds / max(len(took), 1), 2) for name, seconds in sorted(used.items())
        },
        "answers_by_step": dict(seen.steps),
        "newer_export_after_s": round(changed - came, 2),
        "reloads": totals["reloads_total"],
        "reload_failures": totals["reload_failures_total"],
        "mean_batch": round(totals["batch_requests_sum"] / max(totals["batch_requests_count"], 1), 2),
        "exit_code": code,
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("newer", type=Path)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second, whether or not others are answered")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batch-wait-ms", type=float, default=2.0)
    parser.add_argument("-k", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="embedshard-load-") as work:
        found = asyncio.run(run(arguments, Path(work)))
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if found["failed"] or found["exit_code"] or not found["reloads"] else 0)


if __name__ == "__main__":
    main()
