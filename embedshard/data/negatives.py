"""What an objective asks to be drawn beside a step's rows.

Draws are counter-based on (seed, step), so every rank makes the same ones and takes its share, and a resumed run makes
them again.
"""

from __future__ import annotations

__all__ = ["AllRows", "CandidateSampler", "DrawnCandidates", "RowSampler", "Sampler"]

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedshard.config.parts import DrawsNegatives
from embedshard.data.catalogue import Catalogue
from embedshard.data.columns import Columns, gather
from embedshard.errors import DataError

_STREAM = 3  # beside those of order.py


@dataclass(frozen=True)
class DrawnCandidates:
    """One rank's share of a step's candidates.

    Attributes:
        ids: rows of the item's table, (n,) int64.
        log_q: natural log of the probability of one draw, (n,) float32; infinite for one that stands for none.
        columns: the item tower's features of the candidates; none where ids are all there is of them.
        log_q_of_row: the same log for every row of the item's table, float32; -inf for one that is never drawn.
    """

    ids: npt.NDArray[np.int64]
    log_q: npt.NDArray[np.float32]
    columns: Columns
    log_q_of_row: npt.NDArray[np.float32]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.ids)


class Sampler(Protocol):
    """Gives the candidates of a step."""

    def draw(self, step: int, rank: int, world_size: int) -> DrawnCandidates:
        """Returns a rank's share of the candidates of a 0-based global step; all ranks' are equally many."""
        ...


class CandidateSampler:
    """Draws candidates from a catalogue, with replacement.

    Args:
        config: how many, and from which distribution.
        seed: of the run.
        catalogue: the items.
        counts: how often each row of the item's table is met in training, (num_embeddings,) int64; asked for by
            `popularity` alone.

    Raises:
        DataError: if popularity is asked for and no item of the catalogue is met in training.
    """

    def __init__(
        self, config: DrawsNegatives, seed: int, catalogue: Catalogue, counts: npt.NDArray[np.int64] | None
    ) -> None:
        self._seed, self._catalogue, self._num_negatives = seed, catalogue, config.num_negatives
        size = len(catalogue.ids)
        if config.distribution == "popularity":
            assert counts is not None, "popularity is counted before it is asked for"
            shares = _popularity(config, counts[catalogue.ids], f"none of the catalogue's {size} items")
        else:
            shares = np.full(size, 1.0 / size, dtype=np.float64)
        self._cumulative = _cumulative(shares)
        with np.errstate(divide="ignore"):
            self._log_q = np.log(shares).astype(np.float32)
        self._log_q_of_row = np.full(catalogue.num_embeddings, -np.inf, dtype=np.float32)
        self._log_q_of_row[catalogue.ids] = self._log_q

    def draw(self, step: int, rank: int, world_size: int) -> DrawnCandidates:
        """Returns a rank's share of the candidates of a 0-based global step."""
        uniform = _uniform(self._seed, step, self._num_negatives, rank, world_size)
        places = np.searchsorted(self._cumulative, uniform, side="right")
        return DrawnCandidates(
            ids=self._catalogue.ids[places],
            log_q=self._log_q[places],
            columns=gather(self._catalogue.columns, places, None),
            log_q_of_row=self._log_q_of_row,
        )


class RowSampler:
    """Draws rows of a table, with replacement. The row for unknown ids is one of them.

    Args:
        config: how many, and from which distribution.
        seed: of the run.
        num_embeddings: rows of the table.
        counts: how often each is met in training, (num_embeddings,) int64; asked for by `popularity` alone.

    Raises:
        DataError: if popularity is asked for and there is no id in the training data.
    """

    def __init__(self, config: DrawsNegatives, seed: int, num_embeddings: int, counts: npt.NDArray[np.int64] | None) -> None:
        self._seed, self._num_negatives, self._num_embeddings = seed, config.num_negatives, num_embeddings
        self._cumulative: npt.NDArray[np.float64] | None = None
        if config.distribution == "popularity":
            assert counts is not None, "popularity is counted before it is asked for"
            shares = _popularity(config, counts, "no id")
            self._cumulative = _cumulative(shares)
            with np.errstate(divide="ignore"):
                self._log_q_of_row = np.log(shares).astype(np.float32)
        else:
            self._log_q_of_row = np.broadcast_to(np.float32(-np.log(num_embeddings)), num_embeddings)

    def draw(self, step: int, rank: int, world_size: int) -> DrawnCandidates:
        """Returns a rank's share of the candidates of a 0-based global step."""
        uniform = _uniform(self._seed, step, self._num_negatives, rank, world_size)
        if self._cumulative is None:
            ids = (uniform * self._num_embeddings).astype(np.int64)
        else:
            ids = np.searchsorted(self._cumulative, uniform, side="right").astype(np.int64, copy=False)
        return DrawnCandidates(ids, self._log_q_of_row[ids], {}, self._log_q_of_row)


class AllRows:
    """Gives all rows of a table, the one for unknown ids included, at every step.

    Args:
        num_embeddings: rows of the table.
        lanes: they are filled up to a multiple of it, so that every world can share them out.
    """

    def __init__(self, num_embeddings: int, lanes: int) -> None:
        self._ids = np.zeros(-(-num_embeddings // lanes) * lanes, dtype=np.int64)
        self._ids[:num_embeddings] = np.arange(num_embeddings)
        self._log_q = np.full(len(self._ids), np.inf, dtype=np.float32)
        self._log_q[:num_embeddings] = 0.0

    def draw(self, step: int, rank: int, world_size: int) -> DrawnCandidates:
        """Returns a rank's share of all rows; places beyond them are row 0 with a `log_q` of infinity."""
        share = len(self._ids) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        return DrawnCandidates(self._ids[mine], self._log_q[mine], {}, self._log_q)


def _popularity(config: DrawsNegatives, counts: npt.NDArray[np.int64], nothing: str) -> npt.NDArray[np.float64]:
    """Returns with which probability each is drawn."""
    shares = counts.astype(np.float64) ** config.alpha
    shares[counts == 0] = 0.0
    if not shares.sum():
        raise DataError(
            f"objective.distribution is 'popularity', but {nothing} is met in the training data. "
            f"Check that both use the same ids, or use 'uniform'."
        )
    return shares / shares.sum()


def _cumulative(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cumulative = np.cumsum(shares)
    cumulative[np.flatnonzero(shares)[-1] :] = 1.0  # whatever rounding has left out falls to the last that can be drawn
    return cumulative


def _uniform(seed: int, step: int, count: int, rank: int, world_size: int) -> npt.NDArray[np.float64]:
    """Returns a rank's share of a step's draws from [0, 1)."""
    share = count // world_size
    words = np.random.Philox(key=[seed, _STREAM], counter=[0, step, 0, 0]).random_raw(count)
    return (words[rank * share : (rank + 1) * share] >> np.uint64(11)).astype(np.float64) * 2.0**-53
