"""Models between items against brute force in float64."""

import numpy as np
import pytest
import torch

from embedshard.errors import TrainingError
from embedshard.evaluate import item_models
from embedshard.evaluate.item_models import Histories, HistoryScores, SameForAll, ease_weights, item_knn_weights

USERS, ITEMS = 50, 17


def random_rows(seed, count=400):
    """Rows in which users and items are met more than once, some of an item that the catalogue does not hold."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, count) * 3  # numbers have gaps
    items = np.minimum(rng.geometric(0.15, count) - 2, ITEMS - 1)
    assert (items == -1).any()
    return users, items


def dense(users, items, num_items=ITEMS):
    """The (users, N) matrix of who met what, as a loop says it."""
    known = sorted({user for user, item in zip(users.tolist(), items.tolist(), strict=True) if item >= 0})
    matrix = np.zeros((len(known), num_items))
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        if item >= 0:
            matrix[known.index(user), item] = 1.0
    return matrix, known


def test_a_history_holds_each_item_once_and_nothing_from_outside_the_catalogue():
    users, items = np.array([7, 3, 7, 7, 3, 9]), np.array([2, 0, 2, 1, -1, -1])
    histories = Histories(users, items, 4)
    found = histories.of(np.array([9, 7, 3, 0, 8, 100, 7])).toarray()
    nothing = [0, 0, 0, 0]
    assert found.tolist() == [nothing, [0, 1, 1, 0], [1, 0, 0, 0], nothing, nothing, nothing, [0, 1, 1, 0]]
    none = Histories(users, np.full(6, -1), 4).of(np.array([7, 3]))
    assert none.toarray().tolist() == [nothing, nothing]


@pytest.mark.parametrize("block_columns", [1, 5, None])
@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_ease_is_the_closed_form_of_its_paper(monkeypatch, l2, block_columns):
    if block_columns is not None:
        monkeypatch.setattr(item_models, "_PART_BYTES", 8 * ITEMS * block_columns)
    users, items = random_rows(1)
    matrix, _ = dense(users, items)
    inverse = np.linalg.inv(matrix.T @ matrix + l2 * np.eye(ITEMS))
    expected = np.eye(ITEMS) - inverse / np.diag(inverse)
    found = ease_weights(Histories(users, items, ITEMS), l2)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.diag(found).tolist() == [0.0] * ITEMS
    assert abs(expected - expected.T).max() > 0.01, "its transpose is another matrix"


@pytest.mark.parametrize("copies", range(2, 12))
@pytest.mark.parametrize("l2", [1e-30, 1e-7])
def test_ease_refuses_what_float32_cannot_invert(copies, l2):
    users = np.repeat(np.arange(3 + copies), copies)  # every user met the same items
    items = np.tile(np.arange(copies), 3 + copies)
    with pytest.raises(TrainingError, match=rf"{copies} items cannot be inverted with l2={l2:g}\. Give it a larger l2"):
        ease_weights(Histories(users, items, copies), l2)
    assert np.isfinite(ease_weights(Histories(users, items, copies), 1.0)).all()


@pytest.mark.parametrize("l2", [1e-7, 1e-6, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_ease_is_refused_or_right_where_there_are_more_items_than_users(seed, l2):
    rng = np.random.default_rng(seed)
    users, items = np.nonzero(rng.random((12, 30)) < 0.3)
    matrix, _ = dense(users, items, 30)
    inverse = np.linalg.inv(matrix.T @ matrix + l2 * np.eye(30))
    try:
        found = ease_weights(Histories(users, items, 30), l2)
    except TrainingError:
        assert l2 < 1e-3
    else:
        np.testing.assert_allclose(found, np.eye(30) - inverse / np.diag(inverse), atol=0.02)


@pytest.mark.parametrize("neighbours", [1, 3, 200])
@pytest.mark.parametrize("seed", range(4))
def test_item_knn_keeps_the_greatest_cosines_of_each_item(seed, neighbours):
    users, items = random_rows(seed)
    items = np.where(items % 5 == 4, items - 1, items)  # items that nobody met
    for copy, original in ((4, 3), (9, 3), (14, 3)):  # and items that the same users met: ties
        met = users[items == original]
        users, items = np.concatenate([users, met]), np.concatenate([items, np.full(len(met), copy)])
    matrix, _ = dense(users, items)
    lengths = np.sqrt((matrix**2).sum(axis=0))
    cosines = matrix.T @ matrix / np.maximum(np.outer(lengths, lengths), 1.0)
    np.fill_diagonal(cosines, 0.0)
    found = item_knn_weights(Histories(users, items, ITEMS), neighbours).toarray()
    kept = found != 0
    np.testing.assert_allclose(found[kept], cosines[kept], rtol=1e-5)
    for item in range(ITEMS):
        best = np.sort(cosines[item])[::-1][:neighbours]
        np.testing.assert_allclose(np.sort(found[item][kept[item]])[::-1], best[best > 0], rtol=1e-5)


def pairs_of(num_queries, num_candidates):
    rng = np.random.default_rng(8)
    return rng.integers(0, num_queries, 300), rng.integers(0, num_candidates, 300)


@pytest.mark.parametrize("block_rows", [1, 4, None])
@pytest.mark.parametrize("model", ["ease", "item_knn"])
def test_scores_are_sums_of_weights_and_those_of_pairs_are_the_same(monkeypatch, model, block_rows):
    users, items = random_rows(5)
    matrix, known = dense(users, items)
    histories = Histories(users, items, ITEMS)
    weights = ease_weights(histories, 3.0) if model == "ease" else item_knn_weights(histories, 4)
    if block_rows is not None:
        monkeypatch.setattr(item_models, "_PART_BYTES", block_rows * (ITEMS + 2) * 4)
    asked = np.array([*known[::-1], 1, 10_000])  # the last two met nothing
    scores = HistoryScores(histories.of(asked), weights, ITEMS + 2)
    assert (scores.num_queries, scores.num_candidates) == (len(asked), ITEMS + 2)
    filled = torch.full((len(asked), ITEMS + 2), torch.nan, dtype=scores.dtype)
    scores.fill(np.arange(len(asked)), filled)
    plain = np.asarray(weights if model == "ease" else weights.toarray(), dtype=np.float64)
    expected = np.zeros((len(asked), ITEMS + 2))
    expected[: len(known), :ITEMS] = matrix[::-1] @ plain
    np.testing.assert_allclose(filled.numpy(), expected, atol=1e-5)
    assert not filled[-2:].any(), "who met nothing has no preference"
    some = torch.empty(3, ITEMS + 2)
    scores.fill(np.array([4, 0, 4]), some)
    assert some.equal(filled[[4, 0, 4]])
    queries, candidates = pairs_of(len(asked), ITEMS + 2)
    assert scores.of_pairs(queries, candidates).equal(filled[queries, candidates])


def test_scores_that_are_the_same_for_all_keep_great_counts_apart():
    counts = torch.tensor([2**40, 2**40 + 1, 3])
    scores = SameForAll(counts, 4, 5)
    filled = torch.empty(4, 5, dtype=scores.dtype)
    scores.fill(np.arange(4), filled)
    assert filled.tolist() == [[2**40, 2**40 + 1, 3, 0, 0]] * 4
    queries, candidates = pairs_of(4, 5)
    assert scores.of_pairs(queries, candidates).equal(filled[queries, candidates])
