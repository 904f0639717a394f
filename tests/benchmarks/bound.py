"""Runs the programs of a benchmark: each a process bound to some cores, with one thread for each library that asks."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1_200
VARIABLES = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "RAY_DEDUP_LOGS": "0"}


@dataclass(frozen=True)
class Ended:
    """What came of a program.

    Attributes:
        text: what it printed.
        seconds: until it ended, or until what it was to reach.
        memory: the greatest resident bytes of the process, or of it and all below it where they were counted.
    """

    text: str
    seconds: float
    memory: int


def finished(
    command: Sequence[object],
    cpus: Iterable[int],
    *,
    until: Path | None = None,
    counts_children: bool = False,
    **environment: str,
) -> Ended:
    """Runs a command to its end, LIMIT_S seconds at most.

    Args:
        command: it, and its arguments.
        cpus: the cores that it is bound to.
        until: a file: the seconds are those until it has something in it.
        counts_children: whether memory is that of all its processes, which are looked at now and then; shared pages count
            for each.
        environment: variables, beside this process's own.
    """
    words, bound = [str(part) for part in command], set(cpus)
    begin, reached, most = time.monotonic(), None, 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=errors,
            env={**os.environ, **VARIABLES, **environment},
            preexec_fn=lambda: os.sched_setaffinity(0, bound),
        )
        watched = os.pidfd_open(process.pid)
        often = 0.01 if until is not None else 0.05 if counts_children else LIMIT_S
        while not select.select([watched], [], [], often)[0]:
            if counts_children:
                most = max(most, _resident(process.pid))
            if reached is None and until is not None and until.exists() and until.stat().st_size:
                reached = time.monotonic() - begin
            if time.monotonic() - begin > LIMIT_S:
                process.kill()
        os.close(watched)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text, said = output.read(), errors.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{said[-2000:]}")
    return Ended(text, seconds if reached is None else reached, most if counts_children else usage.ru_maxrss * 1024)


def _resident(pid: int) -> int:
    """Returns the resident bytes of a process and all below it, shared pages counted for each."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_resident(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        pass
    return total
