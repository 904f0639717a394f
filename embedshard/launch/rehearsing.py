"""Processes on this machine that rehearse together: a group of one world size, started once, given one case after another.

One process imports what takes long, and is then copied for each rank. Each rank reads cases as lines of JSON from a pipe and
answers each with a line on another. Its pipe ends when the starter is gone, however that ended, and with it the rank: no
process is left behind.
"""

from __future__ import annotations

__all__ = ["CaseError", "LocalGroup", "Outcome", "rehearse_for_starter"]

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from embedshard.config import Config
from embedshard.errors import CheckpointError, ConfigError, DataError, EmbedshardError, PlanError
from embedshard.world import open_local_group, set_process_environment

if TYPE_CHECKING:
    from embedshard.data.dataset import Dataset
    from embedshard.train.rehearsal import Array, Block, Noted, Rehearsal
    from embedshard.world import World

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from embedshard.launch.rehearsing import rehearse_for_starter
rehearse_for_starter(json.loads(sys.argv[2]), *sys.argv[3:])
"""
_GRACE_S = 10.0
"""How long the other ranks may still take after one has failed, before all are ended."""


class CaseError(Exception):
    """A case failed.

    Attributes:
        kind: the name of the error's class; `timeout` or `died` if there was none.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Outcome:
    """What all ranks of a world noted in one case, put together.

    Attributes:
        losses: of each step, on each rank.
        before: whole tensors by name, before the first step.
        after: the same after the last.
        touched: by table, the rows that were looked up.
        seconds: for all of it.
    """

    losses: list[list[float]]
    before: dict[str, Array]
    after: dict[str, Array]
    touched: dict[str, Array]
    seconds: float


class LocalGroup:
    """Processes that form a world over gloo. A context manager: leaving ends them.

    Args:
        world_size: how many.
        local_world_size: how many count as one machine; all where None.
        timeout_s: how long a case may take.
    """

    def __init__(self, world_size: int, local_world_size: int | None = None, timeout_s: float = 300.0) -> None:
        self.world_size = world_size
        self._local_world_size, self._timeout_s = local_world_size or world_size, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._cases: list[IO[str]] = []
        self._answers: queue.Queue[tuple[int, str]] = queue.Queue()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, case: Rehearsal) -> Outcome:
        """Rehearses a case on all ranks.

        Raises:
            CaseError: if a rank failed. The processes are started anew for the next case.
        """
        begin = time.monotonic()
        if self._process is None:
            self._start()
        assert self._folder is not None, "it was started"
        self._count += 1
        out = Path(self._folder.name) / f"case-{self._count}"
        out.mkdir()
        line = json.dumps(_to_json(case, out))
        try:
            for cases in self._cases:
                print(line, file=cases, flush=True)
            self._wait_for_answers()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CaseError("died", f"a process of the world of {self.world_size} is gone: {error}") from error
            raise
        return _read_outcome(out, self.world_size, begin)

    def close(self) -> None:
        """Ends the processes."""
        for cases in self._cases:
            with suppress(OSError):  # who read it is gone already
                cases.close()
        self._cases = []
        if self._process is not None:
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._kill()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="embedshard-")
        self._answers = queue.Queue()
        pipes = [(os.pipe(), os.pipe()) for _ in range(self.world_size)]
        theirs = [(cases[0], answers[1]) for cases, answers in pipes]
        self._process = self._launch(theirs, Path(self._folder.name))
        for rank, (cases, answers) in enumerate(pipes):
            os.close(cases[0])
            os.close(answers[1])
            self._cases.append(os.fdopen(cases[1], "w"))
            threading.Thread(target=_pass_on, args=(rank, answers[0], self._answers), daemon=True).start()

    def _launch(self, theirs: list[tuple[int, int]], folder: Path) -> subprocess.Popen[bytes]:
        """Starts the process that becomes the ranks, given their ends of the pipes; the leader of a session of its own."""
        with (folder / "start.log").open("w") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-c", _PROGRAM, json.dumps(sys.path), json.dumps(theirs)),
                    *(str(self._local_world_size), str(folder)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end for ends in theirs for end in ends],
                start_new_session=True,  # so that it can be ended with the ranks
            )

    def _wait_for_answers(self) -> None:
        deadline, waiting = time.monotonic() + self._timeout_s, set(range(self.world_size))
        failures: list[tuple[str, str]] = []
        while waiting:
            try:
                rank, line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            waiting.discard(rank)
            answer = json.loads(line) if line else {"kind": "died", "message": self._last_words(rank)}
            if answer["kind"]:
                failures.append((answer["kind"], answer["message"]))
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            kind, message = min(failures, key=lambda failure: _rank_of_cause(failure[0]))
            if waiting or kind == "died":
                self._kill()
            raise CaseError(kind, message)
        if waiting:
            self._kill()
            raise CaseError("timeout", f"ranks {sorted(waiting)} have not ended after {self._timeout_s:g} s")

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self, rank: int) -> str:
        assert self._folder is not None, "it was started"
        logs = (Path(self._folder.name) / name for name in (f"rank-{rank}.log", "start.log"))
        words = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        return f"rank {rank} of {self.world_size} died. Its last words: " + " | ".join(words[:3] + words[-3:])


def rehearse_for_starter(pipes: list[tuple[int, int]], local_world_size: str, folder: str) -> None:
    """Becomes the ranks of a `LocalGroup`: the whole life of the process that it starts.

    Args:
        pipes: for each rank, where it reads cases and where it writes answers.
        local_world_size: how many ranks count as one machine.
        folder: for the ranks' meeting and their logs.
    """
    set_process_environment()
    import torch

    import embedshard.train.rehearsal  # noqa: F401 (what takes long is imported once, before there are copies)

    torch.set_num_threads(1)
    children = []
    for rank, own in enumerate(pipes):
        child = os.fork()
        if child == 0:
            with Path(folder, f"rank-{rank}.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            faulthandler.enable()
            for other in pipes:
                if other != own:  # else nobody would see when one ends
                    os.close(other[0])
                    os.close(other[1])
            status = 1
            try:
                _serve(rank, len(pipes), int(local_world_size), Path(folder), own)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    for ends in pipes:
        os.close(ends[0])
        os.close(ends[1])
    for child in children:
        os.waitpid(child, 0)


def _serve(rank: int, world_size: int, local_world_size: int, folder: Path, pipe: tuple[int, int]) -> None:
    known: dict[str, Dataset] = {}
    with (
        os.fdopen(pipe[0]) as cases,
        os.fdopen(pipe[1], "w") as answers,
        open_local_group(rank, world_size, local_world_size, folder / "rendezvous") as world,
    ):
        for line in cases:
            print(json.dumps(_answered(json.loads(line), world, known)), file=answers, flush=True)


def _answered(case: dict[str, Any], world: World, known: dict[str, Dataset]) -> dict[str, str]:
    from embedshard.train.rehearsal import rehearse

    try:
        wanted = _from_json(case)
        key = _data_key(wanted.config)
        noted, dataset = rehearse(wanted, world, known.get(key))
        known.clear()
        known[key] = dataset
        _write(noted, Path(case["out"]) / f"rank-{world.rank}.npz")
    except EmbedshardError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"kind": type(error).__name__, "message": f"{world.describe()}: {type(error).__name__}: {error}"}
    return {"kind": "", "message": ""}


def _rank_of_cause(kind: str) -> int:
    """Returns how far a failure is from the cause, where several ranks failed: the others failed because one had."""
    if kind in {error.__name__ for error in (CheckpointError, ConfigError, DataError, PlanError)}:
        return 0
    return 1 if kind == "died" else 2


def _pass_on(rank: int, pipe: int, answers: queue.Queue[tuple[int, str]]) -> None:
    with os.fdopen(pipe) as stream:
        for line in stream:
            answers.put((rank, line))
    answers.put((rank, ""))


def _data_key(config: Config) -> str:
    """Returns what must be the same for two configs to read the same data alike."""
    parts = config.model_dump(mode="json", exclude={"sharding", "optimizer", "tracking", "checkpoint"})
    for table in parts["tables"].values():
        del table["sharding"], table["optimizer"]
    return json.dumps(parts, sort_keys=True)


def _to_json(case: Rehearsal, out: Path) -> dict[str, Any]:
    rows = None
    if case.rows is not None:
        rows = str(out / "rows.npz")
        np.savez(rows, **_arrays(case.rows))
    return {
        "config": case.config.model_dump(mode="json"),
        "last": case.last,
        "resume_from": case.resume_from,
        "save_to": case.save_to,
        "notes_state": case.notes_state,
        "rows": rows,
        "out": str(out),
    }


def _from_json(case: Mapping[str, Any]) -> Rehearsal:
    from embedshard.train.rehearsal import Rehearsal

    rows = None
    if case["rows"] is not None:
        with np.load(case["rows"]) as file:
            rows = dict(file)
    return Rehearsal(
        config=Config.model_validate(case["config"]),
        last=case["last"],
        resume_from=None if case["resume_from"] is None else (case["resume_from"][0], case["resume_from"][1]),
        save_to=case["save_to"],
        notes_state=case["notes_state"],
        rows=rows,
    )


def _write(noted: Noted, path: Path) -> None:
    """Writes arrays, and beside them what they are: names of tables are no names of files."""
    arrays: dict[str, Array] = {}
    index: dict[str, list[dict[str, Any]]] = {}
    for when, blocks in (("before", noted.before), ("after", noted.after)):
        index[when] = []
        for number, block in enumerate(blocks):
            arrays[f"{when}-{number}"] = block.values
            if block.rows is not None:
                arrays[f"{when}-{number}-rows"] = block.rows
            index[when].append({"name": block.name, "column": block.column, "shape": block.shape})
    for number, rows in enumerate(noted.touched.values()):
        arrays[f"touched-{number}"] = rows
    np.savez(path, **_arrays(arrays))
    about = {"index": index, "losses": noted.losses, "touched": list(noted.touched)}
    path.with_suffix(".json").write_text(json.dumps(about))


def _read_outcome(out: Path, world_size: int, begin: float) -> Outcome:
    from embedshard.train.rehearsal import Block, merge

    losses: list[list[float]] = []
    blocks: dict[str, list[list[Block]]] = {"before": [], "after": []}
    touched: dict[str, list[Array]] = {}
    for rank in range(world_size):
        path = out / f"rank-{rank}.npz"
        about = json.loads(path.with_suffix(".json").read_text())
        losses.append(about["losses"])
        with np.load(path) as arrays:
            for number, table in enumerate(about["touched"]):
                touched.setdefault(table, []).append(arrays[f"touched-{number}"])
            for when, found in blocks.items():
                found.append(
                    [
                        Block(
                            name=entry["name"],
                            rows=arrays.get(f"{when}-{number}-rows"),
                            column=entry["column"],
                            shape=tuple(entry["shape"]),
                            values=arrays[f"{when}-{number}"],
                        )
                        for number, entry in enumerate(about["index"][when])
                    ]
                )
        path.unlink()
    try:
        before, after = merge(blocks["before"]), merge(blocks["after"])
    except ValueError as error:
        raise CaseError("ValueError", str(error)) from error
    rows = {table: np.unique(np.concatenate(parts)) for table, parts in touched.items()}
    return Outcome(losses, before, after, rows, time.monotonic() - begin)


def _arrays(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return dict(arrays)  # numpy's stub takes names of arrays for names of options
