"""What kubectl renders, and what it is checked against."""

import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import embedshard
from tests.manifests.rules import Pins
from tests.manifests.schema import load_all

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = sorted(str(path.parent.relative_to(ROOT / "k8s")) for path in (ROOT / "k8s").rglob("kustomization.yaml"))


@cache
def kustomize(folder: Path):
    """What `kubectl kustomize` makes of a folder, as text; skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH, so nothing can be rendered")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def render():
    """A function from a folder below k8s/, or anywhere, to its documents, which a test may change."""
    return lambda folder: load_all(kustomize(ROOT / "k8s" / folder))


@pytest.fixture(scope="session")
def crds():
    """The folder of KubeRay's CRDs; skips the test where it is not."""
    candidates = [ROOT.parent / "shared" / "kuberay-crds"]
    if os.environ.get("EMBEDSHARD_DATA"):
        data = Path(os.environ["EMBEDSHARD_DATA"])
        candidates[:0] = [data / "kuberay-crds", data.parent / "kuberay-crds"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"KubeRay's CRDs are not here: none of {', '.join(str(path) for path in candidates)} exists")
    raise AssertionError


@pytest.fixture(scope="session")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def pins(pyproject):
    """The versions that images and manifests must name: pyproject's Ray, and the Python that ruff is told of."""
    ray = re.fullmatch(r"ray\[default,serve,train\]==(\S+)", pyproject["project"]["optional-dependencies"]["ray"][0])[1]
    python = re.fullmatch(r"py3(\d+)", pyproject["tool"]["ruff"]["target-version"])[1]
    return Pins(version=embedshard.__version__, ray=ray, python=f"3.{python}")
