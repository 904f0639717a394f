"""Nearest neighbours of an id among a table's vectors, read from a checkpoint a file at a time, or an export's items.

No data are read, and no model is made.
"""

from __future__ import annotations

__all__ = ["Neighbour", "Similar", "show", "similar_here", "similar_in_export", "similar_to", "vectors_here"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard.config import Config
from embedshard.config.parts import WordNgramsVocabulary
from embedshard.data.vocabulary import HeldIds
from embedshard.errors import ConfigError, DataError, ExportError
from embedshard.evaluate.jagged import JaggedIds
from embedshard.export.ids import Id, read_metadata, row_of
from embedshard.export.index import load_index, look_up
from embedshard.export.manifest import is_export, open_export
from embedshard.export.read import ids_at, rows_of, vector_blocks, vectors_of
from embedshard.export.unseen import kept_vocabulary_of
from embedshard.export.vectors import unit_vectors
from embedshard.launch.recommend import shown
from embedshard.launch.run_tables import check_holds, ids_in, open_checkpoint_of, table_of
from embedshard.storage import PathOrUri, locate, reaching
from embedshard.train.checkpoint_reader import Checkpoint
from embedshard.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Neighbour:
    """A row near another.

    Attributes:
        id: as in the data; None where the vocabulary does not keep it.
        row: of the table.
        cosine: of the two vectors.
        metadata: what is known of it beside.
    """

    id: Id
    row: int
    cosine: float
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Similar:
    """What was found.

    Attributes:
        table: whose vectors were compared.
        step: of the checkpoint.
        query: the row that was asked for, with its metadata.
        neighbours: the nearest first.
    """

    table: str
    step: int
    query: Neighbour
    neighbours: tuple[Neighbour, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        each = [
            {"id": near.id, "row": near.row, "cosine": near.cosine, **({"metadata": near.metadata} if near.metadata else {})}
            for near in self.neighbours
        ]
        query = {"id": self.query.id, "row": self.query.row}
        return {"table": self.table, "step": self.step, "query": query, "neighbours": each}


def similar_to(
    place: PathOrUri,
    id_: str,
    count: int,
    environment: Mapping[str, str],
    *,
    table: str | None = None,
    metadata: str | None = None,
    checkpoint_step: int | None = None,
) -> Similar:
    """Returns what is nearest to an id in a run's folder, or in an export: see `similar_here` and `similar_in_export`."""
    folder = locate(place)
    with reaching(folder):
        is_of_export = is_export(folder)
    if not is_of_export:
        return similar_here(place, id_, count, environment, table=table, metadata=metadata, checkpoint_step=checkpoint_step)
    if table is not None or checkpoint_step is not None:
        option = "--table" if table is not None else "--checkpoint"
        raise ConfigError(f"{option} was given, and {folder.uri} is an export, of its items. Leave it out, or name the run.")
    return similar_in_export(place, id_, count, metadata)


def similar_in_export(out: PathOrUri, id_: str, count: int, metadata: str | None = None) -> Similar:
    """Returns the items of an export whose vectors have the greatest cosine with an item's.

    The index is asked where its scores are cosines; else all vectors are read, a row group at a time. Every file that is
    read is compared with its SHA-256 first.

    Args:
        out: the export's folder.
        id_: as it is typed.
        count: how many at most.
        metadata: a Parquet file with the items' ids in the column of the data, or its first, and more in others.

    Raises:
        ExportError: if there is no export, it has no items, or a file is another than was written.
        DataError: if the item is not known or has no vector.
    """
    export = open_export(out)
    items, index = export.manifest.item, export.manifest.index
    if items is None or index is None:
        why = " ".join(export.manifest.notes) or "It has no vectors of items."
        raise ExportError(f"{export.folder.uri} has no items that could be near. {why}")
    with reaching(export.folder):
        row = row_of(id_, items.table, kept_vocabulary_of(export, items.table, items.vocabulary))
        file = export.file(items.file)
        rows = rows_of(file)
        own = np.flatnonzero(rows == row)
        query, _ = vectors_of(file, np.array([row], dtype=np.int64))
        if not len(own) or not query.any():
            raise DataError(
                f"'{id_}' has no vector, or one of zeros, so it is near nothing. The export has {items.vectors:,} items."
            )
        if items.is_unit:
            itself = JaggedIds.from_pairs(np.zeros(len(own), dtype=np.int64), own, 1)
            found, scores = look_up(load_index(export.file(index.file)), query, count, itself)
            places, cosines = found[0][found[0] >= 0], scores[0]
        else:
            unit = unit_vectors(query)[0]
            cosines = np.concatenate([_cosines_of(block, unit) for block in vector_blocks(file)])
            cosines[own] = -np.inf
            places = np.lexsort((rows, -cosines))[:count]
            places = places[np.isfinite(cosines[places])]
            cosines = cosines[places]
        ids, numbers = ids_at(file, np.concatenate([own, places]))
    known = {} if metadata is None else read_metadata(metadata, items.columns, items.table, ids)
    near = [
        Neighbour(of_row, int(number), float(cosine), known.get(of_row, {}))
        for of_row, number, cosine in zip(ids, numbers, [1.0, *cosines.tolist()], strict=False)
    ]
    return Similar(items.table, export.manifest.step, near[0], tuple(near[1:]))


def similar_here(
    run_dir: PathOrUri,
    id_: str,
    count: int,
    environment: Mapping[str, str],
    *,
    table: str | None = None,
    metadata: str | None = None,
    checkpoint_step: int | None = None,
) -> Similar:
    """Returns the rows whose vectors have the greatest cosine with an id's.

    The row for unknown ids, and rows that are all zeros, are nobody's neighbours.

    Args:
        run_dir: the run's folder.
        id_: as it is typed: an integer is one where the vocabulary holds integers.
        count: how many at most.
        environment: gives configs their `${VAR}`.
        table: its name, a derived one such as `words:context` too; None takes the model's.
        metadata: a Parquet file with the ids in the feature's column, or its first, and more in others.
        checkpoint_step: None takes the one that the run selected, else the newest.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    config = run.load_config(environment).config
    table, owner, vocabulary = table_of(run, config, table)
    own = config.tables[owner].vocabulary
    if isinstance(own, WordNgramsVocabulary):
        raise ConfigError(
            f"table '{owner}' has the vocabulary 'word_ngrams': a run of words looks up the row of its hash, which other "
            f"runs share, so no row is one run's and no neighbour has a name. Compare words: --table {own.of}."
        )
    checkpoint = open_checkpoint_of(run, checkpoint_step)
    vocabulary = ids_in(checkpoint, owner, vocabulary)
    row = row_of(id_, owner, vocabulary)
    cosines = _cosines(checkpoint, f"tables/{table}/weight", row, id_)
    cosines[[row, vocabulary.rows]] = -np.inf
    if isinstance(vocabulary, HeldIds):
        cosines[: vocabulary.rows][~vocabulary.is_held] = -np.inf
    best = np.argpartition(-cosines, min(count, len(cosines) - 1))[:count]
    best = best[np.lexsort((best, -cosines[best]))]
    best = best[np.isfinite(cosines[best])].astype(np.int64, copy=False)
    rows = np.concatenate([np.array([row], dtype=np.int64), best])
    ids = vocabulary.ids_of(rows)
    known = {} if metadata is None else read_metadata(metadata, _id_columns(config, owner), owner, ids)
    found = [
        Neighbour(id_of_row, int(number), 1.0 if place == 0 else float(cosines[number]), known.get(id_of_row, {}))
        for place, (id_of_row, number) in enumerate(zip(ids, rows, strict=True))
    ]
    return Similar(table, checkpoint.step, found[0], tuple(found[1:]))


def vectors_here(
    run_dir: PathOrUri,
    environment: Mapping[str, str],
    *,
    table: str | None = None,
    checkpoint_step: int | None = None,
) -> tuple[list[Id], npt.NDArray[np.float32]]:
    """Returns the ids of a table, in row order, and their vectors, (rows, dim). It is held in memory whole.

    Args:
        run_dir: the run's folder.
        environment: gives configs their `${VAR}`.
        table: its name, a derived one such as `words:context` too; None takes the model's.
        checkpoint_step: None takes the one that the run selected, else the newest.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    table, owner, vocabulary = table_of(run, run.load_config(environment).config, table)
    checkpoint, name = open_checkpoint_of(run, checkpoint_step), f"tables/{table}/weight"
    check_holds(checkpoint, name)
    vocabulary = ids_in(checkpoint, owner, vocabulary)
    vectors = np.empty((vocabulary.rows, checkpoint.tensors[name].shape[1]), dtype=np.float32)
    for (first, column), block in checkpoint.blocks(name):
        values = block[: max(vocabulary.rows - first, 0)].float().numpy()  # the row for unknown ids is nobody's
        vectors[first : first + len(values), column : column + values.shape[1]] = values
    return vocabulary.ids_of(np.arange(vocabulary.rows, dtype=np.int64)), vectors


def show(found: Similar, console: Console) -> None:
    """Prints the neighbours as a table."""
    known = "; ".join(map(shown, found.query.metadata.values()))
    title = f"Nearest to {_named(found.query)}{known and f' ({known})'} in table '{found.table}', step {found.step}"
    columns = list(dict.fromkeys(name for near in (found.query, *found.neighbours) for name in near.metadata))
    console.print(title, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("id")
    table.add_column("cosine", justify="right")
    for name in columns:
        table.add_column(escape(name))
    for near in found.neighbours:
        cells = [shown(near.metadata.get(name, "")) for name in columns]
        table.add_row(escape(_named(near)), f"{near.cosine:.4f}", *map(escape, cells))
    console.print(table)


def _cosines_of(vectors: npt.NDArray[np.float32], unit: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the cosine of each vector with one of length 1, -inf for one of zeros."""
    return np.where(vectors.any(axis=1), unit_vectors(vectors) @ unit, -np.inf).astype(np.float32)


def _named(near: Neighbour) -> str:
    return f"row {near.row}" if near.id is None else str(near.id)


def _cosines(checkpoint: Checkpoint, name: str, row: int, id_: str) -> npt.NDArray[np.float32]:
    """Returns the cosine of every row with one, -inf for a row of zeros. One file of the checkpoint is held at a time."""
    check_holds(checkpoint, name)
    spec = checkpoint.tensors[name]
    query = torch.empty(1, spec.shape[1], dtype=spec.dtype)
    checkpoint.read_into([(name, (row, 0), query)])
    query_D = query[0].float()
    length = float(query_D.norm())
    if not length:
        raise DataError(f"the vector of '{id_}' is all zeros, so it is near nothing: it was never trained.")
    products, squares = torch.zeros(spec.shape[0]), torch.zeros(spec.shape[0])
    for (first, column), block in checkpoint.blocks(name):
        rows, columns = slice(first, first + len(block)), slice(column, column + block.shape[1])
        values = block.float()
        products[rows] += values @ query_D[columns]
        squares[rows] += torch.linalg.vector_norm(values, dim=1).square_()
    cosines = torch.where(squares > 0, products / (squares.sqrt() * length), -torch.inf)
    return cosines.numpy()


def _id_columns(config: Config, table: str) -> list[str]:
    of_table = {name: feature for name, feature in config.features.items() if getattr(feature, "table", None) == table}
    return [feature.column or name for name, feature in of_table.items()]
