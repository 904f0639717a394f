"""One pass over the training set after training: who met what, and how often each id occurs.

Baselines, slices of the catalogue and the statistics of ids all look at the training rows; each says what it wants of them,
and nothing else is read. An id below 0 is an empty place: it is counted nowhere, and its row is no interaction.
Rows that are set aside do not exist here.
"""

from __future__ import annotations

__all__ = ["Interactions", "Survey", "Wanted", "take_survey"]

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.config.parts import DenseFeature
from embedshard.data.columns import Columns, Flat, good_rows
from embedshard.data.dataset import Dataset
from embedshard.data.id_counts import FeatureIds, IdCounts
from embedshard.data.spacing import evenly_spaced

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What a survey is to find.

    Attributes:
        item_counts: how often each item is met.
        interactions: the user and the item of each row.
        labels: the label and the weight of each row.
        id_rows: from how many rows ids are counted; 0 for none.
    """

    item_counts: bool = False
    interactions: bool = False
    labels: bool = False
    id_rows: int = 0


@dataclass(frozen=True)
class Interactions:
    """The training rows that have a user and an item, in file order.

    Attributes:
        users: rows of the user's table, (n,).
        items: rows of the item's table, (n,).
        labels: (n,) float32; empty unless asked for.
        weights: (n,) float32, at least 0; empty unless labels are asked for.
    """

    users: IntArray
    items: IntArray
    labels: FloatArray
    weights: FloatArray


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        rows: of the training set.
        rows_counted: those from which `ids` are.
        item_counts: how often each row of the item's table is met, (rows + 1,); None unless asked for.
        interactions: None unless asked for.
        label_sum: weighted; 0 unless asked for.
        label_weight: the sum of the weights; 0 unless asked for.
        ids: by feature; empty unless asked for.
    """

    rows: int
    rows_counted: int
    item_counts: IntArray | None
    interactions: Interactions | None
    label_sum: float
    label_weight: float
    ids: Mapping[str, FeatureIds]

    def ids_json(self, dataset: Dataset) -> dict[str, Any]:
        """Returns the statistics of ids as result.json holds them, with the ids themselves where a vocabulary has them."""
        features = {}
        for name, found in self.ids.items():
            rows = np.array([row for row, _ in found.hottest], dtype=np.int64)
            features[name] = {
                "table": found.table,
                "ids": found.lookups,
                "oov_share": found.unknown / found.lookups if found.lookups else 0.0,
                "distinct_rows": found.distinct_rows,
                "hottest": [
                    [None, count, _hashed(row, id_)] if dataset.config.tracking.private else [row, count, id_]
                    for (row, count), id_ in zip(found.hottest, dataset.vocabularies[found.table].ids_of(rows), strict=True)
                ],
            }
        return {"features": features, "rows_counted": self.rows_counted, "rows": self.rows}


def _hashed(row: int, id_: int | str | None) -> str:
    """Returns what stands for an id that is not to be told: the same in each run."""
    return "#" + hashlib.sha256(f"{row if id_ is None else id_}".encode()).hexdigest()[:12]


def take_survey(dataset: Dataset, wanted: Wanted) -> Survey:
    """Reads what is wanted of the training set, each row group at most once.

    Raises:
        DataError: if a row group cannot be read.
    """
    parts = _Parts(dataset, wanted)
    group_rows = [group.num_rows for source in dataset.known for group in source.inventory.row_groups]
    counted = evenly_spaced(group_rows, wanted.id_rows)
    number = 0
    for source in dataset.known:
        whole, narrow = source.narrowed([*parts.id_counts, *parts.columns]), source.narrowed(parts.columns)
        for group in range(len(source.inventory.row_groups)):
            if number in counted:
                columns = good_rows(whole.read_row_group(group))
                parts.count_ids(columns)
                parts.add(columns)
            elif parts.columns:
                parts.add(good_rows(narrow.read_row_group(group)))
            number += 1
    return Survey(
        rows=sum(group_rows),
        rows_counted=sum(group_rows[number] for number in counted),
        item_counts=parts.item_counts if wanted.item_counts else None,
        interactions=parts.interactions() if wanted.interactions else None,
        label_sum=parts.label_sum,
        label_weight=parts.label_weight,
        ids={name: counts.result() for name, counts in parts.id_counts.items()} if counted else {},
    )


class _Parts:
    """What is found, while it is being found."""

    def __init__(self, dataset: Dataset, wanted: Wanted) -> None:
        config = dataset.config
        tables = {name: feature.table for name, feature in config.features.items() if not isinstance(feature, DenseFeature)}
        self.id_counts = {name: IdCounts(table, dataset.unknown_number(table)) for name, table in tables.items()}
        self.item_counts = np.zeros(0, dtype=np.int64)
        self.label_sum = self.label_weight = 0.0
        self._wanted = wanted
        self._user, self._item = config.identity("user_id") or "", config.identity("item_id") or ""
        self._label = next((f"label:{name}" for name in config.data.label_columns), "")
        self._taken: list[tuple[IntArray, IntArray, FloatArray, FloatArray]] = []
        self._known_items = dataset.known_counts(self._item) if wanted.item_counts else None
        if self._known_items is not None:
            self.item_counts = self._known_items
        elif wanted.item_counts:
            self.item_counts = np.zeros(dataset.table_rows[tables[self._item]] + 1, dtype=np.int64)

    @property
    def columns(self) -> list[str]:
        """What is read of every row; a data set without weights has no column of that name."""
        wanted = self._wanted
        users = [self._user] if wanted.interactions else []
        counts_items = wanted.item_counts and self._known_items is None
        items = [self._item] if wanted.interactions or counts_items else []
        return users + items + ([self._label, "weight"] if wanted.labels else [])

    def count_ids(self, columns: Columns) -> None:
        """Counts the ids of a row group."""
        for name, counts in self.id_counts.items():
            column = columns[name]
            counts.add(column.values if isinstance(column, Flat) else column.values[column.offsets[0] : column.offsets[-1]])

    def add(self, columns: Columns) -> None:
        """Takes the rest of a row group."""
        labels: FloatArray = np.zeros(0, dtype=np.float32)
        weights = labels
        if self._wanted.labels:
            labels = columns[self._label].values.astype(np.float32, copy=False)
            weights = np.ones(len(labels), dtype=np.float32)
            if "weight" in columns:
                weights = columns["weight"].values.astype(np.float32, copy=False)
            self.label_sum += float(np.dot(labels.astype(np.float64), weights))
            self.label_weight += float(weights.sum(dtype=np.float64))
        if self._wanted.item_counts and self._known_items is None:
            items = columns[self._item].values
            self.item_counts += np.bincount(items[items >= 0], minlength=len(self.item_counts))
        if self._wanted.interactions:
            users, items = columns[self._user].values, columns[self._item].values
            kept = (users >= 0) & (items >= 0)
            labelled = kept if self._wanted.labels else slice(0)
            self._taken.append((users[kept], items[kept], labels[labelled], weights[labelled]))

    def interactions(self) -> Interactions:
        """Returns all rows that were taken."""
        return Interactions(*(np.concatenate(part) for part in zip(*self._taken, strict=True)))
