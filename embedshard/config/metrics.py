"""The metrics that there are, and what they, baselines and the rest of a config must agree on."""

from __future__ import annotations

__all__ = ["LOSS", "POINTWISE_METRICS", "Metric", "check_baselines", "check_metrics", "parse_metric"]

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedshard.config.objectives import check_catalogue
from embedshard.config.parts import (
    BiasBaseline,
    CrossEntropyConfig,
    EaseBaseline,
    ItemEmbeddingConfig,
    ItemKnnBaseline,
    MeanBaseline,
    PointwiseConfig,
    RankingModel,
    SASRecConfig,
)
from embedshard.errors import ConfigError, nearest

if TYPE_CHECKING:
    from embedshard.config.root import Config

_CUT_METRICS: Final = ("recall", "precision", "ndcg", "hit_rate", "map", "coverage")
"""The metrics of ranked lists that look at the first k of them, which is written as `recall@20`."""

POINTWISE_METRICS: Final = (
    "rmse",
    "mae",
    "log_loss",
    "auc",
    "accuracy",
    "f1",
    "pr_auc",
    "gauc",
    "normalised_entropy",
    "calibration",
)
"""The metrics that compare a row's prediction with its label; all others but `loss` rank items."""

LOSS: Final = "loss"
"""The metric of an item_embedding: the objective's own loss."""

STREAMING_METRICS: Final = (
    "auc",
    "pr_auc",
    "log_loss",
    "normalised_entropy",
    "calibration",
    "accuracy",
    "gauc",
    "rmse",
    "mae",
)
"""The metrics of training rows; those of a label that is a number are the last two."""

MOST_WINDOW_ROWS: Final = 2**22
"""Rows that the AUC of training rows within users keeps at most: about 70 MB for one label."""

STREAMING_OF_NUMBERS: Final = STREAMING_METRICS[-2:]

_UNCUT_METRICS: Final = ("mrr", LOSS, *POINTWISE_METRICS)
_OF_CLASSES: Final = ("log_loss", "auc", "accuracy", "f1")


@dataclass(frozen=True)
class Metric:
    """A metric as the config names it.

    Attributes:
        name: the part before '@', such as 'recall'.
        k: length of the list that it looks at; None for metrics without a cut.
    """

    name: str
    k: int | None = None

    def __str__(self) -> str:
        return self.name if self.k is None else f"{self.name}@{self.k}"

    @property
    def is_pointwise(self) -> bool:
        """Whether it compares predictions with labels, so that it has no ranked list."""
        return self.name in POINTWISE_METRICS

    @property
    def ranks(self) -> bool:
        """Whether it looks at ranked items."""
        return not self.is_pointwise and self.name != LOSS


def parse_metric(text: str) -> Metric:
    """Returns the metric that `text` names.

    Args:
        text: recall@k, precision@k, ndcg@k, hit_rate@k, map@k or coverage@k with a whole k of at least 1; or mrr, loss,
            rmse, mae, log_loss, auc, pr_auc, gauc, normalised_entropy, calibration, accuracy, f1.

    Raises:
        ConfigError: there is no such metric, or its k is missing, superfluous or not a whole number above 0.
    """
    name, at, cut = text.partition("@")
    is_whole = re.fullmatch(r"[1-9][0-9]{0,8}", cut) is not None
    if name in _UNCUT_METRICS:
        if at:
            raise ConfigError(f"metric '{text}': '{name}' looks at everything and takes no k. Write '{name}'.")
        return Metric(name)
    if name in _CUT_METRICS:
        if not at:
            raise ConfigError(f"metric '{text}' needs the length of the list that it looks at. Write '{name}@20'.")
        if not is_whole:
            raise ConfigError(f"metric '{text}': '{cut}' is not a whole number from 1. Write '{name}@20'.")
        return Metric(name, int(cut))
    shown = cut if is_whole else "20"
    written = {known: f"{known}@{shown}" for known in _CUT_METRICS} | {known: known for known in _UNCUT_METRICS}
    close = difflib.get_close_matches(name, written, n=1)
    advice = f"Did you mean '{written[close[0]]}'?" if close else nearest(text, written.values())
    raise ConfigError(f"there is no metric '{text}'. {advice}")


def check_metrics(config: Config) -> None:
    """Checks that what is measured goes with model, objective and data.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name in config.evaluate.metrics:
        try:
            parse_metric(name)
        except ConfigError as error:
            raise ValueError(f"evaluate.metrics: {error}") from error
    from_ranking = config.ranking_metrics()
    pointwise = [name for name in config.evaluate.metrics if name in POINTWISE_METRICS]
    if LOSS in config.evaluate.metrics and not isinstance(config.model, ItemEmbeddingConfig):
        raise ValueError(
            f"evaluate.metrics: '{LOSS}' is the loss of pairs of lists, and only an item_embedding has them. Choose "
            f"metrics of ranks such as 'recall@20', or of labels such as 'log_loss'"
        )
    if config.evaluate.progressive and not pointwise:
        raise ValueError(
            f"evaluate.progressive compares each partition's labels with what is predicted before they are trained, and "
            f"evaluate.metrics has nothing that does. Add one of {', '.join(POINTWISE_METRICS)}"
        )
    if pointwise and len(config.data.label_columns) != 1 and not config.learns_several_labels:
        raise ValueError(f"evaluate.metrics: '{pointwise[0]}' needs one label. Give data.label the column of it")
    allowed = (
        _OF_CLASSES
        if isinstance(config.objective, CrossEntropyConfig)
        else POINTWISE_METRICS[:4]
        if isinstance(config.objective, PointwiseConfig) and config.objective.kind == "mse"
        else POINTWISE_METRICS
    )
    _check_label_metrics(config, pointwise)
    for name in pointwise:
        if name not in allowed:
            raise ValueError(
                f"evaluate.metrics: '{name}' does not go with objective '{config.objective.kind}'. Those that do: "
                f"{', '.join(allowed)}"
            )
    if from_ranking and isinstance(config.model, RankingModel):
        raise ValueError(
            f"evaluate.metrics: '{from_ranking[0]}' ranks items by the product of two vectors, which a model of kind "
            f"'{config.model.kind}' has not. Choose among {', '.join(POINTWISE_METRICS)}"
        )
    if from_ranking:
        for role in ("user_id", "item_id"):
            if role == "user_id" and isinstance(config.model, SASRecConfig) and config.evaluate.candidates != "catalogue":
                continue  # a row's list is all that tells whom it is of
            if config.identity(role) is None:
                raise ValueError(
                    f"evaluate.metrics: '{from_ranking[0]}' ranks items for users, so model.{role} must name an 'id' feature"
                )
        check_catalogue(config, f"metric '{from_ranking[0]}'")
    select, metrics, measured = config.evaluate.select, config.evaluate.metrics, config.measured()
    if select is not None and select not in measured:
        raise ValueError(f"evaluate.select: '{select}' is not among evaluate.metrics. {nearest(select, measured)}")
    if config.data.validation_fraction is not None and not metrics:
        raise ValueError(
            "data.validation_fraction holds training rows out, and nothing looks at them: give evaluate.metrics, or "
            "leave it out"
        )
    if config.train.early_stopping is not None:
        if not config.data.has_validation:
            raise ValueError(
                "train.early_stopping looks at a validation set: give data.validation or data.validation_fraction"
            )
        if not metrics:
            raise ValueError("train.early_stopping looks at a metric: give evaluate.metrics")


def _check_label_metrics(config: Config, pointwise: Sequence[str]) -> None:
    """Checks what looks at scored rows beside the metrics of the whole set, and at training rows."""
    if "gauc" in pointwise and config.identity("user_id") is None:
        raise ValueError("evaluate.metrics: 'gauc' is a mean over users: give model.user_id the name of an 'id' feature")
    selected = config.evaluate.select or next(iter(config.evaluate.metrics), None)
    if config.data.has_validation and selected is not None and selected.partition(":")[0] == "calibration":
        raise ValueError(
            f"evaluate.select: '{selected}' is best at 1, so that neither more nor less of it is better. Give "
            "evaluate.select another of evaluate.metrics"
        )
    for option in ("bootstrap", "slice_by"):
        if getattr(config.evaluate, option) and not pointwise:
            raise ValueError(f"evaluate.{option} looks at labels: add a metric such as 'auc' to evaluate.metrics")
    if not config.train.metrics:
        return
    if isinstance(config.objective, CrossEntropyConfig):
        raise ValueError(
            f"train.metrics are of rows with one logit a label, and objective 'cross_entropy' gives a row "
            f"{config.objective.classes}, one a class. Leave them out, and have evaluate.metrics measure a validation set"
            + ("; or learn a label of 0 or 1 by 'bce'" if config.objective.classes == 2 else "")
        )
    if not isinstance(config.objective, PointwiseConfig):
        raise ValueError(
            f"train.metrics compare predictions with labels, and objective '{config.objective.kind}' predicts none: it "
            f"compares items. Leave them out, and have evaluate.metrics measure a validation set"
        )
    allowed = STREAMING_OF_NUMBERS if config.objective.kind == "mse" else STREAMING_METRICS
    for name in config.train.metrics:
        if name not in allowed:
            raise ValueError(
                f"train.metrics: there is no '{name}' with objective '{config.objective.kind}'. Choose among "
                f"{', '.join(allowed)}"
            )
    if "gauc" in config.train.metrics:
        _check_streaming_groups(config)


def _check_streaming_groups(config: Config) -> None:
    """Checks that it is known whose rows training rows are, and that those of a window can be kept."""
    if config.identity("user_id") is None:
        raise ValueError("train.metrics: 'gauc' is a mean over users: give model.user_id the name of an 'id' feature")
    if config.train.window_rows > MOST_WINDOW_ROWS:
        raise ValueError(
            f"train.metrics: 'gauc' keeps the rows of train.log_every_steps={config.train.log_every_steps} steps of "
            f"{config.train.global_batch_size:,}, which are more than {MOST_WINDOW_ROWS:,}. Set train.log_every_steps to "
            f"{max(MOST_WINDOW_ROWS // config.train.global_batch_size, 1)} or less, or leave 'gauc' to evaluate.metrics"
        )


def check_baselines(config: Config) -> None:
    """Checks that each baseline has something to say of what is measured.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    metrics, chosen = config.evaluate.metrics, config.evaluate.baselines
    if chosen == "auto":
        return
    kinds = [baseline.kind for baseline in chosen]
    for baseline in chosen:
        name = f"evaluate.baselines: '{baseline.kind}'"
        if kinds.count(baseline.kind) > 1:
            raise ValueError(f"{name} is there twice. Keep one of them")
        predicts = isinstance(baseline, MeanBaseline | BiasBaseline)
        if predicts and isinstance(config.objective, CrossEntropyConfig):
            raise ValueError(f"{name} predicts one number, and objective 'cross_entropy' has several classes. Leave it out")
        if not any((metric in POINTWISE_METRICS) == predicts for metric in metrics):
            does = "predicts labels" if predicts else "ranks items"
            raise ValueError(
                f"{name} {does}, and no metric of evaluate.metrics looks at that. Leave it out, or add a metric "
                f"such as {'rmse' if predicts else 'recall@20'}"
            )
        if isinstance(baseline, BiasBaseline) and config.is_identity_managed():
            raise ValueError(f"{name} learns a number for each row, and rows of a managed vocabulary change hands")
        needs_both = isinstance(baseline, BiasBaseline | EaseBaseline | ItemKnnBaseline)
        if needs_both and not config.knows_user_and_item():
            raise ValueError(f"{name} needs to know the user and the item: give model.user_id and model.item_id")
