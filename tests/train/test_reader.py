"""Batches: the rows that the order names, with their own values, however they are read."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedshard.config import table_specs
from embedshard.data.collate import Collator
from embedshard.data.dataset import open_dataset
from embedshard.data.reader import BatchReader, _ReadAhead
from embedshard.errors import DataError
from embedshard.stages import Laps
from embedshard.world import World, open_world


def read(config, start=0, stop=None, rank=0, world_size=1, resolved=None):
    with open_world("cpu") as world:
        dataset = open_dataset(config, world, resolved)
    collator = Collator(config, table_specs(config, dataset.table_rows))
    reader = BatchReader(
        dataset.order, dataset.train, dataset.cached, config.data.cache_bytes, collator, dataset.sampler, rank, world_size
    )
    stop = config.train.epochs * dataset.order.epoch_steps if stop is None else stop
    with reader.batches(start, stop) as batches:
        return dataset, list(batches)


def same(first, second):
    assert first.position == second.position
    assert first.rows.equal(second.rows)
    assert first.weights.equal(second.weights)
    assert first.labels.equal(second.labels)
    assert first.dense.equal(second.dense)
    for kind in ("sparse", "weighted", "sequences"):
        a, b = getattr(first, kind), getattr(second, kind)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.keys() == b.keys()
            assert a.values().equal(b.values())
            assert a.lengths().equal(b.lengths())
            assert (a.weights_or_none() is None) == (b.weights_or_none() is None)
            assert a.weights_or_none() is None or a.weights().equal(b.weights())


def all_features(make_config, **changes):
    features = {
        "weighted": {"kind": "weighted_bag", "table": "other", "column": "history", "weights": "history_weight"},
    }
    return make_config(
        {
            "data": {"labels": {"stars": "rating", "click": "clicked"}, "weight": "weight", **changes},
            "features": features,
            "tables": {"other": {"rows": 30, "dim": 8}},
        }
    ).config


def test_each_row_travels_with_its_own_values(make_config, interactions):
    config = all_features(make_config)
    dataset, batches = read(config)
    rows = [row for i in (0, 1) for row in pq.read_table(interactions / "train" / f"part-{i}.parquet").to_pylist()]
    ages = np.array([row["age"] for row in rows])
    mean, deviation = dataset.statistics.moments["age"]
    assert mean == pytest.approx(ages.mean())
    assert deviation == pytest.approx(ages.std())
    met = []
    for batch in batches:
        jagged = {key: part[key].to_dense() for part in (batch.sparse, batch.weighted) for key in list(part.keys())}
        weighted = batch.weighted["weighted"]
        weights = weighted.to_dense_weights()
        for place, number in enumerate(batch.rows.tolist()):
            if number < 0:
                assert batch.weights[place] == 0
                assert all(len(lists[place]) == 0 for lists in jagged.values())
                assert batch.ids["user_id"][place] == -1
                continue
            met.append(number)
            row = rows[number]
            assert jagged["user_id"][place].tolist() == [row["user_id"]]
            assert jagged["item_id:bias"][place].tolist() == [row["item_id"]]
            assert jagged["history"][place].tolist() == row["history"][-4:]
            shares = batch.weighted["history"].to_dense_weights()[place].tolist()
            assert shares == pytest.approx([1 / max(len(shares), 1)] * len(row["history"][-4:]))
            np.testing.assert_allclose(weights[place].tolist(), row["history_weight"], rtol=1e-6)
            assert batch.labels[place].tolist() == [row["rating"], row["clicked"]]
            assert batch.weights[place].item() == pytest.approx(row["weight"])
            assert batch.dense[place, 0].item() == pytest.approx((row["age"] - mean) / deviation, abs=1e-5)
            assert batch.ids["item_id"][place] == row["item_id"]
    assert sorted(met) == sorted([*range(203)] * 2)


@pytest.mark.parametrize("weight", [None, "weight"])
def test_batches_say_whether_all_their_rows_weigh_1(make_config, weight):
    config = make_config({"data": {"weight": weight}}).config
    batches = read(config)[1]
    assert [batch.is_full for batch in batches] == [weight is None and not batch.position.is_epoch_end for batch in batches]
    assert all(bool((batch.rows >= 0).all() and (batch.weights == 1).all()) for batch in batches if batch.is_full)


def test_an_error_comes_ahead_of_batches_that_are_ready():
    def produce():
        yield "first"
        raise DataError("the second")

    ahead = _ReadAhead(produce(), Laps(["ahead"]))
    ahead._thread.join()
    with pytest.raises(DataError, match="the second"):
        next(iter(ahead))


@pytest.mark.parametrize("taken", [0, 1, 5, 40])
def test_the_reader_is_a_few_batches_ahead_and_ends_when_it_is_closed(taken):
    made = []

    def produce():
        for number in range(1_000):
            made.append(number)
            yield number

    ahead = _ReadAhead(produce(), Laps(["ahead"]))
    batches = iter(ahead)
    assert [next(batches) for _ in range(taken)] == list(range(taken))
    ahead.close()
    assert not ahead._thread.is_alive()
    assert taken <= len(made) <= taken + 9


def test_all_batches_are_handed_on():
    ahead = _ReadAhead(iter(range(100)), Laps(["ahead"]))
    assert list(ahead) == list(range(100))
    ahead.close()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_streaming_gives_the_batches_of_a_cache(make_config, window):
    _, cached = read(all_features(make_config, window_steps=window))
    dataset, streamed = read(all_features(make_config, window_steps=window, cache_bytes=0))
    assert dataset.cached == [False]
    assert len(cached) == len(streamed) == 14
    for first, second in zip(cached, streamed, strict=True):
        same(first, second)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_reading_may_begin_at_any_step(make_config, cache_bytes):
    config = all_features(make_config, window_steps=3, cache_bytes=cache_bytes)
    _, whole = read(config)
    for start in range(1, 14):
        for batch in read(config, start)[1]:
            same(batch, whole[batch.position.step])


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_ranks_share_the_batch_in_rank_order(make_config, cache_bytes):
    changes = {
        "data": {"cache_bytes": cache_bytes, "window_steps": 3},
        "objective": {"kind": "sampled_softmax", "num_negatives": 8, "distribution": "popularity"},
    }
    config = make_config(changes).config
    _, alone = read(config)
    for world_size in (2, 4):
        ranks = [read(config, rank=rank, world_size=world_size)[1] for rank in range(world_size)]
        for step, batch in enumerate(alone):
            parts = [rank[step] for rank in ranks]
            for name in ("rows", "weights", "dense"):
                joined = np.concatenate([getattr(part, name).numpy() for part in parts])
                np.testing.assert_array_equal(joined, getattr(batch, name).numpy())
            np.testing.assert_array_equal(
                np.concatenate([part.draws.ids.numpy() for part in parts]), batch.draws.ids.numpy()
            )
            np.testing.assert_array_equal(
                np.concatenate([part.weighted["history"].values().numpy() for part in parts]),
                batch.weighted["history"].values().numpy(),
            )


def test_the_window_length_is_resolved_and_kept(make_config):
    cached, _ = read(make_config().config, stop=1)
    assert cached.resolved()["window_steps"] == [0], "the whole lane"
    streamed, _ = read(make_config({"data": {"cache_bytes": 0}}).config, stop=1)
    assert streamed.resolved()["window_steps"] == [2**20 // 32]
    # A resumed run on a machine with more cache keeps the order that it began with.
    resumed, _batches = read(make_config().config, resolved=streamed.resolved())
    assert resumed.order.window_steps == streamed.order.window_steps


def test_draws_are_the_catalogue_by_its_distribution(make_config):
    changes = {"objective": {"kind": "sampled_softmax", "num_negatives": 4096, "distribution": "popularity", "alpha": 0.5}}
    _dataset, batches = read(make_config(changes).config)
    drawn = np.concatenate([batch.draws.ids.numpy() for batch in batches])
    log_q = np.concatenate([batch.draws.log_q.numpy() for batch in batches])
    items = np.concatenate([batch.ids["item_id"].numpy() for batch in batches])
    counts = np.bincount(items[items >= 0], minlength=30) / 2
    expected = counts**0.5 / (counts**0.5).sum()
    np.testing.assert_allclose(np.exp(log_q), expected[drawn], rtol=1e-4)
    shares = np.bincount(drawn, minlength=30) / len(drawn)
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(expected.max() / len(drawn)))
    for batch in batches:
        own = batch.ids["item_id"].numpy()
        valid = own >= 0
        np.testing.assert_allclose(np.exp(batch.draws.own_log_q.numpy()[valid]), expected[own[valid]], rtol=1e-4)
    items = batches[0].weighted  # the table is also looked up for the mean of a history
    slots = [lookup for lookup in map(str, items.keys()) if lookup.startswith("item_id:negative")]
    assert len(slots) == 4096 // 32
    looked_up = np.concatenate([items[key].values().numpy() for key in slots])
    np.testing.assert_array_equal(looked_up, batches[0].draws.ids.numpy())


def test_the_worlds_are_values():
    assert World.__dataclass_params__.frozen
