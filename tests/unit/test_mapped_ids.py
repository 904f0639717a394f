"""Ids found by sorting instead of a dictionary: as a dict finds them, through collisions, in memory and memory-mapped."""

import hashlib
import multiprocessing
import os
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.data import mapped_ids, vocabulary_file
from embedshard.data.mapped_ids import lay_out
from embedshard.data.vocabulary_file import load_id_file
from embedshard.errors import DataError, StorageError
from embedshard.storage import locate

WORDS = ["", "a", "b", "ab", "abcdefgh", "abcdefghi", "abcdefgh\0", "\0", "\0\0", "Käse 🧀", "x" * 1000, "x" * 1001]


def words(count, seed=0):
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(np.arange(count)).tolist()
    return list(dict.fromkeys([*WORDS, *(str(number) * (number % 4 + 1) for number in numbers)]))


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("bits", [64, 3, 0])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_strings_are_found_as_a_dict_finds_them(tmp_path, monkeypatch, bits, is_mapped):
    """With few bits of a hash left nearly all strings collide, so only comparing them tells them apart."""
    full = mapped_ids._hashes
    if bits < 64:
        mask = np.uint64(2**bits - 1 << 61) if bits else np.uint64(0)
        monkeypatch.setattr(mapped_ids, "_hashes", lambda strings: full(strings) & mask)
    known = words(300 if bits < 64 else 5000)
    batches = [pa.array(known[:100]), pa.array(["skipped", *known[100:]], pa.large_string()).slice(1)]
    found = lay_out(batches, pa.string(), len(known), tmp_path if is_mapped else None)
    asked = [*known[::-1], *known[::7], "unknown", "abcdefg", "abcdefgh\0\0", "x" * 999, "12 "]
    rows = {word: row for row, word in enumerate(known)}
    assert found.rows_of(pa.array(asked)).tolist() == [rows.get(word, -1) for word in asked]
    assert found.rows_of(pa.array(asked, pa.string_view())).tolist() == [rows.get(word, -1) for word in asked]
    assert found.rows_of(pa.array([], pa.string())).tolist() == []
    assert found.ids_of(np.array([0, len(known) - 1, len(known)])) == [known[0], known[-1], None]
    assert found.fingerprint == hashlib.sha256("\0".join(known).encode()).hexdigest(), "as ever"
    assert found.repeated() is None


def test_one_string_and_none(tmp_path):
    assert lay_out([pa.array(["a"])], pa.string(), 1).rows_of(pa.array(["b", "a", ""])).tolist() == [-1, 0, -1]
    assert lay_out([], pa.string(), 0).rows_of(pa.array(["b"])).tolist() == [-1]
    assert lay_out([], pa.int64(), 0).rows_of(np.array([1])).tolist() == [-1]


@pytest.mark.parametrize("is_mapped", [False, True])
def test_integers_are_found_as_a_dict_finds_them(tmp_path, is_mapped):
    folder = tmp_path if is_mapped else None
    known = [-(2**63), 2**63 - 1, 0, -1, 7, 3]
    found = lay_out([pa.array(known[:2]), pa.array(known[2:])], pa.int64(), len(known), folder)
    assert found.rows_of(np.array([*known, 4, 8])).tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert found.rows_of(np.array([2**63, 2**64 - 1, 7], np.uint64)).tolist() == [-1, -1, 4]
    assert found.ids_of(np.array([1, 6])) == [2**63 - 1, None]
    assert found.fingerprint == hashlib.sha256(np.array(known).tobytes()).hexdigest()
    found = lay_out([pa.array([2**64 - 1, 7], pa.uint64())], pa.uint64(), 2, folder)
    assert found.rows_of(np.array([-1, 7])).tolist() == [-1, 1]
    assert found.rows_of(np.array([2**64 - 1], np.uint64)).tolist() == [0]


def test_repeated_ids_are_named(monkeypatch):
    array = pa.array(["a", "b", "c", "b", "a", "b"])
    assert lay_out([array], array.type, 6).repeated() == (1, 3, 3)
    assert lay_out([pa.array([5, 6, 7, 6, 5, 6])], pa.int64(), 6).repeated() == (1, 3, 3)
    monkeypatch.setattr(mapped_ids, "_hashes", lambda strings: np.zeros(len(strings), np.uint64))
    assert lay_out([array], array.type, 6).repeated() == (1, 3, 3), "told apart from strings of one hash"
    assert lay_out([pa.array(["a", "b"])], array.type, 2).repeated() is None


def load(path):
    return load_id_file("t", locate(path), str(path), None)


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_a_large_vocabulary_is_laid_out_once_and_mapped(tmp_path, own_tmp, monkeypatch):
    monkeypatch.setattr(vocabulary_file, "_MAPPED_ROWS", 1000)
    known = words(2000)
    pq.write_table(pa.table({"id": known}), tmp_path / "a.parquet", row_group_size=300)
    first = load(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    monkeypatch.setattr(vocabulary_file, "lay_out", None)
    second = load(tmp_path / "b.parquet")
    assert second.fingerprint == first.fingerprint
    assert second.map_strings(pa.array(known)).tolist() == list(range(len(known)))
    assert all(is_mapped(array) for array in (second._ids._hashes, second._ids._rows, second._ids._starts))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(own_tmp))
    monkeypatch.setattr(vocabulary_file, "_MAPPED_ROWS", 1000)
    pq.write_table(pa.table({"id": [known[1], known[0], *known[2:]]}), tmp_path / "b.parquet", row_group_size=300)
    other = load(tmp_path / "b.parquet")
    assert other.map_strings(pa.array(known[:2])).tolist() == [1, 0], "another content is laid out by itself"
    pq.write_table(pa.table({"id": [*known, known[5]]}), tmp_path / "c.parquet")
    for _ in range(2):
        with pytest.raises(DataError, match=f"rows 5 and {len(known)} of column 'id'"):
            load(tmp_path / "c.parquet")
    assert not list(own_tmp.glob("embedshard-*/.*.part")), "what failed leaves nothing behind"


def _laid_out(given):
    path, folder = given
    tempfile.tempdir = folder
    vocabulary_file._MAPPED_ROWS = 1000
    return load(path).map_strings(pa.array(["12", "unknown"])).tolist()


def test_processes_that_begin_at_once_share_one_layout(tmp_path, own_tmp):
    known = words(3000)
    pq.write_table(pa.table({"id": known}), tmp_path / "a.parquet")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_laid_out, [(str(tmp_path / "a.parquet"), str(own_tmp))] * 3)
    assert found == [[known.index("12"), -1]] * 3
    assert len([path for path in own_tmp.glob("embedshard-*/vocabulary-*") if path.is_dir()]) == 1


def test_a_layout_that_cannot_be_written_or_is_not_our_own_is_said(tmp_path, own_tmp, monkeypatch):
    monkeypatch.setattr(vocabulary_file, "_MAPPED_ROWS", 1)
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "a.parquet")
    root = own_tmp / f"embedshard-{os.getuid()}"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(StorageError, match="not this user's alone"):
        load(tmp_path / "a.parquet")
    root.chmod(0o700)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match=r"No space left on device.*TMPDIR"):
        load(tmp_path / "a.parquet")
    monkeypatch.undo()
