"""What a run tells while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

__all__ = [
    "ConsoleReporter",
    "JsonLinesReporter",
    "Reporter",
    "Reporters",
    "TensorBoardReporter",
    "json_text",
    "metrics_table",
]

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from embedshard.data.quarantine import BadRowCounts
from embedshard.lines import LineFile
from embedshard.quantities import duration
from embedshard.storage import Location, PathOrUri, locate, reaching


def json_text(value: Any, indent: int | None = None) -> str:
    """Returns JSON, in which a number that is not finite is null: JSON has no word for it."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def metrics_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns a table of metrics: a row each, and a column for each of those that have them."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(metric for values in columns.values() for metric in values):
        table.add_row(metric, *(f"{values[metric]:.4f}" if metric in values else "" for values in columns.values()))
    return table


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


class Reporter:
    """Hears what happens in a run. Every method may be left as it is: a reporter that ignores all."""

    def prepared(self, what: str, done: int, total: int) -> None:
        """Something is made before training: so many rows of so many were read for it."""

    def started(self, first_step: int, num_steps: int) -> None:
        """Training begins at a step, of so many."""

    def grown(self, num_steps: int) -> None:
        """There is more to train: so many steps by now. Told after `started`."""

    def stepped(self, step: int, epoch: int, loss: float, samples_per_second: float) -> None:
        """A step was done; the loss is the mean over the global batch."""

    def counted(self, rows: int, bad_rows: BadRowCounts) -> None:
        """Of so many rows trained, this was wrong. Told before `stepped`, once there is something."""

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Values were measured after a step, named as in `train/loss` or `validation/recall@20`."""

    def compared(self, metrics: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> None:
        """The model's metrics on the test set, beside each baseline's."""

    def said(self, message: str) -> None:
        """Something a person should know."""

    def saving(self) -> None:
        """A checkpoint is about to be saved: what was written so far must outlive this process."""

    def finished(self) -> None:
        """Training is over, or was broken off."""


class Reporters(Reporter):
    """Tells several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)

    def prepared(self, what: str, done: int, total: int) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.prepared(what, done, total)

    def started(self, first_step: int, num_steps: int) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.started(first_step, num_steps)

    def grown(self, num_steps: int) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.grown(num_steps)

    def stepped(self, step: int, epoch: int, loss: float, samples_per_second: float) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.stepped(step, epoch, loss, samples_per_second)

    def counted(self, rows: int, bad_rows: BadRowCounts) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.counted(rows, bad_rows)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.measured(step, values)

    def compared(self, metrics: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.compared(metrics, baselines)

    def said(self, message: str) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.said(message)

    def saving(self) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.saving()

    def finished(self) -> None:
        """Tells all."""
        for reporter in self._reporters:
            reporter.finished()


class ConsoleReporter(Reporter):
    """A progress bar on a terminal, else a plain line every few steps.

    Args:
        console: where to write.
        every_steps: steps between plain lines.
    """

    def __init__(self, console: Console, every_steps: int) -> None:
        self._console, self._every_steps = console, every_steps
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._first_step = self._num_steps = 0
        self._begin = time.monotonic()
        self._bad = ""

    def prepared(self, what: str, done: int, total: int) -> None:
        """Shows a bar of its own while it lasts, else a line at its beginning."""
        if not self._console.is_terminal:
            if not done:
                self._console.print(f"making the {what} from {total:,} rows", highlight=False, soft_wrap=True)
            return
        if self._progress is None:
            columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn()
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        assert self._task is not None, "a bar has a task"
        self._progress.update(self._task, completed=done)
        if done == total:
            self.finished()

    def started(self, first_step: int, num_steps: int) -> None:
        """Shows the bar."""
        self._first_step, self._num_steps, self._begin = first_step, num_steps, time.monotonic()
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn(
                "epoch {task.fields[epoch]}  loss {task.fields[loss]}  {task.fields[rate]} samples/s{task.fields[bad]}"
            ),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=num_steps, completed=first_step, epoch="-", loss="-", rate="-", bad=""
        )
        self._progress.start()

    def grown(self, num_steps: int) -> None:
        """Makes the bar longer."""
        self._num_steps = num_steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=num_steps)

    def counted(self, rows: int, bad_rows: BadRowCounts) -> None:
        """Shows it from the next step on."""
        self._bad = ""
        if bad_rows.quarantined:
            self._bad += f"  bad {bad_rows.quarantined:,} ({_percentage(bad_rows.quarantined / rows)})"
        if bad_rows.oov_share:
            self._bad += f"  oov {_percentage(bad_rows.oov_share)}"

    def stepped(self, step: int, epoch: int, loss: float, samples_per_second: float) -> None:
        """Moves the bar, or prints a line now and then."""
        rate = f"{samples_per_second:,.0f}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, epoch=epoch + 1, loss=f"{loss:.4f}", rate=rate, bad=self._bad)
        elif step % self._every_steps == 0 or step == self._num_steps:
            done = max(step - self._first_step, 1)
            left = (time.monotonic() - self._begin) / done * (self._num_steps - step)
            self._console.print(
                f"step {step}/{self._num_steps}  epoch {epoch + 1}  loss {loss:.4f}  {rate} samples/s{self._bad}  "
                f"{duration(left)} left",
                highlight=False,
            )

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Prints what the validation or test set says."""
        shown = {name: value for name, value in values.items() if not name.startswith(("train/", "checkpoint/"))}
        if shown:
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self._console.print(f"step {step}  {text}", highlight=False)

    def compared(self, metrics: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> None:
        """Prints a table, where there is something to compare with."""
        if baselines:
            self._console.print(metrics_table("Test set", {"model": metrics, **baselines}))

    def said(self, message: str) -> None:
        """Prints it."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def finished(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _percentage(share: float) -> str:
    """Returns a share with two digits that say something, however small it is."""
    percent = 100 * share
    return f"{percent:.0f}%" if percent >= 99.5 else f"{float(f'{percent:.2g}'):f}".rstrip("0").rstrip(".") + "%"


class JsonLinesReporter(Reporter):
    """Appends a line for each measurement to metrics.jsonl.

    A run that was killed and resumed may have lines of steps that were rolled back: of two lines of one step, that of the
    later attempt counts. A line that was cut off by a kill stays alone on its line.

    Args:
        place: the file.
        attempt: which start of the run this is.
    """

    def __init__(self, place: PathOrUri | Location, attempt: int) -> None:
        self._attempt = attempt
        self._file = LineFile(place)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"step": step, "attempt": self._attempt, "time": now, **values}
        self._file.add(json_text(line))

    def saving(self) -> None:
        """Keeps the lines."""
        self._file.keep()

    def finished(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardReporter(Reporter):
    """Writes curves for TensorBoard. It writes to disks alone: to an object store its files are put when a run is saved.

    Args:
        folder: `tensorboard/` of the run directory.
    """

    def __init__(self, folder: PathOrUri | Location) -> None:
        self._folder = locate(folder)
        self._scratch = None if self._folder.is_local else tempfile.TemporaryDirectory(prefix="embedshard-")
        self._written = Path(self._folder.path if self._scratch is None else self._scratch.name)
        self._sizes: dict[str, int] = {}
        self._writer: Any = None

    def started(self, first_step: int, num_steps: int) -> None:
        """Opens the writer; curves of steps that were rolled back are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._written), purge_step=first_step + 1 if first_step else None)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve; a step's waterfall is left to metrics.jsonl and the report: points take time."""
        if self._writer is not None:
            for name, value in values.items():
                if not name.startswith(("train/waterfall/", "train/beside/")):
                    self._writer.add_scalar(name, value, step)

    def saving(self) -> None:
        """Puts what was written to the object store, if the run is in one."""
        if self._writer is not None and self._scratch is not None:
            self._writer.flush()
            self._put()

    def finished(self) -> None:
        """Closes the writer."""
        if self._writer is not None:
            self._writer.close()
        if self._scratch is not None:
            self._put()
            self._scratch.cleanup()

    def _put(self) -> None:
        """Puts the files that have grown."""
        for path in sorted(self._written.iterdir()):
            content = path.read_bytes()
            if len(content) != self._sizes.get(path.name):
                with reaching(self._folder):
                    self._folder.make_dirs()
                    self._folder.join(path.name).write_bytes_atomically(content)
                self._sizes[path.name] = len(content)
