"""What of a config's model `torch.compile` can take."""

from __future__ import annotations

__all__ = ["check_compile"]

from typing import TYPE_CHECKING

from embedshard.config.parts import (
    CustomModelConfig,
    ItemEmbeddingConfig,
    RankingModel,
    SASRecConfig,
    TextClassifierConfig,
    TwoTowerConfig,
)

if TYPE_CHECKING:
    from embedshard.config.root import Config

_WHY_NOT = {
    ItemEmbeddingConfig: "has no dense part",
    SASRecConfig: "works on lists of any length, whose places only their lengths tell",
    CustomModelConfig: "may do anything. Call torch's Module.compile on what you like in its factory",
}


def check_compile(config: Config) -> None:
    """Checks that the dense part is one graph, if it is to be compiled.

    Raises:
        ValueError: saying what is in the way and what to do.
    """
    if config.train.compiles is None:
        return
    model = config.model
    for kind, why in _WHY_NOT.items():
        if isinstance(model, kind):
            raise ValueError(f"train.compile: a model of kind '{model.kind}' {why}. Leave train.compile out")
    if isinstance(model, RankingModel) and model.norm == "batch":
        raise ValueError(
            "train.compile: model.norm 'batch' asks the other workers in the middle of the dense part, which must be one "
            "graph. Choose 'layer' or 'none', or leave train.compile out"
        )
    for name in _read(config):
        if config.is_sequence(name):
            raise ValueError(
                f"train.compile: the model pools '{name}' place by place, and how many places there are only its lengths "
                f"tell: that is no graph. Give the feature the kind 'bag', or a text a 'pooling', or leave train.compile out"
            )


def _read(config: Config) -> list[str]:
    """Returns the features that the model reads."""
    match config.model:
        case TwoTowerConfig() as model:
            return [*model.user.features, *model.item.features]
        case TextClassifierConfig() as model:
            return [*([] if model.text is None else [model.text]), *model.features]
        case RankingModel() as model:
            return config.read_features(model)
    raise AssertionError(f"{type(config.model).__name__} cannot be compiled")
