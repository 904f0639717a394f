"""Shows a person a plan: tables, ranks, what travels, how even it is, and the verdict."""

from __future__ import annotations

__all__ = ["show"]

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard.launch.planning import PlanReport
from embedshard.quantities import share, size
from embedshard.sharding.demand import ASSUMED_BAG_LENGTH
from embedshard.sharding.draft import Draft, Reason
from embedshard.sharding.memory import memory_of
from embedshard.sharding.plan import RESERVE

_MOST_GROUPS = 8
_ALIKE = 0.01
_EVEN = 1.05


def show(report: PlanReport, console: Console) -> None:
    """Prints a report."""
    draft = report.draft
    console.print(f"[bold]{escape(report.name)}[/] for {escape(_cluster(draft))}", highlight=False, soft_wrap=True)
    console.print(_tables(draft))
    for line in _lazy(draft):
        console.print(escape(line), highlight=False, soft_wrap=True)
    for name, reason in draft.reasons.items():
        kind = draft.plan.tables[name].sharding_type
        console.print(f"  [bold]{escape(name)}[/] {kind}: {escape(_why(reason))}", highlight=False, soft_wrap=True)
    for name, line in _memories(draft):
        console.print(f"  [bold]{escape(name)}[/]: {escape(line)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(_ranks(draft))
    for line in (*_traffic(draft), *_data(report)):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print()
    _show_verdict(report, console)


def _cluster(draft: Draft) -> str:
    cluster, count = draft.cluster, draft.cluster.num_machines
    workers = f"{cluster.world_size} worker{'s' if cluster.world_size > 1 else ''}"
    machines = f" on {count} machines of {cluster.local_world_size}" if count > 1 else ""
    kind = "of memory" if cluster.machine.device == "cuda" else "of the machine's memory"
    return (
        f"{workers}{machines}, {cluster.name}: {_size(cluster.memory_bytes)} {kind} each, "
        f"{_size(draft.usable_bytes)} without the {RESERVE:.0%} kept free"
    )


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold", no_wrap=column != "table")
    return table


def _tables(draft: Draft) -> Table:
    columns = ("table", "rows x dim", "type", "ranks", "shard rows", "weights", "state", "skew")
    table = _table(*columns, left=("table", "type", "ranks"))
    for name, placed in draft.plan.tables.items():
        described = draft.plan.depends_on[name]
        largest = max(placed.shards, key=lambda shard: shard.num_rows * shard.num_columns)
        table.add_row(
            escape(name),
            f"{_count(described['rows'])} x {described['dim']}",
            placed.sharding_type,
            _runs(sorted(set(placed.ranks))),
            _count(largest.num_rows) + ("" if largest.num_columns == described["dim"] else f" x {largest.num_columns}"),
            _size(draft.weight_bytes[name]),
            _size(draft.state_bytes[name]),
            f"{draft.footprint.skew[name].max_to_mean:.2f}" if len(set(placed.ranks)) > 1 else "",
        )
    return table


def _lazy(draft: Draft) -> Iterator[str]:
    names = [name for name, table in draft.plan.depends_on.items() if table["optimizer"] == "adam"]
    if names and draft.cluster.machine.device == "cpu":
        yield (
            f"  adam ({', '.join(names)}): embedshard's lazy kernel, since FBGEMM has none on a CPU; it moves the rows of "
            f"the batch alone, and keeps two float32 for each weight."
        )


def _memories(draft: Draft) -> Iterator[tuple[str, str]]:
    """Yields each table's memory and why, where it is a question: uvm_caching, 20 % in a cache on the GPUs (...), ..."""
    for name, placed in draft.plan.tables.items():
        lying, memory = draft.footprint.lying[name], memory_of(placed.kernel)
        why = draft.reasons[name].memory if name in draft.reasons else None
        if memory == "device" and why is None:
            continue
        where = [memory]
        if placed.cache_ratio is not None:
            where.append(f"{100 * placed.cache_ratio:.3g} % of its rows in a cache on the GPUs ({_size(lying.cache)})")
        where += [f"{_size(lying.host)} on the host"] * bool(lying.host) + [f"{_size(lying.ssd)} on the SSD"] * bool(
            lying.ssd
        )
        yield name, ", ".join(where) + (f", since {why}" if why else "")


def _why(reason: Reason) -> str:
    text = reason.why
    if reason.estimated_ms is not None:
        text += f": {_ms(reason.estimated_ms)} a step by TorchRec's estimate"
    if reason.runner_up is not None:
        text += f"; with {reason.runner_up} {_ms(reason.runner_up_ms)}"
    if reason.misfits:
        text += f"; {', '.join(reason.misfits)} would not fit"
    return text


def _ranks(draft: Draft) -> Table:
    has_process = any(rank.process for rank in draft.footprint.ranks)
    process = ["process"] if has_process else []
    has_host, has_ssd = (any(getattr(rank, name) for rank in draft.footprint.ranks) for name in ("host", "ssd"))
    beyond = ["on the host"] * has_host + ["on the SSD"] * has_ssd
    columns = ("rank", "weights", "state", "activations", "buffers", "dense", *process, "all", "used", *beyond)
    table = _table(*columns, left=("rank",))
    for ranks in _alike(draft):
        rank = max((draft.footprint.ranks[number] for number in ranks), key=lambda found: found.total)
        cells = [rank.weights, rank.state, rank.activations, rank.communication, rank.dense]
        cells += [rank.process] if has_process else []
        host = max(draft.footprint.ranks[number].host for number in ranks)
        ssd = max(draft.footprint.ranks[number].ssd for number in ranks)
        is_over = draft.usable_host_bytes is not None and host > draft.usable_host_bytes
        style = "red" if rank.total > draft.usable_bytes or is_over else None
        table.add_row(
            _runs(ranks),
            *(_size(cell) for cell in (*cells, rank.total)),
            f"{rank.total / draft.usable_bytes:.1%}",
            *([_size(host)] if has_host else []),
            *([_size(ssd)] if has_ssd else []),
            style=style,
        )
    return table


def _alike(draft: Draft) -> list[list[int]]:
    """Returns ranks in groups that differ little; of many groups the fullest, the middle and the emptiest."""
    groups: list[list[int]] = []
    for number, rank in enumerate(draft.footprint.ranks):
        for group in groups:
            first = draft.footprint.ranks[group[0]]
            if (
                abs(first.total - rank.total) <= _ALIKE * first.total
                and abs(first.state - rank.state) <= _ALIKE * first.state
            ):
                group.append(number)
                break
        else:
            groups.append([number])
    if len(groups) <= _MOST_GROUPS:
        return groups
    by_size = sorted(groups, key=lambda ranks: -draft.footprint.ranks[ranks[0]].total)
    return [*by_size[:3], by_size[len(by_size) // 2], by_size[-1]]


def _traffic(draft: Draft) -> Iterator[str]:
    traffic, cluster = draft.footprint.traffic, draft.cluster
    if cluster.world_size == 1:
        return
    total = traffic.ids + traffic.vectors + traffic.gradients
    away = f", {_size(traffic.between)} of it to other machines" if cluster.num_machines > 1 else ""
    yield ""
    yield (
        f"The busiest rank sends {_size(total)} a step{away}: ids {_size(traffic.ids)}, vectors and their gradients "
        f"{_size(traffic.vectors)}, dense gradients {_size(traffic.gradients)}. About {_ms(traffic.milliseconds)} at "
        f"{cluster.machine.within_machine:g} GB/s within a machine"
        + (f" and {cluster.machine.between_machines:g} GB/s between machines" if cluster.num_machines > 1 else "")
        + ", if nothing overlaps."
    )


def _data(report: PlanReport) -> Iterator[str]:
    sample, draft = report.sample, report.draft
    yield ""
    if sample is None:
        yield (
            f"Without data the skew is not known. Assumed: lookups fall evenly on all rows; an id feature has one id a row, "
            f"a bag max_length, or {ASSUMED_BAG_LENGTH}. The data: {report.unread}"
        )
        return
    seen = "all" if sample.sampled_rows == sample.rows else f"{sample.sampled_rows:,} of"
    yield (
        f"Lookups are measured on {seen} {sample.rows:,} training rows. Rows are cut into contiguous ranges, so hot ids "
        f"side by side fall on one rank. skew: lookups of the busiest rank over the mean of those that have a shard."
    )
    lookups = draft.footprint.lookups
    mean = sum(lookups) / len(lookups)
    if len(lookups) > 1 and mean:
        busiest = max(range(len(lookups)), key=lambda rank: lookups[rank])
        even = lookups[busiest] / mean
        yield (
            f"Rank {busiest} looks up most: {_count(round(lookups[busiest]))} ids a step over all tables, "
            f"{even:.2f} times the mean" + ("." if even < _EVEN else ": the others wait for it.")
        )
    for name, feature in sample.features.items():
        if not feature.found.hottest:
            continue
        hottest = [
            f"{f'row {row}' if id_ is None else id_} {share(count / feature.found.lookups)}"
            for (row, count), id_ in zip(feature.found.hottest[:3], sample.hottest_ids[name], strict=False)
        ]
        rows = draft.plan.depends_on[feature.found.table]["rows"]
        yield (
            f"  {name}: {feature.ids_per_row:.3g} ids a row, {feature.found.distinct_rows:,} of {_count(rows)} rows met; "
            f"hottest {', '.join(hottest)}"
        )


def _show_verdict(report: PlanReport, console: Console) -> None:
    draft = report.draft
    totals = [rank.total for rank in draft.footprint.ranks]
    fullest = max(range(len(totals)), key=lambda rank: totals[rank])
    needs = f"rank {fullest} is the fullest and needs {_size(totals[fullest])} of {_size(draft.usable_bytes)}"
    host = max(rank.host for rank in draft.footprint.ranks)
    if host and draft.usable_host_bytes is not None:
        needs += f"; on the host a rank needs {_size(host)} of {_size(draft.usable_host_bytes)}"
    ssd = max(rank.ssd for rank in draft.footprint.ranks)
    if ssd:
        size_of_ssd = draft.cluster.ssd_bytes
        needs += f"; on the SSD {_size(ssd)}" + ("" if size_of_ssd is None else f" of {_size(size_of_ssd)}")
    if draft.fits:
        console.print(f"[green]It fits[/]: {needs}.", highlight=False, soft_wrap=True)
        if draft.problem is not None:
            console.print(
                "TorchRec's planner, by its own estimate of buffers, finds no place: train with this plan, saved by --save.",
                soft_wrap=True,
            )
        return
    console.print(f"[red]It does not fit[/]: {needs}.", highlight=False, soft_wrap=True)
    if not report.suggestions:
        console.print(
            "None of these alone helps: other sharding types, more workers, larger machines, tables behind a cache in the "
            "host's memory, smaller batches, fp16 tables, "
            "row-wise Adagrad, narrower tables.",
            soft_wrap=True,
        )
        return
    console.print("It would with any of these, each tried:")
    for found in report.suggestions:
        spare = f"{_size(found.needs)} of {_size(found.usable)}"
        console.print(
            f"  {escape(found.what)} ({spare}):  {escape(_command(found.arguments))}", highlight=False, soft_wrap=True
        )


def _command(arguments: Sequence[str]) -> str:
    return " ".join(f"'{argument}'" if set(argument) & set("{}[] ") else argument for argument in arguments)


def _runs(ranks: Sequence[int]) -> str:
    """Returns ascending ranks as runs: 0-7, 9."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


def _count(count: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def _size(count: float) -> str:
    """Returns a size of at most seven characters: 63.5 GiB, 126 GiB."""
    number, _, unit = size(count).partition(" ")
    whole = number.partition(".")[0]
    return f"{whole if len(whole) > 2 else number} {unit}"


def _ms(milliseconds: float | None) -> str:
    return "—" if milliseconds is None else f"{milliseconds:.3g} ms"
