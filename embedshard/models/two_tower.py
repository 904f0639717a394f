"""Two towers: a query and a candidate become vectors, their dot product is the score.

Shapes: B rows on this rank, D dim of a tower's output, N drawn candidates on this rank.
"""

from __future__ import annotations

__all__ = ["Tower", "TwoTower"]

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from embedshard.config import Config, TableSpec, bias_key, negative_key, num_negative_slots
from embedshard.config.parts import DenseFeature, IdFeature, TowerConfig, TwoTowerConfig
from embedshard.data.batch import Batch, Draws
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.layers import POOLINGS, mlp, side_by_side
from embedshard.models.output import RetrievalOutput
from embedshard.models.repeats import Repeats, without_repeats


class Tower(nn.Module):
    """Joins the vectors of its features, in config order, and maps them through an optional MLP."""

    def __init__(self, config: Config, tower: TowerConfig) -> None:
        super().__init__()
        self._by_sum = config.combines_by_sum(tower)
        self.mlp = mlp(config.joined_width(tower), tower.mlp) if tower.mlp else None

    def forward(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns (B, D) from each feature's (B, width)."""
        joined = sum(vectors[1:], start=vectors[0]) if self._by_sum else side_by_side(vectors)
        return joined if self.mlp is None else self.mlp(joined)


class TwoTower(nn.Module):
    """The model of kind `two_tower`.

    Biases are columns of the vectors, so that a score is a dot product and nothing else: a query is
    [vector, user bias + global bias, 1], a candidate [vector, 1, item bias].

    Args:
        config: the config, whose model is a two-tower.
        specs: its tables.

    Attributes:
        ids_alone: of the user's tower and of the item's, the keys whose ids are all that it is a function of; empty where
            there is more. On a CPU, in training, what repeats in a batch is mapped once then (`repeats.py`).
    """

    def __init__(self, config: Config, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, TwoTowerConfig), "the registry builds it for this kind"
        self._config = model
        self._dense = [name for name, feature in config.features.items() if isinstance(feature, DenseFeature)]
        self._user_id, self._item_id = config.identity("user_id"), config.identity("item_id")
        self._num_slots = num_negative_slots(config)
        self.embeddings = EmbeddingLookup(specs)
        self.user_tower = Tower(config, model.user)
        self.item_tower = Tower(config, model.item)
        kinds = model.user.sequences
        self.poolings = nn.ModuleDict(
            {
                name: POOLINGS[kinds[name].kind if name in kinds else "attention"](config.width(name))
                for name in model.user.features
                if config.is_sequence(name)
            }
        )
        self.global_bias = nn.Parameter(torch.zeros(1)) if "global" in model.biases else None
        self.ids_alone = _ids_alone(config, model, specs)
        self._shorter: list[tuple[Batch, tuple[Batch, list[Repeats | None]]]] = []
        self.embeddings.looked_up_as = lambda batch: self._shortened(batch)[0]

    def forward(self, batch: Batch) -> RetrievalOutput:
        """Returns the vectors of the batch's rows and of what was drawn. Collective where tables are sharded."""
        shorter, repeats = self._shortened(batch)
        return self.dense(self.embeddings(shorter), batch, *repeats)

    def dense(
        self,
        lookups: dict[str, torch.Tensor],
        batch: Batch,
        of_user: Repeats | None = None,
        of_item: Repeats | None = None,
    ) -> RetrievalOutput:
        """Returns the same of what was looked up, and of what repeats there."""
        return RetrievalOutput(
            query_BD=_spread(of_user, lookups, lambda found: self._queries(found, batch)),
            candidate_BD=_spread(of_item, lookups, lambda found: self._candidates(found, batch.dense, None)),
            negative_ND=None if batch.draws is None else self._drawn(lookups, batch.draws),
            lookups=lookups,
        )

    def _shortened(self, batch: Batch) -> tuple[Batch, list[Repeats | None]]:
        """Returns `without_repeats`, found once for each of the last two batches: one is sent ahead while one is trained."""
        if not (self.training and any(self.ids_alone) and batch.weights.device.type == "cpu"):
            return batch, [None, None]
        found = next((found for known, found in self._shorter if known is batch), None)
        if found is None:
            found = without_repeats(batch, self.ids_alone, self.embeddings.is_uneven)
            self._shorter = [*self._shorter[-1:], (batch, found)]
        return found

    def encode_queries(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D) vectors of queries; the batch's item features may be empty. Collective as `forward`."""
        return self._queries(self.embeddings(batch), batch)

    def encode_candidates(self, batch: Batch) -> torch.Tensor:
        """Returns (B, D) vectors of candidates; the batch's user features may be empty. Collective as `forward`."""
        return self._candidates(self.embeddings(batch), batch.dense, None)

    def _queries(self, lookups: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        vector = self.user_tower([self._of_user(lookups, batch, name) for name in self._config.user.features])
        if self._config.similarity == "cosine":
            vector = F.normalize(vector, dim=1)
        if not self._config.biases:
            return vector
        bias = self._bias(lookups, "user", self._user_id, None, vector)
        if self.global_bias is not None:
            bias = bias + self.global_bias
        return torch.cat([vector, bias, torch.ones_like(bias)], dim=1)

    def _candidates(self, lookups: Mapping[str, torch.Tensor], dense: torch.Tensor, slot_count: int | None) -> torch.Tensor:
        vector = self.item_tower([self._vector(lookups, dense, name, slot_count) for name in self._config.item.features])
        if self._config.similarity == "cosine":
            vector = F.normalize(vector, dim=1)
        if not self._config.biases:
            return vector
        bias = self._bias(lookups, "item", self._item_id, slot_count, vector)
        return torch.cat([vector, torch.ones_like(bias), bias], dim=1)

    def _drawn(self, lookups: Mapping[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        return self._candidates(lookups, draws.dense, len(draws.ids))

    def _bias(
        self,
        lookups: Mapping[str, torch.Tensor],
        side: str,
        feature: str | None,
        slot_count: int | None,
        like: torch.Tensor,
    ) -> torch.Tensor:
        if side not in self._config.biases or feature is None:
            return like.new_zeros(like.shape[0], 1)
        return self._looked_up(lookups, bias_key(feature), slot_count)[:, :1]

    def _of_user(self, lookups: Mapping[str, torch.Tensor], batch: Batch, name: str) -> torch.Tensor:
        if name not in self.poolings:
            return self._vector(lookups, batch.dense, name, None)
        return self.poolings[name](lookups[name], batch.sequence_lengths(name))

    def _vector(
        self, lookups: Mapping[str, torch.Tensor], dense: torch.Tensor, name: str, slot_count: int | None
    ) -> torch.Tensor:
        if name in self._dense:
            place = self._dense.index(name)
            return dense[:, place : place + 1]
        return self._looked_up(lookups, name, slot_count)

    def _looked_up(self, lookups: Mapping[str, torch.Tensor], key: str, slot_count: int | None) -> torch.Tensor:
        """Returns the vectors of the rows (slot_count None), or of that many drawn candidates."""
        if slot_count is None:
            return lookups[key]
        return torch.cat([lookups[negative_key(key, slot)] for slot in range(self._num_slots)])[:slot_count]


def _ids_alone(config: Config, model: TwoTowerConfig, specs: Sequence[TableSpec]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the keys of each tower that maps single ids alone, whose vectors nobody else asks for; else none.

    A tower without layers hands on what was looked up: to find what repeats would take longer than it saves.
    """
    if any(spec.managed_by is not None for spec in specs):
        return (), ()  # what admits ids counts each as often as it is met
    single = {
        lookup.key
        for spec in specs
        if not (spec.weighted or spec.is_sequence or spec.composition or spec.l2_lookup)
        for lookup in spec.lookups
        if isinstance(config.features[lookup.feature], IdFeature)
    }
    sides = []
    for side, tower in (("user", model.user), ("item", model.item)):
        keys = tuple(tower.features)
        identity = config.identity(f"{side}_id")
        if side in model.biases and identity is not None:
            keys = (*keys, bias_key(identity))
        draws = side == "item" and num_negative_slots(config) > 0
        sides.append(keys if tower.mlp and single.issuperset(keys) and not draws else ())
    return (sides[0], sides[1]) if not set(model.user.features) & set(model.item.features) else ((), ())


def _spread(
    repeats: Repeats | None,
    lookups: Mapping[str, torch.Tensor],
    mapped: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """Returns what is made of the vectors of each row, (B, D); made of the different ones alone, where they are known."""
    if repeats is None:
        return mapped(lookups)
    count = repeats.count
    return repeats.spread(
        mapped({key: vectors if len(vectors) == count else vectors[:count] for key, vectors in lookups.items()})
    )
