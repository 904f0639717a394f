"""All that a model's metrics are seen beside, from one pass over the training set that rank 0 makes for all.

The other ranks wait in `World.from_rank_zero`, however long it takes.
"""

from __future__ import annotations

__all__ = ["Comparison", "Yardsticks"]

from dataclasses import dataclass, field
from typing import Any

from embedshard.config import Config, parse_metric
from embedshard.data.dataset import Dataset
from embedshard.data.survey import Survey, Wanted, take_survey
from embedshard.evaluate.baselines import Baselines
from embedshard.evaluate.held_out import HeldOutSets, Split
from embedshard.evaluate.slices import ItemSlices
from embedshard.world import World


@dataclass(frozen=True)
class Comparison:
    """What baselines reach on a set.

    Attributes:
        metrics: each baseline's, by its name.
        left_out: why a baseline was not measured, by its name.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def said(self) -> list[str]:
        """Returns a sentence for each baseline that was left out."""
        return [f"Baseline '{name}' is left out: {reason}" for name, reason in self.left_out.items()]


class Yardsticks:
    """Looks at the training set once, and measures baselines by what it found. Collective.

    Args:
        config: the config.
        dataset: the opened data.
        sets: the held-out sets.
        world: the processes that evaluate together.
        compares: whether a model's metrics are to be compared, so that baselines and slices are of use.
        counts_ids: whether statistics of ids are wanted.

    Attributes:
        slices: of the catalogue by popularity; None where nothing is ranked.
        ids: statistics of ids, as result.json holds them; empty unless wanted.
    """

    def __init__(
        self, config: Config, dataset: Dataset, sets: HeldOutSets, world: World, *, compares: bool, counts_ids: bool
    ) -> None:
        self._world = world
        self._baselines = Baselines(config, dataset, sets) if compares else None
        self._survey: Survey | None = None
        ranks = compares and any(parse_metric(name).ranks for name in config.evaluate.metrics)
        wanted = Wanted(
            item_counts=ranks,
            interactions=self._baselines is not None and self._baselines.needs_interactions,
            labels=self._baselines is not None and self._baselines.needs_labels,
            id_rows=config.evaluate.id_statistics_rows if counts_ids else 0,
        )

        def look() -> tuple[ItemSlices | None, dict[str, Any]]:
            self._survey = take_survey(dataset, wanted)
            counts = self._survey.item_counts
            slices = None if counts is None else ItemSlices.by_popularity(counts[sets.catalogue.ids])
            return slices, self._survey.ids_json(dataset) if wanted.id_rows else {}

        self.slices, self.ids = world.from_rank_zero(look)

    def compare(self, split: Split) -> Comparison:
        """Returns what the baselines reach on a set. Collective."""
        return self._world.from_rank_zero(lambda: self._measured(split))

    def _measured(self, split: Split) -> Comparison:
        if self._baselines is None or self._survey is None:
            return Comparison()
        metrics = self._baselines.measure(self._survey, split)
        return Comparison(metrics, self._baselines.left_out)
