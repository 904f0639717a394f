"""What moved between two checkpoints: rows of tables and other tensors, read block by block, never a table at once."""

from __future__ import annotations

__all__ = ["MovedRow", "TableDiff", "TensorDiff", "diff_here", "diff_tables", "show_diff"]

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard.config import Config
from embedshard.errors import ConfigError, EmbedshardError
from embedshard.export.ids import Id
from embedshard.launch.run_tables import ids_in, table_of, vocabulary_table
from embedshard.sharding.slots import FREE
from embedshard.storage import PathOrUri, reaching
from embedshard.train.checkpoint_reader import Checkpoint, open_step
from embedshard.train.run_directory import RunDirectory

_PREFIX, _SUFFIX = "tables/", "/weight"
_VOCABULARIES = "vocabularies/"


@dataclass(frozen=True)
class MovedRow:
    """A row that moved, by how much, and its id where the vocabulary keeps it."""

    row: int
    distance: float
    id: Id = None


@dataclass(frozen=True)
class TableDiff:
    """What moved of a table's weights; a row's movement is the length of the difference of its vectors.

    Attributes:
        table: its name.
        rows: that were compared; where it has grown or shrunk, those that both have.
        rows_before: of the first checkpoint.
        rows_after: of the second.
        moved: rows of which any number is another.
        max_distance: of a row's.
        mean_distance: of the moved rows'; 0 where none moved.
        most_moved: the rows that moved most, the most first.
        changed_hands: rows of a managed table that hold another id, or none any more: they are not compared.
    """

    table: str
    rows: int
    rows_before: int
    rows_after: int
    moved: int
    max_distance: float
    mean_distance: float
    most_moved: tuple[MovedRow, ...]
    changed_hands: int = 0


@dataclass(frozen=True)
class TensorDiff:
    """How a tensor that is no table's weights differs.

    Attributes:
        name: of the tensor.
        changed: numbers that are others.
        numbers: how many it has.
        max_change: the greatest absolute difference.
    """

    name: str
    changed: int
    numbers: int
    max_change: float


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints.

    Attributes:
        before: the first one's folder.
        after: the second's.
        tables: of those that both hold.
        tensors: dense parameters and state of optimizers and objectives that both hold in one shape.
        others: what only one holds, or both in other shapes or types.
    """

    before: str
    after: str
    tables: tuple[TableDiff, ...]
    tensors: tuple[TensorDiff, ...]
    others: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)


def diff_here(
    run_dir: PathOrUri,
    before: int,
    after: int,
    environment: Mapping[str, str],
    *,
    other: PathOrUri | None = None,
    count: int = 10,
) -> Difference:
    """Compares two checkpoints of a run, or one of a run with one of another.

    Args:
        run_dir: the run's folder.
        before: the step of the first checkpoint.
        after: the step of the second.
        environment: gives configs their `${VAR}`.
        other: the folder of the run that the second one is of; None for the same.
        count: how many of the rows that moved most are named.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run, second = RunDirectory.open(run_dir), RunDirectory.open(run_dir if other is None else other)
    with reaching(run.checkpoints):
        config = run.load_config(environment).config
        both = open_step(run.checkpoints, before), open_step(second.checkpoints, after)
        found = diff_tables(*both, count, lambda table: _owner(config, table))
    tables = []
    for table in found.tables:
        try:
            _, owner, vocabulary = table_of(run, config, table.table)
            vocabulary = ids_in(open_step(second.checkpoints, after), owner, vocabulary)
        except EmbedshardError:  # a table of tree nodes has no ids; a vocabulary may be gone, and rows are told all the same
            tables.append(table)
            continue
        ids = vocabulary.ids_of(np.array([moved.row for moved in table.most_moved], dtype=np.int64))
        most_moved = tuple(replace(moved, id=id_) for moved, id_ in zip(table.most_moved, ids, strict=True))
        tables.append(replace(table, most_moved=most_moved))
    return replace(found, tables=tuple(tables))


def _owner(config: Config, table: str) -> str | None:
    try:
        return vocabulary_table(config, table)
    except ConfigError:  # of a tree's nodes
        return None


def diff_tables(
    before: Checkpoint, after: Checkpoint, count: int, owner_of: Callable[[str], str | None] = lambda table: None
) -> Difference:
    """Compares two checkpoints, a block of rows at a time. Each file of the first is read once where tables are cut by rows.

    Args:
        before: the first.
        after: the second.
        count: how many of the rows that moved most are named.
        owner_of: the config's table whose ids a table's rows are: where they come and go, rows that changed hands are not
            compared.

    Raises:
        CheckpointError: if a file is damaged.
    """
    tables, tensors, others = [], [], []
    for name, spec in sorted(before.tensors.items()):
        there = after.tensors.get(name)
        if there is None:
            others.append(f"{name} is in the first alone")
        elif spec.dtype != there.dtype or spec.shape[1:] != there.shape[1:] or len(spec.shape) != len(there.shape):
            met = f"{spec.dtype} {list(spec.shape)} and {there.dtype} {list(there.shape)}"
            others.append(f"{name} is {met}".replace("torch.", ""))
        elif name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            owner = owner_of(name.removeprefix(_PREFIX).removesuffix(_SUFFIX))
            tables.append(_diff_table(before, after, name, count, _changed_hands(before, after, owner)))
        elif name.startswith(_VOCABULARIES):
            continue  # who holds which row is told with the table
        elif spec.shape != there.shape:
            others.append(f"{name} is {list(spec.shape)} and {list(there.shape)}")
        else:
            tensors.append(_diff_tensor(before, after, name))
    others += [f"{name} is in the second alone" for name in sorted(after.tensors) if name not in before.tensors]
    return Difference(before.folder.uri, after.folder.uri, tuple(tables), tuple(tensors), tuple(others))


def _changed_hands(before: Checkpoint, after: Checkpoint, owner: str | None) -> torch.Tensor | None:
    """Returns which rows hold another id in the second checkpoint, those of both sizes; None where ids stay."""
    name = f"{_VOCABULARIES}{owner}/ids"
    if owner is None or name not in before.tensors or name not in after.tensors:
        return None
    ids = [checkpoint.read(name) for checkpoint in (before, after)]
    rows = min(len(each) for each in ids)
    return (ids[0][:rows] != ids[1][:rows]) & (ids[0][:rows] != FREE)


def _diff_table(before: Checkpoint, after: Checkpoint, name: str, count: int, other_hands: torch.Tensor | None) -> TableDiff:
    rows_before, rows_after = before.tensors[name].shape[0], after.tensors[name].shape[0]
    rows, moved, greatest, total = min(rows_before, rows_after), 0, 0.0, 0.0
    nearest: list[tuple[float, int]] = []
    for first, old_RD, new_RD in _pairs(before, after, name, rows):
        is_changed = (old_RD != new_RD).any(dim=1)
        if other_hands is not None:
            here = other_hands[first : first + len(is_changed)]
            is_changed[: len(here)] &= ~here
        changed = torch.nonzero(is_changed).flatten()
        if not len(changed):
            continue
        distances = torch.linalg.vector_norm(new_RD[changed].double() - old_RD[changed].double(), dim=1)
        moved += len(changed)
        total += float(distances.sum())
        greatest = max(greatest, float(distances.max()))
        best = distances.topk(min(count, len(distances)))
        found = zip(best.values.tolist(), (first + changed[best.indices]).tolist(), strict=True)
        nearest = heapq.nlargest(count, [*nearest, *((distance, -row) for distance, row in found)])
    return TableDiff(
        table=name.removeprefix(_PREFIX).removesuffix(_SUFFIX),
        rows=rows,
        rows_before=rows_before,
        rows_after=rows_after,
        moved=moved,
        max_distance=greatest,
        mean_distance=total / moved if moved else 0.0,
        most_moved=tuple(MovedRow(-row, distance) for distance, row in nearest),
        changed_hands=0 if other_hands is None else int(other_hands.sum()),
    )


def _diff_tensor(before: Checkpoint, after: Checkpoint, name: str) -> TensorDiff:
    shape = before.tensors[name].shape
    changed, greatest, numbers = 0, 0.0, 1
    for length in shape:
        numbers *= length
    for _, old, new in _pairs(before, after, name, shape[0] if shape else None):
        changed += int((old != new).sum())
        if old.numel():
            greatest = max(greatest, float((new.double() - old.double()).abs().max()))
    return TensorDiff(name, changed, numbers, greatest)


def _pairs(
    before: Checkpoint, after: Checkpoint, name: str, rows: int | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields blocks of rows of both; a tensor without axes is one block."""
    spec = before.tensors[name]
    if rows is None:
        yield 0, before.read(name), after.read(name)
        return
    for first, old in before.row_blocks(name, lambda first, last: first < rows):
        kept = old[: rows - first]
        new = torch.empty_like(kept)
        after.read_into([(name, (first, *(0 for _ in spec.shape[1:])), new)])
        yield first, kept, new


def show_diff(found: Difference, console: Console) -> None:
    """Prints what moved."""
    console.print(f"{found.before} -> {found.after}", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for heading, justify in (
        ("table", "left"), ("rows", "right"), ("moved", "right"), ("share", "right"),
        ("greatest movement", "right"), ("mean of the moved", "right"), ("most moved", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich's type is a Literal
    for one in found.tables:
        names = [f"row {moved.row}" if moved.id is None else str(moved.id) for moved in one.most_moved[:5]]
        rows = f"{one.rows:,}" if one.rows_before == one.rows_after else f"{one.rows_before:,} -> {one.rows_after:,}"
        table.add_row(
            one.table, rows, f"{one.moved:,}", f"{one.moved / one.rows:.2%}" if one.rows else "",
            f"{one.max_distance:.4g}", f"{one.mean_distance:.4g}", escape(", ".join(names)),
        )  # fmt: skip
    console.print(table)
    others = Table()
    for heading, justify in (("tensor", "left"), ("numbers", "right"), ("changed", "right"), ("greatest change", "right")):
        others.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich's type is a Literal
    for tensor in found.tensors:
        others.add_row(tensor.name, f"{tensor.numbers:,}", f"{tensor.changed:,}", f"{tensor.max_change:.4g}")
    if found.tensors:
        console.print(others)
    for one in found.tables:
        if one.changed_hands:
            console.print(
                f"Table '{one.table}': {one.changed_hands:,} rows hold another id, or none: not compared.", markup=False
            )
    for sentence in found.others:
        console.print(f"Not compared: {sentence}", markup=False, highlight=False, soft_wrap=True)
