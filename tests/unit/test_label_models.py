"""Models of labels against their definitions, row by row."""

import math

import numpy as np
import pytest

from embedshard.data.survey import Interactions
from embedshard.errors import TrainingError
from embedshard.evaluate.label_models import fit_biases, mean_logit

USERS, ITEMS = 9, 6


def random_rows(seed, labels):
    """Rows of users and items, the last of which nobody met, with weights of which some are 0."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, USERS - 1, 80), rng.integers(0, ITEMS - 1, 80)
    weights = (rng.random(80) * (rng.random(80) > 0.2)).astype(np.float32)
    return Interactions(users, items, rng.choice(labels, 80).astype(np.float32), weights)


def test_the_mean_is_predicted_as_it_is_or_as_log_odds():
    assert mean_logit(7.0, 2.0, "identity") == 3.5
    assert 1 / (1 + math.exp(-mean_logit(3.0, 8.0, "sigmoid"))) == pytest.approx((3 + 1) / (8 + 2))
    assert math.isfinite(mean_logit(8.0, 8.0, "sigmoid"))


@pytest.mark.parametrize(
    ("label_sum", "weight", "link"),
    [(0.0, 0.0, "identity"), (0.0, 0.0, "sigmoid"), (9.0, 8.0, "sigmoid"), (-1.0, 8.0, "sigmoid")],
)
def test_a_mean_that_cannot_be_predicted_is_refused(label_sum, weight, link):
    with pytest.raises(TrainingError, match="mean label"):
        mean_logit(label_sum, weight, link)


def test_a_label_that_has_no_log_odds_is_refused():
    rows = Interactions(np.zeros(3, int), np.zeros(3, int), np.array([2, 0, 0], np.float32), np.ones(3, np.float32))
    with pytest.raises(TrainingError, match=r"label of 2\b"):
        fit_biases(rows, 1, 1, 1.0, "sigmoid")


@pytest.mark.parametrize("damping", [0.5, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_biases_of_ratings_solve_the_penalised_least_squares(seed, damping):
    rows = random_rows(seed, [1, 2, 3, 4, 5])
    found = fit_biases(rows, USERS, ITEMS, damping, "identity")
    labels, weights = rows.labels.astype(float), rows.weights.astype(float)
    mean = (labels * weights).sum() / weights.sum()
    design = np.zeros((80, USERS + ITEMS))
    design[np.arange(80), rows.users] = design[np.arange(80), USERS + rows.items] = 1.0
    normal = design.T @ (weights[:, None] * design) + damping * np.eye(USERS + ITEMS)
    solution = np.linalg.solve(normal, design.T @ (weights * (labels - mean)))
    expected = mean + solution[:USERS, None] + solution[None, USERS:]
    users, items = (index.ravel() for index in np.indices((USERS, ITEMS)))
    predicted = found.predict(users, items).reshape(USERS, ITEMS)
    # Ten turns come this near where a user's own rows weigh less than the damping, and nearer with more of it.
    np.testing.assert_allclose(predicted, expected, atol=1e-3 if damping == 10.0 else 2e-2)
    assert predicted[-1, -1] == pytest.approx(mean), "who has no rows is predicted the mean"


@pytest.mark.parametrize("seed", range(3))
def test_biases_of_ratings_are_turns_of_items_and_users(seed):
    rows = random_rows(seed, [1, 2, 3, 4, 5])
    mean = np.average(rows.labels.astype(float), weights=rows.weights)
    of_user, of_item = [0.0] * USERS, [0.0] * ITEMS
    listed = list(zip(*(part.tolist() for part in (rows.users, rows.items, rows.labels, rows.weights)), strict=True))
    for _ in range(10):
        for item in range(ITEMS):
            mine = [(label - mean - of_user[u], w) for u, i, label, w in listed if i == item]
            of_item[item] = sum(rest * w for rest, w in mine) / (2.0 + sum(w for _, w in mine))
        for user in range(USERS):
            mine = [(label - mean - of_item[i], w) for u, i, label, w in listed if u == user]
            of_user[user] = sum(rest * w for rest, w in mine) / (2.0 + sum(w for _, w in mine))
    found = fit_biases(rows, USERS, ITEMS, 2.0, "identity")
    assert found.users.tolist() == pytest.approx(of_user)
    assert found.items.tolist() == pytest.approx(of_item)


@pytest.mark.parametrize("seed", range(3))
def test_biases_of_log_odds_are_the_damped_log_odds_of_each_side(seed):
    rows = random_rows(seed, [0, 1, 0.25])
    found = fit_biases(rows, USERS, ITEMS, 3.0, "sigmoid")
    labels, weights = rows.labels.astype(float), rows.weights.astype(float)
    rate = ((labels * weights).sum() + 1) / (weights.sum() + 2)
    mean = math.log(rate / (1 - rate))

    def own(mine):
        positive = (labels * weights)[mine].sum() + 3.0 * rate
        negative = ((1 - labels) * weights)[mine].sum() + 3.0 * (1 - rate)
        return math.log(positive / negative) - mean

    for user in range(USERS):
        for item in range(ITEMS):
            expected = mean + own(rows.users == user) + own(rows.items == item)
            assert found.predict(np.array([user]), np.array([item])) == pytest.approx(expected, abs=1e-9)
