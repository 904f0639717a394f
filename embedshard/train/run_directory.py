"""The folder that a run leaves behind: config, inventory, checkpoints, ledger, metrics, result."""

from __future__ import annotations

__all__ = ["Attempt", "Origin", "RunDirectory", "write_atomically"]

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class Origin(BaseModel):
    """The checkpoint from which an attempt went on.

    Attributes:
        step: optimizer steps done when it was taken.
        attempt: that wrote it.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    step: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]


class Attempt(BaseModel):
    """A start of the run: a line of attempts.jsonl.

    Attributes:
        attempt: its number, from 1.
        time: in ISO 8601.
        host: of rank 0.
        world_size: processes that train.
        resumed_from: where it went on; None began the run.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    attempt: Annotated[int, Field(ge=1)]
    time: str
    host: str
    world_size: Annotated[int, Field(ge=1)]
    resumed_from: Origin | None


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
        if (path / "config.yaml").exists() and cls(path).attempts_file.exists():
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

    def begin_attempt(self, world_size: int, resumed_from: Origin | None) -> int:
        """Counts a start of the run; returns its number, from 1."""
        former = self.attempts_file.read_text(encoding="utf-8").splitlines() if self.attempts_file.exists() else []
        attempt = Attempt(
            attempt=len(former) + 1,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            world_size=world_size,
            resumed_from=resumed_from,
        )
        lines = [*former, json.dumps(attempt.model_dump())]
        write_atomically(self.attempts_file, "".join(f"{line}\n" for line in lines))
        return attempt.attempt

    def attempts(self) -> tuple[int, dict[int, Attempt], list[str]]:
        """Returns how many starts of the run there were, those by number that can be read, and what is wrong with others."""
        texts = self.attempts_file.read_text(encoding="utf-8", errors="replace").splitlines()
        found: dict[int, Attempt] = {}
        problems = []
        for number, text in enumerate(texts, start=1):
            try:
                attempt = Attempt.model_validate_json(text)
            except ValidationError as error:
                detail = error.errors()[0]
                where = "".join(f"{part}: " for part in detail["loc"])
                problems.append(f"attempts.jsonl, line {number} cannot be read: {where}{detail['msg']}")
                continue
            if attempt.attempt != number:
                problems.append(f"attempts.jsonl, line {number} tells of attempt {attempt.attempt}, not of {number}")
                continue
            found[number] = attempt
        return len(texts), found, problems

    @property
    def attempts_file(self) -> Path:
        """A line for each start of the run."""
        return self.path / "attempts.jsonl"

    @property
    def ledger(self) -> Path:
        """The folder of the record of the rows that were trained."""
        return self.path / "ledger"

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
