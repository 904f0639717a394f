"""A sort of small whole numbers by counting: quicker than any other where there are not many more of them than ids."""

from __future__ import annotations

__all__ = ["sort_by_counting"]

from typing import Any

from embedshard.compiled import compiled


@compiled
def sort_by_counting(ids: Any, counts: Any, places: Any, distinct: Any, begins: Any) -> int:
    """Sorts ids.

    Args:
        ids: (V,) int64, from 0 to R - 1.
        counts: (R,) int64, zeros; it is used up.
        places: (V,) int64; it becomes the places of the ids, ascending by id and then by place.
        distinct: (V,) int64; it begins with the distinct ids, then.
        begins: (V + 1,) int64; it begins with where those of each distinct id begin, and V.

    Returns:
        How many ids are distinct.
    """
    for place in range(len(ids)):
        counts[ids[place]] += 1
    total, found = 0, 0
    for number in range(len(counts)):
        met = counts[number]
        if met > 0:
            distinct[found], begins[found] = number, total
            found += 1
            counts[number] = total
            total += met
    begins[found] = total
    for place in range(len(ids)):
        at = counts[ids[place]]
        places[at] = place
        counts[ids[place]] = at + 1
    return found
