"""Puts what benchmarks measured between marks of a Markdown file: each part has its own, with machine, day and versions."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "ray", "numba")


def machine() -> str:
    """Returns the machine, the day and the versions in a line."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpus = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    names = []
    for package in PACKAGES:
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = "/".join(f"{value:.0f}" for value in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {cpu.group(1).strip() if cpu else platform.machine()}, {os.cpu_count()} cores"
        f"{gpus}, load {load} at the end, Python {platform.python_version()}, {', '.join(names)}."
    )


def check_marks(file: Path, parts: Iterable[str]) -> None:
    """Ends the program if a file lacks the marks of a part: before hours of measuring, not after them."""
    text = file.read_text()
    for part in parts:
        begin, end = _marks(part)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise SystemExit(
                f"{file} has no place for '{part}': give it the lines {begin} and {end}, once each, in this order."
            )


def put(file: Path, part: str, text: str) -> None:
    """Replaces what is between the marks of a part; all else stays as it is.

    Args:
        file: the Markdown.
        part: whose marks.
        text: what comes between them.
    """
    check_marks(file, [part])
    begin, end = _marks(part)
    whole = file.read_text()
    before, after = whole.split(begin)[0], whole.split(end)[1]
    tidy = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines()))
    file.write_text(f"{before}{begin}\n{tidy}\n{end}{after}")


def _marks(part: str) -> tuple[str, str]:
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
