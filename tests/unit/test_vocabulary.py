"""Vocabularies: the stated hash, pinned; files of ids; and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.data.hashing import hash_integers, hash_strings
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.errors import ConfigError, DataError

MASK = 2**64 - 1


def splitmix(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def reference(value, seed):
    start = (seed + 1) * 0x9E3779B97F4A7C15
    if isinstance(value, int):
        return splitmix((value + start) & MASK)
    word = 0xCBF29CE484222325
    for byte in value.encode():
        word = ((word ^ byte) * 0x100000001B3) & MASK
    return splitmix((word + start) & MASK)


def vocabulary(spec, rows=None):
    table = {"dim": 4, "vocabulary": spec} | ({} if rows is None else {"rows": rows})
    config = build_config(
        {
            "data": {"train": "x", "label": "y"},
            "features": {"f": {"kind": "id", "table": "t"}},
            "tables": {"t": table},
            "model": {"kind": "two_tower", "user": {"features": ["f"]}, "item": {"features": ["f"]}},
            "objective": {"kind": "mse"},
        },
        {},
        "test",
    )
    loaded = load_vocabularies(config)
    assert table_rows(loaded) == {"t": loaded["t"].rows}
    return loaded["t"]


def test_the_hash_is_the_stated_one_and_pinned():
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first output of splitmix64 from state 0"
    integers = [0, 1, -1, 2**62, -(2**63)]
    for seed in (0, 1, 12345):
        assert hash_integers(np.array(integers), seed).tolist() == [reference(i, seed) for i in integers]
        words = ["", "a", "ab", "b" * 40, "Käse 🧀"]
        assert hash_strings(pa.array(words), seed).tolist() == [reference(word, seed) for word in words]
        assert hash_strings(pa.array(["skipped", *words]).slice(1), seed).tolist() == [reference(w, seed) for w in words]
    assert hash_integers(np.array([7]), 0).tolist() == [0x63CBE1E459320DD7]
    assert hash_strings(pa.array(["user-7"]), 3).tolist() == [reference("user-7", 3)]


def test_hashes_spread_evenly():
    rows = vocabulary({"kind": "hash", "rows": 100}).map_integers(np.arange(100_000))
    assert np.bincount(rows, minlength=100).std() < 3 * np.sqrt(1000)


def test_a_file_of_integers_maps_each_id_to_its_row(tmp_path):
    pq.write_table(pa.table({"id": pa.array([30, 10, 20], pa.int32())}), tmp_path / "v.parquet")
    loaded = vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet")})
    assert loaded.rows == 3
    assert loaded.map_integers(np.array([10, 20, 30, 5, 40])).tolist() == [1, 2, 0, -1, -1]
    with pytest.raises(DataError, match="holds integers"):
        loaded.map_strings(pa.array(["10"]))


def test_a_file_of_strings_maps_each_to_its_row(tmp_path):
    pq.write_table(pa.table({"n": [1, 2], "id": ["b", "a"]}), tmp_path / "v.parquet")
    loaded = vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet"), "column": "id"})
    assert loaded.map_strings(pa.array(["a", "b", "c"])).tolist() == [1, 0, -1]
    with pytest.raises(DataError, match="holds strings"):
        loaded.map_integers(np.array([1]))
    with pytest.raises(ConfigError, match=r"columns n, id.*vocabulary\.column"):
        vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet")})
    with pytest.raises(ConfigError, match="no column 'x'"):
        vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet"), "column": "x"})
    with pytest.raises(ConfigError, match=r"rows is 5.*has 2 ids"):
        vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet"), "column": "id"}, rows=5)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (pa.array([1, 2, 1]), "rows 0 and 2.*are both 1"),
        (pa.array(["a", None]), "row 1 of column 'id' is null"),
        (pa.array([1.5]), "is double"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, ids, words):
    pq.write_table(pa.table({"id": ids}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=words):
        vocabulary({"kind": "file", "path": str(tmp_path / "v.parquet")})


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no\.parquet cannot be read"):
        vocabulary({"kind": "file", "path": str(tmp_path / "no.parquet")})


def test_fingerprints_tell_vocabularies_apart(tmp_path):
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [2, 1]}), tmp_path / "b.parquet")
    specs = [{"kind": "identity"}, {"kind": "hash"}, {"kind": "hash", "seed": 1}]
    prints = [vocabulary(spec, rows=2).fingerprint for spec in specs]
    prints += [vocabulary({"kind": "file", "path": str(tmp_path / name)}).fingerprint for name in ("a.parquet", "b.parquet")]
    assert len(set(prints)) == 5
