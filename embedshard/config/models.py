"""What a two_tower, a text_classifier or an item_embedding, its features and its objective must agree on."""

from __future__ import annotations

__all__ = ["check_item_embedding", "check_text_classifier", "check_two_tower"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedshard.config.metrics import LOSS
from embedshard.config.parts import (
    CrossEntropyConfig,
    DenseFeature,
    FlattenEncoder,
    HierarchicalSoftmaxConfig,
    ItemEmbeddingConfig,
    NCEConfig,
    NegativeSamplingConfig,
    PointwiseConfig,
    SampledSoftmaxConfig,
    SoftmaxConfig,
    TextClassifierConfig,
    TowerConfig,
    TwoTowerConfig,
)
from embedshard.errors import with_article

if TYPE_CHECKING:
    from embedshard.config.root import Config


def check_two_tower(config: Config, model: TwoTowerConfig) -> None:
    """Checks what each tower joins, and that both end in as many numbers.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    _check_tower(config, "user", model.user, model.biases)
    _check_tower(config, "item", model.item, model.biases)
    _check_sizes(config, model)


def _check_tower(config: Config, side: str, tower: TowerConfig, biases: Sequence[str]) -> None:
    for name in tower.features:
        config.check_feature(f"model.{side}.features", name)
        if side == "item" and config.is_sequence(name):
            raise ValueError(
                f"model.item.features: '{name}' is a sequence, a vector a place; the item tower joins one vector a "
                f"feature. Make it a 'bag', or a 'text' with 'pooling'"
            )
    for name in tower.sequences:
        if name not in tower.features or not config.is_sequence(name):
            raise ValueError(
                f"model.{side}.sequences: '{name}' is no sequence among the features of the {side} tower. Name one, or "
                f"leave it out"
            )
    dims = {name: config.width(name) for name in tower.features}
    if config.combines_by_sum(tower):
        dense = [name for name in tower.features if isinstance(config.features[name], DenseFeature)]
        if dense:
            raise ValueError(
                f"model.{side}: a dense feature ('{dense[0]}') cannot be summed with embeddings. "
                f"Give the tower an 'mlp', or 'combine: concat'"
            )
        if len(set(dims.values())) > 1:
            shown = ", ".join(f"{name}: {dim}" for name, dim in dims.items())
            raise ValueError(
                f"model.{side}: the features' vectors are summed but differ in size ({shown}). "
                f"Use one dim, 'combine: concat', or an 'mlp'"
            )
    if side in biases and config.identity(f"{side}_id") is None:
        raise ValueError(f"model.biases: '{side}' needs an 'id' feature in the {side} tower; it has none")


def _check_sizes(config: Config, model: TwoTowerConfig) -> None:
    sizes = {side: config.tower_width(tower) for side, tower in (("user", model.user), ("item", model.item))}
    if sizes["user"] != sizes["item"]:
        raise ValueError(
            f"model: the user tower ends in {sizes['user']} numbers, the item tower in {sizes['item']}; "
            f"a dot product needs as many of each. Change a table's dim or the last size of an mlp"
        )


def check_text_classifier(config: Config, model: TextClassifierConfig) -> None:
    """Checks what a text_classifier encodes, reads and learns.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name in (*([] if model.text is None else [model.text]), *model.features):
        config.check_feature("model", name)
    if model.text is None and not model.features:
        raise ValueError("model: it reads nothing. Give 'text' the feature that is encoded, or 'features' pooled ones")
    if model.text is not None and not config.is_sequence(model.text):
        raise ValueError(
            f"model.text: feature '{model.text}' is pooled, and the encoder wants a vector a place. Make it a "
            f"'sequence', or a 'text' without 'pooling', or put it into model.features"
        )
    for name in model.features:
        if config.is_sequence(name):
            raise ValueError(
                f"model.features: '{name}' is a sequence, a vector a place. Make it a 'bag', or a pooled 'text', "
                f"or encode it as model.text"
            )
    flattens = model.text is not None and isinstance(model.encoder, FlattenEncoder)
    if flattens and config.max_length(str(model.text)) is None:
        raise ValueError(
            f"model.encoder 'flatten' has as many inputs as the longest text: give features.{model.text}.max_length"
        )
    if not isinstance(config.objective, PointwiseConfig | CrossEntropyConfig):
        raise ValueError(
            f"objective '{config.objective.kind}' compares items, and a text_classifier has none. Choose 'bce' for a "
            f"label of 0 or 1, 'cross_entropy' for several classes, 'mse' for a number"
        )


def check_item_embedding(config: Config, model: ItemEmbeddingConfig) -> None:
    """Checks what an item_embedding reads, learns and measures.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    name = model.sequence
    config.check_feature("model.sequence", name)
    if not config.is_sequence(name):
        kind = with_article(config.features[name].kind)
        raise ValueError(
            f"model.sequence: feature '{name}' is {kind}, and pairs are made of the places of a list. Make it a 'sequence'"
        )
    for other in config.features:
        if other != name:
            raise ValueError(f"features.{other}: an item_embedding reads '{name}' alone. Leave it out")
    objective = config.objective
    if not isinstance(
        objective,
        NegativeSamplingConfig | NCEConfig | SampledSoftmaxConfig | SoftmaxConfig | HierarchicalSoftmaxConfig,
    ):
        raise ValueError(
            f"objective '{objective.kind}' does not learn pairs of a list, which is all that an item_embedding has. "
            f"Choose 'negative_sampling', 'nce', 'sampled_softmax', 'softmax' or 'hierarchical_softmax'"
        )
    if model.by_side and isinstance(objective, HierarchicalSoftmaxConfig):
        raise ValueError(
            "model.by_side: 'hierarchical_softmax' compares centres with the nodes of a tree, which have no side. "
            "Leave it out, or choose another objective"
        )
    if isinstance(objective, SampledSoftmaxConfig) and objective.mixed:
        raise ValueError("objective.mixed takes the items of other rows, and an item_embedding has lists. Leave it out")
    others = [metric for metric in config.evaluate.metrics if metric != LOSS]
    if others:
        raise ValueError(
            f"evaluate.metrics: '{others[0]}' is for models of users and items or of labels, and an item_embedding has "
            f"neither. Choose '{LOSS}', that of held-out pairs, and look at the vectors with 'embedshard similar'"
        )
    if config.evaluate.baselines != "auto" and config.evaluate.baselines:
        raise ValueError(
            "evaluate.baselines rank items or predict labels, and an item_embedding does neither. Leave them out"
        )
