"""SASRec: causal self-attention over the items that a user met; each place tells which comes next.

Shapes: B rows on this rank, V places of lists in all rows, L places of the longest row, D dim, H heads, N drawn items.
"""

from __future__ import annotations

__all__ = ["SASRec"]

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from embedshard.config import Config, TableSpec, negative_key, num_negative_slots
from embedshard.config.parts import SASRecConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.layers import PlaceDropout, padded
from embedshard.models.output import NextItemOutput


class _Block(nn.Module):
    """Attention of each place to those up to it, then two dense layers; both are added to what comes in."""

    def __init__(self, dim: int, heads: int, rate: float, seed: int, first_stream: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm, self.dense_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # A bias of keys adds the same to all scores of a place: it would be trained by rounding alone.
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.value, self.attended = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention_dropout = PlaceDropout(rate, seed, first_stream)
        self.dense_dropout = PlaceDropout(rate, seed, first_stream + 1)

    def forward(self, values_BLD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns (B, L, D). Padding is after a row's last place, where nothing but padding looks."""
        size, length, dim = values_BLD.shape
        normed_BLD = self.attention_norm(values_BLD)
        query, key, value = (
            layer(normed_BLD).view(size, length, self._heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = (
            F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(size, length, dim)
        )
        values_BLD = values_BLD + self.attention_dropout(self.attended(attended), batch)
        dense_BLD = self.output(torch.relu(self.dense(self.dense_norm(values_BLD))))
        return values_BLD + self.dense_dropout(dense_BLD, batch)


class SASRec(nn.Module):
    """The model of kind `sasrec` (Kang and McAuley 2018), layer norm before each layer as in the paper.

    A place has a vector of its own by how far it is from the row's last. A row of the training set gives a loss at every
    place: what comes next is the next item of its list, and at the last place its own item.

    Args:
        config: the config, whose model is a SASRec.
        specs: its tables.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, SASRecConfig), "the registry builds it for this kind"
        self._sequence, self._item_id = model.sequence, model.item_id
        self._num_slots = num_negative_slots(config)
        dim, most = config.width(model.sequence), config.max_length(model.sequence)
        assert most is not None, "the config checks that the length has a most"
        self.embeddings = EmbeddingLookup(specs)
        self.places = nn.Parameter(torch.randn(most, dim) / dim**0.5)
        self.dropout = PlaceDropout(model.dropout, config.seed, 1)
        self.blocks = nn.ModuleList(
            [_Block(dim, model.heads, model.dropout, config.seed, 2 + 2 * block) for block in range(model.blocks)]
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, batch: Batch) -> NextItemOutput:
        """Returns what is known at each place and what comes next. Collective where tables are sharded."""
        assert batch.sequences is not None, "the collator fills what sequences are looked up by"
        assert batch.draws is not None, "the reader draws what the objective asks for"
        lookups, lengths_B = self.embeddings(batch), batch.sequence_lengths(self._sequence)
        hidden_BLD, reached_BL = self._hidden(lookups, batch)
        rows_V = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        last = (torch.cumsum(lengths_B, 0) - 1)[lengths_B > 0]
        target_VD = lookups[self._sequence].roll(-1, dims=0).index_copy(0, last, lookups[self._item_id][lengths_B > 0])
        own_B = batch.ids[self._item_id]
        target_V = batch.sequences[self._sequence].values().roll(-1).index_copy(0, last, own_B[lengths_B > 0])
        drawn = [lookups[negative_key(self._item_id, slot)] for slot in range(self._num_slots)]
        return NextItemOutput(
            query_VD=hidden_BLD[reached_BL],
            target_VD=target_VD,
            target_V=target_V,
            negative_ND=torch.cat(drawn)[: len(batch.draws.ids)],
            weights=batch.weights[rows_V],
            rows=rows_V,
        )

    def encode_queries(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D): what is known after each row's list; zeros for an empty one. Collective as `forward`."""
        lengths_B, vectors_VD = batch.sequence_lengths(self._sequence), self.embeddings(batch)[self._sequence]
        return self.encode_padded(padded(vectors_VD, lengths_B, _longest(lengths_B), "post")[0], lengths_B, batch)

    def encode_padded(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns the same of lists' vectors that are padded at their end; of the batch, what dropout draws by is read."""
        hidden_BLD = self._of_padded(values_BLD, lengths_B, batch)
        rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
        last_BD = hidden_BLD[rows_B, (lengths_B - 1).clamp(min=0)]
        return torch.where((lengths_B > 0).unsqueeze(1), last_BD, 0.0)

    def encode_candidates(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D) vectors of items; the batch's lists may be empty. Collective as `forward`."""
        return self.embeddings(batch)[self._item_id]

    def _hidden(self, lookups: Mapping[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is known at each place, (B, L, D), and which places there are, (B, L)."""
        lengths_B, vectors_VD = batch.sequence_lengths(self._sequence), lookups[self._sequence]
        values_BLD, reached_BL = padded(vectors_VD, lengths_B, _longest(lengths_B), "post")
        return self._of_padded(values_BLD, lengths_B, batch), reached_BL

    def _of_padded(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        _, longest, dim = values_BLD.shape
        from_end_BL = (lengths_B.unsqueeze(1) - 1 - torch.arange(longest, device=lengths_B.device)).clamp(min=0)
        values_BLD = values_BLD * dim**0.5 + F.embedding(from_end_BL, self.places)
        values_BLD = self.dropout(values_BLD, batch)
        for block in self.blocks:
            values_BLD = block(values_BLD, batch)
        return self.norm(values_BLD)


def _longest(lengths_B: torch.Tensor) -> int:
    return max(1, int(lengths_B.max())) if len(lengths_B) else 1
