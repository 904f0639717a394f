"""Sums over queries, from which ranking metrics follow."""

from __future__ import annotations

__all__ = ["BoolArray", "RankingSums", "ranking_metrics"]

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedshard.config import Metric, parse_metric
from embedshard.errors import ConfigError
from embedshard.evaluate.ranking import IntArray, metric_values

BoolArray = npt.NDArray[np.bool_]


@dataclass
class RankingSums:
    """Sums from which ranking metrics follow; parts of the queries are added in any order.

    Attributes:
        metrics: in the order of the result.
        sums: each metric's sum over queries, without coverage.
        counts: what was counted beside them; `queries` are those that are averaged.
        covered: for each k of a coverage metric, (N,) whether a candidate was in a list.
        num_recommendable: how many candidates could have been in a list.
        slices: the sums in which only a slice's items are relevant, by its name.
    """

    metrics: tuple[Metric, ...]
    sums: dict[str, float]
    counts: dict[str, int]
    covered: dict[int, BoolArray] = field(default_factory=dict)
    num_recommendable: int = 0
    slices: dict[str, RankingSums] = field(default_factory=dict)

    @classmethod
    def from_positions(
        cls, metrics: Sequence[Metric], positions_R: IntArray, offsets: IntArray, counts: dict[str, int]
    ) -> RankingSums:
        """Returns the sums of the queries whose relevant items have these positions (see `metric_values`)."""
        sums = {
            str(metric): float(np.nansum(metric_values(metric, positions_R, offsets)))
            for metric in metrics
            if metric.name != "coverage"
        }
        num_relevant_Q = np.diff(offsets)
        queries = int((num_relevant_Q > 0).sum())
        return cls(
            tuple(metrics),
            sums,
            {"queries": queries, "queries_without_relevant": len(num_relevant_Q) - queries} | counts,
        )

    def add(self, other: RankingSums) -> None:
        """Adds the sums of other queries, ranked over the same candidates."""
        assert (self.metrics, self.num_recommendable) == (other.metrics, other.num_recommendable)
        assert self.counts.keys() == other.counts.keys()
        self.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        self.counts = {name: value + other.counts[name] for name, value in self.counts.items()}
        self.covered = {k: mask | other.covered[k] for k, mask in self.covered.items()}
        assert self.slices.keys() == other.slices.keys()
        for name, sums in self.slices.items():
            sums.add(other.slices[name])

    def result(self) -> dict[str, float]:
        """Returns each metric's value by name, and the counts.

        A metric is the mean over the queries that have relevant items, nan where there are none; coverage is a share of
        the candidates that may be recommended, over the lists of all queries.
        """
        values: dict[str, float] = {}
        queries = self.counts["queries"]
        for metric in self.metrics:
            if metric.name == "coverage":
                assert metric.k is not None
                whole, part = self.num_recommendable, float(self.covered[metric.k].sum())
            else:
                whole, part = queries, self.sums[str(metric)]
            values[str(metric)] = part / whole if whole else float("nan")
        return values | self.counts


def ranking_metrics(names: Sequence[str]) -> list[Metric]:
    """Returns the metrics of these names.

    Raises:
        ConfigError: a metric does not exist or is pointwise.
    """
    metrics = [parse_metric(name) for name in names]
    for metric in metrics:
        if metric.is_pointwise:
            raise ConfigError(f"metric '{metric}' compares predictions with labels; a ranking has none. Leave it out here.")
    return metrics
