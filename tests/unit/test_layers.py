"""Encoders of sequences, each beside what a row alone would give, and dropout that no world changes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from embedshard.config import build_config, table_specs
from embedshard.config.parts import ConvEncoder, FlattenEncoder, PooledEncoder, RecurrentEncoder
from embedshard.errors import ConfigError
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.layers import Dropout, padded
from embedshard.models.text_classifier import make_encoder

DIM = 4
LENGTHS = [3, 0, 1, 7, 2]


def naive_pooling(kind):
    def naive(encoder, row):
        if not len(row):
            return torch.zeros(DIM)
        if kind == "attention":
            scores = encoder.score(torch.tanh(encoder.hidden(row))).squeeze(1)
            return (torch.softmax(scores, 0).unsqueeze(1) * row).sum(0)
        return row.mean(0) if kind == "mean" else row.amax(0)

    return naive


def naive_flatten(side):
    def naive(encoder, row):
        zeros = torch.zeros(8 - len(row), DIM)
        return torch.cat([zeros, row] if side == "pre" else [row, zeros]).flatten()

    return naive


def naive_convolutions(encoder, row):
    found = []
    for layer in encoder.layers:
        width = layer.kernel_size[0]
        edge = torch.zeros(width - 1, DIM)
        whole = torch.cat([edge, row, edge])
        windows = [whole[first : first + width] for first in range(len(row) + width - 1)] if len(row) else []
        values = [torch.relu((layer.weight * window.T).sum((1, 2)) + layer.bias) for window in windows]
        found.append(torch.stack(values).amax(0) if values else torch.zeros(layer.out_channels))
    return torch.cat(found)


def naive_recurrent(encoder, row):
    if not len(row):
        return torch.zeros(encoder.width)
    _, state = encoder.cell(row.unsqueeze(0))
    last = state[0] if isinstance(state, tuple) else state
    return last[-encoder._directions :, 0].flatten()


CASES = {
    "mean": (PooledEncoder(kind="mean"), naive_pooling("mean")),
    "max": (PooledEncoder(kind="max"), naive_pooling("max")),
    "attention": (PooledEncoder(kind="attention"), naive_pooling("attention")),
    "flatten pre": (FlattenEncoder(kind="flatten", padding="pre"), naive_flatten("pre")),
    "flatten post": (FlattenEncoder(kind="flatten", padding="post"), naive_flatten("post")),
    "conv": (ConvEncoder(kind="conv", widths=[1, 2, 5], channels=6), naive_convolutions),
    "gru": (RecurrentEncoder(kind="gru", hidden=5), naive_recurrent),
    "lstm": (RecurrentEncoder(kind="lstm", hidden=5, layers=2, bidirectional=True), naive_recurrent),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(3)
    config, naive = CASES[request.param]
    return make_encoder(config, DIM, 8), naive


def test_a_row_is_encoded_as_it_would_be_alone(case):
    encoder, naive = case
    lengths = torch.tensor(LENGTHS)
    values = torch.randn(sum(LENGTHS), DIM, requires_grad=True)
    found = encoder(values, lengths)
    assert found.shape == (len(LENGTHS), encoder.width)
    rows = torch.split(values, LENGTHS)
    expected = torch.stack([naive(encoder, row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    [ours] = torch.autograd.grad(found.square().sum(), values, retain_graph=True)
    [theirs] = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_longer_rows_beside_it_change_nothing(case):
    encoder, _ = case
    values = torch.randn(3 + 8, DIM)
    alone = encoder(values[:3], torch.tensor([3]))
    beside = encoder(values, torch.tensor([3, 8]))
    torch.testing.assert_close(beside[:1], alone, rtol=1e-6, atol=1e-6)


def test_rows_without_anything_are_zeros(case):
    encoder, _ = case
    found = encoder(torch.zeros(0, DIM), torch.tensor([0, 0]))
    assert found.shape == (2, encoder.width)
    assert not found.any()


def test_padding_is_where_it_is_asked_for():
    values = torch.arange(1.0, 4.0).unsqueeze(1)
    for side, expected in (("pre", [[0, 1, 2], [0, 0, 3]]), ("post", [[1, 2, 0], [3, 0, 0]])):
        block, reached = padded(values, torch.tensor([2, 1]), 3, side)
        assert block.squeeze(2).tolist() == expected
        assert reached.tolist() == [[number > 0 for number in row] for row in expected]


def batch(rows, step):
    return SimpleNamespace(rows=torch.tensor(rows), training_position=SimpleNamespace(step=step))


def test_dropout_is_drawn_by_seed_layer_step_and_row_alone():
    ones, rows = torch.ones(64, 50), list(range(100, 164))
    layer = Dropout(0.25, seed=7, layer=1)
    whole = layer(ones, batch(rows, 5))
    halves = torch.cat([layer(ones[:32], batch(rows[:32], 5)), layer(ones[32:], batch(rows[32:], 5))])
    assert whole.equal(halves), "ranks draw what one process draws"
    for other in (
        Dropout(0.25, 8, 1)(ones, batch(rows, 5)),
        Dropout(0.25, 7, 2)(ones, batch(rows, 5)),
        layer(ones, batch(rows, 6)),
    ):
        agreement = (other == whole).float().mean().item()
        assert abs(agreement - (0.25**2 + 0.75**2)) < 0.04
    assert sorted(whole.unique().tolist()) == pytest.approx([0.0, 4 / 3])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    found = Dropout(rate, seed=1, layer=1)(torch.ones(400, 100), batch(list(range(400)), 0))
    dropped = (found == 0).float().mean().item()
    assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / 40_000)
    assert (found == 0).float().mean(dim=0).std() < 4 * math.sqrt(rate * (1 - rate) / 400), "no column is dropped more often"
    layer = nn.Sequential(Dropout(rate, 1, 1)).eval()[0]
    assert layer(torch.ones(2, 2), batch([0, 1], 0)).equal(torch.ones(2, 2))


def test_a_table_may_not_have_a_name_that_torch_keeps(make_config):
    tables = {"user": {"rows": 40, "dim": 8}, "items": {"rows": 30, "dim": 8}}
    features = {"user_id": {"kind": "id", "table": "user"}, "item_id": {"kind": "id", "table": "items"}}
    tree = make_config().tree | {"tables": tables, "features": features}
    tree["model"] = {"kind": "two_tower", "user": {"features": ["user_id"]}, "item": {"features": ["item_id"]}}
    config = build_config(tree, {}, "test")
    with pytest.raises(ConfigError, match=r"tables\.items: torch's ModuleDict.* Name the table otherwise"):
        EmbeddingLookup(table_specs(config, {"user": 40, "items": 30}))
