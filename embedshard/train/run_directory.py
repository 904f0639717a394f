"""The folder that a run leaves behind: config, inventory, checkpoints, ledger, metrics, result.

It lies on a disk or in an object store. Whoever starts the run adds a line to attempts.jsonl: the last line there is that
of the attempt whose run it is now, and a former one that still lives must not write any more.
"""

from __future__ import annotations

__all__ = ["FREE_TO_CHANGE", "Attempt", "Origin", "RunDirectory", "is_below"]

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedshard.config import Loaded, differences, dump_tree, parse_config, variable_values
from embedshard.errors import CheckpointError, ConfigError
from embedshard.storage import Location, PathOrUri, locate, reaching
from embedshard.train.tracking import json_text

FREE_TO_CHANGE = (
    "name", "tracking", "checkpoint", "evaluate", "sharding", "data.max_bad_fraction", "data.threads", "train.epochs",
    "train.max_steps", "train.prefetch",
)  # fmt: skip
"""What may differ between a run and its resumption: it changes neither the rows nor the steps taken so far."""

_CHECKED_BY_CONTENT = (
    "data.train", "data.validation", "data.test", "data.partitions", "tables.*.vocabulary.path", "tables.*.init_from.parquet"
)  # fmt: skip
"""Where files lie may differ too: inventory and vocabularies tell whether they are the same."""


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
        place: the folder; it holds a config.yaml.
    """

    def __init__(self, place: PathOrUri | Location) -> None:
        self.folder = locate(place)

    @classmethod
    def create(
        cls, place: PathOrUri | Location, loaded: Loaded, environment: Mapping[str, str] | None = None
    ) -> RunDirectory:
        """Makes the folder of a new run. One in which nothing has begun yet, since its data were missing say, is taken over.

        Args:
            place: of the folder.
            loaded: its config.
            environment: what the config's `${VAR}` mean for as long as the run lasts.

        Raises:
            ConfigError: if there is a run already.
            StorageError: if it cannot be made.
        """
        run = cls(place)
        with reaching(run.folder):
            if run.config_file.exists() and run.has_begun:
                raise ConfigError(
                    f"{run.folder.uri} holds a run already. Continue it with --resume {run.folder.quoted}, or choose "
                    f"another --run-dir."
                )
            run.folder.make_dirs()
        run.save_config(loaded)
        run.write_json("variables.json", _digests(variable_values(loaded, environment or {})))
        return run

    @classmethod
    def open(cls, place: PathOrUri | Location) -> RunDirectory:
        """Opens the folder of a run.

        Raises:
            ConfigError: if it holds none.
            StorageError: if it cannot be reached.
        """
        run = cls(place)
        with reaching(run.folder):
            if not run.config_file.is_file():
                found = "has no config.yaml, so it holds no run" if run.folder.exists() else "is not there"
                raise ConfigError(
                    f"{run.folder.uri} {found}. Give the folder that 'embedshard train' printed when it began."
                )
        return run

    def load_config(self, environment: Mapping[str, str], overrides: Sequence[str] = ()) -> Loaded:
        """Reads the config that the run was started with."""
        with reaching(self.config_file):
            text = self.config_file.read_text()
        return parse_config(text, self.config_file.uri, environment, overrides)

    def check_same_run(self, loaded: Loaded, environment: Mapping[str, str]) -> None:
        """Checks that a config, and what its `${VAR}` mean now, continue this run rather than beginning another.

        Raises:
            ConfigError: naming each difference that would make it another run.
        """
        saved = self.load_config(environment)
        ours, theirs_now = (each.config.model_dump(mode="json") for each in (loaded, saved))
        changed = [
            f"  {path}: {theirs!r} in the run, {mine!r} now"
            for path, mine, theirs in differences(ours, theirs_now)
            if not is_below(path, FREE_TO_CHANGE)
        ]
        values = variable_values(saved, environment)
        now = _digests(values)
        changed += [
            f"  {path}: {_text_at(saved.tree, path)} is {values[path]!r} now, and was something else when the run began"
            for path, digest in (self.read_json("variables.json") or {}).items()
            if path in now and now[path] != digest
        ]
        if changed:
            raise ConfigError(
                f"{self.folder.uri} was started with another config, so it cannot be resumed with this one:\n"
                + "\n".join(changed)
                + "\nUse the run's own config.yaml (leave CONFIG out) and the variables that it began with, or start "
                "a new run."
            )

    def save_config(self, loaded: Loaded) -> None:
        """Keeps the config that the run goes on with."""
        with reaching(self.config_file):
            self.config_file.write_text_atomically(dump_tree(loaded.tree))

    def begin_attempt(self, world_size: int, resumed_from: Origin | None) -> Attempt:
        """Counts a start of the run. Former ones are replaced by it."""
        with reaching(self.attempts_file):
            former = self._attempt_lines()
            attempt = Attempt(
                attempt=len(former) + 1,
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                host=socket.gethostname(),
                world_size=world_size,
                resumed_from=resumed_from,
            )
            lines = [*former, _line_of(attempt)]
            self.attempts_file.write_text_atomically("".join(f"{line}\n" for line in lines))
        return attempt

    @property
    def num_attempts(self) -> int:
        """How many starts of the run there were."""
        with reaching(self.attempts_file):
            return len(self._attempt_lines())

    @property
    def has_begun(self) -> bool:
        """Whether training was ever started."""
        with reaching(self.attempts_file):
            return self.attempts_file.exists()

    def is_replaced(self, attempt: Attempt) -> bool:
        """Returns whether a later start, or another one of the same moment, has taken the run over."""
        with reaching(self.attempts_file):
            return self._attempt_lines()[-1:] != [_line_of(attempt)]

    def check_not_replaced(self, attempt: Attempt) -> None:
        """Checks that this attempt may still write.

        Raises:
            CheckpointError: if another one has taken the run over.
        """
        if self.is_replaced(attempt):
            raise CheckpointError(
                f"{self.folder.uri} was taken over by another start of this run, which its attempts.jsonl tells of; this is "
                f"attempt {attempt.attempt}. End this process: the other one trains on."
            )

    def attempts(self) -> tuple[int, dict[int, Attempt], list[str]]:
        """Returns how many starts of the run there were, those by number that can be read, and what is wrong with others."""
        texts = self.attempts_file.read_text().splitlines()
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

    def _attempt_lines(self) -> list[str]:
        return self.attempts_file.read_text().splitlines() if self.attempts_file.exists() else []

    @property
    def config_file(self) -> Location:
        """The config."""
        return self.folder.join("config.yaml")

    @property
    def attempts_file(self) -> Location:
        """A line for each start of the run."""
        return self.folder.join("attempts.jsonl")

    @property
    def ledger(self) -> Location:
        """The folder of the record of the rows that were trained."""
        return self.folder.join("ledger")

    @property
    def checkpoints(self) -> Location:
        """The folder of checkpoints."""
        return self.folder.join("checkpoints")

    @property
    def vocabularies(self) -> Location:
        """The folder of the vocabularies that were counted from the training set."""
        return self.folder.join("vocabularies")

    @property
    def quarantine(self) -> Location:
        """The folder of the rows that were set aside."""
        return self.folder.join("quarantine")

    def read_json(self, name: str) -> Any:
        """Returns a JSON file of the folder; None if it is not there.

        Raises:
            CheckpointError: if it is damaged.
        """
        location = self.folder.join(name)
        with reaching(location):
            text = location.read_text() if location.exists() else "null"
        try:
            return json.loads(text)
        except ValueError as error:
            raise CheckpointError(
                f"{location.uri} is not the JSON file that the run wrote: {error}. Restore it from a backup, or start a new "
                f"run."
            ) from error

    def write_tokenizers(self, tokenizers: Mapping[str, str]) -> None:
        """Writes the JSON of each table's tokenizer, as the library reads it: tokenizers/<table>.json."""
        folder = self.folder.join("tokenizers")
        with reaching(folder):
            for table, text in tokenizers.items():
                folder.make_dirs()
                folder.join(f"{table}.json").write_text_atomically(text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder."""
        location = self.folder.join(name)
        with reaching(location):
            location.write_text_atomically(json_text(value, indent=2) + "\n")


def _line_of(attempt: Attempt) -> str:
    return json.dumps(attempt.model_dump())


def _digests(values: Mapping[str, str]) -> dict[str, str]:
    """Returns what tells whether a value that holds a variable is still the same, and does not tell the value."""
    return {
        path: hashlib.sha256(f"{path}={text}".encode()).hexdigest()
        for path, text in values.items()
        if not is_below(path, FREE_TO_CHANGE + _CHECKED_BY_CONTENT)
    }


def is_below(path: str, places: Sequence[str]) -> bool:
    """Returns whether a dotted path of a config is one of some places, whose parts may be globs, or below one."""
    parts = path.split(".")
    return any(
        len(place) <= len(parts) and all(fnmatch(part, wanted) for part, wanted in zip(parts, place, strict=False))
        for place in (place.split(".") for place in places)
    )


def _text_at(tree: Any, path: str) -> str:
    for part in path.split("."):
        tree = tree[int(part) if isinstance(tree, list) else part]
    return str(tree)
