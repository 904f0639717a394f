"""Exports of made-up rows: what deltas are tested with, without a run. Also a program: applies until it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.export.manifest import Manifest, hash_files, prepared_folder, write_manifest
from embedshard.storage import Location


def vectors(ids, rows, numbers):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])
    return pa.table({"id": ids, "row": pa.array(rows, pa.int64()), "vector": flat})


def write_rows(path: Path, content: pa.Table, group: int) -> None:
    """A row group for each write, as exports are written; at least one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream, pq.ParquetWriter(stream, content.schema) as writer:
        for first in range(0, max(1, len(content)), group):
            writer.write_table(content.slice(first, group))


class Made:
    """What an export is made of; `change` makes another of it."""

    def __init__(self, seed: int, rows: int = 60) -> None:
        self.generator = np.random.default_rng(seed)
        self.step, self.dim = 10, 8
        self.tables = {name: self._fresh(np.arange(rows)) for name in ("tables/item", "items", "users")}
        self.tables["users"] = self.tables["users"].take(self.generator.permutation(rows))
        self.bytes = {"dense.safetensors": self.generator.bytes(9000), "items.faiss": self.generator.bytes(5_000)}
        self.groups = {name: int(self.generator.integers(1, 40)) for name in self.tables}

    def _fresh(self, rows):
        ids = [None if row % 7 == 3 else f"id {row}" for row in rows]
        numbers = self.generator.standard_normal((len(rows), self.dim)).astype(np.float32)
        return vectors(pa.array(ids, pa.string()), rows, numbers)

    def change(self, share: float) -> None:
        """Changes, adds and removes rows, ids and bytes; now and then a row group's size, the order, or the schema."""
        draw, self.step = self.generator, self.step + 10
        for name, table in list(self.tables.items()):
            count = len(table)
            kept = np.flatnonzero(draw.random(count) >= share * draw.random())
            numbers = np.array(table["vector"].to_pylist(), np.float32).reshape(count, -1)
            touched = np.flatnonzero(draw.random(count) < share)
            numbers[touched, draw.integers(0, numbers.shape[1], len(touched))] *= -1
            ids = table["id"].to_pylist()
            for place in np.flatnonzero(draw.random(count) < share / 2):
                ids[place] = f"another {place}"
            changed = vectors(pa.array(ids, pa.string()), table["row"].to_numpy(), numbers).take(kept)
            most = int(np.max(table["row"].to_numpy(), initial=0))
            free = np.setdiff1d(np.arange(most + 20), table["row"].to_numpy())
            new = np.sort(draw.choice(free, int(draw.integers(0, 6) * (share > 0)), replace=False))
            self.tables[name] = pa.concat_tables([changed, self._wide(new, numbers.shape[1])]).combine_chunks()
            if name != "users":
                self.tables[name] = self.tables[name].sort_by("row")
            elif draw.random() < 0.3:
                self.tables[name] = self.tables[name].take(draw.permutation(len(self.tables[name])))
            if draw.random() < 0.2:
                self.groups[name] = int(draw.integers(1, 40))
            if draw.random() < 0.05:
                self.tables[name] = self._wide(np.arange(30), 12)
        for name, content in list(self.bytes.items()):
            touched = bytearray(content + draw.bytes(int(draw.integers(0, 90))))
            for place in draw.integers(0, len(touched), 9):
                touched[place] ^= 1
            self.bytes[name] = bytes(touched[: len(touched) - int(draw.integers(0, 50))])
        if draw.random() < 0.5:
            self.bytes["tokenizers/a.json"] = draw.bytes(50)
        elif draw.random() < 0.5:
            self.bytes.pop("tokenizers/a.json", None)

    def _wide(self, rows, dim):
        before, self.dim = self.dim, dim
        table, self.dim = self._fresh(rows), before
        return table

    def write(self, folder: Path) -> Path:
        """Writes it as an export, over what is there."""
        with prepared_folder(folder) as place:
            for name, table in self.tables.items():
                write_rows(folder / f"{name}.parquet", table, self.groups[name])
            for name, content in self.bytes.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            seal(place, self.step)
        return folder


def seal(place: Location, step: int) -> None:
    """Writes the manifest of what is in a folder."""
    manifest = Manifest(
        embedshard="0", written=f"at {step}", run="made", step=step, attempt="1", data={}, config={}, metrics={}, tables={},
        dense=None, files=hash_files(place),
    )  # fmt: skip
    write_manifest(place, manifest)


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of an export but those that lead back and those that are being made ready."""
    return {
        name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(folder))).startswith(("rollback/", "applying/", "."))
    }


# ----------------------------------------------------------------------- a program: what a kill at each moment leaves
def until_killed(action, after: int) -> bool:
    """Runs an action in a process that is killed, by SIGKILL, before its so-manieth change on the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = after

        def counted(original):
            def instead(*arguments, **options):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*arguments, **options)

            return instead

        for name in ("write_bytes_atomically", "replace_by", "delete_file", "delete_tree"):
            setattr(Location, name, counted(getattr(Location, name)))
        pq.ParquetWriter.write_table = counted(pq.ParquetWriter.write_table)
        try:
            action()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) in (0, 3), status
    return False


def told(action) -> str:
    """Runs an action to its end in a process of its own: this one may start no thread, as it forks. Returns the error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            action()
        except Exception as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return text


def kill_everywhere(old: Path, new: Path, delta: Path, work: Path, is_back: bool) -> dict:
    """Kills an apply, or a rollback, before each change that it makes; tells what was left, and what each way out made."""
    from embedshard.export.delta_apply import apply_delta, roll_back
    from embedshard.export.manifest import open_export

    start = work / "start"
    shutil.copytree(old, start)
    first, last = content_of(old), content_of(new)
    if is_back:
        assert told(lambda: apply_delta(delta, start)) == ""
        first, last = last, first
    found: dict = {"left": [], "wrong": []}
    names = {"first": first, "last": last}

    def state(folder):
        if not (folder / "manifest.json").exists():
            return "between" if (folder / "applying" / "journal.json").exists() else "torn"
        here = content_of(folder)
        return next((name for name, content in names.items() if content == here), "torn")

    change = {"apply": partial(apply_delta, delta), "rollback": roll_back}
    for after in range(1000):
        killed = work / f"killed-{after}"
        shutil.copytree(start, killed)
        if not until_killed(partial(change["rollback" if is_back else "apply"], killed), after):
            break
        left = state(killed)
        found["left"].append(left)
        message = told(partial(open_export, killed))
        if ("is between two exports" in message) != (left == "between") or (left != "between" and message):
            found["wrong"].append([after, left, message])
        ways = ("apply", "rollback", "apply after a kill") if left == "between" else ("apply", "rollback")[after % 2 :][:1]
        for way in ways:
            other = work / "other"
            shutil.copytree(killed, other)
            action = partial(change[way.split()[0]], other)
            if way == "apply after a kill":
                until_killed(action, 3)
            message = told(action)
            wanted = new if way != "rollback" else old
            here, there = content_of(other), content_of(wanted)
            if here != there or (message and "nothing is kept that leads back" not in message):
                others = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
                found["wrong"].append([after, left, way, message, others])
            shutil.rmtree(other)
        shutil.rmtree(killed)
    shutil.rmtree(start)
    return found


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:5]]
    print(json.dumps(kill_everywhere(*paths, is_back=sys.argv[5] == "back")))
