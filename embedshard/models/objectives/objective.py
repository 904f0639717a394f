"""What every objective is.

An objective gives one unweighted loss a row. Weighting, the sums over ranks and the mean are the loop's, so that they
are the same for all; so are the penalties on looked-up vectors, since they do not depend on the objective.
"""

from __future__ import annotations

__all__ = ["KEPT_ELEMENTS", "Hits", "ListHits", "Objective", "OwnHits", "l2_penalty", "row_blocks", "valid_ids"]

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from embedshard.data.batch import Batch
from embedshard.errors import ConfigError

_BLOCK_ELEMENTS = 2**20  # scores made at once: 4 MiB
_TIMES_ON_A_GPU = 2**6  # as many more there: its kernels are launched one by one, and each is to have enough to do
KEPT_ELEMENTS = 2**25
"""Scores of a rank of which something is kept for the backward pass instead of made again: 128 MiB."""


class Objective(nn.Module):
    """A loss, with whatever it estimates on the way as buffers."""

    def forward(self, output: Any, batch: Batch) -> torch.Tensor:
        """Returns the loss of each row, (B,) float32, in nats or squared units. Rows of weight 0 may hold anything.

        Collective where the objective says so. Changes its estimates: call it once a step, in training only.
        """
        raise NotImplementedError


def l2_penalty(lookups: Mapping[str, torch.Tensor], strengths: Mapping[str, float]) -> torch.Tensor:
    """Returns each row's penalty: the sum over keys of strength times the squared length of the pooled vector, (B,).

    Equal under every plan, unlike weight decay of fused optimizers. Drawn candidates are not penalised.

    Args:
        lookups: pooled vectors by key, (B, D) each.
        strengths: penalty by key; at least one.

    Raises:
        ConfigError: if the model does not hand on what a penalised key looked up.
    """
    missing = [key for key in strengths if key not in lookups]
    if missing:
        raise ConfigError(
            f"l2_lookup is asked for, but the model's output has no lookups['{missing[0]}']. "
            f"A custom model must put the dict that its lookup returned into its output."
        )
    return torch.stack([strength * lookups[key].square().sum(dim=1) for key, strength in strengths.items()]).sum(dim=0)


def valid_ids(batch: Batch, item_id: str) -> torch.Tensor:
    """Returns the rows' items, (B,) int64; -1 where the row has no weight and so is nobody's candidate."""
    return torch.where(batch.weights > 0, batch.ids[item_id], -1)


def row_blocks(num_rows: int, num_candidates: int, device: torch.device) -> Iterator[slice]:
    """Yields blocks of rows whose scores against all candidates are made at once; on a CPU they stay in the cache."""
    elements = _BLOCK_ELEMENTS * (1 if device.type == "cpu" else _TIMES_ON_A_GPU)
    size = max(1, elements // max(num_candidates, 1))
    return (slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size))


class Hits(Protocol):
    """Which candidates are left out of which rows."""

    def leave_out(self, scores_RN: torch.Tensor, rows: slice) -> torch.Tensor:
        """Fills the scores of a block of rows with -inf where the candidate is left out, and returns them."""
        ...


class OwnHits:
    """Which candidates are a row's own item: few, so they are found by sorting and not by comparing all with all.

    Args:
        own_B: the item of each row.
        candidate_N: the candidates.

    Attributes:
        count_B: how many each row has.
    """

    def __init__(self, own_B: torch.Tensor, candidate_N: torch.Tensor) -> None:
        sorted_N, self._order_N = candidate_N.sort(stable=True)
        self._first_B = torch.searchsorted(sorted_N, own_B)
        self.count_B = torch.searchsorted(sorted_N, own_B, right=True) - self._first_B

    def leave_out(self, scores_RN: torch.Tensor, rows: slice) -> torch.Tensor:
        """Fills the scores of a block of rows with -inf where the candidate is the row's own, and returns them."""
        rows_H, candidates_H = self.pairs(rows)
        scores_RN.view(-1).index_fill_(0, rows_H * scores_RN.shape[1] + candidates_H, -torch.inf)
        return scores_RN

    def pairs(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns places of rows, from the block's first on, and those of the candidates that are their own, (H,) each."""
        first_R, count_R = self._first_B[rows], self.count_B[rows]
        rows_H = torch.repeat_interleave(count_R)
        places_H = torch.arange(len(rows_H), device=rows_H.device) + (first_R - count_R.cumsum(0) + count_R)[rows_H]
        return rows_H, self._order_N[places_H]


class ListHits:
    """Which candidates are an item of a place's list, wherever in it.

    Args:
        lists: how many lists there are.
        list_V: the list of each place.
        item_I: items of lists.
        list_I: whose they are.
        candidate_N: the candidates.
    """

    def __init__(
        self, lists: int, list_V: torch.Tensor, item_I: torch.Tensor, list_I: torch.Tensor, candidate_N: torch.Tensor
    ) -> None:
        items_H, candidates_H = OwnHits(item_I, candidate_N).pairs(slice(None))
        self._is_hit_LN = torch.zeros(lists, len(candidate_N), dtype=torch.bool, device=candidate_N.device)
        self._is_hit_LN[list_I[items_H], candidates_H] = True
        self._list_V = list_V

    def leave_out(self, scores_RN: torch.Tensor, rows: slice) -> torch.Tensor:
        """Fills the scores of a block of places with -inf where the candidate is in the list, and returns them."""
        return scores_RN.masked_fill_(self._is_hit_LN[self._list_V[rows]], -torch.inf)
