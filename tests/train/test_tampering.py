"""Files of an export that were altered: whichever command reads one refuses it, and `check` finds them all."""

import json
import shutil

import pytest

from embedshard.errors import ExportError
from embedshard.export.check import check_files
from embedshard.export.delta_apply import apply_delta
from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.launch.export_since import export_since
from embedshard.serve.engine import Engine
from embedshard.storage import Location
from tests.commands import run_command
from tests.conftest import TREE, merged, run_to_result

UNSEEN = {
    "user_id": {"kind": "id", "table": "user", "unknown": "oov"},
    "age": {"kind": "dense", "normalise": "standardise", "missing": "zero"},
}


@pytest.fixture(scope="module")
def whole(interactions, tmp_path_factory):
    """A folder with an export of every kind of file but a tokenizer, and a delta of it. Not to be changed."""
    root = tmp_path_factory.mktemp("tampering")
    data = {split: str(interactions / split / "*.parquet") for split in ("train", "validation", "test")}
    tables = {name: {"rows": None, "vocabulary": {"kind": "auto"}} for name in ("user", "item")}
    changes = {"data": data, "features": UNSEEN, "tables": tables, "checkpoint": {"every_steps": 4, "keep": 5}}
    run_to_result(merged(TREE, {**changes, "train": {"epochs": 1}}), root / "run")
    export_here(root / "run", root / "out", {}, checkpoint_step=4, quantise="int8,fp16", verifies=False)
    export_since(root / "run", root / "delta", root / "out", {}, quantise="int8", verifies=False)
    return root


def alter(file):
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)


def read_by(command, out, monkeypatch):
    """The files of an export that a command opens, by whichever way."""
    opened, files = set(), open_export(out).manifest.files.keys()
    with monkeypatch.context() as patched:
        for name in ("open_input", "read_bytes"):
            original = getattr(Location, name)

            def counted(place, *given, original=original):
                if place.path.startswith(f"{out}/"):
                    opened.add(place.path.removeprefix(f"{out}/"))
                return original(place, *given)

            patched.setattr(Location, name, counted)
        command(out)
    return opened & files


COMMANDS = {
    "recommend": lambda root: lambda out: recommend(out, "7", 3),
    "recommend to a history": lambda root: lambda out: recommend(out, None, 3, history="1,5"),
    "serve": lambda root: lambda out: Engine(open_export(out)),
    "apply": lambda root: lambda out: apply_delta(root / "delta", out),
}
READ = {
    "recommend": {"users.parquet", "items.parquet", "items.faiss", "seen.parquet", "vocabularies/user.parquet"},
    "recommend to a history": {"programs/user.pt2", "tables/user.parquet", "tables/item.parquet", "items.parquet"},
    "serve": {"users.parquet", "items.parquet", "seen.parquet", "programs/user.pt2", "vocabularies/item.parquet"},
    "apply": {
        "dense.safetensors", "programs/item.pt2", "tables/item.int8.parquet", "tables/user.fp16.parquet",
        "items-fp16.parquet", "items-int8.parquet", "tables/item_id.bias.parquet",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_whichever_command_reads_an_altered_file_refuses_it(whole, tmp_path, monkeypatch, name):
    command = COMMANDS[name](whole)
    shutil.copytree(whole / "out", tmp_path / "first")
    files = read_by(command, tmp_path / "first", monkeypatch)
    assert files >= READ[name]
    if name == "apply":
        assert files == set(open_export(whole / "out").manifest.files)
    for number, file in enumerate(sorted(files)):
        out = tmp_path / str(number)
        shutil.copytree(whole / "out", out)
        alter(out / file)
        was = (out / "manifest.json").read_bytes()
        with pytest.raises(ExportError, match=f"{file} has the SHA-256 .*it is not what was exported"):
            command(out)
        assert (out / "manifest.json").read_bytes() == was
        shutil.rmtree(out)


def test_an_earlier_export_that_was_altered_is_no_base(whole, tmp_path):
    for file in ("dense.safetensors", "programs/item.pt2"):
        shutil.copytree(whole / "out", tmp_path / "out", dirs_exist_ok=True)
        alter(tmp_path / "out" / file)
        with pytest.raises(ExportError, match=f"{file} has the SHA-256"):
            export_since(whole / "run", tmp_path / "delta", tmp_path / "out", {})
        assert not (tmp_path / "delta").exists()


def test_check_finds_every_file_that_was_altered_or_is_missing(whole, tmp_path):
    for folder, kind in (("out", "export"), ("delta", "delta")):
        good = check_files(whole / folder)
        assert (good.kind, good.problems) == (kind, ())
        manifest = json.loads((whole / folder / "manifest.json").read_text())
        files = sorted(manifest["files" if kind == "export" else "parts"])
        assert good.num_files == len(files)
        shutil.copytree(whole / folder, tmp_path / folder)
        for file in files[1:]:
            alter(tmp_path / folder / file)
        (tmp_path / folder / files[0]).unlink()
        found = check_files(tmp_path / folder)
        assert len(found.problems) == len(files)
        for file, problem in zip(files, found.problems, strict=True):
            assert file in problem
        assert "is missing" in found.problems[0]
    shutil.copytree(whole / "out", tmp_path / "by-hand")
    passed = run_command("check", tmp_path / "by-hand")
    assert passed.returncode == 0, passed.stderr
    assert "all are as they were written" in passed.stdout
    alter(tmp_path / "by-hand" / "tables" / "user.fp16.parquet")
    failed = run_command("check", tmp_path / "by-hand", "--json")
    assert failed.returncode == 1
    told = json.loads(failed.stdout)
    assert not told["passed"]
    assert ["user.fp16.parquet has the SHA-256" in problem for problem in told["problems"]] == [True]
