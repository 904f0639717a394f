"""What a report knows of a run: plain data, and what follows from it. Who reads it from a folder is `read.py`."""

from __future__ import annotations

__all__ = [
    "Attempt",
    "Partition",
    "Points",
    "QuarantinedRow",
    "Run",
    "State",
    "Table",
    "integer",
    "is_number",
    "mapping",
    "numbers",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from embedshard.config import Config, TableSpec, table_specs
from embedshard.storage import Location

Points = Sequence[tuple[int, float]]
"""A curve: (step, value), the steps ascending."""


def mapping(value: Any) -> dict[str, Any]:
    """Returns a mapping as it is, and an empty one for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}


def numbers(value: Any) -> dict[str, float]:
    """Returns those values of a mapping that are finite numbers."""
    return {str(key): number for key, number in mapping(value).items() if is_number(number)}


def integer(value: Any) -> int | None:
    """Returns a whole number, and None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        word: `running` is a guess from the time of the last sign of life: the folder doesn't say whether a process lives.
        step: the last step that is known to have been done.
        planned: the steps that the config asks for; None where the folder doesn't tell.
        last_sign: when the run was last heard of.
    """

    word: Literal["finished", "stopped", "running"]
    step: int
    planned: int | None
    last_sign: datetime | None


@dataclass(frozen=True)
class Attempt:
    """A start of the run.

    Attributes:
        number: from 1.
        time: when.
        host: where.
        world_size: how many workers trained.
        resumed_after: the step after which it went on; None where the folder doesn't tell.
        last_step: the last step that it is known to have done.
        overtaken_after: the step after which a later attempt went on, the least of several; None if that is not known.
        is_last: whether no attempt came later.
    """

    number: int
    time: datetime | None
    host: str | None
    world_size: int | None
    resumed_after: int | None
    last_step: int | None
    overtaken_after: int | None
    is_last: bool

    @property
    def rolled_back(self) -> int | None:
        """How many of its steps a later attempt did again, at least; None where the folder doesn't tell."""
        if self.is_last or self.last_step is None:
            return 0 if self.is_last else None
        return None if self.overtaken_after is None else max(self.last_step - self.overtaken_after, 0)


@dataclass(frozen=True)
class Partition:
    """Training files that are trained before those of the next partition."""

    files: int
    row_groups: int
    rows: int
    size_bytes: int


@dataclass(frozen=True)
class Table:
    """An embedding table; what depends on a number of rows that is not known is None."""

    spec: TableSpec
    vocabulary: str

    @property
    def is_known(self) -> bool:
        """Whether its number of rows is known."""
        return self.spec.rows > 0


@dataclass(frozen=True)
class QuarantinedRow:
    """A row that was set aside, and why."""

    file: str
    row_group: int | None
    row: int | None
    column: str
    value: str
    reason: str
    step: int | None


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        location: the folder.
        tree: the config as written, variables unexpanded.
        config: what it means, where it fits this version; a variable without a default stands for itself.
        attempts: each start.
        curves: by name, such as `train/loss` or `validation/recall@20`; rolled-back steps left out.
        result: result.json; empty where the run has not ended.
        inventory: inventory.json; empty where there is none.
        quarantined: the first rows that were set aside.
        quarantine_reasons: how many were, by (column, reason).
        state: how far the run is.
        checkpoints: the steps of those that are there.
        problems: what could not be read, for a person.
    """

    location: Location
    tree: dict[str, Any]
    config: Config | None
    attempts: tuple[Attempt, ...]
    curves: Mapping[str, Points]
    result: Mapping[str, Any]
    inventory: Mapping[str, Any]
    quarantined: tuple[QuarantinedRow, ...]
    quarantine_reasons: Mapping[tuple[str, str], int]
    state: State
    checkpoints: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder's own name."""
        return self.location.address.rpartition("/")[2]

    @property
    def address(self) -> str:
        """How the folder is named to `embedshard`: a folder may have been copied, what is in a store may not."""
        return self.folder if self.location.is_local else self.location.address

    @property
    def name(self) -> str:
        """The config's name of the run, else the folder's."""
        return str(self.tree.get("name") or self.folder)

    @property
    def selected_metric(self) -> str | None:
        """The metric by which the best checkpoint is chosen; None without a validation set."""
        if mapping(self.tree.get("data")).get("validation") is None:
            return None
        evaluate = mapping(self.tree.get("evaluate"))
        metrics = evaluate.get("metrics")
        first = metrics[0] if isinstance(metrics, list) and metrics else None
        name = evaluate.get("select") or first
        return None if name is None else str(name)

    @property
    def selected_step(self) -> int | None:
        """The step of the checkpoint that the run chose."""
        return integer(self.result.get("selected_step"))

    @property
    def workers(self) -> int | None:
        """How many trained last."""
        return integer(self.result.get("workers")) or (self.attempts[-1].world_size if self.attempts else None)

    @property
    def samples_per_second(self) -> float | None:
        """Rows trained a second of the last attempt, evaluations and checkpoints left out."""
        told = numbers(self.result).get("samples_per_second")
        points = self.curves.get("train/samples_per_second")
        return told if told is not None else points[-1][1] if points else None

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Where the last attempt's loop spent its time: seconds by stage; empty where the run has not ended."""
        return numbers(self.result.get("seconds"))

    @property
    def bytes_read(self) -> int | None:
        """Bytes of Parquet that the last attempt read, by all workers."""
        points = self.curves.get("train/bytes_read")
        told = integer(self.result.get("bytes_read"))
        return told if told is not None else round(points[-1][1]) if points else None

    @property
    def elapsed_seconds(self) -> float | None:
        """From the first start to the last sign of life, pauses between attempts included."""
        begin, end = self.attempts[0].time if self.attempts else None, self.state.last_sign
        return None if begin is None or end is None else max((end - begin).total_seconds(), 0.0)

    def measured(self, split: str, step: int | None = None) -> dict[str, float]:
        """Returns a split's metrics at a step, the last one measured where there is none given."""
        found = {}
        for name, points in self.curves.items():
            if name.startswith(f"{split}/"):
                values = [value for at, value in points if step is None or at == step]
                if values:
                    found[name.partition("/")[2]] = values[-1]
        return found

    @cached_property
    def test_metrics(self) -> dict[str, float]:
        """The test set's metrics at the selected checkpoint."""
        return numbers(self.result.get("metrics"))

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """The test set's metrics of each baseline."""
        return {str(name): numbers(values) for name, values in mapping(self.result.get("baselines")).items()}

    @cached_property
    def partitions(self) -> tuple[Partition, ...]:
        """The training data, in the order in which they are trained; of rows those that are not held out."""
        trained = self.inventory.get("partition_rows", [])
        return tuple(
            Partition(
                files=len(files),
                row_groups=sum(len(file["row_groups"]) for file in files),
                rows=trained[number] if number < len(trained) else sum(sum(file["row_groups"]) for file in files),
                size_bytes=sum(file["size_bytes"] for file in files),
            )
            for number, files in enumerate(self.inventory.get("partitions", []))
        )

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The embedding tables as they are built, those of biases too; none where the config does not fit this version."""
        if self.config is None:
            return ()
        counted = mapping(self.inventory.get("table_rows"))
        rows = {name: integer(counted.get(name)) or table.known_rows or 0 for name, table in self.config.tables.items()}
        return tuple(
            Table(spec, self.config.tables[spec.name].vocabulary.kind if spec.name in self.config.tables else "bias")
            for spec in table_specs(self.config, rows)
        )

    @property
    def table_rows(self) -> dict[str, int]:
        """Rows of those tables of which they are known, that for unknown ids included."""
        return {table.spec.name: table.spec.num_embeddings for table in self.tables if table.is_known}
