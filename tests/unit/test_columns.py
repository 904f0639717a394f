"""Columns: gathers, slices and concatenations against naive lists."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.data.columns import Buffers, Flat, Ragged, concatenate, gather, num_rows, rebased, slice_rows, take_lists

rows = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=20)


def columns(lists, weights=True):
    lengths = [len(row) for row in lists]
    values = np.array([value for row in lists for value in row], dtype=np.int64)
    return {
        "id": Flat(np.arange(len(lists), dtype=np.int64) + 100),
        "number": Flat(np.arange(len(lists), dtype=np.float32) / 2),
        "bag": Ragged(
            values,
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            values.astype(np.float32) / 3 if weights else None,
        ),
    }


def as_lists(columns):
    bag = columns["bag"]
    spans = list(zip(bag.offsets[:-1], bag.offsets[1:], strict=True))
    return (
        columns["id"].values.tolist(),
        columns["number"].values.tolist(),
        [bag.values[a:b].tolist() for a, b in spans],
        None if bag.weights is None else [bag.weights[a:b].tolist() for a, b in spans],
    )


@given(rows, st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_gather_gives_the_rows_asked_for_and_empty_padding(lists, data, weights):
    if not lists:
        return
    index = data.draw(st.lists(st.integers(-1, len(lists) - 1), max_size=30))
    got = as_lists(gather(columns(lists, weights), np.array(index, dtype=np.int64), Buffers()))
    assert got[0] == [100 + i if i >= 0 else -1 for i in index]
    assert got[1] == [i / 2 if i >= 0 else 0.0 for i in index]
    assert got[2] == [lists[i] if i >= 0 else [] for i in index]
    if weights:
        assert [len(row) for row in got[3]] == [len(row) for row in got[2]]


@given(rows, rows, st.data())
@settings(max_examples=100, deadline=None)
def test_slices_join_to_the_whole(first, second, data):
    both = concatenate([columns(first), columns(second)])
    assert num_rows(both) == len(first) + len(second)
    assert as_lists(both)[2] == first + second
    cut = data.draw(st.integers(0, num_rows(both)))
    joined = concatenate([slice_rows(both, 0, cut), slice_rows(both, cut, num_rows(both))])
    assert as_lists(joined) == as_lists(both)


def test_buffers_are_used_again_from_window_to_window():
    buffers = Buffers()
    data = columns([[1, 2], [3], []] * 10)
    first = gather(data, np.arange(30), buffers)
    second = gather(data, np.arange(29, -1, -1), buffers)
    for name in ("id", "number", "bag"):
        assert np.shares_memory(first[name].values, second[name].values), name
    assert as_lists(second)[2] == as_lists(data)[2][::-1]


def test_rebased_lists_are_a_view_of_their_own_values():
    data = columns([[1, 2], [3], [], [4, 5, 6], [7]])
    bag = rebased(slice_rows(data, 1, 4)["bag"])
    assert bag.values.tolist() == [3, 4, 5, 6]
    assert bag.offsets.tolist() == [0, 1, 1, 4]
    assert len(bag.weights) == 4
    assert np.shares_memory(bag.values, data["bag"].values)


@given(rows, st.data(), st.integers(0, 6), st.integers(0, 3), st.sampled_from([np.int16, np.int64]))
@settings(deadline=None)
def test_lists_are_taken_in_the_order_of_an_index(lists, data, more, first, dtype):
    starts = np.append(0, np.cumsum([len(numbers) for numbers in lists])).astype(np.int32)
    values = np.array([number for numbers in lists for number in numbers], dtype=np.int64)
    index = np.array(data.draw(st.permutations([*range(len(lists)), -1, -1])), dtype=np.int32)
    out, offsets = np.full(first + len(values) + more, -5, dtype=dtype), np.empty(len(index) + 1, dtype=np.int32)
    take_lists(values, starts, index, out, offsets, first)
    assert (out[:first] == -5).all(), "what is before the first one is not touched"
    found = [out[begin:end].tolist() for begin, end in pairwise(offsets)]
    assert found == [[] if row < 0 else lists[row] for row in index]
