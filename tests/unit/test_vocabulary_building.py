"""Vocabularies that are counted: beside a plain Counter, in shares, under little memory, and what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.data import vocabulary_counts
from embedshard.data.vocabulary import load_vocabularies
from embedshard.data.vocabulary_building import build_vocabularies
from embedshard.data.vocabulary_counts import count_share, merge_shares
from embedshard.data.vocabulary_file import read_footer
from embedshard.errors import DataError, StorageError
from embedshard.storage import locate

PIECES = ["", "a", "é", "é", "Käse 🧀", "\u0000nul", "Z", "z" * 300]


def config(root, vocabulary=None, features=None, **data):
    features = features or {"f": {"kind": "id", "table": "t"}}
    tree = {
        "data": {"train": f"{root}/*.parquet", "label": "y", "lanes": 4} | data,
        "features": features,
        "tables": {"t": {"dim": 4, "vocabulary": {"kind": "auto"} | (vocabulary or {})}},
        "model": {"kind": "text_classifier", "features": list(features)},
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 4},
    }
    return build_config(tree, {}, "test")


def write(root, columns, name="a", row_group_size=100):
    Path(root).mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    table = pa.table(columns | {"y": pa.array(np.arange(rows) % 2, pa.float32())})
    pq.write_table(table, Path(root) / f"{name}.parquet", row_group_size=row_group_size)


def built(tmp_path, made_from):
    location = build_vocabularies(made_from, locate(tmp_path / "out"))["t"]
    return pq.read_table(location.path), read_footer(location)[1], location


def expected(counts, min_count=1, max_size=None):
    kept = [(id_, count) for id_, count in counts.items() if count >= min_count]
    kept.sort(key=lambda pair: (-pair[1], pair[0].encode() if isinstance(pair[0], str) else pair[0]))
    return kept[:max_size]


def strings(generator, count):
    return [PIECES[i % len(PIECES)] * (i % 3) + str(i // 5) for i in generator.zipf(1.4, count) % 400]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "int32", "uint64", "int64"])
@pytest.mark.parametrize(("min_count", "max_size"), [(1, None), (3, 20)])
def test_counts_are_those_of_a_counter(tmp_path, kind, min_count, max_size):
    generator = np.random.default_rng(7)
    if kind in ("int32", "uint64", "int64"):
        shift = {"uint64": 2**64 - 500, "int64": -(2**62), "int32": -7}[kind]
        ids = [int(i) % 400 + shift for i in generator.zipf(1.4, 1000)]
        array = pa.array(ids, getattr(pa, kind)())
    else:
        ids = strings(generator, 1000)
        array = pa.array(ids, pa.large_string() if kind == "large_string" else pa.string())
        array = array.dictionary_encode() if kind == "dictionary" else array
    write(tmp_path / "data", {"f": array})
    write(tmp_path / "data", {"f": array.slice(0, 0)}, name="b-empty")
    table, counted, location = built(tmp_path, config(tmp_path / "data", {"min_count": min_count, "max_size": max_size}))
    wanted = expected(Counter(ids), min_count, max_size)
    assert list(zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True)) == wanted
    assert table["row"].to_pylist() == list(range(len(wanted)))
    assert (counted.lookups, counted.distinct, counted.known) == (1000, len(set(ids)), sum(count for _, count in wanted))
    loaded = load_vocabularies(config(tmp_path / "data"), None, {"t": location})["t"]
    assert loaded.counts().tolist() == [count for _, count in wanted] + [1000 - counted.known]
    assert loaded.ids_of(np.arange(len(wanted) + 1)) == [id_ for id_, _ in wanted] + [None]


def test_lists_count_as_they_are_looked_up(tmp_path):
    """Nulls and zeros that are padding are none; what is cut off is not looked up; features over a table count together."""
    generator = np.random.default_rng(3)
    lists = [
        None if generator.random() < 0.1 else [None if i == 9 else int(i) for i in generator.integers(0, 30, size)]
        for size in generator.integers(0, 9, 500)
    ]
    single = [None if i == 5 else int(i) for i in generator.integers(0, 50, 500)]
    write(tmp_path / "data", {"history": pa.array(lists, pa.list_(pa.int32())), "item": pa.array(single, pa.int64())})
    rest = {"kind": "bag", "table": "t", "column": "history", "null": "empty", "unknown": "oov"}
    features = {
        "item": {"kind": "id", "table": "t", "null": "empty"},
        "last": rest | {"max_length": 3, "keep": "last", "mask_zero": True},
        "first": rest | {"max_length": 2, "keep": "first"},
    }
    table, counted, _ = built(tmp_path, config(tmp_path / "data", features=features))
    counts = Counter(id_ for id_ in single if id_ is not None)
    for each in lists:
        ids = [id_ for id_ in each or [] if id_ is not None]
        counts.update([id_ for id_ in ids if id_ != 0][-3:])
        counts.update(ids[:2])
    assert list(zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True)) == expected(counts)
    assert counted.lookups == counts.total()
    assert set(counted.features) == {"item", "last", "first"}


def test_rows_that_are_held_out_or_set_aside_do_not_count(tmp_path):
    ids = np.arange(1000) % 37
    labels = np.where(np.arange(1000) % 10, 1.0, np.nan)
    root = tmp_path / "data"
    root.mkdir()
    pq.write_table(pa.table({"f": ids, "y": pa.array(labels, pa.float32())}), root / "a.parquet", row_group_size=300)
    made_from = config(root, on_bad_row="quarantine", max_bad_fraction=0.5)
    table, counted, _ = built(tmp_path, made_from)
    good = Counter(ids[np.arange(1000) % 10 != 0].tolist())
    assert dict(zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True)) == good
    assert not counted.is_exact
    write(tmp_path / "whole", {"f": ids})
    tree = made_from.model_dump(mode="json", exclude_none=True)
    tree["data"] |= {"train": [f"{tmp_path}/whole/*.parquet"], "validation_fraction": 0.25, "on_bad_row": "error"}
    tree["evaluate"]["metrics"] = ["auc"]
    _, counted, _ = built(tmp_path, build_config(tree, {}, "test"))
    assert (counted.lookups, counted.is_exact) == (750, True)


def shares_of(made_from, world_size, scratch, memory_bytes=2**30, told=lambda done, total: None):
    from embedshard.data.vocabulary_building import _open

    scratch.mkdir()
    sources = _open(made_from, "t")
    shares = [count_share(sources, "t", rank, world_size, memory_bytes, scratch, told) for rank in range(world_size)]
    vocabulary = made_from.tables["t"].vocabulary
    return merge_shares(shares, vocabulary, sources, "t", {"f": {}}, memory_bytes, scratch).read_bytes()


def test_shares_merge_to_the_same_file_byte_for_byte(tmp_path):
    ids = strings(np.random.default_rng(1), 3000)
    write(tmp_path / "data", {"f": ids[:1700]})
    write(tmp_path / "data", {"f": ids[1700:]}, name="b")
    made_from = config(tmp_path / "data", {"min_count": 2})
    whole = shares_of(made_from, 1, tmp_path / "1")
    assert shares_of(made_from, 3, tmp_path / "3") == whole
    assert shares_of(made_from, 40, tmp_path / "40") == whole, "more shares than row groups"


def test_what_does_not_fit_the_memory_is_spilled(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary_counts, "_LEAST_BYTES", 24 * 2**20)
    generator = np.random.default_rng(2)
    numbers = generator.permutation(np.concatenate([np.arange(600_000), np.arange(0, 600_000, 1000)]))
    ids = pa.array(np.char.add("an id of some length ", numbers.astype(str)).tolist())
    write(tmp_path / "data", {"f": ids}, row_group_size=50_000)
    spilled = []

    def told(done, total):
        folder = tmp_path / "scratch" / "spill"
        spilled.append(sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0)

    made_from = config(tmp_path / "data", {"min_count": 2})
    shares_of(made_from, 1, tmp_path / "scratch", memory_bytes=1, told=told)
    assert max(spilled) > 2**20
    table = pq.read_table(tmp_path / "scratch" / "t.parquet")
    wanted = sorted(f"an id of some length {number}" for number in range(0, 600_000, 1000))
    assert table["id"].to_pylist() == wanted
    assert set(table["count"].to_pylist()) == {2}
    assert not (tmp_path / "scratch" / "spill").exists()


def test_what_cannot_be_counted_is_said(tmp_path, monkeypatch):
    write(tmp_path / "data", {"f": pa.array([1, 2, 3])})
    with pytest.raises(DataError, match=r"tables\.t\.vocabulary: no id is met 2 times in column 'f'"):
        built(tmp_path, config(tmp_path / "data", {"min_count": 2}))
    write(tmp_path / "data", {"f": pa.array(["1"])}, name="b")
    with pytest.raises(DataError, match="column 'f' holds int64, column 'f' string"):
        built(tmp_path, config(tmp_path / "data"))
    write(tmp_path / "data", {"f": pa.array([2**64 - 1], pa.uint64())}, name="b")
    with pytest.raises(DataError, match=r"b\.parquet, row group 0.*counted together as int64"):
        built(tmp_path, config(tmp_path / "data"))
    path = tmp_path / "data" / "b.parquet"
    write(tmp_path / "data", {"f": pa.array(np.arange(10_000))}, name="b", row_group_size=10_000)
    content = bytearray(path.read_bytes())
    content[200:2000] = b"\xff" * 1800
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"b\.parquet, row group 0: cannot be read"):
        built(tmp_path, config(tmp_path / "data"))
    path.unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match=r"No space left on device.*set TMPDIR"):
        built(tmp_path, config(tmp_path / "data"))
