"""What the towers make of all items and of all users, batch by batch, and which items each user has met.

A user is represented by one row of the data: the first of the test set, which is also the one that the run's metrics look
at; for one who is not there, the first of the validation set; for all others, the last of the training set, in the order of
its files. Beside a batch, an integer or two a user are in memory.

Shapes: B rows of a batch, D dim.
"""

from __future__ import annotations

__all__ = [
    "has_towers",
    "tower_features",
    "write_held_vectors",
    "write_items",
    "write_near_items",
    "write_seen",
    "write_users",
]

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import nn

from embedshard.config import Config
from embedshard.config.parts import CustomModelConfig, SASRecConfig, TwoTowerConfig
from embedshard.data.columns import Columns, Flat, gather
from embedshard.evaluate.held_out import SPLITS, HeldOutSets, Split
from embedshard.export.join import join, table_vectors
from embedshard.export.manifest import ExportedTable
from embedshard.export.program_file import load_program
from embedshard.export.read import matrix
from embedshard.export.signature import ExportedProgram
from embedshard.export.vectors import id_array, id_type, unit_vectors, vector_file
from embedshard.storage import Location
from embedshard.train.assembly import Assembly

IntArray = npt.NDArray[np.int64]

_WAITING = 2**20


def has_towers(model: nn.Module) -> bool:
    """Whether a model makes a vector of a user and of an item, each by itself."""
    return all(callable(getattr(model, method, None)) for method in ("encode_queries", "encode_candidates"))


def tower_features(config: Config) -> tuple[list[str], list[str]]:
    """Returns what the model reads of a user and of an item, in order; of a model of one's own, all that are no item's."""
    model = config.model
    if isinstance(model, SASRecConfig):
        return [model.sequence], [model.item_id]
    if isinstance(model, CustomModelConfig):
        of_item = config.item_features()
        return [name for name in config.features if name not in of_item], of_item
    assert isinstance(model, TwoTowerConfig), "the caller looked"
    return list(model.user.features), list(model.item.features)


def write_items(parts: Assembly, model: Any, place: Location) -> tuple[int, int]:
    """Writes the vectors of the catalogue, in its order; returns how many there are, and D. Collective."""
    catalogue = parts.evaluator.sets.catalogue
    vocabulary = parts.dataset.vocabularies[_table(parts, parts.evaluator.sets.item_id)]
    kind, first, dim = id_type(vocabulary), 0, 0
    with vector_file(place) as write:
        for vectors in parts.evaluator.encoded(model.encode_candidates, catalogue.columns, len(catalogue)):
            rows = catalogue.ids[first : first + len(vectors)]
            first += write(id_array(vocabulary, rows, kind), rows, vectors.float().cpu().numpy())
            dim = vectors.shape[1]
    return first, dim


def write_users(parts: Assembly, model: Any, place: Location) -> tuple[int, int]:
    """Writes the vectors of all users that the data have; returns how many there are, and D. Collective."""
    sets = parts.evaluator.sets
    vocabulary = parts.dataset.vocabularies[_table(parts, sets.user_id)]
    kind, written, dim = id_type(vocabulary), 0, 0
    with vector_file(place) as write:
        for users, columns in _representatives(parts, sets):
            start = 0
            for vectors in parts.evaluator.encoded(model.encode_queries, columns, len(users)):
                rows = users[start : start + len(vectors)]
                start += write(id_array(vocabulary, rows, kind), rows, vectors.float().cpu().numpy())
                dim = vectors.shape[1]
            written += start
    return written, dim


def write_held_vectors(
    program: ExportedProgram,
    identity: str,
    tables: Mapping[str, ExportedTable],
    folder: Location,
    place: Location,
    met: IntArray | None = None,
) -> tuple[int, int]:
    """Writes what a tower that reads an id alone makes of the ids of its table, over the exported files; no data are read.

    Args:
        program: of the tower.
        identity: the id's feature.
        tables: that are exported.
        folder: of the export.
        place: the file that is written.
        met: rows of the ids that are written, ascending; None writes all.

    Returns:
        How many vectors there are, and D.
    """
    run = load_program(folder.join(*program.file.split("/")))
    of_files = table_vectors({name: folder.join(*table.file.split("/")) for name, table in tables.items()})
    owner = next(spec for spec in program.inputs if spec.table == spec.config["table"])
    assert owner.table is not None, "an id is looked up"
    written = dim = 0
    with vector_file(place) as write, folder.join(*tables[owner.table].file.split("/")).open_input() as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            content = parquet.read_row_group(group, columns=["id", "row"])
            content = content.filter(content["id"].is_valid()).combine_chunks()
            if met is not None:
                content = content.filter(pa.array(np.isin(content["row"].to_numpy(), met, assume_unique=True)))
            if not len(content):
                continue
            rows = content["row"].to_numpy()
            vectors = run(**join(program.inputs, {identity: Flat(rows)}, of_files))["vector"].numpy()
            written += write(content["id"].combine_chunks(), rows, vectors)
            dim = vectors.shape[1]
    return written, dim


def write_near_items(table: Location, unknown_row: int, place: Location) -> tuple[int, int, int]:
    """Writes the vectors of a table by their lengths, so that a product of two is a cosine; no data and no model are read.

    The row for unknown ids is left out, and so are rows of zeros, which are near nothing.

    Args:
        table: its exported file.
        unknown_row: that of unknown ids.
        place: the file that is written.

    Returns:
        How many vectors there are, D, and how many rows of zeros were left out.
    """
    written = dim = zeros = 0
    with vector_file(place) as write, table.open_input() as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            content = parquet.read_row_group(group)
            content = content.filter(pc.not_equal(content["row"], unknown_row))
            if not len(content):
                continue
            vectors = matrix(content["vector"])
            is_there = vectors.any(axis=1)
            zeros += int((~is_there).sum())
            if is_there.any():
                content = content.filter(pa.array(is_there)).combine_chunks()
                ids, rows = content["id"].combine_chunks(), content["row"].to_numpy()
                written += write(ids, rows, unit_vectors(vectors[is_there]))
                dim = vectors.shape[1]
    return written, dim, zeros


def write_seen(parts: Assembly, split: Split | None, place: Location) -> int:
    """Writes the pairs of a user and an item (rows) that have met, as they come; returns how many.

    They are those that the metrics of a set leave out: of the training set, for the test set of the validation set too.
    """
    schema = pa.schema({"user": pa.int64(), "item": pa.int64()})
    written = 0
    with place.filesystem.open_output_stream(place.path) as stream, pq.ParquetWriter(stream, schema) as writer:
        for users, items in parts.dataset.interactions(including_validation=split != "validation"):
            pairs = np.unique(np.stack([users, items]), axis=1)
            if pairs.shape[1]:
                writer.write_table(pa.table({"user": pairs[0], "item": pairs[1]}, schema))
                written += pairs.shape[1]
    return written


def _representatives(parts: Assembly, sets: HeldOutSets) -> Iterator[tuple[IntArray, Columns]]:
    """Yields users, and the row of the data that stands for each; each user once."""
    known = np.zeros(0, dtype=np.int64)
    for split in reversed(SPLITS):
        if not parts.evaluator.has(split):
            continue
        columns = sets.read(split)
        users = columns[sets.user_id].values
        asking = np.flatnonzero((users >= 0) & (columns[sets.item_id].values >= 0))
        met, first = np.unique(users[asking], return_index=True)
        is_new = ~np.isin(met, known, assume_unique=True)
        if is_new.any():
            yield met[is_new], gather(columns, asking[first[is_new]].astype(np.int64), None)
        known = np.union1d(known, met)
    names = list(dict.fromkeys([sets.user_id, *tower_features(parts.config)[0]]))
    yield from _of_training(parts, sets.user_id, names, known)


def _of_training(parts: Assembly, user_id: str, names: list[str], known: IntArray) -> Iterator[tuple[IntArray, Columns]]:
    """Yields the users of the training set that are not known, each with the last row."""
    sources = parts.dataset.known
    groups = [(source, group) for source in sources for group in range(len(source.inventory.row_groups))]
    users, numbers, rows = (np.zeros(0, dtype=np.int64) for _ in range(3))
    waiting: list[tuple[IntArray, IntArray, IntArray]] = []
    compacted = size = 0
    for number, (source, group) in enumerate(groups):
        values = source.narrowed([user_id]).read_row_group(group)[user_id].values
        met, from_end = np.unique(values[::-1], return_index=True)
        is_new = (met >= 0) & ~np.isin(met, known, assume_unique=True)
        met, last = met[is_new], len(values) - 1 - from_end[is_new]
        waiting.append((met, np.full(len(met), number, dtype=np.int64), last.astype(np.int64)))
        size += len(met)
        if size > 2 * compacted + _WAITING or number == len(groups) - 1:
            users, numbers, rows = map(np.concatenate, zip((users, numbers, rows), *waiting, strict=True))
            users, from_end = np.unique(users[::-1], return_index=True)
            newest = len(numbers) - 1 - from_end
            numbers, rows = numbers[newest], rows[newest]
            waiting, compacted, size = [], len(users), 0
    order = np.lexsort((rows, numbers))
    users, numbers, rows = users[order], numbers[order], rows[order]
    bounds = np.searchsorted(numbers, np.arange(len(groups) + 1))
    for number, (source, group) in enumerate(groups):
        span = slice(int(bounds[number]), int(bounds[number + 1]))
        if span.start < span.stop:
            columns = source.narrowed(names).read_row_group(group)
            yield users[span], gather(columns, rows[span], None)


def _table(parts: Assembly, feature: str) -> str:
    return parts.config.features[feature].table  # type: ignore[union-attr]  # checked: an id
