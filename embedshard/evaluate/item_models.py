"""Models in closed form that score an item by the items that a user met: EASE^R, and item-based nearest neighbours.

Both are a matrix of weights W between items; a user's score of item j is the sum of W[i, j] over the items i that the user
met in training. The inverse is LAPACK's, by scipy; neighbours are found by `implicit`, in a fifth of the time that scipy's
sparse products took here (docs/log.md).

Shapes: U users, N items of the catalogue, Q queries, B queries of a block, P pairs.
"""

from __future__ import annotations

__all__ = ["Histories", "HistoryScores", "SameForAll", "ease_bytes", "ease_weights", "item_knn_bytes", "item_knn_weights"]

import warnings
from typing import Any, Final

import numpy as np
import torch

from embedshard.errors import TrainingError
from embedshard.evaluate.ranking import IntArray

_ROW_BYTES: Final = 64  # of an interaction, while it becomes an element of a sparse matrix
_WEIGHT_BYTES: Final = 24  # of a neighbour's weight, while it is put into its place
_PART_BYTES: Final = 64 * 2**20


class Histories:
    """Which items of the catalogue each user met, each once.

    Args:
        users: (n,) any numbers from 0.
        items: (n,) places in the catalogue; -1 where it does not hold the item.
        num_items: N.
    """

    def __init__(self, users: IntArray, items: IntArray, num_items: int) -> None:
        from scipy import sparse

        kept = items >= 0
        self._users, row = np.unique(users[kept], return_inverse=True)
        shape = (len(self._users) + 1, num_items)  # the last row is of users who met nothing
        ones = np.ones(len(row), dtype=np.float32)
        self.matrix_UN: Any = sparse.csr_matrix((ones, (row, items[kept])), shape=shape)
        self.matrix_UN.data[:] = 1.0

    def of(self, users: IntArray) -> Any:
        """Returns the (Q, N) sparse histories of some users."""
        nobody = len(self._users)
        if not nobody:
            return self.matrix_UN[np.zeros(len(users), dtype=np.int64)]
        row = np.minimum(np.searchsorted(self._users, users), nobody - 1)
        return self.matrix_UN[np.where(self._users[row] == users, row, nobody)]


def ease_bytes(num_items: int, num_interactions: int) -> int:
    """Returns about how much memory `ease_weights` takes."""
    return 4 * num_items**2 + _ROW_BYTES * num_interactions + _PART_BYTES


def ease_weights(histories: Histories, l2: float) -> Any:
    """Returns the (N, N) float32 weights of EASE^R (Steck 2019), exactly: P = (X'X + l2 I)^-1, W = I - P / diag(P).

    One matrix is held: the Gram matrix, which becomes its inverse and then the weights. On MovieLens-1M, float64 gives the
    same metrics to all printed places in twice the memory.

    Raises:
        TrainingError: if the Gram matrix cannot be inverted in float32: nothing of the inverse would be right.
    """
    from scipy.linalg import lapack

    histories_UN = histories.matrix_UN
    num_items = histories_UN.shape[1]
    gram = np.empty((num_items, num_items), dtype=np.float32, order="F")
    transposed, by_column = histories_UN.T.tocsr(), histories_UN.tocsc()
    step = max(1, _PART_BYTES // (8 * num_items))
    for start in range(0, num_items, step):
        gram[:, start : start + step] = (transposed @ by_column[:, start : start + step]).toarray()
    gram[np.diag_indices(num_items)] += l2
    norm = gram.sum(axis=0).max()
    _, failed = lapack.spotrf(gram, lower=1, overwrite_a=1)
    if not failed:
        reciprocal_condition, _ = lapack.spocon(gram, norm, uplo="L")
        failed = reciprocal_condition < np.finfo(np.float32).eps
    if not failed:
        _, failed = lapack.spotri(gram, lower=1, overwrite_c=1)
    if failed:
        raise TrainingError(f"its Gram matrix of {num_items} items cannot be inverted with l2={l2:g}. Give it a larger l2.")
    for row in range(num_items):  # only the lower triangle was written
        gram[row, row + 1 :] = gram[row + 1 :, row]
    weights = gram.T  # the same by symmetry, and rows lie together, as the sparse product needs
    weights /= -np.diag(weights).copy()
    np.fill_diagonal(weights, 0.0)
    return weights


def item_knn_bytes(num_items: int, neighbours: int, num_interactions: int) -> int:
    """Returns about how much memory `item_knn_weights` takes."""
    return _WEIGHT_BYTES * num_items * min(neighbours + 1, num_items) + _ROW_BYTES * num_interactions


def item_knn_weights(histories: Histories, neighbours: int) -> Any:
    """Returns the (N, N) sparse weights of item-based nearest neighbours (Deshpande and Karypis 2004).

    Row i holds the cosines of item i with the items that are most like it, over the users who met them; all others are 0.
    """
    from implicit.nearest_neighbours import CosineRecommender

    model = CosineRecommender(K=neighbours + 1, num_threads=torch.get_num_threads())  # each item is its own nearest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of the format that it makes itself
        model.fit(histories.matrix_UN, show_progress=False)
    weights = model.similarity.tocsr().astype(np.float32)
    weights.setdiag(0.0)
    weights.eliminate_zeros()
    for row in np.flatnonzero(np.diff(weights.indptr) > neighbours):  # others have all its users: it is not among its own
        begin, end = weights.indptr[row : row + 2]
        weights.data[begin + np.argmin(weights.data[begin:end])] = 0.0
    weights.eliminate_zeros()
    return weights


class HistoryScores:
    """Scores of items by the queries' histories and a matrix of weights between items.

    Args:
        history_QN: sparse.
        weights_NN: dense or sparse.
        num_candidates: at least N; what is beyond it has a score of 0.
    """

    dtype, device, pair_bytes = torch.float32, torch.device("cpu"), 32

    def __init__(self, history_QN: Any, weights_NN: Any, num_candidates: int) -> None:
        self.num_queries, self.num_candidates = history_QN.shape[0], num_candidates
        self._history_QN, self._weights_NN = history_QN, weights_NN

    def fill(self, queries: IntArray, scores_BN: torch.Tensor) -> None:
        """Writes the scores of some queries against all candidates."""
        product = self._history_QN[queries] @ self._weights_NN
        dense = product if isinstance(product, np.ndarray) else product.toarray()
        scores_BN[:, : dense.shape[1]] = torch.from_numpy(dense)
        scores_BN[:, dense.shape[1] :] = 0.0

    def of_pairs(self, queries: IntArray, candidates: IntArray) -> torch.Tensor:
        """Returns the (P,) scores of pairs, by way of the queries' scores of all items."""
        distinct, query_P = np.unique(queries, return_inverse=True)
        scores_P = torch.empty(len(queries), dtype=self.dtype)
        step = max(1, _PART_BYTES // (self.num_candidates * self.dtype.itemsize))
        buffer = torch.empty(min(step, len(distinct)), self.num_candidates, dtype=self.dtype)
        for start in range(0, len(distinct), step):
            block = distinct[start : start + step]
            scores_BN = buffer[: len(block)]
            self.fill(block, scores_BN)
            pairs = np.flatnonzero((query_P >= start) & (query_P < start + len(block)))
            scores_P[pairs] = scores_BN[query_P[pairs] - start, candidates[pairs]]
        return scores_P


class SameForAll:
    """Scores of items that are the same for every query, such as their popularity.

    Args:
        scores_N: float64, so that counts stay exact.
        num_queries: Q.
        num_candidates: at least N; what is beyond it has a score of 0.
    """

    dtype, device, pair_bytes = torch.float64, torch.device("cpu"), 32

    def __init__(self, scores_N: torch.Tensor, num_queries: int, num_candidates: int) -> None:
        self.num_queries, self.num_candidates = num_queries, num_candidates
        self._scores_N = torch.zeros(num_candidates, dtype=self.dtype)
        self._scores_N[: len(scores_N)] = scores_N

    def fill(self, queries: IntArray, scores_BN: torch.Tensor) -> None:
        """Writes the scores of some queries against all candidates."""
        scores_BN.copy_(self._scores_N.expand(len(queries), -1))

    def of_pairs(self, queries: IntArray, candidates: IntArray) -> torch.Tensor:
        """Returns the (P,) scores of pairs."""
        return self._scores_N[torch.from_numpy(candidates)]
