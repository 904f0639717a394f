"""Lists of candidate numbers, one a query: relevant items, seen items, given negatives."""

from __future__ import annotations

__all__ = ["JaggedIds", "check_range"]

from dataclasses import dataclass

import numpy as np

from embedshard.data.columns import offsets_of
from embedshard.errors import DataError
from embedshard.evaluate.ranking import IntArray


@dataclass(frozen=True)
class JaggedIds:
    """A list of candidate numbers for each query.

    Attributes:
        values: (V,) int64, all lists one after another.
        offsets: (Q + 1,) int64, where each query's list begins, from 0 to V.
    """

    values: IntArray
    offsets: IntArray

    def __post_init__(self) -> None:
        assert self.values.ndim == 1
        assert self.offsets.ndim == 1
        assert len(self.offsets) >= 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.values)
        assert (np.diff(self.offsets) >= 0).all()

    @classmethod
    def from_pairs(cls, query_index: IntArray, item_index: IntArray, num_queries: int) -> JaggedIds:
        """Returns the lists of pairs (query, item) that come in any order: ascending, and each pair once.

        Args:
            query_index: (V,) numbers below num_queries.
            item_index: (V,) candidate numbers.
            num_queries: Q; a query without pairs has an empty list.

        Raises:
            DataError: a query number is outside of 0 .. num_queries - 1.
        """
        query_index, item_index = np.asarray(query_index, np.int64), np.asarray(item_index, np.int64)
        assert query_index.shape == item_index.shape
        check_range(query_index, num_queries, "query")
        order = np.lexsort((item_index, query_index))
        queries, items = query_index[order], item_index[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (queries[1:] != queries[:-1]) | (items[1:] != items[:-1])
        return cls(items[is_first], offsets_of(np.bincount(queries[is_first], minlength=num_queries)))

    @property
    def num_queries(self) -> int:
        """How many lists there are."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """The (Q,) lengths of the lists."""
        return np.diff(self.offsets)

    @property
    def query_index(self) -> IntArray:
        """The (V,) number of the query that each value belongs to."""
        return np.repeat(np.arange(self.num_queries), self.lengths)

    def span(self, start: int, stop: int) -> JaggedIds:
        """Returns the lists of the queries start .. stop - 1."""
        offsets = self.offsets[start : stop + 1]
        return JaggedIds(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def pick(self, queries: IntArray) -> JaggedIds:
        """Returns the lists of the given queries, in their order."""
        offsets = offsets_of(self.lengths[queries])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[queries] - offsets[:-1], np.diff(offsets))
        return JaggedIds(self.values[places], offsets)

    def distinct(self) -> JaggedIds:
        """Returns the lists ascending and without repetitions."""
        return JaggedIds.from_pairs(self.query_index, self.values, self.num_queries)


def check_range(numbers: IntArray, limit: int, what: str) -> None:
    """Checks that numbers are from 0 to limit - 1.

    Raises:
        DataError: naming how many are not, and one of them.
    """
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
        bad = numbers[(numbers < 0) | (numbers >= limit)]
        raise DataError(
            f"{len(bad)} {what} numbers are outside of 0 .. {limit - 1}, such as {bad[0]}. Map ids to rows by the "
            "vocabulary that made the vectors."
        )
