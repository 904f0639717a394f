"""Answers questions from an export that is in memory whole: those of a batch together, with as few searches as that takes.

It knows nothing of HTTP or Ray. An answer does not depend on what else is in its batch.

Shapes: Q questions, U users, N items, D dim, K length of a list.
"""

from __future__ import annotations

__all__ = ["Answer", "Engine", "ItemList", "Lacking", "Question", "Recommend", "Score", "Scores", "Similar", "Unknown"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.columns import offsets_of
from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import ExportError
from embedshard.evaluate.jagged import JaggedIds
from embedshard.export.ids import Id, align_metadata, find_row
from embedshard.export.index import load_index, look_up
from embedshard.export.manifest import ExportedTower, OpenExport
from embedshard.export.read import rows_of, seen_by, vector_blocks
from embedshard.export.recommend import leaves_out_met, ranking_parts
from embedshard.export.unseen import Met, kept_vocabulary_of
from embedshard.serve.histories import GivenId, Histories, History, items_of
from embedshard.storage import reaching

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_MULTIPLIED = 3
_SHORT_LIST = 1024
"""Lists up to this length cost about the same."""
_NOWHERE = np.zeros(0, dtype=np.int64)
_NO_VECTOR = np.zeros(0, dtype=np.float32)
_ITEMS_ALONE = (
    "the export is of items alone, of which the nearest to an item are looked for: there are no users. Ask /similar with "
    '{"item": ID}'
)


@dataclass(frozen=True)
class Recommend:
    """The best items for a user, without those that the user has met.

    Attributes:
        user: None asks by the history alone.
        k: how many; no list is longer than there are items.
        exclude: items that the list may not hold.
        history: items that the user has met, oldest first: of them comes the vector of a user who has none. The list does
            not hold them.
    """

    user: GivenId | None
    k: int
    exclude: tuple[GivenId, ...] = ()
    history: History = ()


@dataclass(frozen=True)
class Similar:
    """The items whose vectors have the greatest cosine with an item's.

    Attributes:
        item: that they are near.
        k: how many.
        exclude: items that the list may not hold, beside the item itself.
    """

    item: GivenId
    k: int
    exclude: tuple[GivenId, ...] = ()


@dataclass(frozen=True)
class Score:
    """The scores of given items for a user, whether met or not.

    Attributes:
        user: whose.
        items: of which.
    """

    user: GivenId
    items: tuple[GivenId, ...]


Question = Recommend | Similar | Score


@dataclass(frozen=True)
class ItemList:
    """An answer to `Recommend` or `Similar`: the best item first.

    Attributes:
        ids: as in the data; None where the vocabulary does not keep it.
        rows: of the item's table.
        scores: the product of the two vectors; a cosine where items are compared.
        metadata: what is known of each item beside, where metadata were given.
        by: the vector that was looked up with: `user`, `history` or `item`.
        num_seen: items that the user has met, which are left out.
        unknown: given items that are none of the export's.
    """

    ids: list[Id]
    rows: list[int]
    scores: list[float]
    metadata: list[dict[str, Any]] | None
    by: str
    num_seen: int
    unknown: tuple[GivenId, ...]


@dataclass(frozen=True)
class Scores:
    """An answer to `Score`.

    Attributes:
        scores: in the order of the items; None for an unknown one.
    """

    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Unknown:
    """An answer where there is nothing to go by.

    Attributes:
        what: `user` or `item`.
        message: what was met, what was needed, what to do.
    """

    what: str
    message: str


@dataclass(frozen=True)
class Lacking:
    """An answer where a history is not enough, or not told so that the user's program can take it, or nobody has a vector.

    Attributes:
        message: what was met, what was needed, what to do.
    """

    message: str


Answer = ItemList | Scores | Unknown | Lacking


class Engine:
    """An export in memory: 4 bytes a number of each user's vector, 8 of each item's (4 of them in the index).

    Where the user's program makes vectors of histories, it is there too, and what it looks up (see `Histories`).

    Every file that is read is compared with its SHA-256 first.

    Args:
        export: with vectors of items, and of users or a program that makes them of histories; or of items that are near
            each other alone.
        metadata: a Parquet file with the items' ids in the column of the data, or its first, and more in others.

    Raises:
        ExportError: if it has no such vectors, or a file is another than was written.
        DataError: if the metadata cannot be read.
        StorageError: if a file cannot be read.

    Attributes:
        step: of the checkpoint that was exported.
        num_users, num_items: that have vectors.
    """

    def __init__(self, export: OpenExport, metadata: str | None = None) -> None:
        user, item, index = ranking_parts(export)
        self.step = export.manifest.step
        self.num_users, self.num_items = 0 if user is None else user.vectors, item.vectors
        self._leaves_out_met = leaves_out_met(export.manifest)
        with reaching(export.folder):
            self._users = None if user is None else _Places(export, user)
            self._items = _Places(export, item)
            self._user_vectors = np.zeros((0, item.dim), dtype=np.float32) if user is None else _vectors(export, user)
            self._unit_vectors = _vectors(export, item)
            self._index = load_index(export.file(index.file))
            seen, users = export.manifest.seen, _NOWHERE if self._users is None else self._users.rows
            self._seen = None if seen is None else seen_by(export.file(seen), users, self._items.rows)
            find_user = None if self._users is None else self._users.row
            self._histories = Histories(export, self._items.row, find_user, users)
            with export.file(item.file).open_input() as file:
                self._ids: pa.Array = pq.read_table(file, columns=["id"])["id"].combine_chunks()
        self._is_exact, self._has_items_alone = index.kind == "flat", user is None and item.is_unit
        # FAISS 1.15 multiplies matrices from so many numbers of queries on. Its own 128,000 are 400 queries of 320; 32 of
        # them took six times as long.
        faiss.cvar.distance_compute_blas_threshold = _MULTIPLIED * item.dim
        if self._index.ntotal != item.vectors or self._index.d != item.dim:
            raise ExportError(
                f"{export.folder.uri}: {index.file} holds {self._index.ntotal:,} vectors of {self._index.d}, "
                f"{item.file} {item.vectors:,} of {item.dim}. Export the run again."
            )
        self._lengths = np.linalg.norm(self._unit_vectors, axis=1)
        self._num_zero = int((self._lengths == 0).sum())  # near nothing: in nobody's list
        self._unit_vectors /= np.where(self._lengths > 0, self._lengths, 1)[:, None]
        self._metadata = None if metadata is None else align_metadata(metadata, item.columns, item.table, self._ids)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Returns an answer to each question, in their order."""
        answers: list[Answer | None] = [None] * len(questions)
        lookups: list[tuple[int, _Lookup]] = []
        for number, question in enumerate(questions):
            made = self._score(question) if isinstance(question, Score) else self._lookup(question)
            if isinstance(made, _Lookup):
                lookups.append((number, made))
            else:
                answers[number] = made
        self._encode_histories(lookups)
        for alike in self._searched_together([lookup for _, lookup in lookups]):
            found = self._look_up([lookups[at][1] for at in alike])
            for at, (places, scores) in zip(alike, found, strict=True):
                number, one = lookups[at]
                answers[number] = self._list(places, scores, one)
        return [answer for answer in answers if answer is not None]

    # ------------------------------------------------------------------------------------------------------ a question
    def _lookup(self, question: Recommend | Similar) -> _Lookup | Unknown | Lacking:
        excluded, unknown = self._items.of_all(question.exclude)
        k = min(question.k, self.num_items)
        if isinstance(question, Similar):
            place = self._items.of(question.item)
            if place < 0:
                return Unknown("item", f"item {question.item!r} is not among the export's {self.num_items:,} items.")
            if not self._lengths[place]:
                return Unknown("item", f"the vector of item {question.item!r} is all zeros, so it is near nothing.")
            left_out = np.union1d(excluded, np.array([place], dtype=np.int64))
            return _Lookup(self._unit_vectors[place], k, left_out, "item", 0, unknown)
        if self._has_items_alone:
            return Lacking(_ITEMS_ALONE)
        history = items_of(question.history)
        met, unknown_history = self._items.of_all(history)
        unknown += unknown_history
        place = self._user_place(question.user)
        if place >= 0 and self._seen is not None:
            met = np.union1d(met, self._seen.values[self._seen.offsets[place] : self._seen.offsets[place + 1]])
        met = met if self._leaves_out_met else _NOWHERE
        left_out = np.union1d(met, excluded)
        if place >= 0:
            return _Lookup(self._user_vectors[place], k, left_out, "user", len(met), unknown)
        if not history:
            more = "" if self._histories.why_none else ", or give items that the user has met as 'history'"
            return self._unknown_user(question.user, "", f"name one of these{more}.")
        told = self._histories.met(question.user, question.history)
        if isinstance(told, str):
            return Lacking(f"{_who(question.user)}, and {told}.")
        if not any(map(len, told.lists.values())):
            none = f", and of the {len(history)} items in 'history' none is known"
            return self._unknown_user(question.user, none, "name one of these, or give items that the export knows.")
        return _Lookup(_NO_VECTOR, k, left_out, "history", len(met), unknown, told)

    def _user_place(self, user: GivenId | None) -> int:
        return -1 if user is None or self._users is None else self._users.of(user)

    def _encode_histories(self, lookups: list[tuple[int, _Lookup]]) -> None:
        """Gives lookups by histories their vectors, made together."""
        of_histories = [(at, one.met) for at, (_, one) in enumerate(lookups) if one.met is not None]
        if not of_histories:
            return
        vectors = self._histories.vectors([met for _, met in of_histories])
        for (at, _), vector in zip(of_histories, vectors, strict=True):
            number, lookup = lookups[at]
            lookups[at] = number, replace(lookup, vector=vector)

    def _unknown_user(self, user: GivenId | None, more: str, hint: str) -> Unknown:
        return Unknown("user", f"{_who(user)}{more}. There are vectors of {self.num_users:,} users: {hint}")

    def _score(self, question: Score) -> Scores | Unknown | Lacking:
        if self._has_items_alone:
            return Lacking(_ITEMS_ALONE)
        place = self._user_place(question.user)
        if place < 0:
            return self._unknown_user(question.user, "", "name one of these.")
        items = np.array([self._items.of(item) for item in question.items], dtype=np.int64)
        scores = (self._unit_vectors[items] @ self._user_vectors[place]) * self._lengths[items]
        return Scores(tuple(float(score) if at >= 0 else None for at, score in zip(items.tolist(), scores, strict=True)))

    # --------------------------------------------------------------------------------------------------------- a search
    def _searched_together(self, lookups: Sequence[_Lookup]) -> list[list[int]]:
        """Returns the numbers of the lookups of each search. An exact search finds the same whatever else is looked up."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, lookup in enumerate(lookups):
            if lookup.by == "item" or self._is_exact:
                # A list that is long by what it leaves out would make all others as long.
                key: tuple[object, ...] = (lookup.by == "item", max(lookup.width, _SHORT_LIST).bit_length())
            else:
                key = (lookup.k,)
            groups.setdefault(key, []).append(number)
        return list(groups.values())

    def _look_up(self, lookups: Sequence[_Lookup]) -> list[tuple[IntArray, FloatArray]]:
        """Returns the places and scores of each list. Users ask the index; items are compared with all others."""
        queries = np.stack([lookup.vector for lookup in lookups])
        by_user = lookups[0].by != "item"
        if by_user and not self._is_exact:
            left_out = [lookup.left_out for lookup in lookups]
            lengths = np.array([len(places) for places in left_out], dtype=np.int64)
            jagged = JaggedIds(np.concatenate(left_out), offsets_of(lengths))
            places, scores = look_up(self._index, queries, lookups[0].k, jagged)
        else:
            width = max(lookup.width for lookup in lookups) + (0 if by_user else self._num_zero)
            width = min(width, self.num_items)
            if by_user:
                scores, places = self._index.search(queries, width)
            else:
                scores, places = faiss.knn(queries, self._unit_vectors, width, metric=faiss.METRIC_INNER_PRODUCT)
        found = []
        for number, lookup in enumerate(lookups):
            kept = (places[number] >= 0) & ~np.isin(places[number], lookup.left_out)
            if not by_user:
                kept &= self._lengths[places[number]] > 0
            best = np.flatnonzero(kept)[: lookup.k]
            found.append((places[number][best], scores[number][best]))
        return found

    def _list(self, places: IntArray, scores: FloatArray, lookup: _Lookup) -> ItemList:
        taken = pa.array(places)
        known = None if self._metadata is None else self._metadata.take(taken).to_pylist()
        return ItemList(
            self._ids.take(taken).to_pylist(),
            self._items.rows[places].tolist(),
            scores.tolist(),
            known if known is None else [{k: v for k, v in record.items() if v is not None} for record in known],
            lookup.by,
            lookup.num_seen,
            lookup.unknown,
        )


@dataclass(frozen=True)
class _Lookup:
    """A vector to look up with, (D,), and the places that its list may not hold, ascending.

    `met` is what the vector is made of where it comes of a history, with others of the batch.
    """

    vector: FloatArray
    k: int
    left_out: IntArray
    by: str
    num_seen: int
    unknown: tuple[GivenId, ...]
    met: Met | None = None

    @property
    def width(self) -> int:
        """How many must be found so that enough are left."""
        return self.k + len(self.left_out)


class _Places:
    """Where the vectors of ids stand."""

    def __init__(self, export: OpenExport, tower: ExportedTower) -> None:
        self._vocabulary: Vocabulary = kept_vocabulary_of(export, tower.table, tower.vocabulary)
        self.rows = rows_of(export.file(tower.file))
        self._order = np.argsort(self.rows)
        self._ascending = self.rows[self._order]

    def of(self, id_: GivenId) -> int:
        """Returns the place of an id's vector, -1 where there is none."""
        row = self.row(id_)
        at = int(np.searchsorted(self._ascending, row))
        return int(self._order[at]) if row >= 0 and at < len(self._order) and self._ascending[at] == row else -1

    def row(self, id_: GivenId) -> int:
        """Returns the row of an id, -1 where the vocabulary does not know it."""
        return find_row(id_, self._vocabulary)

    def of_all(self, ids: Sequence[GivenId]) -> tuple[IntArray, tuple[GivenId, ...]]:
        """Returns the places of ids, ascending and each once, and the ids that have none."""
        places = [self.of(id_) for id_ in ids]
        return (
            np.unique(np.array([place for place in places if place >= 0], dtype=np.int64)),
            tuple(id_ for id_, place in zip(ids, places, strict=True) if place < 0),
        )


def _who(user: GivenId | None) -> str:
    return "no user was named" if user is None else f"user {user!r} was not in the data that the run was exported with"


def _vectors(export: OpenExport, tower: ExportedTower) -> FloatArray:
    """Returns all vectors of a tower, (n, D), read a row group at a time."""
    vectors = np.empty((tower.vectors, tower.dim), dtype=np.float32)
    first = 0
    for block in vector_blocks(export.file(tower.file)):
        last = first + len(block)
        if last > len(vectors) or block.shape[1] != tower.dim:
            break
        vectors[first:last] = block
        first = last
    if first != len(vectors):
        raise ExportError(
            f"{export.folder.uri}: {tower.file} does not hold the {tower.vectors:,} vectors of {tower.dim} numbers that its "
            f"manifest tells of. Export the run again."
        )
    return vectors
