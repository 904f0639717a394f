"""Windows of streamed data: each row group is decoded once a pass, and what waits for its turn is held within bounds."""

import threading
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config, table_specs
from embedshard.data import reader as reader_module
from embedshard.data import windows
from embedshard.data.collate import Collator
from embedshard.data.dataset import open_dataset
from embedshard.data.reader import BatchReader
from embedshard.data.shelf import Shelf
from embedshard.data.source import Source
from embedshard.data.window import Window
from embedshard.errors import DataError
from embedshard.world import open_world

ROWS = 40_000


@pytest.fixture(scope="module", params=[1_000, 7_777, ROWS], ids=lambda rows: f"row_groups_of_{rows}")
def data(request, tmp_path_factory):
    """Rows whose columns all tell their number, in row groups that a lane has several of, or that several lanes share."""
    folder, numbers = tmp_path_factory.mktemp("windows"), np.arange(ROWS)
    lists = pa.ListArray.from_arrays(
        pa.array(np.append(0, np.cumsum(numbers % 7)), pa.int32()), np.repeat(numbers, numbers % 7)
    )
    table = pa.table({"user": numbers, "items": lists, "age": numbers.astype("f4"), "label": (numbers % 2).astype("f4")})
    pq.write_table(table, folder / "part.parquet", row_group_size=request.param)
    return folder


def open_reader(data, cache_bytes, rank=0, world_size=1, batch=512, is_cached=False, threads=1, **changes):
    tree = {
        "name": "windows",
        "data": {"train": f"{data}/*.parquet", "label": "label", "lanes": 16, "cache_bytes": cache_bytes, **changes},
        "features": {
            "user": {"kind": "id", "table": "user"},
            "items": {"kind": "bag", "table": "item"},
            "age": {"kind": "dense"},
        },
        "tables": {"user": {"rows": ROWS, "dim": 4}, "item": {"rows": ROWS, "dim": 4}},
        "model": {"kind": "dlrm", "dense_mlp": [4], "mlp": [4]},
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": batch},
    }
    config = build_config(tree, {}, "test")
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, None)
    collator = Collator(config, table_specs(config, dataset.table_rows))
    return dataset, BatchReader(
        dataset.order, dataset.train, [is_cached], cache_bytes, collator, dataset.sampler, rank, world_size, threads=threads
    )


def check(batches):
    """Returns the numbers of the rows; each is in all columns of its row, and steps follow each other."""
    met, step = [], None
    for batch in batches:
        assert step is None or batch.position.step == step + 1
        step = batch.position.step
        rows = batch.rows.numpy()
        real = rows[rows >= 0]
        sparse, weighted = batch.sparse["user"], batch.weighted["items"]
        assert sparse.values().tolist() == real.tolist()
        assert weighted.values().tolist() == np.repeat(real, real % 7).tolist()
        assert batch.dense[:, 0].numpy()[rows >= 0].tolist() == real.tolist()
        met.append(rows)
    return met


@pytest.mark.parametrize("cache_bytes", [0, 300_000, 2**30])
@pytest.mark.parametrize(("window_steps", "order_rows"), [(1, 65_536), (10, 2_000), ("auto", 2_000), ("auto", 65_536)])
def test_each_row_group_is_read_once_a_pass(data, cache_bytes, window_steps, order_rows, monkeypatch):
    monkeypatch.setattr(reader_module, "_ROWS_AT_ONCE", order_rows)
    dataset, reader = open_reader(data, cache_bytes, window_steps=window_steps)
    steps = dataset.order.epoch_steps
    with reader.batches(0, 2 * steps) as batches:
        rows = np.stack(check(batches))
    expected = [
        dataset.order.epoch_order(epoch, 0).dataset_rows(dataset.order.epoch_order(epoch, 0).rows(window, (0, 16)))
        for epoch in range(2)
        for window in range(-(-steps // dataset.order.epoch_order(0, 0).window_steps))
    ]
    assert (rows == np.concatenate(expected)).all()
    footer = pq.ParquetFile(next(data.glob("*.parquet"))).metadata
    once = sum(
        footer.row_group(group).column(column).total_compressed_size
        for group in range(footer.num_row_groups)
        for column in range(footer.num_columns)
    )
    assert dataset.train[0].byte_count.total == 2 * once


def test_ranks_read_what_they_train_and_no_row_group_twice(data):
    whole = open_reader(data, 0, window_steps=10)
    with whole[1].batches(0, whole[0].order.epoch_steps) as batches:
        rows = np.stack(check(batches))
    parts = []
    for rank in range(4):
        dataset, reader = open_reader(data, 0, rank, 4, window_steps=10)
        with reader.batches(0, dataset.order.epoch_steps) as batches:
            parts.append(np.stack(check(batches)))
    assert (np.concatenate(parts, axis=1) == rows).all()


def test_a_window_without_a_row_of_a_rank_has_all_columns(data, tmp_path):
    """961 rows in 16 lanes: the sixteenth step has a row of one lane, which is the other rank's for one of two."""
    pq.write_table(pq.read_table(data).slice(0, 961), tmp_path / "part.parquet", row_group_size=90)
    found = []
    for rank in range(2):
        dataset, reader = open_reader(tmp_path, 0, rank, 2, window_steps=1, batch=64)
        with reader.batches(0, 2 * dataset.order.epoch_steps) as batches:
            found.append(np.stack(check(batches)))
    assert any((rows < 0).all() for rows in np.concatenate(found))
    epochs = np.concatenate(found, axis=1).reshape(2, -1)
    assert [sorted(epoch[epoch >= 0].tolist()) for epoch in epochs] == [list(range(961))] * 2


def test_what_waits_is_held_within_the_limit_and_let_go(data, monkeypatch):
    shelves, held = [], []

    class Watched(Shelf):
        def put(self, *given):
            super().put(*given)
            held.append(self.held_bytes)

    monkeypatch.setattr(windows, "Shelf", lambda limit: shelves.append(Watched(limit)) or shelves[-1])
    dataset, reader = open_reader(data, 200_000, window_steps=10)
    with reader.batches(0, dataset.order.epoch_steps) as batches:
        check(batches)
    assert 0 < max(held) <= 200_000
    assert shelves[0].written_bytes > 0
    assert shelves[0].held_bytes == 0


def test_rows_of_the_second_window_need_not_wait(data, monkeypatch):
    def put(*given):
        raise AssertionError("what is trained in the first two windows has a place")

    monkeypatch.setattr(Shelf, "put", put)
    dataset, reader = open_reader(data, 0, window_steps=40)
    steps = dataset.order.epoch_steps
    assert 40 < steps <= 80
    with reader.batches(0, steps) as batches:
        rows = np.stack(check(batches))
    assert sorted(rows[rows >= 0].tolist()) == list(range(ROWS))


@pytest.mark.parametrize(("window_steps", "is_ahead"), [(30, True), (40, True), (80, False)])
def test_an_epochs_first_window_is_read_while_the_last_of_the_one_before_is_trained(
    data, window_steps, is_ahead, monkeypatch
):
    read, threads = windows.Windows._read, {}

    def read_here(self, epoch, window, *more, **others):
        threads[(epoch, window)] = threading.current_thread().name
        return read(self, epoch, window, *more, **others)

    monkeypatch.setattr(windows.Windows, "_read", read_here)
    dataset, reader = open_reader(data, 0, window_steps=window_steps)
    steps = dataset.order.epoch_steps
    assert 60 < steps <= 80, "three windows, two, and one"
    with reader.batches(5, 3 * steps) as batches:
        rows = check(batches)
    epochs = np.stack(rows[steps - 5 :]).reshape(2, -1)
    assert [sorted(epoch[epoch >= 0].tolist()) for epoch in epochs] == [list(range(ROWS))] * 2
    count = -(-steps // window_steps)
    assert len(threads) == 3 * count, "no window is read twice, and none of a fourth epoch"
    first, *others = list(threads.values())
    assert first == "embedshard-reader"
    if is_ahead:
        assert set(others) == {"embedshard-windows"}
    else:
        assert set(others) == {"embedshard-reader"}, "one window is a whole epoch: two would take twice the memory"


@pytest.mark.parametrize(("is_cached", "whole_rows"), [(False, 2**17), (False, 500), (True, 2**17)])
@pytest.mark.parametrize("cache_bytes", [0, 300_000])
@pytest.mark.parametrize("batch", [512, 48])
def test_threads_change_nothing(data, is_cached, whole_rows, cache_bytes, batch, monkeypatch):
    """By columns, as a stream, and all at once; what waits in memory and in files; a batch for each thread, and several."""
    monkeypatch.setattr(windows, "_WHOLE_ROWS", whole_rows)
    monkeypatch.setattr(windows, "_DECODE_ROWS", 500)
    monkeypatch.setattr(windows, "_LANE_ROWS", 200)
    monkeypatch.setattr(reader_module, "_ROWS_AT_ONCE", 512)
    rows, threads_met = [], set()

    def met_in(function):
        def wrapped(self, *given):
            threads_met.add((function.__name__, threading.current_thread().name.rsplit("_", 1)[0]))
            return function(self, *given)

        return wrapped

    monkeypatch.setattr(Window, "spot", met_in(Window.spot))
    monkeypatch.setattr(Collator, "batch", met_in(Collator.batch))
    for threads in (1, 4):
        threads_met.clear()
        dataset, reader = open_reader(data, cache_bytes, is_cached=is_cached, threads=threads, batch=batch, window_steps=10)
        with reader.batches(2, 2 * dataset.order.epoch_steps) as batches:
            first = next(batches)
            assert first.position.step == 2
            rows.append(np.stack(check([first, *batches])))
    assert (rows[0] == rows[1]).all()
    assert threads_met == {("batch", "embedshard-batches")} | (set() if is_cached else {("spot", "embedshard-decode")})
    assert not any(thread.name.startswith(("embedshard-batches", "embedshard-decode")) for thread in threading.enumerate())


@pytest.mark.parametrize(("threads", "most"), [(1, 200), (4, 8)])
def test_threads_make_no_more_than_is_made_ahead(data, threads, most, monkeypatch):
    made, made_spans = BatchReader._made, []

    def noting(self, rows, step, first, last):
        made_spans.append(last - first)
        return made(self, rows, step, first, last)

    monkeypatch.setattr(BatchReader, "_made", noting)
    _, reader = open_reader(data, 2**30, batch=48, threads=threads, window_steps=200)
    with reader.batches(0, 400) as batches:
        check(batches)
    assert max(made_spans) == most


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_group_that_is_read_is_let_go_before_its_window_is_whole(data, threads, monkeypatch):
    monkeypatch.setattr(windows, "_WHOLE_ROWS", 300)
    monkeypatch.setattr(windows, "_DECODE_ROWS", 250)
    opened, live, most = Source._parquet_file, set(), [0]

    def noting(self, number, stream=False):
        file = opened(self, number, stream)
        live.add(id(file))
        most[0] = max(most[0], len(live))
        weakref.finalize(file, live.discard, id(file))
        return file

    monkeypatch.setattr(Source, "_parquet_file", noting)
    dataset, reader = open_reader(data, 2**30, threads=threads, window_steps=80)
    with reader.batches(0, dataset.order.epoch_steps) as batches:
        check(batches)
    groups = len(dataset.train[0].inventory.row_groups)
    assert most[0] < 2 * threads + 2 or groups < 10, f"{groups} row groups are all in the first window"


@pytest.mark.parametrize("whole_rows", [2**17, 500])
def test_what_cannot_be_read_stops_the_loop_and_names_its_column(data, whole_rows, tmp_path, monkeypatch):
    """By columns, and as a stream of all of them; with one thread as with several."""
    monkeypatch.setattr(windows, "_WHOLE_ROWS", whole_rows)
    monkeypatch.setattr(windows, "_DECODE_ROWS", 500)
    path = tmp_path / "part.parquet"
    pq.write_table(pq.read_table(data), path, row_group_size=10_000, write_page_checksum=True)
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(1)
    assert chunk.path_in_schema.startswith("items")
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    told = []
    for threads in (1, 3):
        _, reader = open_reader(tmp_path, 0, threads=threads, window_steps=10)
        with pytest.raises(DataError) as caught, reader.batches(0, 78) as batches:
            list(batches)
        told.append(str(caught.value))
    assert "part.parquet, row group 2: cannot be read" in told[0]
    assert "(column items)" in told[0]
    assert told[0] == told[1]


def test_leaving_early_lets_go(data):
    dataset, reader = open_reader(data, 0, window_steps=10)
    with reader.batches(0, dataset.order.epoch_steps) as batches:
        next(batches)
    with reader.batches(3, dataset.order.epoch_steps) as batches:
        again = np.stack(check(batches))
    assert len(again) == dataset.order.epoch_steps - 3


def test_a_row_that_cannot_be_read_stops_the_loop_and_not_the_thread_alone(data, tmp_path):
    table = pq.read_table(data)
    users = table["user"].to_numpy().copy()
    users[ROWS - 1] = ROWS + 5
    pq.write_table(table.set_column(0, "user", pa.array(users)), tmp_path / "part.parquet", row_group_size=4_000)
    _, reader = open_reader(tmp_path, 0, window_steps=10)
    with pytest.raises(DataError, match=rf"column 'user' is {ROWS + 5}"), reader.batches(0, 78) as batches:
        list(batches)
