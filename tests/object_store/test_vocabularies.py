"""Vocabularies that are counted and kept in an object store."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.data.dataset import open_dataset
from embedshard.errors import StorageError
from embedshard.storage import locate
from embedshard.world import open_world


def config_of(folder):
    tree = {
        "data": {"train": f"{folder}/*.parquet", "label": "label", "lanes": 2},
        "features": {"user": {"kind": "id", "table": "user"}, "item": {"kind": "id", "table": "item"}},
        "tables": {"user": {"dim": 4, "vocabulary": "auto"}, "item": {"dim": 4, "rows": 9}},
        "model": {"kind": "two_tower", "user": {"features": ["user"]}, "item": {"features": ["item"]}},
        "objective": {"kind": "mse"},
        "train": {"global_batch_size": 4},
    }
    return build_config(tree, {}, "test")


def test_a_run_keeps_its_vocabulary_in_a_bucket(bucket, tmp_path):
    users = [f"user {number % 7}" for number in range(40)]
    table = pa.table({"user": users, "item": np.arange(40) % 9, "label": np.zeros(40, np.float32)})
    pq.write_table(table, tmp_path / "a.parquet")
    folder = locate(f"{bucket}/run/vocabularies")
    with open_world("cpu") as world:
        made = open_dataset(config_of(tmp_path), world, None, folder=folder)
        assert folder.list_names() == ["user.parquet"]
        kept = open_dataset(config_of(tmp_path), world, made.resolved(), folder=folder)
        assert kept.resolved() == made.resolved()
        assert kept.vocabularies["user"].map_strings(pa.array(["user 5", "user 0", "user 9"])).tolist() == [5, 0, -1]
        with pytest.raises(StorageError, match="See that the bucket exists"):
            open_dataset(config_of(tmp_path), world, None, folder=locate(f"{bucket}-that-is-not-there/vocabularies"))


def test_a_file_is_put_and_fetched_a_part_at_a_time(bucket, tmp_path):
    content = np.random.default_rng(0).bytes(12 * 2**20)
    (tmp_path / "a").write_bytes(content)
    place = locate(f"{bucket}/folder/a")
    place.put_file(tmp_path / "a")
    assert place.size() == len(content)
    place.get_file(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
