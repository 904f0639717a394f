"""The laws of the house that import-linter cannot express."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "embedshard"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def name(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_sharding_knows_torchrec_distributed(path):
    allowed = name(path).startswith("sharding/")
    found = [module for module in imports(path) if module.startswith("torchrec.distributed")]
    if name(path) in ("train/assembly.py", "train/snapshot.py", "train/warm_start.py"):  # the type of what sharding returns
        found = [module for module in found if module != "torchrec.distributed.model_parallel"]
    assert allowed or not found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_world_and_the_command_line_read_the_environment(path):
    # synthetic names of temporary files use os.getpid, which is no environment
    reads = re.search(r"os\.environ|os\.getenv", path.read_text())
    assert name(path) in ("world.py", "cli.py") or not reads


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_pickled(path):
    text = path.read_text()
    assert not re.search(r"(?<!safetensors\.)\btorch\.(load|save)\(|import pickle", text)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_called_utils(path):
    assert path.stem not in {"utils", "common", "helpers", "manager", "core", "base"}


def test_the_pins_stand_in_one_place():
    pattern = re.compile(r"\b(torch|torchrec|fbgemm-gpu(?:-cpu)?)==\d")
    tracked = [*ROOT.glob("*.toml"), ROOT / "Makefile", *ROOT.glob(".ci/*"), *FILES]
    assert [path.name for path in tracked if pattern.search(path.read_text())] == []


@pytest.mark.parametrize("folder", ["requirements", "requirements/torch-2.11"])
def test_pins_are_of_one_release(folder):
    pins = "".join(path.read_text() for path in (ROOT / folder).glob("*.txt"))
    triple = dict(re.findall(r"^(torch|torchrec|fbgemm-gpu-cpu|fbgemm-gpu)==(\d+\.\d+)", pins, re.MULTILINE))
    minor = int(triple["torchrec"].split(".")[1])
    assert triple == {
        "torch": f"2.{minor + 5}", "torchrec": f"1.{minor}", "fbgemm-gpu": f"1.{minor}", "fbgemm-gpu-cpu": f"1.{minor}",
    }  # fmt: skip
    assert folder in ("requirements", f"requirements/torch-{triple['torch']}")
