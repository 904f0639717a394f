"""The validation and test sets, prepared for ranking: the same for every model and every baseline.

Over the catalogue, a query is a user, represented by the user's first row of the set; relevant are the items of all the
user's rows; left out of the ranking are the items of the user's training rows, for the test set those of the validation
rows too. Over given candidates, each row is a query of its own. An item that the catalogue does not hold cannot be
found, and counts as missed. A row without an item asks nothing, nor, over the catalogue, one without a user.
"""

from __future__ import annotations

__all__ = ["SPLITS", "GivenSet", "HeldOutSets", "RankedSet", "RetrievalSet", "Split"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from embedshard.config import Config
from embedshard.data.catalogue import Catalogue
from embedshard.data.columns import Columns, Ragged, gather, offsets_of
from embedshard.data.dataset import Dataset
from embedshard.errors import ConfigError
from embedshard.evaluate.given import candidate_sums
from embedshard.evaluate.jagged import JaggedIds
from embedshard.evaluate.ranking_sums import RankingSums
from embedshard.evaluate.retrieval import catalogue_sums
from embedshard.evaluate.scores import Scores
from embedshard.evaluate.slices import ItemSlices

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
IntArray = npt.NDArray[np.int64]

_SAMPLE_STREAM = 4  # beside those of order.py and negatives.py


@dataclass(frozen=True)
class RetrievalSet:
    """A set prepared for ranking the whole catalogue.

    Attributes:
        queries: the user tower's features of each query.
        users: the row of the user's table of each query.
        relevant: places in the catalogue; from its end on: items that it does not hold.
        seen: places in the catalogue that are left out, of each query.
        num_items: items in the catalogue.
        num_candidates: and the places after its end that are needed; their scores do not matter.
    """

    queries: Columns
    users: IntArray
    relevant: JaggedIds
    seen: JaggedIds | None
    num_items: int
    num_candidates: int

    def rank(self, scores: Scores, metrics: Sequence[str], slices: ItemSlices | None) -> RankingSums:
        """Returns the sums of the metrics of ranking by these scores."""
        mask = np.arange(self.num_candidates) < self.num_items
        return catalogue_sums(
            scores, self.relevant, self.seen, metrics, candidate_mask=None if mask.all() else mask, slices=slices
        )


@dataclass(frozen=True)
class GivenSet:
    """A set prepared for ranking each row's item among the row's negatives.

    Attributes:
        queries: the user tower's features of each row.
        users: the row of the user's table of each row; -1 where the config names no user.
        positive: the place in the catalogue of each row's item.
        negatives: places in the catalogue.
        num_candidates: items in the catalogue.
    """

    queries: Columns
    users: IntArray
    positive: IntArray
    negatives: JaggedIds
    num_candidates: int

    def rank(self, scores: Scores, metrics: Sequence[str], slices: ItemSlices | None) -> RankingSums:
        """Returns the sums of the metrics of ranking by these scores."""
        return candidate_sums(scores, self.positive, self.negatives, metrics, slices=slices)


RankedSet = RetrievalSet | GivenSet


class HeldOutSets:
    """Reads and prepares the validation and test sets, each once.

    Args:
        config: the config.
        dataset: the opened data.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self._config, self._dataset = config, dataset
        self._columns: dict[str, Columns] = {}
        self._ranked: dict[str, RankedSet] = {}

    def read(self, split: Split) -> Columns:
        """Returns a set's columns, in file order."""
        if split not in self._columns:
            self._columns[split] = self._dataset.read_held_out(split)
        return self._columns[split]

    def ranked(self, split: Split) -> RankedSet:
        """Returns a set prepared for ranking, over the catalogue or over given candidates as the config says.

        Raises:
            ConfigError: if a given candidate is not in the catalogue.
        """
        if split not in self._ranked:
            over_catalogue = self._config.evaluate.candidates == "catalogue"
            self._ranked[split] = self._over_catalogue(split) if over_catalogue else self._over_given(split)
        return self._ranked[split]

    @property
    def catalogue(self) -> Catalogue:
        """The items."""
        assert self._dataset.catalogue is not None, "the data are opened with a catalogue where a metric ranks"
        return self._dataset.catalogue

    @property
    def user_id(self) -> str:
        """The feature that names the user."""
        name = self._config.identity("user_id")
        assert name is not None, "the config checks that what ranks knows the user"
        return name

    @property
    def item_id(self) -> str:
        """The feature that names the item."""
        name = self._config.identity("item_id")
        assert name is not None, "the config checks that what ranks knows the item"
        return name

    # ------------------------------------------------------------------------------------------------ given candidates
    def _over_given(self, split: Split) -> GivenSet:
        columns = self.read(split)
        asks = columns[self.item_id].values >= 0
        if not asks.all():
            columns = gather(columns, np.flatnonzero(asks), None)
        places = self.catalogue.places()
        negatives = columns["candidates"]
        assert isinstance(negatives, Ragged), "candidates are lists"
        is_item = negatives.values >= 0
        offsets = offsets_of(is_item.astype(np.int64))[negatives.offsets]
        positive = places[columns[self.item_id].values]
        given = places[negatives.values[is_item]]
        missing = int((positive < 0).sum() + (given < 0).sum())
        if missing:
            raise ConfigError(
                f"evaluate.candidates: {missing} of the {len(positive) + len(given)} items of the {split} set are not in "
                f"the catalogue of {len(self.catalogue)}. Each must be: give data.catalogue all items."
            )
        knows_user = self._config.identity("user_id") is not None
        users = columns[self.user_id].values if knows_user else np.full(len(positive), -1, dtype=np.int64)
        return GivenSet(columns, users, positive, JaggedIds(given, offsets), len(self.catalogue))

    # --------------------------------------------------------------------------------------------- the whole catalogue
    def _over_catalogue(self, split: Split) -> RetrievalSet:
        columns = self.read(split)
        users, items = columns[self.user_id].values, columns[self.item_id].values
        asking = np.flatnonzero((users >= 0) & (items >= 0))
        known, first = np.unique(users[asking], return_index=True)
        first_rows = asking[first]
        limit = self._config.evaluate.max_users
        if split == "validation" and limit is not None and limit < len(known):
            words = np.random.Philox(key=[self._config.seed, _SAMPLE_STREAM]).random_raw(len(known))
            chosen = np.sort(np.argsort(words, kind="stable")[:limit])
            known, first_rows = known[chosen], first_rows[chosen]
        query_of_row = _index_in(known, users)
        rows = np.flatnonzero((query_of_row >= 0) & (items >= 0))
        relevant, num_unreachable = self._relevant(query_of_row[rows], items[rows], len(known))
        return RetrievalSet(
            queries=gather(columns, first_rows.astype(np.int64), None),
            users=known,
            relevant=relevant,
            seen=self._seen(split, known) if self._config.evaluate.filter_seen else None,
            num_items=len(self.catalogue),
            num_candidates=len(self.catalogue) + num_unreachable,
        )

    def _relevant(self, queries: IntArray, items: IntArray, num_queries: int) -> tuple[JaggedIds, int]:
        """Returns the relevant places; a query's i-th item that the catalogue does not hold gets the i-th place after it."""
        pairs = np.unique(np.stack([queries, items]), axis=1)  # an item that a user met twice is one item
        queries, items = pairs[0], pairs[1]
        places = self.catalogue.places()[items]
        lost = np.flatnonzero(places < 0)
        if not len(lost):
            return JaggedIds.from_pairs(queries, places, num_queries), 0
        ordered = lost[np.argsort(queries[lost], kind="stable")]
        _, begins, counts = np.unique(queries[ordered], return_index=True, return_counts=True)
        nth = np.arange(len(ordered)) - np.repeat(begins, counts)
        places[ordered] = len(self.catalogue) + nth
        return JaggedIds.from_pairs(queries, places, num_queries), int(counts.max())

    def _seen(self, split: Split, known: IntArray) -> JaggedIds:
        places = self.catalogue.places()
        queries, items = [], []
        for users, user_items in self._dataset.interactions(including_validation=split == "test"):
            query = _index_in(known, users)
            place = np.where(user_items >= 0, places[user_items], -1)
            kept = (query >= 0) & (place >= 0)
            queries.append(query[kept])
            items.append(place[kept])
        none = [np.zeros(0, dtype=np.int64)]
        return JaggedIds.from_pairs(np.concatenate(queries + none), np.concatenate(items + none), len(known))


def _index_in(known: IntArray, values: IntArray) -> IntArray:
    """Returns each value's index among the sorted `known`, -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1, dtype=np.int64)
    index = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[index] == values, index, -1)
