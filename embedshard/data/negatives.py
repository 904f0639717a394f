"""What an objective asks to be drawn beside a step's rows.

Draws are counter-based on (seed, step), so every rank makes the same ones and takes its share, and a resumed run makes
them again.
"""

from __future__ import annotations

__all__ = ["CandidateSampler", "DrawnCandidates"]

from dataclasses import dataclass

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
        log_q: natural log of the probability of one draw, (n,) float32.
        columns: the item tower's features of the candidates.
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
            shares = counts[catalogue.ids].astype(np.float64) ** config.alpha
            shares[counts[catalogue.ids] == 0] = 0.0
            if not shares.sum():
                raise DataError(
                    "objective.distribution is 'popularity', but none of the catalogue's "
                    f"{size} items is met in the training data. Check that both use the same ids, or use 'uniform'."
                )
        else:
            shares = np.ones(size, dtype=np.float64)
        self._cumulative = np.cumsum(shares / shares.sum())
        self._cumulative[-1] = 1.0
        with np.errstate(divide="ignore"):
            self._log_q = np.log(shares / shares.sum()).astype(np.float32)
        self._log_q_of_row = np.full(catalogue.num_embeddings, -np.inf, dtype=np.float32)
        self._log_q_of_row[catalogue.ids] = self._log_q

    def draw(self, step: int, rank: int, world_size: int) -> DrawnCandidates:
        """Returns a rank's share of the candidates of a 0-based global step."""
        share = self._num_negatives // world_size
        words = np.random.Philox(key=[self._seed, _STREAM], counter=[0, step, 0, 0]).random_raw(self._num_negatives)
        uniform = (words[rank * share : (rank + 1) * share] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        places = np.searchsorted(self._cumulative, uniform, side="right")
        return DrawnCandidates(
            ids=self._catalogue.ids[places],
            log_q=self._log_q[places],
            columns=gather(self._catalogue.columns, places, None),
            log_q_of_row=self._log_q_of_row,
        )
