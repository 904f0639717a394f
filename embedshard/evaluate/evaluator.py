"""Evaluates a model on the validation and test sets: encodes queries and candidates, ranks, and scores labels.

What a query is, and what is relevant to it, is said in `held_out.py`.
"""

from __future__ import annotations

__all__ = ["Evaluator", "Split"]

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from embedshard.config import LOSS, Config, parse_metric
from embedshard.data.batch import Batch
from embedshard.data.collate import Collator
from embedshard.data.columns import Columns, num_rows
from embedshard.data.dataset import Dataset
from embedshard.data.decode import slice_column
from embedshard.errors import ConfigError
from embedshard.evaluate.held_out import HeldOutSets, Split
from embedshard.evaluate.label_metrics import LabelMetrics, in_order
from embedshard.evaluate.label_rows import LabelRows
from embedshard.evaluate.pair_loss import PairLoss
from embedshard.evaluate.scores import DotProducts
from embedshard.evaluate.slices import ItemSlices
from embedshard.evaluate.users import Users
from embedshard.world import World


class Evaluator:
    """Measures a model on held-out rows.

    Args:
        config: the config.
        dataset: the opened data.
        collator: makes batches of columns.
        world: the processes that evaluate together; each encodes all, since lookups are collective.
        objective: the loss, for models that are measured by it.

    Raises:
        ConfigError: if a metric does not exist.
    """

    def __init__(self, config: Config, dataset: Dataset, collator: Collator, world: World, objective: nn.Module) -> None:
        self._config, self._dataset, self._collator, self._world = config, dataset, collator, world
        metrics = [parse_metric(name) for name in config.evaluate.metrics]
        pointwise = [str(metric) for metric in metrics if metric.is_pointwise]
        self.labels = LabelMetrics(config, pointwise, Users.known_to(config, dataset))
        """The metrics of labels, for whoever else measures them."""
        self._ranking = [str(metric) for metric in metrics if metric.ranks]
        self._pair_loss = None
        if LOSS in config.evaluate.metrics:
            self._pair_loss = PairLoss(config, collator, dataset.sampler, objective, world)
        self.sets = HeldOutSets(config, dataset)
        """The held-out sets, for whoever else is measured on them."""
        self.counts: dict[str, dict[str, int]] = {}
        """What was counted when a set was last evaluated: queries, rows, items that could not be found."""
        self.slices: dict[str, dict[str, dict[str, float]]] = {}
        """The ranking metrics of a set by slice of the catalogue, when it was last evaluated with slices."""
        self.column_slices: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        """The metrics of labels by column and its values, of each set that was evaluated in depth."""
        self.intervals: dict[str, dict[str, list[float]]] = {}
        """Within which 95 % of resamples have each metric of labels, of each set that was evaluated in depth."""

    def has(self, split: Split) -> bool:
        """Returns whether there is something to measure on a set."""
        return bool(self._config.evaluate.metrics) and self._dataset.has(split)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: Split, slices: ItemSlices | None = None, *, in_depth: bool = False
    ) -> dict[str, float]:
        """Returns the metrics of a set, in config order. Collective.

        Args:
            model: what is evaluated, sharded or not.
            split: which set.
            slices: of the catalogue, for which ranking metrics are also kept apart, from the same ranking; None for none.
            in_depth: whether metrics of labels also have `intervals` and `column_slices`, as the config asks for them.

        Raises:
            ConfigError: if the model cannot do what a metric needs.
        """
        plain = self._unwrapped(model)
        was_training = plain.training
        plain.eval()
        try:
            values: dict[str, float] = {}
            if self._ranking:
                values |= self._rank(plain, split, slices)
            if self.labels.metrics:
                values |= self._score(plain, split, in_depth)
            if self._pair_loss is not None:
                values |= self._pair_loss.measure(plain, self.sets.read(split))
        finally:
            plain.train(was_training)
        names = self._config.evaluate.metrics
        found = in_order(values, names)
        self.counts[split] = {name: int(value) for name, value in values.items() if name not in found}
        return found

    def _unwrapped(self, model: nn.Module) -> Any:
        inner = getattr(model, "module", model)
        for method in ("encode_queries", "encode_candidates") if self._ranking else ():
            if not hasattr(inner, method):
                raise ConfigError(
                    f"metric '{self._ranking[0]}' ranks items, for which the model needs a method '{method}(batch)' "
                    f"that returns a vector a row; {type(inner).__name__} has none. Add it, or use pointwise metrics."
                )
        return inner

    # ----------------------------------------------------------------------------------------------------- retrieval
    def _rank(self, model: Any, split: Split, slices: ItemSlices | None) -> dict[str, float]:
        catalogue = self.sets.catalogue
        candidate_ND = self._encode(model.encode_candidates, catalogue.columns, len(catalogue))
        prepared = self.sets.ranked(split)
        query_QD = self._encode(model.encode_queries, prepared.queries, len(prepared.users))
        beyond = candidate_ND.new_zeros(prepared.num_candidates - len(catalogue), candidate_ND.shape[1])
        scores = DotProducts(query_QD, torch.cat([candidate_ND, beyond]) if len(beyond) else candidate_ND)
        sums = prepared.rank(scores, self._ranking, slices)
        if slices is not None:
            self.slices[split] = slices.values(sums)
        return sums.result()

    # ----------------------------------------------------------------------------------------------------- pointwise
    def _score(self, model: Any, split: Split, in_depth: bool) -> dict[str, float]:
        columns, evaluate = self.sets.read(split), self._config.evaluate
        keeps = in_depth and bool(evaluate.bootstrap or evaluate.slice_by)
        sums, kept = self.labels.sums(), LabelRows(self.labels.metrics, self.labels.sums)
        for first, last in self._spans(num_rows(columns)):
            batch = self._collator.batch(columns, first, last).to(self._world.device)
            scored = self.labels.of(model(batch), batch)
            sums.update(*scored)
            if keeps:
                kept.update(*scored)
        if keeps:
            self._look_deeper(split, columns, kept)
        return sums.result()

    def _look_deeper(self, split: Split, columns: Columns, rows: LabelRows) -> None:
        evaluate = self._config.evaluate
        self.intervals[split] = rows.intervals(evaluate.bootstrap, self._config.seed)
        self.column_slices[split] = {}
        for column in evaluate.slice_by:
            values = list(self._dataset.slice_values[column].met)
            self.column_slices[split][column] = rows.slices(columns[slice_column(column)].values, values)

    # ---------------------------------------------------------------------------------------------------------- both
    def _encode(self, encode: Any, columns: Columns, count: int) -> torch.Tensor:
        return torch.cat(list(self.encoded(encode, columns, count)))

    @torch.no_grad()
    def encoded(self, encode: Callable[[Batch], torch.Tensor], columns: Columns, count: int) -> Iterator[torch.Tensor]:
        """Yields the (B, D) vectors of rows, a batch at a time, in their order. Collective.

        Args:
            encode: the model's `encode_queries` or `encode_candidates`, in the mode for evaluation.
            columns: features by name; one that is absent is empty.
            count: how many rows they have.
        """
        for first, last in self._spans(count):
            yield encode(self._collator.batch(columns, first, last).to(self._world.device))

    def _spans(self, count: int) -> list[tuple[int, int]]:
        size = self._config.evaluate.batch_size
        return [(first, min(first + size, count)) for first in range(0, count, size)]
