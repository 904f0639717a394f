"""Rows held out for validation: an exact share of the training rows, the same whatever spans they are asked for in."""

from itertools import pairwise

import numpy as np
import pytest

from embedshard.data.split import Selection, Split

SIZES = [1, 10, 203, 4095, 4096, 4097, 20_000]


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("fraction", [0.001, 0.1, 1 / 3, 0.9])
def test_the_share_is_exact_and_counts_of_spans_are_counts_of_rows(rows, fraction):
    split = Split(fraction, 7, rows)
    held = split.held_out(0, rows)
    assert held.sum() == split.num_held_out(0, rows) == int(rows * fraction + 1e-9)
    cuts = sorted({0, rows, *np.random.default_rng(rows).integers(0, rows + 1, 8).tolist(), *range(0, rows, 4096)})
    for first, last in [*pairwise(cuts), *((0, cut) for cut in cuts), *((cut, rows) for cut in cuts)]:
        np.testing.assert_array_equal(split.held_out(first, last), held[first:last])
        assert split.num_held_out(first, last) == held[first:last].sum()


def test_what_is_held_out_is_random_within_a_block_and_another_seed_holds_out_others():
    one, other = (Split(0.2, seed, 40_000).held_out(0, 40_000) for seed in (0, 1))
    assert 0.03 < (one & other).mean() < 0.05, "two draws of a fifth are independent: a twenty-fifth in both"
    runs = np.diff(np.flatnonzero(one))
    assert 4.9 < runs.mean() < 5.1
    assert 0.17 < (runs == 1).mean() < 0.23, "after a row that is held out, the next is so with the same probability"


def test_which_rows_are_held_out_is_pinned():
    """A run that is resumed by a later release must hold out the same rows."""
    assert np.flatnonzero(Split(0.1, 0, 100).held_out(0, 100)).tolist() == [5, 15, 31, 52, 58, 79, 83, 89, 90, 97]


def test_both_sides_of_a_data_set_that_begins_within_the_training_set_share_its_rows():
    split = Split(0.25, 3, 9_000)
    for first_row, rows in ((0, 5_000), (5_000, 4_000)):
        trained, held = (Selection(split, is_held_out, first_row) for is_held_out in (False, True))
        for first, last in ((0, rows), (17, 18), (100, 3_900)):
            both = np.concatenate([trained.rows(first, last), held.rows(first, last)])
            np.testing.assert_array_equal(np.sort(both), np.arange(last - first))
            assert (trained.count(first, last), held.count(first, last)) == (
                len(trained.rows(first, last)),
                len(held.rows(first, last)),
            )
