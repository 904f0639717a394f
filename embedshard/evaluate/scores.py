"""Where the scores of queries and candidates come from: dot products of vectors.

A score is a dot product; biases are appended to the vectors by the caller. Every score that is compared with another comes
out of one matrix product, and candidates with identical vectors are given identical scores, which a matrix product alone
does not promise: its kernels round differently at the edges.

Shapes: Q queries, B queries of a block, N candidates, D dim, P pairs.
"""

from __future__ import annotations

__all__ = ["DotProducts", "Scores", "nan_score"]

from typing import Final, Protocol

import numpy as np
import torch

from embedshard.errors import TrainingError
from embedshard.evaluate.ranking import IntArray

_HASH_ROWS: Final = 2**16


class Scores(Protocol):
    """The scores of queries against candidates, of which a ranking asks a block at a time.

    Attributes:
        num_queries: Q.
        num_candidates: N.
        dtype: of the scores: float32 or float64.
        device: where they are made.
        pair_bytes: what it takes to score one pair.
    """

    num_queries: int
    num_candidates: int
    dtype: torch.dtype
    device: torch.device
    pair_bytes: int

    def fill(self, queries: IntArray, scores_BN: torch.Tensor) -> None:
        """Writes the scores of some queries against all candidates."""
        ...

    def of_pairs(self, queries: IntArray, candidates: IntArray) -> torch.Tensor:
        """Returns the (P,) scores of pairs of a query and a candidate."""
        ...


class DotProducts:
    """Scores that are dot products.

    Args:
        query_QD: floats.
        candidate_ND: floats on the same device.
    """

    def __init__(self, query_QD: torch.Tensor, candidate_ND: torch.Tensor) -> None:
        assert query_QD.ndim == candidate_ND.ndim == 2
        assert query_QD.shape[1] == candidate_ND.shape[1]
        assert query_QD.device == candidate_ND.device
        self.num_queries, self.num_candidates = len(query_QD), len(candidate_ND)
        self.dtype = torch.promote_types(torch.promote_types(query_QD.dtype, candidate_ND.dtype), torch.float32)
        self.device = candidate_ND.device
        self.pair_bytes = 3 * max(1, query_QD.shape[1]) * self.dtype.itemsize
        self._query_QD, self._candidate_ND = query_QD, candidate_ND
        self._repeated: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def fill(self, queries: IntArray, scores_BN: torch.Tensor) -> None:
        """Writes the scores of some queries against all candidates."""
        if self._repeated is None:  # found once, and only where the whole catalogue is ranked
            self._candidate_ND = self._candidate_ND.to(self.dtype)
            self._repeated = _repeated_vectors(self._candidate_ND)
        query_BD = self._query_QD[torch.from_numpy(queries).to(self.device)].to(self.dtype)
        torch.mm(query_BD, self._candidate_ND.T, out=scores_BN)
        copies, originals = self._repeated
        if len(copies):
            scores_BN[:, copies] = scores_BN[:, originals]

    @torch.no_grad()
    def of_pairs(self, queries: IntArray, candidates: IntArray) -> torch.Tensor:
        """Returns the (P,) scores of pairs; one kernel makes them all alike."""
        products = self._candidate_ND[torch.from_numpy(candidates).to(self.device)].to(self.dtype)
        products.mul_(self._query_QD[torch.from_numpy(queries).to(self.device)])
        return products.sum(dim=1)


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


def nan_score(query: int, candidate: int | None) -> TrainingError:
    """Returns the error of a score that is nan; the candidate is named where it is known."""
    pair = f"query {query}" if candidate is None else f"query {query} and candidate {candidate}"
    return TrainingError(
        f"the score of {pair} is nan, so the model has diverged or a vector overflows. Lower the learning rate, or go "
        "back to an earlier checkpoint."
    )
