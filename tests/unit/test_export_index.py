"""The index of an export: which kind is chosen, what it finds, what it leaves out."""

import numpy as np
import pytest

from embedshard.errors import ConfigError, ExportError
from embedshard.evaluate.jagged import JaggedIds
from embedshard.export.index import FLAT_ITEMS, HNSW_ITEMS, build_index, choose_kind, load_index, look_up, save_index
from embedshard.storage import locate

ITEMS, DIM = 3000, 16


@pytest.mark.parametrize(
    ("asked", "count", "kind"),
    [
        ("auto", 0, "flat"),
        ("auto", FLAT_ITEMS, "flat"),
        ("auto", FLAT_ITEMS + 1, "hnsw"),
        ("auto", HNSW_ITEMS, "hnsw"),
        ("auto", HNSW_ITEMS + 1, "ivf"),
        ("flat", HNSW_ITEMS + 1, "flat"),
        ("ivf", 10, "ivf"),
    ],
)
def test_the_kind_is_chosen_by_the_number_of_items_or_named(asked, count, kind):
    assert choose_kind(asked, count) == kind


def test_an_index_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'hnsw'"):
        choose_kind("hnswf", 10)


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    items = generator.standard_normal((ITEMS, DIM)).astype(np.float32)
    return items, generator.standard_normal((40, DIM)).astype(np.float32)


def blocks_of(items):
    return lambda: iter(np.array_split(items, 7))


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_what_is_found_is_the_best_that_was_not_seen(vectors, kind, tmp_path):
    items, queries = vectors
    built, settings = build_index(kind, blocks_of(items), ITEMS, DIM, queries, 10)
    place = locate(tmp_path / "index")
    save_index(built, place)
    index = load_index(place)
    scores = queries @ items.T
    best = np.argsort(-scores, axis=1)
    lengths = np.array([number % 5 * 7 for number in range(len(queries))])
    seen = JaggedIds(
        np.concatenate([best[number, :length] for number, length in enumerate(lengths)]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    places, found_scores = look_up(index, queries, 10, seen)
    hits = 0
    for number, length in enumerate(lengths):
        assert not set(places[number]) & set(best[number, :length])
        assert found_scores[number] == pytest.approx(scores[number, places[number]], abs=1e-4)
        hits += len(set(places[number]) & set(best[number, length : length + 10]))
    assert hits == 400 if kind == "flat" else hits >= 0.95 * 400
    assert (
        set(settings)
        == {"flat": set(), "hnsw": {"neighbours", "ef_construction", "ef_search"}, "ivf": {"cells", "nprobe"}}[kind]
    )


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_lists_end_where_there_are_no_more_items(kind):
    items = np.eye(4, dtype=np.float32)
    index, _ = build_index(kind, lambda: iter([items]), 4, 4, items, 10)
    places, scores = look_up(index, items[:2], 6, JaggedIds(np.array([0, 1, 2, 3, 1]), np.array([0, 4, 5])))
    assert places[0].tolist() == [-1] * 4, "no longer than there are items"
    assert sorted(places[1].tolist()) == [-1, 0, 2, 3]
    assert np.isneginf(scores[0]).all()


def test_what_is_no_index_is_refused(tmp_path):
    (tmp_path / "index").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ExportError, match="is not an index"):
        load_index(locate(tmp_path / "index"))


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
@pytest.mark.parametrize("k", [70, 10**9, 10**30])
def test_a_list_is_no_longer_than_there_are_items(kind, k):
    vectors = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    index, _ = build_index(kind, lambda: iter([vectors]), 70, 4, vectors[:5], 5)
    seen = JaggedIds.from_pairs(np.array([1, 1]), np.array([3, 8]), 2)
    places, scores = look_up(index, vectors[:2], k, seen)
    assert places.shape == scores.shape == (2, 70)
    assert (places[1, 68:] == -1).all()
    assert not {3, 8} & set(places[1].tolist())
    if kind == "flat":
        assert set(places[0].tolist()) == set(range(70))
        assert set(places[1].tolist()) == set(range(70)) - {3, 8} | {-1}
