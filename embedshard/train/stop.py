"""Asking a run to stop: a signal sets a flag, the loop agrees on it and saves."""

from __future__ import annotations

__all__ = ["StopSignal"]

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Listens for SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once.

    In a thread that is not the main one nothing can be listened to, and nothing is: whoever runs the loop there asks
    in another way.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
