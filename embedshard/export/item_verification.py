"""Compares exported vectors of items, of which the nearest are looked for, with the checkpoint's, loss by loss.

There are no users: items ask for those that are near them, by cosine.

Shapes: Q items that ask, N items, D dim, K length of the lists.
"""

from __future__ import annotations

__all__ = ["verify_items"]

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from embedshard.evaluate.jagged import JaggedIds
from embedshard.export.read import rows_of, vector_blocks
from embedshard.export.vectors import unit_vectors
from embedshard.export.verification import (
    INDEX_TOLERANCE,
    LEAST_K,
    MOST_LISTS,
    MOST_SCORED,
    SCORE_TOLERANCE,
    Verification,
    compare_lists,
    spread,
)
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def verify_items(
    items: Location,
    of_checkpoint: Callable[[IntArray], FloatArray],
    index: tuple[str, Location],
    quantised: Mapping[str, Callable[[], FloatArray]],
    tables: Mapping[str, Callable[[IntArray], FloatArray]],
    index_tolerance: float = INDEX_TOLERANCE,
) -> Verification:
    """Has items ask for their nearest through the files alone.

    Args:
        items: the file of unit vectors.
        of_checkpoint: returns the vectors, of any length, that a checkpoint has in given rows.
        index: its kind and file.
        quantised: return the items' vectors as their files give them back, by name.
        tables: of tables in fewer bits, by name, return the vectors of given rows.
        index_tolerance: which share of the exact lists the index may miss.
    """
    item_ND, rows_N = np.concatenate(list(vector_blocks(items))), rows_of(items)
    chosen = spread(len(item_ND), MOST_LISTS)
    found = Verification(
        "items", len(chosen), "the checkpoint", {"score": SCORE_TOLERANCE, "recall": index_tolerance}, k=LEAST_K
    )
    theirs_ND = unit_vectors(of_checkpoint(rows_N))
    for place in spread(len(item_ND), MOST_SCORED).tolist():
        errors = np.abs(item_ND @ item_ND[place] - theirs_ND @ theirs_ND[place])
        found.score_error = max(found.score_error, float(errors.max()))
    if not found.score_error <= SCORE_TOLERANCE:
        found.problems.append(f"a cosine is off by {found.score_error:.2e}; allowed are {SCORE_TOLERANCE:.2e}")

    def in_fewer_bits(vectors: Callable[[IntArray], FloatArray]) -> tuple[FloatArray, FloatArray]:
        coarse_ND = unit_vectors(vectors(rows_N))
        return coarse_ND[chosen], coarse_ND

    itself = JaggedIds.from_pairs(np.arange(len(chosen), dtype=np.int64), chosen, len(chosen))
    in_fewer = {name: partial(in_fewer_bits, vectors) for name, vectors in tables.items()}
    compare_lists(found, item_ND[chosen], item_ND, itself, index, quantised, in_fewer, index_tolerance)
    return found
