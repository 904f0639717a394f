"""Plans a config for machines that need not be there: does it fit, what travels, how even is it, and what would help."""

from __future__ import annotations

__all__ = ["PlanReport", "Suggestion", "plan_here"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from embedshard.config import Config, load_config, table_specs
from embedshard.config.parts import AutoVocabulary, ManagedVocabulary, TokenizerVocabulary
from embedshard.data.lookup_sample import LookupSample, sample_lookups
from embedshard.data.order import worlds_that_fit
from embedshard.data.vocabulary import table_rows
from embedshard.data.vocabulary_building import loaded_anew
from embedshard.errors import ConfigError, DataError, EmbedshardError
from embedshard.sharding.draft import Draft, draft_plan
from embedshard.sharding.hardware import Cluster, cluster_of, find_machine, named_machines
from embedshard.sharding.memory import memory_of


@dataclass(frozen=True)
class Suggestion:
    """A change with which the plan fits: it was tried.

    Attributes:
        what: in a sentence.
        arguments: to be added to the command line, or instead of those of the same name.
        needs: bytes of the fullest rank then.
        usable: bytes that it has.
    """

    what: str
    arguments: tuple[str, ...]
    needs: int
    usable: int


@dataclass(frozen=True)
class PlanReport:
    """What was found.

    Attributes:
        name: the config's.
        draft: the plan and what it takes.
        sample: what is known of the data; None if they could not be read.
        unread: why not.
        suggestions: what would make it fit, if it does not.
    """

    name: str
    draft: Draft
    sample: LookupSample | None
    unread: str | None
    suggestions: tuple[Suggestion, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it, for machines."""
        draft, sample = self.draft, self.sample
        fullest = max(rank.total for rank in draft.footprint.ranks)
        return {
            "fits": draft.fits,
            "fullest_rank_bytes": fullest,
            "usable_bytes": draft.usable_bytes,
            "usable_host_bytes": draft.usable_host_bytes,
            "hardware": {"name": draft.cluster.name, **draft.cluster.machine.model_dump()},
            "memory_bytes": draft.cluster.memory_bytes,
            "planner_problem": draft.problem,
            "plan": draft.plan.to_json(),
            "reasons": {name: asdict(reason) for name, reason in draft.reasons.items()},
            "ranks": [
                {**asdict(rank), "total": rank.total, "lookups": lookups}
                for rank, lookups in zip(draft.footprint.ranks, draft.footprint.lookups, strict=True)
            ],
            "memory": {
                name: {
                    "kind": memory_of(table.kernel),
                    "cache_ratio": table.cache_ratio,
                    **asdict(draft.footprint.lying[name]),
                }
                for name, table in draft.plan.tables.items()
            },
            "traffic": asdict(draft.footprint.traffic),
            "skew": {
                name: {"lookups": {str(rank): ids for rank, ids in skew.lookups.items()}, "max_to_mean": skew.max_to_mean}
                for name, skew in draft.footprint.skew.items()
            },
            "data": None
            if sample is None
            else {
                "rows": sample.rows,
                "sampled_rows": sample.sampled_rows,
                "features": {
                    name: {
                        "table": feature.found.table,
                        "ids_per_row": feature.ids_per_row,
                        "hottest": [
                            [row, id_, count / feature.found.lookups]
                            for (row, count), id_ in zip(feature.found.hottest, sample.hottest_ids[name], strict=True)
                        ],
                    }
                    for name, feature in sample.features.items()
                },
            },
            "data_unread": self.unread,
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
        }


def plan_here(
    config_path: Path,
    overrides: Sequence[str],
    workers: int,
    hardware: str,
    environment: Mapping[str, str],
    console: Console,
) -> PlanReport:
    """Plans a config. Needs no process group and none of the hardware.

    Args:
        config_path: the config.
        overrides: `a.b=value`, as of `--set`.
        workers: how many train together.
        hardware: a machine's name, or a file that describes one.
        environment: where `${VAR}` of the config is looked up.
        console: where it is shown that something takes a while.

    Raises:
        EmbedshardError: what a user can act on.
    """
    config = load_config(config_path, environment, overrides).config
    _check_lanes(config, workers)
    name, machine = find_machine(hardware)
    cluster = cluster_of(name, machine, workers)
    with console.status("reading a sample of the data"):
        rows, sample, unread = _look_at_data(config)
    with console.status("planning"):
        draft = draft_plan(config, table_specs(config, rows), cluster, sample, explains=True)
    trial = _Trial(config_path, overrides, environment, rows, sample, draft)
    with console.status("trying what would fit"):
        suggestions = () if draft.fits else tuple(trial.suggestions(config))
    return PlanReport(config.name or config_path.stem, draft, sample, unread, suggestions)


def _check_lanes(config: Config, workers: int) -> None:
    lanes = config.data.lanes
    if lanes % workers:
        fitting = ", ".join(str(size) for size in worlds_that_fit(lanes))
        raise ConfigError(
            f"--workers {workers}: they cannot share data.lanes={lanes} lanes evenly. Use one of {fitting}, or other lanes "
            f"(96 fits 1, 2, 3, 4, 6, 8, ...)."
        )


def _look_at_data(config: Config) -> tuple[dict[str, int], LookupSample | None, str | None]:
    """Returns each table's rows, a sample, and why there is none."""
    try:
        with loaded_anew(config) as made:
            vocabularies = made
    except DataError as error:
        rows = {name: table.known_rows for name, table in config.tables.items()}
        unknown = [name for name, count in rows.items() if count is None]
        if unknown:
            has_words = isinstance(config.tables[unknown[0]].vocabulary, TokenizerVocabulary)
            given = f"tables.{unknown[0]}.rows=1000000"
            if has_words:
                given = f"'tables.{unknown[0]}.vocabulary={{kind: words, num_words: 20000}}'"
            elif isinstance(config.tables[unknown[0]].vocabulary, AutoVocabulary):
                given = f"tables.{unknown[0]}.vocabulary.max_size=1000000"
            raise DataError(
                f"{error} Without it nobody knows how many rows table '{unknown[0]}' has: for a plan without the vocabulary "
                f"give them, such as --set {given}."
            ) from error
        return {name: count for name, count in rows.items() if count is not None}, None, str(error)
    try:
        return table_rows(vocabularies), sample_lookups(config, vocabularies), None
    except DataError as error:
        return table_rows(vocabularies), None, str(error)


class _Trial:
    """Tries changes, and keeps those with which the plan fits."""

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        environment: Mapping[str, str],
        rows: Mapping[str, int],
        sample: LookupSample | None,
        draft: Draft,
    ) -> None:
        self._path, self._overrides, self._environment = path, overrides, environment
        self._rows, self._sample, self._draft = rows, sample, draft
        tables = draft.plan.depends_on
        # The largest first: what helps there helps most.
        self._names = sorted(
            (name for name in rows if name in tables), key=lambda name: (-tables[name]["rows"] * tables[name]["dim"], name)
        )
        whole = sum(draft.weight_bytes[name] for name in self._names)
        self._large = [name for name in self._names if draft.weight_bytes[name] >= whole / 100]

    def suggestions(self, config: Config) -> list[Suggestion]:
        """Returns what was tried and fits; what changes the result comes last."""
        tried = (
            self._types(config),
            self._workers(config, self._draft.cluster, ()),
            self._hardware(),
            self._memory(config),
            self._batch(config),
            self._halves(config),
            self._optimizer(config),
            self._dim(config),
        )
        found = [suggestion for suggestion in tried if suggestion is not None]
        return found or self._elsewhere(config)

    def _fitting(self, what: str, changes: Sequence[str], cluster: Cluster | None = None) -> Suggestion | None:
        """Returns the suggestion if a plan with these overrides, or on this cluster, fits."""
        try:
            config = load_config(self._path, self._environment, [*self._overrides, *changes]).config
            specs = table_specs(config, self._rows)
            draft = draft_plan(config, specs, cluster or self._draft.cluster, self._sample, explains=False)
        except EmbedshardError:  # the change is not to be had
            return None
        if not draft.fits or draft.problem is not None:
            return None
        arguments = [part for change in changes for part in ("--set", change)]
        needs = max(rank.total for rank in draft.footprint.ranks)
        return Suggestion(what, tuple(arguments), needs, draft.usable_bytes)

    def _types(self, config: Config) -> Suggestion | None:
        held = [name for name in self._names if config.tables[name].sharding.asked]
        if not held:
            return None
        free = [f"tables.{name}.sharding={{}}" for name in held]
        planner = [] if config.sharding.planner == "auto" else ["sharding.planner=auto"]
        shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        return self._fitting(f"let the planner choose how to cut {shown}", [*free, *planner])

    def _workers(self, config: Config, cluster: Cluster, changes: Sequence[str]) -> Suggestion | None:
        """Returns the fewest workers that fit on machines of a kind, more than there are now."""
        for workers in worlds_that_fit(config.data.lanes):
            if workers <= self._draft.cluster.world_size:
                continue
            try:
                larger = cluster_of(cluster.name, cluster.machine, workers)
            except ConfigError:
                continue
            machines = f"{larger.num_machines} machine{'s' if larger.num_machines > 1 else ''}"
            found = self._fitting(f"{workers} workers on {machines} ({cluster.name}): the fewest that fit", changes, larger)
            if found is not None:
                arguments = ("--workers", str(workers), *found.arguments)
                return Suggestion(found.what, arguments, found.needs, found.usable)
        return None

    def _hardware(self) -> Suggestion | None:
        """Returns the smallest machines on which as many workers fit."""
        for cluster in self._larger_machines():
            found = self._fitting(f"as many workers on {cluster.name}", (), cluster)
            if found is not None:
                return Suggestion(found.what, ("--hardware", cluster.name), found.needs, found.usable)
        return None

    def _memory(self, config: Config) -> Suggestion | None:
        """Returns that large tables may leave the GPUs' memory, one after the other."""
        if self._draft.cluster.machine.device == "cpu":
            return None
        changes: list[str] = []
        for name in self._large:
            table = config.tables[name]
            is_held = isinstance(table.vocabulary, ManagedVocabulary) or "data_parallel" in table.sharding.asked
            if table.memory.kind == "device" and not is_held:
                changes.append(f"tables.{name}.memory.kind=auto")
                found = self._fitting(f"the host's memory behind a cache, which is slower, for {_listed(changes)}", changes)
                if found is not None:
                    return found
        return None

    def _elsewhere(self, config: Config) -> list[Suggestion]:
        """Returns the fewest workers on each kind of larger machines, where nothing else helps."""
        found = [(cluster, self._workers(config, cluster, ())) for cluster in self._larger_machines()]
        return [
            Suggestion(more.what, ("--hardware", cluster.name, *more.arguments), more.needs, more.usable)
            for cluster, more in found
            if more is not None
        ]

    def _larger_machines(self) -> Iterator[Cluster]:
        ours = self._draft.cluster
        for name, machine in sorted(named_machines().items(), key=lambda pair: pair[1].memory or 0):
            try:
                cluster = cluster_of(name, machine, ours.world_size)
            except ConfigError:
                continue
            if machine.device == "cuda" and cluster.memory_bytes > ours.memory_bytes:
                yield cluster

    def _batch(self, config: Config) -> Suggestion | None:
        size = config.train.global_batch_size // 2
        while size >= config.data.lanes and size % config.data.lanes == 0:
            found = self._fitting(f"batches of {size:,} rows", [f"train.global_batch_size={size}"])
            if found is not None:
                return found
            size //= 2
        return None

    def _halves(self, config: Config) -> Suggestion | None:
        changes: list[str] = []
        for name in self._large:
            if config.tables[name].dtype == "fp32":
                changes.append(f"tables.{name}.dtype=fp16")
                found = self._fitting(f"fp16 weights for {_listed(changes)}", changes)
                if found is not None:
                    return found
        return self._workers(config, self._draft.cluster, changes) if changes else None

    def _optimizer(self, config: Config) -> Suggestion | None:
        changes: list[str] = []
        for name in self._large:
            if self._draft.plan.depends_on[name]["optimizer"] in ("adagrad", "adam"):
                changes.append(f"tables.{name}.optimizer.kind=rowwise_adagrad")
                found = self._fitting(f"row-wise Adagrad for {_listed(changes)}, which trains otherwise", changes)
                if found is not None:
                    return found
        return None

    def _dim(self, config: Config) -> Suggestion | None:
        """Returns the widest tables that fit, all narrowed alike, in eighths."""
        for eighths, names in product(range(7, 0, -1), (self._large, self._names)):
            dims = {name: max(4, config.tables[name].dim * eighths // 32 * 4) for name in names}
            changes = [f"tables.{name}.dim={dim}" for name, dim in dims.items() if dim != config.tables[name].dim]
            if changes:
                found = self._fitting(f"narrower tables: {eighths}/8 of the columns, which trains otherwise", changes)
                if found is not None:
                    return found
        return None


def _listed(changes: Sequence[str]) -> str:
    names = [change.split(".")[1] for change in changes]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
