"""Progressive validation: a partition is evaluated by the model that has not been trained on it yet.

The rows are shared out over the ranks by batches. Lookups are collective, so all ranks look up equally often: one that has
no batch left looks its last one up again, and does not count it.
"""

from __future__ import annotations

__all__ = ["Progressive"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from embedshard.config import Config
from embedshard.data.collate import Collator
from embedshard.data.columns import num_rows
from embedshard.data.source import Source
from embedshard.evaluate.label_metrics import LabelMetrics, RowSums, in_order
from embedshard.world import World


class Progressive:
    """Measures a model on training rows.

    Args:
        config: the config.
        labels: those of its metrics that compare predictions with labels.
        collator: makes batches of columns.
        world: the processes that evaluate together.
    """

    def __init__(self, config: Config, labels: LabelMetrics, collator: Collator, world: World) -> None:
        self._config, self._labels, self._collator, self._world = config, labels, collator, world

    @torch.no_grad()
    def evaluate(self, model: nn.Module, source: Source) -> dict[str, float]:
        """Returns the metrics of a partition, in config order, each before its parts, and `rows`, of how many. Collective.

        Rows that are set aside, and those of weight 0, are not counted.

        Raises:
            DataError: if it cannot be read, or a label is none that a metric compares with.
            TrainingError: if a prediction is nan.
        """
        plain: Any = getattr(model, "module", model)
        was_training = plain.training
        plain.eval()
        try:
            sums = self._sums(plain, source)
        finally:
            plain.train(was_training)
        total, *others = self._world.gather_objects(sums)
        for other in others:
            total.add(other)
        values = total.result()
        return in_order(values, self._labels.metrics) | {"rows": values["rows"]}

    def _sums(self, model: nn.Module, source: Source) -> RowSums:
        """Returns the sums of this rank's batches."""
        sums = self._labels.sums()
        for batch, counts in self._batches(source):
            batch = batch.to(self._world.device)
            output = model(batch)
            if counts:
                sums.update(*self._labels.of(output, batch))
        return sums

    def _batches(self, source: Source) -> Iterator[tuple[Any, bool]]:
        """Yields this rank's batches, and whether each counts; all ranks' are equally many."""
        size, rank, world_size = self._config.evaluate.batch_size, self._world.rank, self._world.world_size
        number, mine = 0, None
        for group, about in enumerate(source.inventory.row_groups):
            spans = [(first, min(first + size, about.num_rows)) for first in range(0, about.num_rows, size)]
            wanted = [place for place in range(len(spans)) if (number + place) % world_size == rank]
            if wanted:
                columns = source.read_row_group(group)
                assert num_rows(columns) == about.num_rows, "a row group is read whole"
                for place in wanted:
                    mine = self._collator.batch(columns, *spans[place])
                    yield mine, True
            number += len(spans)
        if number % world_size and rank >= number % world_size:
            if mine is None:  # fewer batches than ranks
                mine = self._collator.batch(source.read_row_group(0), 0, 1)
            yield mine, False
