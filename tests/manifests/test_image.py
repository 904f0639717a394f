"""The Dockerfile and .dockerignore, read without a daemon: what they copy is there, in the pins' order, nobody is root."""

import re
import shlex
import subprocess
from fnmatch import fnmatchcase

import pytest

from tests.manifests.conftest import ROOT
from tests.manifests.rules import clusters, pods


def parse(text):
    """A Dockerfile's instructions, by stage: lists of (word, rest)."""
    text = re.sub(
        r"\\\n(\s*#[^\n]*\n)*", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    )
    stages = [[]]
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, rest.strip()))
    return stages


def is_ignored(path, patterns):
    """Whether .dockerignore keeps a path out of the build: the last pattern that fits it or a folder above decides."""
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    ignored = False
    for pattern in patterns:
        wanted = pattern.lstrip("!").rstrip("/")
        names = [wanted, wanted.removeprefix("**/")] if wanted.startswith("**/") else [wanted]
        matches = any(
            fnmatchcase(name, candidate) and (candidate.startswith("**/") or name.count("/") == candidate.count("/"))
            for candidate in names
            for name in above
        ) or (wanted.startswith("**/") and any(fnmatchcase(part, wanted[3:]) for part in parts))
        if matches:
            ignored = not pattern.startswith("!")
    return ignored


@pytest.fixture(scope="module")
def stages():
    return parse((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def patterns():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def copies(stages):
    """(stage, source, target) of every COPY from the context."""
    for number, stage in enumerate(stages):
        for word, rest in stage:
            if word in ("COPY", "ADD") and "--from=" not in rest:
                *sources, target = shlex.split(rest)
                for source in sources:
                    yield number, source, target


def test_what_is_copied_is_there_and_not_ignored(stages, patterns):
    found = list(copies(stages))
    assert len(found) >= 5
    for _, source, _ in found:
        assert (ROOT / source).exists(), source
        assert not is_ignored(source.rstrip("/"), patterns), source
    assert not any(source in (".", "./") for _, source, _ in found)


def test_what_git_tracks_below_the_sources_is_not_ignored(stages, patterns):
    tracked = subprocess.run(
        ["git", "ls-files", "embedshard", "pipelines"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    files = tracked.stdout.split()
    assert "embedshard/cli.py" in files
    assert [path for path in files if is_ignored(path, patterns)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/a/checkpoints/step-00000001/manifest.json",
        "data/synthetic/train/part-0.parquet",
        "embedshard/__pycache__/cli.cpython-311.pyc",
        "embedshard/data/__pycache__/reader.cpython-311.pyc",
        "k8s/base/rayjob.yaml",
        "tests/conftest.py",
        ".env",
        "secrets.yaml",
    ],
)
def test_what_is_kept_out(patterns, path):
    assert is_ignored(path, patterns)


def test_the_matcher_is_one():
    """The matcher above, on Docker's own examples."""
    assert is_ignored("a/b.pyc", ["**/*.pyc"])
    assert is_ignored("b.pyc", ["**/*.pyc"])
    assert not is_ignored("README.md", ["*.md", "!README.md"])
    assert is_ignored("README.md", ["*.md", "!README.md", "README.md"])
    assert not is_ignored("docs/README.md", ["*.md"])
    assert is_ignored("docs/README.md", ["docs"])


def test_two_stages_of_one_pinned_slim_python(stages):
    head, *rest = stages
    [(_, version)] = [instruction for instruction in head if instruction[0] == "ARG"]
    assert re.fullmatch(r"PYTHON_VERSION=3\.\d+\.\d+", version)
    assert len(rest) == 2
    for stage in rest:
        assert re.fullmatch(r"python:\$\{PYTHON_VERSION\}-slim-[a-z]+( AS build)?", stage[0][1])


def test_the_pins_are_installed_in_their_order(stages):
    """torch first; torchrec without its dependencies; the package itself last: requirements/README.md says why."""
    commands = [rest for stage in stages for word, rest in stage if word == "RUN" and "pip install" in rest]
    steps = [
        r"-r requirements/torch\.txt$",
        r"requirements/\$\{FLAVOUR\}\.txt.*-r requirements/ray\.txt$",
        r"--no-deps -r requirements/torchrec\.txt$",
    ]
    assert len(commands) == len(steps) + 1
    for command, step in zip(commands, [*steps, r"^pip install \.$"], strict=True):
        assert re.search(step, command), command
    assert all((ROOT / "requirements" / f"{flavour}.txt").is_file() for flavour in ("cpu", "cuda"))
    environment = " ".join(rest for word, rest in stages[1] if word == "ENV")
    assert "PIP_NO_CACHE_DIR=1" in environment


def test_nobody_is_root_and_sigterm_arrives(stages):
    last = dict(stages[-1])  # of each word the last
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", last["USER"])
    assert last["ENTRYPOINT"] == '["tini", "--"]'
    assert last["CMD"].startswith("[")
    words = [word for word, _ in stages[-1]]
    assert "RUN" not in words[words.index("USER") :]
    assert "tini" in last["RUN"].split()
    assert "HEALTHCHECK" not in words


def test_the_image_and_the_pods_agree(stages, render):
    """One user in both; what the pods call is copied to where they call it; home is where the pods can write."""
    user, group = map(int, dict(stages[-1])["USER"].split(":"))
    targets = {target.rstrip("/") + "/" + source.rstrip("/").rpartition("/")[2] for _, source, target in copies(stages[-1:])}
    targets |= {target.rstrip("/") for _, _, target in copies(stages[-1:])}
    for folder in ("base", "interactive", "data", "serve"):
        documents = render(folder)
        for pod in pods(documents):
            context = pod.spec["securityContext"]
            assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
            for container in pod.containers:
                words = [
                    *container.get("args", []),
                    *container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []),
                ]
                for path in (word for word in words if word.startswith("/opt/")):
                    assert any(path == target or path.startswith(f"{target}/") for target in targets), path
        assert folder == "data" or len(list(clusters(documents))) == 1
    environment = " ".join(rest for word, rest in stages[-1] if word == "ENV").split()
    assert "HOME=/tmp" in environment


@pytest.mark.parametrize(
    ("old", "new", "test"),
    [
        ("USER 10001:10001", "USER embedshard", test_nobody_is_root_and_sigterm_arrives),
        ("USER 10001:10001", "USER 0:0", test_nobody_is_root_and_sigterm_arrives),
        ('ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --", test_nobody_is_root_and_sigterm_arrives),
        ("--no-deps -r", "-r", test_the_pins_are_installed_in_their_order),
        ("-slim-bookworm AS", " AS", test_two_stages_of_one_pinned_slim_python),
        ("PYTHON_VERSION=3.11.14", "PYTHON_VERSION=3", test_two_stages_of_one_pinned_slim_python),
    ],
)
def test_a_fault_is_found(old, new, test):
    text = (ROOT / "Dockerfile").read_text()
    assert old in text
    with pytest.raises((AssertionError, ValueError)):
        test(parse(text.replace(old, new)))


@pytest.mark.parametrize("line", ["COPY nowhere/ .", "COPY . .", "COPY tests/ tests/"])
def test_a_wrong_copy_is_found(line, patterns):
    text = (ROOT / "Dockerfile").read_text().replace("COPY embedshard/ embedshard/", line)
    with pytest.raises(AssertionError):
        test_what_is_copied_is_there_and_not_ignored(parse(text), patterns)
