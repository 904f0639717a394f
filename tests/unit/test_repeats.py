"""Rows with the same ids, mapped once: the vectors and gradients of mapping each row."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import build_config, table_specs
from embedshard.data.batch import Batch
from embedshard.models.repeats import Repeats, without_repeats
from embedshard.models.two_tower import TwoTower

SIZE, DIM = 40, 4


def ids_of(*limits, seed=1):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, limit, SIZE) for limit in limits]


@pytest.mark.parametrize(
    ("limits", "spacing"), [((7,), 1), ((3, 4), 1), ((7,), 2**50), ((2, 5, 3), 2**15)], ids=["one", "two", "large", "three"]
)
def test_each_kind_has_all_its_rows_in_the_order_of_the_batch(limits, spacing):
    ids = [column * spacing for column in ids_of(*limits)]
    found = Repeats.among(ids)
    rows = np.stack(ids, axis=1)
    assert found.count == len(np.unique(rows, axis=0))
    np.testing.assert_array_equal(rows[found.firsts][found.kinds], rows)
    order, begins = found.order.numpy(), found.begins.numpy()
    for kind, (begin, end) in enumerate(pairwise(begins)):
        np.testing.assert_array_equal(order[begin:end], np.flatnonzero(found.kinds.numpy() == kind))
        assert found.firsts[kind] == order[begin]


@pytest.mark.parametrize(
    "ids",
    [
        [np.arange(SIZE)],
        [np.full(SIZE, -1)],
        [np.full(SIZE, 2**62)],
        [np.arange(SIZE) // 2, np.full(SIZE, 2**60)],
        [np.zeros(0, np.int64)],
    ],
    ids=["all different", "negative", "large", "large together", "no rows"],
)
def test_nothing_is_merged_where_it_is_not_worth_it_or_not_possible(ids):
    assert Repeats.among(ids) is None


def test_a_gradient_is_the_sum_of_those_of_the_rows():
    repeats = Repeats.among(ids_of(6))
    vectors, factors = torch.randn(repeats.count, DIM, requires_grad=True), torch.randn(SIZE, DIM)
    spread = repeats.spread(vectors)
    torch.testing.assert_close(spread, vectors[repeats.kinds], rtol=0, atol=0)
    (spread * factors).sum().backward()
    expected = torch.zeros(repeats.count, DIM).index_add(0, repeats.kinds, factors)
    torch.testing.assert_close(vectors.grad, expected)


def batch_of(columns, lengths=None):
    """Returns a batch of these columns, each id a row unless lengths are given."""
    lengths = {name: np.ones(SIZE, np.int64) for name in columns} | (lengths or {})
    return Batch(
        sparse=KeyedJaggedTensor(
            keys=list(columns),
            values=torch.from_numpy(np.concatenate(list(columns.values()))),
            lengths=torch.from_numpy(np.concatenate([lengths[name] for name in columns])),
        ),
        weighted=None,
        dense=torch.zeros(SIZE, 0),
        labels=torch.zeros(SIZE, 1),
        weights=torch.ones(SIZE),
        ids={},
        rows=torch.arange(SIZE),
    )


def test_other_keys_stay_as_they_are():
    user, item = ids_of(5, 6)
    lengths = np.arange(SIZE) % 3
    bag = np.arange(lengths.sum())
    batch = batch_of({"user": user, "bag": bag, "item": item}, {"bag": lengths})
    shorter, (of_user, of_item) = without_repeats(batch, [["user"], ["item"]], is_shorter=True)
    assert shorter.sparse.stride() == SIZE, "the bag's rows are all needed"
    np.testing.assert_array_equal(shorter.sparse["bag"].values(), bag)
    np.testing.assert_array_equal(shorter.sparse["bag"].lengths(), lengths)
    for name, ids, repeats in (("user", user, of_user), ("item", item, of_item)):
        np.testing.assert_array_equal(shorter.sparse[name].values(), np.unique(ids))
        assert shorter.sparse[name].lengths().tolist() == [1] * repeats.count + [0] * (SIZE - repeats.count)
    assert shorter.labels is batch.labels


@pytest.mark.parametrize(("is_shorter", "rows"), [(True, 6), (False, SIZE)])
def test_a_batch_has_as_many_rows_as_its_largest_group_or_as_before(is_shorter, rows):
    user, item = ids_of(4, 6)
    shorter, _ = without_repeats(batch_of({"user": user, "item": item}), [["user"], ["item"]], is_shorter)
    assert shorter.sparse.stride() == rows
    assert shorter.sparse["user"].lengths().sum() == 4


def test_a_row_without_an_id_leaves_its_group_alone():
    user, item = ids_of(4, 6)
    lengths = np.ones(SIZE, np.int64)
    lengths[3] = 0
    batch = batch_of({"user": user[lengths > 0], "item": item}, {"user": lengths})
    shorter, (of_user, of_item) = without_repeats(batch, [["user"], ["item"]], is_shorter=True)
    assert of_user is None
    assert of_item is not None
    np.testing.assert_array_equal(shorter.sparse["user"].lengths(), lengths)


def two_towers(features=(), user=("user_id",), **changes):
    tree = {
        "data": {"train": "none/*.parquet", "label": "label"},
        "features": {
            "user_id": {"kind": "id", "table": "user"},
            "item_id": {"kind": "id", "table": "item"},
            **dict(features),
        },
        "tables": {"user": {"rows": 9, "dim": DIM}, "item": {"rows": 9, "dim": DIM}},
        "model": {
            "kind": "two_tower",
            "user": {"features": list(user), "mlp": [8, DIM]},
            "item": {"features": ["item_id"], "mlp": [8, DIM]},
            "biases": ["item"],
        },
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 64},
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = tree
        for parent in parents:
            place = place[parent]
        place[name] = value
    config = build_config(tree, {}, "test")
    return TwoTower(config, table_specs(config, {"user": 9, "item": 9}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (("user_id",), ("item_id", "item_id:bias"))),
        (
            {"features": {"age": {"kind": "dense"}}, "user": ("user_id", "age")},
            ((), ("item_id", "item_id:bias")),
        ),
        (
            {"features": {"seen": {"kind": "bag", "table": "item"}}, "user": ("user_id", "seen")},
            ((), ()),  # the bag is a mean: all of its table is looked up with weights
        ),
        ({"tables__user__l2_lookup": 0.1}, ((), ("item_id", "item_id:bias"))),
        ({"tables__item": {"dim": DIM, "vocabulary": {"kind": "managed", "rows": 128}}}, ((), ())),
        ({"objective": {"kind": "sampled_softmax", "num_negatives": 64}}, (("user_id",), ())),
    ],
    ids=["ids", "a number", "a bag", "a penalty", "ids that are counted", "items that are drawn"],
)
def test_only_towers_of_ids_alone_are_mapped_once(changes, expected):
    assert two_towers(**changes).ids_alone == expected


def test_a_model_trains_as_if_it_mapped_each_row():
    class Tables(torch.nn.Module):
        """Stands for the lookup of a sharded model."""

        def __init__(self, keys):
            super().__init__()
            self.is_uneven, self.rows = True, []
            self.tables = torch.nn.ModuleDict({key.replace(":", "_"): torch.nn.Embedding(9, DIM) for key in keys})

        def forward(self, batch):
            self.rows.append(batch.sparse.stride())
            found = {}
            for key in batch.sparse.keys():  # noqa: SIM118 (no mapping)
                jagged = batch.sparse[key]
                vectors = self.tables[key.replace(":", "_")](jagged.values())
                found[key] = vectors.new_zeros(batch.sparse.stride(), DIM)
                found[key][jagged.lengths() > 0] = vectors
            return found

    user, item = ids_of(8, 9)
    batch = batch_of({"user_id": user, "item_id": item, "item_id:bias": item})
    gradients, outputs, rows = [], [], []
    for merges in (True, False):
        torch.manual_seed(5)
        model = two_towers()
        model.embeddings = Tables(batch.sparse.keys())
        if not merges:
            model.ids_alone = ((), ())
        output = model(batch)
        (output.logits.square().sum() + output.query_BD[:7].sum()).backward()
        outputs.append(output.logits)
        rows.append(model.embeddings.rows)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert rows == [[9], [SIZE]]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
