"""Groups of processes: a rank that dies is told with its last words, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from embedshard.config import build_config
from embedshard.launch.rehearsing import CaseError, LocalGroup
from embedshard.train.rehearsal import Rehearsal

MODEL = """
import os
import torch

def build(context):
    if torch.distributed.get_rank() == context.options["dies"]:
        os.abort()
    raise ValueError("no model of mine")
"""


def config(make_config, dies):
    return build_config(
        make_config({"evaluate": {"metrics": []}}, splits=("train",)).tree
        | {
            "model": {
                "kind": "custom", "factory": "dying_model:build", "item_id": "item_id", "options": {"dies": dies},
            }
        },
        {},
        "test",
    )  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_dies_is_told_and_the_next_case_starts_anew(make_config, tmp_path, monkeypatch):
    (tmp_path / "dying_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    good = make_config({"evaluate": {"metrics": []}}, splits=("train",)).config
    with LocalGroup(2) as group:
        with pytest.raises(CaseError, match=r"rank 1 of 2 died. Its last words: .*Aborted"):
            group.run(Rehearsal(config(make_config, dies=1), 2))
        with pytest.raises(CaseError, match=r"ValueError: no model of mine"):
            group.run(Rehearsal(config(make_config, dies=9), 2))
        assert len(group.run(Rehearsal(good, 2)).losses) == 2


@pytest.mark.slow
def test_nothing_is_left_behind_when_the_starter_is_killed(make_config, tmp_path):
    program = """
        import os, sys
        from embedshard.config import load_config
        from embedshard.launch.rehearsing import LocalGroup
        from embedshard.train.rehearsal import Rehearsal

        config = load_config(sys.argv[1], {}).config
        group = LocalGroup(2)
        group.run(Rehearsal(config, 2))
        print(group._process.pid, flush=True)
        group.run(Rehearsal(config, 2))
        os.kill(os.getpid(), 9)
    """
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(make_config({"evaluate": {"metrics": []}}, splits=("train",)).tree))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    session = int(done.stdout)
    deadline = time.monotonic() + 60
    while members(session) and time.monotonic() < deadline:
        os.sched_yield()
    assert not members(session)


def members(session):
    """Processes of a session that are alive."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found
