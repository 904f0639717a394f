"""Counts the bytes that are asked of file systems."""

from __future__ import annotations

__all__ = ["ByteCount"]

import threading


class ByteCount:
    """A sum to which several threads add.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """Adds bytes that are about to be read."""
        with self._lock:
            self.total += num_bytes
