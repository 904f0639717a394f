"""Blocks of scores of queries against the whole catalogue, and the lists of the best of them.

Never more than a block of the queries x candidates matrix exists. What is left out of a list (seen items, candidates that
may not be recommended) has the score -inf there, and an item of score -inf is never listed.

Shapes: Q queries, B queries of a block, N candidates, K top-k.
"""

from __future__ import annotations

__all__ = ["BLOCK_BYTES", "ScoreBlocks", "refuse_nan", "take_out", "top_lists", "top_values", "topk"]

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from embedshard.evaluate.jagged import JaggedIds, check_range
from embedshard.evaluate.ranking import IntArray
from embedshard.evaluate.ranking_sums import BoolArray
from embedshard.evaluate.scores import Scores, nan_score

BLOCK_BYTES: Final = 256 * 2**20


class ScoreBlocks:
    """Makes blocks of queries' scores against all candidates in one reused matrix, with what may not be listed at -inf.

    Args:
        scores: of Q queries and N candidates.
        seen: items that a query's list may not hold; None for none.
        candidate_mask: (N,) whether each candidate may be recommended; None for all.
        block_bytes: upper limit of the matrix; a block has at least one query.

    Attributes:
        banned: the candidates that may not be recommended.

    Raises:
        DataError: an item's number is outside of the catalogue.
    """

    def __init__(
        self, scores: Scores, seen: JaggedIds | None, candidate_mask: torch.Tensor | BoolArray | None, block_bytes: int
    ) -> None:
        self._scores, self._seen = scores, seen
        num_candidates = scores.num_candidates
        if seen is not None:
            assert seen.num_queries == scores.num_queries
            check_range(seen.values, num_candidates, "seen item")
        if candidate_mask is None:
            self.banned = np.empty(0, dtype=np.int64)
        else:
            mask = torch.as_tensor(candidate_mask).cpu().numpy()
            assert mask.shape == (num_candidates,)
            assert mask.dtype == np.bool_
            self.banned = np.flatnonzero(~mask)
        self._banned = torch.from_numpy(self.banned).to(scores.device)
        self._rows = max(1, block_bytes // max(1, num_candidates * scores.dtype.itemsize))

    def of(self, queries: IntArray) -> Iterator[tuple[IntArray, torch.Tensor]]:
        """Yields the numbers of some of `queries`, and their (B, N) scores, valid until the next block."""
        size = (min(self._rows, len(queries)), self._scores.num_candidates)
        buffer = torch.empty(size, dtype=self._scores.dtype, device=self._scores.device)
        for start in range(0, len(queries), self._rows):
            block = queries[start : start + self._rows]
            scores_BN = buffer[: len(block)]
            self._scores.fill(block, scores_BN)
            if self._seen is not None:
                block_seen = self._seen.pick(block)
                _, seen_scores = take_out(scores_BN, block_seen)
                refuse_nan(seen_scores, np.empty((0, 0)), block, block_seen)
            if len(self._banned):
                scores_BN[:, self._banned] = -torch.inf
            yield block, scores_BN


def take_out(scores_BN: torch.Tensor, items: JaggedIds) -> tuple[IntArray, npt.NDArray[np.floating]]:
    """Returns the row and the score of each of the block's items, and leaves -inf in their places."""
    row = items.query_index
    rows, columns = (torch.from_numpy(index).to(scores_BN.device) for index in (row, items.values))
    scores = scores_BN[rows, columns]
    scores_BN[rows, columns] = -torch.inf
    return row, scores.cpu().numpy()


def top_values(scores_BN: torch.Tensor, k: int) -> npt.NDArray[np.floating]:
    """Returns each row's k best scores, best first (nan before everything); -inf where there are fewer."""
    values = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1).values.cpu().numpy()
    return np.pad(values, ((0, 0), (0, k - values.shape[1])), constant_values=-np.inf)


def top_lists(scores_BN: torch.Tensor, k: int) -> tuple[npt.NDArray[np.floating], IntArray]:
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


@torch.no_grad()
def topk(
    scores: Scores,
    k: int,
    seen: JaggedIds | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    candidate_mask: torch.Tensor | BoolArray | None = None,
) -> tuple[IntArray, npt.NDArray[np.floating]]:
    """Returns the k best candidates of every query, exactly.

    Args:
        scores: of Q queries and N candidates.
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
    blocks = ScoreBlocks(scores, seen, candidate_mask, block_bytes)
    num_queries = scores.num_queries
    ids_QK = np.full((num_queries, k), -1, dtype=np.int64)
    scores_QK = np.full((num_queries, k), -np.inf, dtype=np.float64 if scores.dtype == torch.float64 else np.float32)
    for block, scores_BN in blocks.of(np.arange(num_queries)):
        values_BK, ids_BK = top_lists(scores_BN, k)
        refuse_nan(np.empty(0), values_BK, block, None)
        ids_QK[block], scores_QK[block] = ids_BK, values_BK
    return ids_QK, scores_QK


def refuse_nan(
    scores_V: npt.NDArray[np.floating],
    values_BK: npt.NDArray[np.floating],
    block: IntArray,
    items: JaggedIds | None,
) -> None:
    """Raises where a score is nan: those of single items, or the best of each row, of which nan is the first."""
    if np.isnan(scores_V).any():
        assert items is not None
        at = int(np.flatnonzero(np.isnan(scores_V))[0])
        raise nan_score(int(block[items.query_index[at]]), int(items.values[at]))
    is_nan_B = np.isnan(values_BK).any(axis=1)
    if is_nan_B.any():
        raise nan_score(int(block[np.flatnonzero(is_nan_B)[0]]), None)
