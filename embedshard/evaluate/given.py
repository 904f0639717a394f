"""Exact retrieval metrics over candidates that are given: one positive among its query's negatives.

An equal score counts against the model, as in `retrieval.py`. Nothing here is collective.

Shapes: Q queries, B queries of a block, V negatives of a block.
"""

from __future__ import annotations

__all__ = ["candidate_sums", "rank_candidates"]

from collections.abc import Sequence

import numpy as np
import torch

from embedshard.errors import ConfigError
from embedshard.evaluate.jagged import JaggedIds, check_range
from embedshard.evaluate.lists import BLOCK_BYTES
from embedshard.evaluate.ranking import IntArray
from embedshard.evaluate.ranking_sums import RankingSums, ranking_metrics
from embedshard.evaluate.scores import Scores, nan_score
from embedshard.evaluate.slices import ItemSlices, sliced_sums


def rank_candidates(
    scores: Scores,
    positive_Q: IntArray,
    candidates: JaggedIds,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Returns the metrics of ranking one positive among given negatives, and the counts of `candidate_sums`."""
    return candidate_sums(scores, positive_Q, candidates, metrics, block_bytes=block_bytes).result()


@torch.no_grad()
def candidate_sums(
    scores: Scores,
    positive_Q: IntArray,
    candidates: JaggedIds,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    slices: ItemSlices | None = None,
) -> RankingSums:
    """Returns the sums of the metrics of ranking one positive among given negatives, for some of the queries.

    The protocol of NCF (He et al. 2017). The positive's position is 1 + the number of negatives with a score of at
    least its own. A negative that is the positive itself is ignored, and counted as `ignored_negatives`; one that is
    listed twice counts twice; a query without any other negative has position 1, and is counted as one of
    `queries_without_negatives`.

    Args:
        scores: of Q queries and all candidates.
        positive_Q: (Q,) the item that each query's list should hold.
        candidates: the negatives of each query.
        metrics: names of ranking metrics other than coverage, which given candidates say nothing about.
        block_bytes: upper limit of what a block takes; a block has at least one query.
        slices: of the items, for which the sums are also kept apart; None for none.

    Raises:
        ConfigError: a metric does not exist, is pointwise, or is coverage.
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    parsed = ranking_metrics(metrics)
    for metric in parsed:
        if metric.name == "coverage":
            raise ConfigError(
                f"metric '{metric}' looks at lists over the whole catalogue, but candidates are given. Leave it out, "
                "or rank the whole catalogue."
            )
    positive_Q = np.asarray(positive_Q, np.int64)
    num_queries = scores.num_queries
    assert positive_Q.shape == (num_queries,)
    assert candidates.num_queries == num_queries
    check_range(positive_Q, scores.num_candidates, "positive item")
    check_range(candidates.values, scores.num_candidates, "negative item")

    # Each query's positive stands before its negatives, so that they are all scored alike.
    offsets = candidates.offsets + np.arange(num_queries + 1)
    pairs_a_block = max(1, block_bytes // scores.pair_bytes)
    positions_Q = np.empty(num_queries, dtype=np.int64)
    queries_without_negatives, ignored = 0, 0
    start = 0
    while start < num_queries:
        stop = int(np.searchsorted(offsets, offsets[start] + pairs_a_block, side="right")) - 1
        stop = min(max(stop, start + 1), num_queries)
        block = candidates.span(start, stop)
        row_V = block.query_index
        positive_B = positive_Q[start:stop]
        queries = np.concatenate([np.arange(stop - start), row_V]) + start
        ids = np.concatenate([positive_B, block.values])
        found = scores.of_pairs(queries, ids).cpu().numpy()
        if np.isnan(found).any():
            at = int(np.flatnonzero(np.isnan(found))[0])
            raise nan_score(int(queries[at]), int(ids[at]))
        positive_scores_B, scores_V = found[: stop - start], found[stop - start :]
        is_other_V = block.values != positive_B[row_V]
        ahead_V = is_other_V & (scores_V >= positive_scores_B[row_V])
        positions_Q[start:stop] = 1 + np.bincount(row_V[ahead_V], minlength=stop - start)
        queries_without_negatives += int((np.bincount(row_V[is_other_V], minlength=stop - start) == 0).sum())
        ignored += int((~is_other_V).sum())
        start = stop
    counts = {"queries_without_negatives": queries_without_negatives, "ignored_negatives": ignored}
    each = np.arange(num_queries + 1)
    sums = RankingSums.from_positions(parsed, positions_Q, each, counts)
    if slices is not None:
        sums.slices = sliced_sums(parsed, positions_Q, each[:-1], num_queries, slices.of(positive_Q))
    return sums
