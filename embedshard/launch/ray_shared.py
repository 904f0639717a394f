"""What the driver hands to processes of Ray, in a file of its own: the board, and where a worker begins.

Each process imports the module of what it is handed: beside the launcher, that would be torch and TorchRec, some 6 s of a
core, in the board's actor and in Ray Train's controller, which do no tensor work.
"""

from __future__ import annotations

__all__ = ["Board", "begin_work"]

from typing import Any


class Board:
    """What the driver and the workers tell each other. An actor."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._failure: dict[str, Any] | None = None
        self._result: dict[str, Any] | None = None
        self._stop: str | None = None

    def tell(self, events: list[tuple[str, tuple[Any, ...]]]) -> None:
        """Keeps what a worker tells a person."""
        self._events += events

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Returns what was told since the last time."""
        events, self._events = self._events, []
        return events

    def fail(self, failure: dict[str, Any]) -> None:
        """Keeps the first failure."""
        self._failure = self._failure or failure

    def failure(self) -> dict[str, Any] | None:
        """Returns the first failure: its text and exit code."""
        return self._failure

    def finish(self, result: dict[str, Any]) -> None:
        """Keeps the result."""
        self._result = result

    def result(self) -> dict[str, Any] | None:
        """Returns the result."""
        return self._result

    def ask_to_stop(self, by: str) -> None:
        """Keeps the name of the signal that asks the workers to stop."""
        self._stop = by

    def stop_asked(self) -> str | None:
        """Returns the name of that signal."""
        return self._stop


def begin_work(work: dict[str, Any]) -> None:
    """What each worker of Ray Train does, at each start; see `work_on_ray`."""
    from embedshard.launch.ray import work_on_ray

    work_on_ray(work)
