"""Exact retrieval metrics over the whole catalogue, in blocks of queries.

An equal score counts against the model: a relevant
item stands behind every item that is not relevant and has the same score, so a model that says the same of everything
finds nothing.

All results are numpy on the host; the scores may be made on any device. Nothing here is collective: each process ranks
its share of the queries, and `RankingSums` add up.

This module must not know models, files, processes or the config, nor what a score is made of.

Shapes: Q queries, B queries of a block, N candidates, K top-k, R relevant items of all queries.
"""

from __future__ import annotations

__all__ = [
    "CataloguePositions",
    "catalogue_positions",
    "catalogue_sums",
    "rank_catalogue",
]

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from embedshard.data.columns import offsets_of
from embedshard.evaluate.jagged import JaggedIds, check_range
from embedshard.evaluate.lists import BLOCK_BYTES, ScoreBlocks, refuse_nan, take_out, top_lists, top_values
from embedshard.evaluate.ranking import UNRANKED, IntArray, largest_k
from embedshard.evaluate.ranking_sums import BoolArray, RankingSums, ranking_metrics
from embedshard.evaluate.scores import Scores
from embedshard.evaluate.slices import ItemSlices, sliced_sums

_COPIED_ROWS: Final = 64


@dataclass(frozen=True)
class CataloguePositions:
    """Where the relevant items stand in the lists of some queries.

    Attributes:
        relevant: the relevant items that were ranked: distinct, ascending, without those that were also seen.
        positions: (R,) 1-based position of each of relevant.values; exact up to max_k, beyond it exact or UNRANKED.
        relevant_also_seen: how many relevant items were dropped since the query had seen them.
        relevant_not_recommendable: how many of `relevant` may not be recommended; they count as not found.
        covered: for each k that was asked, (N,) whether a candidate is in any query's top-k list.
        num_recommendable: how many candidates may be recommended.
    """

    relevant: JaggedIds
    positions: IntArray
    relevant_also_seen: int
    relevant_not_recommendable: int
    covered: dict[int, BoolArray]
    num_recommendable: int


def rank_catalogue(
    scores: Scores,
    relevant: JaggedIds,
    seen: JaggedIds | None,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> dict[str, float]:
    """Returns the metrics of ranking the whole catalogue, and the counts of `catalogue_sums`."""
    return catalogue_sums(scores, relevant, seen, metrics, block_bytes=block_bytes, candidate_mask=candidate_mask).result()


def catalogue_sums(
    scores: Scores,
    relevant: JaggedIds,
    seen: JaggedIds | None,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
    slices: ItemSlices | None = None,
) -> RankingSums:
    """Returns the sums of the metrics of ranking the whole catalogue for some of the queries.

    Counted are `queries`, which are averaged; `queries_without_relevant`, which are not; `relevant_also_seen`, relevant
    items that were dropped; and `relevant_not_recommendable`, relevant items that can't be found, which stay in the
    denominators.

    Args:
        scores: of Q queries and N candidates.
        relevant: the items that a good list holds, of each query.
        seen: the items that no list of the query may hold, such as those of its training rows; None for none.
        metrics: names of ranking metrics.
        block_bytes: upper limit of the matrix of a block's scores; a block has at least one query.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.
        slices: of the items, for which the sums are also kept apart; None for none.

    Raises:
        ConfigError: a metric does not exist or is pointwise.
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    parsed = ranking_metrics(metrics)
    found = catalogue_positions(
        scores,
        relevant,
        seen,
        max_k=largest_k(parsed),
        exact_best=any(metric.name == "mrr" for metric in parsed),
        coverage_at=[metric.k for metric in parsed if metric.name == "coverage" and metric.k is not None],
        block_bytes=block_bytes,
        candidate_mask=candidate_mask,
        slices=slices,
    )
    counts = {
        "relevant_also_seen": found.relevant_also_seen,
        "relevant_not_recommendable": found.relevant_not_recommendable,
    }
    sums = RankingSums.from_positions(parsed, found.positions, found.relevant.offsets, counts)
    sums.covered, sums.num_recommendable = found.covered, found.num_recommendable
    if slices is not None:
        kept = found.relevant
        sums.slices = sliced_sums(parsed, found.positions, kept.query_index, kept.num_queries, slices.of(kept.values))
    return sums


@torch.no_grad()
def catalogue_positions(
    scores: Scores,
    relevant: JaggedIds,
    seen: JaggedIds | None = None,
    *,
    max_k: int,
    exact_best: bool = False,
    coverage_at: Collection[int] = (),
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
    slices: ItemSlices | None = None,
) -> CataloguePositions:
    """Returns the position of every relevant item among all candidates that the query has not seen.

    A relevant item's position is 1 + the number of not relevant items with a score of at least its own + the number of
    the query's relevant items before it (a greater score, or the same and a smaller number).

    Args:
        scores: of Q queries and N candidates.
        relevant: of each query; repetitions count once.
        seen: of each query; None for none.
        max_k: positions up to it are exact; it may exceed N.
        exact_best: also make the best position of each query exact, at the cost of another pass over the scores.
        coverage_at: the k's for which to note the candidates that are in a top-k list. These lists hold relevant items
            too, and among equal scores prefer the smaller number. With them, queries without relevant items are scored.
        block_bytes: upper limit of the matrix of a block's scores; a block has at least one query.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.
        slices: with `exact_best`, the best position of each query among each slice's items is exact, too.

    Raises:
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    assert max_k >= 1
    assert all(1 <= k <= max_k for k in coverage_at)
    assert relevant.num_queries == scores.num_queries
    blocks = ScoreBlocks(scores, seen, candidate_mask, block_bytes)
    num_candidates = scores.num_candidates
    check_range(relevant.values, num_candidates, "relevant item")
    kept = relevant.distinct()
    num_distinct = len(kept.values)
    if seen is not None:
        kept = _without(kept, seen, num_candidates)

    covered = {k: np.zeros(num_candidates, dtype=bool) for k in coverage_at}
    positions: list[IntArray] = []
    queries = np.arange(scores.num_queries) if coverage_at else np.flatnonzero(kept.lengths)
    for block, scores_BN in blocks.of(queries):
        block_relevant = kept.pick(block)
        row_R, relevant_scores_R = take_out(scores_BN, block_relevant)
        values_BK, ids_BK = top_lists(scores_BN, max_k) if coverage_at else (top_values(scores_BN, max_k), None)
        refuse_nan(relevant_scores_R, values_BK, block, block_relevant)

        found_R = _positions(row_R, relevant_scores_R, values_BK)
        if ids_BK is not None:
            _cover(covered, values_BK, ids_BK, row_R, relevant_scores_R, block_relevant.values)
        if exact_best:
            if slices is not None:
                _rank_best_of_slices(scores_BN, row_R, relevant_scores_R, slices.of(block_relevant.values), found_R)
            _rank_best(scores_BN, row_R, relevant_scores_R, found_R)
        positions.append(found_R)  # queries that were left out have no relevant items, so this is kept's order

    return CataloguePositions(
        relevant=kept,
        positions=np.concatenate([np.empty(0, dtype=np.int64), *positions]),
        relevant_also_seen=num_distinct - len(kept.values),
        relevant_not_recommendable=int(np.isin(kept.values, blocks.banned).sum()),
        covered=covered,
        num_recommendable=num_candidates - len(blocks.banned),
    )


def _positions(row_R: IntArray, scores_R: npt.NDArray[np.floating], rest_BK: npt.NDArray[np.floating]) -> IntArray:
    """Returns the positions of the block's relevant items, UNRANKED where the K best of the rest do not tell.

    Args:
        row_R: (R,) ascending row of each relevant item.
        scores_R: (R,) its score.
        rest_BK: (B, K) the best scores among items that are not relevant, best first.
    """
    num_rows, max_k = rest_BK.shape
    ahead_R = np.zeros(len(row_R), dtype=np.int64)
    for column in range(max_k):  # a list is a few hundred at most, relevant items can be millions
        ahead_R += rest_BK[row_R, column] >= scores_R
    before_R = _relevant_before(row_R, scores_R, num_rows)
    return np.where(ahead_R < max_k, 1 + ahead_R + before_R, UNRANKED)  # behind a score of -inf are all K others


def _relevant_before(row_R: IntArray, scores_R: npt.NDArray[np.floating], num_rows: int) -> IntArray:
    """Returns how many of its row's relevant items stand before each of them."""
    order = np.lexsort((-scores_R, row_R))  # stable, so equal scores stay by ascending number
    starts = offsets_of(np.bincount(row_R, minlength=num_rows))
    before_R = np.empty(len(row_R), dtype=np.int64)
    before_R[order] = np.arange(len(row_R)) - starts[row_R]
    return before_R


def _rank_best(scores_BN: torch.Tensor, row_R: IntArray, scores_R: npt.NDArray[np.floating], positions_R: IntArray) -> None:
    """Makes the best position of each row exact, in place. It uses up the scores."""
    best_B = np.full(len(scores_BN), np.inf, dtype=scores_R.dtype)
    order = np.lexsort((-scores_R, row_R))
    best_R = order[_is_first(row_R[order])]
    best_R = best_R[(positions_R[best_R] == UNRANKED) & (scores_R[best_R] > -np.inf)]
    if len(best_R) == 0:
        return
    best_B[row_R[best_R]] = scores_R[best_R]
    ahead_B = _count_at_least(scores_BN, torch.from_numpy(best_B).to(scores_BN.device))
    positions_R[best_R] = 1 + ahead_B[row_R[best_R]]


def _rank_best_of_slices(
    scores_BN: torch.Tensor,
    row_R: IntArray,
    scores_R: npt.NDArray[np.floating],
    slice_R: IntArray,
    positions_R: IntArray,
) -> None:
    """Makes the best position of each row's items of each slice exact, in place, but the row's own best."""
    before_R = _relevant_before(row_R, scores_R, len(scores_BN))
    order = np.lexsort((before_R, slice_R, row_R))
    best_R = order[_is_first(row_R[order] * len(ItemSlices.names) + slice_R[order])]
    best_R = best_R[(positions_R[best_R] == UNRANKED) & (scores_R[best_R] > -np.inf) & (before_R[best_R] > 0)]
    for start in range(0, len(best_R), _COPIED_ROWS):
        part_R = best_R[start : start + _COPIED_ROWS]
        copied = scores_BN[torch.from_numpy(row_R[part_R]).to(scores_BN.device)]
        ahead = _count_at_least(copied, torch.from_numpy(scores_R[part_R]).to(scores_BN.device))
        positions_R[part_R] = 1 + ahead + before_R[part_R]


def _is_first(keys: IntArray) -> BoolArray:
    """Returns whether each key differs from the one before it."""
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return is_first


def _count_at_least(scores_BN: torch.Tensor, least_B: torch.Tensor) -> IntArray:
    """Returns how many scores of each row are at least so great. It uses up the scores."""
    scores_BN.ge_(least_B[:, None])
    is_exact = scores_BN.shape[1] < 2**24  # float32 counts no further
    return scores_BN.sum(dim=1, dtype=None if is_exact else torch.float64).cpu().numpy().astype(np.int64)


def _cover(
    covered: dict[int, BoolArray],
    rest_BK: npt.NDArray[np.floating],
    rest_ids_BK: IntArray,
    row_R: IntArray,
    scores_R: npt.NDArray[np.floating],
    relevant_R: IntArray,
) -> None:
    """Notes which candidates the block's top-k lists hold: the best of the rest and of the relevant items together."""
    num_rows, max_k = rest_BK.shape
    row = np.concatenate([np.repeat(np.arange(num_rows), max_k), row_R])
    ids = np.concatenate([rest_ids_BK.ravel(), relevant_R])
    scores = np.concatenate([rest_BK.ravel(), scores_R])
    order = np.lexsort((ids, -scores, row))
    row, ids, scores = row[order], ids[order], scores[order]
    place = np.arange(len(row)) - offsets_of(np.bincount(row, minlength=num_rows))[row]
    for k, mask in covered.items():
        mask[ids[(place < k) & (scores > -np.inf)]] = True


def _without(items: JaggedIds, seen: JaggedIds, num_candidates: int) -> JaggedIds:
    """Returns `items`, whose lists ascend, without those that the same query's list in `seen` holds."""
    keys = items.query_index * num_candidates + items.values
    seen_keys = seen.query_index * num_candidates + seen.values
    is_seen = np.zeros(len(keys), dtype=bool)
    if len(keys):
        places = np.searchsorted(keys, seen_keys).clip(max=len(keys) - 1)
        is_seen[places[keys[places] == seen_keys]] = True
    lengths = np.bincount(items.query_index[~is_seen], minlength=items.num_queries)
    return JaggedIds(items.values[~is_seen], offsets_of(lengths))
