"""Layers over sequences that are given padded instead of one after another, for programs that are traced.

A traced program has no number that depends on the values of its input, such as the length of the longest row or how many
values all rows have together. Given (B, L, D) and lengths, every shape is known from the input's. Each form here shares the
weights of the layer that it is made of and gives the same numbers; what stands behind a row's end has no influence.

Shapes: B rows, L places of the longest row, D dim, H output.
"""

from __future__ import annotations

__all__ = ["Padded", "PaddedTarget", "pad_layers"]

from typing import Final, cast

import torch
from torch import nn

from embedshard.models.fields import Fields, TargetPooling
from embedshard.models.layers import AttentionPooling, Convolutions, Flatten, MaxPooling, MeanPooling, Recurrent
from embedshard.models.text_classifier import TextClassifier
from embedshard.models.two_tower import TwoTower

_WEIGHTS: Final = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def pad_layers(model: nn.Module) -> None:
    """Makes a model read its sequences padded: (B, L, D) for (V, D). In place; its weights stay the same tensors."""
    if isinstance(model, TextClassifier) and model.encoder is not None:
        model.encoder = Padded(model.encoder)  # type: ignore[assignment]  # it is called alike
    fields = getattr(model, "fields", None)
    reader = fields if isinstance(fields, Fields) else model
    poolings = reader.poolings if isinstance(reader, Fields | TwoTower) else nn.ModuleDict()
    for name, layer in list(poolings.items()):
        poolings[name] = PaddedTarget(layer) if isinstance(layer, TargetPooling) else Padded(layer)


class Padded(nn.Module):
    """A pooling or an encoder.

    Args:
        layer: whose weights it has.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.steps = nn.ModuleList(_directions(layer)) if isinstance(layer, Recurrent) else None

    def forward(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, H); zeros for an empty row, but of a flattened one what it has."""
        layer = self.layer
        reached_BL1 = _reached(values_BLD, lengths_B).unsqueeze(2)
        values_BLD = torch.where(reached_BL1, values_BLD, 0.0)
        is_empty_B1 = (lengths_B == 0).unsqueeze(1)
        match layer:
            case MeanPooling():
                return values_BLD.sum(dim=1) / lengths_B.clamp(min=1).unsqueeze(1)
            case MaxPooling():
                return torch.where(is_empty_B1, 0.0, values_BLD.masked_fill(~reached_BL1, -torch.inf).amax(dim=1))
            case AttentionPooling():
                scores_BL1 = layer.score(torch.tanh(layer.hidden(values_BLD)))
                shares_BL1 = torch.softmax(scores_BL1.masked_fill(~reached_BL1, -torch.inf), dim=1)
                return torch.where(is_empty_B1, 0.0, (values_BLD * shares_BL1).sum(dim=1))
            case Flatten() | Convolutions():
                return layer.of_padded(values_BLD, lengths_B)
            case Recurrent():
                return torch.where(is_empty_B1, 0.0, self._recurrent(values_BLD, lengths_B))
        raise AssertionError(f"{type(layer).__name__} has no padded form")

    def _recurrent(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Reads rows from their first place, and backwards from their last, so that padding comes after what is read."""
        assert self.steps is not None, "made with it"
        directions = 2 if cast(Recurrent, self.layer).cell.bidirectional else 1
        last_B = (lengths_B - 1).clamp(min=0)
        rows_B = torch.arange(values_BLD.shape[0], device=values_BLD.device)
        places_L = torch.arange(values_BLD.shape[1], device=values_BLD.device)
        # From the last place back to the first, then the padding as it lies.
        turned_BL = torch.where(places_L <= last_B.unsqueeze(1), last_B.unsqueeze(1) - places_L, places_L)
        ends: list[torch.Tensor] = []
        for number, step in enumerate(self.steps):
            if number % directions == 0:
                read_BLD, ends, outputs = values_BLD, [], []
            given = read_BLD[rows_B.unsqueeze(1), turned_BL] if number % directions else read_BLD
            output_BLH = step(given)
            ends.append(output_BLH[rows_B, last_B])
            outputs.append(output_BLH[rows_B.unsqueeze(1), turned_BL] if number % directions else output_BLH)
            if len(outputs) == directions:
                values_BLD = torch.cat(outputs, dim=2)
        return torch.cat(ends, dim=1)


class PaddedTarget(TargetPooling):
    """A pooling by a target."""

    def __init__(self, layer: TargetPooling) -> None:
        nn.Module.__init__(self)  # the weights are the layer's
        self.weight = layer.weight

    def forward(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor, target_BD: torch.Tensor) -> torch.Tensor:
        """Returns (B, D); zeros for an empty row."""
        reached_BL1 = _reached(values_BLD, lengths_B).unsqueeze(2)
        values_BLD = torch.where(reached_BL1, values_BLD, 0.0)
        target_BLD = target_BD.unsqueeze(1).expand_as(values_BLD)
        seen = torch.cat([values_BLD, target_BLD, values_BLD - target_BLD, values_BLD * target_BLD], dim=2)
        return (values_BLD * self.weight(seen)).sum(dim=1)


def _reached(values_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(values_BLD.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(1)


class _Direction(nn.Module):
    """One layer of a recurrent cell in one direction, by torch's function: a module keeps its weights a second time."""

    def __init__(self, cell: nn.GRU | nn.LSTM, suffix: str) -> None:
        super().__init__()
        self._is_gru, self._hidden = isinstance(cell, nn.GRU), cell.hidden_size
        self.weights = nn.ParameterList([getattr(cell, f"{name}_{suffix}") for name in _WEIGHTS])

    def forward(self, values_BLD: torch.Tensor) -> torch.Tensor:
        """Returns what it knows at each place, (B, L, H)."""
        begin = values_BLD.new_zeros(1, values_BLD.shape[0], self._hidden)
        weights = list(self.weights)
        if self._is_gru:
            return torch.gru(values_BLD, begin, weights, True, 1, 0.0, False, False, True)[0]
        return torch.lstm(values_BLD, (begin, begin), weights, True, 1, 0.0, False, False, True)[0]


def _directions(layer: Recurrent) -> list[nn.Module]:
    """Returns the layers and directions of a cell, in order."""
    suffixes = ("", "_reverse") if layer.cell.bidirectional else ("",)
    return [_Direction(layer.cell, f"l{number}{suffix}") for number in range(layer.cell.num_layers) for suffix in suffixes]
