"""The items apart from interactions: what can be recommended and what negatives are drawn from."""

from __future__ import annotations

__all__ = ["Catalogue", "catalogue_from_columns", "catalogue_from_rows"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedshard.data.columns import Columns, Flat, gather
from embedshard.errors import DataError


@dataclass(frozen=True)
class Catalogue:
    """Items, each with the features that the item tower reads.

    Attributes:
        ids: rows of the item's table, (n,) int64, each once.
        columns: the item tower's features, n rows each.
        num_embeddings: rows of the item's table, the one for unknown ids included.
    """

    ids: npt.NDArray[np.int64]
    columns: Columns
    num_embeddings: int

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.ids)

    def places(self) -> npt.NDArray[np.int64]:
        """Returns the place in the catalogue of each row of the item's table, -1 where it has none."""
        places = np.full(self.num_embeddings, -1, dtype=np.int64)
        places[self.ids] = np.arange(len(self.ids), dtype=np.int64)
        return places


def catalogue_from_rows(item_id: str, rows: npt.NDArray[np.int64], num_embeddings: int) -> Catalogue:
    """Returns the catalogue of items that are known by their id alone."""
    return Catalogue(rows, {item_id: Flat(rows)}, num_embeddings)


def catalogue_from_columns(item_id: str, columns: Columns, num_embeddings: int, where: str) -> Catalogue:
    """Returns the catalogue of a file's items; a row without an id is none.

    Raises:
        DataError: if an item is there twice.
    """
    if (columns[item_id].values < 0).any():
        columns = gather(columns, np.flatnonzero(columns[item_id].values >= 0), None)
    ids = columns[item_id].values
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        row = int(unique[counts > 1][0])
        again = np.flatnonzero(ids == row)[:2].tolist()
        raise DataError(
            f"{where}: rows {again[0]} and {again[1]} are the same item (row {row} of its table); "
            f"{len(ids) - len(unique)} rows repeat an earlier item. A catalogue needs one row per item: "
            f"remove the others, or give a hash vocabulary more rows."
        )
    return Catalogue(ids, columns, num_embeddings)
