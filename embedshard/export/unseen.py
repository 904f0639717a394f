"""A vector for a user whom the data do not have, from the items that they met: the user's program over the tables' files."""

from __future__ import annotations

__all__ = ["Unseen", "kept_vocabulary_of", "unseen_user"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from embedshard.config import Config
from embedshard.config.parts import TableConfig
from embedshard.data.columns import Columns, Flat, Ragged
from embedshard.data.vocabulary import ManagedIds, Vocabulary, load_vocabularies
from embedshard.errors import DataError, ExportError
from embedshard.export.ids import row_of
from embedshard.export.join import join, table_vectors
from embedshard.export.manifest import ExportedTower, OpenExport
from embedshard.export.program_file import load_program
from embedshard.export.signature import ProgramInput

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unseen:
    """What is known of a user.

    Attributes:
        vector: (1, D), what the user's program makes of them.
        items: rows of the items that they met, each once.
    """

    vector: npt.NDArray[np.float32]
    items: IntArray


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
    manifest = export.manifest
    program, items = manifest.programs.get("user"), manifest.item
    if program is None or items is None:
        why = " ".join(manifest.notes) or "It has no program of a user tower."
        raise ExportError(f"{export.folder.uri} makes no vectors of histories. {why}")
    specs = {spec.feature: spec for spec in program.inputs if spec.kind != "lengths" and not _is_bias(spec)}
    name, ids = _parsed(history, _lists_of_items(specs, items), specs)
    met = _met(export, specs[name], ids)
    columns: Columns = {name: Ragged(met, np.array([0, len(met)], dtype=np.int64))}
    lacking = []
    for feature, spec in specs.items():
        if feature in columns:
            continue
        column = _default(export, spec, user if manifest.user is None or manifest.user.feature == feature else None)
        if column is None:
            lacking.append(_told(spec))
        else:
            columns[feature] = column
    if lacking:
        raise DataError(
            f"the user tower reads more than a history: {'; '.join(lacking)}. An unseen user has no value for it. Name a "
            f"user of the data (--user), or train with a value for who has none."
        )
    vectors = table_vectors(
        {spec.table: export.file(manifest.tables[spec.table].file) for spec in program.inputs if spec.table}
    )
    run = load_program(export.file(program.file))
    return Unseen(run(**join(program.inputs, columns, vectors))["vector"].numpy(), np.unique(met))


def kept_vocabulary_of(export: OpenExport, table: str, kept: Mapping[str, Any]) -> Vocabulary:
    """Returns a table's vocabulary, as the manifest keeps it; of a managed one, which id held which row.

    Raises:
        ExportError: if its file is another than was written.
    """
    tree = dict(kept)
    file = tree.pop("file", None)
    counted = {}
    if file is not None:
        counted[table] = export.file(file)
        if "path" in tree["vocabulary"]:
            tree["vocabulary"] = tree["vocabulary"] | {"path": counted[table].uri}
    of_table: dict[str, Any] = {"tables": {table: TableConfig.model_validate(tree)}}
    vocabulary = load_vocabularies(Config.model_construct(**of_table), {}, counted)[table]
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


def _lists_of_items(specs: Mapping[str, ProgramInput], items: ExportedTower) -> list[str]:
    return [name for name, spec in specs.items() if spec.config["kind"] in ("bag", "sequence") and spec.table == items.table]


def _parsed(history: str, lists: list[str], specs: Mapping[str, ProgramInput]) -> tuple[str, list[str]]:
    """Returns the feature that the items are, and their ids."""
    if not lists:
        read = ", ".join(f"'{name}' ({spec.config['kind']})" for name, spec in specs.items())
        raise DataError(f"--history: the user tower reads no list of items, only {read}. Name a user of the data (--user).")
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


def _met(export: OpenExport, spec: ProgramInput, ids: list[str]) -> IntArray:
    """Returns the rows of items as the data would have them: padding out, unknown ones as the config has it, then cut."""
    assert spec.table is not None, "a list is looked up"
    assert spec.vocabulary is not None, "a list is looked up"
    vocabulary = kept_vocabulary_of(export, spec.table, spec.vocabulary)
    rows = []
    for id_ in ids:
        if spec.config["mask_zero"] and id_ == "0":
            continue
        try:
            rows.append(row_of(id_, spec.table, vocabulary))
        except DataError as error:
            if not _takes_unknown(spec):
                raise DataError(f"--history: {error}") from error
            rows.append(_unknown(spec))
    most = spec.config["max_length"]
    if most is not None:
        rows = rows[:most] if spec.config["keep"] == "first" else rows[-most:]
    return np.array(rows, dtype=np.int64)


def _default(export: OpenExport, spec: ProgramInput, user: str | None) -> Flat | Ragged | None:
    """Returns what a feature is for who has no value, one row; None where the config has nothing for them."""
    config = spec.config
    if config["kind"] == "dense":
        return Flat(np.array([np.nan])) if config["missing"] == "zero" else None
    if config["kind"] != "id":
        return Ragged(np.zeros(0, dtype=np.int64), np.zeros(2, dtype=np.int64))  # the data may have an empty list too
    assert spec.table is not None, "an id is looked up"
    assert spec.vocabulary is not None, "an id is looked up"
    if user is not None:
        try:
            return Flat(np.array([row_of(user, spec.table, kept_vocabulary_of(export, spec.table, spec.vocabulary))]))
        except DataError:  # as one who has none
            pass
    if _takes_unknown(spec):
        return Flat(np.array([_unknown(spec)], dtype=np.int64))
    return Flat(np.array([-1], dtype=np.int64)) if config["null"] == "empty" else None


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
