"""Compiled loops over the rows of a table on a CPU: finding the distinct ones of a batch, and moving them.

What torch needs a dozen passes for is one here, without a tensor in between. Where torch has a fast loop (`index_select`,
`embedding_bag`), that is used (`row_tables.py`).

Shapes: V ids, U distinct ids, R rows of the table, D numbers of a vector, G bags.
"""

from __future__ import annotations

__all__ = [
    "NO_STATE",
    "Rule",
    "State",
    "are_ascending",
    "are_single",
    "bags_of_ids",
    "group_rows",
    "move_rows",
]

from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedshard.compiled import compiled

State = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
NO_STATE: Final[State] = (np.zeros(0, np.float32), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32))
"""For `move_rows`: the state of a rule that has none."""


class Rule(IntEnum):
    """How rows are moved, g being the gradient of a row.

    Attributes:
        SGD: weight -= lr * g.
        ADAGRAD: sum += g^2; weight -= lr * g / (sqrt(sum) + eps).
        ROWWISE_ADAGRAD: sum += mean(g^2), one number a row; weight -= lr * g / (sqrt(sum) + eps).
        ADAM: mean += (1 - beta1) * (g - mean); square = beta2 * square + (1 - beta2) * g^2;
            weight -= lr * mean / (sqrt(square) + eps), the bias correction being part of lr.
    """

    SGD = 0
    ADAGRAD = 1
    ROWWISE_ADAGRAD = 2
    ADAM = 3


@compiled
def group_rows(keys: Any, bits: int, places: Any, rows: Any, begins: Any) -> int:
    """Finds out where in sorted ids a new row begins.

    Args:
        keys: of each id, ascending: `id << bits | place`, (V,) int64.
        bits: for the place.
        places: (V,) int64; it becomes the places.
        rows: (V,) int64; it begins with the distinct ids, then.
        begins: (V + 1,) int64; it begins with where those of each distinct id begin, and V.

    Returns:
        How many ids are distinct.
    """
    count, former, mask = 0, np.int64(-1), (np.int64(1) << bits) - 1
    for at in range(len(keys)):
        row = keys[at] >> bits
        places[at] = keys[at] & mask
        if row != former:
            rows[count], begins[count] = row, at
            former = row
            count += 1
    begins[count] = len(keys)
    return count


@compiled
def are_single(begins: Any) -> bool:
    """Returns whether bags have one id each.

    Args:
        begins: where the ids of each bag begin, and the last one's end, (G + 1,) int64.
    """
    count = len(begins) - 1
    if begins[count] - begins[0] != count:
        return False
    others = 0
    for bag in range(count):
        others += begins[bag + 1] - begins[bag] != 1
    return others == 0


@compiled
def are_ascending(ids: Any) -> bool:
    """Returns whether each id, (V,) int64, is larger than the one before."""
    place = 1
    while place < len(ids) and ids[place - 1] < ids[place]:
        place += 1
    return place >= len(ids)


@compiled
def bags_of_ids(begins: Any) -> Any:
    """Returns the bag of each id, (V,) int64.

    Args:
        begins: where the ids of each bag begin, (G + 1,) int64.
    """
    first = begins[0]
    bags = np.empty(begins[-1] - first, np.int64)
    for bag in range(len(begins) - 1):
        for place in range(begins[bag] - first, begins[bag + 1] - first):
            bags[place] = bag
    return bags


@compiled
def move_rows(
    rule: int, weights: Any, slots: Any, sums: Any, squares: Any, means: Any, rows: Any, gradient: Any, numbers: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """Takes the step of distinct rows, and of their state.

    Args:
        rule: a `Rule`.
        weights: (slots, D) float32, which are moved.
        slots: in which of them each row lies, (U,) int64.
        sums: of `ROWWISE_ADAGRAD`, (R,) float32.
        squares: the sums of `ADAGRAD` or squares of `ADAM`, (R, D) float32.
        means: of `ADAM`, (R, D) float32.
        rows: (U,) int64.
        gradient: of each of them, (U, D) float32.
        numbers: lr, eps, 1 - beta1, beta2, 1 - beta2; float32.
        first: in `rows`, to begin with.
        last: in `rows`, to stop before.
    """
    dim = weights.shape[1]
    lr, eps, new_mean, old_square, new_square = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    # Row and column at once: a row by itself (`weights[slot]`) is counted like an object, which takes longer than moving it.
    for at in range(first, last):
        row, slot = rows[at], slots[at]
        if rule == Rule.SGD:
            for column in range(dim):
                weights[slot, column] -= lr * gradient[at, column]
        elif rule == Rule.ADAGRAD:
            for column in range(dim):
                squares[row, column] += gradient[at, column] * gradient[at, column]
                weights[slot, column] -= lr * (gradient[at, column] / (np.sqrt(squares[row, column]) + eps))
        elif rule == Rule.ROWWISE_ADAGRAD:
            squared = np.float32(0)
            for column in range(dim):
                squared += gradient[at, column] * gradient[at, column]
            sums[row] += squared / np.float32(dim)
            size = lr / (np.sqrt(sums[row]) + eps)
            for column in range(dim):
                weights[slot, column] -= size * gradient[at, column]
        else:
            for column in range(dim):
                means[row, column] += new_mean * (gradient[at, column] - means[row, column])
                square = squares[row, column] * old_square
                squares[row, column] = square + new_square * gradient[at, column] * gradient[at, column]
                weights[slot, column] -= lr * (means[row, column] / (np.sqrt(squares[row, column]) + eps))
