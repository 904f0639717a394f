"""Lists for users from an export alone: no run, no data, no model."""

from __future__ import annotations

__all__ = ["Recommendation", "Recommendations", "ranking_parts", "recommend", "tower_vocabulary"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedshard.config import Config
from embedshard.config.parts import TableConfig
from embedshard.data.vocabulary import Vocabulary, load_vocabularies
from embedshard.errors import DataError, ExportError
from embedshard.export.ids import Id, read_metadata, row_of
from embedshard.export.index import load_index, look_up
from embedshard.export.manifest import ExportedIndex, ExportedTower, OpenExport, open_export
from embedshard.export.read import ids_at, rows_of, seen_by, vectors_of
from embedshard.storage import PathOrUri, reaching


@dataclass(frozen=True)
class Recommendation:
    """An item of a list.

    Attributes:
        id: as in the data; None where the vocabulary does not keep it.
        row: of the item's table.
        score: the product of the two vectors.
        metadata: what is known of it beside.
    """

    id: Id
    row: int
    score: float
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recommendations:
    """A user's list.

    Attributes:
        user: as it was asked for.
        step: of the checkpoint that was exported.
        num_seen: items that the user has met, which are left out.
        items: the best first.
    """

    user: str
    step: int
    num_seen: int
    items: tuple[Recommendation, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        each = [
            {"id": one.id, "row": one.row, "score": one.score, **({"metadata": one.metadata} if one.metadata else {})}
            for one in self.items
        ]
        return {"user": self.user, "step": self.step, "seen": self.num_seen, "items": each}


def recommend(out: PathOrUri, user: str, count: int, metadata: str | None = None) -> Recommendations:
    """Returns the best items for a user, without those that the user has met.

    Every file that is read is compared with its SHA-256 first.

    Args:
        out: the export's folder.
        user: an id as it is typed.
        count: how many items at most.
        metadata: a Parquet file with the items' ids in the column of the data, or its first, and more in others.

    Raises:
        ExportError: if there is no export, it has no such vectors, or a file is another than was written.
        DataError: if the user is not known.
    """
    export = open_export(out)
    manifest = export.manifest
    user_tower, item_tower, its_index = ranking_parts(export)
    with reaching(export.folder):
        row = _row_of(export, user_tower, user)
        vectors, has_vector = vectors_of(export.file(user_tower.file), np.array([row], dtype=np.int64))
        if not has_vector[0]:
            raise DataError(
                f"user '{user}' was not in the data that the run was exported with, so the export has no vector of them. "
                f"It has those of {user_tower.vectors:,} users: name one of these, or export again when there are data."
            )
        items = export.file(item_tower.file)
        seen = None
        if manifest.seen is not None:
            seen = seen_by(export.file(manifest.seen), np.array([row], dtype=np.int64), rows_of(items))
        index = load_index(export.file(its_index.file))
        places, scores = look_up(index, vectors, count, seen)
        found = places[0][places[0] >= 0]
        ids, rows = ids_at(items, found)
    known = {} if metadata is None else read_metadata(metadata, item_tower.columns, item_tower.table, ids)
    return Recommendations(
        user,
        manifest.step,
        0 if seen is None else len(seen.values),
        tuple(
            Recommendation(id_, int(item_row), float(score), known.get(id_, {}))
            for id_, item_row, score in zip(ids, rows, scores[0], strict=False)
        ),
    )


def ranking_parts(export: OpenExport) -> tuple[ExportedTower, ExportedTower, ExportedIndex]:
    """Returns the users, the items and the index of an export.

    Raises:
        ExportError: if it lacks them; says why.
    """
    manifest = export.manifest
    if manifest.user is None or manifest.item is None or manifest.index is None:
        why = " ".join(manifest.notes) or "It has no vectors of users and items."
        raise ExportError(f"{export.folder.uri} can recommend nothing. {why}")
    return manifest.user, manifest.item, manifest.index


def tower_vocabulary(export: OpenExport, tower: ExportedTower) -> Vocabulary:
    """Returns how the ids of a tower become rows.

    Raises:
        ExportError: if its file is another than was written.
    """
    kept = dict(tower.vocabulary)
    file = kept.pop("file", None)
    counted = {}
    if file is not None:
        counted[tower.table] = export.file(file)
        if "path" in kept["vocabulary"]:
            kept["vocabulary"] = kept["vocabulary"] | {"path": counted[tower.table].uri}
    of_table: dict[str, Any] = {"tables": {tower.table: TableConfig.model_validate(kept)}}
    return load_vocabularies(Config.model_construct(**of_table), {}, counted)[tower.table]


def _row_of(export: OpenExport, tower: ExportedTower, user: str) -> int:
    try:
        return row_of(user, tower.table, tower_vocabulary(export, tower))
    except DataError as error:
        raise DataError(f"there is no vector of user '{user}': {error}") from error
