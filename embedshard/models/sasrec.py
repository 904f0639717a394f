"""SASRec: causal self-attention over the items that a user met; each place tells which comes next.

Shapes: B rows on this rank, V places of lists in all rows, L places of the longest row, D dim, H heads, N drawn items.
"""

from __future__ import annotations

__all__ = ["SASRec"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from embedshard.config import Config, TableSpec, negative_key, num_negative_slots
from embedshard.config.parts import SASRecConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.layers import PlaceDropout, longest, padded, places_of
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

    def forward(self, values_VD: torch.Tensor, lengths_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns (V, D) of rows one after another; in evaluation also (B, L, D) of rows that are padded at their end."""
        normed_VD = self.attention_norm(values_VD)
        query_VD, key_VD, value_VD = self.query(normed_VD), self.key(normed_VD), self.value(normed_VD)
        attended_VD = _attended(query_VD, key_VD, value_VD, lengths_B, self._heads)
        values_VD = values_VD + self.attention_dropout(self.attended(attended_VD), batch, lengths_B)
        dense_VD = self.output(torch.relu(self.dense(self.dense_norm(values_VD))))
        return values_VD + self.dense_dropout(dense_VD, batch, lengths_B)


def _attended(
    query_VD: torch.Tensor, key_VD: torch.Tensor, value_VD: torch.Tensor, lengths_B: torch.Tensor, heads: int
) -> torch.Tensor:
    """Returns what each place finds in those of its row up to it, of rows one after another or padded, as they are given."""
    if query_VD.dim() == 3:
        return _causal(query_VD, key_VD, value_VD, heads)  # padding is behind, where nothing but padding looks
    if _is_cpu(query_VD):  # a row at a time stays in the cache, and there is no padding
        lengths = lengths_B.tolist()
        rows = zip(*(torch.split(part.unsqueeze(0), lengths, 1) for part in (query_VD, key_VD, value_VD)), strict=True)
        return torch.cat([_causal(query, key, value, heads) for query, key, value in rows], dim=1).squeeze(0)
    length = longest(lengths_B)
    (query_BLD, reached_BL), (key_BLD, _), (value_BLD, _) = (
        padded(part, lengths_B, length, "post") for part in (query_VD, key_VD, value_VD)
    )
    return _causal(query_BLD, key_BLD, value_BLD, heads)[reached_BL]


def _causal(query_BLD: torch.Tensor, key_BLD: torch.Tensor, value_BLD: torch.Tensor, heads: int) -> torch.Tensor:
    size, length, dim = query_BLD.shape
    query, key, value = (
        part.view(size, length, heads, dim // heads).transpose(1, 2) for part in (query_BLD, key_BLD, value_BLD)
    )
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


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
        rows_V, last = places_of(lengths_B)[0], _last_places(lengths_B)
        target_VD = lookups[self._sequence].roll(-1, dims=0).index_copy(0, last, lookups[self._item_id][lengths_B > 0])
        own_B = batch.ids[self._item_id]
        item_V = batch.sequences[self._sequence].values()
        target_V = item_V.roll(-1).index_copy(0, last, own_B[lengths_B > 0])
        drawn = [lookups[negative_key(self._item_id, slot)] for slot in range(self._num_slots)]
        return NextItemOutput(
            query_VD=self._hidden(lookups[self._sequence], lengths_B, batch),
            item_V=item_V,
            target_VD=target_VD,
            target_V=target_V,
            negative_ND=torch.cat(drawn)[: len(batch.draws.ids)],
            weights=batch.weights[rows_V],
            rows=rows_V,
        )

    def encode_queries(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D): what is known after each row's list; zeros for an empty one. Collective as `forward`."""
        lengths_B, vectors_VD = batch.sequence_lengths(self._sequence), self.embeddings(batch)[self._sequence]
        last_VD = self._hidden(vectors_VD, lengths_B, batch)[_last_places(lengths_B)]
        return last_VD.new_zeros(len(lengths_B), last_VD.shape[1]).masked_scatter((lengths_B > 0).unsqueeze(1), last_VD)

    def encode_padded(self, values_BLD: torch.Tensor, lengths_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns the same, in evaluation, of lists' vectors that are padded at their end."""
        hidden_BLD = self._hidden(values_BLD, lengths_B, batch)
        rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
        last_BD = hidden_BLD[rows_B, (lengths_B - 1).clamp(min=0)]
        return torch.where((lengths_B > 0).unsqueeze(1), last_BD, 0.0)

    def encode_candidates(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D) vectors of items; the batch's lists may be empty. Collective as `forward`."""
        return self.embeddings(batch)[self._item_id]

    def _hidden(self, values_VD: torch.Tensor, lengths_B: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns what is known at each place, of the shape of the vectors there: (V, D), or (B, L, D) of padded lists."""
        if values_VD.dim() == 2:
            rows_V, places_V = places_of(lengths_B)
            from_end_V = lengths_B[rows_V] - 1 - places_V
        else:
            places_L = torch.arange(values_VD.shape[1], device=lengths_B.device)
            from_end_V = (lengths_B.unsqueeze(1) - 1 - places_L).clamp(min=0)
        values_VD = values_VD * values_VD.shape[-1] ** 0.5 + F.embedding(from_end_V, self.places)
        values_VD = self.dropout(values_VD, batch, lengths_B)
        for block in self.blocks:
            values_VD = block(values_VD, lengths_B, batch)
        return self.norm(values_VD)


def _last_places(lengths_B: torch.Tensor) -> torch.Tensor:
    """Returns where each row ends that is not empty, among the places of all rows."""
    return (torch.cumsum(lengths_B, 0) - 1)[lengths_B > 0]


def _is_cpu(values: torch.Tensor) -> bool:
    return values.device.type == "cpu"
