"""What a run does between partitions: it evaluates the next one before it is trained, and waits for one that is to come."""

from __future__ import annotations

__all__ = ["Days"]

from collections.abc import Callable, Mapping
from typing import Any

from embedshard.config import Config
from embedshard.data.order import Position
from embedshard.data.partitions import Former, Partition
from embedshard.evaluate.progressive import Progressive
from embedshard.train.assembly import Assembly
from embedshard.train.continuation import check_can_grow, continuation_of
from embedshard.train.run_directory import RunDirectory
from embedshard.train.state import TrainState
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.train.watch import Watch
from embedshard.world import World


class Days:
    """A run's partitions, as they come.

    Args:
        config: the run's.
        run: its folder.
        world: the processes that train together.
        reporter: told by rank 0 alone.
        poll_s: seconds between looks for new partitions; None waits for none.

    Attributes:
        continues: what the run takes over from another; None if it continues none.
        waits: whether the run waits for partitions that are not there yet.

    Raises:
        ConfigError: if the config cannot be trained on data that come later.
    """

    def __init__(self, config: Config, run: RunDirectory, world: World, reporter: Reporter, poll_s: float | None) -> None:
        self._config, self._run, self._world, self._reporter = config, run, world, reporter
        self.continues = continuation_of(run)
        self.waits = poll_s is not None
        if self.continues is not None or self.waits:
            check_can_grow(config, self.waits)
        self._watch = None if poll_s is None else Watch(config.data, poll_s, reporter.said)

    def kept(self) -> dict[str, Any] | None:
        """Returns what the run has kept of its data, or takes over; None for a run that is new."""
        kept: dict[str, Any] | None = self._run.read_json("inventory.json")
        return self.continues.inherited if kept is None and self.continues is not None else kept

    def first(self, kept: Mapping[str, Any] | None, notices: Notices) -> list[Partition] | None:
        """Waits for a new run's first partitions; returns all that there are, or None where they need not be waited for.

        Empty if a stop was asked for. Collective.
        """
        if self._watch is None or (kept is not None and "partitions" in kept):
            return None
        self._reporter.said(f"Waits for partitions, and looks every {self._watch.poll_s:g} s.")
        return self._watch.first(self._world, Former.from_json((kept or {}).get("former")), notices)

    def end_here(self, position: Position, parts: Assembly) -> bool:
        """Returns whether a step ends a partition whose end is a place to go back to."""
        is_by_days = self._config.data.partitions is not None or bool(parts.dataset.former.inventories)
        return is_by_days and position.is_partition_end

    def validate_next(self, parts: Assembly, state: TrainState) -> None:
        """Evaluates a partition that is about to be trained for the first time, if the config says so. Collective."""
        if not self._config.evaluate.progressive:
            return
        dataset, position = parts.dataset, parts.dataset.order.position(state.step)
        if position.epoch or position.step_in_epoch or len(state.progressive) > position.partition:
            return
        progressive = Progressive(self._config, parts.evaluator.labels, parts.collator, self._world)
        source = dataset.train[position.partition]
        # With files of its own: the reader reads the partition ahead, in its thread.
        with parts.caches.left_out():
            values = progressive.evaluate(parts.model, source.of(source.inventory))
        number = position.partition + 1
        about = {"partition": number, "name": dataset.names[position.partition], "step": state.step}
        state.progressive.append(about | values)
        told = {f"progressive/{name}": value for name, value in values.items()}
        self._reporter.measured(state.step, {"progressive/partition": number, **told})

    def take_next(self, parts: Assembly, notices: Notices, check_not_replaced: Callable[[], None]) -> bool:
        """Waits for the next partition and adds it to the run's; returns whether there is one, and not a stop. Collective.

        Args:
            parts: of the run; they grow.
            notices: what this rank is asked from outside; entered.
            check_not_replaced: raises if another start has taken the run over meanwhile.

        Raises:
            DataError: if it cannot be read, or is not the next one in order.
        """
        assert self._watch is not None, "asked of a run that waits"
        dataset = parts.dataset
        self._reporter.said(f"Waits for the partition after {dataset.names[-1]}.")
        arrived = self._watch.wait(self._world, [*dataset.former.names, *dataset.names], notices)
        if not arrived:
            return False
        check_not_replaced()
        parts.grow(arrived[0].partition, arrived[0].inventory)
        if self._world.is_rank_zero:
            self._run.write_json("inventory.json", dataset.resolved())
        self._reporter.grown(parts.num_steps)
        self._reporter.said(f"Trains partition {dataset.names[-1]}: {dataset.order.num_rows[-1]:,} rows.")
        return True
