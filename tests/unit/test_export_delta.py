"""Deltas of exports: what they make is what was exported, byte for byte; so is what a rollback restores."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.errors import ExportError
from embedshard.export import delta_places, delta_rows
from embedshard.export.delta import open_delta, prepare_delta_folder, side_of, write_delta
from embedshard.export.delta_apply import apply_delta, roll_back
from embedshard.export.manifest import open_export, prepared_folder
from embedshard.storage import locate

sys.path.insert(0, str(Path(__file__).parent))
from exports import Made, content_of, seal, vectors, write_rows

sys.path.pop(0)


def delta_of(base, target, folder):
    prepare_delta_folder(locate(folder))
    return write_delta(side_of(open_export(base)), side_of(open_export(target)), locate(folder))


@pytest.fixture(params=[5, 2**14], ids=["small blocks", "blocks as they are"])
def block_rows(request, monkeypatch):
    monkeypatch.setattr(delta_rows, "_ROWS_AT_ONCE", request.param)
    monkeypatch.setattr(delta_places, "_AT_ONCE", request.param + 2)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("block_rows")
def test_deltas_one_after_the_other_make_what_was_exported_and_lead_back(tmp_path, seed):
    made = Made(seed)
    share = float(made.generator.choice([0, 0.02, 0.1, 0.5, 1]))
    onto = made.write(tmp_path / "onto")
    made.write(tmp_path / "export-0")
    for number in range(1, 4):
        made.change(share)
        made.write(tmp_path / f"export-{number}")
        delta_of(onto, tmp_path / f"export-{number}", tmp_path / "delta")
        apply_delta(tmp_path / "delta", onto)
        assert content_of(onto) == content_of(tmp_path / f"export-{number}")
    for number in reversed(range(3)):
        roll_back(onto)
        assert content_of(onto) == content_of(tmp_path / f"export-{number}")
    assert not (onto / "applying").exists()
    assert list((onto / "rollback").iterdir()) == []


def exported(folder, content, group=10, step=10, name="items.parquet", **files):
    with prepared_folder(folder) as place:
        write_rows(folder / name, content, group)
        for other, text in files.items():
            (folder / other.replace("_", ".")).write_bytes(text)
        seal(place, step)
    return folder


def written_over(folder):
    with prepared_folder(folder):
        pass


def numbered(rows, ids=None, dim=4, seed=0):
    numbers = np.random.default_rng(seed).standard_normal((1000, dim)).astype(np.float32)[np.asarray(rows)]
    return vectors(pa.array(rows if ids is None else ids), rows, numbers)


def test_of_rows_those_alone_that_changed_are_told(tmp_path):
    before = numbered(list(range(100)))
    numbers = np.array(before["vector"].to_pylist(), np.float32)
    numbers[40, 2], numbers[41, 0] = 0.0, np.nan
    before = vectors(before["id"].combine_chunks(), before["row"].to_numpy(), numbers.copy())
    numbers[40, 2] = -0.0  # equal, and not the same bits
    ids = list(range(100))
    ids[70] = 5000  # the row changed hands
    changed = vectors(pa.array(ids), before["row"].to_numpy(), numbers)
    changed = pa.concat_tables([changed.slice(0, 9), changed.slice(12, 80), changed.slice(95), numbered([200, 203])])
    exported(tmp_path / "a", before, 7)
    exported(tmp_path / "b", changed.combine_chunks(), 33, step=20)
    manifest = delta_of(tmp_path / "a", tmp_path / "b", tmp_path / "delta")
    change = manifest.changes["items.parquet"]
    assert (change.changed, change.added, change.gone, change.kept) == (2, 2, 6, 92)
    told = pq.read_table(tmp_path / "delta" / change.rows)
    assert told["row"].to_pylist() == [40, 70, 200, 203]
    assert told["id"].to_pylist() == [40, 5000, 200, 203]
    assert told["base"].to_pylist() == [40, 70, None, None]
    assert [changed["row"][place].as_py() for place in told["place"].to_pylist()] == [40, 70, 200, 203]
    gone = pq.read_table(tmp_path / "delta" / change.removed)
    assert gone.to_pydict() == {
        "base": [9, 10, 11, 92, 93, 94],
        "id": [9, 10, 11, 92, 93, 94],
        "row": [9, 10, 11, 92, 93, 94],
    }
    assert (manifest.base.step, manifest.target.step) == (10, 20)


def test_row_groups_of_another_size_are_no_changed_rows(tmp_path):
    content = numbered(list(range(500)))
    exported(tmp_path / "a", content, 500)
    exported(tmp_path / "b", content, 64, step=20)
    change = delta_of(tmp_path / "a", tmp_path / "b", tmp_path / "delta").changes["items.parquet"]
    assert (change.changed, change.added, change.gone, change.kept) == (0, 0, 0, 500)
    apply_delta(tmp_path / "delta", tmp_path / "a")
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_rows_in_another_order_are_told_as_few_as_can_be(tmp_path):
    order = [*range(50, 100), *range(50)]
    exported(tmp_path / "a", numbered(order), name="users.parquet")
    moved = [7, *(row for row in order if row != 7)]
    exported(tmp_path / "b", numbered(moved), name="users.parquet")
    change = delta_of(tmp_path / "a", tmp_path / "b", tmp_path / "delta").changes["users.parquet"]
    assert (change.changed, change.added, change.gone, change.kept) == (0, 1, 1, 99)


def test_a_file_of_another_schema_is_whole_and_one_that_grew_little_is_told_in_bytes(tmp_path):
    content, flat = numbered(list(range(100))), np.random.default_rng(1).bytes(2**22 + 7000)
    other = bytearray(flat + b"more")
    other[5000] ^= 1
    other[2**22 + 1] ^= 1
    exported(tmp_path / "a", content, items_faiss=flat, dense_safetensors=b"x" * 10)
    strings = numbered(list(range(100)), [f"id {row}" for row in range(100)], dim=8, seed=5)
    exported(tmp_path / "b", strings, 100, items_faiss=bytes(other), dense_safetensors=b"y" * 10)
    manifest = delta_of(tmp_path / "a", tmp_path / "b", tmp_path / "delta")
    kinds = {name: change.kind for name, change in manifest.changes.items()}
    assert kinds == {"items.parquet": "whole", "items.faiss": "bytes", "dense.safetensors": "whole"}
    assert 65 < manifest.changes["items.faiss"].changed < 140
    apply_delta(tmp_path / "delta", tmp_path / "a")
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_of_long_files_some_row_groups_are_in_memory(tmp_path, monkeypatch):
    rows, group = 40 * 4096, 4096
    monkeypatch.setattr(delta_rows, "_ROWS_AT_ONCE", 2048)
    content = numbered([row % 1000 for row in range(rows)], dim=64)
    content = content.set_column(1, "row", pa.array(range(rows)))
    exported(tmp_path / "a", content, group + 100)
    changed = np.array(content["vector"].combine_chunks().flatten())
    changed[:: 64 * 50] += 1
    exported(tmp_path / "b", vectors(content["id"], range(rows), changed.reshape(rows, 64)), group, step=20)
    del content, changed
    before, held = pa.total_allocated_bytes(), {}

    def watched(name):
        original = getattr(delta_rows, name)

        def instead(*arguments):
            held[name] = max(held.get(name, 0), pa.total_allocated_bytes() - before)
            return original(*arguments)

        monkeypatch.setattr(delta_rows, name, instead)

    for name in ("_same", "_woven"):
        watched(name)
    change = delta_of(tmp_path / "a", tmp_path / "b", tmp_path / "delta").changes["items.parquet"]
    assert (change.changed, change.kept) == (-(-rows // 50), rows - -(-rows // 50))
    assert held.keys() == {"_same", "_woven"}
    assert max(held.values()) < rows * 64 * 4 / 2


@pytest.fixture
def pair(tmp_path):
    made = Made(3)
    made.write(tmp_path / "old")
    made.change(0.1)
    made.write(tmp_path / "new")
    delta_of(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    return tmp_path


def test_what_is_not_the_base_is_refused_and_left_as_it_is(pair):
    other = Made(4).write(pair / "other")
    was = content_of(other)
    with pytest.raises(
        ExportError, match=r"is step 10 of run 'made' .* was made of step 10 .*can be applied to nothing else"
    ):
        apply_delta(pair / "delta", other)
    assert content_of(other) == was
    with pytest.raises(ExportError, match="nothing is kept that leads back"):
        roll_back(other)
    with pytest.raises(ExportError, match="is a delta: it has only what changed"):
        apply_delta(pair / "delta", pair / "delta")
    with pytest.raises(ExportError, match="is an export, not a delta"):
        apply_delta(pair / "new", pair / "old")
    with pytest.raises(ExportError, match="is not there"):
        apply_delta(pair / "nowhere", pair / "old")


@pytest.mark.parametrize("name", ["tables/item.parquet", "users.parquet", "items.faiss"])
def test_a_base_that_was_tampered_with_is_refused(pair, name):
    file = pair / "old" / name
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    was = content_of(pair / "old")
    with pytest.raises(ExportError, match=name):
        apply_delta(pair / "delta", pair / "old")
    assert content_of(pair / "old") == was


def test_a_damaged_delta_is_refused_part_by_part(pair):
    for name in [*open_delta(pair / "delta").manifest.parts]:
        part, was = pair / "delta" / name, content_of(pair / "old")
        kept = part.read_bytes()
        part.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ExportError, match=r"the delta is damaged"):
            apply_delta(pair / "delta", pair / "old")
        part.unlink()
        with pytest.raises(ExportError, match=r"is missing: the delta is damaged"):
            apply_delta(pair / "delta", pair / "old")
        part.write_bytes(kept)
        assert content_of(pair / "old") == was
    manifest = json.loads((pair / "delta" / "manifest.json").read_text())
    manifest["changes"]["../../secret"] = manifest["changes"].popitem()[1]
    (pair / "delta" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"manifest\.json is damaged"):
        apply_delta(pair / "delta", pair / "old")


def test_another_pyarrow_is_named_where_it_writes_other_bytes(pair, monkeypatch):
    manifest = json.loads((pair / "delta" / "manifest.json").read_text())
    manifest["pyarrow"] = "1.0.0"
    (pair / "delta" / "manifest.json").write_text(json.dumps(manifest))
    original = pq.ParquetWriter
    monkeypatch.setattr(
        delta_rows.pq, "ParquetWriter", lambda *arguments, **options: original(*arguments, **options, compression="zstd")
    )
    was = content_of(pair / "old")
    with pytest.raises(ExportError, match=r"written with pyarrow 1\.0\.0, this is"):
        apply_delta(pair / "delta", pair / "old")
    assert content_of(pair / "old") == was
    assert not (pair / "old" / "applying").exists()


def test_a_delta_that_had_been_applied_changes_nothing(pair):
    assert not apply_delta(pair / "delta", pair / "old").had_been
    again = apply_delta(pair / "delta", pair / "old")
    assert again.had_been
    assert again.earlier == [10]
    assert content_of(pair / "old") == content_of(pair / "new")


def test_so_many_ways_back_are_kept_as_were_asked_for(tmp_path):
    made = Made(6)
    onto = made.write(tmp_path / "onto")
    for number in range(4):
        made.change(0.1)
        made.write(tmp_path / "new")
        delta_of(onto, tmp_path / "new", tmp_path / "delta")
        applied = apply_delta(tmp_path / "delta", onto, keep=2)
        assert applied.earlier == [(number + 1) * 10, number * 10][: number + 1]
        assert len(list((onto / "rollback").iterdir())) == min(2, number + 1)
    for _ in range(2):
        roll_back(onto)
    with pytest.raises(ExportError, match="--keep was too small"):
        roll_back(onto)
    apply_delta(delta_folder(onto, made, tmp_path), onto, keep=0)
    assert not list((onto / "rollback").iterdir())


def delta_folder(onto, made, tmp_path):
    made.write(tmp_path / "new")
    delta_of(onto, tmp_path / "new", tmp_path / "delta")
    return tmp_path / "delta"


def test_only_one_may_change_an_export(pair):
    handle = os.open(pair / "old", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    was = content_of(pair / "old")
    for change in (partial(apply_delta, pair / "delta"), roll_back, written_over):
        with pytest.raises(ExportError, match="is being changed by another"):
            change(pair / "old")
    assert content_of(pair / "old") == was
    os.close(handle)
    apply_delta(pair / "delta", pair / "old")


def test_an_export_is_not_written_over_while_a_delta_is_applied_to_it(pair):
    met = []

    def say(part):
        if part == "exchange":
            with pytest.raises(ExportError, match="is being changed by another"):
                written_over(pair / "old")
            met.append(part)

    apply_delta(pair / "delta", pair / "old", say=say)
    assert met
    assert content_of(pair / "old") == content_of(pair / "new")


def test_where_folders_have_no_locks_nobody_is_kept_out(pair, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    apply_delta(pair / "delta", pair / "old")
    assert content_of(pair / "old") == content_of(pair / "new")


def test_a_delta_is_written_over_no_export(pair):
    with pytest.raises(ExportError, match="is no earlier delta"):
        prepare_delta_folder(locate(pair / "old"))
    with pytest.raises(ExportError, match="is no earlier export"):
        written_over(pair / "delta")


@pytest.mark.parametrize("way", ["forth", "back"])
def test_a_kill_at_any_moment_leaves_the_old_the_new_or_what_says_that_it_is_between(pair, way):
    made = Made(3, rows=20)  # few row groups: each write of one is a moment
    made.groups = dict.fromkeys(made.groups, 100)
    made.write(pair / "old")
    made.change(0.1)
    made.write(pair / "new")
    delta_of(pair / "old", pair / "new", pair / "delta")
    (pair / "work").mkdir()
    program = [sys.executable, str(Path(__file__).parent / "exports.py")]
    folders = [str(pair / name) for name in ("old", "new", "delta", "work")]
    done = subprocess.run([*program, *folders, way], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    order = [state for place, state in enumerate(found["left"]) if place == 0 or found["left"][place - 1] != state]
    assert order == ["first", "between", "last"]
    assert found["left"].count("between") >= 5
