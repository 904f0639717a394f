"""Counts of lookups against a Counter."""

from collections import Counter

import numpy as np
import pytest

from embedshard.data import id_counts
from embedshard.data.id_counts import IdCounts
from embedshard.data.spacing import evenly_spaced


@pytest.mark.parametrize("pending", [1, 40, 2**22])
@pytest.mark.parametrize("dense_rows", [0, 2**22])
@pytest.mark.parametrize("num_rows", [3, 60, 10**12])
def test_lookups_are_counted_exactly_in_every_way(monkeypatch, num_rows, dense_rows, pending):
    monkeypatch.setattr(id_counts, "_DENSE_ROWS", dense_rows)
    monkeypatch.setattr(id_counts, "_PENDING_IDS", pending)
    rng = np.random.default_rng(num_rows % 97)
    counts, expected = IdCounts("items", num_rows), Counter()
    for size in (0, 90, 1, 33):
        rows = np.minimum(rng.zipf(1.3, size) - 2, num_rows)
        counts.add(rows)
        expected.update(row for row in rows.tolist() if row >= 0)
    found = counts.result()
    assert found.table == "items"
    assert found.lookups == sum(expected.values()) > 50
    assert found.unknown == expected[num_rows]
    assert found.distinct_rows == len(expected)
    assert found.hottest == sorted(expected.items(), key=lambda pair: (-pair[1], pair[0]))[:10]


def test_a_feature_without_lookups_has_no_hottest_row():
    for num_rows in (0, 5, 2**40):
        found = IdCounts("items", num_rows).result()
        assert (found.lookups, found.unknown, found.distinct_rows, found.hottest) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("group_rows", "limit", "expected"),
    [
        ([10] * 6, 0, set()),
        ([10] * 6, 60, {0, 1, 2, 3, 4, 5}),
        ([10] * 6, 59, {0, 1, 3, 4, 5}),
        ([10] * 6, 30, {1, 3, 5}),
        ([10] * 6, 20, {1, 4}),
        ([10] * 6, 1, {3}),
        ([7], 3, {0}),
        ([], 3, set()),
    ],
)
def test_the_row_groups_that_are_counted_lie_evenly(group_rows, limit, expected):
    assert evenly_spaced(group_rows, limit) == expected
