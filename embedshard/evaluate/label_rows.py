"""Scored rows of a set, kept whole: metrics of slices by a column, and how far metrics would scatter in other samples.

Shapes: B rows of a batch, n rows of the set.
"""

from __future__ import annotations

__all__ = ["LabelRows"]

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch

from embedshard.evaluate.pointwise import Link, PointwiseSums
from embedshard.evaluate.ranking import FloatArray, IntArray

MOST_SLICES: Final = 50
"""Values of a column that have a slice of their own: the most frequent; the others are `other`."""

_STREAM: Final = 7  # of the bootstrap's draws, beside those of order.py, negatives.py and held_out.py
_SHARE: Final = 0.95


class LabelRows:
    """Keeps rows.

    Args:
        metrics: names of pointwise metrics.
        link: how a logit becomes a prediction.
    """

    def __init__(self, metrics: Sequence[str], link: Link) -> None:
        self._metrics, self._link = list(metrics), link
        self._parts: list[tuple[FloatArray, FloatArray, FloatArray, IntArray]] = []
        self._rows: tuple[FloatArray, FloatArray, FloatArray, IntArray] | None = None

    def update(
        self, logits_B: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, groups_B: torch.Tensor | None
    ) -> None:
        """Adds a batch, as `PointwiseSums.update` takes it."""
        groups = np.full(len(labels_B), -1) if groups_B is None else groups_B.cpu().numpy()
        numbers = (values.detach().cpu().double().numpy() for values in (logits_B, labels_B, weights_B))
        logits, labels, weights = numbers
        self._parts.append((logits, labels, weights, groups))

    def values(self) -> dict[str, float]:
        """Returns the metrics of all rows, and `rows`."""
        return self._of(np.ones(len(self._whole()[0]), dtype=bool))

    def slices(self, codes_n: IntArray, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns each slice's metrics and `rows`, most rows first.

        Args:
            codes_n: of each row, the number of its value among `names`; -1 for a null.
            names: of the values.
        """
        _, _, weights, _ = self._whole()
        present = np.bincount(codes_n[weights > 0] + 1, minlength=len(names) + 1)
        order = np.argsort(-present, kind="stable")
        order = order[present[order] > 0]
        own = order if len(order) <= MOST_SLICES else order[: MOST_SLICES - 1]
        found = {("null" if place == 0 else names[place - 1]): self._of(codes_n + 1 == place) for place in own.tolist()}
        if len(own) < len(order):
            found["other"] = self._of(~np.isin(codes_n + 1, own))
        return found

    def intervals(self, resamples: int, seed: int) -> dict[str, list[float]]:
        """Returns the bounds within which 95 % of the resamples lie, of each metric (the percentile bootstrap, Efron 1979).

        A resample counts each row as often as a Poisson variable of mean 1 says, which is drawing with repetition where
        there are many rows. Resamples without a value (of one class alone) are left out.

        Args:
            resamples: how many.
            seed: of the draws.
        """
        logits, labels, weights, groups = self._whole()
        values: dict[str, list[float]] = {name: [] for name in self._metrics}
        for number in range(resamples):
            generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, 0, number]))
            sums = PointwiseSums(self._metrics, self._link)
            sums.update(logits, labels, weights * generator.poisson(1.0, len(weights)), groups)
            for name, value in sums.result().items():
                if name in values and not np.isnan(value):
                    values[name].append(value)
        edges = [(1 - _SHARE) / 2, (1 + _SHARE) / 2]
        return {name: np.quantile(found, edges).tolist() for name, found in values.items() if found}

    def _of(self, is_in_n: np.ndarray) -> dict[str, float]:
        logits, labels, weights, groups = (part[is_in_n] for part in self._whole())
        sums = PointwiseSums(self._metrics, self._link)
        sums.update(logits, labels, weights, groups)
        found: Mapping[str, float] = sums.result()
        return {name: found[name] for name in (*self._metrics, "rows")}

    def _whole(self) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
        if self._rows is None:
            logits, labels, weights, groups = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            self._rows, self._parts = (logits, labels, weights, groups), []
        return self._rows
