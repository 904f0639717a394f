"""What an objective, its model and its labels must agree on."""

from __future__ import annotations

__all__ = ["check_catalogue", "check_objective"]

import math
from typing import TYPE_CHECKING

from embedshard.config.parts import (
    CosineContrastiveConfig,
    CrossEntropyConfig,
    DrawsNegatives,
    HierarchicalSoftmaxConfig,
    IdFeature,
    ItemEmbeddingConfig,
    ModelConfig,
    NCEConfig,
    PointwiseConfig,
    SASRecConfig,
    SoftmaxConfig,
    TwoTowerConfig,
)
from embedshard.errors import nearest

if TYPE_CHECKING:
    from embedshard.config.root import Config


def check_objective(config: Config) -> None:
    """Checks that an objective has what it learns from.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    objective, labels = config.objective, config.data.label_columns
    if isinstance(objective, PointwiseConfig | CrossEntropyConfig):
        if isinstance(objective, CrossEntropyConfig) and isinstance(config.model, TwoTowerConfig):
            raise ValueError("objective 'cross_entropy' wants a logit a class, and a two_tower has one. Choose 'bce'")
        if isinstance(objective, PointwiseConfig):
            for name in objective.label_weights:
                if name not in labels:
                    raise ValueError(f"objective.label_weights: there is no label '{name}'. {nearest(name, labels)}")
        if len(labels) != 1 and not (labels and config.learns_several_labels):
            raise ValueError(
                f"objective '{objective.kind}' learns one label, data names {len(labels)}. Give data.label the column of it"
            )
        return
    if isinstance(objective, DrawsNegatives) and objective.num_negatives % config.data.lanes:
        raise ValueError(
            f"objective.num_negatives={objective.num_negatives} does not divide into data.lanes="
            f"{config.data.lanes}, so that every world can share them out. "
            f"Choose {math.ceil(objective.num_negatives / config.data.lanes) * config.data.lanes}"
        )
    if getattr(objective, "mask_list", False) and not isinstance(config.model, SASRecConfig):
        raise ValueError("objective.mask_list is for a model of kind 'sasrec'. Leave it out")
    if isinstance(config.model, ItemEmbeddingConfig):
        return
    if getattr(objective, "drawn_for", "batch") != "batch":
        raise ValueError("objective.drawn_for: 'lane' is for a model of kind 'item_embedding'. Leave it out")
    if isinstance(objective, NCEConfig | SoftmaxConfig | HierarchicalSoftmaxConfig):
        raise ValueError(
            f"objective '{objective.kind}' learns pairs of a list, which a model of kind 'item_embedding' makes. "
            f"Choose that, or 'sampled_softmax'"
        )
    item_id = config.identity("item_id")
    if item_id is None:
        raise ValueError(
            f"objective '{objective.kind}' needs to know the item: give model.item_id the name of an 'id' feature"
        )
    item = config.features[item_id]
    if isinstance(item, IdFeature) and item.null == "empty":
        raise ValueError(
            f"features.{item_id}.null is 'empty', but objective '{objective.kind}' learns which item belongs to a row, "
            f"so each row needs one. Use 'error', with data.on_bad_row 'quarantine' to go on without such rows"
        )
    if isinstance(objective, CosineContrastiveConfig):
        _check_cosine(config.model)
    if isinstance(objective, DrawsNegatives):
        check_catalogue(config, f"objective '{objective.kind}'")


def _check_cosine(model: ModelConfig) -> None:
    if isinstance(model, TwoTowerConfig) and (model.similarity != "cosine" or model.biases):
        met = f"model.similarity is '{model.similarity}'" if model.similarity != "cosine" else "the model has biases"
        raise ValueError(
            f"objective 'cosine_contrastive' compares cosines with its margin, but {met}. "
            f"Set model.similarity to 'cosine' and leave model.biases out"
        )


def check_catalogue(config: Config, who: str) -> None:
    """Checks that items are known apart from interactions where somebody, who is named, needs them so.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    described_by = config.item_features()
    if config.data.catalogue is None and described_by != [config.identity("item_id")]:
        raise ValueError(
            f"{who} needs items apart from interactions, and the item tower reads {', '.join(described_by)}. "
            f"Give data.catalogue a Parquet file with one row per item and these columns"
        )
