"""The FAISS index of the items: which kind, how it is built a block at a time, and how lists are looked up in it.

It looks for the greatest inner products: a score is one. A number in it is an item's place in the items' file.

Shapes: Q queries, N items, D dim, K length of the lists.
"""

from __future__ import annotations

__all__ = ["FLAT_ITEMS", "HNSW_ITEMS", "KINDS", "Kind", "build_index", "choose_kind", "load_index", "look_up", "save_index"]

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, get_args

import faiss
import numpy as np
import numpy.typing as npt

from embedshard.errors import ConfigError, ExportError, nearest
from embedshard.evaluate.jagged import JaggedIds
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Kind = Literal["flat", "hnsw", "ivf"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
FLAT_ITEMS: Final = 50_000
"""Up to so many items all are looked at: it is exact, and takes milliseconds."""
HNSW_ITEMS: Final = 1_000_000
"""Up to so many items the graph, 260 bytes an item, is small beside what it saves; for more they are put into cells."""

_NEIGHBOURS: Final = 32
_POINTS_PER_CELL: Final = 39  # below it FAISS warns that cells are not trained well
_TRAINED_POINTS_PER_CELL: Final = 128
_WANTED_RECALL: Final = 0.99
_MOST_EFFORT: Final = 4096
_SLACK: Final = 0.005


def choose_kind(asked: str, num_items: int) -> Kind:
    """Returns the kind of index that is asked for; of `auto`, by the number of items.

    Raises:
        ConfigError: if there is no such kind.
    """
    if asked == "auto":
        return "flat" if num_items <= FLAT_ITEMS else "hnsw" if num_items <= HNSW_ITEMS else "ivf"
    for kind in KINDS:
        if asked == kind:
            return kind
    raise ConfigError(f"--index {asked}: there is no such index. {nearest(asked, ['auto', *KINDS])}")


def build_index(
    kind: Kind, blocks: Callable[[], Iterator[FloatArray]], num_items: int, dim: int, queries: FloatArray, k: int
) -> tuple[Any, dict[str, int]]:
    """Builds an index, and sets how hard it looks so that it finds 99 % of the exact lists of some queries.

    Args:
        kind: of the index.
        blocks: yields all vectors, (n, D) at a time, in order, as often as it is called.
        num_items: N.
        dim: D.
        queries: (Q, D) for which it is set.
        k: length of their lists.

    Returns:
        The index, and its settings by name.
    """
    settings: dict[str, int] = {}
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        settings = {"neighbours": _NEIGHBOURS, "ef_construction": 200}
    else:
        cells = max(1, min(int(4 * num_items**0.5), num_items // _POINTS_PER_CELL))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(blocks(), num_items, cells * _TRAINED_POINTS_PER_CELL))
        settings = {"cells": cells}
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    if kind != "flat" and len(queries) and num_items:
        settings |= _set_effort(kind, index, blocks, queries, min(k, num_items))
    return index, settings


def look_up(index: Any, queries: FloatArray, k: int, seen: JaggedIds | None = None) -> tuple[IntArray, FloatArray]:
    """Returns the k best items of each query that it has not seen, as far as the index finds them.

    Args:
        index: of N items.
        queries: (Q, D).
        k: length of the lists, N at most: a longer one is cut to that.
        seen: places that a query's list may not hold; as many more are looked for.

    Returns:
        places (Q, K) and scores (Q, K), best first; -1 and -inf where there are no more.
    """
    k = min(k, index.ntotal)
    places_QK = np.full((len(queries), k), -1, dtype=np.int64)
    scores_QK = np.full((len(queries), k), -np.inf, dtype=np.float32)
    extra = np.zeros(len(queries), dtype=np.int64) if seen is None else seen.lengths
    # Queries that have seen about as much are looked up together, so that one who has seen all makes no long lists for all.
    widths = np.minimum(k + np.where(extra > 0, 2 ** np.ceil(np.log2(np.maximum(extra, 1))), 0), max(index.ntotal, 1))
    for width in np.unique(widths).astype(int).tolist():
        numbers = np.flatnonzero(widths == width)
        found_scores, found = index.search(np.ascontiguousarray(queries[numbers]), width, params=_effort(index, width))
        for row, number in enumerate(numbers.tolist()):
            kept = found[row] >= 0
            if seen is not None:
                kept &= ~np.isin(found[row], seen.values[seen.offsets[number] : seen.offsets[number + 1]])
            best = np.flatnonzero(kept)[:k]
            places_QK[number, : len(best)] = found[row][best]
            scores_QK[number, : len(best)] = found_scores[row][best]
    return places_QK, scores_QK


def save_index(index: Any, place: Location) -> None:
    """Writes an index."""
    place.write_bytes_atomically(memoryview(faiss.serialize_index(index)))  # type: ignore[arg-type]  # bytes, uncopied


def load_index(place: Location) -> Any:
    """Reads an index.

    Raises:
        ExportError: if it is none.
    """
    try:
        return faiss.deserialize_index(np.frombuffer(place.read_bytes(), dtype=np.uint8))
    except RuntimeError as error:
        raise ExportError(f"{place.uri} is not an index that FAISS reads: {error}. Export the run again.") from error


def _effort(index: Any, width: int) -> Any:
    """Returns how hard to look for lists of a length: a graph finds no more than it keeps in mind."""
    if not isinstance(index, faiss.IndexHNSW):
        return None
    return faiss.SearchParametersHNSW(efSearch=max(index.hnsw.efSearch, width))


def _set_effort(
    kind: Kind, index: Any, blocks: Callable[[], Iterator[FloatArray]], queries: FloatArray, k: int
) -> dict[str, int]:
    exact = faiss.IndexFlatIP(index.d)
    best_scores, best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    first = 0
    for block in blocks():  # one at a time: the exact lists without a second index of all
        exact.reset()
        exact.add(np.ascontiguousarray(block))
        scores, places = exact.search(queries, min(k, len(block)))
        best_scores, best = np.hstack([best_scores, scores]), np.hstack([best, places + first])
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
        best_scores, best = np.take_along_axis(best_scores, order, 1), np.take_along_axis(best, order, 1)
        first += len(block)
    name, most, effort = ("nprobe", index.nlist, 1) if kind == "ivf" else ("ef_search", _MOST_EFFORT, 16)
    recalls: dict[int, float] = {}
    while True:
        _look_as_hard(kind, index, effort)
        found, _ = look_up(index, queries, k)
        recalls[effort] = float(np.mean([np.isin(best[row], found[row]).mean() for row in range(len(queries))]))
        if recalls[effort] >= _WANTED_RECALL or effort == most:
            break
        effort = min(2 * effort, most)
    # Where more no longer helps, as in a graph that does not lead everywhere, the least that finds as much.
    enough = min(_WANTED_RECALL, max(recalls.values()) - _SLACK)
    effort = next(effort for effort, recall in recalls.items() if recall >= enough)
    _look_as_hard(kind, index, effort)
    return {name: effort}


def _look_as_hard(kind: Kind, index: Any, effort: int) -> None:
    if kind == "ivf":
        index.nprobe = effort
    else:
        index.hnsw.efSearch = effort


def _sample(blocks: Iterator[FloatArray], num_items: int, wanted: int) -> FloatArray:
    """Returns vectors at even distances, about as many as wanted."""
    step, first, taken = max(1, num_items // max(1, wanted)), 0, []
    for block in blocks:
        taken.append(block[-first % step :: step])
        first += len(block)
    return np.ascontiguousarray(np.concatenate(taken))
