"""A vector for a user whom the data do not have, from the items that they met: the user's program over the tables' files."""

from __future__ import annotations

__all__ = ["Met", "Unseen", "UserTower", "kept_vocabulary_of", "unseen_user"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from embedshard.config import Config
from embedshard.config.parts import TableConfig
from embedshard.data.columns import Columns, Flat, Ragged, offsets_of
from embedshard.data.vocabulary import ManagedIds, Vocabulary, load_vocabularies
from embedshard.errors import DataError, ExportError
from embedshard.export.ids import row_of
from embedshard.export.join import Vectors, join, table_vectors
from embedshard.export.manifest import OpenExport
from embedshard.export.program_file import Program, load_program
from embedshard.export.signature import ProgramInput
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_NONE: Final = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Unseen:
    """What is known of a user.

    Attributes:
        vector: (1, D), what the user's program makes of them.
        items: rows of the items that they met, each once, also of those that are too long ago for the tower.
    """

    vector: FloatArray
    items: IntArray


@dataclass(frozen=True)
class Met:
    """What a user's tower is told of a user.

    Attributes:
        lists: by feature the rows of items, oldest first, as many as the tower reads; one that is not named is empty.
        user: row of the user's id; None where the vocabulary does not know it, or nobody is named.
    """

    lists: Mapping[str, IntArray]
    user: int | None = None


class UserTower:
    """What a user's program reads, and what it is given for users whom the data do not have. It holds no vectors.

    Args:
        export: that has a program of the user tower.

    Raises:
        ExportError: if it has none.

    Attributes:
        file: of the program.
        inputs: of the program.
        specs: of them what each feature is looked up as, by feature.
        lists: features that are lists of the items that are recommended.
        user: the feature that names the user, where the tower reads it.
        reads: what it reads, as a person is told.
    """

    def __init__(self, export: OpenExport) -> None:
        manifest = export.manifest
        program, items = manifest.programs.get("user"), manifest.item
        if program is None or items is None:
            why = " ".join(manifest.notes) or "It has no program of a user tower."
            raise ExportError(f"{export.folder.uri} makes no vectors of histories. {why}")
        self.file, self.inputs = program.file, program.inputs
        self.specs = {spec.feature: spec for spec in program.inputs if spec.kind != "lengths" and not _is_bias(spec)}
        kinds = {name: spec.config["kind"] for name, spec in self.specs.items()}
        self.lists = [
            name for name, spec in self.specs.items() if kinds[name] in ("bag", "sequence") and spec.table == items.table
        ]
        ids = [name for name, kind in kinds.items() if kind == "id"]
        named = ids[:1] if manifest.user is None else [name for name in ids if name == manifest.user.feature]
        self.user = named[0] if named else None
        self.reads = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())

    def lacks(self, user: int | None) -> str:
        """Returns what the tower reads and such a user has no value for, as a person is told; nothing if there is nothing.

        Args:
            user: row of the user's id, if it is known.
        """
        known = () if user is None else (self.user,)
        return "; ".join(
            _told(spec)
            for name, spec in self.specs.items()
            if name not in known and spec.config["kind"] in ("id", "dense") and not _has_value_for_none(spec)
        )

    def takes_unknown(self, name: str) -> bool:
        """Whether a list may hold items that its vocabulary does not know."""
        return _takes_unknown(self.specs[name])

    def rows(self, name: str, ids: Iterable[int | str], find: Callable[[int | str], int]) -> IntArray:
        """Returns the rows of a list of items as the data would have them, but uncut: padding is left out.

        Args:
            name: of the list.
            ids: of the items.
            find: returns an id's row, -1 where there is none: it is the row for unknown ids, or left out where the list
                takes none.
        """
        spec, rows = self.specs[name], []
        for id_ in ids:
            if spec.config["mask_zero"] and str(id_) == "0":
                continue
            row = find(id_)
            if row >= 0 or _takes_unknown(spec):
                rows.append(row if row >= 0 else _unknown(spec))
        return np.array(rows, dtype=np.int64)

    def cut(self, name: str, rows: IntArray) -> IntArray:
        """Returns what the tower reads of a list that may be too long for it."""
        most = self.specs[name].config["max_length"]
        if most is None:
            return rows
        return rows[:most] if self.specs[name].config["keep"] == "first" else rows[-most:]

    def row_of_none(self, spec: ProgramInput) -> int:
        """Returns the row of an id that nobody knows, -1 where such an id is none."""
        return _unknown(spec) if _takes_unknown(spec) else -1

    def encode(self, run: Program, met: Sequence[Met], vectors: Vectors) -> FloatArray:
        """Returns the vectors of users who lack nothing, (B, D). Their sequences are padded together.

        Args:
            run: the program.
            met: what is known of each.
            vectors: looks rows up.

        Raises:
            ExportError: if a table lacks a row.
        """
        return run(**join(self.inputs, self._columns(met), vectors))["vector"].numpy()

    def _columns(self, met: Sequence[Met]) -> Columns:
        columns: Columns = {}
        for name, spec in self.specs.items():
            kind = spec.config["kind"]
            if kind == "dense":
                columns[name] = Flat(np.full(len(met), np.nan))
            elif kind == "id":
                own = [one.user if name == self.user else None for one in met]
                none = self.row_of_none(spec)
                columns[name] = Flat(np.array([none if row is None else row for row in own], dtype=np.int64))
            else:  # the data may have empty lists too
                rows = [one.lists.get(name, _NONE) for one in met]
                lengths = np.array([len(one) for one in rows], dtype=np.int64)
                columns[name] = Ragged(np.concatenate([_NONE, *rows]), offsets_of(lengths))
        return columns


def unseen_user(export: OpenExport, history: str, user: str | None) -> Unseen:
    """Makes a user's vector of items. Every file that is read is compared with its SHA-256 first.

    Args:
        export: that has a program of the user tower.
        history: ids of items as they are typed, oldest first, with commas between them; before them, and a `=`, the list
            among the tower's features that they are, where it reads several.
        user: an id as it is typed, which is looked up where the tower reads it and its vocabulary knows it.

    Raises:
        ExportError: if the export has no such program, or a file is another than was written.
        DataError: if an item is not known, or the tower reads something that the data alone tell.
    """
    tower = UserTower(export)
    name, ids = _parsed(history, tower)
    items = tower.rows(name, ids, _finder(export, tower, name))
    met = Met({name: tower.cut(name, items)}, _user_row(export, tower, user))
    if lacking := tower.lacks(met.user):
        raise DataError(
            f"the user tower reads more than a history: {lacking}. An unseen user has no value for it. Name a "
            f"user of the data (--user), or train with a value for who has none."
        )
    tables = {spec.table: export.file(export.manifest.tables[spec.table].file) for spec in tower.inputs if spec.table}
    vector = tower.encode(load_program(export.file(tower.file)), [met], table_vectors(tables))
    return Unseen(vector, np.unique(items))


def kept_vocabulary_of(export: OpenExport, table: str, kept: Mapping[str, Any]) -> Vocabulary:
    """Returns a table's vocabulary, as the manifest keeps it; of a managed one, which id held which row.

    Raises:
        ExportError: if its file is another than was written.
    """
    tree = dict(kept)
    file = tree.pop("file", None)
    counted: dict[str, Location] = {}
    tokenizers: dict[str, str] = {}
    if file is not None:
        place = export.file(file)
        if "path" in tree["vocabulary"]:
            tree["vocabulary"] = tree["vocabulary"] | {"path": place.uri}
        if file.startswith("tokenizers/"):
            tokenizers[table] = place.read_text()
            tree["vocabulary"] = tree["vocabulary"] | {"path": None}
        else:
            counted[table] = place
    of_table: dict[str, Any] = {"tables": {table: TableConfig.model_validate(tree)}}
    vocabulary = load_vocabularies(Config.model_construct(**of_table), tokenizers, counted)[table]
    if not isinstance(vocabulary, ManagedIds):
        return vocabulary
    with export.file(export.manifest.tables[table].file).open_input() as stream:
        content = pq.read_table(stream, columns=["id", "row"])
    held = np.full(vocabulary.rows, -1, dtype=np.int64)
    content = content.filter(content["id"].is_valid())
    held[content["row"].to_numpy()] = content["id"].to_numpy()
    return vocabulary.held(held)


def _is_bias(spec: ProgramInput) -> bool:
    """Whether it is looked up by the ids of another input, which has the feature's vectors."""
    return spec.table is not None and spec.table != spec.config["table"]


def _parsed(history: str, tower: UserTower) -> tuple[str, list[str]]:
    """Returns the feature that the items are, and their ids."""
    lists = tower.lists
    if not lists:
        raise DataError(
            f"--history: the user tower reads no list of items, only {tower.reads}. Name a user of the data (--user)."
        )
    name, equals, ids = history.partition("=")
    if not equals or name not in lists:
        name, ids = lists[0], history
        if len(lists) > 1:
            raise DataError(
                f"--history: the user tower reads several lists of items, {', '.join(lists)}. Say which they are: "
                f"--history {lists[0]}={history}"
            )
    found = [id_.strip() for id_ in ids.split(",") if id_.strip()]
    if not found:
        raise DataError("--history names no item. Give ids with commas between them: --history 1,5,9")
    return name, found


def _finder(export: OpenExport, tower: UserTower, name: str) -> Callable[[int | str], int]:
    """Returns what finds the row of an item as it was typed; an unknown one is an error where the list takes none."""
    spec = tower.specs[name]
    assert spec.table is not None, "a list is looked up"
    assert spec.vocabulary is not None, "a list is looked up"
    table, vocabulary = spec.table, kept_vocabulary_of(export, spec.table, spec.vocabulary)

    def find(id_: int | str) -> int:
        try:
            return row_of(str(id_), table, vocabulary)
        except DataError as error:
            if not tower.takes_unknown(name):
                raise DataError(f"--history: {error}") from error
            return -1

    return find


def _user_row(export: OpenExport, tower: UserTower, user: str | None) -> int | None:
    """Returns the row of a user's id, None where the tower does not read it or it is unknown."""
    if user is None or tower.user is None:
        return None
    spec = tower.specs[tower.user]
    assert spec.table is not None, "an id is looked up"
    assert spec.vocabulary is not None, "an id is looked up"
    try:
        return row_of(user, spec.table, kept_vocabulary_of(export, spec.table, spec.vocabulary))
    except DataError:  # as one who has none
        return None


def _has_value_for_none(spec: ProgramInput) -> bool:
    """Whether the config has something for who has no value of it."""
    if spec.config["kind"] == "dense":
        return spec.config["missing"] == "zero"
    return _takes_unknown(spec) or spec.config["null"] == "empty"


def _takes_unknown(spec: ProgramInput) -> bool:
    """Whether a row is looked up for ids that the vocabulary does not know; a managed one knows them all."""
    assert spec.vocabulary is not None, "ids are looked up"
    return spec.config["unknown"] == "oov" or spec.vocabulary["vocabulary"]["kind"] == "managed"


def _unknown(spec: ProgramInput) -> int:
    unknown = spec.pair["num_ids"] if spec.pair is not None else spec.unknown_row
    assert unknown is not None, "each table has such a row"
    return unknown


def _told(spec: ProgramInput) -> str:
    asked = {"id": "`unknown: oov` or `null: empty`", "dense": "`missing: zero`"}.get(spec.config["kind"])
    with_value = f", for which the config has no {asked}" if asked else ""
    return f"'{spec.feature}' ({spec.config['kind']}{with_value})"
