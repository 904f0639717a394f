"""Tables and features as unsharded TorchRec collections, looked up by feature name.

A model asks for vectors by key and never for a collection's concatenated values, whose column order depends on the plan.
Tables are made on the meta device: they get memory when they are sharded, and values from `sharding/initialise.py`.

Shapes: B rows on this rank, V values of a key in all rows, D dim.
"""

from __future__ import annotations

__all__ = ["EmbeddingLookup", "table_modules", "table_weights"]

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import TableSpec
from embedshard.data.batch import Batch
from embedshard.errors import ConfigError

_DATA_TYPE = {"fp32": DataType.FP32, "fp16": DataType.FP16}


def table_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the collections of an unsharded model, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            yield path, module


def table_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weight of each table of a collection, (rows, D), by the table's name."""
    tables = module.embedding_bags if isinstance(module, EmbeddingBagCollection) else module.embeddings
    assert isinstance(tables, nn.ModuleDict), f"{type(module).__name__} is no collection of tables"
    return {name: table.get_parameter("weight") for name, table in tables.items()}


class EmbeddingLookup(nn.Module):
    """All tables of a model: collections of those that are pooled, with weights or without, and of sequences.

    Args:
        specs: the tables.

    Raises:
        ConfigError: if a table has a name that torch keeps for itself.

    Attributes:
        to_rows: turns ids into rows where they are not rows already, given whether this is training. Set from outside.
        is_uneven: whether ranks may look up different numbers of rows at a time. Set from outside.
        hand_on: what vectors by key are handed on through. Set from outside.
        looked_up_as: gives the batch that the model looks up for a batch of training, so that its ids can be sent before.
            Set by the model or its builder; None where nobody knows.
    """

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        self.to_rows: Callable[[Batch, bool], Batch] | None = None
        self.is_uneven = False
        self.hand_on: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
        self.looked_up_as: Callable[[Batch], Batch] | None = None
        for spec in specs:
            if hasattr(nn.ModuleDict, spec.name):
                raise ConfigError(
                    f"tables.{spec.name}: torch's ModuleDict, which holds the tables, keeps '{spec.name}' for itself. "
                    f"Name the table otherwise, such as '{spec.name}_table'."
                )
        pooled = [spec for spec in specs if not spec.is_sequence]
        self.plain = _bags([spec for spec in pooled if not spec.weighted], is_weighted=False)
        self.weighted = _bags([spec for spec in pooled if spec.weighted], is_weighted=True)
        by_dim: dict[int, list[TableSpec]] = {}
        for spec in specs:
            if spec.is_sequence:
                by_dim.setdefault(spec.dim, []).append(spec)
        # TorchRec wants the tables of one such collection to have the same dim.
        self.sequences = nn.ModuleDict({f"dim{dim}": _sequences(of_dim) for dim, of_dim in by_dim.items()})
        self._sequence_keys = {
            f"dim{dim}": [lookup.key for spec in of_dim for lookup in spec.lookups] for dim, of_dim in by_dim.items()
        }
        self._pooled_keys = {
            lookup.key for spec in specs if spec.is_sequence for lookup in spec.lookups if not lookup.is_sequence
        }

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns vectors by key, float32. Collective where tables are sharded.

        (B, D) of a key that is pooled; (V, D) of a sequence, whose lengths are those of `batch.sequences[key]`.
        """
        if torch.is_autocast_enabled(batch.weights.device.type):
            with torch.autocast(batch.weights.device.type, enabled=False):
                return self.forward(batch)
        if self.to_rows is not None:
            batch = self.to_rows(batch, self.training)
        vectors: dict[str, torch.Tensor] = {}
        for collection, ids in self.requests(batch):
            found = collection(ids)
            if collection is self.plain or collection is self.weighted:
                vectors.update(found.to_dict())
            else:
                asked = batch.sequences
                assert asked is not None, "sequences were asked for"
                vectors.update({key: self._pooled(key, found[key].values(), asked) for key in ids.keys()})  # noqa: SIM118
        return vectors if self.hand_on is None else self.hand_on(vectors)

    def requests(self, batch: Batch) -> Iterator[tuple[nn.Module, KeyedJaggedTensor]]:
        """Yields each collection that a batch looks something up in, with the rows that it looks up there."""
        for collection, ids in ((self.plain, batch.sparse), (self.weighted, batch.weighted)):
            if collection is not None:
                assert ids is not None, "the collator fills what collections are looked up by"
                yield collection, ids
        if batch.sequences is not None:
            for name, collection in self.sequences.items():
                of_keys = _of_keys(batch.sequences, self._sequence_keys[name])
                yield collection, KeyedJaggedTensor(keys=of_keys.keys(), values=of_keys.values(), lengths=of_keys.lengths())

    def _pooled(self, key: str, vectors_VD: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        if key not in self._pooled_keys:
            return vectors_VD
        jagged = ids[key]
        if ids.weights_or_none() is not None:
            vectors_VD = vectors_VD * jagged.weights().unsqueeze(1)
        lengths_B = jagged.lengths()
        rows_V = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        return vectors_VD.new_zeros(len(lengths_B), vectors_VD.shape[1]).index_add(0, rows_V, vectors_VD)


def _of_keys(ids: KeyedJaggedTensor, keys: list[str]) -> KeyedJaggedTensor:
    known = list(ids.keys())
    return ids if known == keys else ids.permute([known.index(key) for key in keys])


def _bags(specs: Sequence[TableSpec], is_weighted: bool) -> EmbeddingBagCollection | None:
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


def _sequences(specs: Sequence[TableSpec]) -> EmbeddingCollection:
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=spec.name,
                num_embeddings=spec.num_embeddings,
                embedding_dim=spec.dim,
                data_type=_DATA_TYPE[spec.dtype],
                feature_names=[lookup.key for lookup in spec.lookups],
            )
            for spec in specs
        ],
    )
