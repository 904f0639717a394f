"""Layers that models share.

Shapes: B rows on this rank, V values of a sequence in all rows, L places of the longest row, D dim, H output of an encoder.
"""

from __future__ import annotations

__all__ = [
    "POOLINGS",
    "AttentionPooling",
    "Convolutions",
    "Dropout",
    "Flatten",
    "MaxPooling",
    "MeanPooling",
    "PlaceDropout",
    "Recurrent",
    "longest",
    "mlp",
    "padded",
    "places_of",
    "side_by_side",
]

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from embedshard.data.batch import Batch, on_device

_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as int64


def mlp(width: int, sizes: Sequence[int]) -> nn.Sequential:
    """Returns linear layers with ReLU between them and none after the last: (B, width) to (B, sizes[-1])."""
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes):
        if i:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(width, size))
        width = size
    return nn.Sequential(*layers)


# ------------------------------------------------------------------------------------------------------------- dropout
def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns (B, all widths) of each (B, width); of one part alone itself, and no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class _Drawn(nn.Module):
    """Dropout whose draws are a function of (seed, layer, step, row): the same in every world and after every resumption.

    Args:
        rate: share of the numbers that become 0 in training.
        seed: the run's.
        layer: tells this layer's draws from those of others.
    """

    def __init__(self, rate: float, seed: int, layer: int) -> None:
        super().__init__()
        self._rate, self._key = rate, (seed * 1_000_003 + layer) % 2**62

    def _keys(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns a word for each row, (B,)."""
        step = batch.training_position.step
        return _mixed(_mixed(on_device(batch.rows, device) + step * 0x9E3779B9) + self._key)


class Dropout(_Drawn):
    """Dropout of a vector a row."""

    def forward(self, values_BH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns (B, H); as given in evaluation, else scaled so that the mean stays."""
        if not self.training or self._rate == 0.0:
            return values_BH
        places_H = torch.arange(values_BH.shape[1], device=values_BH.device)
        draws_BH = _mixed(self._keys(batch, values_BH.device).unsqueeze(1) + places_H) & 0xFFFFFF
        return values_BH * (draws_BH >= self._rate * 2**24) / (1.0 - self._rate)


class PlaceDropout(_Drawn):
    """Dropout of a vector a place of a row: what is drawn for it depends on no other place and no other row."""

    def forward(self, values_VD: torch.Tensor, batch: Batch, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (V, D), D a multiple of 4; as given in evaluation, else scaled so that the mean stays.

        Args:
            values_VD: of all rows one after another; in evaluation of any shape.
            batch: whose rows they are.
            lengths_B: places of each row.
        """
        if not self.training or self._rate == 0.0:
            return values_VD
        rows_V, places_V = places_of(lengths_B)
        keys_V = _mixed(self._keys(batch, values_VD.device)[rows_V] + places_V)
        odd = _mixed(torch.arange(1, values_VD.shape[1] // 4 + 1, device=values_VD.device)) | 1
        words = keys_V.unsqueeze(1) * odd  # a key is mixed already, so that this and one shift tell its words apart
        words ^= _shifted(words, 32)
        draws_VD = words.view(torch.int16)  # four a word
        return values_VD * (draws_VD >= round(self._rate * 2**16) - 2**15).to(values_VD.dtype).div_(1.0 - self._rate)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Returns splitmix64's finaliser (Steele et al. 2014) of int64s, which wrap around."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        words = (words ^ _shifted(words, shift)) * factor
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words >> bits) & (2 ** (64 - bits) - 1)


# ----------------------------------------------------------------------------------------------------------- sequences
def padded(
    values_VD: torch.Tensor, lengths_B: torch.Tensor, length: int, side: Literal["pre", "post"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows' sequences one below the other, (B, L, D), zeros where they are shorter, and where they are, (B, L).

    Args:
        values_VD: all sequences one after another.
        lengths_B: of each; at most L.
        length: L.
        side: where the zeros are.
    """
    num_rows = len(lengths_B)
    if len(values_VD) == num_rows * length:  # no row is shorter: they lie as they should
        return values_VD.view(num_rows, length, -1), lengths_B.new_ones((num_rows, length), dtype=torch.bool)
    rows_V, places_V = places_of(lengths_B)
    if side == "pre":
        places_V = places_V + (length - lengths_B)[rows_V]
    flat = values_VD.new_zeros(num_rows * length, values_VD.shape[1]).index_copy(0, rows_V * length + places_V, values_VD)
    columns_L = torch.arange(length, device=lengths_B.device)
    reached_BL = columns_L < lengths_B.unsqueeze(1)
    return flat.view(num_rows, length, -1), reached_BL.flip(1) if side == "pre" else reached_BL


def places_of(lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the row of each value, and its place there."""
    offsets_B = torch.cumsum(lengths_B, 0) - lengths_B
    rows_V = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
    return rows_V, torch.arange(len(rows_V), device=lengths_B.device) - offsets_B[rows_V]


class MeanPooling(nn.Module):
    """The mean of a row's vectors; zeros for an empty row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, D)."""
        rows_V, _ = places_of(lengths_B)
        sums_BD = values_VD.new_zeros(len(lengths_B), values_VD.shape[1]).index_add(0, rows_V, values_VD)
        return sums_BD / lengths_B.clamp(min=1).unsqueeze(1)


class MaxPooling(nn.Module):
    """The greatest of a row's numbers in each column; zeros for an empty row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, D)."""
        values_BLD, reached_BL = padded(values_VD, lengths_B, longest(lengths_B), "post")
        return _masked_max(values_BLD, reached_BL)


class AttentionPooling(nn.Module):
    """A weighted mean of a row's vectors, by softmax over what a small network makes of each (Yang et al. 2016)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.hidden, self.score = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, D); zeros for an empty row."""
        scores_V = self.score(torch.tanh(self.hidden(values_VD))).squeeze(1)
        rows_V, _ = places_of(lengths_B)
        most_B = scores_V.detach().new_full((len(lengths_B),), -torch.inf)
        most_B = most_B.scatter_reduce(0, rows_V, scores_V.detach(), "amax")
        shares_V = torch.exp(scores_V - most_B[rows_V])
        sums_B = shares_V.new_zeros(len(lengths_B)).index_add(0, rows_V, shares_V)
        weighted_VD = values_VD * (shares_V / sums_B[rows_V]).unsqueeze(1)
        return values_VD.new_zeros(len(lengths_B), values_VD.shape[1]).index_add(0, rows_V, weighted_VD)


POOLINGS: dict[str, type[MeanPooling | MaxPooling | AttentionPooling]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "attention": AttentionPooling,
}
"""What makes one vector of a row's, by the name that a config gives it."""


class Flatten(nn.Module):
    """A row's vectors side by side, zeros where it is shorter than the longest that may be.

    Args:
        dim: D.
        length: L.
        side: where the zeros are.
    """

    def __init__(self, dim: int, length: int, side: Literal["pre", "post"]) -> None:
        super().__init__()
        self._length, self._side = length, side
        self.width = dim * length

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, L * D)."""
        return padded(values_VD, lengths_B, self._length, self._side)[0].flatten(1)

    def of_padded(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns the same of rows that are padded at their end, all to the length that may be."""
        if self._side == "pre":
            places_BL = torch.arange(self._length, device=lengths_B.device) - (self._length - lengths_B).unsqueeze(1)
            indices_BLD = places_BL.remainder(self._length).unsqueeze(2).expand_as(values_BLD)
            values_BLD = values_BLD.gather(1, indices_BLD)  # zeros from the end come to the front
        return values_BLD.flatten(1)


class Convolutions(nn.Module):
    """Convolutions of several widths, ReLU and the greatest over all places (Kim 2014).

    A window may stick out of the text at either end, where there are zeros; one without any word counts nowhere.

    Args:
        dim: D.
        widths: of the windows.
        channels: of each.
    """

    def __init__(self, dim: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(dim, channels, width, padding=width - 1) for width in widths])
        self._widths = list(widths)
        self.width = channels * len(widths)

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, channels * widths); zeros for an empty row."""
        values_BLD, _ = padded(values_VD, lengths_B, longest(lengths_B), "post")
        return self.of_padded(values_BLD, lengths_B)

    def of_padded(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns the same of rows that are padded with zeros at their end."""
        found = []
        for layer, width in zip(self.layers, self._widths, strict=True):
            windows_BLH = torch.relu(layer(values_BLD.transpose(1, 2))).transpose(1, 2)
            places_L = torch.arange(windows_BLH.shape[1], device=lengths_B.device)
            ends_B = torch.where(lengths_B > 0, lengths_B + width - 1, 0)
            found.append(_masked_max(windows_BLH, places_L < ends_B.unsqueeze(1)))
        return torch.cat(found, dim=1)


class Recurrent(nn.Module):
    """A GRU or an LSTM; what it ends with, of both directions if there are two.

    Rows are packed, so that it never sees padding.

    Args:
        kind: which.
        dim: D.
        hidden: size of its state.
        layers: one upon the other.
        bidirectional: whether a second one reads from the end.
    """

    def __init__(self, kind: Literal["gru", "lstm"], dim: int, hidden: int, layers: int, bidirectional: bool) -> None:
        super().__init__()
        make = nn.GRU if kind == "gru" else nn.LSTM
        self.cell = make(dim, hidden, num_layers=layers, batch_first=True, bidirectional=bidirectional)
        self._directions = 2 if bidirectional else 1
        self.width = hidden * self._directions

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, H); zeros for an empty row."""
        values_BLD, _ = padded(values_VD, lengths_B, longest(lengths_B), "post")
        packed = nn.utils.rnn.pack_padded_sequence(
            values_BLD, lengths_B.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.cell(packed)
        last = state[0] if isinstance(state, tuple) else state
        ends_BH = last[-self._directions :].transpose(0, 1).flatten(1)
        return torch.where((lengths_B > 0).unsqueeze(1), ends_BH, 0.0)


def longest(lengths_B: torch.Tensor) -> int:
    """Returns L, the places of the longest row; at least 1."""
    return max(1, int(lengths_B.max())) if len(lengths_B) else 1


def _masked_max(values_BLH: torch.Tensor, counts_BL: torch.Tensor) -> torch.Tensor:
    """Returns (B, H): the greatest over the places that count; zeros where none does."""
    greatest_BH = values_BLH.masked_fill(~counts_BL.unsqueeze(2), -torch.inf).amax(dim=1)
    return torch.where(counts_BL.any(dim=1).unsqueeze(1), greatest_BH, 0.0)
