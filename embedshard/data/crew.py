"""Threads that do jobs side by side; of one thread, the caller does them itself, one after the other."""

from __future__ import annotations

__all__ = ["Crew"]

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

_T = TypeVar("_T")


class Crew:
    """Some threads, which start with the first job.

    Jobs are begun in the order in which they are given. Of several that fail, the first one's error is raised, so that it is
    the same however many threads there are.

    Args:
        size: threads.
        name: of the threads.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size, self._name = size, name
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Does jobs; none of them runs any more when this returns or raises what one has raised."""
        if self.size == 1:
            for job in jobs:
                job()
            return
        under_way = [self._threads().submit(job) for job in jobs]
        wait(under_way, return_when=FIRST_EXCEPTION)
        _finish(under_way)

    def in_order(self, jobs: Iterable[Callable[[], Iterator[_T]]]) -> Iterator[_T]:
        """Yields what jobs yield, in their order. Threads do as many at once as they are, each to its end.

        None of them runs any more when this ends, however it does.
        """
        if self.size == 1:
            for job in jobs:
                yield from job()
            return
        under_way: deque[Future[list[_T]]] = deque()
        try:
            for job in jobs:
                if len(under_way) == self.size:
                    yield from under_way.popleft().result()
                under_way.append(self._threads().submit(_whole, job))
            while under_way:
                yield from under_way.popleft().result()
        finally:
            for one in under_way:
                one.cancel()
            wait(under_way)

    def close(self) -> None:
        """Ends the threads; others start with the next job."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.size, self._name)
        return self._pool


def _whole(job: Callable[[], Iterator[_T]]) -> list[_T]:
    return list(job())


def _finish(jobs: list[Future[None]]) -> None:
    """Waits for those that have begun, of which an earlier one may fail yet, and raises the first error."""
    for job in jobs:
        job.cancel()
    wait(jobs)
    for job in jobs:
        if not job.cancelled():
            job.result()
