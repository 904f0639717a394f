"""`embedshard checkpoint`: what is in checkpoints, what moved between two, and vectors of ids, a block at a time."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.config import Loaded, build_config
from embedshard.errors import CheckpointError, ConfigError, DataError
from embedshard.launch.checkpoint_diff import diff_here, diff_tables
from embedshard.launch.checkpoints import list_here, show_here
from embedshard.launch.extract import extract_here
from embedshard.storage import locate
from embedshard.train.checkpoint import Checkpointer, Piece, open_step
from embedshard.train.run_directory import RunDirectory
from tests.commands import run_command


@pytest.fixture
def run_dir(make_config, run_tree, tmp_path):
    changes = {"train": {"epochs": 1}, "checkpoint": {"every_steps": 3, "keep": 5}, "evaluate": {"metrics": []}}
    tree = make_config(changes).tree
    run_tree(tree, tmp_path / "run")
    return tmp_path / "run"


def saved(run_dir, step, name):
    checkpoint = open_step(RunDirectory(run_dir).checkpoints, step)
    spec = checkpoint.tensors[name]
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    checkpoint.read_into([(name, (0,) * len(spec.shape), tensor)])
    return tensor


def test_checkpoints_are_listed_and_damage_is_found_when_it_is_looked_for(run_dir):
    found = list_here(run_dir, verify=True)
    assert [one.step for one in found] == [3, 6, 7]
    assert all(one.damage is None and one.size_bytes > 0 and one.workers == 1 and one.attempt == 1 for one in found)
    assert [one.is_selected for one in found] == [False, False, True]
    folder = run_dir / "checkpoints" / "step-00000006"
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert all(one.damage is None and not one.is_verified for one in list_here(run_dir, verify=False))
    damaged = [one for one in list_here(run_dir, verify=True) if one.damage is not None]
    assert [one.step for one in damaged] == [6]
    assert file.name in damaged[0].damage
    (folder / "manifest.json").write_text("{}")
    assert [one.damage is None for one in list_here(run_dir, verify=False)] == [True, False, True]


def test_what_is_in_a_checkpoint_is_shown(run_dir):
    found = show_here(run_dir, None)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["tables/item/weight"] == {
        "name": "tables/item/weight", "dtype": "float32", "shape": [31, 8], "size_bytes": 31 * 8 * 4,
    }  # fmt: skip
    assert found["plan"]["item"]["ranks"] == [0]
    assert found["state"]["train"]["step"] == found["step"] == 7


def test_what_moved_is_what_a_comparison_of_whole_tensors_finds(run_dir):
    found = diff_here(run_dir, 3, 7, {}, count=4)
    by_table = {table.table: table for table in found.tables}
    assert set(by_table) == {"user", "item", "item_id:bias"}
    for name, table in by_table.items():
        old, new = (saved(run_dir, step, f"tables/{name}/weight").double() for step in (3, 7))
        distances = (new - old).norm(dim=1)
        assert table.rows == len(old)
        assert table.moved == int((distances > 0).sum())
        assert table.max_distance == pytest.approx(float(distances.max()))
        assert table.mean_distance == pytest.approx(float(distances[distances > 0].mean()))
        most = distances.argsort(descending=True)[:4].tolist()
        assert [moved.row for moved in table.most_moved] == most
        assert [moved.id for moved in table.most_moved] == [row if row < table.rows - 1 else None for row in most]
    dense = {tensor.name: tensor for tensor in found.tensors}
    name = next(name for name in dense if name.startswith("dense/") and name.endswith("weight"))
    old, new = (saved(run_dir, step, name).double() for step in (3, 7))
    assert dense[name].max_change == pytest.approx(float((old - new).abs().max()))
    assert dense[name].changed == int((old != new).sum())
    assert "tables/item/momentum1" in dense
    same = diff_here(run_dir, 7, 7, {})
    assert not any(table.moved for table in same.tables)
    assert not any(tensor.changed for tensor in same.tensors)
    with pytest.raises(CheckpointError, match="step-00000004"):
        diff_here(run_dir, 4, 7, {})


def test_tables_that_were_cut_in_different_ways_are_compared(tmp_path):
    """By rows here and by columns there, in small files: as another world or plan leaves them."""
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(101, 8, generator=generator).half()
    new = old.clone()
    new[[5, 50, 100]] += torch.tensor([[1.0], [3.0], [2.0]]).half()
    cuts = {
        1: [(slice(0, 40), slice(0, 8)), (slice(40, 101), slice(0, 8))],
        2: [(slice(0, 101), slice(0, 4)), (slice(0, 77), slice(4, 8)), (slice(77, 101), slice(4, 8))],
    }
    for step, tensor in ((1, old), (2, new)):
        pieces = [
            Piece("tables/t/weight", tensor[rows, columns], (rows.start, columns.start), (101, 8))
            for rows, columns in cuts[step]
        ]
        pieces.append(Piece("dense/number", torch.tensor(float(step)), (), ()))
        with Checkpointer(locate(tmp_path), 0, 1, "1", mode="blocking", max_file_bytes=700) as checkpointer:
            checkpointer.save(step, pieces, {})
    for first, second in ((1, 2), (2, 1)):
        found = diff_tables(open_step(locate(tmp_path), first), open_step(locate(tmp_path), second), 2)
        (table,) = found.tables
        assert (table.rows, table.moved) == (101, 3)
        assert [moved.row for moved in table.most_moved] == [50, 100]
        assert table.max_distance == pytest.approx(float((new[50].double() - old[50].double()).norm()))
        assert found.tensors[0].max_change == 1.0


def peak_growth(work):
    """Returns by how many bytes the process's peak is above what it held before some work."""

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    work(1)  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work(2)
    return status("VmHWM") - before


def test_neither_comparing_nor_extracting_holds_a_table(tmp_path, make_config):
    """128 MB of table in files of 4 MB: what is held beside is a few files."""
    rows, dim = 1_000_000, 32
    changes = {"tables": {"item": {"rows": rows - 1, "dim": dim}}, "model": {"user": {"mlp": [dim]}}}
    tree = make_config(changes).tree
    run = RunDirectory.create(tmp_path / "run", Loaded(build_config(tree, {}, "t"), tree, "t"))
    table = torch.zeros(rows, dim)
    with Checkpointer(run.checkpoints, 0, 1, "1", mode="blocking", max_file_bytes=4_000_000) as checkpointer:
        for step in (1, 2, 3):
            table[step * 1000] = step
            checkpointer.save(step, [Piece("tables/item/weight", table, (0, 0), (rows, dim))], {})
    del table

    def compare(step):
        found = diff_here(tmp_path / "run", step, step + 1, {})
        assert [moved.id for moved in found.tables[0].most_moved] == [(step + 1) * 1000]

    def extract(step):
        found = extract_here(tmp_path / "run", tmp_path / "out.parquet", {}, table="item", checkpoint_step=step)
        assert found.written == rows - 1

    for work in (compare, extract):
        assert peak_growth(work) < 60_000_000, work.__name__
    got = pq.ParquetFile(tmp_path / "out.parquet").read_row_group(0)
    assert got["vector"][2000].as_py() == [2.0] * dim


def test_neither_saving_piece_by_piece_nor_restoring_makes_a_second_copy(tmp_path):
    """Of 128 MB in files of 4 MB: a few files' bytes are held beside the table."""
    table = torch.full((2_000_000, 32), 0.5, dtype=torch.float16)
    whole = Piece("tables/t/weight", table, (0, 0), (2_000_000, 32))

    def save(step):
        with Checkpointer(locate(tmp_path), 0, 1, "1", mode="blocking", max_file_bytes=4_000_000) as checkpointer:
            checkpointer.save(step, lambda: iter([whole]), {})

    def restore(step):
        table[step] = 0.0
        open_step(locate(tmp_path), step).read_into([whole])
        assert float(table[step].sum()) == 16.0

    for work in (save, restore):
        assert peak_growth(work) < 40_000_000, work.__name__


@pytest.fixture
def named_run(make_config, run_tree, tmp_path, interactions):
    """A run whose items have ids in a file."""
    ids = pa.table({"id": np.arange(30)[::-1]})
    pq.write_table(ids, tmp_path / "items.parquet")
    vocabulary = {"kind": "file", "path": str(tmp_path / "items.parquet")}
    changes = {
        "tables": {"item": {"rows": None, "vocabulary": vocabulary, "dtype": "fp16"}},
        "train": {"epochs": 1}, "evaluate": {"metrics": []},
    }  # fmt: skip
    run_tree(make_config(changes).tree, tmp_path / "run")
    return tmp_path / "run"


def test_vectors_are_those_of_the_ids(named_run, tmp_path):
    weight = saved(named_run, 7, "tables/item/weight").float()
    out = tmp_path / "out" / "vectors.parquet"
    found = extract_here(named_run, out, {})
    assert (found.table, found.step, found.written) == ("item", 7, 30)
    content = pq.read_table(out)
    assert content["id"].to_pylist() == list(range(29, -1, -1))
    assert content["row"].to_pylist() == list(range(30))
    assert torch.equal(torch.tensor(content["vector"].to_pylist()), weight[:30])
    some = extract_here(named_run, out, {}, ids=["3", "29", "3"])
    content = pq.read_table(out)
    assert some.written == 3
    assert content["id"].to_pylist() == [29, 3, 3]
    assert torch.equal(torch.tensor(content["vector"].to_pylist()), weight[[0, 26, 26]])
    pq.write_table(pa.table({"other": [1, 2], "item": pa.array([3, 500], pa.int32())}), tmp_path / "ids.parquet")
    with pytest.raises(ConfigError, match="It has other, item"):
        extract_here(named_run, out, {}, ids_file=tmp_path / "ids.parquet")
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"1 of 2 ids are not among the 30 ids of .*: 500\. .*--skip-unknown"):
        extract_here(named_run, out, {}, ids_file=tmp_path / "ids.parquet", column="item")
    assert out.read_bytes() == before
    left = extract_here(named_run, out, {}, ids_file=tmp_path / "ids.parquet", column="item", skip_unknown=True)
    assert (left.written, left.num_unknown, left.unknown) == (1, 1, ("500",))
    none = extract_here(named_run, out, {}, ids=["77"], skip_unknown=True)
    assert (none.written, pq.read_table(out).num_rows) == (0, 0)
    with pytest.raises(ConfigError, match="give one of them"):
        extract_here(named_run, out, {}, ids=["1"], ids_file="x")


def test_hashed_ids_are_extracted_when_they_are_named(make_config, run_tree, tmp_path):
    changes = {
        "tables": {"item": {"rows": None, "vocabulary": {"kind": "hash", "rows": 12}}},
        "train": {"max_steps": 1}, "evaluate": {"metrics": []},
    }  # fmt: skip
    run_tree(make_config(changes).tree, tmp_path / "run")
    out = tmp_path / "vectors.parquet"
    with pytest.raises(ConfigError, match="does not keep ids"):
        extract_here(tmp_path / "run", out, {})
    extract_here(tmp_path / "run", out, {}, ids=["5", "123456"])
    content = pq.read_table(out)
    weight = saved(tmp_path / "run", 1, "tables/item/weight")
    assert sorted(content["id"].to_pylist()) == [5, 123456]
    assert torch.equal(torch.tensor(content["vector"].to_pylist()), weight[content["row"].to_pylist()])


def test_the_commands_print_what_they_found(run_dir, tmp_path):
    def run(*arguments):
        return run_command("checkpoint", *arguments, COLUMNS="140")

    assert [one["step"] for one in json.loads(run("ls", run_dir, "--json").stdout)] == [3, 6, 7]
    shown = run("show", run_dir)
    assert shown.returncode == 0, shown.stderr
    assert "tables/item/weight" in shown.stdout
    told = json.loads(run("diff", run_dir, 3, 7, "--json").stdout)
    assert {table["table"] for table in told["tables"]} == {"user", "item", "item_id:bias"}
    written = run("extract", run_dir, "--table", "user", "--ids", "1, 2", "--out", tmp_path / "v.parquet")
    assert written.stdout.startswith("2 vectors of table 'user', step 7"), written.stderr
    next((run_dir / "checkpoints" / "step-00000003").glob("*.safetensors")).unlink()
    assert run("ls", run_dir).returncode == 0
    damaged = run("ls", run_dir, "--verify")
    assert damaged.returncode == 1
    assert "is missing" in damaged.stdout
