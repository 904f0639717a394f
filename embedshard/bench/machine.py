"""What the machine allows, and what it is: memory copied, random rows read, matrices multiplied, files written and read."""

from __future__ import annotations

__all__ = ["PlainRows", "copied_memory", "describe_machine", "matmul", "random_rows", "raw_files"]

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from embedshard import __version__
from embedshard.bench.measure import Measure, Timer
from embedshard.train.checkpoint_files import MAX_FILE_BYTES
from embedshard.world import usable_cores

_COPY_BYTES: Final = 128 * 2**20
_LEAST_TABLE_BYTES, _MOST_TABLE_BYTES = 64 * 2**20, 2**30
_MATMUL_SIZE: Final = {"cpu": 1024, "cuda": 8192}  # of a GPU's limit, a small product measures how it is launched
_PACKAGES: Final = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns what a figure depends on: the machine, its load, this process's share of it, versions, the date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    versions = {"embedshard": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "cores_allowed": len(usable_cores()),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def copied_memory(timer: Timer, device: torch.device) -> Measure:
    """Measures copying memory to memory; bytes count once."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = timer.alone(lambda: target.copy_(source))
    return Measure(
        "memory copy", f"{_COPY_BYTES // 2**20} MiB by torch", "B", _COPY_BYTES, seconds, peak_bytes=timer.peak_bytes,
        note="each byte is read once and written once, and counted once",
    )  # fmt: skip


class PlainRows:
    """Rows of one plain tensor, read and added to by torch: what lookups and updates of as many bytes are held against.

    Args:
        rows: numbers of rows for each pass, in turns; those beyond the tensor begin anew at its front.
        row_bytes: of a row; whole float32 numbers are taken.
        num_rows: of all tables; the tensor is as large, within bounds.
        device: where it lies.

    Attributes:
        columns: of float32.
        num_rows: of the tensor.
    """

    def __init__(self, rows: Sequence[torch.Tensor], row_bytes: float, num_rows: int, device: torch.device) -> None:
        self.columns = max(1, round(row_bytes / 4))
        most, least = (max(1, size // (4 * self.columns)) for size in (_MOST_TABLE_BYTES, _LEAST_TABLE_BYTES))
        self.num_rows = min(max(num_rows, least), most)
        self._rows = [(numbers % self.num_rows).to(device) for numbers in rows]
        self._table = torch.ones(self.num_rows, self.columns, device=device)
        self._values = torch.zeros(max(map(len, rows)), self.columns, device=device)
        self._turn = 0

    @property
    def work(self) -> float:
        """Bytes of a pass's rows, on average."""
        return 4.0 * self.columns * sum(map(len, self._rows)) / len(self._rows)

    @property
    def size_bytes(self) -> int:
        """Of the tensor."""
        return 4 * self.columns * self.num_rows

    def read(self) -> None:
        """Reads the rows once."""
        rows = self._next()
        torch.index_select(self._table, 0, rows, out=self._values[: len(rows)])

    def add(self) -> None:
        """Adds nothing to each of them: reads and writes it."""
        rows = self._next()
        self._table.index_add_(0, rows, self._values[: len(rows)])

    def _next(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._rows)
        return self._rows[self._turn]


def random_rows(timer: Timer, count: int, row_bytes: float, num_rows: int, device: torch.device) -> Measure:
    """Measures reading so many rows anywhere in a tensor as large as the tables; bytes of rows count once."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(max(num_rows, 1) << 20, (max(count, 1),), generator=generator) for _ in range(4)]
    rows = PlainRows(drawn, row_bytes, num_rows, device)
    what = (
        f"{count:,} rows of {4 * rows.columns} bytes anywhere in {rows.size_bytes / 2**20:,.0f} MiB, by torch.index_select"
    )
    return Measure("random rows", what, "B", rows.work, timer.alone(rows.read), peak_bytes=timer.peak_bytes)


class _Matmul:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size = _MATMUL_SIZE[device.type]
        self._a, self._b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty(size, size, device=device, dtype=dtype)
        self.work = 2.0 * size**3

    def __call__(self) -> None:
        torch.mm(self._a, self._b, out=self._out)


def matmul(device: torch.device, dtype: torch.dtype = torch.float32) -> _Matmul:
    """Returns a square product of matrices, with its `work` in floating-point operations."""
    return _Matmul(device, dtype)


class _RawFiles:
    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._content = os.urandom(min(size_bytes, MAX_FILE_BYTES))
        self._sizes = [min(MAX_FILE_BYTES, size_bytes - begin) for begin in range(0, size_bytes, MAX_FILE_BYTES)]
        folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        for path, size in self._paths():
            with path.open("wb") as file:
                file.write(memoryview(self._content)[:size])
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> None:
        for path, _ in self._paths():
            path.read_bytes()

    def _paths(self) -> list[tuple[Path, int]]:
        return [(self._folder / f"raw-{number}", size) for number, size in enumerate(self._sizes)]


def raw_files(folder: Path, size_bytes: int) -> _RawFiles:
    """Returns what writes and reads so many bytes as plain files, synced to the disk when written."""
    return _RawFiles(folder, size_bytes)
