"""Skip-gram over lists of ids: each id of a batch is looked up once as a centre and once as a context.

Its vectors are then put where the id stands in the lists, and pairs are places of both. Frequent ids stand in a batch many
times, so that is fewer lookups, and fewer vectors on their way between ranks, than one a place. Where contexts go by side, a
context's row is its vector before a centre and, beside it, the one after.

Shapes: V places of lists in all rows of this rank, I distinct ids of them, D dim.
"""

from __future__ import annotations

__all__ = ["ItemEmbedding"]

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from embedshard.config import Config, TableSpec, bias_key, context_key, negative_key, node_key
from embedshard.config.parts import ItemEmbeddingConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.output import PairOutput


class ItemEmbedding(nn.Module):
    """The model of kind `item_embedding`.

    Args:
        config: the config, whose model is an item embedding.
        specs: its tables.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        assert isinstance(config.model, ItemEmbeddingConfig), "the registry builds it for this kind"
        self._sequence = config.model.sequence
        self.embeddings = EmbeddingLookup(specs)

    def forward(self, batch: Batch) -> PairOutput:
        """Returns the vectors of the places of the batch's lists and of what was drawn. Collective if sharded."""
        assert batch.pairs is not None, "pairs are made of batches of the training data"
        assert batch.sequences is not None, "the collator fills what sequences are looked up by"
        lookups = self.embeddings(batch)
        context, sides = context_key(self._sequence), len(batch.pairs.sides)
        return PairOutput(
            pairs=batch.pairs,
            ids_I=batch.sequences[self._sequence].values(),
            centre_VD=F.embedding(batch.pairs.ids, lookups[self._sequence]),
            context_VD=F.embedding(batch.pairs.ids, lookups[context]) if context in lookups else None,
            bias_IS=_biases(lookups, bias_key(context), sides),
            candidate_ND=lookups.get(negative_key(context, 0)),
            candidate_bias_NS=_biases(lookups, negative_key(bias_key(context), 0), sides),
            node_UD=lookups.get(node_key(self._sequence)),
        )


def _biases(lookups: Mapping[str, torch.Tensor], key: str, sides: int) -> torch.Tensor | None:
    return lookups[key][:, :sides] if key in lookups else None
