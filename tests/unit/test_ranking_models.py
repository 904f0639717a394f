"""Ranking models, each beside its formula written out; norms and pooling by a target beside a row by row computation."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import InteractionArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import bias_key, build_config, table_specs
from embedshard.data.batch import Batch
from embedshard.data.order import Position
from embedshard.models.deepfm import pair_products
from embedshard.models.dlrm import DotInteraction
from embedshard.models.fields import TargetPooling
from embedshard.models.mlp import MLP, BatchNorm
from embedshard.models.objectives.pointwise import Pointwise
from embedshard.models.output import LabelOutput
from embedshard.models.registry import build_model, build_objective
from embedshard.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
ROWS, DIM = 5, 4
IDS = ("user", "item", "tags")


class Given(nn.Module):
    """In place of tables: what was looked up."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors

    def forward(self, batch):
        return self.vectors


def make_config(model, labels=None, **changes):
    tree = {
        "data": {"train": "nowhere.parquet", **({"labels": labels} if labels else {"label": "click"})},
        "features": {
            "user": {"kind": "id", "table": "user"},
            "age": {"kind": "dense"},
            "item": {"kind": "id", "table": "item"},
            "tags": {"kind": "bag", "table": "tag"},
            "price": {"kind": "dense"},
        },
        "tables": {"user": {"rows": 3, "dim": DIM}, "item": {"rows": 3, "dim": DIM}, "tag": {"rows": 3, "dim": DIM}},
        "model": model,
        "objective": {"kind": "bce"},
        **changes,
    }
    return build_config(tree, {}, "test")


def make_batch(generator, weights=None, position=None):
    return Batch(
        sparse=None,
        weighted=None,
        dense=torch.randn(ROWS, 2, generator=generator),
        labels=torch.randint(0, 2, (ROWS, 1), generator=generator).float(),
        weights=torch.ones(ROWS) if weights is None else torch.tensor(weights),
        ids={},
        rows=torch.arange(ROWS),
        position=position,
    )


def build(config):
    """A model over given vectors, those vectors, and a batch."""
    generator = torch.Generator().manual_seed(3)
    model = build_model(config, table_specs(config, dict.fromkeys(config.tables, 3)))
    keys = [*IDS, *(bias_key(name) for name in IDS)]
    vectors = {key: torch.randn(ROWS, DIM, generator=generator) for key in keys}
    model.embeddings = Given(vectors)
    return model, vectors, make_batch(generator)


def naive_mlp(mlp, row):
    for linear in mlp.linears:
        row = torch.relu(linear.weight @ row + linear.bias)
    return row


def naive_head(head, row):
    return (head.weight @ row + head.bias)[0]


def side_by_side(vectors, batch, row):
    return torch.cat([*(vectors[name][row] for name in IDS), batch.dense[row]])


def dlrm(model, vectors, batch, row):
    dense = naive_mlp(model.dense_mlp, batch.dense[row])
    products = [a @ b for a, b in combinations([dense, *(vectors[name][row] for name in IDS)], 2)]
    return naive_head(model.head, naive_mlp(model.mlp, torch.cat([dense, torch.stack(products)])))


def cross(model, first):
    x = first
    for layer, bias in enumerate(model.cross.bias):
        if hasattr(model.cross, "kernels"):
            matrix = model.cross.kernels[layer]
        else:
            matrix = model.cross.W_kernels[layer] @ model.cross.V_kernels[layer]
        x = first * (matrix @ x + bias.flatten()) + x
    return x


def stacked(model, vectors, batch, row):
    return naive_head(model.head, naive_mlp(model.mlp, cross(model, side_by_side(vectors, batch, row))))


def parallel(model, vectors, batch, row):
    joined = side_by_side(vectors, batch, row)
    return naive_head(model.head, torch.cat([cross(model, joined), naive_mlp(model.mlp, joined)]))


def deepfm(model, vectors, batch, row):
    dense = [number * vector for number, vector in zip(batch.dense[row], model.dense_vectors, strict=True)]
    second = sum(a @ b for a, b in combinations([*(vectors[name][row] for name in IDS), *dense], 2))
    first = sum(vectors[bias_key(name)][row, 0] for name in IDS) + naive_head(model.linear, batch.dense[row])
    return first + second + naive_head(model.head, naive_mlp(model.mlp, side_by_side(vectors, batch, row)))


def wide_and_deep(model, vectors, batch, row):
    wide = vectors[bias_key("item")][row, 0] + model.linear.weight[0, 0] * batch.dense[row, 1]
    return wide + naive_head(model.head, naive_mlp(model.mlp, side_by_side(vectors, batch, row)))


def mmoe(model, vectors, batch, row):
    joined = side_by_side(vectors, batch, row)
    logits = []
    for gate, tower, head in zip(model.gates, model.towers, model.heads, strict=True):
        shares = torch.softmax(gate.weight @ joined, 0)
        mixed = sum(share * naive_mlp(expert, joined) for share, expert in zip(shares, model.experts, strict=True))
        logits.append(naive_head(head, naive_mlp(tower, mixed)))
    return torch.stack(logits)


CASES = {
    "dlrm": ({"kind": "dlrm", "dense_mlp": [6], "mlp": [7, 5]}, dlrm),
    "stacked": ({"kind": "dcn_v2", "cross_layers": 3, "mlp": [7]}, stacked),
    "stacked low rank": ({"kind": "dcn_v2", "low_rank": 2, "mlp": [7]}, stacked),
    "crossed alone": ({"kind": "dcn_v2", "mlp": []}, stacked),
    "parallel": ({"kind": "dcn_v2", "structure": "parallel", "mlp": [7, 5]}, parallel),
    "parallel low rank": ({"kind": "dcn_v2", "structure": "parallel", "low_rank": 3, "mlp": [7]}, parallel),
    "deepfm": ({"kind": "deepfm", "mlp": [7]}, deepfm),
    "wide_and_deep": ({"kind": "wide_and_deep", "wide": ["item", "price"], "mlp": [7]}, wide_and_deep),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_its_formula(case):
    options, naive = CASES[case]
    model, vectors, batch = build(make_config(options))
    expected = torch.stack([naive(model, vectors, batch, row) for row in range(ROWS)])
    torch.testing.assert_close(model(batch).logits, expected)


def test_mmoe_gives_each_label_a_gate_and_a_tower():
    config = make_config({"kind": "mmoe", "experts": 3, "expert_mlp": [6], "mlp": [5]}, labels={"click": "c", "buy": "b"})
    model, vectors, batch = build(config)
    expected = torch.stack([mmoe(model, vectors, batch, row) for row in range(ROWS)])
    torch.testing.assert_close(model(batch).logits_BL, expected)


def test_without_dense_features_a_dlrm_has_products_alone():
    model, vectors, batch = build(make_config({"kind": "dlrm", "features": list(IDS), "mlp": [7]}))
    for row in range(ROWS):
        products = torch.stack([vectors[a][row] @ vectors[b][row] for a, b in combinations(IDS, 2)])
        torch.testing.assert_close(model(batch).logits[row], naive_head(model.head, naive_mlp(model.mlp, products)))


@pytest.mark.parametrize("num_vectors", [2, 3, 9])
def test_products_and_their_gradient_are_those_of_torchrec(num_vectors):
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(ROWS, num_vectors, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = DotInteraction(num_vectors)
    expected = InteractionArch(num_vectors - 1).double()(vectors[:, 0], vectors[:, 1:])[:, DIM:]
    assert ours.num_pairs == expected.shape[1]
    torch.testing.assert_close(ours(vectors), expected)
    torch.testing.assert_close(ours.eval()(vectors), expected)
    ours.train()
    assert torch.autograd.gradcheck(ours, vectors)


def test_features_are_read_in_the_order_of_the_model():
    options = {"kind": "dcn_v2", "mlp": [], "features": ["price", "item", "age", "user"]}
    model, vectors, batch = build(make_config(options))
    read, numbers = model.fields(vectors, batch)
    assert [vector is vectors[name] for vector, name in zip(read, ("item", "user"), strict=True)] == [True, True]
    assert numbers.equal(batch.dense[:, [1, 0]])


def test_products_of_pairs_do_not_mix_columns():
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [-1.0, 4.0]]])
    assert pair_products(vectors).item() == (3 + 10) + (-1 + 8) + (-3 + 20)


def test_tables_of_the_first_order_are_those_that_the_model_reads():
    specs = table_specs(
        make_config({"kind": "deepfm", "features": ["user", "tags", "age"]}), {"user": 3, "item": 4, "tag": 5}
    )
    derived = {spec.name: spec for spec in specs if ":" in spec.name}
    assert list(derived) == ["user:bias", "tags:bias"]
    assert derived["tags:bias"].weighted, "a mean, as the bag is"
    assert not derived["user:bias"].weighted
    assert derived["tags:bias"].rows == 5


# ------------------------------------------------------------------------------------------------------ norm and dropout
@pytest.mark.parametrize("weights", [[1.0] * ROWS, [2.0, 1.0, 0.0, 3.0, 1.0]])
def test_batch_norm_counts_a_row_as_often_as_it_weighs(weights):
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(generator, weights)
    values = (torch.randn(ROWS, 3, generator=generator) * 5 + 100).requires_grad_()
    slopes = torch.randn(ROWS, 3, generator=generator) * torch.tensor(weights)[:, None]
    norm = BatchNorm(3, ALONE)
    (norm(values, batch) * slopes).sum().backward()

    repeated = torch.repeat_interleave(values.detach(), torch.tensor(weights).long(), dim=0).requires_grad_()
    theirs = nn.BatchNorm1d(3)
    counts = torch.tensor(weights).long()
    expected = theirs(repeated)
    shared = torch.repeat_interleave(slopes / torch.tensor(weights).clamp(min=1)[:, None], counts, dim=0)
    (expected * shared).sum().backward()
    first = torch.cumsum(counts, 0) - counts
    for row in range(ROWS):
        if weights[row]:
            torch.testing.assert_close(norm(values, batch)[row], expected[first[row]], atol=1e-4, rtol=1e-4)
            gradient = repeated.grad[first[row] : first[row] + counts[row]].sum(0)
            torch.testing.assert_close(values.grad[row], gradient, atol=1e-4, rtol=1e-3)
        else:
            assert values.grad[row].abs().max() == 0, "a row of weight 0 changes nothing"


def test_batch_norm_evaluates_by_running_moments():
    generator = torch.Generator().manual_seed(0)
    batch, norm = make_batch(generator), BatchNorm(3, ALONE)
    values = torch.randn(ROWS, 3, generator=generator) * 2 + 1
    for _ in range(200):
        norm(values, batch)
    norm.eval()
    expected = (values - values.mean(0)) / torch.sqrt(values.var(0, correction=0) + 1e-5)
    torch.testing.assert_close(norm(values, batch), expected, atol=1e-4, rtol=1e-4)


def test_layers_have_norms_and_draws_of_their_own():
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(generator, position=Position(4, 0, 0, 4, False))
    layered = MLP(3, [4, 4], "layer", 0.0, 1, 1, ALONE)
    values = torch.randn(ROWS, 3, generator=generator)
    expected = values
    for linear, norm in zip(layered.linears, layered.norms, strict=True):
        centred = linear(expected) - linear(expected).mean(1, keepdim=True)
        expected = torch.relu(centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5) * norm.weight + norm.bias)
    torch.testing.assert_close(layered(values, batch), expected)

    dropped = MLP(3, [200, 200], "none", 0.5, 1, 1, ALONE)
    ones = torch.ones(ROWS, 200)
    masks = [dropout(ones, batch) > 0 for dropout in dropped.dropouts]
    assert 0.4 < masks[0].float().mean() < 0.6
    assert not masks[0].equal(masks[1])
    dropped.eval()
    assert dropped(values, batch).equal(dropped(values, replace(batch, position=None)))


# ------------------------------------------------------------------------------------------------------------- sequences
def test_a_target_weighs_the_history():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 1, 4, 2])
    values, targets = torch.randn(10, DIM, generator=generator), torch.randn(ROWS, DIM, generator=generator)
    pooling = TargetPooling(DIM, [6])
    found = pooling(values, lengths, targets)
    start = 0
    for row, length in enumerate(lengths.tolist()):
        total = torch.zeros(DIM)
        for vector in values[start : start + length]:
            seen = torch.cat([vector, targets[row], vector - targets[row], vector * targets[row]])
            total = total + pooling.weight(seen) * vector
        torch.testing.assert_close(found[row], total)
        start += length
    assert found[1].abs().max() == 0


def test_a_sequence_is_pooled_as_the_model_says():
    features = {
        "item": {"kind": "id", "table": "item"},
        "seen": {"kind": "sequence", "table": "item"},
        "words": {"kind": "sequence", "table": "word"},
    }
    tables = {"item": {"rows": 3, "dim": DIM}, "word": {"rows": 3, "dim": DIM}}
    sequences = {"seen": {"kind": "target_attention", "target": "item"}, "words": "mean"}
    options = {"kind": "dcn_v2", "mlp": [], "sequences": sequences}
    config = make_config(options, features=features, tables=tables)
    model = build_model(config, table_specs(config, {"item": 3, "word": 3}))
    generator = torch.Generator().manual_seed(0)
    lengths = {"seen": [2, 0, 1, 0, 1], "words": [1, 1, 0, 2, 1]}
    sequences = KeyedJaggedTensor(
        keys=list(lengths),
        values=torch.zeros(9, dtype=torch.int64),
        lengths=torch.tensor([*lengths["seen"], *lengths["words"]]),
    )
    sizes = {"item": ROWS, "seen": 4, "words": 5}
    vectors = {name: torch.randn(size, DIM, generator=generator) for name, size in sizes.items()}
    batch = replace(make_batch(generator), sequences=sequences)
    read, _ = model.fields(vectors, batch)
    assert read[0] is vectors["item"]
    torch.testing.assert_close(
        read[1], model.fields.poolings["seen"](vectors["seen"], torch.tensor(lengths["seen"]), vectors["item"])
    )
    torch.testing.assert_close(read[2][3], vectors["words"][2:4].mean(0))


# ---------------------------------------------------------------------------------------------------------------- labels
def test_losses_of_several_labels_are_added_by_their_weights():
    changes = {"objective": {"kind": "bce", "label_weights": {"buy": 3.0}}}
    config = make_config({"kind": "mmoe"}, labels={"click": "c", "buy": "b"}, **changes)
    objective = build_objective(config, table_specs(config, dict.fromkeys(config.tables, 3)), ALONE)
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    batch = replace(make_batch(torch.Generator()), labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    expected = [math.log1p(math.exp(-0.5)) + 3 * math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0)) + 3 * math.log(2.0)]
    torch.testing.assert_close(objective(LabelOutput(logits), batch), torch.tensor(expected))
    squared = Pointwise("mse", [1.0, 0.5])(LabelOutput(logits), batch)
    torch.testing.assert_close(squared, torch.tensor([0.25 + 0.5, 4.0 + 0.5]))
