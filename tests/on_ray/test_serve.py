"""`embedshard serve` as a process, over two replicas on Ray Serve: a reload under load, a broken export, a clean end."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import pytest

from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend

pytest.importorskip("fastapi", reason="Ray Serve is not installed: pip install -r requirements/ray.txt")
pytestmark = pytest.mark.timeout(900)

TIMEOUT_S = 300
TOKEN = "a-token-of-twenty-four-b"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def put(source, target):
    """Copies an export so that it appears whole."""
    shutil.copytree(source, target.parent / f".{target.name}")
    (target.parent / f".{target.name}").rename(target)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Served:
    """A service as a process."""

    def __init__(self, out, folder, port, environment, descendants, *options, **more):
        self._descendants = descendants
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "serve.txt"
        command = [sys.executable, "-m", "embedshard.cli", "serve", str(out), "--port", str(port), *map(str, options)]
        self.process = subprocess.Popen(
            command, stdout=self._log.open("w"), stderr=subprocess.STDOUT, env={**environment, **more}
        )

    @property
    def output(self):
        return self._log.read_text()

    def ask(self, path, body=None, headers=BEARER):
        """Returns the status and the body of an answer."""

        async def ask():
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
                call = session.get if body is None else session.post
                more = {} if body is None else {"json": body}
                async with call(self.url + path, headers=headers, **more) as answer:
                    return answer.status, await answer.text()

        return asyncio.run(ask())

    def wait_for(self, what, path="/healthz", **arguments):
        """Waits until what a path answers makes a function true; returns the answer's text."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output
            try:
                status, text = self.ask(path, **arguments)
            except aiohttp.ClientError:
                status, text = 0, ""
            if status == 200 and what(text):
                return text
            time.sleep(0.1)
        raise AssertionError(f"{path} never came to it: {status} {text}\n{self.output}")

    def descendants(self):
        """The processes that it started, and theirs."""
        return self._descendants(self.process.pid)

    def end(self):
        if self.process.poll() is None:
            for pid in [*self.descendants(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait(timeout=60)


@pytest.fixture
def serve(environment, tmp_path, free_port, descendants):
    """A function that starts a service; what is left of it is ended after the test."""
    started = []

    def serve(out, *options, **more):
        started.append(Served(out, tmp_path, free_port, environment, descendants, *options, **more))
        return started[-1]

    yield serve
    for service in started:
        service.end()


class Load(threading.Thread):
    """Asks for lists on several connections, each as soon as it is answered, until it fails or is told to stop."""

    def __init__(self, url, connections=8):
        super().__init__()
        self._url, self._connections = url, connections
        self.steps, self.failed, self._stopped = [], [], threading.Event()

    def run(self):
        asyncio.run(self._all())

    async def _all(self):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), headers=BEARER) as session:
            await asyncio.gather(*(self._one(session, number) for number in range(self._connections)))

    async def _one(self, session, user):
        while not self._stopped.is_set():
            try:
                async with session.post(f"{self._url}/recommend", json={"user": user, "k": 3}) as answer:
                    text = await answer.text()
                    if answer.status == 200 and len(json.loads(text)["results"][0]["items"]) == 3:
                        self.steps.append(json.loads(text)["step"])
                        continue
                    self.failed.append((answer.status, text))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.failed.append((0, repr(error)))
            return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._stopped.set()
        self.join()


def values(page, name):
    """Returns a metric's value of each replica."""
    return [float(value) for value in re.findall(rf"^embedshard_serve_{name}{{.*}} (\S+)$", page, re.MULTILINE)]


def fallen(pages):
    """Returns what pages, in the order in which they were asked for, say to have become less: no count may."""
    before, found = {}, []
    for page in pages:
        now = dict(re.findall(r"^(embedshard_serve_\w+_(?:total|count|sum|bucket){.*}) (\S+)$", page, re.MULTILINE))
        found += [(name, before[name], value) for name, value in now.items() if float(value) < float(before.get(name, 0))]
        before |= now
    return found


def test_a_service_reloads_under_load_refuses_what_is_broken_and_ends_cleanly(two_exports, tmp_path, serve):
    older, newer = two_exports
    steps = [open_export(out).manifest.step for out in two_exports]
    exports = tmp_path / "exports"
    exports.mkdir()
    put(older, exports / "a")
    service = serve(
        exports, "--replicas", 2, "--cpus-per-replica", 0.5, "--poll", 0.3, "--max-batch", 4, EMBEDSHARD_SERVE_TOKEN=TOKEN
    )
    service.wait_for(lambda text: json.loads(text)["step"] == steps[0])

    status, text = service.ask("/recommend", {"user": 7, "k": 5})
    assert status == 200, text
    assert [item["id"] for item in json.loads(text)["results"][0]["items"]] == [
        item.id for item in recommend(older, "7", 5).items
    ]
    assert service.ask("/recommend", {"user": 7}, headers={})[0] == 401
    assert service.ask("/metrics", headers={})[0] == 401
    assert service.ask("/recommend", {"user": 4000})[0] == 404
    assert service.ask("/recommend", {"user": 7, "k": 5000})[0] == 422
    assert service.ask("/recommend", {"users": ["x" * 1000] * 1100})[0] == 413
    assert service.ask("/openapi.json", headers={})[0] == 200
    service.wait_for(lambda page: len(values(page, "export_step")) == 2, "/metrics")

    with Load(service.url) as load:
        service.wait_for(lambda _: len(load.steps) > 50)
        put(newer, exports / "b")
        service.wait_for(lambda page: values(page, "export_step") == [steps[1]] * 2, "/metrics")
        served = len(load.steps)
        service.wait_for(lambda _: len(load.steps) > served + 50)
        pages = [service.ask("/metrics")[1] for _ in range(30)]
    page = pages[0]
    assert load.failed == []
    assert fallen(pages) == []
    assert set(load.steps[:50]) == {steps[0]}
    assert set(load.steps[-20:]) == {steps[1]}
    assert values(page, "reloads_total") == [1.0, 1.0]
    assert sum(values(page, "batch_requests_sum")) > sum(values(page, "batch_requests_count")), "nothing was batched"

    broken = exports / "c"
    shutil.copytree(newer, exports / ".c")
    content = bytearray((exports / ".c" / "items.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (exports / ".c" / "items.parquet").write_bytes(content)
    manifest = json.loads((exports / ".c" / "manifest.json").read_text())
    (exports / ".c" / "manifest.json").write_text(
        json.dumps(manifest | {"step": 999, "written": "2999-01-01T00:00:00+00:00"})
    )
    with Load(service.url) as load:
        (exports / ".c").rename(broken)
        service.wait_for(lambda page: values(page, "export_refused") == [1.0, 1.0], "/metrics")
        health = json.loads(service.wait_for(lambda text: json.loads(text)["refused"]))
        assert "items.parquet has the SHA-256" in health["refused"]["why"]
        assert health["step"] == steps[1]
        service.wait_for(lambda page: min(values(page, "reload_failures_total")) > 0, "/metrics")
        shutil.copy(newer / "items.parquet", broken)
        assert service.ask("/reload", {})[0] == 202
        service.wait_for(lambda page: values(page, "export_step") == [999.0] * 2, "/metrics")
    assert load.failed == []
    assert set(load.steps) <= {steps[1], 999}

    started = service.descendants()
    assert len(started) > 4
    with Load(service.url) as load:
        service.wait_for(lambda _: len(load.steps) > 50)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(timeout=TIMEOUT_S) == 0, service.output
    assert {status for status, _ in load.failed} == {503}, "what was under way is answered, then no more is taken"
    assert "Stops after SIGTERM" in service.output
    deadline = time.monotonic() + TIMEOUT_S
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in started if is_running(pid)] == []
    assert TOKEN not in service.output


def test_a_service_that_cannot_start_says_why(two_exports, tmp_path, serve):
    shutil.copytree(two_exports[0], tmp_path / "out")
    (tmp_path / "out" / "items.faiss").write_bytes(b"x")
    service = serve(tmp_path / "out")
    assert service.process.wait(timeout=TIMEOUT_S) == 2, service.output
    assert "items.faiss has 1 bytes" in service.output
    assert "Traceback" not in service.output


def test_a_signal_while_it_starts_ends_it_cleanly(two_exports, serve):
    service = serve(two_exports[0])
    deadline, found = time.monotonic() + TIMEOUT_S, []
    while not any(b"ServeController" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found if is_running(pid)):
        assert service.process.poll() is None, service.output
        assert time.monotonic() < deadline, service.output
        time.sleep(0.05)
        found = service.descendants()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=TIMEOUT_S) == 0, service.output
    while any(map(is_running, found)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in found if is_running(pid)] == []
