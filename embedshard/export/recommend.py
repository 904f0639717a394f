"""Lists for users from an export alone: no run, no data, no model."""

from __future__ import annotations

__all__ = ["Recommendation", "Recommendations", "leaves_out_met", "ranking_parts", "recommend"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedshard.errors import ConfigError, DataError, ExportError
from embedshard.evaluate.jagged import JaggedIds
from embedshard.export.ids import Id, read_metadata, row_of
from embedshard.export.index import load_index, look_up
from embedshard.export.manifest import ExportedIndex, ExportedTower, Manifest, OpenExport, open_export
from embedshard.export.read import ids_at, rows_of, seen_by, vectors_of
from embedshard.export.unseen import UserTower, kept_vocabulary_of, unseen_user
from embedshard.storage import PathOrUri, reaching

FloatArray = npt.NDArray[np.float32]

_HISTORY: Final = "Or tell what items they met: --history 1,5,9"


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
        user: as it was asked for; None of a history alone.
        step: of the checkpoint that was exported.
        num_seen: items that the user has met, which are left out.
        items: the best first.
        history: as it was asked for, where the vector was made of it.
        asked: how many items were asked for.
        num_items: that the export has vectors of; a list is no longer.
    """

    user: str | None
    step: int
    num_seen: int
    items: tuple[Recommendation, ...]
    history: str | None
    asked: int
    num_items: int

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        each = [
            {"id": one.id, "row": one.row, "score": one.score, **({"metadata": one.metadata} if one.metadata else {})}
            for one in self.items
        ]
        asked = {"user": self.user} | ({} if self.history is None else {"history": self.history})
        return {**asked, "step": self.step, "seen": self.num_seen, "items": each}


def recommend(
    out: PathOrUri, user: str | None, count: int, metadata: str | None = None, history: str | None = None
) -> Recommendations:
    """Returns the best items for a user, without those that the user has met.

    Every file that is read is compared with its SHA-256 first.

    Args:
        out: the export's folder.
        user: an id as it is typed; None where a history is given.
        count: how many items at most; no more than there are.
        metadata: a Parquet file with the items' ids in the column of the data, or its first, and more in others.
        history: ids of items that the user has met, as `unseen_user` takes them: they count instead of what the data have.

    Raises:
        ExportError: if there is no export, it has no such vectors, or a file is another than was written.
        DataError: if the user is not known, or has no vector without the data.
        ConfigError: if neither a user nor a history is given.
    """
    if user is None and history is None:
        raise ConfigError("neither a user nor a history is given. Give --user 42, or --history 1,5,9")
    export = open_export(out)
    manifest = export.manifest
    if manifest.item is None or manifest.index is None or (manifest.user is None and history is None):
        why = " ".join(manifest.notes) or "It has no vectors of users and items."
        raise ExportError(f"{export.folder.uri} can recommend nothing. {why}")
    with reaching(export.folder):
        items = export.file(manifest.item.file)
        if history is not None:
            unseen = unseen_user(export, history, user)
            vectors, row = unseen.vector, _row_if_known(export, manifest.user, user)
        else:
            assert manifest.user is not None, "looked at above"
            assert user is not None, "looked at above"
            row, vectors = _seen_user(export, manifest.user, user)
        seen = None
        if manifest.seen is not None:
            seen = seen_by(export.file(manifest.seen), np.array([row], dtype=np.int64), rows_of(items))
        if history is not None and leaves_out_met(manifest):
            met = np.flatnonzero(np.isin(rows_of(items), unseen.items))
            met = met if seen is None else np.union1d(seen.values, met)
            seen = JaggedIds.from_pairs(np.zeros(len(met), dtype=np.int64), met, 1)
        index = load_index(export.file(manifest.index.file))
        places, scores = look_up(index, vectors, count, seen)
        found = places[0][places[0] >= 0]
        ids, rows = ids_at(items, found)
    known = {} if metadata is None else read_metadata(metadata, manifest.item.columns, manifest.item.table, ids)
    return Recommendations(
        user,
        manifest.step,
        0 if seen is None else len(seen.values),
        tuple(
            Recommendation(id_, int(item_row), float(score), known.get(id_, {}))
            for id_, item_row, score in zip(ids, rows, scores[0], strict=False)
        ),
        history,
        count,
        manifest.item.vectors,
    )


def ranking_parts(export: OpenExport) -> tuple[ExportedTower | None, ExportedTower, ExportedIndex]:
    """Returns the users, the items and the index of an export.

    There are no users where they are histories, which have a program, and where items alone are looked for, by items.

    Raises:
        ExportError: if it lacks them; says why.
    """
    manifest = export.manifest
    if (
        manifest.item is None
        or manifest.index is None
        or (manifest.user is None and not manifest.item.is_unit and not _encodes_histories(export))
    ):
        why = " ".join(manifest.notes) or "It has no vectors of users and items."
        raise ExportError(f"{export.folder.uri} can recommend nothing. {why}")
    return manifest.user, manifest.item, manifest.index


def leaves_out_met(manifest: Manifest) -> bool:
    """Whether a list is without what a user has met."""
    return bool(manifest.config.get("evaluate", {}).get("filter_seen", True))


def _encodes_histories(export: OpenExport) -> bool:
    if "user" not in export.manifest.programs:
        return False
    tower = UserTower(export)
    return bool(tower.lists) and (tower.user is not None or not tower.lacks(None))


def _seen_user(export: OpenExport, tower: ExportedTower, user: str) -> tuple[int, FloatArray]:
    """Returns the row and the vector, (1, D), of a user that the data have."""
    try:
        row = row_of(user, tower.table, kept_vocabulary_of(export, tower.table, tower.vocabulary))
    except DataError as error:
        raise DataError(f"there is no vector of user '{user}': {error} {_HISTORY}") from error
    vectors, has_vector = vectors_of(export.file(tower.file), np.array([row], dtype=np.int64))
    if not has_vector[0]:
        raise DataError(
            f"user '{user}' was not in the data that the run was exported with, so the export has no vector of them. "
            f"It has those of {tower.vectors:,} users: name one of these, or export again when there are data. {_HISTORY}"
        )
    return row, vectors


def _row_if_known(export: OpenExport, tower: ExportedTower | None, user: str | None) -> int:
    """Returns the row of a user; one that nobody has where there is none."""
    if tower is None or user is None:
        return -1
    try:
        return row_of(user, tower.table, kept_vocabulary_of(export, tower.table, tower.vocabulary))
    except DataError:
        return -1
