"""What prepare scripts share: held-out rows against loops, and folders that are whole or not there."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.data.preparation import fetch, held_out_share, last_of_each, negatives_for, write_sets


def test_the_last_row_of_each_user_is_found():
    generator = np.random.default_rng(0)
    users, times = generator.integers(0, 7, 60), generator.integers(0, 9, 60)
    is_last = last_of_each(users, times)
    for user in np.unique(users):
        rows = np.flatnonzero(users == user)
        latest = max(rows, key=lambda row: (times[row], row))
        assert np.flatnonzero(is_last & (users == user)).tolist() == [latest]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_each_users_rows_is_held_out_the_same_each_time(share):
    users = np.random.default_rng(0).integers(0, 7, 300)
    held_out = held_out_share(users, share, seed=1)
    for user in np.unique(users):
        assert held_out[users == user].sum() == int((users == user).sum() * share)
    assert (held_out == held_out_share(users, share, seed=1)).all()
    assert (held_out != held_out_share(users, share, seed=2)).any()


def test_negatives_are_distinct_items_that_the_user_has_not_rated():
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 4, 50), generator.integers(0, 30, 50)
    drawn = negatives_for(np.arange(4), users, items, 9, seed=0).to_pylist()
    for user, negatives in enumerate(drawn):
        assert len(set(negatives)) == 9
        assert not set(negatives) & set(items[users == user].tolist())
        assert max(negatives) <= items.max()
    with pytest.raises(ValueError, match="29 negatives are asked for"):
        negatives_for(np.arange(4), users, items, 29, seed=0)


def test_sets_are_replaced_whole(tmp_path):
    assert write_sets({"train": pa.table({"a": [1, 2]}), "test": pa.table({"a": [3]})}, tmp_path) == {"train": 2, "test": 1}
    (tmp_path / "train" / "old.parquet").write_bytes(b"left over")
    write_sets({"train": pa.table({"a": [5]})}, tmp_path)
    assert pq.read_table(tmp_path / "train")["a"].to_pylist() == [5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_a_file_is_fetched_once_and_what_cannot_be_fetched_is_said(tmp_path):
    (tmp_path / "there.txt").write_text("content")
    url = (tmp_path / "there.txt").as_uri()
    assert fetch(url, tmp_path / "out").read_text() == "content"
    (tmp_path / "there.txt").write_text("other")
    assert fetch(url, tmp_path / "out").read_text() == "content"
    with pytest.raises(OSError, match=r"no\.txt cannot be fetched.*--source"):
        fetch((tmp_path / "no.txt").as_uri(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["there.txt"]
