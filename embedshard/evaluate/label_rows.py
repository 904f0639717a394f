"""Scored rows of a set, kept whole: metrics of slices by a column, and how far metrics would scatter in other samples.

Shapes: B rows of a batch, n rows of the set, L labels, K logits of a row.
"""

from __future__ import annotations

__all__ = ["LabelRows", "slice_name"]

import re
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from embedshard.evaluate.label_metrics import RowSums, in_order
from embedshard.evaluate.ranking import IntArray

MOST_SLICES: Final = 50
"""Values of a column that have a slice of their own: the most frequent; the others are `other`."""

_STREAM: Final = 7  # of the bootstrap's draws, beside those of order.py, negatives.py and held_out.py
_SHARE: Final = 0.95
_NULL: Final = "null"
_OTHER: Final = "other"
_TAKEN: Final = re.compile(f'"*(?:{_NULL}|{_OTHER})"*')


class LabelRows:
    """Keeps rows.

    Args:
        metrics: names of pointwise metrics.
        sums: makes the sums of these.
    """

    def __init__(self, metrics: Sequence[str], sums: Callable[[], RowSums]) -> None:
        self._metrics, self._sums = list(metrics), sums
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._rows: tuple[torch.Tensor, ...] | None = None

    def update(
        self,
        logits_BK: torch.Tensor,
        labels_BL: torch.Tensor,
        weights_B: torch.Tensor,
        groups_B: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch, as the sums take it."""
        groups = torch.full((len(labels_BL),), -1) if groups_B is None else groups_B
        self._parts.append(tuple(values.detach().cpu() for values in (logits_BK, labels_BL, weights_B, groups)))

    def slices(self, codes_n: IntArray, values: Sequence[int | str]) -> dict[str, dict[str, float]]:
        """Returns each slice's metrics and `rows`, most rows first; each row is in one of them.

        Args:
            codes_n: of each row, the number of its value among `values`; -1 for a null.
            values: of the column. An integer and the string that looks like it are one slice.
        """
        names = [_NULL, *(slice_name(value) for value in values)]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        slice_n = np.array([numbers[name] for name in names])[codes_n + 1]
        _, _, weights, _ = self._whole()
        present = np.bincount(slice_n[weights.numpy() > 0], minlength=len(numbers))
        order = np.argsort(-present, kind="stable")
        order = order[present[order] > 0]
        own = order if len(order) <= MOST_SLICES else order[: MOST_SLICES - 1]
        each = list(numbers)
        found = {each[number]: self._of(slice_n == number) for number in own.tolist()}
        if len(own) < len(order):
            found[_OTHER] = self._of(~np.isin(slice_n, own))
        return found

    def intervals(self, resamples: int, seed: int) -> dict[str, list[float]]:
        """Returns the bounds within which 95 % of the resamples lie, of each metric (the percentile bootstrap, Efron 1979).

        A resample counts each row as often as a Poisson variable of mean 1 says, which is drawing with repetition where
        there are many rows. The mean of several labels is that of one resample. Resamples without a value (of one class
        alone) are left out.

        Args:
            resamples: how many.
            seed: of the draws.
        """
        logits, labels, weights, groups = self._whole()
        values: dict[str, list[float]] = {}
        for number in range(resamples):
            generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, 0, number]))
            sums = self._sums()
            sums.update(logits, labels, weights.double() * torch.from_numpy(generator.poisson(1.0, len(weights))), groups)
            for name, value in in_order(sums.result(), self._metrics).items():
                values.setdefault(name, [])
                if not np.isnan(value):
                    values[name].append(value)
        edges = [(1 - _SHARE) / 2, (1 + _SHARE) / 2]
        return {name: np.quantile(found, edges).tolist() for name, found in values.items() if found}

    def _of(self, is_in_n: np.ndarray) -> dict[str, float]:
        is_in = torch.from_numpy(is_in_n)
        logits, labels, weights, groups = (part[is_in] for part in self._whole())
        sums = self._sums()
        sums.update(logits, labels, weights, groups)
        found = sums.result()
        return in_order(found, self._metrics) | {"rows": found["rows"]}

    def _whole(self) -> tuple[torch.Tensor, ...]:
        if self._rows is None:
            self._rows, self._parts = tuple(torch.cat(part) for part in zip(*self._parts, strict=True)), []
        return self._rows


def slice_name(value: int | str) -> str:
    """Returns the name of a value's slice, which is the value, and no other's.

    `null` and `other` are nulls and all other values: a value that is one of these words is in quotes, and one that is so in
    quotes is in one pair more.
    """
    name = str(value)
    return f'"{name}"' if _TAKEN.fullmatch(name) else name
