"""Classifies a text, or any sequence of ids: its vectors through an encoder, beside pooled features, then dense layers.

Shapes: B rows on this rank, V values of the sequence in all rows, D dim, H output of the encoder, C classes or 1.
"""

from __future__ import annotations

__all__ = ["TextClassifier", "make_encoder"]

from collections.abc import Sequence

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import (
    ConvEncoder,
    DenseFeature,
    FlattenEncoder,
    PooledEncoder,
    RecurrentEncoder,
    TextClassifierConfig,
)
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.layers import (
    POOLINGS,
    AttentionPooling,
    Convolutions,
    Dropout,
    Flatten,
    MaxPooling,
    MeanPooling,
    Recurrent,
    mlp,
    side_by_side,
)
from embedshard.models.output import ClassOutput

Encoder = MeanPooling | MaxPooling | AttentionPooling | Flatten | Convolutions | Recurrent


def make_encoder(
    encoder: FlattenEncoder | PooledEncoder | ConvEncoder | RecurrentEncoder, dim: int, max_length: int | None
) -> Encoder:
    """Returns what makes (B, H) of a sequence's (V, D) and lengths (B,); H is its `width`."""
    match encoder:
        case FlattenEncoder():
            assert max_length is not None, "the config checks that the length is fixed"
            return Flatten(dim, max_length, encoder.padding)
        case PooledEncoder():
            return POOLINGS[encoder.kind](dim)
        case ConvEncoder():
            return Convolutions(dim, encoder.widths, encoder.channels)
        case RecurrentEncoder():
            return Recurrent(encoder.kind, dim, encoder.hidden, encoder.layers, encoder.bidirectional)


class TextClassifier(nn.Module):
    """The model of kind `text_classifier`.

    Args:
        config: the config, whose model is a text classifier.
        specs: its tables.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, TextClassifierConfig), "the registry builds it for this kind"
        self._text, self._features = model.text, list(model.features)
        self._dense = [name for name, feature in config.features.items() if isinstance(feature, DenseFeature)]
        self.embeddings = EmbeddingLookup(specs)
        width = config.pooled_width(self._features)
        self.encoder = None
        if self._text is not None:
            self.encoder = make_encoder(model.encoder, config.width(self._text), config.max_length(self._text))
            width += self.encoder.width
        self.dropout = Dropout(model.dropout, config.seed, layer=1)
        self.head = mlp(width, [*model.mlp, config.num_logits])

    def forward(self, batch: Batch) -> ClassOutput:
        """Returns the logits of the batch's rows. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> ClassOutput:
        """Returns the same of what was looked up."""
        parts = []
        if self.encoder is not None and self._text is not None:
            parts.append(self.encoder(lookups[self._text], batch.sequence_lengths(self._text)))
        for name in self._features:
            place = self._dense.index(name) if name in self._dense else None
            parts.append(lookups[name] if place is None else batch.dense[:, place : place + 1])
        return ClassOutput(self.head(self.dropout(side_by_side(parts), batch)), lookups)
