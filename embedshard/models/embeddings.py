"""Tables and features as unsharded TorchRec collections, looked up by feature name.

A model asks for vectors by key and never for a collection's concatenated values, whose column order depends on the plan.
Tables are made on the meta device: they get memory when they are sharded, and values from `sharding/initialise.py`.
"""

from __future__ import annotations

__all__ = ["EmbeddingLookup"]

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embedshard.config import TableSpec
from embedshard.data.batch import Batch

_DATA_TYPE = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class EmbeddingLookup(nn.Module):
    """All tables of a model: one collection of those looked up with weights, one of the others.

    Args:
        specs: the tables.
    """

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        self.plain = self._collection([spec for spec in specs if not spec.weighted], is_weighted=False)
        self.weighted = self._collection([spec for spec in specs if spec.weighted], is_weighted=True)

    @staticmethod
    def _collection(specs: Sequence[TableSpec], is_weighted: bool) -> EmbeddingBagCollection | None:
        if not specs:
            return None
        return EmbeddingBagCollection(
            device=torch.device("meta"),
            is_weighted=is_weighted,
            tables=[
                EmbeddingBagConfig(
                    name=spec.name,
                    num_embeddings=spec.num_embeddings,
                    embedding_dim=spec.dim,
                    data_type=_DATA_TYPE[spec.dtype],
                    pooling=PoolingType.SUM,
                    feature_names=[lookup.key for lookup in spec.lookups],
                )
                for spec in specs
            ],
        )

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the pooled vectors of each key, (B, dim) float32. Collective where tables are sharded."""
        vectors: dict[str, torch.Tensor] = {}
        for collection, ids in ((self.plain, batch.sparse), (self.weighted, batch.weighted)):
            if collection is not None:
                vectors.update(collection(ids).to_dict())
        return vectors
