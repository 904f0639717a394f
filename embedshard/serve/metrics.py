"""What a service tells Prometheus: each replica counts by itself, and a page is of all of them, each with its name."""

from __future__ import annotations

__all__ = ["CONTENT_TYPE", "ServeMetrics", "page"]

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from embedshard.serve.live import Refusal, Served

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServeMetrics:
    """One replica's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"namespace": "embedshard_serve", "registry": self._registry}
        self.requests = Counter("requests", "Requests that were answered.", ["endpoint", "status"], **known)
        self.seconds = Histogram("request_seconds", "From a request's arrival at the replica to its answer.",
                                 ["endpoint"], buckets=_SECONDS, **known)  # fmt: skip
        self._pending = Gauge("pending_requests", "Requests that are being answered.", **known)
        self.batch_requests = Histogram("batch_requests", "Requests that were answered together.", buckets=_SIZES, **known)
        self.batch_questions = Histogram(
            "batch_questions", "Users and items that were asked about in one batch.", buckets=_SIZES, **known
        )
        self.batch_seconds = Histogram("batch_seconds", "Time that a batch took.", buckets=_SECONDS, **known)
        self.unknown = Counter("unknown", "Users and items that were asked about and not known.", ["what"], **known)
        self._reloads = Counter("reloads", "Newer exports that took over.", **known)
        self._failures = Counter("reload_failures", "Newer exports that could not be served, each time.", **known)
        self._refused = Gauge("export_refused", "Whether an export that is to take over cannot be served.", **known)
        self._step = Gauge("export_step", "The step of the checkpoint that the served export is of.", **known)
        self._loaded = Gauge("export_loaded_timestamp_seconds", "When the served export was loaded.", **known)
        self._took = Gauge("export_load_seconds", "Time that it took to check and load the served export.", **known)
        self._info = Gauge("export_info", "The SHA-256 of the served export's manifest.", ["manifest"], **known)
        self._has_served = False
        self._changing = threading.Lock()  # a page tells all that `changed` sets, or nothing of it

    def changed(self, what: Served | Refusal) -> None:
        """Notes an export that took over, or was refused."""
        with self._changing:
            if isinstance(what, Refusal):
                self._failures.inc()
                return
            if self._has_served:
                self._reloads.inc()
            self._has_served = True
            self._step.set(what.engine.step)
            self._loaded.set(what.loaded_at)
            self._took.set(what.took_s)
            self._info.clear()
            self._info.labels(what.export.digest).set(1)

    def collect(self, pending: int, is_refused: bool) -> list[Metric]:
        """Returns all of them, as plain data.

        Args:
            pending: requests that are being answered.
            is_refused: whether an export that is to take over cannot be served.
        """
        with self._changing:
            self._pending.set(pending)
            self._refused.set(is_refused)
            return list(self._registry.collect())


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def page(replicas: Mapping[str, list[Metric]]) -> bytes:
    """Returns the metrics of replicas, by their names, as Prometheus reads them."""
    merged: dict[str, Metric] = {}
    for replica, metrics in sorted(replicas.items()):
        for metric in metrics:
            into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit))
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
    registry = CollectorRegistry()
    registry.register(_Collected(list(merged.values())))
    return generate_latest(registry)
