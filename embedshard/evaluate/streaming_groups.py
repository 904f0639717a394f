"""AUC within users of training rows as the model predicted them before it learnt from them.

A window's rows are kept, in buffers as large as a window can be, and its users' AUCs are exact. Over the run it is the mean
of the windows' users' AUCs, each by its rows: to compare a user's rows of different windows would need all rows,
and would compare predictions of models that have learnt differently much. Users who have rows of both labels in no window
are not in it.

The buffers are saved with a checkpoint, so that a run that is resumed tells what it would have told.

Shapes: B rows on this rank, L labels, M rows of a window at most.
"""

from __future__ import annotations

__all__ = ["GroupedWindows"]

import numpy as np
import torch
from torch import nn

from embedshard.evaluate.discrimination import grouped_aucs
from embedshard.world import World


class GroupedWindows(nn.Module):
    """Keeps the rows of a window, and the sums of those before.

    Args:
        num_labels: L.
        most_rows: M, of all ranks, those without weight included.
        world: whose ranks' rows are taken together.
    """

    logits: torch.Tensor
    is_positive: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor
    count: torch.Tensor
    sums: torch.Tensor

    def __init__(self, num_labels: int, most_rows: int, world: World) -> None:
        super().__init__()
        self._world = world
        self._pending: list[tuple[torch.Tensor, ...]] = []
        self.register_buffer("logits", torch.zeros(most_rows, num_labels))
        self.register_buffer("is_positive", torch.zeros(most_rows, num_labels, dtype=torch.bool))
        self.register_buffer("weights", torch.zeros(most_rows))
        self.register_buffer("groups", torch.zeros(most_rows, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(num_labels, 2, dtype=torch.float64))

    def update(
        self, logits_BL: torch.Tensor, labels_BL: torch.Tensor, weights_B: torch.Tensor, groups_B: torch.Tensor
    ) -> None:
        """Adds this rank's rows of a step, as many as each other rank has. Not collective.

        Args:
            logits_BL: before the link function; those of rows of weight 0 may be anything.
            labels_BL: 1 where positive.
            weights_B: at least 0.
            groups_B: the user of each row; -1 where there is none.
        """
        rows = logits_BL.detach().float(), labels_BL == 1, weights_B.float(), groups_B
        self._pending.append(tuple(part.clone() for part in rows))

    def gather(self) -> None:
        """Adds what all ranks have met since the last time to the window. Collective."""
        if not self._pending:
            return
        parts = [self._world.gather(torch.cat(part).contiguous()) for part in zip(*self._pending, strict=True)]
        self._pending = []
        begin = int(self.count)
        end = begin + len(parts[0])
        assert end <= len(self.weights), "a window has no more steps than it was made for"
        for buffer, part in zip((self.logits, self.is_positive, self.weights, self.groups), parts, strict=True):
            buffer[begin:end] = part
        self.count += len(parts[0])

    def end_window(self) -> tuple[list[float], list[float]]:
        """Returns each label's value of the window and of the run, nan where no user has one, and begins a new window.

        Not collective; `gather` comes before it.
        """
        kept = slice(0, int(self.count))
        weights, groups = self.weights[kept].double().cpu().numpy(), self.groups[kept].cpu().numpy()
        counts = weights > 0
        weights, groups = weights[counts], groups[counts]
        window = []
        for place in range(self.logits.shape[1]):
            logits = self.logits[kept, place].cpu().numpy()[counts]
            is_positive = self.is_positive[kept, place].cpu().numpy()[counts]
            # In an order of their own: which rank had a row, and when it was gathered, changes no bit of a sum.
            order = np.lexsort((weights, is_positive, logits, groups))
            aucs, sizes = grouped_aucs(logits[order], is_positive[order], weights[order], groups[order])
            sums = torch.tensor([float(np.dot(aucs, sizes)), float(sizes.sum())], dtype=torch.float64)
            self.sums[place] += sums.to(self.sums.device)
            window.append(_mean(sums))
        for buffer in (self.logits, self.is_positive, self.weights, self.groups, self.count):
            buffer.zero_()
        return window, [_mean(sums) for sums in self.sums]


def _mean(sums: torch.Tensor) -> float:
    total, size = sums.tolist()
    return total / size if size else float("nan")
