"""Threads that do jobs side by side; of one thread, the caller does them itself, one after the other."""

from __future__ import annotations

__all__ = ["Crew"]

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


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
        under_way: list[Future[None]] = []
        try:
            for job in jobs:
                under_way.append(self._submit(job))
            wait(under_way, return_when=FIRST_EXCEPTION)
        finally:
            failed = [place for place, one in enumerate(under_way) if one.done() and one.exception() is not None]
            for one in under_way[min(failed, default=0) :]:  # an earlier one has begun, and may fail yet
                one.cancel()
            wait(under_way)
        for one in under_way:
            one.result()

    def in_order(self, jobs: Iterable[Callable[[], Iterator[_T]]]) -> Generator[_T]:
        """Yields what jobs yield, in their order. Each thread does a job to its end; no more of them are held than threads.

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
                under_way.append(self._submit(partial(_whole, job)))
            while under_way:
                yield from under_way.popleft().result()
        finally:
            for one in under_way:
                one.cancel()
            wait(under_way)

    def close(self) -> None:
        """Ends the threads; others start with the next job."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit(self, job: Callable[[], _R]) -> Future[_R]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.size, self._name)
        try:
            return self._pool.submit(job)
        except BaseException:
            self.close()  # where a thread cannot be started the job is with the others all the same
            raise


def _whole(job: Callable[[], Iterator[_T]]) -> list[_T]:
    return list(job())
