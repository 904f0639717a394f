"""The record of which rows were trained, from which `audit` can prove that each was trained exactly once an epoch.

A line covers a range of steps of one pass over one partition on one rank, and holds an order-free sum of hashes of the
row numbers. Lines end at checkpoints, so the work that a restart rolls back can be told from the work that counts.
"""

from __future__ import annotations

__all__ = ["Ledger"]

import json
import os
from pathlib import Path

import numpy as np

from embedshard.data.batch import Batch
from embedshard.data.order import row_digest


class Ledger:
    """One rank's ledger of one attempt.

    Args:
        folder: `ledger/` of the run directory.
        attempt: which start of the run this is.
        rank: this process's.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{attempt:04d}-{rank:05d}.jsonl").open("a", encoding="utf-8")
        self._key: tuple[int, int] | None = None
        self._clear()

    def _clear(self) -> None:
        self._first_step = self._last_step = -1
        self._rows = self._weightless_rows = 0
        self._digest: tuple[int, ...] = (0, 0)

    def add(self, batch: Batch) -> None:
        """Counts a batch whose optimizer step was done."""
        position = batch.training_position
        key = (position.epoch, position.partition)
        if key != self._key:
            self.flush()
            self._key = key
        if self._first_step < 0:
            self._first_step = position.step
        self._last_step = position.step
        rows = batch.rows.numpy()
        digest = row_digest(*key, rows)
        self._digest = tuple((a + b) % 2**64 for a, b in zip(self._digest, digest, strict=True))
        valid = rows >= 0
        self._rows += int(valid.sum())
        self._weightless_rows += int(np.count_nonzero(valid & (batch.weights.cpu().numpy() == 0)))

    def flush(self) -> None:
        """Writes what was counted since the last line, to the disk."""
        if self._key is None or self._first_step < 0:
            return
        line = {
            "epoch": self._key[0],
            "partition": self._key[1],
            "first_step": self._first_step,
            "last_step": self._last_step,
            "rows": self._rows,
            "weightless_rows": self._weightless_rows,
            "digest": "".join(f"{word:016x}" for word in self._digest),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._clear()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self.flush()
        self._file.close()
