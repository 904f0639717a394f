"""Rows that wait for their window: what is put down is what is taken, from memory as from a file."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedshard.data.columns import Flat, Ragged
from embedshard.data.shelf import Piece, Shelf, own_copy
from embedshard.errors import DataError

TYPES = {"id": np.dtype(np.int16), "list": np.dtype(np.int8)}


def piece(lane, first, size, seed):
    generator = np.random.default_rng(seed)
    offsets = 5 + np.append(0, np.cumsum(generator.integers(0, 4, size)))
    return Piece(
        lane,
        first,
        {
            "id": Flat(generator.integers(-1, 30_000, size)),
            "number": Flat(generator.random(size, dtype=np.float32)),
            "list": Ragged(
                generator.integers(-1, 128, offsets[-1] + 3), offsets, generator.random(offsets[-1] + 3).astype("f4")
            ),
        },
    )


def copied(one):
    columns = {name: own_copy(column, TYPES.get(name, column.values.dtype)) for name, column in one.columns.items()}
    return Piece(one.lane, one.first, columns)


def assert_same(found, put):
    assert (found.lane, found.first) == (put.lane, put.first)
    assert (found.columns["id"].values == put.columns["id"].values).all()
    assert (found.columns["number"].values == put.columns["number"].values).all()
    a, b = found.columns["list"], put.columns["list"]
    assert a.offsets[0] == 0
    assert (np.diff(a.offsets) == np.diff(b.offsets)).all()
    span = slice(b.offsets[0], b.offsets[-1])
    assert (a.values == b.values[span]).all()
    assert (a.weights == b.weights[span]).all()


def taken(shelf, window):
    return list(iter(lambda: shelf.take(window), None))


@pytest.mark.parametrize("limit_bytes", [0, 3_000, 10**9])
def test_what_is_put_down_is_what_is_taken(limit_bytes, monkeypatch):
    monkeypatch.setattr("embedshard.data.shelf._FILE_BYTES", 4_000)  # several files
    shelf, put = Shelf(limit_bytes), {window: [] for window in range(3)}
    for number in range(30):
        window = number % 3
        put[window].append(piece(number % 4, 100 * number, number * 7 % 50, number))
        shelf.put(window, copied(put[window][-1]))
    assert (shelf.written_bytes == 0) == (limit_bytes == 10**9)
    assert shelf.held_bytes <= limit_bytes
    for window, pieces in put.items():
        found = sorted(taken(shelf, window), key=lambda one: one.first)
        assert len(found) == len(pieces)
        for a, b in zip(found, pieces, strict=True):
            assert_same(a, b)
            assert a.columns["id"].values.dtype == np.int16
            assert a.columns["list"].values.dtype == np.int8
    assert shelf.held_bytes == 0
    assert shelf.take(0) is None


def test_files_are_closed_when_their_pieces_are_taken(monkeypatch):
    monkeypatch.setattr("embedshard.data.shelf._FILE_BYTES", 1)
    before, shelf = len(os.listdir("/proc/self/fd")), Shelf(0)
    for window in range(5):
        shelf.put(window, copied(piece(0, 0, 40, window)))
    assert len(os.listdir("/proc/self/fd")) == before + 5
    for window in range(4):
        taken(shelf, window)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    shelf.clear()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("limit_bytes", [0, 20_000])
def test_threads_put_down_and_take(limit_bytes, monkeypatch):
    monkeypatch.setattr("embedshard.data.shelf._FILE_BYTES", 10_000)
    shelf, pieces = Shelf(limit_bytes), [piece(0, number, 1 + number * 7 % 50, number) for number in range(200)]
    met, per_window = [], 40

    def put_and_take(own):
        for window in range(5):
            for one in pieces[window * per_window + own : (window + 1) * per_window : 4]:
                shelf.put(window, copied(one))
            while window and (found := shelf.take(window - 1)) is not None:
                met.append(found)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_take, range(4)))
    met += [one for window in range(5) for one in taken(shelf, window)]
    assert len(met) == len(pieces)
    for found in met:
        assert_same(found, pieces[found.first])
    assert shelf.held_bytes == 0


def test_a_file_of_which_all_is_taken_begins_anew():
    shelf = Shelf(0)
    for window in range(4):
        put = piece(0, 0, 1_000, window)
        shelf.put(window, copied(put))
        assert_same(shelf.take(window), put)
    assert 0 < os.fstat(shelf._file.handle.fileno()).st_size < shelf.written_bytes / 2
    shelf.clear()


@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_a_copy_shares_no_memory(dtype):
    one = piece(0, 0, 20, 1)
    for name in ("id", "list"):
        column = Flat(one.columns[name].values) if name == "id" else one.columns[name]
        found = own_copy(column, np.dtype(dtype))
        assert found.values.dtype == dtype
        assert not np.shares_memory(found.values, column.values)


def test_a_full_disk_is_told(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115 - the shelf's
    with pytest.raises(DataError, match=r"has no room for rows .* Set TMPDIR .* data.cache_bytes higher \(10\)"):
        Shelf(10).put(0, copied(piece(0, 0, 5_000, 1)))
