"""Exact retrieval metrics: over the whole catalogue in blocks of queries, or over candidates that are given.

A score is a dot product; biases are appended to the vectors by the caller. Never more than a block of the queries x
candidates matrix exists. An equal score counts against the model: a relevant item stands behind every item that is not
relevant and has the same score, so a model that says the same of everything finds nothing. Every score that is compared
with another comes out of one matrix product, and candidates with identical vectors are given identical scores, which a
matrix product alone does not promise: its kernels round differently at the edges.

What is left out of a list (seen items, candidates that may not be recommended) has the score -inf there, and an item of
score -inf is never listed. All results are numpy on the host; the vectors may lie on any device. Nothing here is
collective: each process ranks its share of the queries, and `RankingSums` add up.

This module must not know models, files, processes or the config.

Shapes: Q queries, B queries of a block, N candidates, D dim, K top-k, R relevant items of all queries, V values of
jagged data.
"""

from __future__ import annotations

__all__ = [
    "CataloguePositions",
    "JaggedIds",
    "RankingSums",
    "candidate_sums",
    "catalogue_positions",
    "catalogue_sums",
    "rank_candidates",
    "rank_catalogue",
    "topk",
]

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from embedshard.errors import ConfigError, DataError, TrainingError
from embedshard.evaluate.ranking import UNRANKED, IntArray, Metric, largest_k, metric_values, parse_metric

BoolArray = npt.NDArray[np.bool_]

BLOCK_BYTES: Final = 256 * 2**20
_HASH_ROWS: Final = 2**16


@dataclass(frozen=True)
class JaggedIds:
    """A list of candidate numbers for each query.

    Attributes:
        values: (V,) int64, all lists one after another.
        offsets: (Q + 1,) int64, where each query's list begins, from 0 to V.
    """

    values: IntArray
    offsets: IntArray

    def __post_init__(self) -> None:
        assert self.values.ndim == 1
        assert self.offsets.ndim == 1
        assert len(self.offsets) >= 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.values)
        assert (np.diff(self.offsets) >= 0).all()

    @classmethod
    def from_pairs(cls, query_index: IntArray, item_index: IntArray, num_queries: int) -> JaggedIds:
        """Returns the lists of pairs (query, item) that come in any order: ascending, and each pair once.

        Args:
            query_index: (V,) numbers below num_queries.
            item_index: (V,) candidate numbers.
            num_queries: Q; a query without pairs has an empty list.

        Raises:
            DataError: a query number is outside of 0 .. num_queries - 1.
        """
        query_index, item_index = np.asarray(query_index, np.int64), np.asarray(item_index, np.int64)
        assert query_index.shape == item_index.shape
        _check_range(query_index, num_queries, "query")
        order = np.lexsort((item_index, query_index))
        queries, items = query_index[order], item_index[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (queries[1:] != queries[:-1]) | (items[1:] != items[:-1])
        return cls(items[is_first], _offsets(np.bincount(queries[is_first], minlength=num_queries)))

    @property
    def num_queries(self) -> int:
        """How many lists there are."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """The (Q,) lengths of the lists."""
        return np.diff(self.offsets)

    @property
    def query_index(self) -> IntArray:
        """The (V,) number of the query that each value belongs to."""
        return np.repeat(np.arange(self.num_queries), self.lengths)

    def span(self, start: int, stop: int) -> JaggedIds:
        """Returns the lists of the queries start .. stop - 1."""
        offsets = self.offsets[start : stop + 1]
        return JaggedIds(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def pick(self, queries: IntArray) -> JaggedIds:
        """Returns the lists of the given queries, in their order."""
        offsets = _offsets(self.lengths[queries])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[queries] - offsets[:-1], np.diff(offsets))
        return JaggedIds(self.values[places], offsets)

    def distinct(self) -> JaggedIds:
        """Returns the lists ascending and without repetitions."""
        return JaggedIds.from_pairs(self.query_index, self.values, self.num_queries)


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


@dataclass
class RankingSums:
    """Sums from which ranking metrics follow; parts of the queries are added in any order.

    Attributes:
        metrics: in the order of the result.
        sums: each metric's sum over queries, without coverage.
        counts: what was counted beside them; `queries` are those that are averaged.
        covered: for each k of a coverage metric, (N,) whether a candidate was in a list.
        num_recommendable: how many candidates could have been in a list.
    """

    metrics: tuple[Metric, ...]
    sums: dict[str, float]
    counts: dict[str, int]
    covered: dict[int, BoolArray] = field(default_factory=dict)
    num_recommendable: int = 0

    @classmethod
    def from_positions(
        cls, metrics: Sequence[Metric], positions_R: IntArray, offsets: IntArray, counts: dict[str, int]
    ) -> RankingSums:
        """Returns the sums of the queries whose relevant items have these positions (see `metric_values`)."""
        sums = {
            str(metric): float(np.nansum(metric_values(metric, positions_R, offsets)))
            for metric in metrics
            if metric.name != "coverage"
        }
        num_relevant_Q = np.diff(offsets)
        queries = int((num_relevant_Q > 0).sum())
        return cls(
            tuple(metrics),
            sums,
            {"queries": queries, "queries_without_relevant": len(num_relevant_Q) - queries} | counts,
        )

    def add(self, other: RankingSums) -> None:
        """Adds the sums of other queries, ranked over the same candidates."""
        assert (self.metrics, self.num_recommendable) == (other.metrics, other.num_recommendable)
        assert self.counts.keys() == other.counts.keys()
        self.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        self.counts = {name: value + other.counts[name] for name, value in self.counts.items()}
        self.covered = {k: mask | other.covered[k] for k, mask in self.covered.items()}

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name, and the counts.

        A metric is the mean over the queries that have relevant items, nan where there are none; coverage is a share of
        the candidates that may be recommended, over the lists of all queries.
        """
        values: dict[str, float] = {}
        queries = self.counts["queries"]
        for metric in self.metrics:
            if metric.name == "coverage":
                assert metric.k is not None
                whole, part = self.num_recommendable, float(self.covered[metric.k].sum())
            else:
                whole, part = queries, self.sums[str(metric)]
            values[str(metric)] = part / whole if whole else float("nan")
        return values | self.counts


def rank_catalogue(
    query_QD: torch.Tensor,
    candidate_ND: torch.Tensor,
    relevant: JaggedIds,
    seen: JaggedIds | None,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> dict[str, float]:
    """Returns the metrics of ranking the whole catalogue, and the counts of `catalogue_sums`."""
    sums = catalogue_sums(
        query_QD, candidate_ND, relevant, seen, metrics, block_bytes=block_bytes, candidate_mask=candidate_mask
    )
    return sums.result()


def catalogue_sums(
    query_QD: torch.Tensor,
    candidate_ND: torch.Tensor,
    relevant: JaggedIds,
    seen: JaggedIds | None,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> RankingSums:
    """Returns the sums of the metrics of ranking the whole catalogue for some of the queries.

    Counted are `queries`, which are averaged; `queries_without_relevant`, which are not; `relevant_also_seen`, relevant
    items that were dropped; and `relevant_not_recommendable`, relevant items that can't be found, which stay in the
    denominators.

    Args:
        query_QD: (Q, D) floats.
        candidate_ND: (N, D) floats on the same device.
        relevant: the items that a good list holds, of each query.
        seen: the items that no list of the query may hold, such as those of its training rows; None for none.
        metrics: names of ranking metrics.
        block_bytes: upper limit of the matrix of a block's scores; a block has at least one query.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.

    Raises:
        ConfigError: a metric does not exist or is pointwise.
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    parsed = _ranking_metrics(metrics)
    found = catalogue_positions(
        query_QD,
        candidate_ND,
        relevant,
        seen,
        max_k=largest_k(parsed),
        exact_best=any(metric.name == "mrr" for metric in parsed),
        coverage_at=[metric.k for metric in parsed if metric.name == "coverage" and metric.k is not None],
        block_bytes=block_bytes,
        candidate_mask=candidate_mask,
    )
    counts = {
        "relevant_also_seen": found.relevant_also_seen,
        "relevant_not_recommendable": found.relevant_not_recommendable,
    }
    sums = RankingSums.from_positions(parsed, found.positions, found.relevant.offsets, counts)
    sums.covered, sums.num_recommendable = found.covered, found.num_recommendable
    return sums


@torch.no_grad()
def catalogue_positions(
    query_QD: torch.Tensor,
    candidate_ND: torch.Tensor,
    relevant: JaggedIds,
    seen: JaggedIds | None = None,
    *,
    max_k: int,
    exact_best: bool = False,
    coverage_at: Collection[int] = (),
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> CataloguePositions:
    """Returns the position of every relevant item among all candidates that the query has not seen.

    A relevant item's position is 1 + the number of not relevant items with a score of at least its own + the number of
    the query's relevant items before it (a greater score, or the same and a smaller number).

    Args:
        query_QD: (Q, D) floats.
        candidate_ND: (N, D) floats on the same device.
        relevant: of each query; repetitions count once.
        seen: of each query; None for none.
        max_k: positions up to it are exact; it may exceed N.
        exact_best: also make the best position of each query exact, at the cost of another pass over the scores.
        coverage_at: the k's for which to note the candidates that are in a top-k list. These lists hold relevant items
            too, and among equal scores prefer the smaller number. With them, queries without relevant items are scored.
        block_bytes: upper limit of the matrix of a block's scores; a block has at least one query.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.

    Raises:
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    assert max_k >= 1
    assert all(1 <= k <= max_k for k in coverage_at)
    assert relevant.num_queries == len(query_QD)
    scorer = _BlockScorer(query_QD, candidate_ND, seen, candidate_mask, block_bytes)
    num_candidates = len(candidate_ND)
    _check_range(relevant.values, num_candidates, "relevant item")
    kept = relevant.distinct()
    num_distinct = len(kept.values)
    if seen is not None:
        kept = _without(kept, seen, num_candidates)

    covered = {k: np.zeros(num_candidates, dtype=bool) for k in coverage_at}
    positions: list[IntArray] = []
    queries = np.arange(len(query_QD)) if coverage_at else np.flatnonzero(kept.lengths)
    for block, scores_BN in scorer.blocks(queries):
        block_relevant = kept.pick(block)
        row_R, relevant_scores_R = _take_out(scores_BN, block_relevant)
        values_BK, ids_BK = _top_lists(scores_BN, max_k) if coverage_at else (_top_values(scores_BN, max_k), None)
        _refuse_nan(relevant_scores_R, values_BK, block, block_relevant)

        found_R = _positions(row_R, relevant_scores_R, values_BK)
        if ids_BK is not None:
            _cover(covered, values_BK, ids_BK, row_R, relevant_scores_R, block_relevant.values)
        if exact_best:
            _rank_best(scores_BN, row_R, relevant_scores_R, found_R)
        positions.append(found_R)  # queries that were left out have no relevant items, so this is kept's order

    return CataloguePositions(
        relevant=kept,
        positions=np.concatenate([np.empty(0, dtype=np.int64), *positions]),
        relevant_also_seen=num_distinct - len(kept.values),
        relevant_not_recommendable=int(np.isin(kept.values, scorer.banned).sum()),
        covered=covered,
        num_recommendable=num_candidates - len(scorer.banned),
    )


@torch.no_grad()
def topk(
    query_QD: torch.Tensor,
    candidate_ND: torch.Tensor,
    k: int,
    seen: JaggedIds | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> tuple[IntArray, npt.NDArray[np.floating]]:
    """Returns the k best candidates of every query, exactly.

    Args:
        query_QD: (Q, D) floats.
        candidate_ND: (N, D) floats on the same device.
        k: length of the lists, at least 1; it may exceed N.
        seen: items that the query's list may not hold; None for none.
        block_bytes: upper limit of the matrix of a block's scores; a block has at least one query.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.

    Returns:
        ids (Q, k) int64 and scores (Q, k), best first, equal scores by ascending id. Where a query has fewer than k
        candidates left, the rest of its ids is -1 with scores of -inf.

    Raises:
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    assert k >= 1
    scorer = _BlockScorer(query_QD, candidate_ND, seen, candidate_mask, block_bytes)
    ids_QK = np.full((len(query_QD), k), -1, dtype=np.int64)
    scores_QK = np.full((len(query_QD), k), -np.inf, dtype=np.float64 if scorer.is_double else np.float32)
    for block, scores_BN in scorer.blocks(np.arange(len(query_QD))):
        values_BK, ids_BK = _top_lists(scores_BN, k)
        _refuse_nan(np.empty(0), values_BK, block, None)
        ids_QK[block], scores_QK[block] = ids_BK, values_BK
    return ids_QK, scores_QK


def rank_candidates(
    query_QD: torch.Tensor,
    positive_Q: IntArray,
    candidates: JaggedIds,
    candidate_ND: torch.Tensor,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Returns the metrics of ranking one positive among given negatives, and the counts of `candidate_sums`."""
    return candidate_sums(query_QD, positive_Q, candidates, candidate_ND, metrics, block_bytes=block_bytes).result()


@torch.no_grad()
def candidate_sums(
    query_QD: torch.Tensor,
    positive_Q: IntArray,
    candidates: JaggedIds,
    candidate_ND: torch.Tensor,
    metrics: Sequence[str],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> RankingSums:
    """Returns the sums of the metrics of ranking one positive among given negatives, for some of the queries.

    The protocol of NCF (He et al. 2017). The positive's position is 1 + the number of negatives with a score of at
    least its own. A negative that is the positive itself is ignored, and counted as `ignored_negatives`; one that is
    listed twice counts twice; a query without any other negative has position 1, and is counted as one of
    `queries_without_negatives`.

    Args:
        query_QD: (Q, D) floats.
        positive_Q: (Q,) the item that each query's list should hold.
        candidates: the negatives of each query.
        candidate_ND: (N, D) floats on the same device.
        metrics: names of ranking metrics other than coverage, which given candidates say nothing about.
        block_bytes: upper limit of a block's vectors; a block has at least one query.

    Raises:
        ConfigError: a metric does not exist, is pointwise, or is coverage.
        DataError: an item's number is outside of the catalogue.
        TrainingError: a score is nan.
    """
    parsed = _ranking_metrics(metrics)
    for metric in parsed:
        if metric.name == "coverage":
            raise ConfigError(
                f"metric '{metric}' looks at lists over the whole catalogue, but candidates are given. Leave it out, "
                "or rank the whole catalogue."
            )
    positive_Q = np.asarray(positive_Q, np.int64)
    num_queries = len(query_QD)
    assert positive_Q.shape == (num_queries,)
    assert candidates.num_queries == num_queries
    _check_range(positive_Q, len(candidate_ND), "positive item")
    _check_range(candidates.values, len(candidate_ND), "negative item")
    dtype = _score_dtype(query_QD, candidate_ND)
    device = candidate_ND.device

    # Each query's positive stands before its negatives, so that one kernel scores them all alike.
    offsets = candidates.offsets + np.arange(num_queries + 1)
    pairs_a_block = max(1, block_bytes // (3 * max(1, query_QD.shape[1]) * dtype.itemsize))
    positions_Q = np.empty(num_queries, dtype=np.int64)
    queries_without_negatives, ignored = 0, 0
    start = 0
    while start < num_queries:
        stop = int(np.searchsorted(offsets, offsets[start] + pairs_a_block, side="right")) - 1
        stop = min(max(stop, start + 1), num_queries)
        block = candidates.span(start, stop)
        row_V = block.query_index
        positive_B = positive_Q[start:stop]
        rows = torch.from_numpy(np.concatenate([np.arange(stop - start), row_V]) + start).to(device)
        ids = torch.from_numpy(np.concatenate([positive_B, block.values])).to(device)
        products = candidate_ND[ids].to(dtype)
        products.mul_(query_QD[rows])
        scores = products.sum(dim=1).cpu().numpy()
        if np.isnan(scores).any():
            at = int(np.flatnonzero(np.isnan(scores))[0])
            raise _nan_score(int(rows[at]), int(ids[at]))
        positive_scores_B, scores_V = scores[: stop - start], scores[stop - start :]
        is_other_V = block.values != positive_B[row_V]
        ahead_V = is_other_V & (scores_V >= positive_scores_B[row_V])
        positions_Q[start:stop] = 1 + np.bincount(row_V[ahead_V], minlength=stop - start)
        queries_without_negatives += int((np.bincount(row_V[is_other_V], minlength=stop - start) == 0).sum())
        ignored += int((~is_other_V).sum())
        start = stop
    counts = {"queries_without_negatives": queries_without_negatives, "ignored_negatives": ignored}
    return RankingSums.from_positions(parsed, positions_Q, np.arange(num_queries + 1), counts)


class _BlockScorer:
    """Scores blocks of queries against all candidates into one reused matrix, with what may not be listed at -inf."""

    def __init__(
        self,
        query_QD: torch.Tensor,
        candidate_ND: torch.Tensor,
        seen: JaggedIds | None,
        candidate_mask: torch.Tensor | BoolArray | None,
        block_bytes: int,
    ) -> None:
        assert query_QD.ndim == candidate_ND.ndim == 2
        assert query_QD.shape[1] == candidate_ND.shape[1]
        assert query_QD.device == candidate_ND.device
        dtype = _score_dtype(query_QD, candidate_ND)
        self.is_double = dtype == torch.float64
        self.query_QD = query_QD
        self.candidate_ND = candidate_ND.to(dtype)
        self.seen = seen
        num_candidates = len(candidate_ND)
        if seen is not None:
            assert seen.num_queries == len(query_QD)
            _check_range(seen.values, num_candidates, "seen item")
        if candidate_mask is None:
            self.banned = np.empty(0, dtype=np.int64)
        else:
            mask = torch.as_tensor(candidate_mask).cpu().numpy()
            assert mask.shape == (num_candidates,)
            assert mask.dtype == np.bool_
            self.banned = np.flatnonzero(~mask)
        self._banned = torch.from_numpy(self.banned).to(candidate_ND.device)
        self._copies, self._originals = _repeated_vectors(self.candidate_ND)
        self._rows = max(1, block_bytes // max(1, num_candidates * dtype.itemsize))

    def blocks(self, queries: IntArray) -> Iterator[tuple[IntArray, torch.Tensor]]:
        """Yields the numbers of some of `queries`, and their (B, N) scores, valid until the next block."""
        device, dtype = self.candidate_ND.device, self.candidate_ND.dtype
        size = (min(self._rows, len(queries)), len(self.candidate_ND))
        buffer = torch.empty(size, dtype=dtype, device=device)
        for start in range(0, len(queries), self._rows):
            block = queries[start : start + self._rows]
            query_BD = self.query_QD[torch.from_numpy(block).to(device)].to(dtype)
            scores_BN = buffer[: len(block)]
            torch.mm(query_BD, self.candidate_ND.T, out=scores_BN)
            if len(self._copies):
                scores_BN[:, self._copies] = scores_BN[:, self._originals]
            if self.seen is not None:
                block_seen = self.seen.pick(block)
                _, seen_scores = _take_out(scores_BN, block_seen)
                _refuse_nan(seen_scores, np.empty((0, 0)), block, block_seen)
            if len(self._banned):
                scores_BN[:, self._banned] = -torch.inf
            yield block, scores_BN


def _take_out(scores_BN: torch.Tensor, items: JaggedIds) -> tuple[IntArray, npt.NDArray[np.floating]]:
    """Returns the row and the score of each of the block's items, and leaves -inf in their places."""
    row = items.query_index
    rows, columns = (torch.from_numpy(index).to(scores_BN.device) for index in (row, items.values))
    scores = scores_BN[rows, columns]
    scores_BN[rows, columns] = -torch.inf
    return row, scores.cpu().numpy()


def _top_values(scores_BN: torch.Tensor, k: int) -> npt.NDArray[np.floating]:
    """Returns each row's k best scores, best first (nan before everything); -inf where there are fewer."""
    values = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1).values.cpu().numpy()
    return np.pad(values, ((0, 0), (0, k - values.shape[1])), constant_values=-np.inf)


def _top_lists(scores_BN: torch.Tensor, k: int) -> tuple[npt.NDArray[np.floating], IntArray]:
    """Returns each row's k best scores and their columns, equal scores by ascending column; -inf and -1 where fewer.

    torch.topk takes any of the columns whose scores are equal; rows where this leaves some out are looked at again.
    """
    num_rows, num_columns = scores_BN.shape
    width = min(k, num_columns)
    values, columns = scores_BN.topk(min(k + 1, num_columns), dim=1)
    if num_columns > k:
        last = values[:, k - 1]
        torn = torch.nonzero((last == values[:, k]) & (last > -torch.inf)).squeeze(1)
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        numbers = torch.arange(num_columns, device=scores_BN.device)
        step = max(1, num_rows // 4)
        for start in range(0, len(torn), step):
            rows = torn[start : start + step]
            is_tied = scores_BN[rows] == last[rows, None]
            first = torch.where(is_tied, numbers, num_columns).topk(k, dim=1, largest=False, sorted=True).values
            num_above = (values[rows] > last[rows, None]).sum(dim=1, keepdim=True)
            nth_tied = torch.arange(k, device=scores_BN.device) - num_above
            columns[rows] = torch.where(nth_tied < 0, columns[rows], first.gather(1, nth_tied.clamp(min=0)))
    by_column = columns.argsort(dim=1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    values, columns = values.gather(1, by_value), columns.gather(1, by_value)
    columns = torch.where(values == -torch.inf, -1, columns)
    pad = ((0, 0), (0, k - width))
    return (
        np.pad(values.cpu().numpy(), pad, constant_values=-np.inf),
        np.pad(columns.cpu().numpy(), pad, constant_values=-1),
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
    order = np.lexsort((-scores_R, row_R))  # stable, so equal scores stay by ascending number
    starts = _offsets(np.bincount(row_R, minlength=num_rows))
    before_R = np.empty_like(ahead_R)
    before_R[order] = np.arange(len(row_R)) - starts[row_R]
    return np.where(ahead_R < max_k, 1 + ahead_R + before_R, UNRANKED)  # behind a score of -inf are all K others


def _rank_best(scores_BN: torch.Tensor, row_R: IntArray, scores_R: npt.NDArray[np.floating], positions_R: IntArray) -> None:
    """Makes the best position of each row exact, in place. It uses up the scores."""
    best_B = np.full(len(scores_BN), np.inf, dtype=scores_R.dtype)
    order = np.lexsort((-scores_R, row_R))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = row_R[order][1:] != row_R[order][:-1]
    best_R = order[is_first]
    best_R = best_R[(positions_R[best_R] == UNRANKED) & (scores_R[best_R] > -np.inf)]
    if len(best_R) == 0:
        return
    best_B[row_R[best_R]] = scores_R[best_R]
    scores_BN.ge_(torch.from_numpy(best_B).to(scores_BN.device)[:, None])
    is_exact = scores_BN.shape[1] < 2**24  # float32 counts no further
    ahead_B = scores_BN.sum(dim=1, dtype=None if is_exact else torch.float64).cpu().numpy().astype(np.int64)
    positions_R[best_R] = 1 + ahead_B[row_R[best_R]]


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
    place = np.arange(len(row)) - _offsets(np.bincount(row, minlength=num_rows))[row]
    for k, mask in covered.items():
        mask[ids[(place < k) & (scores > -np.inf)]] = True


def _repeated_vectors(candidate_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the numbers of candidates whose vector an earlier one has too, and the number of that one.

    By a hash of the bits, checked afterwards, so that the table is read twice and never sorted.
    """
    num_candidates, dim = candidate_ND.shape
    device = candidate_ND.device
    bits = torch.int64 if candidate_ND.dtype == torch.float64 else torch.int32
    odd = torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, dim) * 2 + 1).to(device)
    hashes = torch.empty(num_candidates, dtype=torch.int64, device=device)
    for start in range(0, num_candidates, _HASH_ROWS):
        words = (candidate_ND[start : start + _HASH_ROWS] + 0.0).view(bits)  # -0.0 + 0.0 is 0.0
        hashes[start : start + _HASH_ROWS] = (words.to(torch.int64) * odd).sum(dim=1)
    distinct, group = torch.unique(hashes, return_inverse=True)
    numbers = torch.arange(num_candidates, device=device)
    first = torch.full((len(distinct),), num_candidates, device=device).scatter_reduce(0, group, numbers, "amin")
    originals = first[group]
    copies = torch.nonzero(originals != numbers).squeeze(1)
    are_equal = torch.empty(len(copies), dtype=torch.bool, device=device)
    for start in range(0, len(copies), _HASH_ROWS):
        part = copies[start : start + _HASH_ROWS]
        are_equal[start : start + _HASH_ROWS] = (candidate_ND[part] == candidate_ND[originals[part]]).all(dim=1)
    copies = copies[are_equal]
    return copies, originals[copies]


def _ranking_metrics(names: Sequence[str]) -> list[Metric]:
    metrics = [parse_metric(name) for name in names]
    for metric in metrics:
        if metric.is_pointwise:
            raise ConfigError(f"metric '{metric}' compares predictions with labels; a ranking has none. Leave it out here.")
    return metrics


def _score_dtype(query_QD: torch.Tensor, candidate_ND: torch.Tensor) -> torch.dtype:
    """Returns the precision of the scores: at least float32."""
    return torch.promote_types(torch.promote_types(query_QD.dtype, candidate_ND.dtype), torch.float32)


def _offsets(lengths: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _without(items: JaggedIds, seen: JaggedIds, num_candidates: int) -> JaggedIds:
    """Returns `items`, whose lists ascend, without those that the same query's list in `seen` holds."""
    keys = items.query_index * num_candidates + items.values
    seen_keys = seen.query_index * num_candidates + seen.values
    is_seen = np.zeros(len(keys), dtype=bool)
    if len(keys):
        places = np.searchsorted(keys, seen_keys).clip(max=len(keys) - 1)
        is_seen[places[keys[places] == seen_keys]] = True
    lengths = np.bincount(items.query_index[~is_seen], minlength=items.num_queries)
    return JaggedIds(items.values[~is_seen], _offsets(lengths))


def _check_range(numbers: IntArray, limit: int, what: str) -> None:
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
        bad = numbers[(numbers < 0) | (numbers >= limit)]
        raise DataError(
            f"{len(bad)} {what} numbers are outside of 0 .. {limit - 1}, such as {bad[0]}. Map ids to rows by the "
            "vocabulary that made the vectors."
        )


def _refuse_nan(
    scores_V: npt.NDArray[np.floating],
    values_BK: npt.NDArray[np.floating],
    block: IntArray,
    items: JaggedIds | None,
) -> None:
    """Raises where a score is nan: those of single items, or the best of each row, of which nan is the first."""
    if np.isnan(scores_V).any():
        assert items is not None
        at = int(np.flatnonzero(np.isnan(scores_V))[0])
        raise _nan_score(int(block[items.query_index[at]]), int(items.values[at]))
    is_nan_B = np.isnan(values_BK).any(axis=1)
    if is_nan_B.any():
        raise _nan_score(int(block[np.flatnonzero(is_nan_B)[0]]), None)


def _nan_score(query: int, candidate: int | None) -> TrainingError:
    pair = f"query {query}" if candidate is None else f"query {query} and candidate {candidate}"
    return TrainingError(
        f"the score of {pair} is nan, so the model has diverged or a vector overflows. Lower the learning rate, or go "
        "back to an earlier checkpoint."
    )
