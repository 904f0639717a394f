"""The mean loss of the pairs of held-out lists: how well an item_embedding predicts neighbours that it was not trained on.

The pairs, and what is drawn beside them, are made as in training, but from numbers that no step of a run has: they are the
same each time a set is measured, in every world. A block of rows is shared out as a global batch is.
"""

from __future__ import annotations

__all__ = ["PairLoss"]

from typing import Any

import numpy as np
import torch
from torch import nn

from embedshard.config import Config
from embedshard.data.collate import Collator
from embedshard.data.columns import Columns, gather, num_rows
from embedshard.data.negatives import Sampler
from embedshard.data.order import Position
from embedshard.errors import TrainingError
from embedshard.world import World

_FIRST_STEP = 2**40  # beyond those of any run
_PARTITION = -1


class PairLoss:
    """Measures the loss of held-out lists.

    Args:
        config: the config, whose model is an item_embedding.
        collator: makes pairs of their lists.
        sampler: draws what the objective compares pairs with; None where it draws nothing.
        objective: the loss.
        world: the processes that share the rows out.
    """

    def __init__(
        self, config: Config, collator: Collator, sampler: Sampler | None, objective: nn.Module, world: World
    ) -> None:
        self._collator, self._sampler, self._objective, self._world = collator, sampler, objective, world
        self._rows = config.train.global_batch_size

    def measure(self, model: Any, columns: Columns) -> dict[str, float]:
        """Returns `loss`, nan where there is no pair, and the number of `pairs`. Collective.

        Raises:
            TrainingError: if the loss is not finite.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for block in range(-(-num_rows(columns) // self._rows)):
            totals += self._of_block(model, columns, block)
        loss, pairs = self._world.sum(totals).tolist()
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss of held-out pairs is {loss}, so the model has diverged. Lower the learning rate, or go back to "
                f"an earlier checkpoint."
            )
        return {"loss": loss / pairs if pairs else float("nan"), "pairs": pairs}

    def _of_block(self, model: Any, columns: Columns, block: int) -> torch.Tensor:
        """Returns the sum of this rank's losses, and how many there are."""
        rank, world_size = self._world.rank, self._world.world_size
        size = self._rows // world_size
        rows = np.arange(block * self._rows + rank * size, block * self._rows + (rank + 1) * size, dtype=np.int64)
        mine = gather(columns, np.where(rows < num_rows(columns), rows, -1), None)
        position = Position(_FIRST_STEP + block, 0, _PARTITION, block, is_epoch_end=False)
        draws = None if self._sampler is None else self._sampler.draw(position.step, rank, world_size)
        batch = self._collator.batch(mine, 0, size, draws, position).to(self._world.device)
        output = model(batch)
        losses = self._objective(output, batch)
        counted = output.weights > 0
        return torch.stack([torch.where(counted, losses, 0.0).sum().double(), counted.sum().double()])
