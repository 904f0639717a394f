"""Baselines: what a model's metrics are seen beside, measured on the same queries, candidates and rows.

A baseline is fitted on the training set alone and is the same for every model. Items that the catalogue does not hold are
unknown to it; a user without training rows has no history, so that all items tie and none is found.
"""

from __future__ import annotations

__all__ = ["Baselines"]

from typing import Final

import numpy as np
import torch

from embedshard.config import POINTWISE_METRICS, Config
from embedshard.config.parts import Baseline, BiasBaseline, EaseBaseline, ItemKnnBaseline, MeanBaseline, PopularityBaseline
from embedshard.data.columns import Columns
from embedshard.data.dataset import Dataset
from embedshard.data.survey import Interactions, Survey
from embedshard.errors import TrainingError
from embedshard.evaluate.held_out import HeldOutSets, RankedSet, Split
from embedshard.evaluate.item_models import (
    Histories,
    HistoryScores,
    SameForAll,
    ease_bytes,
    ease_weights,
    item_knn_bytes,
    item_knn_weights,
)
from embedshard.evaluate.label_metrics import prediction_link
from embedshard.evaluate.label_models import bias_bytes, fit_biases, mean_logit
from embedshard.evaluate.pointwise import PointwiseSums
from embedshard.evaluate.ranking import FloatArray
from embedshard.evaluate.scores import Scores
from embedshard.evaluate.users import Users
from embedshard.quantities import size

_NEEDS_INTERACTIONS: Final = (EaseBaseline, ItemKnnBaseline, BiasBaseline)


class Baselines:
    """The baselines of a config that fit into memory.

    Args:
        config: the config.
        dataset: the opened data.
        sets: the held-out sets.

    Attributes:
        left_out: why a baseline is not measured, by its name.
    """

    def __init__(self, config: Config, dataset: Dataset, sets: HeldOutSets) -> None:
        self._config, self._dataset, self._sets = config, dataset, sets
        self._ranking = [name for name in config.evaluate.metrics if name not in POINTWISE_METRICS]
        self._pointwise = [name for name in config.evaluate.metrics if name in POINTWISE_METRICS]
        self._chosen = []
        self.left_out: dict[str, str] = {}
        allowed = config.evaluate.baseline_bytes
        for baseline in config.baselines():
            needed, sizes = self._memory(baseline)
            if needed <= allowed:
                self._chosen.append(baseline)
                continue
            self.left_out[baseline.kind] = (
                f"it needs about {size(needed)} for {sizes}, and evaluate.baseline_bytes allows {size(allowed)}. "
                f"Set it to {needed}, or choose other baselines."
            )

    @property
    def needs_interactions(self) -> bool:
        """Whether they look at who met what."""
        return any(isinstance(baseline, _NEEDS_INTERACTIONS) for baseline in self._chosen)

    @property
    def needs_labels(self) -> bool:
        """Whether they look at the training set's labels."""
        return any(isinstance(baseline, MeanBaseline | BiasBaseline) for baseline in self._chosen)

    def measure(self, survey: Survey, split: Split) -> dict[str, dict[str, float]]:
        """Returns each baseline's metrics on a set, in config order; one that cannot be fitted is left out, and said."""
        values: dict[str, dict[str, float]] = {}
        histories: Histories | None = None
        for baseline in self._chosen:
            try:
                if isinstance(baseline, MeanBaseline | BiasBaseline):
                    values[baseline.kind] = self._score(baseline, survey, split)
                    continue
                if isinstance(baseline, _NEEDS_INTERACTIONS) and histories is None:
                    histories = self._histories(survey.interactions)
                prepared = self._sets.ranked(split)
                found = prepared.rank(self._scores(baseline, survey, histories, prepared), self._ranking, None).result()
                values[baseline.kind] = {name: found[name] for name in self._ranking}
            except TrainingError as error:
                self.left_out[baseline.kind] = str(error)
        return values

    # -------------------------------------------------------------------------------------------------------- memory
    def _memory(self, baseline: Baseline) -> tuple[int, str]:
        """Returns about how many bytes a baseline takes beside the counts of items, and what they depend on."""
        rows = sum(source.inventory.num_rows for source in self._dataset.known)
        if isinstance(baseline, BiasBaseline):
            users, items = self._table_rows(self._sets.user_id), self._table_rows(self._sets.item_id)
            return bias_bytes(users, items, rows), f"{users:,} users, {items:,} items and {rows:,} training rows"
        if isinstance(baseline, EaseBaseline | ItemKnnBaseline):
            num_items = len(self._sets.catalogue)
            if isinstance(baseline, EaseBaseline):
                needed = ease_bytes(num_items, rows)
            else:
                needed = item_knn_bytes(num_items, baseline.neighbours, rows)
            return needed, f"{num_items:,} items and {rows:,} training rows"
        return 0, ""

    def _table_rows(self, feature: str) -> int:
        table = next(spec.table for name, spec in self._config.features.items() if name == feature)  # type: ignore[union-attr]
        return self._dataset.table_rows[table] + 1

    # ------------------------------------------------------------------------------------------------------- ranking
    def _histories(self, interactions: Interactions | None) -> Histories:
        assert interactions is not None, "the survey was asked for them"
        catalogue = self._sets.catalogue
        return Histories(interactions.users, catalogue.places()[interactions.items], len(catalogue))

    def _scores(self, baseline: Baseline, survey: Survey, histories: Histories | None, prepared: RankedSet) -> Scores:
        if isinstance(baseline, PopularityBaseline):
            assert survey.item_counts is not None, "the survey was asked for them"
            counts = torch.from_numpy(survey.item_counts[self._sets.catalogue.ids])
            return SameForAll(counts, len(prepared.users), prepared.num_candidates)
        assert histories is not None, "made for those that need them"
        if isinstance(baseline, EaseBaseline):
            weights = ease_weights(histories, baseline.l2)
        else:
            assert isinstance(baseline, ItemKnnBaseline)
            weights = item_knn_weights(histories, baseline.neighbours)
        return HistoryScores(histories.of(prepared.users), weights, prepared.num_candidates)

    # ----------------------------------------------------------------------------------------------------- pointwise
    def _score(self, baseline: MeanBaseline | BiasBaseline, survey: Survey, split: Split) -> dict[str, float]:
        link = prediction_link(self._config)
        columns = self._sets.read(split)
        labels = next(column.values for name, column in columns.items() if name.startswith("label:"))
        sums = PointwiseSums(self._pointwise, link)
        users = Users.known_to(self._config, self._dataset)
        groups = None if users is None else torch.from_numpy(users.of_rows(columns[users.feature].values))
        sums.update(self._logits(baseline, survey, columns, len(labels)), labels, None, groups)
        found = sums.result()
        return {name: found[name] for name in self._pointwise}

    def _logits(self, baseline: MeanBaseline | BiasBaseline, survey: Survey, columns: Columns, num_rows: int) -> FloatArray:
        link = prediction_link(self._config)
        if isinstance(baseline, MeanBaseline):
            return np.full(num_rows, mean_logit(survey.label_sum, survey.label_weight, link))
        assert survey.interactions is not None, "the survey was asked for them"
        users, items = self._sets.user_id, self._sets.item_id
        sizes = self._table_rows(users), self._table_rows(items)
        model = fit_biases(survey.interactions, *sizes, baseline.damping, link)
        return model.predict(columns[users].values, columns[items].values)
