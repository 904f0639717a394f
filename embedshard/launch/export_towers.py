"""The towers' vectors in an export, by the model over the data or by programs over tables alone, and the index of items."""

from __future__ import annotations

__all__ = ["Towers", "met_in", "split_of", "write_held", "write_near", "write_towers"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import Config
from embedshard.config.parts import ItemEmbeddingConfig, ManagedVocabulary
from embedshard.data.columns import good_rows
from embedshard.data.dataset import open_dataset
from embedshard.errors import DataError
from embedshard.evaluate.held_out import SPLITS, Split
from embedshard.export.index import build_index, choose_kind, save_index
from embedshard.export.manifest import ExportedIndex, ExportedTable, ExportedTower
from embedshard.export.parts import kept_vocabulary
from embedshard.export.quantised import QUANTISED, Format, write_quantised
from embedshard.export.read import spread_vectors, vector_blocks
from embedshard.export.towers import (
    tower_features,
    write_held_vectors,
    write_items,
    write_near_items,
    write_seen,
    write_users,
)
from embedshard.export.verification import Verification
from embedshard.launch.export_programs import WrittenPrograms
from embedshard.storage import Location
from embedshard.train.assembly import Assembly
from embedshard.world import open_world

IntArray = npt.NDArray[np.int64]

_TUNING_QUERIES, _LEAST_K = 256, 10


@dataclass
class Towers:
    """What came of the towers."""

    user: ExportedTower | None = None
    item: ExportedTower | None = None
    seen: str | None = None
    index: ExportedIndex | None = None
    quantised: dict[Format, str] = field(default_factory=dict)
    verification: Verification | None = None
    notes: list[str] = field(default_factory=list)


def split_of(parts: Assembly) -> Split | None:
    """Returns the held-out set that is looked at: the test set, else the validation set, if there is one."""
    return next((split for split in reversed(SPLITS) if parts.evaluator.has(split)), None)


@torch.no_grad()
def write_towers(
    parts: Assembly, folder: Location, files: Mapping[str, str], index: str, say: Callable[[str], None]
) -> Towers:
    """Writes what a model makes of all users and items, and all that is made of these. Collective.

    Args:
        parts: with the model of a checkpoint.
        folder: of the export.
        files: of vocabularies in the export, by table.
        index: `auto` or a kind.
        say: is told what is being done.
    """
    model, sets = parts.model.module, parts.evaluator.sets
    parts.model.eval()
    say("items")
    items = folder.join("items.parquet")
    num_items, dim = write_items(parts, model, items)
    written = Towers(item=_tower(parts.config, files, "items.parquet", sets.item_id, num_items, dim))
    num_users = 0
    if parts.config.identity("user_id") is None:
        written.notes.append("There are no vectors of users: no feature names them. Lists are made of a history of items.")
    else:
        say("users")
        num_users, _ = write_users(parts, model, folder.join("users.parquet"))
        written.user = _tower(parts.config, files, "users.parquet", sets.user_id, num_users, dim)
        if parts.config.evaluate.filter_seen:
            say("items that users have met")
            written.seen = "seen.parquet"
            write_seen(parts, split_of(parts), folder.join(written.seen))
    _index_items(written, folder, num_users, index, say)
    if split_of(parts) is None:
        written.notes.append("Nothing was replayed: the run has neither a validation nor a test set.")
    return written


def write_held(
    config: Config,
    folder: Location,
    files: Mapping[str, str],
    tables: Mapping[str, ExportedTable],
    scoring: WrittenPrograms,
    changes_hands: str,
    index: str,
    say: Callable[[str], None],
    met_users: Callable[[str], IntArray],
) -> Towers:
    """Writes the vectors of ids that have a row now, by programs over the exported tables, and the index of items.

    That is what the model makes of these ids. Where rows change hands no metric ranks by them, so no held-out set is opened.

    Args:
        config: the run's.
        folder: of the export.
        files: of vocabularies in the export, by table.
        tables: that are exported.
        scoring: the programs.
        changes_hands: a table of users or items whose rows do.
        index: `auto` or a kind.
        say: is told what is being done.
        met_users: returns the rows of the users that the training data have, given the feature that names them; asked where
            these do not change hands.
    """
    why = f"the rows of table '{changes_hands}' change hands, and nothing ranks by them."
    written = Towers(notes=[f"Nothing was replayed, nor is it known what users have met: {why}"])
    for side, read in zip(("item", "user"), reversed(tower_features(config)), strict=True):
        program, identity = scoring.programs.get(side), config.identity(f"{side}_id")
        if others := ", ".join(name for name in read if name != identity):
            written.notes.append(f"There are no vectors of {side}s: their tower reads {others}, which no id alone tells.")
            continue
        assert identity is not None, "the tower reads it"
        table = config.features[identity].table  # type: ignore[union-attr]  # checked: an id
        if program is None:
            written.notes.append(
                f"There are no vectors of {side}s: the program '{side}', which would make them, is missing."
            )
            continue
        is_managed = isinstance(config.tables[table].vocabulary, ManagedVocabulary)
        if not tables[table].has_ids:
            none = (
                "the rows of table '{}' have no ids."
                if not is_managed
                else ("no id holds a row of table '{}' at this step: its vocabulary has admitted none, or has let all go.")
            )
            written.notes.append(f"There are no vectors of {side}s: {none.format(table)}")
            continue
        say(f"{side}s")
        try:
            met = met_users(identity) if side == "user" and not is_managed else None
        except DataError as error:
            written.notes.append(f"There are no vectors of {side}s, of whom the data tell which there are: {error}")
            continue
        file = f"{side}s.parquet"
        count, dim = write_held_vectors(program, identity, tables, folder, folder.join(file), met)
        tower = _tower(config, files, file, identity, count, dim)
        written.user, written.item = (tower, written.item) if side == "user" else (written.user, tower)
    if written.item is not None:
        _index_items(written, folder, 0 if written.user is None else written.user.vectors, index, say)
    return written


def write_near(
    config: Config,
    folder: Location,
    files: Mapping[str, str],
    tables: Mapping[str, ExportedTable],
    unknown_row: int,
    index: str,
    say: Callable[[str], None],
) -> Towers:
    """Writes the vectors of an item embedding's items, and the index by which the nearest are found.

    Args:
        config: the run's, whose model is an item embedding.
        folder: of the export.
        files: of vocabularies in the export, by table.
        tables: that are exported.
        unknown_row: of the items' table.
        index: `auto` or a kind.
        say: is told what is being done.
    """
    assert isinstance(config.model, ItemEmbeddingConfig), "the caller looked"
    feature = config.model.sequence
    table = config.features[feature].table  # type: ignore[union-attr]  # checked: a list
    written = Towers(
        notes=["There are no users in an item_embedding: what it is for are the nearest items: embedshard similar OUT ID."]
    )
    if config.tables[table].composition is not None:
        written.notes.append(f"There are no vectors of items: one is the sum of two rows of table '{table}'.")
        return written
    say("items")
    file = folder.join("items.parquet")
    count, dim, zeros = write_near_items(folder.join(*tables[table].file.split("/")), unknown_row, file)
    if zeros:
        written.notes.append(f"{zeros:,} rows of table '{table}' are all zeros, near nothing, and have no vector.")
    if not count:
        file.delete_file()
        written.notes.append(f"There are no vectors of items: table '{table}' has no row that an id holds.")
        return written
    written.item = _tower(config, files, "items.parquet", feature, count, dim, [feature], is_unit=True)
    _index_items(written, folder, 0, index, say)
    return written


def met_in(
    config: Config, device: str, resolved: Mapping[str, Any] | None, vocabularies: Location, feature: str
) -> IntArray:
    """Returns the rows of the ids of a feature that the training data have, ascending.

    Args:
        config: the run's.
        device: of the world that is opened.
        resolved: what the run has kept of its data.
        vocabularies: the folder of those that the run has counted.
        feature: of one id a row.

    Raises:
        DataError: if the data have changed, or cannot be read.
    """
    found = np.zeros(0, dtype=np.int64)
    with open_world(device) as world:
        for source in open_dataset(config, world, resolved, folder=vocabularies).known:
            narrowed = source.narrowed([feature])
            for group in range(len(narrowed.inventory.row_groups)):
                found = np.union1d(found, good_rows(narrowed.read_row_group(group))[feature].values)
    return found[found >= 0]


def _index_items(written: Towers, folder: Location, num_users: int, index: str, say: Callable[[str], None]) -> None:
    """Writes the index of the items' vectors, and these in fewer bits."""
    tower, items = written.item, folder.join("items.parquet")
    assert tower is not None, "items are written"
    say("index")
    kind = choose_kind(index, tower.vectors)
    queries = spread_vectors(folder.join("users.parquet" if num_users else "items.parquet"), _TUNING_QUERIES)
    built, settings = build_index(kind, lambda: vector_blocks(items), tower.vectors, tower.dim, queries, _LEAST_K)
    save_index(built, folder.join("items.faiss"))
    written.index = ExportedIndex(file="items.faiss", kind=kind, settings=settings)
    say("items in fewer bits")
    for name in QUANTISED if tower.vectors else ():
        file = f"items-{name}.parquet"
        write_quantised(name, items, folder.join(file))
        written.quantised[name] = file


def _tower(
    config: Config,
    files: Mapping[str, str],
    file: str,
    feature: str,
    count: int,
    dim: int,
    read: list[str] | None = None,
    is_unit: bool = False,
) -> ExportedTower:
    """Returns what the manifest tells of vectors; what is read is the tower's where it is not given."""
    table = config.features[feature].table  # type: ignore[union-attr]  # checked: an id
    of_table = {name: one for name, one in config.features.items() if getattr(one, "table", None) == table}
    names = [feature, *(name for name in of_table if name != feature)]
    if read is None:
        of_user, of_item = tower_features(config)
        read = of_user if file == "users.parquet" else of_item
    return ExportedTower(
        file=file, vectors=count, dim=dim, feature=feature, columns=[of_table[name].column or name for name in names],
        table=table, vocabulary=kept_vocabulary(config, table, files), features=read, is_unit=is_unit,
    )  # fmt: skip
