"""Metrics of training rows as the model predicted them before it learnt from them, in memory that does not grow.

Sums over the steps since the last measurement (a window) and over the run. Each rank adds its rows; ranks' sums are added up
when they are asked for, so that no step waits for them. They are buffers, saved with a checkpoint, in whole multiples of
2^-24, so that they do not depend on when they were added up: a run that is resumed tells what it would have told.

AUC and PR-AUC are from histograms of logits: rows of one bin count as tied; there are 128 bins a doubling of the odds. AUC
within users is exact over a window, whose rows are kept (`streaming_groups.py`).

Shapes: B rows on this rank, L labels, S sums of a label, K bins.
"""

from __future__ import annotations

__all__ = ["StreamingMetrics"]

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from embedshard.evaluate.discrimination import average_precision, weighted_auc
from embedshard.evaluate.pointwise import entropy
from embedshard.evaluate.ranking import FloatArray
from embedshard.evaluate.streaming_groups import GroupedWindows
from embedshard.evaluate.users import Users
from embedshard.world import World

_BINS_PER_DOUBLING: Final = 128
_MOST_DOUBLINGS: Final = 20  # odds from 2^-20 to 2^20; what is beyond is in the outermost bins
_NUM_BINS: Final = 2 * _MOST_DOUBLINGS * _BINS_PER_DOUBLING
_UNIT: Final = 2.0**-24
_MOST: Final = 2.0**60  # units that a step may add to a sum
_SUMS: Final = ("weight", "label", "prediction", "log_loss", "square", "absolute", "correct")


class StreamingMetrics(nn.Module):
    """What the training rows tell of the model.

    Args:
        metrics: names among auc, pr_auc, log_loss, normalised_entropy, calibration, accuracy, gauc, rmse, mae.
        labels: names of the labels; one alone is not named in the results.
        is_odds: whether logits are log odds, else they are predictions.
        world: whose ranks' rows are added up.
        users: whose rows are whose, for gauc.
        window_rows: of a window at most, all ranks' together, for gauc.
    """

    window: torch.Tensor
    run: torch.Tensor

    def __init__(
        self,
        metrics: Sequence[str],
        labels: Sequence[str],
        is_odds: bool,
        world: World,
        users: Users | None = None,
        window_rows: int = 0,
    ) -> None:
        super().__init__()
        self._metrics, self._labels, self._is_odds, self._world = list(metrics), list(labels), is_odds, world
        self.users = users
        self._has_bins = not {"auc", "pr_auc"}.isdisjoint(metrics)
        size = len(_SUMS) + (2 * _NUM_BINS if self._has_bins else 0)
        self.register_buffer("window", torch.zeros(len(labels), size, dtype=torch.int64))
        self.register_buffer("run", torch.zeros(len(labels), size, dtype=torch.int64))
        self._pending = torch.zeros(len(labels), size, dtype=torch.int64, device=world.device)
        self.within = GroupedWindows(len(labels), window_rows, world) if "gauc" in metrics else None

    @torch.no_grad()
    def update(
        self,
        logits_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        weights_B: torch.Tensor,
        users_B: torch.Tensor | None = None,
    ) -> None:
        """Adds this rank's rows of a step; rows of weight 0 may hold anything. Not collective.

        Args:
            logits_BL: before the link function.
            labels_BL: in the labels' order.
            weights_B: at least 0.
            users_B: the user of each row, for gauc; -1 where it is no one user.
        """
        if self.within is not None:
            assert users_B is not None, "the config checks that the model knows the user"
            self.within.update(logits_BL, labels_BL, weights_B, users_B)
        counts = weights_B > 0
        logits_BL, labels_BL = logits_BL[counts].double(), labels_BL[counts].double()
        weights_B = weights_B[counts].double()
        predictions_BL = torch.sigmoid(logits_BL) if self._is_odds else logits_BL
        losses_BL = torch.zeros_like(logits_BL)
        if self._is_odds:
            losses_BL = F.binary_cross_entropy_with_logits(logits_BL, labels_BL, reduction="none")
        errors_BL = predictions_BL - labels_BL
        is_right_BL = ((logits_BL > 0) == (labels_BL == 1)).double()
        terms = torch.stack(
            [
                torch.ones_like(labels_BL), labels_BL, predictions_BL, losses_BL, errors_BL.square(), errors_BL.abs(),
                is_right_BL,
            ]
        )  # fmt: skip
        self._pending[:, : len(_SUMS)] += _in_units(torch.einsum("sbl,b->ls", terms, weights_B))
        if self._has_bins:
            bins_BL = (logits_BL / np.log(2.0) + _MOST_DOUBLINGS) * _BINS_PER_DOUBLING
            bins_BL = bins_BL.nan_to_num().clamp(0, _NUM_BINS - 1).long()
            for place in range(len(self._labels)):
                for first, share_B in enumerate((1.0 - labels_BL[:, place], labels_BL[:, place])):
                    begin = len(_SUMS) + first * _NUM_BINS
                    self._pending[place, begin : begin + _NUM_BINS] += _met(bins_BL[:, place], weights_B * share_B)

    def gather(self) -> None:
        """Adds what all ranks have met since the last time to the window. Collective."""
        self.window += self._world.sum(self._pending)
        self._pending.zero_()
        if self.within is not None:
            self.within.gather()

    def measure(self) -> dict[str, float]:
        """Returns the metrics of the window, `window/auc`, and of the run, `run/auc`, and begins a new one. Collective."""
        self.gather()
        self.run += self.window
        within = ([], []) if self.within is None else self.within.end_window()
        found: dict[str, float] = {}
        for scope, sums, users in (("window", self.window, within[0]), ("run", self.run, within[1])):
            for place, of_label in enumerate((sums.double() * _UNIT).cpu().numpy()):
                suffix = f":{self._labels[place]}" if len(self._labels) > 1 else ""
                for name in self._metrics:
                    value = users[place] if name == "gauc" else self._value(name, of_label)
                    found[f"{scope}/{name}{suffix}"] = value
        self.window.zero_()
        return found

    def _value(self, name: str, sums_S: FloatArray) -> float:
        weight, label, prediction, log_loss, square, absolute, correct = sums_S[: len(_SUMS)].tolist()
        if not weight:
            return float("nan")
        if name in ("auc", "pr_auc"):
            bins_2K = np.tile(np.arange(_NUM_BINS, dtype=np.float64), 2)
            is_positive_2K = np.arange(2 * _NUM_BINS) >= _NUM_BINS
            measure = weighted_auc if name == "auc" else average_precision
            return measure(bins_2K, is_positive_2K, sums_S[len(_SUMS) :])
        if name == "normalised_entropy":
            nothing = entropy(label / weight)
            return log_loss / weight / nothing if nothing > 0 else float("nan")
        if name == "calibration":
            return prediction / label if label > 0 else float("nan")
        return {
            "log_loss": log_loss / weight,
            "rmse": (square / weight) ** 0.5,
            "mae": absolute / weight,
            "accuracy": correct / weight,
        }[name]


def _in_units(sums: torch.Tensor) -> torch.Tensor:
    return (sums / _UNIT).nan_to_num().clamp(-_MOST, _MOST).round().long()


def _met(bins_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
    """Returns the weight of each bin in units, (K,) int64.

    On CUDA whole numbers are added up: torch adds others up in any order there, and under `train.deterministic` refuses.
    """
    if bins_B.device.type == "cpu":
        return _in_units(torch.bincount(bins_B, weights=weights_B, minlength=_NUM_BINS))
    return bins_B.new_zeros(_NUM_BINS).index_add_(0, bins_B, _in_units(weights_B))
