"""A window that several threads fill: whatever comes first, each row is in its place."""

import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

from embedshard.data.columns import Buffers, Flat, Ragged
from embedshard.data.order import Order
from embedshard.data.window import Window

LANES, ROWS, STEPS = 8, 8 * 600 - 3, 75


@pytest.fixture(autouse=True)
def threads_change_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def lengths_of(rows):
    """From nothing to many, so that memory for what came first is too little for what comes later."""
    return np.where(rows % 600 < 300, rows % 2, 40 + rows % 90)


def columns_of(first, count):
    rows = np.arange(first, first + count)
    lengths = lengths_of(rows)
    values = np.repeat(rows, lengths)
    offsets = np.append(0, np.cumsum(lengths))
    places = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    return {
        "row": Flat(rows),
        "number": Flat(rows.astype(np.float32)),
        "list": Ragged(values, offsets),
        "weighted": Ragged(values + places, offsets, (values * 0.5).astype(np.float32)),
    }


@pytest.mark.parametrize("window_steps", [0, 30])
def test_rows_that_several_threads_put_in_are_all_there(window_steps):
    epoch = Order(7, LANES, 8 * LANES, (window_steps,), ((ROWS,),)).epoch_order(0, 0)
    buffers = Buffers()
    for _ in range(3):  # in new memory, and in memory that is there
        for number in range(-(-epoch.num_steps // epoch.window_steps)):
            window = Window(epoch, number, (0, LANES), {"row": np.dtype(np.int16)}, buffers)
            pieces = []
            for lane in range(LANES):
                begin, end = epoch.window_rows(lane, number)
                edges = np.linspace(begin, end, 6).astype(int).tolist()
                pieces += [(lane, first, last - first) for first, last in pairwise(edges)]
            pieces = [pieces[place] for place in np.random.default_rng(number).permutation(len(pieces))]
            start = threading.Barrier(6)

            def fill(own, window=window, pieces=pieces, start=start):
                start.wait()
                for lane, first, count in pieces[own::6]:
                    spot = window.spot(lane, first, count)
                    for name, column in columns_of(first, count).items():
                        spot.put(name, column)

            threads = [threading.Thread(target=fill, args=(own,)) for own in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            window.finish({})
            columns = window.columns(0, epoch.steps(number), Buffers())
            expected = epoch.rows(number, (0, LANES)).ravel()
            assert columns["row"].values.dtype == np.int16
            assert (columns["row"].values == expected).all()
            assert (columns["number"].values == np.where(expected < 0, 0, expected)).all()
            lengths = np.where(expected < 0, 0, lengths_of(expected))
            for name in ("list", "weighted"):
                column = columns[name]
                assert (np.diff(column.offsets) == lengths).all()
                values = column.values[column.offsets[0] : column.offsets[-1]]
                owners = np.repeat(expected, lengths)
                places = np.arange(len(owners)) - np.repeat(np.append(0, np.cumsum(lengths))[:-1], lengths)
                assert (values == owners + (places if name == "weighted" else 0)).all()
                if name == "weighted":
                    assert (column.weights[: len(owners)] == owners * np.float32(0.5)).all()
