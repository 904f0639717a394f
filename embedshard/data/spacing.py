"""Which row groups stand for all."""

from __future__ import annotations

__all__ = ["evenly_spaced"]

from collections.abc import Sequence


def evenly_spaced(group_rows: Sequence[int], limit: int) -> set[int]:
    """Returns the numbers of row groups that lie evenly spaced and have about `limit` rows together.

    All where they have no more than that; at least one, unless the limit is 0.
    """
    total, num_groups = sum(group_rows), len(group_rows)
    if limit == 0:
        return set()
    if total <= limit:
        return set(range(num_groups))
    num_chosen = max(1, num_groups * limit // total)
    return {(2 * i + 1) * num_groups // (2 * num_chosen) for i in range(num_chosen)}
