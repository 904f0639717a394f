"""Evaluates a model on the validation and test sets: encodes queries and candidates, ranks, and scores labels.

Retrieval: a query is a user, represented by the user's first row of the set; relevant are the items of all the user's rows;
left out of the ranking are the items of the user's training rows, for the test set those of the validation rows too. Over
given candidates, each row is a query of its own. An item that the catalogue does not hold cannot be found, and counts
as missed.
"""

from __future__ import annotations

__all__ = ["Evaluator", "Split"]

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedshard.config import Config
from embedshard.config.parts import PointwiseConfig
from embedshard.data.collate import Collator
from embedshard.data.columns import Columns, Ragged, gather, num_rows
from embedshard.data.dataset import Dataset
from embedshard.errors import ConfigError
from embedshard.evaluate.given import rank_candidates
from embedshard.evaluate.jagged import JaggedIds
from embedshard.evaluate.pointwise import PointwiseSums
from embedshard.evaluate.ranking import parse_metric
from embedshard.evaluate.retrieval import rank_catalogue
from embedshard.evaluate.scores import DotProducts
from embedshard.world import World

Split = Literal["validation", "test"]
IntArray = npt.NDArray[np.int64]

_SAMPLE_STREAM = 4  # beside those of order.py and negatives.py


@dataclass(frozen=True)
class _RetrievalSet:
    """A set prepared for ranking the catalogue, the same for every model.

    Attributes:
        queries: the user tower's features of each query.
        relevant: places in the catalogue; from its end on: items that it does not hold.
        seen: places in the catalogue that are left out, of each query.
        num_unreachable: how many places after the catalogue's end are needed.
    """

    queries: Columns
    relevant: JaggedIds
    seen: JaggedIds | None
    num_unreachable: int


class Evaluator:
    """Measures a model on held-out rows.

    Args:
        config: the config.
        dataset: the opened data.
        collator: makes batches of columns.
        world: the processes that evaluate together; each encodes all, since lookups are collective.

    Raises:
        ConfigError: if a metric does not exist.
    """

    def __init__(self, config: Config, dataset: Dataset, collator: Collator, world: World) -> None:
        self._config, self._dataset, self._collator, self._world = config, dataset, collator, world
        metrics = [parse_metric(name) for name in config.evaluate.metrics]
        self._pointwise = [str(metric) for metric in metrics if metric.is_pointwise]
        self._ranking = [str(metric) for metric in metrics if not metric.is_pointwise]
        self._over_catalogue = config.evaluate.candidates == "catalogue"
        self._columns: dict[str, Columns] = {}
        self._sets: dict[str, _RetrievalSet] = {}
        self.counts: dict[str, dict[str, int]] = {}
        """What was counted when a set was last evaluated: queries, rows, items that could not be found."""

    def has(self, split: Split) -> bool:
        """Returns whether there is something to measure on a set."""
        return bool(self._config.evaluate.metrics) and self._dataset.has(split)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Returns the metrics of a set, in config order. Collective.

        Raises:
            ConfigError: if the model cannot do what a metric needs.
        """
        plain = self._unwrapped(model)
        was_training = plain.training
        plain.eval()
        try:
            values: dict[str, float] = {}
            if self._ranking:
                values |= self._rank(plain, split)
            if self._pointwise:
                values |= self._score(plain, split)
        finally:
            plain.train(was_training)
        names = self._config.evaluate.metrics
        self.counts[split] = {name: int(value) for name, value in values.items() if name not in names}
        return {name: values[name] for name in names}

    def _unwrapped(self, model: nn.Module) -> Any:
        inner = getattr(model, "module", model)
        for method in ("encode_queries", "encode_candidates") if self._ranking else ():
            if not hasattr(inner, method):
                raise ConfigError(
                    f"metric '{self._ranking[0]}' ranks items, for which the model needs a method '{method}(batch)' "
                    f"that returns a vector a row; {type(inner).__name__} has none. Add it, or use pointwise metrics."
                )
        return inner

    # ----------------------------------------------------------------------------------------------------- retrieval
    def _rank(self, model: Any, split: Split) -> dict[str, float]:
        catalogue = self._dataset.catalogue
        assert catalogue is not None, "the data are opened with a catalogue where a metric ranks"
        candidate_ND = self._encode(model.encode_candidates, catalogue.columns, len(catalogue))
        if not self._over_catalogue:
            return self._rank_given(model, split, candidate_ND)
        if split not in self._sets:
            self._sets[split] = self._prepare(split)
        prepared = self._sets[split]
        query_QD = self._encode(model.encode_queries, prepared.queries, prepared.relevant.num_queries)
        unreachable = candidate_ND.new_zeros(prepared.num_unreachable, candidate_ND.shape[1])
        mask = np.arange(len(catalogue) + prepared.num_unreachable) < len(catalogue)
        return rank_catalogue(
            DotProducts(query_QD, torch.cat([candidate_ND, unreachable])),
            prepared.relevant,
            prepared.seen,
            self._ranking,
            candidate_mask=None if mask.all() else mask,
        )

    def _rank_given(self, model: Any, split: Split, candidate_ND: torch.Tensor) -> dict[str, float]:
        columns = self._read(split)
        places = self._places()
        negatives = columns["candidates"]
        assert isinstance(negatives, Ragged), "candidates are lists"
        positive = places[columns[self._item_id].values]
        given = places[negatives.values]
        missing = int((positive < 0).sum() + (given < 0).sum())
        if missing:
            raise ConfigError(
                f"evaluate.candidates: {missing} of the {len(positive) + len(given)} items of the {split} set are not in "
                f"the catalogue of {len(candidate_ND)}. Each must be: give data.catalogue all items."
            )
        query_QD = self._encode(model.encode_queries, columns, num_rows(columns))
        scores = DotProducts(query_QD, candidate_ND)
        return rank_candidates(scores, positive, JaggedIds(given, negatives.offsets), self._ranking)

    def _prepare(self, split: Split) -> _RetrievalSet:
        columns = self._read(split)
        users, items = columns[self._user_id].values, columns[self._item_id].values
        known, first_rows = np.unique(users, return_index=True)
        limit = self._config.evaluate.max_users
        if split == "validation" and limit is not None and limit < len(known):
            words = np.random.Philox(key=[self._config.seed, _SAMPLE_STREAM]).random_raw(len(known))
            chosen = np.sort(np.argsort(words, kind="stable")[:limit])
            known, first_rows = known[chosen], first_rows[chosen]
        query_of_row = _index_in(known, users)
        rows = np.flatnonzero(query_of_row >= 0)
        relevant, num_unreachable = self._relevant(query_of_row[rows], items[rows], len(known))
        return _RetrievalSet(
            queries=gather(columns, first_rows.astype(np.int64), None),
            relevant=relevant,
            seen=self._seen(split, known) if self._config.evaluate.filter_seen else None,
            num_unreachable=num_unreachable,
        )

    def _relevant(self, queries: IntArray, items: IntArray, num_queries: int) -> tuple[JaggedIds, int]:
        """Returns the relevant places; a query's i-th item that the catalogue does not hold gets the i-th place after it."""
        pairs = np.unique(np.stack([queries, items]), axis=1)  # an item that a user met twice is one item
        queries, items = pairs[0], pairs[1]
        places = self._places()[items]
        lost = np.flatnonzero(places < 0)
        if not len(lost):
            return JaggedIds.from_pairs(queries, places, num_queries), 0
        ordered = lost[np.argsort(queries[lost], kind="stable")]
        _, begins, counts = np.unique(queries[ordered], return_index=True, return_counts=True)
        nth = np.arange(len(ordered)) - np.repeat(begins, counts)
        assert self._dataset.catalogue is not None
        places[ordered] = len(self._dataset.catalogue) + nth
        return JaggedIds.from_pairs(queries, places, num_queries), int(counts.max())

    def _seen(self, split: Split, known: IntArray) -> JaggedIds:
        places = self._places()
        queries, items = [], []
        for users, user_items in self._dataset.interactions(including_validation=split == "test"):
            query = _index_in(known, users)
            place = places[user_items]
            kept = (query >= 0) & (place >= 0)
            queries.append(query[kept])
            items.append(place[kept])
        none = [np.zeros(0, dtype=np.int64)]
        return JaggedIds.from_pairs(np.concatenate(queries + none), np.concatenate(items + none), len(known))

    def _places(self) -> IntArray:
        assert self._dataset.catalogue is not None
        return self._dataset.catalogue.places()

    @property
    def _user_id(self) -> str:
        name = self._config.identity("user_id")
        assert name is not None, "the config checks that what ranks knows the user"
        return name

    @property
    def _item_id(self) -> str:
        name = self._config.identity("item_id")
        assert name is not None, "the config checks that what ranks knows the item"
        return name

    # ----------------------------------------------------------------------------------------------------- pointwise
    def _score(self, model: Any, split: Split) -> dict[str, float]:
        is_rating = isinstance(self._config.objective, PointwiseConfig) and self._config.objective.kind == "mse"
        sums = PointwiseSums(self._pointwise, "identity" if is_rating else "sigmoid")
        columns = self._read(split)
        for first, last in self._spans(num_rows(columns)):
            batch = self._collator.batch(columns, first, last).to(self._world.device)
            sums.update(model(batch).logits, batch.labels[:, 0], batch.weights)
        return sums.result()

    # ---------------------------------------------------------------------------------------------------------- both
    def _encode(self, encode: Any, columns: Columns, count: int) -> torch.Tensor:
        vectors = [
            encode(self._collator.batch(columns, first, last).to(self._world.device)) for first, last in self._spans(count)
        ]
        return torch.cat(vectors)

    def _spans(self, count: int) -> list[tuple[int, int]]:
        size = self._config.evaluate.batch_size
        return [(first, min(first + size, count)) for first in range(0, count, size)]

    def _read(self, split: Split) -> Columns:
        if split not in self._columns:
            self._columns[split] = self._dataset.read_held_out(split)
        return self._columns[split]


def _index_in(known: IntArray, values: IntArray) -> IntArray:
    """Returns each value's index among the sorted `known`, -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1, dtype=np.int64)
    index = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[index] == values, index, -1)
