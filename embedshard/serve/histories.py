"""Vectors of users whom the export does not know, of the items that they met: the user's program and its tables.

It knows nothing of other questions than these. Whom it refuses does not depend on what else is asked.

Shapes: B users, N rows of a table, D dim.
"""

from __future__ import annotations

__all__ = ["GivenId", "Histories", "History", "items_of"]

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from embedshard.config.composition import Composition
from embedshard.errors import ExportError
from embedshard.export.ids import find_row
from embedshard.export.manifest import ExportedTower, OpenExport
from embedshard.export.program_file import load_program
from embedshard.export.read import rows_of, vector_blocks, vectors_of
from embedshard.export.signature import ProgramInput
from embedshard.export.unseen import Met, UserTower, kept_vocabulary_of

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
GivenId = int | str
History = tuple[GivenId, ...] | Mapping[str, tuple[GivenId, ...]]
"""Ids of items, oldest first; by the list that they are, where a tower reads several."""

_MOST_PLACES: Final = 2**14
"""Of sequences that are padded together."""
_AGAIN: Final = "Export the run again."


class Histories:
    """The user's program of an export, where it makes vectors of histories, and the tables that it looks up in.

    Of the tables of lists of items all rows are in memory, 4 bytes a number, and of those of ids what a user without a
    vector may look up; of others nothing. Of a tower that reads what no history tells nothing is.

    Args:
        export: with vectors of items.
        find_item: returns the row of an item's id, -1 where there is none.
        find_user: the same of a user's; None where the export has no vectors of users.
        users: rows of the users that have vectors.

    Raises:
        ExportError: if a file is another than was written, or the program makes no such vectors as its manifest tells.

    Attributes:
        why_none: why no history has a vector, for who asks with one; empty where some have.
    """

    def __init__(
        self,
        export: OpenExport,
        find_item: Callable[[GivenId], int],
        find_user: Callable[[GivenId], int] | None,
        users: IntArray,
    ) -> None:
        self._find_item, self._find_user = find_item, find_user
        if "user" not in export.manifest.programs or export.manifest.item is None:
            self.why_none = "the export has no program of a user tower, so there is no vector of a history"
            return
        tower = self._tower = UserTower(export)
        if not tower.lists:
            self.why_none = f"the user tower reads no list of items, only {tower.reads}"
            return
        spec = None if tower.user is None else tower.specs[tower.user]
        asked = np.zeros(0, dtype=np.int64) if spec is None else _without_vector(export, spec, users)
        examples = [Met({}, user) for user in (None, *asked[:1].tolist()) if not tower.lacks(user)]
        if not examples:
            self.why_none = _more_than_a_history(tower.lacks(None))
            return
        self.why_none = ""
        if spec is not None and find_user is None:
            assert spec.table is not None, "an id is looked up"
            assert spec.vocabulary is not None, "an id is looked up"
            vocabulary = kept_vocabulary_of(export, spec.table, spec.vocabulary)
            self._find_user = lambda id_: find_row(id_, vocabulary)
        self._where = f"{export.folder.uri}: {tower.file}"
        self._tables = _tables(export, tower, asked)
        self._run = load_program(export.file(tower.file))
        # In a thread that computes by torch, OpenMP has as many threads as torch; those that search keep FAISS's.
        self._thread = ThreadPoolExecutor(1, "histories")
        self._check(export.manifest.item, examples[0])

    def met(self, user: GivenId | None, history: History) -> Met | str:
        """Returns what the tower is told of a user; else why that is not enough, for who asked.

        Args:
            user: who has no vector.
            history: what they met.
        """
        if self.why_none:
            return self.why_none
        lists = self._tower.lists
        if not isinstance(history, Mapping):
            if len(lists) > 1:
                return (
                    f"the user tower reads several lists of items, {', '.join(lists)}. Say which they are: "
                    f'"history": {{"{lists[0]}": [...]}}'
                )
            history = {lists[0]: history}
        for name in history:
            if name not in lists:
                return f"'{name}' in 'history' is no list of items that the user tower reads; it reads {', '.join(lists)}"
        row = None
        if user is not None and self._tower.user is not None and self._find_user is not None:
            found = self._find_user(user)
            row = found if found >= 0 else None
        if lacking := self._tower.lacks(row):
            return _more_than_a_history(lacking)
        rows = {name: self._tower.rows(name, ids, self._find_item) for name, ids in history.items()}
        return Met({name: self._tower.cut(name, of_list) for name, of_list in rows.items()}, row)

    def vectors(self, met: Sequence[Met]) -> FloatArray:
        """Returns the vectors of users, (B, D). Those whose lists are about as long are padded together."""
        return self._thread.submit(self._vectors, met).result()

    def _vectors(self, met: Sequence[Met]) -> FloatArray:
        longest = np.array([max((len(rows) for rows in one.lists.values()), default=0) for one in met], dtype=np.int64)
        order = np.argsort(-longest, kind="stable")
        made, first = [], 0
        while first < len(order):
            together = order[first : first + max(1, _MOST_PLACES // max(1, int(longest[order[first]])))]
            made.append(self._tower.encode(self._run, [met[number] for number in together.tolist()], self._look_up))
            first += len(together)
        vectors = np.concatenate(made)
        found = np.empty_like(vectors)
        found[order] = vectors
        return found

    def _look_up(self, table: str, rows: IntArray) -> FloatArray:
        return self._tables[table].of(rows)

    def _check(self, items: ExportedTower, example: Met) -> None:
        """Has the program make two vectors, so that one that cannot is known before anyone asks."""
        try:
            shape = self.vectors([example, example]).shape
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"{self._where} does not run: {type(error).__name__}: {reason}. {_AGAIN}") from error
        if shape != (2, items.dim):
            raise ExportError(
                f"{self._where} makes vectors of {shape[-1]} numbers, and those of items have {items.dim}. {_AGAIN}"
            )


def items_of(history: History) -> tuple[GivenId, ...]:
    """Returns the ids of all items of a history."""
    return tuple(id_ for ids in history.values() for id_ in ids) if isinstance(history, Mapping) else history


class _Rows:
    """Rows of a table in memory: all of them, read a row group at a time, or some."""

    def __init__(self, export: OpenExport, table: str, wanted: IntArray | None) -> None:
        described = export.manifest.tables[table]
        place = export.file(described.file)
        if wanted is not None:
            self._rows = np.unique(wanted)
            self._vectors, is_there = vectors_of(place, self._rows)
            self._rows, self._vectors = self._rows[is_there], self._vectors[is_there]
        else:
            self._rows = rows_of(place)
            self._vectors = np.empty((len(self._rows), described.dim), dtype=np.float32)
            first = 0
            for block in vector_blocks(place):
                self._vectors[first : first + len(block)] = block
                first += len(block)
            if (np.diff(self._rows) < 0).any():
                order = np.argsort(self._rows)
                self._rows, self._vectors = self._rows[order], self._vectors[order]
        self._name = f"{export.folder.uri}: {described.file}"

    def of(self, rows: IntArray) -> FloatArray:
        """Returns the vectors of rows, (N, D)."""
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        is_there = self._rows[at] == rows
        if not is_there.all():
            raise ExportError(f"{self._name} has no row {int(rows[~is_there][0])}. {_AGAIN}")
        return self._vectors[at]


def _without_vector(export: OpenExport, spec: ProgramInput, users: IntArray) -> IntArray:
    """Returns the rows, but the one for unknown ids, of users who have none: they can be asked for with a history."""
    if spec.pair is not None:
        return np.setdiff1d(np.arange(spec.pair["num_ids"], dtype=np.int64), users)
    assert spec.table is not None, "an id is looked up"
    rows = rows_of(export.file(export.manifest.tables[spec.table].file))
    return np.setdiff1d(rows[rows != spec.unknown_row], users)


def _tables(export: OpenExport, tower: UserTower, users: IntArray) -> dict[str, _Rows]:
    """Returns what a program may look up for users without a vector, by table."""
    wanted: dict[str, list[IntArray] | None] = {}
    for spec in tower.inputs:
        if spec.table is None:
            continue
        if spec.feature in tower.lists:
            wanted[spec.table] = None
        elif spec.config["kind"] == "id":
            of_none = np.array([row for row in [tower.row_of_none(tower.specs[spec.feature])] if row >= 0], dtype=np.int64)
            ids = np.union1d(users, of_none) if spec.feature == tower.user else of_none
            if spec.pair is not None:
                ids, _ = Composition(**spec.pair).rows_of(ids)
            rows = wanted.setdefault(spec.table, [])
            if rows is not None:
                rows.append(ids)
    return {table: _Rows(export, table, None if rows is None else np.concatenate(rows)) for table, rows in wanted.items()}


def _more_than_a_history(lacking: str) -> str:
    return (
        f"the user tower reads more than a history: {lacking}. Who has no vector has no value for it: ask for a user of the "
        f"data, or train with a value for who has none"
    )
