"""From a config to a model and an objective: the only dispatch, and the door for a user's own module."""

from __future__ import annotations

__all__ = ["ModelContext", "build_model", "build_objective"]

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from embedshard.config import Config, TableSpec
from embedshard.config.parts import (
    BPRConfig,
    CosineContrastiveConfig,
    CrossEntropyConfig,
    CustomModelConfig,
    DCNv2Config,
    DeepFMConfig,
    DenseFeature,
    DLRMConfig,
    HierarchicalSoftmaxConfig,
    InBatchSoftmaxConfig,
    ItemEmbeddingConfig,
    MMoEConfig,
    NCEConfig,
    NegativeSamplingConfig,
    PointwiseConfig,
    SampledSoftmaxConfig,
    SASRecConfig,
    SoftmaxConfig,
    TextClassifierConfig,
    TwoTowerConfig,
    WideAndDeepConfig,
)
from embedshard.data.batch import Batch
from embedshard.errors import ConfigError
from embedshard.models.dcn_v2 import DCNv2
from embedshard.models.deepfm import DeepFM
from embedshard.models.dlrm import DLRM
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.item_embedding import ItemEmbedding
from embedshard.models.mmoe import MMoE
from embedshard.models.objectives.hierarchical_softmax import HierarchicalSoftmax
from embedshard.models.objectives.next_item import NextItem
from embedshard.models.objectives.objective import Objective
from embedshard.models.objectives.pairwise import BPR, CosineContrastive, NegativeSampling
from embedshard.models.objectives.pointwise import CrossEntropy, Pointwise
from embedshard.models.objectives.skip_gram import PairNCE, PairNegativeSampling, PairSampledSoftmax, PairSoftmax
from embedshard.models.objectives.softmax import InBatchSoftmax, SampledSoftmax
from embedshard.models.sasrec import SASRec
from embedshard.models.text_classifier import TextClassifier
from embedshard.models.two_tower import TwoTower
from embedshard.models.wide_and_deep import WideAndDeep
from embedshard.world import World


@dataclass(frozen=True)
class ModelContext:
    """What a custom model's factory is given.

    Attributes:
        config: the whole config.
        tables: its tables.
        options: `model.options` of the config.
    """

    config: Config
    tables: tuple[TableSpec, ...]
    options: dict[str, Any]

    def lookup(self) -> EmbeddingLookup:
        """Returns the module that looks all features up: call it with a batch for a dict of vectors by feature name."""
        return EmbeddingLookup(self.tables)

    def dense_column(self, feature: str) -> int:
        """Returns which column of `batch.dense` holds a dense feature."""
        names = [name for name, spec in self.config.features.items() if isinstance(spec, DenseFeature)]
        return names.index(feature)


def build_model(config: Config, specs: Sequence[TableSpec], world: World | None = None) -> nn.Module:
    """Builds the model on the CPU, its tables on the meta device, the same for a seed in every process.

    Args:
        config: the config.
        specs: its tables.
        world: whose ranks train it, for what is a matter of the global batch (batch norm); None where nothing is trained.

    Raises:
        ConfigError: if a custom model's factory cannot be imported or returns no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(config.model, CustomModelConfig):
            return _custom(config, config.model, specs)
        model = _own(config, specs, world)
    for module in model.modules():
        if isinstance(module, EmbeddingLookup) and module.looked_up_as is None:
            module.looked_up_as = _as_it_is
    return model


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _own(config: Config, specs: Sequence[TableSpec], world: World | None) -> nn.Module:
    match config.model:
        case TwoTowerConfig():
            return TwoTower(config, specs)
        case TextClassifierConfig():
            return TextClassifier(config, specs)
        case ItemEmbeddingConfig():
            return ItemEmbedding(config, specs)
        case DLRMConfig():
            return DLRM(config, specs, world)
        case DCNv2Config():
            return DCNv2(config, specs, world)
        case DeepFMConfig():
            return DeepFM(config, specs, world)
        case WideAndDeepConfig():
            return WideAndDeep(config, specs, world)
        case MMoEConfig():
            return MMoE(config, specs, world)
        case SASRecConfig():
            return SASRec(config, specs)
    raise AssertionError(f"{type(config.model).__name__} has no model")


def build_objective(config: Config, specs: Sequence[TableSpec], world: World) -> Objective:
    """Builds the objective."""
    learns_pairs = isinstance(config.model, ItemEmbeddingConfig)
    match config.objective:
        case NegativeSamplingConfig() if learns_pairs:
            return PairNegativeSampling(config.objective, world)
        case SampledSoftmaxConfig() if learns_pairs:
            return PairSampledSoftmax(config.objective, world)
        case SampledSoftmaxConfig() if isinstance(config.model, SASRecConfig):
            return NextItem(config.objective, world)
        case NCEConfig():
            return PairNCE(config.objective, world)
        case SoftmaxConfig():
            return PairSoftmax(world)
        case HierarchicalSoftmaxConfig():
            return HierarchicalSoftmax()
        case PointwiseConfig():
            names = config.data.label_columns if config.learns_several_labels else ()
            return Pointwise(config.objective.kind, [config.objective.label_weights.get(name, 1.0) for name in names])
        case CrossEntropyConfig():
            return CrossEntropy(config.objective)
        case InBatchSoftmaxConfig():
            item, item_id = _item(config, specs)
            return InBatchSoftmax(config.objective, item.num_ids if item.managed_by is None else None, item_id, world)
        case SampledSoftmaxConfig():
            item, item_id = _item(config, specs)
            return SampledSoftmax(config.objective, item.num_ids, item_id, world)
        case BPRConfig():
            return BPR(config.objective, _item(config, specs)[1], world)
        case NegativeSamplingConfig():
            return NegativeSampling(config.objective, _item(config, specs)[1], world)
        case CosineContrastiveConfig():
            return CosineContrastive(config.objective, _item(config, specs)[1], world)


def _item(config: Config, specs: Sequence[TableSpec]) -> tuple[TableSpec, str]:
    item_id = config.identity("item_id")
    assert item_id is not None, "the config checks that the objective knows the item"
    return next(spec for spec in specs if item_id in (lookup.key for lookup in spec.lookups)), item_id


def _custom(config: Config, custom: CustomModelConfig, specs: Sequence[TableSpec]) -> nn.Module:
    where = f"model.factory: '{custom.factory}'"
    module_name, colon, name = custom.factory.partition(":")
    if not colon:
        raise ConfigError(f"{where} is not of the form package.module:callable, for example my_models.wide:build")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(
            f"{where} cannot be imported: {error}. Install its package, or put its folder on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{where}: module '{module_name}' has no '{name}'.") from error
    model = factory(ModelContext(config, tuple(specs), dict(custom.options)))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model
