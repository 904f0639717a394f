"""What a ranking or sequence model, its features and its objective must agree on."""

from __future__ import annotations

__all__ = ["check_ranking_model", "check_sasrec"]

from typing import TYPE_CHECKING

from embedshard.config.parts import (
    DCNv2Config,
    DeepFMConfig,
    DenseFeature,
    DLRMConfig,
    IdFeature,
    PointwiseConfig,
    RankingModel,
    SampledSoftmaxConfig,
    SASRecConfig,
    SequenceFeature,
    TargetAttention,
    WideAndDeepConfig,
)
from embedshard.errors import nearest, with_article

if TYPE_CHECKING:
    from embedshard.config.root import Config


def check_ranking_model(config: Config, model: RankingModel) -> None:
    """Checks what a ranking model reads and learns.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name in model.features:
        config.check_feature("model.features", name)
        if model.features.count(name) > 1:
            raise ValueError(f"model.features: '{name}' is there twice. Name it once")
    read = config.read_features(model)
    if not isinstance(config.objective, PointwiseConfig):
        raise ValueError(
            f"objective '{config.objective.kind}' is not for a model of kind '{model.kind}', which gives one logit a label. "
            f"Choose 'bce' for labels of 0 or 1, 'mse' for a number"
        )
    _check_sequences(config, model, read)
    embedded = [name for name in read if not isinstance(config.features[name], DenseFeature)]
    if isinstance(model, DLRMConfig | DeepFMConfig):
        _check_one_dim(config, model, embedded)
    if isinstance(model, DLRMConfig) and len(embedded) + (len(embedded) < len(read)) < 2:
        raise ValueError(
            "model: a dlrm takes dot products of pairs of vectors, and there is one vector. Give it more features, "
            "or choose 'dcn_v2'"
        )
    if isinstance(model, DCNv2Config) and model.low_rank is not None and model.low_rank >= config.pooled_width(read):
        raise ValueError(
            f"model.low_rank={model.low_rank} is no less than the {config.pooled_width(read)} numbers of the features side "
            f"by side. Leave it out for full matrices, or choose a smaller one"
        )
    if isinstance(model, WideAndDeepConfig):
        for name in model.wide:
            if name not in read:
                raise ValueError(f"model.wide: the model does not read a feature '{name}'. {nearest(name, read)}")
            if config.is_sequence(name):
                raise ValueError(f"model.wide: '{name}' is a sequence. Make it a 'bag', or leave it out of model.wide")


def _check_sequences(config: Config, model: RankingModel, read: list[str]) -> None:
    for name, pooling in model.sequences.items():
        if name not in read:
            raise ValueError(f"model.sequences: the model does not read a feature '{name}'. {nearest(name, read)}")
        if not config.is_sequence(name):
            kind = with_article(config.features[name].kind)
            raise ValueError(
                f"model.sequences: feature '{name}' is {kind}, one vector already. Make it a 'sequence', or leave it out of "
                f"model.sequences"
            )
        if not isinstance(pooling, TargetAttention):
            continue
        target = pooling.target
        config.check_feature(f"model.sequences.{name}.target", target)
        if not isinstance(config.features[target], IdFeature):
            kind = with_article(config.features[target].kind)
            raise ValueError(f"model.sequences.{name}.target: feature '{target}' is {kind}; it must be an id")
        if config.width(target) != config.width(name):
            raise ValueError(
                f"model.sequences.{name}.target: '{target}' has vectors of {config.width(target)} numbers, '{name}' of "
                f"{config.width(name)}. They are compared: give them one table, or tables of one dim"
            )


def _check_one_dim(config: Config, model: RankingModel, embedded: list[str]) -> None:
    dims = {name: config.width(name) for name in embedded}
    if not dims:
        raise ValueError(
            f"model: {with_article(model.kind)} multiplies features' vectors, and none of its features has a table"
        )
    if len(set(dims.values())) > 1:
        shown = ", ".join(f"{name}: {dim}" for name, dim in dims.items())
        raise ValueError(
            f"model: {with_article(model.kind)} multiplies features' vectors with each other, and they differ in size "
            f"({shown}). Give their tables one dim, or choose 'dcn_v2'"
        )


def check_sasrec(config: Config, model: SASRecConfig) -> None:
    """Checks what a SASRec reads and learns.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for role, name in (("sequence", model.sequence), ("item_id", model.item_id)):
        config.check_feature(f"model.{role}", name)
    sequence, item = config.features[model.sequence], config.features[model.item_id]
    if not isinstance(sequence, SequenceFeature):
        raise ValueError(
            f"model.sequence: feature '{model.sequence}' is {with_article(sequence.kind)}. Make it a 'sequence'"
        )
    if sequence.max_length is None or sequence.keep != "last":
        raise ValueError(
            f"model.sequence: each place has a vector of its own, so there must be a most: give features.{model.sequence}."
            f"max_length, and 'keep: last'"
        )
    if isinstance(item, IdFeature) and item.table != sequence.table:
        raise ValueError(
            f"model.item_id: '{model.item_id}' is looked up in '{item.table}', '{model.sequence}' in '{sequence.table}'. "
            f"What comes next is one of the same items: give both one table"
        )
    dim = config.width(model.sequence)
    if dim % model.heads:
        raise ValueError(f"model.heads={model.heads} does not divide the {dim} numbers of table '{sequence.table}'")
    if not isinstance(config.objective, SampledSoftmaxConfig) or config.objective.mixed:
        raise ValueError(
            f"objective '{config.objective.kind}' is not for a sasrec, which tells at each place which of some items comes "
            f"next. Choose 'sampled_softmax', without 'mixed'"
        )
    if config.objective.mask_list and not config.objective.mask_accidental_hits:
        raise ValueError(
            "objective.mask_list leaves out what comes next, too: leave objective.mask_accidental_hits on, or mask_list out"
        )
