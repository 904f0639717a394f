"""The metrics of labels that a config asks for, from what its model says of rows: one way for all who measure.

A model gives one number a row, one for each of several labels, or one for each class. `LabelMetrics` knows which, and makes
sums that take them all alike.

Shapes: B rows of a batch, L labels, K logits of a row: one a label, or one a class of the one label.
"""

from __future__ import annotations

__all__ = ["LabelMetrics", "LabelSums", "RowSums", "in_order", "prediction_link"]

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch

from embedshard.config import Config
from embedshard.config.parts import CrossEntropyConfig, PointwiseConfig
from embedshard.data.batch import Batch
from embedshard.evaluate.classes import ClassSums
from embedshard.evaluate.pointwise import Link, PointwiseSums
from embedshard.evaluate.users import Users

Scored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of rows: logits (B, K), labels (B, L), weights (B,), and groups (B,) where there are any."""


class RowSums(Protocol):
    """Sums from which metrics follow; batches and other workers' sums are added in any order."""

    def update(
        self,
        logits_BK: torch.Tensor,
        labels_BL: torch.Tensor,
        weights_B: torch.Tensor,
        groups_B: torch.Tensor | None = None,
        /,
    ) -> None:
        """Adds a batch."""
        ...

    def add(self, other: Self) -> None:
        """Adds another worker's sums to these."""
        ...

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name, `metric:part` for a part of it, and what was counted, `rows` at least."""
        ...


class LabelSums:
    """The sums of each of several labels, or of one.

    Args:
        metrics: names of pointwise metrics.
        link: how a logit becomes a prediction.
        labels: names of the labels, in the order of their columns.
    """

    def __init__(self, metrics: Sequence[str], link: Link, labels: Sequence[str]) -> None:
        self._metrics = list(metrics)
        self._of_label = {label: PointwiseSums(metrics, link) for label in labels}

    def update(
        self,
        logits_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        weights_B: torch.Tensor,
        groups_B: torch.Tensor | None = None,
        /,
    ) -> None:
        """Adds a batch, as `PointwiseSums.update` takes each label of it."""
        for place, sums in enumerate(self._of_label.values()):
            sums.update(logits_BL[:, place], labels_BL[:, place], weights_B, groups_B)

    def add(self, other: LabelSums) -> None:
        """Adds another worker's sums to these."""
        for label, sums in self._of_label.items():
            sums.add(other._of_label[label])

    def result(self) -> dict[str, float]:
        """Returns the result of the one label; of several each metric's mean, that of each as `metric:label`, the counts.

        A mean is nan where one label has no value.
        """
        found = {label: sums.result() for label, sums in self._of_label.items()}
        first = next(iter(found.values()))
        if len(found) == 1:
            return first
        values: dict[str, float] = {}
        for metric in self._metrics:
            values[metric] = sum(result[metric] for result in found.values()) / len(found)
            values |= {f"{metric}:{label}": result[metric] for label, result in found.items()}
        groups = {
            f"gauc_groups:{label}": result["gauc_groups"] for label, result in found.items() if "gauc_groups" in result
        }
        return values | {"rows": first["rows"]} | groups


class LabelMetrics:
    """Which metrics of labels are asked for, and how they are had.

    Args:
        config: the config.
        metrics: those of `evaluate.metrics` that compare predictions with labels.
        users: whose rows are whose; None where the model knows no users.
    """

    def __init__(self, config: Config, metrics: Sequence[str], users: Users | None) -> None:
        self.metrics = list(metrics)
        self._link, self._labels = prediction_link(config), list(config.data.label_columns)
        self._users, self._has_several = users, config.learns_several_labels
        self._classes = config.objective.classes if isinstance(config.objective, CrossEntropyConfig) else None

    def sums(self) -> RowSums:
        """Returns sums without a row."""
        if self._classes is not None:
            return ClassSums(self.metrics, self._classes)
        return LabelSums(self.metrics, self._link, self._labels)

    def of(self, output: Any, batch: Batch) -> Scored:
        """Returns what the sums take of a batch.

        Args:
            output: what the model said of it.
            batch: the rows.
        """
        if self._classes is not None:
            logits_BK = output.logits_BC
        else:
            logits_BK = output.logits_BL if self._has_several else output.logits.unsqueeze(1)
        return logits_BK, batch.labels, batch.weights, None if self._users is None else self._users.of(batch)


def in_order(values: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    """Returns the values of metrics in their order, each before its parts (`auc`, `auc:click`), and no counts."""
    return {name: values[name] for asked in metrics for name in values if name == asked or name.startswith(f"{asked}:")}


def prediction_link(config: Config) -> Link:
    """Returns how a logit becomes a prediction: ratings are predicted as they are, all else as log odds."""
    is_rating = isinstance(config.objective, PointwiseConfig) and config.objective.kind == "mse"
    return "identity" if is_rating else "sigmoid"
