"""Law 1 on a config of one's own: its first steps under every sharding type and in worlds of 1, 2 and 4, compared.

The reference is a world of one, whose tables lie whole on its one rank. Everything else must give its losses and weights
but for the rounding of sums, with every table moved by the optimizer that its config names; what law 1 does not cover is
told as n/a, with the reason.
"""

from __future__ import annotations

__all__ = ["CaseReport", "Verification", "show", "verify_plans"]

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from embedshard.config import Config, TableSpec, table_specs
from embedshard.config.parts import (
    EvaluateConfig,
    InBatchSoftmaxConfig,
    ManagedVocabulary,
    ShardingConfig,
    TableShardingConfig,
)
from embedshard.config.placement import ALL_TYPES, changed_optimizer, impossible
from embedshard.data.vocabulary import table_rows
from embedshard.data.vocabulary_building import loaded_anew
from embedshard.errors import ConfigError, DataError, PlanError, nearest
from embedshard.launch.rehearsing import CaseError, LocalGroup, Outcome
from embedshard.train.rehearsal import Rehearsal

if TYPE_CHECKING:
    from embedshard.train.rehearsal import Array

AS_CONFIGURED = "as configured"

LOSS_TOLERANCE = 1e-5
"""Of a loss, relative where it is above 1."""
WEIGHT_TOLERANCES = {"sgd": (1e-6, 1.0), "rowwise_adagrad": (1e-6, 1.0), "adagrad": (1e-5, 0.999), "adam": (1e-5, 0.999)}
"""By optimizer: how far weights may differ, at which quantile. Adagrad divides each weight's gradient by its own size, so
where a gradient is nothing but rounding, the step is not."""

_MOST_ROWS = 20_000
_OTHER_ROWS = 1_000
_NODES = {4: 2}
"""Workers of one machine, by world size, where it is not all of them: a world of 4 stands for two machines of two."""


@dataclass(frozen=True)
class CaseReport:
    """What came of one sharding type in one world.

    Attributes:
        sharding: the type, or `as configured`.
        world_size: workers.
        status: `n/a` where law 1 does not cover it.
        why: of a fail or an n/a; what is to be known of a pass.
        loss_difference: the largest over the steps.
        weight_difference: the largest over tables and the dense part.
        where: the tensor with it.
        seconds: that it took.
    """

    sharding: str
    world_size: int
    status: Literal["pass", "fail", "n/a"]
    why: str = ""
    loss_difference: float | None = None
    weight_difference: float | None = None
    where: str = ""
    seconds: float = 0.0

    def describe(self) -> str:
        """Returns it as a line."""
        return f"{self.sharding}, {self.world_size} worker{'s' if self.world_size > 1 else ''}: {self.status}. {self.why}"


@dataclass
class Verification:
    """All cases of a config.

    Attributes:
        steps: that were trained.
        cases: in the order in which they were run.
        beyond: what of the config itself law 1 does not cover, and how it was set for the cases.
    """

    steps: int
    cases: list[CaseReport] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(case.status != "fail" for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {"passed": self.passed, "steps": self.steps, "beyond": self.beyond, "cases": [asdict(c) for c in self.cases]}


def verify_plans(
    config: Config,
    *,
    steps: int = 20,
    worlds: Sequence[int] = (1, 2, 4),
    types: Sequence[str] | None = None,
    console: Console | None = None,
    groups: Mapping[int, LocalGroup] | None = None,
) -> Verification:
    """Trains the first steps of a config in all ways, and compares. Leaves no process behind that it started.

    Args:
        config: the config.
        steps: how many, or fewer where the run has fewer.
        worlds: numbers of workers. 1 is always trained: it is the reference.
        types: sharding types; all, and the config's own plan, where None.
        console: shown progress; None is quiet.
        groups: by world size, processes to use and to keep running; others are started and ended here.

    Raises:
        EmbedshardError: if the reference cannot be trained: a mistake of the config or the data.
    """
    for kind in types or ():
        if kind not in ALL_TYPES:
            raise ConfigError(f"there is no sharding type '{kind}'. {nearest(kind, ALL_TYPES)}")
    wanted = [AS_CONFIGURED, *ALL_TYPES] if types is None else list(types)
    with loaded_anew(config) as vocabularies:
        specs = table_specs(config, table_rows(vocabularies))
    plain, kept = _bare(config), groups or {}
    found = Verification(steps, beyond=_beyond(config))
    with ExitStack() as stack:
        progress = _progress(console)
        task = progress.add_task("", total=1 + len(wanted) * len(worlds)) if progress else None
        stack.enter_context(progress or nullcontext())

        def tell(what: str) -> None:
            if progress is not None and task is not None:
                progress.update(task, description=what, advance=1)

        tell("reference")
        with nullcontext(kept[1]) if 1 in kept else LocalGroup(1) as alone:
            reference = _reference(alone, plain, specs, steps)
            found.steps = len(reference.losses[0])
            for world_size in sorted(worlds):
                group = alone if world_size == 1 else kept.get(world_size)
                if group is None:
                    group = stack.enter_context(LocalGroup(world_size, _NODES.get(world_size)))
                for sharding in wanted:
                    tell(f"{sharding}, {world_size} worker{'s' if world_size > 1 else ''}")
                    if world_size == 1 and sharding != wanted[0]:  # whatever the type: the same plan, trained again once
                        found.cases.append(replace(found.cases[-1], sharding=sharding, seconds=0.0))
                        continue
                    found.cases.append(_case(group, plain, config, specs, steps, sharding, reference))
                if world_size not in kept:
                    group.close()
    return found


def show(found: Verification, console: Console) -> None:
    """Prints the cases as a table."""
    table = Table(title=f"The first {found.steps} steps against one process with whole tables", title_justify="left")
    for heading in ("sharding", "workers", "", "loss", "weights", "largest at", ""):
        table.add_column(heading, justify="right" if heading in ("workers", "loss", "weights") else "left")
    colours = {"pass": "green", "fail": "red", "n/a": "yellow"}
    notes: dict[str, int] = {}
    for case in found.cases:
        note = f"see {notes.setdefault(case.why, len(notes) + 1)}" if case.why else ""
        table.add_row(
            case.sharding,
            str(case.world_size),
            f"[{colours[case.status]}]{case.status}[/]",
            "" if case.loss_difference is None else f"{case.loss_difference:.1e}",
            "" if case.weight_difference is None else f"{case.weight_difference:.1e}",
            case.where,
            note,
        )
    console.print(table)
    for why, number in notes.items():
        console.print(f"{number}. {why}", soft_wrap=True, highlight=False, markup=False)
    for line in found.beyond:
        console.print(f"n/a: {line}", soft_wrap=True, highlight=False)
    counts = ", ".join(f"{sum(case.status == s for case in found.cases)} {s}" for s in ("pass", "fail", "n/a"))
    console.print(counts, highlight=False)


# ------------------------------------------------------------------------------------------------------ what is trained
def _bare(config: Config) -> Config:
    """Returns the config without what a rehearsal does not do, and without what law 1 does not cover."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": None, "test": None}),
            "evaluate": EvaluateConfig(),
            "train": config.train.model_copy(update={"early_stopping": None}),
            "sharding": config.sharding.model_copy(update={"communication": "fp32"}),
        }
    )


def _beyond(config: Config) -> list[str]:
    found = []
    if config.sharding.communication != "fp32":
        found.append(f"sharding.communication '{config.sharding.communication}' rounds on the way; compared with fp32.")
    return found


def _variant(config: Config, sharding: str) -> Config:
    """Returns the config with every table cut in one way; tables for which that is impossible stay whole."""
    if sharding == AS_CONFIGURED:
        return config
    tables = {}
    for name, table in config.tables.items():
        optimizer = table.optimizer.kind or config.optimizer.tables.kind
        is_out = changed_optimizer(sharding, optimizer) or impossible(
            sharding,
            optimizer,
            table.dtype,
            config.is_sequence_table(name),
            isinstance(table.vocabulary, ManagedVocabulary),
        )
        kind = "table_wise" if is_out else sharding
        tables[name] = table.model_copy(update={"sharding": TableShardingConfig.model_validate({"type": kind})})
    return config.model_copy(update={"tables": tables, "sharding": ShardingConfig(planner="explicit")})


def _not_covered(config: Config, specs: Sequence[TableSpec], sharding: str, world_size: int) -> tuple[bool, str]:
    """Returns whether law 1 covers nothing of a case, and what it does not cover."""
    objective = config.objective
    if config.data.lanes % world_size:
        return True, f"data.lanes={config.data.lanes} does not divide by {world_size}"
    if world_size == 1:
        return False, ""
    if isinstance(objective, InBatchSoftmaxConfig) and objective.negatives == "local":
        return True, "objective.negatives is 'local': each worker sees its own rows' items"
    names = [spec.name for spec in specs if spec.name in config.tables]
    reasons: dict[str, list[str]] = {}
    for spec in specs:
        if spec.name not in config.tables:
            continue
        for kind in spec.sharding.asked if sharding == AS_CONFIGURED else [sharding]:
            why = changed_optimizer(kind, spec.optimizer.kind) or impossible(
                kind, spec.optimizer.kind, spec.dtype, spec.is_sequence, spec.managed_by is not None
            )
            if why:
                reasons.setdefault(why, []).append(spec.name)
    out = [name for name in names if any(name in tables for tables in reasons.values())]
    why = "; ".join(f"{', '.join(tables)}: {why}" for why, tables in reasons.items())
    return (len(out) == len(names) or (sharding == AS_CONFIGURED and bool(out))), why


# ------------------------------------------------------------------------------------------------------ how it compares
def _reference(group: LocalGroup, config: Config, specs: Sequence[TableSpec], steps: int) -> Outcome:
    """Trains in one process; notes the rows that were looked up, and others between them."""
    whole = _variant(config, "table_wise")
    nothing = {spec.name: np.zeros(1, np.int64) for spec in specs}
    touched = _run(group, Rehearsal(whole, steps, rows=nothing)).touched
    return _run(group, Rehearsal(whole, steps, rows={spec.name: _sample(touched, spec) for spec in specs}))


def _sample(touched: Mapping[str, Array], spec: TableSpec) -> Array:
    """Returns rows of a table to compare: those looked up, at most so many, and evenly spaced others."""
    looked_up = touched.get(spec.name, np.zeros(0, np.int64))
    if len(looked_up) > _MOST_ROWS:
        looked_up = looked_up[np.linspace(0, len(looked_up) - 1, _MOST_ROWS).astype(np.int64)]
    others = np.linspace(0, spec.num_embeddings - 1, min(_OTHER_ROWS, spec.num_embeddings)).astype(np.int64)
    return np.union1d(looked_up, others)


def _run(group: LocalGroup, case: Rehearsal) -> Outcome:
    """Runs what must succeed: where it does not, the config or the data are at fault."""
    try:
        return group.run(case)
    except CaseError as error:
        classes = {kind.__name__: kind for kind in (ConfigError, DataError, PlanError)}
        raise classes.get(error.kind, ConfigError)(str(error)) from error


def _case(
    group: LocalGroup,
    plain: Config,
    config: Config,
    specs: Sequence[TableSpec],
    steps: int,
    sharding: str,
    reference: Outcome,
) -> CaseReport:
    is_out, why = _not_covered(config, specs, sharding, group.world_size)
    if is_out:
        return CaseReport(sharding, group.world_size, "n/a", why)
    rows = {spec.name: _sample(reference.touched, spec) for spec in specs}
    try:
        outcome = group.run(Rehearsal(_variant(plain, sharding), steps, rows=rows))
    except CaseError as error:
        is_absent = error.kind == "PlanError" and sharding == AS_CONFIGURED
        return CaseReport(sharding, group.world_size, "n/a" if is_absent else "fail", str(error))
    problems = list(_problems(outcome, reference, specs))
    where, largest = max(_differences(outcome, reference), key=lambda pair: pair[1])
    return CaseReport(
        sharding=sharding,
        world_size=group.world_size,
        status="fail" if problems else "pass",
        why="; ".join(problems) or why,
        loss_difference=_loss_difference(outcome, reference),
        weight_difference=largest,
        where=where,
        seconds=outcome.seconds,
    )


def _loss_difference(outcome: Outcome, reference: Outcome) -> float:
    ours, theirs = np.array(outcome.losses[0]), np.array(reference.losses[0])
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs)), initial=0.0))


def _differences(outcome: Outcome, reference: Outcome) -> Iterator[tuple[str, float]]:
    for name, values in outcome.after.items():
        yield name.split("/")[1], float(np.max(np.abs(_wide(values) - _wide(reference.after[name])), initial=0.0))


def _problems(outcome: Outcome, reference: Outcome, specs: Sequence[TableSpec]) -> Iterator[str]:
    """Yields what is not as law 1 has it."""
    if any(losses != outcome.losses[0] for losses in outcome.losses):
        yield "ranks disagree about the loss"
    if _loss_difference(outcome, reference) > LOSS_TOLERANCE:
        yield f"losses differ by {_loss_difference(outcome, reference):.1e}, allowed are {LOSS_TOLERANCE:g}"
    for spec in specs:
        name = f"tables/{spec.name}/weight"
        ours, theirs = _wide(outcome.after[name]), _wide(reference.after[name])
        if not np.array_equal(outcome.before[name], reference.before[name]):
            yield f"table '{spec.name}' begins with other values"
        if spec.lookups and reference.touched.get(spec.name) is not None and np.array_equal(ours, outcome.before[name]):
            yield f"table '{spec.name}' was looked up and has not moved"
        tolerance, quantile = WEIGHT_TOLERANCES[spec.optimizer.kind]
        if spec.dtype != "fp32":
            tolerance = float(np.finfo(np.float16).eps)
        # Float32 keeps 24 bits of the largest weight, and as many of a step.
        tolerance *= max(1.0, float(np.abs(theirs).max(initial=0.0)), spec.optimizer.lr)
        found = float(np.quantile(np.abs(ours - theirs), quantile))
        if found > tolerance:
            yield f"weights of table '{spec.name}' differ by {found:.1e}, allowed are {tolerance:.1e}"
    for name, values in outcome.after.items():
        if name.startswith("dense/"):
            difference = _most(np.abs(_wide(values) - _wide(reference.after[name])))
            scale = max(1.0, float(np.abs(reference.after[name]).max(initial=0.0)))
            if difference > 1e-5 * scale:
                yield f"'{name.removeprefix('dense/')}' differs by {difference:.1e}, allowed are {1e-5 * scale:.1e}"


def _most(differences: Array) -> float:
    """Returns the largest but for one in a thousand, and for one of a hundred or more.

    Adam divides a gradient by its size: one that is all rounding moves its weight as far as any other.
    """
    left_out = max(differences.size // 1000, int(differences.size >= 100))
    return float(np.sort(differences, axis=None)[-1 - left_out]) if differences.size else 0.0


def _wide(values: Array) -> Array:
    return values.astype(np.float64)


def _progress(console: Console | None) -> Progress | None:
    if console is None:
        return None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)
