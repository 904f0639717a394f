"""SASRec row by row, what each place is to tell, and dropout that padding and world do not change."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import build_config, table_specs
from embedshard.data.batch import Batch, Draws
from embedshard.data.order import Position
from embedshard.errors import ConfigError
from embedshard.models import sasrec
from embedshard.models.layers import PlaceDropout, padded
from embedshard.models.registry import build_model, build_objective
from embedshard.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
DIM, ITEMS = 8, 20
LENGTHS = [3, 0, 1, 5]


def make_tree(**model):
    return {
        "data": {"train": "nowhere.parquet", "lanes": 1},
        "features": {
            "history": {"kind": "sequence", "table": "item", "max_length": 6},
            "item_id": {"kind": "id", "table": "item"},
            "user_id": {"kind": "id", "table": "user"},
        },
        "tables": {"item": {"rows": ITEMS, "dim": DIM}, "user": {"rows": 4, "dim": 4}},
        "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "user_id": "user_id", **model},
        "objective": {"kind": "sampled_softmax", "num_negatives": 6},
        "train": {"global_batch_size": 4},
    }


class Given(nn.Module):
    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors

    def forward(self, batch):
        return self.vectors


@pytest.fixture
def made():
    config = build_config(make_tree(blocks=2, heads=2), {}, "test")
    specs = table_specs(config, {"item": ITEMS, "user": 4})
    model = build_model(config, specs).eval()
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(ITEMS, DIM, generator=generator)
    history, own = torch.randint(ITEMS, (sum(LENGTHS),), generator=generator), torch.tensor([7, 8, 9, 4])
    drawn = torch.randint(ITEMS, (6,), generator=generator)
    slots = torch.cat([drawn, torch.zeros(2, dtype=torch.int64)]).chunk(2)
    vectors = {"history": table[history], "item_id": table[own]}
    vectors |= {f"item_id:negative{slot}": table[ids] for slot, ids in enumerate(slots)}
    model.embeddings = Given(vectors)
    batch = Batch(
        sparse=None,
        weighted=None,
        sequences=KeyedJaggedTensor(keys=["history"], values=history, lengths=torch.tensor(LENGTHS)),
        dense=torch.zeros(4, 0),
        labels=torch.zeros(4, 0),
        weights=torch.tensor([1.0, 1.0, 2.0, 0.0]),
        ids={"item_id": own},
        rows=torch.arange(4),
        draws=Draws(drawn, torch.full((6,), -math.log(ITEMS)), torch.zeros(4), torch.zeros(6, 0)),
        position=Position(3, 0, 0, 3, False),
    )
    return config, specs, model, table, batch


def naive_row(model, vectors):
    """What is known at each place, by attention written out."""
    length = len(vectors)
    values = vectors * math.sqrt(DIM) + torch.stack([model.places[length - 1 - place] for place in range(length)])
    for block in model.blocks:
        normed = block.attention_norm(values)
        queries, keys, contents = block.query(normed), block.key(normed), block.value(normed)
        found = []
        for place in range(length):
            parts = []
            for head in range(2):
                of_head = slice(head * DIM // 2, (head + 1) * DIM // 2)
                scores = keys[: place + 1, of_head] @ queries[place, of_head] / math.sqrt(DIM // 2)
                parts.append(torch.softmax(scores, 0) @ contents[: place + 1, of_head])
            found.append(torch.cat(parts))
        values = values + block.attended(torch.stack(found))
        values = values + block.output(torch.relu(block.dense(block.dense_norm(values))))
    return model.norm(values)


def test_each_row_is_what_it_would_be_alone(made):
    _, _, model, _, batch = made
    output, queries = model(batch), model.encode_queries(batch)
    start = 0
    for row, length in enumerate(LENGTHS):
        place = slice(start, start + length)
        if length:
            expected = naive_row(model, model.embeddings.vectors["history"][place])
            torch.testing.assert_close(output.query_VD[place], expected)
            torch.testing.assert_close(queries[row], expected[-1])
        else:
            assert queries[row].abs().max() == 0
        start += length
    assert model.encode_candidates(batch) is model.embeddings.vectors["item_id"]


def test_each_place_is_to_tell_the_next_item_and_the_last_the_rows_own(made):
    _, _, model, table, batch = made
    output = model(batch)
    history = batch.sequences["history"].values().tolist()
    expected = [*history[1:3], 7, 9, *history[5:9], 4]
    assert output.target_V.tolist() == expected
    assert output.target_VD.equal(table[torch.tensor(expected)])
    assert output.rows.tolist() == [0] * 3 + [2] + [3] * 5
    assert output.weights.tolist() == [1.0] * 3 + [2.0] + [0.0] * 5
    assert output.negative_ND.equal(table[batch.draws.ids])


@pytest.mark.parametrize("mask_list", [False, True])
def test_the_loss_is_a_softmax_over_the_next_and_the_drawn(made, mask_list):
    _, specs, model, table, batch = made
    tree = make_tree(blocks=2, heads=2)
    tree["objective"]["mask_list"] = mask_list
    config = build_config(tree, {}, "test")
    drawn = batch.draws.ids
    drawn[:4] = torch.stack([*batch.sequences["history"].values()[[0, 8]], *batch.ids["item_id"][[0, 3]]])
    model.embeddings.vectors |= {
        f"item_id:negative{slot}": table[ids]
        for slot, ids in enumerate(torch.cat([drawn, torch.zeros(2, dtype=torch.int64)]).chunk(2))
    }
    output = model(batch)
    output.query_VD = output.query_VD.detach()
    losses = build_objective(config, specs, ALONE)(output, batch)
    lists = [
        {*history.tolist(), own.item()}
        for history, own in zip(batch.sequences["history"].values().split(LENGTHS), batch.ids["item_id"], strict=True)
    ]
    left_out = 0
    for place in range(len(losses)):
        own = output.target_V[place].item()
        total = math.exp(output.query_VD[place] @ table[own])
        for item in drawn.tolist():
            if item in (lists[output.rows[place]] if mask_list else {own}):
                left_out += 1
            else:
                total += math.exp(output.query_VD[place] @ table[item]) * ITEMS / 6
        assert losses[place].item() == pytest.approx(
            math.log(total) - (output.query_VD[place] @ table[own]).item(), rel=1e-4
        )
    assert left_out > 12 if mask_list else left_out >= 2


@pytest.mark.parametrize("is_cpu", [True, False], ids=["row by row", "padded"])
def test_rows_are_attended_to_alike_alone_and_padded(made, monkeypatch, is_cpu):
    _, _, model, _, batch = made
    vectors, lengths = model.embeddings.vectors["history"], torch.tensor(LENGTHS)
    expected = model.encode_padded(padded(vectors, lengths, 6, "post")[0], lengths, batch)
    if not is_cpu:
        monkeypatch.setattr(sasrec, "_is_cpu", lambda values: False)
    torch.testing.assert_close(model.encode_queries(batch), expected)
    last = [sum(LENGTHS[: row + 1]) - 1 for row, length in enumerate(LENGTHS) if length]
    torch.testing.assert_close(model(batch).query_VD[last], expected[torch.tensor(LENGTHS) > 0])


def test_rows_without_lists_train_nothing(made):
    _, _, model, _, batch = made
    empty = KeyedJaggedTensor(keys=["history"], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(4).long())
    model.embeddings.vectors |= {"history": torch.zeros(0, DIM)}
    output = model.train()(replace(batch, sequences=empty))
    assert output.query_VD.shape == (0, DIM)
    output.query_VD.sum().backward()
    assert all(part.grad is not None and not part.grad.any() for part in model.parameters())
    assert not model.eval().encode_queries(replace(batch, sequences=empty)).any()


def test_dropout_of_a_place_depends_on_no_other(made):
    *_, batch = made
    dropout = PlaceDropout(0.25, seed=3, layer=2)

    def drawn(lengths, batch=batch):
        found = dropout(torch.ones(sum(lengths), 96), batch, torch.tensor(lengths))
        return found.split(lengths)

    long, short = drawn([50] * 4), drawn([20, 0, 3, 50])
    assert all(some.equal(whole[: len(some)]) for some, whole in zip(short, long, strict=True))
    swapped = drawn([50] * 4, replace(batch, rows=torch.tensor([1, 0, 3, 2])))
    assert swapped[0].equal(long[1])
    later = drawn([50] * 4, replace(batch, position=Position(4, 0, 0, 4, False)))
    layered = PlaceDropout(0.25, seed=3, layer=3)(torch.ones(50, 96), batch, torch.tensor([50, 0, 0, 0]))
    for other in (long[1], later[0], layered, long[0].roll(1, 0)):
        assert (other == long[0]).float().mean().item() == pytest.approx(0.25**2 + 0.75**2, abs=0.03)
    dropout.eval()
    assert drawn([20] * 4)[0].min() == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.8])
def test_dropout_of_places_drops_its_share_of_each_column_and_pair_of_columns(made, rate):
    *_, batch = made
    places = [20_000, 20_000, 0, 10_000]
    kept = PlaceDropout(rate, seed=3, layer=2)(torch.ones(50_000, 96), batch, torch.tensor(places))
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / (1 - rate)])
    columns = (kept > 0).float()
    deviation = math.sqrt(rate * (1 - rate))
    assert (columns.mean(0) - (1 - rate)).abs().max() < 5 * deviation / math.sqrt(50_000)
    correlations = ((columns - (1 - rate)) / deviation).T.cov(correction=0)
    assert (correlations - correlations.diag().diag()).abs().max() < 6 / math.sqrt(50_000)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "sequence"), "histroy", "there is no feature 'histroy'. Did you mean 'history'"),
        (("model", "sequence"), "item_id", "feature 'item_id' is an id. Make it a 'sequence'"),
        (("model", "item_id"), "user_id", "'user_id' is looked up in 'user', 'history' in 'item'"),
        (("model", "item_id"), "history", "feature 'history' is a sequence, it must be an id"),
        (("model", "heads"), 3, "heads=3 does not divide the 8 numbers"),
        (("features", "history", "max_length"), None, r"give features\.history\.max_length"),
        (("features", "history", "keep"), "first", "'keep: last'"),
        (("objective",), {"kind": "in_batch_softmax"}, "Choose 'sampled_softmax'"),
        (("objective", "mixed"), True, "without 'mixed'"),
        (
            ("objective",),
            {"kind": "sampled_softmax", "mask_list": True, "mask_accidental_hits": False},
            r"leave objective\.mask_accidental_hits on",
        ),
    ],
)
def test_what_a_sasrec_cannot_be_is_refused(path, value, words):
    tree = node = make_tree()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError, match=words):
        build_config(tree, {}, "test")
