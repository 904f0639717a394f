"""How often an id turns up, estimated as training goes."""

from __future__ import annotations

__all__ = ["FrequencyEstimate"]

import numpy as np
import torch
from torch import nn

from embedshard.data.hashing import hash_integers


class FrequencyEstimate(nn.Module):
    """Counts of the ids of all global batches so far, as probabilities.

    The streaming estimate of Yi et al. (2019, "Sampling-bias-corrected neural modeling") in counts instead of intervals:
    exact for a stream that does not drift, and with a half-life it forgets. A function of the global batches alone,
    so every rank holds the same, whatever the world. Part of the checkpoint.

    Args:
        rows: ids are 0 .. rows - 1; None where they are any numbers of at least 0, which are hashed to the counters.
        buckets: counters; with fewer than rows, an id counts in bucket `id % buckets`.
        half_life_steps: updates after which a count weighs half; None: never less.
    """

    _RESCALE = 64.0  # binary orders by which weights may grow before all are scaled down, exactly

    def __init__(self, rows: int | None, buckets: int, half_life_steps: float | None) -> None:
        super().__init__()
        self.half_life_steps = half_life_steps
        self.buckets = buckets if rows is None else min(rows, buckets)
        self._is_hashed = rows is None
        self.counts: torch.Tensor
        self.scalars: torch.Tensor
        self.register_buffer("counts", torch.zeros(self.buckets, dtype=torch.float64))
        self.register_buffer("scalars", torch.zeros(3, dtype=torch.float64))  # total, updates, exponent taken off

    @torch.no_grad()
    def update(self, ids: torch.Tensor) -> None:
        """Counts one global batch.

        Args:
            ids: (N,) int64 in global order; below 0: not counted.
        """
        total, updates, taken = self.scalars.tolist()
        exponent = 0.0
        if self.half_life_steps is not None:
            exponent = updates / self.half_life_steps - taken
            if exponent > self._RESCALE:
                self.counts *= 2.0**-self._RESCALE
                total, taken, exponent = total * 2.0**-self._RESCALE, taken + self._RESCALE, exponent - self._RESCALE
        weight = 2.0**exponent
        valid = ids[ids >= 0]
        occurrences = torch.bincount(self._places(valid), minlength=self.buckets)
        self.counts.add_(occurrences, alpha=weight)
        self.scalars.copy_(torch.tensor([total + weight * len(valid), updates + 1, taken], dtype=torch.float64))

    @torch.no_grad()
    def probability(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the share of each id among those counted, (N,) float64; 0 for one that was never met.

        Args:
            ids: (N,) int64; below 0 gives some other id's share.
        """
        return self.counts[self._places(ids.clamp(min=0))] / self.scalars[0].clamp(min=1e-300)

    def _places(self, ids: torch.Tensor) -> torch.Tensor:
        if not self._is_hashed:
            return ids % self.buckets
        hashes = hash_integers(ids.cpu().numpy(), 0) % np.uint64(self.buckets)
        return torch.from_numpy(hashes.astype(np.int64)).to(ids.device)
