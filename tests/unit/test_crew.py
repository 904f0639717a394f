"""Threads that do jobs side by side: all are over when it says so, and of several errors the first is raised."""

import threading
import time
from functools import partial

import pytest

from embedshard.data.crew import Crew


def names():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("crew")]


@pytest.fixture(params=[1, 3])
def crew(request):
    crew = Crew(request.param, "crew")
    yield crew
    crew.close()
    assert not names()


def test_all_jobs_are_done_and_again_after_it_was_closed(crew):
    for turn in range(2):
        done = []
        crew.run([partial(done.append, number) for number in range(20)])
        assert sorted(done) == list(range(20)), turn
        assert len(names()) == (0 if crew.size == 1 else crew.size)
        crew.close()


def test_jobs_that_yield_are_in_order(crew):
    def job(number):
        time.sleep(0.003 * (number % 3 == 0))
        yield from (number, -number)

    found = list(crew.in_order(lambda number=number: job(number) for number in range(12)))
    assert found == [sign * number for number in range(12) for sign in (1, -1)]


def test_of_several_errors_the_first_is_raised_when_all_is_over(crew):
    running, fails = set(), threading.Event()

    def job(number):
        running.add(number)
        if number == 1 and crew.size > 1:
            fails.wait(10)  # after the later one
        time.sleep(0.02 * (number == 0))
        running.discard(number)
        if number in (1, 2):
            fails.set()
            raise ValueError(f"job {number}")

    with pytest.raises(ValueError, match="job 1"):
        crew.run([lambda number=number: job(number) for number in range(50)])
    assert not running

    def yields(number):
        job(number)
        yield number

    fails.clear()
    found = []
    with pytest.raises(ValueError, match="job 1"):
        found.extend(crew.in_order(lambda number=number: yields(number) for number in range(50)))
    assert not running


def test_leaving_early_waits_for_what_has_begun(crew):
    running, begun = set(), []

    def job(number):
        running.add(number)
        begun.append(number)
        time.sleep(0.01)
        running.discard(number)
        yield number

    items = crew.in_order(lambda number=number: job(number) for number in range(100))
    assert next(items) == 0
    items.close()
    assert not running
    assert len(begun) <= crew.size + 1


def test_a_thread_that_cannot_be_started_leaves_none_working(monkeypatch):
    crew, over, started = Crew(3, "crew"), [], threading.Thread.start

    def start(thread):
        if len(names()) == 2:
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)

    def job():
        time.sleep(0.02)
        over.append(1)

    with pytest.raises(RuntimeError, match="can't start"):
        crew.run([job] * 10)
    count = len(over)
    time.sleep(0.1)
    assert len(over) == count
    monkeypatch.undo()
    crew.close()
    assert not names()
