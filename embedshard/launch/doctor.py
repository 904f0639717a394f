"""Looks at this machine and names the fix for what is wrong."""

from __future__ import annotations

__all__ = ["Finding", "examine"]

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedshard.world import usable_cores

_OLDEST_PYTHON = (3, 11)
_FREE_DISK_BYTES = 10 * 1024**3
_FREE_MEMORY_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: `ok`, `note` (works, but know it) or `wrong`.
        found: what is there.
        fix: what to do; empty where nothing is to be done.
    """

    what: str
    state: Literal["ok", "note", "wrong"]
    found: str
    fix: str = ""


def examine(environment: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """Yields findings, cheap ones first.

    Args:
        environment: of the process.
        folder: where runs are to be written.
    """
    yield _python()
    yield from _triple()
    yield from _cuda()
    yield from _cores(environment)
    yield _memory()
    yield _disk(folder)
    yield _ray()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = platform.python_version()
    if tuple(sys.version_info[:2]) < _OLDEST_PYTHON:
        return Finding("Python", "wrong", version, "Install Python 3.11 or later and make the environment anew.")
    return Finding("Python", "ok", f"{version}, {platform.machine()}")


def _triple() -> Iterator[Finding]:
    torch, torchrec = _version("torch"), _version("torchrec")
    builds = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly") if _version(name)]
    reinstall = "Make the environment anew with 'make setup' (CPU), or as the README's section on GPUs says."
    for name, version in (("torch", torch), ("torchrec", torchrec)):
        if version is None:
            yield Finding(name, "wrong", "not installed", reinstall)
    if not builds:
        yield Finding("fbgemm-gpu", "wrong", "not installed", reinstall)
    if torch is None or torchrec is None or not builds:
        return
    if len(builds) > 1:
        yield Finding(
            "fbgemm-gpu",
            "wrong",
            " and ".join(builds) + " are installed into one folder and break each other",
            f"pip uninstall -y {' '.join(builds)}, then install one of them. {reinstall}",
        )
        return
    fbgemm = _version(builds[0]) or ""
    shown = f"torch {torch}, torchrec {torchrec}, {builds[0]} {fbgemm}"
    numbers = [re.match(r"(\d+)\.(\d+)", version) for version in (torch, torchrec, fbgemm)]
    minors = [int(number.group(2)) if number else -1 for number in numbers]
    if not (minors[1] == minors[2] and minors[0] == minors[1] + 5):
        want = f"torch 2.{minors[1] + 5} goes with torchrec and fbgemm-gpu 1.{minors[1]}"
        yield Finding("release triple", "wrong", shown, f"{want} (the rule: 2.(n+5) with 1.n). {reinstall}")
        return
    try:
        importlib.import_module("fbgemm_gpu")
        importlib.import_module("torchrec")
    except Exception as error:
        yield Finding("release triple", "wrong", f"{shown}: does not load: {error}", reinstall)
        return
    yield Finding("release triple", "ok", f"{shown}: they match and load")


def _cuda() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception:
        return
    if torch.version.cuda is None:
        yield Finding("CUDA", "ok", "this torch is a CPU build; training runs on the CPU")
    elif not torch.cuda.is_available():
        yield Finding(
            "CUDA",
            "note",
            f"torch is built for CUDA {torch.version.cuda}, but no device is visible",
            "Install the driver or set CUDA_VISIBLE_DEVICES if there is a GPU; else training runs on the CPU.",
        )
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("CUDA", "ok", f"{torch.version.cuda}: {names}")


def _cores(environment: Mapping[str, str]) -> Iterator[Finding]:
    usable = len(usable_cores())
    yield Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}")
    policy = environment.get("OMP_WAIT_POLICY", "")
    threads = environment.get("OMP_NUM_THREADS")
    shown = f"OMP_WAIT_POLICY={policy or 'not set'}, OMP_NUM_THREADS={threads or 'not set'}"
    if policy.upper() != "PASSIVE":
        yield Finding(
            "OpenMP",
            "wrong",
            shown,
            "Unset OMP_WAIT_POLICY, for embedshard then sets it to PASSIVE: threads that spin make small kernels "
            "up to 80 times slower when another process wants their core.",
        )
    elif threads is not None and threads.isdigit() and int(threads) > usable:
        yield Finding("OpenMP", "wrong", shown, f"Set OMP_NUM_THREADS to at most {usable}, or unset it.")
    else:
        yield Finding("OpenMP", "ok", shown)


def _memory() -> Finding:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return Finding("memory", "note", "unknown on this system")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    shown = f"{free / 1024**3:.1f} GiB free of {total / 1024**3:.1f}"
    if free < _FREE_MEMORY_BYTES:
        return Finding("memory", "wrong", shown, "Free some: tables, optimizer state and the cache live in memory.")
    return Finding("memory", "ok", shown)


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    shown = f"{usage.free / 1024**3:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "wrong", f"{existing} cannot be written", "Choose another folder with --run-dir.")
    if usage.free < _FREE_DISK_BYTES:
        return Finding("disk", "note", shown, "Checkpoints may need more: choose another folder with --run-dir.")
    return Finding("disk", "ok", shown)


def _ray() -> Finding:
    version = _version("ray")
    if version is None:
        return Finding("Ray", "ok", "not installed; training in this process needs none")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number and (int(number.group(1)), int(number.group(2))) < (2, 56):
        return Finding("Ray", "wrong", version, "Upgrade to 2.56 or later: earlier ones have known holes (CVE-2026-57516).")
    return Finding("Ray", "ok", version)
