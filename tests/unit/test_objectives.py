"""Objectives against naive loops in float64, and the softmax family against the full softmax in expectation."""

import math

import numpy as np
import pytest
import torch

from embedshard.config.parts import (
    BPRConfig,
    CosineContrastiveConfig,
    InBatchSoftmaxConfig,
    NegativeSamplingConfig,
    SampledSoftmaxConfig,
)
from embedshard.data.batch import Batch, Draws
from embedshard.models.objectives import objective as blocks
from embedshard.models.objectives import pairwise as pairwise_losses
from embedshard.models.objectives import softmax as softmax_losses
from embedshard.models.objectives.frequency import FrequencyEstimate
from embedshard.models.objectives.objective import l2_penalty
from embedshard.models.objectives.pairwise import BPR, CosineContrastive, NegativeSampling
from embedshard.models.objectives.pointwise import Pointwise
from embedshard.models.objectives.softmax import InBatchSoftmax, SampledSoftmax
from embedshard.models.output import RetrievalOutput
from embedshard.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


def make_batch(items, weights=None, labels=None, draws=None):
    items = torch.as_tensor(items, dtype=torch.int64)
    size = len(items)
    return Batch(
        sparse=None,
        weighted=None,
        dense=torch.zeros(size, 0),
        labels=torch.zeros(size, 1) if labels is None else torch.as_tensor(labels, dtype=torch.float32)[:, None],
        weights=torch.ones(size) if weights is None else torch.as_tensor(weights, dtype=torch.float32),
        ids={"item": items},
        rows=torch.arange(size),
        draws=draws,
    )


def vectors(generator, *shape):
    return torch.from_numpy(generator.normal(size=shape).astype(np.float32)).requires_grad_()


def naive_loss(score, others):
    """log(exp(score) + sum of exp(others)) - score, one number after another; others are tensors in float64."""
    total = torch.exp(score)
    for other in others:
        total = total + torch.exp(other)
    return torch.log(total) - score


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_pointwise_losses_equal_their_definitions(kind):
    generator = np.random.default_rng(0)
    query, candidate = vectors(generator, 20, 4), vectors(generator, 20, 4)
    labels = generator.integers(0, 2, 20).astype(np.float32)
    losses = Pointwise(kind)(RetrievalOutput(query, candidate), make_batch(range(20), labels=labels))
    for row in range(20):
        logit = float((query[row].double() * candidate[row].double()).sum())
        p = 1 / (1 + math.exp(-logit))
        expected = (logit - labels[row]) ** 2 if kind == "mse" else -math.log(p if labels[row] else 1 - p)
        assert float(losses[row]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("block", [1, 7, 2**20], ids="blocks of {} logits".format)
@pytest.mark.parametrize("log_q", ["off", "streaming"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("temperature", "kept"), [(1.0, 0), (1.0, 2**25), (0.3, 2**25)])
def test_in_batch_softmax_equals_a_loop_over_rows_and_candidates(monkeypatch, block, log_q, masked, temperature, kept):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(softmax_losses, "KEPT_ELEMENTS", kept)
    generator = np.random.default_rng(3)
    items = generator.integers(0, 8, 14)
    weights = np.where(np.arange(14) % 5 == 4, 0.0, generator.random(14) + 0.5)
    query, candidate = vectors(generator, 14, 4), vectors(generator, 14, 4)
    config = InBatchSoftmaxConfig(kind="in_batch_softmax", temperature=temperature, log_q=log_q, mask_accidental_hits=masked)
    objective = InBatchSoftmax(config, 9, "item", ALONE)
    earlier = generator.integers(0, 8, 30)
    if log_q == "streaming":
        objective.frequency.update(torch.from_numpy(earlier))
    losses = objective(RetrievalOutput(query, candidate), make_batch(items, weights))
    torch.where(torch.from_numpy(weights) > 0, losses, 0.0).sum().backward()

    q, c = (t.detach().double().requires_grad_() for t in (query, candidate))
    valid = [i for i in range(14) if weights[i] > 0]
    met = [*earlier, *(items[i] for i in valid)]
    total = torch.zeros((), dtype=torch.float64)
    for row in valid:
        others = []
        for j in valid:
            if j == row or (masked and items[j] == items[row]):
                continue
            logit = (q[row] * c[j]).sum() / temperature
            if log_q == "streaming":
                logit = logit - math.log((len(valid) - 1) * met.count(items[j]) / len(met))
            others.append(logit)
        loss = naive_loss((q[row] * c[row]).sum() / temperature, others)
        assert float(losses[row].detach()) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
        total = total + loss
    total.backward()
    torch.testing.assert_close(query.grad.double(), q.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(candidate.grad.double(), c.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("log_q", ["off", "on"])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_sampled_softmax_equals_a_loop_over_rows_and_candidates(log_q, mixed, masked):
    generator = np.random.default_rng(4)
    size, drawn, num_items = 10, 12, 7
    items, negatives = generator.integers(0, num_items, size), generator.integers(0, num_items, drawn)
    weights = np.where(np.arange(size) == 3, 0.0, 1.0)
    q_draw = generator.random(num_items) + 0.2
    q_draw /= q_draw.sum()
    query, candidate, negative = (vectors(generator, n, 4) for n in (size, size, drawn))
    config = SampledSoftmaxConfig(
        kind="sampled_softmax", num_negatives=drawn, temperature=0.5, log_q=log_q, mixed=mixed, mask_accidental_hits=masked
    )
    objective = SampledSoftmax(config, num_items + 1, "item", ALONE)
    draws = Draws(
        ids=torch.from_numpy(negatives),
        log_q=torch.from_numpy(np.log(q_draw[negatives]).astype(np.float32)),
        own_log_q=torch.from_numpy(np.log(q_draw[items]).astype(np.float32)),
        dense=torch.zeros(drawn, 0),
    )
    losses = objective(RetrievalOutput(query, candidate, negative), make_batch(items, weights, draws=draws))
    torch.where(torch.from_numpy(weights) > 0, losses, 0.0).sum().backward()

    q, c, n = (t.detach().double().requires_grad_() for t in (query, candidate, negative))
    valid = [i for i in range(size) if weights[i] > 0]
    met = [items[i] for i in valid]
    total = torch.zeros((), dtype=torch.float64)
    for row in valid:
        others = []
        pool = [(n[j], negatives[j], False) for j in range(drawn)]
        pool += [(c[j], items[j], j == row) for j in valid] if mixed else []
        for vector, item, is_own_place in pool:
            if is_own_place or (masked and item == items[row]):
                continue
            logit = (q[row] * vector).sum() / 0.5
            if log_q == "on":
                expected = drawn * q_draw[item] + ((len(valid) - 1) * met.count(item) / len(met) if mixed else 0)
                logit = logit - math.log(expected)
            others.append(logit)
        loss = naive_loss((q[row] * c[row]).sum() / 0.5, others)
        assert float(losses[row].detach()) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
        total = total + loss
    total.backward()
    for ours, reference in ((query, q), (candidate, c), (negative, n)):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("items", [[5], [5, 5, 5], [5, -1]], ids=["one row", "one item", "padding"])
def test_a_row_without_another_candidate_has_no_loss_and_finite_gradients(items):
    generator = np.random.default_rng(1)
    query, candidate = vectors(generator, len(items), 4), vectors(generator, len(items), 4)
    objective = InBatchSoftmax(InBatchSoftmaxConfig(kind="in_batch_softmax"), 10, "item", ALONE)
    batch = make_batch(items, [float(item >= 0) for item in items])
    losses = objective(RetrievalOutput(query, candidate), batch)
    torch.where(batch.weights > 0, losses, 0.0).sum().backward()
    assert float(losses[0].detach()) == 0.0
    assert query.grad.abs().max() == 0
    assert candidate.grad.abs().max() == 0


def full_softmax_gradient(table, query, positive, temperature):
    """The loss, and its gradient by the query, of a softmax over all items."""
    q = query.detach().double().requires_grad_()
    logits = table.double() @ q / temperature
    loss = torch.logsumexp(logits, 0) - logits[positive]
    loss.backward()
    return float(loss.detach()), q.grad


def mean_over_batches(make, rounds):
    """The mean loss and gradient of row 0 over batches, and the standard errors."""
    losses, gradients = [], []
    for _ in range(rounds):
        loss, query = make()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(query.grad[0].double())
    stacked = torch.stack(gradients)
    return np.mean(losses), stacked.mean(0), stacked.std(0) / math.sqrt(rounds)


@pytest.mark.parametrize("kind", ["in_batch", "uniform", "popularity", "mixed"])
def test_with_log_q_the_loss_is_the_full_softmax_in_expectation_and_without_it_is_not(kind):
    generator = np.random.default_rng(7)
    num_items, size, temperature, rounds = 12, 1024, 0.7, 60
    popularity = 1.0 / np.arange(1, num_items + 1)
    popularity /= popularity.sum()
    table = torch.from_numpy(generator.normal(size=(num_items, 6)).astype(np.float32))
    row, positive = torch.from_numpy(generator.normal(size=6).astype(np.float32)), 5
    expected_loss, expected = full_softmax_gradient(table, row, positive, temperature)
    found = {}
    for corrected in (True, False):
        in_batch = InBatchSoftmax(
            InBatchSoftmaxConfig(
                kind="in_batch_softmax", temperature=temperature, log_q="streaming" if corrected else "off"
            ),
            num_items, "item", ALONE,
        )  # fmt: skip
        sampled = SampledSoftmax(
            SampledSoftmaxConfig(
                kind="sampled_softmax", num_negatives=size, temperature=temperature, mixed=kind == "mixed",
                log_q="on" if corrected else "off",
            ),
            num_items, "item", ALONE,
        )  # fmt: skip
        for objective in (in_batch, sampled):
            if objective.frequency is not None:
                objective.frequency.update(torch.from_numpy(generator.choice(num_items, 2_000_000, p=popularity)))
        q_draw = popularity**0.75 / (popularity**0.75).sum() if kind == "popularity" else np.full(num_items, 1 / num_items)

        def one(in_batch=in_batch, sampled=sampled, q_draw=q_draw):
            items = generator.choice(num_items, size, p=popularity)
            items[0] = positive
            query = row.repeat(size, 1).requires_grad_()
            draws = None
            if kind != "in_batch":
                ids = generator.choice(num_items, size, p=q_draw)
                log_q = torch.from_numpy(np.log(q_draw).astype(np.float32))
                draws = Draws(torch.from_numpy(ids), log_q[ids], log_q[items], torch.zeros(size, 0))
            output = RetrievalOutput(query, table[items], None if draws is None else table[draws.ids])
            losses = (in_batch if kind == "in_batch" else sampled)(output, make_batch(items, draws=draws))
            return losses[0], query

        found[corrected] = mean_over_batches(one, rounds)
    loss, gradient, error = found[True]
    assert loss == pytest.approx(expected_loss, abs=0.03)
    assert ((gradient - expected).abs() < 4 * error + 0.02).all(), (gradient, expected, error)
    loss, gradient, _ = found[False]
    assert abs(loss - expected_loss) > 1.0, "without correction all candidates together count too much"


@pytest.mark.parametrize("half_life", [None, 3.0])
def test_the_frequency_estimate_equals_weighted_counts_over_many_updates(half_life):
    generator = np.random.default_rng(2)
    estimate = FrequencyEstimate(6, 6, half_life)
    batches = [generator.integers(-1, 6, 5) for _ in range(700)]
    halfway = None
    for step, batch in enumerate(batches):
        estimate.update(torch.from_numpy(batch))
        if step == 350:
            halfway = {name: buffer.clone() for name, buffer in estimate.state_dict().items()}
    weights = [1.0 if half_life is None else 2.0 ** ((step - 699) / half_life) for step in range(700)]
    counts = np.zeros(6)
    for batch, weight in zip(batches, weights, strict=True):
        for item in batch[batch >= 0]:
            counts[item] += weight
    np.testing.assert_allclose(estimate.probability(torch.arange(6)).numpy(), counts / counts.sum(), rtol=1e-9)
    resumed = FrequencyEstimate(6, 6, half_life)
    resumed.load_state_dict(halfway)
    for batch in batches[351:]:
        resumed.update(torch.from_numpy(batch))
    for name, buffer in estimate.state_dict().items():
        assert buffer.equal(resumed.state_dict()[name]), name


def test_few_buckets_are_shared_by_remainder():
    estimate = FrequencyEstimate(100, 4, None)
    estimate.update(torch.tensor([0, 4, 1, 98]))
    assert estimate.probability(torch.tensor([8, 5, 2, 3])).tolist() == [0.5, 0.25, 0.25, 0.0]


def test_the_penalty_is_the_squared_length_of_what_a_row_looks_up():
    lookups = {"a": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "b": torch.ones(2, 3), "c": torch.ones(2, 9)}
    assert l2_penalty(lookups, {"a": 0.1, "b": 2.0}).tolist() == pytest.approx([8.5, 6.1])


def pairwise(kind, drawn, masked=True):
    """An objective of a kind, what its vectors are scaled to, and its naive cost, given own score and candidates'."""
    common = {"kind": kind, "num_negatives": drawn, "mask_accidental_hits": masked}
    if kind == "bpr":
        return (
            BPR(BPRConfig(**common), "item", ALONE),
            lambda x: x,
            lambda own, others: sum(torch.log1p(torch.exp(other - own)) for other in others) / len(others),
        )
    if kind == "negative_sampling":
        return (
            NegativeSampling(NegativeSamplingConfig(**common, negative_weight=3.0), "item", ALONE),
            lambda x: x,
            lambda own, others: (
                torch.log1p(torch.exp(-own)) + 3.0 * sum(torch.log1p(torch.exp(other)) for other in others) / len(others)
            ),
        )
    return (
        CosineContrastive(CosineContrastiveConfig(**common, margin=0.1, negative_weight=3.0), "item", ALONE),
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda own, others: 1 - own + 3.0 * sum(torch.clamp(other - 0.1, min=0.0) for other in others) / len(others),
    )


PAIRWISE = ["bpr", "negative_sampling", "cosine_contrastive"]


@pytest.mark.parametrize("block", [1, 7, 2**20], ids="blocks of {} scores".format)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("kind", "few"), [*((kind, 0.0) for kind in PAIRWISE), ("cosine_contrastive", 1.0)])
@pytest.mark.parametrize("kept", [0, 2**25], ids=["made again", "kept"])
def test_pairwise_losses_equal_a_loop_over_rows_and_candidates(monkeypatch, block, masked, kind, few, kept):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(pairwise_losses, "_FEW", few)
    monkeypatch.setattr(pairwise_losses, "KEPT_ELEMENTS", kept)
    generator = np.random.default_rng(6)
    size, drawn = 9, 13
    items, negatives = generator.integers(0, 5, size), generator.integers(0, 5, drawn)
    items[4] = 77  # an item that is not among the drawn
    weights = np.where(np.arange(size) == 3, 0.0, 1.0)
    query, candidate, negative = (vectors(generator, n, 4) for n in (size, size, drawn))
    objective, scaled, naive = pairwise(kind, drawn, masked)
    draws = Draws(torch.from_numpy(negatives), torch.zeros(drawn), torch.zeros(size), torch.zeros(drawn, 0))
    losses = objective(
        RetrievalOutput(scaled(query), scaled(candidate), scaled(negative)), make_batch(items, weights, draws=draws)
    )
    torch.where(torch.from_numpy(weights) > 0, losses, 0.0).sum().backward()

    leaves = [t.detach().double().requires_grad_() for t in (query, candidate, negative)]
    q, c, n = (scaled(t) for t in leaves)
    total = torch.zeros((), dtype=torch.float64)
    for row in np.flatnonzero(weights):
        others = [(q[row] * n[j]).sum() for j in range(drawn) if not (masked and negatives[j] == items[row])]
        loss = naive((q[row] * c[row]).sum(), others)
        assert float(losses[row].detach()) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
        total = total + loss
    total.backward()
    for ours, theirs in zip((query, candidate, negative), leaves, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PAIRWISE)
def test_a_row_whose_item_is_all_that_was_drawn_has_nothing_to_be_compared_with(kind):
    query, candidate = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    objective, _, _ = pairwise(kind, 2)
    draws = Draws(torch.tensor([3, 3]), torch.zeros(2), torch.zeros(1), torch.zeros(2, 0))
    losses = objective(RetrievalOutput(query, candidate, candidate.expand(2, 2)), make_batch([3], draws=draws))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1)) if kind == "negative_sampling" else 0.0])
    assert torch.isfinite(query.grad).all()
