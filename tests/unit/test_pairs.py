"""Pairs of lists against naive loops; draws that depend on nothing but the place in the data."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.config.parts import ItemEmbeddingConfig, NegativeSamplingConfig
from embedshard.data.columns import Ragged
from embedshard.data.negatives import AllRows, RowSampler
from embedshard.data.order import Position
from embedshard.data.pairs import PairMaker, keep_probability

POSITION = Position(step=7, epoch=1, partition=0, step_in_epoch=3, is_epoch_end=False)


def ragged(lists, before=()):
    """Lists as a column whose values begin with others, as those of a slice do."""
    offsets = np.cumsum([len(before)] + [len(row) for row in lists]).astype(np.int64)
    return Ragged(np.array([*before, *(value for row in lists for value in row)], dtype=np.int64), offsets)


def make_maker(counts=None, **changes):
    config = {"kind": "item_embedding", "sequence": "words", "subsample": None} | changes
    return PairMaker(ItemEmbeddingConfig(**config), 3, counts)


def naive_pairs(lists, reach):
    """Every pair of (centre, context), as places in all lists; `reach` is that of each place."""
    found, first = [], 0
    for row in lists:
        for centre in range(len(row)):
            for context in range(len(row)):
                if context != centre and abs(context - centre) <= reach[first + centre]:
                    found.append((first + centre, first + context))
        first += len(row)
    return found


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=12), st.integers(1, 6), st.booleans(), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_pairs_equal_a_double_loop(lists, window, is_dynamic, num_before):
    column = ragged(lists, before=[7] * num_before)
    kept = make_maker(window=window, dynamic_window=is_dynamic).keep(column, np.arange(len(lists)), POSITION)
    left = [row if len(row) != 1 else [] for row in lists]
    assert kept.column.values.tolist() == [value for row in left for value in row]
    assert np.diff(kept.column.offsets).tolist() == [len(row) for row in left]
    assert kept.rows.tolist() == [number for number, row in enumerate(left) for _ in row]
    assert ((kept.reach >= 1) & (kept.reach <= window)).all()
    assert is_dynamic or (kept.reach == window).all()
    centres, contexts = kept.pairs()
    assert list(zip(centres.tolist(), contexts.tolist(), strict=True)) == naive_pairs(left, kept.reach)


def test_a_reach_is_drawn_evenly():
    kept = make_maker(window=5).keep(ragged([range(100)] * 500), np.arange(500), POSITION)
    shares = np.bincount(kept.reach, minlength=6)[1:] / len(kept.reach)
    np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_places_of_frequent_ids_fall_out_as_often_as_word2vec_says():
    counts = np.array([8000, 1500, 450, 50, 0], dtype=np.int64)
    expected = keep_probability(counts, 1e-2)
    for count, probability in zip(counts[:4].tolist(), expected.tolist(), strict=False):
        share = count / 10_000
        assert probability == pytest.approx(min(np.sqrt(1e-2 / share) + 1e-2 / share, 1.0), rel=1e-6)
    ids = np.repeat(np.arange(4), counts[:4])
    lists = np.random.default_rng(0).permutation(ids).reshape(100, 100).tolist()
    kept = make_maker(counts, subsample=1e-2).keep(ragged(lists), np.arange(100), POSITION)
    found = np.bincount(kept.column.values, minlength=4) / counts[:4]
    np.testing.assert_allclose(found, expected[:4], atol=4 * np.sqrt(0.25 / counts[:4]).max())
    assert found[3] == 1.0


def test_windows_are_laid_over_what_is_left():
    counts = np.array([10**8, 1, 1], dtype=np.int64)
    kept = make_maker(counts, subsample=1e-6, window=1).keep(ragged([[1, 0, 0, 2]]), np.zeros(1, dtype=np.int64), POSITION)
    assert kept.column.values.tolist() == [1, 2]
    assert [array.tolist() for array in kept.pairs()] == [[0, 1], [1, 0]]


def test_draws_depend_on_the_row_and_not_on_its_batch():
    generator = np.random.default_rng(1)
    lists = [generator.integers(0, 50, generator.integers(0, 30)).tolist() for _ in range(40)]
    counts, rows = np.full(50, 20, dtype=np.int64), generator.permutation(1000)[:40]
    maker = make_maker(counts, subsample=1e-3)
    whole = maker.keep(ragged(lists), rows, POSITION)
    halves = [maker.keep(ragged(lists[part]), rows[part], POSITION) for part in (slice(0, 20), slice(20, 40))]
    assert 0 < len(whole.rows) < sum(map(len, lists))
    np.testing.assert_array_equal(np.concatenate([half.column.values for half in halves]), whole.column.values)
    np.testing.assert_array_equal(np.concatenate([half.reach for half in halves]), whole.reach)
    later_step = dataclasses.replace(POSITION, step=8, step_in_epoch=4)
    np.testing.assert_array_equal(maker.keep(ragged(lists), rows, later_step).reach, whole.reach)
    for other in (dataclasses.replace(POSITION, epoch=2), dataclasses.replace(POSITION, partition=1)):
        assert maker.keep(ragged(lists), rows, other).column.values.tolist() != whole.column.values.tolist()
    other_seed = PairMaker(ItemEmbeddingConfig(kind="item_embedding", sequence="words", subsample=1e-3), 4, counts)
    assert other_seed.keep(ragged(lists), rows, POSITION).column.values.tolist() != whole.column.values.tolist()


def config(**changes):
    return NegativeSamplingConfig(**{"kind": "negative_sampling", "num_negatives": 64} | changes)


def test_rows_are_drawn_by_their_counts_to_the_power():
    counts = np.array([0, 100, 10, 1, 0], dtype=np.int64)
    sampler = RowSampler(config(distribution="popularity", num_negatives=40_000), 1, 5, counts)
    drawn = sampler.draw(0, 0, 1)
    shares = counts**0.75 / (counts**0.75).sum()
    np.testing.assert_allclose(np.bincount(drawn.ids, minlength=5) / 40_000, shares, atol=0.01)
    np.testing.assert_allclose(np.exp(drawn.log_q_of_row), shares, rtol=1e-6)
    np.testing.assert_array_equal(drawn.log_q, drawn.log_q_of_row[drawn.ids])


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_every_world_draws_the_same_rows(distribution):
    sampler = RowSampler(config(distribution=distribution), 1, 100, np.arange(100, dtype=np.int64))
    for step in (0, 5):
        alone = sampler.draw(step, 0, 1)
        shared = np.concatenate([sampler.draw(step, rank, 4).ids for rank in range(4)])
        np.testing.assert_array_equal(shared, alone.ids)
    assert sampler.draw(0, 0, 1).ids.tolist() != sampler.draw(5, 0, 1).ids.tolist()


def test_all_rows_are_shared_out_and_what_fills_up_has_no_probability():
    parts = [AllRows(10, 4).draw(0, rank, 4) for rank in range(4)]
    assert [len(part.ids) for part in parts] == [3, 3, 3, 3]
    assert np.concatenate([part.ids for part in parts]).tolist() == [*range(10), 0, 0]
    assert np.concatenate([part.log_q for part in parts]).tolist() == [0.0] * 10 + [np.inf] * 2
