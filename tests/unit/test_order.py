"""The order of the data: every row once an epoch, the same batches in every world, resume at every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.data.expected import ExpectedRows
from embedshard.data.order import Order, row_digest, sum_of_digests, worlds_that_fit
from embedshard.errors import ConfigError


@st.composite
def orders(draw):
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    partitions = draw(st.integers(1, 3))
    groups = [
        draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0))
        for _ in range(partitions)
    ]
    return Order(
        seed=draw(st.integers(0, 2**32 - 1)),
        lanes=lanes,
        global_batch_size=lanes * draw(st.integers(1, 4)),
        window_steps=tuple(draw(st.integers(0, 5)) for _ in groups),
        row_groups=tuple(tuple(sizes) for sizes in groups),
        shuffle=draw(st.booleans()),
    )


def batches(order, start, stop, rank=0, world_size=1):
    """(partition, rows of the partition) of each step, as a rank's reader would ask for them."""
    lanes = order.lane_block(rank, world_size)
    for step in range(start, stop):
        position = order.position(step)
        epoch = order.epoch_order(position.epoch, position.partition)
        window = epoch.window_of(position.step_in_epoch)
        table = epoch.rows(window, lanes)
        rows = table[position.step_in_epoch - window * epoch.window_steps]
        yield position.partition, epoch.dataset_rows(rows)


@given(orders(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_each_epoch_trains_every_row_once(order, epoch):
    seen = [[] for _ in order.row_groups]
    start = epoch * order.epoch_steps
    for partition, rows in batches(order, start, start + order.epoch_steps):
        assert len(rows) == order.global_batch_size
        seen[partition].append(rows[rows >= 0])
    for partition, parts in enumerate(seen):
        assert sorted(np.concatenate(parts).tolist()) == list(range(order.num_rows[partition]))


@given(orders())
@settings(max_examples=100, deadline=None)
def test_every_world_that_divides_the_lanes_sees_the_same_global_batches(order):
    stop = order.epoch_steps + 1
    alone = [rows for _, rows in batches(order, 0, stop)]
    for world_size in worlds_that_fit(order.lanes):
        ranks = [[rows for _, rows in batches(order, 0, stop, rank, world_size)] for rank in range(world_size)]
        for step in range(stop):
            np.testing.assert_array_equal(np.concatenate([rank[step] for rank in ranks]), alone[step])


@given(orders())
@settings(max_examples=60, deadline=None)
def test_a_resume_at_every_step_continues_with_the_same_batches(order):
    stop = min(2 * order.epoch_steps, 40)
    whole = list(batches(order, 0, stop))
    for start in range(stop):
        for (partition, rows), (other, expected) in zip(batches(order, start, stop), whole[start:], strict=True):
            assert partition == other
            np.testing.assert_array_equal(rows, expected)


@given(orders())
@settings(max_examples=100, deadline=None)
def test_padding_is_in_the_last_step_of_a_partition_only(order):
    for step, (partition, rows) in enumerate(batches(order, 0, order.epoch_steps)):
        position = order.position(step)
        if position.step_in_epoch < order.partition_steps[partition] - 1:
            assert (rows >= 0).all()
        else:
            assert (rows >= 0).any()


@given(orders(), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_partitions_are_trained_in_order_within_an_epoch(order, step):
    position = order.position(step)
    assert position.epoch == step // order.epoch_steps
    before = sum(order.partition_steps[: position.partition])
    assert position.epoch * order.epoch_steps + before + position.step_in_epoch == step
    assert position.is_epoch_end == ((step + 1) % order.epoch_steps == 0)


def test_seeds_and_epochs_change_the_order():
    def first_rows(seed, epoch):
        order = Order(seed, 4, 16, (0,), ((100, 100, 100),))
        return [rows.tolist() for _, rows in batches(order, epoch * order.epoch_steps, (epoch + 1) * order.epoch_steps)]

    assert first_rows(1, 0) == first_rows(1, 0)
    assert first_rows(1, 0) != first_rows(2, 0)
    assert first_rows(1, 0) != first_rows(1, 1)


def test_the_order_is_pinned_because_resumed_runs_depend_on_it():
    order = Order(7, 2, 4, (2,), ((5, 4, 6),))
    assert [rows.tolist() for _, rows in batches(order, 0, order.epoch_steps)] == [
        [5, 6, 13, 0],
        [8, 7, 12, 14],
        [10, 9, 4, 1],
        [11, -1, 3, 2],
    ]


def test_rows_are_shuffled_only_within_their_window():
    order = Order(3, 1, 4, (3,), ((60,),))
    epoch = order.epoch_order(0, 0)
    for window in range(5):
        rows = np.sort(epoch.rows(window, (0, 1)).ravel())
        np.testing.assert_array_equal(rows, np.arange(window * 12, window * 12 + 12))


def test_a_world_that_does_not_divide_the_lanes_is_an_error_that_names_those_that_do():
    order = Order(0, 64, 64, (0,), ((640,),))
    with pytest.raises(ConfigError, match=r"3 workers cannot share data\.lanes=64.*1, 2, 4, 8, 16, 32, 64"):
        order.lane_block(0, 3)


@given(st.lists(st.integers(-1, 10**12), max_size=50), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_digests_of_parts_add_up_to_the_digest_of_the_whole_in_any_order(rows, epoch, partition):
    rows = np.array(rows, dtype=np.int64)
    cut = len(rows) // 2
    parts = [row_digest(epoch, partition, part[::-1]) for part in (rows[:cut], rows[cut:])]
    whole = row_digest(epoch, partition, rows)
    assert tuple((a + b) % 2**64 for a, b in zip(*parts, strict=True)) == whole


def test_a_dropped_a_repeated_and_a_swapped_row_change_the_digest():
    rows = np.arange(1000, dtype=np.int64)
    whole = row_digest(0, 0, rows)
    assert row_digest(0, 0, rows[1:]) != whole
    assert row_digest(0, 0, np.append(rows, 5)) != whole
    assert row_digest(0, 0, np.append(rows[:-1], 5)) != whole
    assert row_digest(1, 0, rows) != whole
    assert row_digest(0, 1, rows) != whole


@given(orders(), st.integers(0, 3), st.data())
def test_expected_counts_and_digests_are_those_of_the_order(order, epoch, data):
    partition = data.draw(st.integers(0, len(order.row_groups) - 1))
    steps = order.partition_steps[partition]
    world_size = data.draw(st.sampled_from(worlds_that_fit(order.lanes)))
    lanes = order.lane_block(data.draw(st.integers(0, world_size - 1)), world_size)
    cuts = st.integers(0, steps)
    intervals = sorted(tuple(sorted(pair)) for pair in data.draw(st.lists(st.tuples(cuts, cuts), min_size=1, max_size=5)))
    one_pass = order.epoch_order(epoch, partition)
    windows = [one_pass.rows(window, lanes) for window in range(-(-steps // one_pass.window_steps))]
    rows = one_pass.dataset_rows(np.concatenate(windows))
    told = []
    expected = ExpectedRows(order, epoch, partition, told.append)
    digests = expected.digests(intervals, lanes)
    for interval, digest in zip(intervals, digests, strict=True):
        of_steps = rows[slice(*interval)].ravel()
        assert digest == row_digest(epoch, partition, of_steps)
        assert expected.count(interval, lanes) == np.count_nonzero(of_steps >= 0)
    assert sum(told) == sum(expected.count(interval, lanes) for interval in intervals)
    every_row = np.arange(order.num_rows[partition], dtype=np.int64)
    assert expected.digest((0, steps)) == row_digest(epoch, partition, every_row)
    middle = data.draw(cuts)
    parts = [expected.digest((0, middle)), expected.digest((middle, steps))]
    assert sum_of_digests(parts) == row_digest(epoch, partition, every_row)
