"""Whose rows are whose: the groups of metrics within users.

Shapes: B rows of a batch.
"""

from __future__ import annotations

__all__ = ["Users"]

from dataclasses import dataclass

import numpy as np
import torch

from embedshard.config import Config
from embedshard.data.batch import Batch
from embedshard.data.dataset import Dataset
from embedshard.evaluate.ranking import IntArray


@dataclass(frozen=True)
class Users:
    """How the user of a row is known.

    Attributes:
        feature: that names them.
        unknown: the row of the table that all users share whom the vocabulary does not know; -1 if there is none.
    """

    feature: str
    unknown: int = -1

    @classmethod
    def known_to(cls, config: Config, dataset: Dataset) -> Users | None:
        """Returns how a config's model knows users; None if it does not."""
        feature = config.identity("user_id")
        return None if feature is None else cls(feature, dataset.train[0].decoder.unknown_rows.get(feature, -1))

    def of(self, batch: Batch) -> torch.Tensor:
        """Returns the user of each row, (B,) int64; -1 where it is no one user."""
        ids_B = batch.ids[self.feature]
        return torch.where(ids_B == self.unknown, -1, ids_B)

    def of_rows(self, ids: IntArray) -> IntArray:
        """Returns the same of the feature's column."""
        return np.where(ids == self.unknown, -1, ids)
