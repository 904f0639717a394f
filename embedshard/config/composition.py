"""Ids that look up two rows of a table, whose vectors are summed, and how many of them are then alike."""

from __future__ import annotations

__all__ = ["Composition", "colliding_ids", "collision_share"]

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Composition:
    """How a number from 0 to num_ids - 1 becomes two rows: its quotient by `second`, and after these its remainder.

    Attributes:
        num_ids: how many there are; `first` times `second` at most.
        first: rows for quotients; of two hashes, for the first.
        second: rows for remainders; of two hashes, for the second.
    """

    num_ids: int
    first: int
    second: int

    @property
    def rows(self) -> int:
        """Of the table, without the one for unknown ids."""
        return self.first + self.second

    def rows_of(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """Returns the rows of all ids one after another, and how many each has: 2, or 1 if it is `num_ids`, the unknown one.

        Args:
            ids: (n,) from 0 to `num_ids`.
        """
        pairs = np.stack([ids // self.second, self.first + ids % self.second], axis=1)
        is_unknown = ids == self.num_ids
        if not is_unknown.any():
            return pairs.reshape(-1), np.full(len(ids), 2, dtype=np.int64)
        pairs[is_unknown, 0] = self.rows
        is_there = np.ones(pairs.shape, dtype=np.bool_)
        is_there[is_unknown, 1] = False
        return pairs[is_there], np.where(is_unknown, 1, 2)


def collision_share(places: int, num_ids: int) -> float:
    """Returns the expected share of ids that have no place of their own, if each is hashed to one of so many evenly.

    1 - (1 - 1 / places)^(num_ids - 1): an id is alone if all the others miss its place.
    """
    if places == 1:
        return float(num_ids > 1)
    return -math.expm1((num_ids - 1) * math.log1p(-1 / places))


def colliding_ids(places: int, share: float) -> float:
    """Returns of how many ids this share has no place of its own."""
    return 1 + math.log1p(-share) / math.log1p(-1 / places) if places > 1 else 1.0
