"""What a run tells Prometheus under Ray: each node exports it beside Ray's own metrics, with `ray_` before the name.

The names are those that the dashboard in `k8s/monitoring` asks for.
"""

from __future__ import annotations

__all__ = ["RayMetricsReporter"]

from collections.abc import Mapping

from embedshard.data.quarantine import BadRowCounts
from embedshard.train.tracking import Reporter

_STAGE = "train/seconds/"


class RayMetricsReporter(Reporter):
    """Exports what it hears. Made in a worker of Ray, on rank 0.

    Counters begin anew with each process, so those that belong to the run begin at what it has counted by then.

    Args:
        restarts: of the run, before this process.
    """

    def __init__(self, restarts: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self._samples_per_second = Gauge(
            "embedshard_samples_per_second", "Rows trained a second of this attempt, evaluations and saves left out."
        )
        self._loss = Gauge("embedshard_loss", "Training loss of the last step that was logged.")
        self._step_seconds = Gauge(
            "embedshard_step_seconds", "Seconds a step of each stage of the loop, since the last log.", tag_keys=("stage",)
        )
        self._checkpoint_seconds = Gauge("embedshard_checkpoint_seconds", "Seconds that the last save held the loop up.")
        self._bytes_read = Counter(
            "embedshard_bytes_read_total", "Bytes of Parquet read by all workers of this attempt, as compressed."
        )
        self._restarts = Counter("embedshard_restarts_total", "Starts of the run after its first.")
        self._bad_rows = Counter("embedshard_bad_rows_total", "Training rows that were set aside.")
        self._known_bytes = self._known_bad_rows = 0
        if restarts:
            self._restarts.inc(restarts)

    def counted(self, rows: int, bad_rows: BadRowCounts) -> None:
        """Counts those that are new."""
        if bad_rows.quarantined > self._known_bad_rows:
            self._bad_rows.inc(bad_rows.quarantined - self._known_bad_rows)
            self._known_bad_rows = bad_rows.quarantined

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Sets the gauges whose values there are, and counts what was read since."""
        gauges = {
            "train/samples_per_second": self._samples_per_second,
            "train/loss": self._loss,
            "checkpoint/seconds": self._checkpoint_seconds,
        }
        for name, gauge in gauges.items():
            if name in values:
                gauge.set(values[name])
        for name, value in values.items():
            if name.startswith(_STAGE):
                self._step_seconds.set(value, tags={"stage": name.removeprefix(_STAGE)})
        read = int(values.get("train/bytes_read", 0))
        if read > self._known_bytes:
            self._bytes_read.inc(read - self._known_bytes)
            self._known_bytes = read
