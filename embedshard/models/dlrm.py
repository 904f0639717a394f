"""DLRM: dot products of all pairs of features' vectors, the dense features made one vector among them.

Shapes: B rows on this rank, D dim of all vectors, F dense features, V vectors of a row, P pairs of them.
"""

from __future__ import annotations

__all__ = ["DLRM", "DotInteraction"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from embedshard.config import Config, TableSpec
from embedshard.config.parts import DLRMConfig
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.fields import Fields
from embedshard.models.mlp import MLPMaker
from embedshard.models.output import LabelOutput
from embedshard.world import World


class DLRM(nn.Module):
    """The model of kind `dlrm` (Naumov et al. 2019).

    Args:
        config: the config, whose model is a DLRM.
        specs: its tables.
        world: whose ranks train; None where nothing is trained.
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec], world: World | None) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, DLRMConfig), "the registry builds it for this kind"
        self.embeddings = EmbeddingLookup(specs)
        self.fields = Fields(config, model)
        make = MLPMaker(model.norm, model.dropout, config.seed, world)
        num_vectors, dim = len(self.fields.embedded), self.fields.dims[0]
        self.dense_mlp = make(self.fields.num_dense, [*model.dense_mlp, dim]) if self.fields.num_dense else None
        self.interaction = DotInteraction(num_vectors + (self.dense_mlp is not None))
        self.mlp = make(self.interaction.num_pairs + (dim if self.dense_mlp is not None else 0), model.mlp)
        self.head = nn.Linear(self.mlp.width, 1)

    def forward(self, batch: Batch) -> LabelOutput:
        """Returns the logit of each row. Collective where tables are sharded."""
        return self.dense(self.embeddings(batch), batch)

    def dense(self, lookups: dict[str, torch.Tensor], batch: Batch) -> LabelOutput:
        """Returns the same of what was looked up."""
        vectors, numbers_BF = self.fields(lookups, batch)
        if self.dense_mlp is not None:
            numbers_BD = self.dense_mlp(numbers_BF, batch)
            joined = torch.cat([numbers_BD, self.interaction(torch.stack([numbers_BD, *vectors], dim=1))], dim=1)
        else:
            joined = self.interaction(torch.stack(vectors, dim=1))
        return LabelOutput(self.head(self.mlp(joined, batch)), lookups)


class DotInteraction(nn.Module):
    """The dot product of each pair of a row's vectors, in the order of TorchRec's `InteractionArch`.

    That one takes what lies above the diagonal by a pair of indices, whose gradient torch puts in place number by number: a
    third of a step of the DLRM in docs/benchmarks.md. Here a gradient is laid out as the whole symmetric matrix in one pass,
    and multiplied in one batched product where autograd takes two.

    Args:
        num_vectors: V.
    """

    def __init__(self, num_vectors: int) -> None:
        super().__init__()
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self.num_pairs = len(first_P)
        pair_VV = torch.full(
            (num_vectors, num_vectors), self.num_pairs
        )  # of a vector with itself: the zero behind all pairs
        pair_VV[first_P, second_P] = pair_VV[second_P, first_P] = torch.arange(self.num_pairs)
        self._place_P: torch.Tensor
        self.register_buffer("_place_P", first_P * num_vectors + second_P, persistent=False)
        self._pair: torch.Tensor
        self.register_buffer("_pair", pair_VV.flatten(), persistent=False)

    def forward(self, vectors_BVD: torch.Tensor) -> torch.Tensor:
        """Returns (B, P): vectors 0 . 1, 0 . 2, ..., 1 . 2, ..."""
        if not self.training:
            return _dot_interaction(vectors_BVD, self._place_P)
        products_BP: torch.Tensor = _DotInteraction.apply(vectors_BVD, self._place_P, self._pair)  # type: ignore[no-untyped-call]
        return products_BP


def _dot_interaction(vectors_BVD: torch.Tensor, place_P: torch.Tensor) -> torch.Tensor:
    return torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2)).flatten(1).index_select(1, place_P)


class _DotInteraction(torch.autograd.Function):
    """`_dot_interaction` with its gradient."""

    @staticmethod
    def forward(ctx: Any, vectors_BVD: torch.Tensor, place_P: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(vectors_BVD, pair)
        return _dot_interaction(vectors_BVD, place_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BP: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        vectors_BVD, pair = ctx.saved_tensors
        size, num_vectors, _ = vectors_BVD.shape
        gradient_BVV = nn.functional.pad(gradient_BP, (0, 1)).index_select(1, pair).view(size, num_vectors, num_vectors)
        return torch.bmm(gradient_BVV, vectors_BVD.to(gradient_BVV.dtype)), None, None
