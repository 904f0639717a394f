"""How often an id turns up, estimated as training goes."""

from __future__ import annotations

__all__ = ["FrequencyEstimate"]

import torch
from torch import nn


class FrequencyEstimate(nn.Module):
    """Counts of the ids of all global batches so far, as probabilities.

    The streaming estimate of Yi et al. (2019, "Sampling-bias-corrected neural modeling") in counts instead of intervals:
    exact for a stream that does not drift, and with a half-life it forgets. A function of the global batches alone,
    so every rank holds the same, whatever the world. Part of the checkpoint.

    Args:
        rows: ids are 0 .. rows - 1.
        buckets: counters; with fewer than rows, an id counts in bucket `id % buckets`.
        half_life_steps: updates after which a count weighs half; None: never less.
    """

    _RESCALE = 64.0  # binary orders by which weights may grow before all are scaled down, exactly

    def __init__(self, rows: int, buckets: int, half_life_steps: float | None) -> None:
        super().__init__()
        self.half_life_steps = half_life_steps
        self.buckets = min(rows, buckets)
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
        occurrences = torch.bincount(valid % self.buckets, minlength=self.buckets)
        self.counts.add_(occurrences, alpha=weight)
        self.scalars.copy_(torch.tensor([total + weight * len(valid), updates + 1, taken], dtype=torch.float64))

    @torch.no_grad()
    def probability(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the share of each id among those counted, (N,) float64; 0 for one that was never met.

        Args:
            ids: (N,) int64; below 0 gives some other id's share.
        """
        return self.counts[ids.clamp(min=0) % self.buckets] / self.scalars[0].clamp(min=1e-300)
