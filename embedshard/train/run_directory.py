"""The folder that a run leaves behind: config, inventory, checkpoints, ledger, metrics, result."""

from __future__ import annotations

__all__ = ["RunDirectory", "write_atomically"]

import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from embedshard.config import Config, Loaded, build_config, differences, dump_tree
from embedshard.errors import ConfigError
from embedshard.storage import Location, locate
from embedshard.train.tracking import json_text

_FREE_TO_CHANGE = (
    "name", "tracking", "checkpoint", "evaluate", "sharding", "data.max_bad_fraction", "train.epochs", "train.max_steps"
)  # fmt: skip
"""What may differ between a run and its resumption: it changes neither the rows nor the steps taken so far."""


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the former or the new one, never a part."""
    locate(str(path)).write_bytes_atomically(text.encode("utf-8"))


class RunDirectory:
    """A run's folder.

    Args:
        path: the folder; it holds a config.yaml.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, loaded: Loaded) -> RunDirectory:
        """Makes the folder of a new run. One in which nothing has begun yet, since its data were missing say, is taken over.

        Raises:
            ConfigError: if there is a run already.
        """
        if (path / "config.yaml").exists() and (path / "attempts.jsonl").exists():
            raise ConfigError(f"{path} holds a run already. Continue it with --resume {path}, or choose another --run-dir.")
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", dump_tree(loaded.tree))
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens the folder of a run.

        Raises:
            ConfigError: if it holds none.
        """
        if not (path / "config.yaml").is_file():
            found = "is not there" if not path.exists() else "has no config.yaml, so it holds no run"
            raise ConfigError(f"{path} {found}. Give the folder that 'embedshard train' printed when it began.")
        return cls(path)

    def load_config(self, environment: Mapping[str, str]) -> Loaded:
        """Reads the config that the run was started with."""
        source = self.path / "config.yaml"
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
        return Loaded(build_config(tree, environment, str(source)), tree, str(source))

    def check_same_run(self, ours: Config, environment: Mapping[str, str]) -> None:
        """Checks that a config continues this run rather than beginning another.

        Raises:
            ConfigError: naming each difference that would make it another run.
        """
        saved = self.load_config(environment).config
        changed = [
            f"  {path}: {theirs!r} in the run, {mine!r} now"
            for path, mine, theirs in differences(ours.model_dump(mode="json"), saved.model_dump(mode="json"))
            if not any(path == free or path.startswith(f"{free}.") for free in _FREE_TO_CHANGE)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started with another config, so it cannot be resumed with this one:\n"
                + "\n".join(changed)
                + "\nUse the run's own config.yaml (leave CONFIG out), or start a new run."
            )

    def save_config(self, loaded: Loaded) -> None:
        """Keeps the config that the run goes on with."""
        write_atomically(self.path / "config.yaml", dump_tree(loaded.tree))

    def begin_attempt(self, world_size: int) -> int:
        """Counts a start of the run; returns its number, from 1."""
        path = self.path / "attempts.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        attempt = len(lines) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"attempt": attempt, "time": now, "host": socket.gethostname(), "world_size": world_size}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return attempt

    @property
    def checkpoints(self) -> Location:
        """The folder of checkpoints."""
        return locate(str(self.path / "checkpoints"))

    @property
    def quarantine(self) -> Path:
        """The folder of the rows that were set aside."""
        return self.path / "quarantine"

    def read_json(self, name: str) -> Any:
        """Returns a JSON file of the folder; None if it is not there."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder."""
        write_atomically(self.path / name, json_text(value, indent=2) + "\n")
