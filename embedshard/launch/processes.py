"""Starts the workers of a run as processes of this machine, watches them, and tells what went wrong where.

Each worker is this program with the environment that torchrun would give it; they find each other by a file. What the first
worker prints is shown; one that fails leaves its error in a file, so that the error that began it is shown, not those of
workers who lost a peer. Workers whose launcher is gone are asked to stop: they see the end of their standard input.
"""

from __future__ import annotations

__all__ = ["ERROR_FILE", "leave_error", "run_workers", "stop_with_launcher"]

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from embedshard.errors import ConfigError, EmbedshardError, PeerError
from embedshard.launch.cores import shares
from embedshard.world import RENDEZVOUS, usable_cores

ERROR_FILE = "EMBEDSHARD_ERROR_FILE"
"""Environment variable: where a worker leaves the error that ends it, for the launcher to show."""

_POLL_S: Final = 0.1
_PEERS_MAY_FAIL_S: Final = 10.0
"""How long workers have to end by themselves, losing their peer, after one has failed."""
_PEERS_MAY_END_S: Final = 300.0
"""How long, after one has ended well."""
_STOPPED: Final = {143: signal.SIGTERM, 130: signal.SIGINT}


def run_workers(
    arguments: Sequence[str], workers: int, environment: Mapping[str, str], console: Console, after_death: str = ""
) -> int:
    """Runs this program's command line as so many workers; returns the exit code for all of them.

    SIGTERM and SIGINT are passed on; workers agree on a step then, save, and end.

    Args:
        arguments: after the program's name.
        workers: processes, at least 1.
        environment: theirs, beside what tells them their place. Each gets an equal share of the cores as OpenMP
            threads, unless OMP_NUM_THREADS is set, and runs on cores of its own, if there are enough, unless
            EMBEDSHARD_BIND_CORES is 0.
        console: where the error is shown.
        after_death: what to do after a signal has ended a worker, told behind the error.

    Raises:
        ConfigError: if this process was started by a launcher itself, or the environment's EMBEDSHARD_BIND_CORES is wrong.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        raise ConfigError(
            f"--workers {workers}: this process is one of {environment['WORLD_SIZE']} workers already (RANK and WORLD_SIZE "
            f"are set, as torchrun does). Leave --workers out, or unset them."
        )
    threads, cores = max(1, len(usable_cores()) // workers), shares(workers, environment)
    with tempfile.TemporaryDirectory(prefix="embedshard-") as folder:
        shared = {
            "OMP_NUM_THREADS": str(threads),
            **environment,
            RENDEZVOUS: f"file://{folder}/rendezvous",
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
        }
        error_files = [Path(folder) / f"error-{rank}.json" for rank in range(workers)]
        command = [sys.executable, "-m", "embedshard.cli", *arguments]
        processes: list[subprocess.Popen[bytes]] = []
        with _signals_passed_on(processes):
            try:
                for rank, error_file in enumerate(error_files):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(error_file)}
                    output = None if rank == 0 else subprocess.DEVNULL
                    processes.append(
                        subprocess.Popen(
                            command,
                            env={**shared, **own},
                            stdin=subprocess.PIPE,
                            stdout=output,
                            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on
                        )
                    )
                    if cores is not None:
                        with suppress(OSError):  # it has ended, or a sandbox does not allow what only makes it faster
                            os.sched_setaffinity(processes[-1].pid, cores[rank])  # its threads, made later, run there too
                _wait(processes, error_files)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        return _verdict([process.returncode for process in processes], error_files, console, after_death)


@contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in _STOPPED.values()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], error_files: Sequence[Path]) -> None:
    """Returns when all have ended, or when the rest has had its time after the first."""
    latest = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or time.monotonic() > latest:
            return
        if any(code not in (None, 0, *_STOPPED) for code in codes) or any(path.exists() for path in error_files):
            latest = min(latest, time.monotonic() + _PEERS_MAY_FAIL_S)
        elif any(code is not None for code in codes):
            latest = min(latest, time.monotonic() + _PEERS_MAY_END_S)
        time.sleep(_POLL_S)


def _verdict(codes: Sequence[int], error_files: Sequence[Path], console: Console, after_death: str) -> int:
    """Returns the exit code of the run; shows the error that began its end."""
    if not any(codes):
        return 0
    for code in _STOPPED:
        if all(found in (0, code) for found in codes):
            return code
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in error_files if path.exists()]
    first = sorted(errors, key=lambda error: (error["lost_a_peer"], error["time"]))
    killed = [f"worker {rank} was ended by {_signal_name(-code)}" for rank, code in enumerate(codes) if code < 0]
    if killed and (not first or first[0]["lost_a_peer"]):
        more = " Was it out of memory?" if any("SIGKILL" in words for words in killed) else ""
        _show(console, " ".join(filter(None, (f"{'; '.join(killed)}.{more}", after_death))))
        return 1
    if not first:
        ended = "; ".join(f"worker {rank} ended with exit code {code}" for rank, code in enumerate(codes) if code)
        _show(console, f"{ended}. What it printed says why.")
        return max(codes)
    is_all = len(errors) == len(codes) and len({error["text"] for error in errors}) == 1
    _show(console, first[0]["text"] if is_all else f"worker {first[0]['rank']}: {first[0]['text']}")
    return int(first[0]["exit_code"])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _show(console: Console, text: str) -> None:
    console.print(f"[red]Error:[/] {escape(text)}")


# -------------------------------------------------------------------------------------------------------- in a worker
def stop_with_launcher(environment: Mapping[str, str]) -> None:
    """Makes a worker stop, with a checkpoint, when its launcher is gone. Does nothing in a process that has none."""
    if ERROR_FILE not in environment:
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def leave_error(error: BaseException, environment: Mapping[str, str]) -> bool:
    """Leaves what ended a worker for its launcher to show; returns whether there is one."""
    path = environment.get(ERROR_FILE)
    if path is None:
        return False
    value: dict[str, Any] = {
        "rank": int(environment["RANK"]),
        "time": time.time(),
        "text": error.shown if isinstance(error, EmbedshardError) else "".join(traceback.format_exception(error)),
        "exit_code": error.exit_code if isinstance(error, EmbedshardError) else 1,
        "lost_a_peer": isinstance(error, PeerError),
    }
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.rename(path)
    return True
