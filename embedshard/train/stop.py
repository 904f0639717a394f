"""Asking a run to stop, or to save: whoever asks sets a flag, the loop agrees on it with all ranks."""

from __future__ import annotations

__all__ = ["Notices", "StopSignal"]

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Notices:
    """What this process was asked from outside. Entered while the loop runs; as it is, nothing is ever asked.

    Attributes:
        stop: who or what asked the run to save and stop, if anything did.
        save: whether a checkpoint is wanted soon, since this machine may be gone. The loop sets it back.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        self.save = False

    def __enter__(self) -> Notices:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class StopSignal(Notices):
    """Listens for SIGTERM and SIGINT; a second SIGINT interrupts at once.

    In a thread that is not the main one nothing can be listened to, and nothing is: whoever runs the loop there asks
    in another way.
    """

    def __init__(self) -> None:
        super().__init__()
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
        if self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number).name
