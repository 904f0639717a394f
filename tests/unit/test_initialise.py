"""First values: a function of (seed, table, row)."""

import zlib

import numpy as np
import pytest
import torch

from embedshard.config import TableSpec
from embedshard.config.parts import InitConfig, TableOptimizerConfig, TableShardingConfig
from embedshard.sharding import initialise
from embedshard.sharding.initialise import initial_rows, initialise_tables
from embedshard.sharding.shards import Shard


def spec(name="item", rows=1000, dim=12, **init):
    return TableSpec(
        name=name,
        rows=rows,
        dim=dim,
        dtype="fp32",
        init=InitConfig(**init),
        optimizer=TableOptimizerConfig(),
        l2_lookup=0.0,
        weighted=False,
        lookups=(),
        sharding=TableShardingConfig(),
    )


@pytest.mark.parametrize("kind", ["normal", "uniform", "zeros"])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (17, 18), (3, 700), (999, 1001)])
def test_a_block_of_rows_is_the_same_wherever_it_is_made(kind, first, last):
    whole = initial_rows(5, spec(kind=kind), 0, 1001)
    np.testing.assert_array_equal(initial_rows(5, spec(kind=kind), first, last), whole[first:last])


def test_a_table_that_grows_keeps_its_rows():
    np.testing.assert_array_equal(initial_rows(5, spec(rows=2000), 0, 500), initial_rows(5, spec(rows=500), 0, 500))


def test_seeds_and_tables_differ():
    assert (initial_rows(5, spec(), 0, 10) != initial_rows(6, spec(), 0, 10)).all()
    assert (initial_rows(5, spec(), 0, 10) != initial_rows(5, spec(name="user"), 0, 10)).all()


@pytest.mark.parametrize(("kind", "deviation"), [("normal", 0.3), ("uniform", 0.3 / 3**0.5)])
def test_values_have_the_moments_that_the_config_names(kind, deviation):
    values = initial_rows(1, spec(kind=kind, scale=0.3, rows=20_000), 0, 20_000)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - deviation) < 0.005
    if kind == "uniform":
        assert np.abs(values).max() <= 0.3


def test_the_default_scale_is_one_over_the_root_of_dim():
    assert abs(initial_rows(1, spec(dim=64, rows=5000), 0, 5000).std() - 1 / 8) < 0.005


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_values_are_those_of_the_formula(kind):
    """A run that goes on, or a table that grows, counts on it: none but these, however they are computed."""
    words = np.random.Philox(key=np.array([5, zlib.crc32(b"item")], dtype=np.uint64)).random_raw(4000 * 12)
    if kind == "uniform":
        expected = (words >> np.uint64(11)) * 2.0**-52 - 1.0
    else:
        high, low = ((words >> np.uint64(32)) + 1.0) * 2.0**-32, (words & np.uint64(0xFFFFFFFF)) * 2.0**-32
        expected = np.sqrt(-2.0 * np.log(high)) * np.cos(2.0 * np.pi * low)
    values = initial_rows(5, spec(kind=kind, scale=0.3, rows=4000), 0, 4000)
    np.testing.assert_allclose(values.ravel(), expected * 0.3, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_threads_write_the_rows_of_a_shard(monkeypatch, kind, dtype):
    monkeypatch.setattr(initialise, "_PART_ELEMENTS", 100 * 12)
    monkeypatch.setattr(initialise, "_BLOCK_ELEMENTS", 30 * 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tensor = torch.full((711, 4), torch.nan, dtype=dtype)
    initialise_tables(5, [spec(kind=kind)], [Shard("item", "weight", tensor, (200, 4), (1001, 12))])
    whole = torch.from_numpy(initial_rows(5, spec(kind=kind), 0, 1001))
    assert tensor.equal(whole[200:911, 4:8].to(dtype))
