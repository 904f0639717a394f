"""A plan as data: what plan.json holds, which config it belongs to, and how it is replayed.

A plan depends on the tables' shapes, dtypes, optimizers and features, and on how many workers there are on how many
machines. Where a config no longer agrees, or asks for other types, the plan is refused, table by table.
"""

from __future__ import annotations

__all__ = ["RecordedPlan", "RecordedShard", "RecordedTable", "describe_table", "read_plan", "record_plan"]

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)

from embedshard.config import TableSpec, differences
from embedshard.config.placement import DEFAULT_TYPES
from embedshard.errors import PlanError
from embedshard.models.embeddings import table_modules, table_weights
from embedshard.sharding.explicit import leaves_empty_pieces
from embedshard.sharding.memory import CACHED, OFF_DEVICE, cache_params, kernels_allowed, memory_of
from embedshard.storage import locate

_FORMAT: Final = "embedshard plan"
_VERSION: Final = 1
_REPLICATED: Final = ShardingType.DATA_PARALLEL.value


@dataclass(frozen=True)
class RecordedShard:
    """A block of a table on a rank: rows [first, last) and columns [first, last)."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return self.rows[1] - self.rows[0]

    @property
    def num_columns(self) -> int:
        """How many columns it has."""
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class RecordedTable:
    """Where a table lies.

    Attributes:
        sharding_type: TorchRec's word.
        kernel: TorchRec's word.
        shards: in TorchRec's order; of a replicated table one for each rank.
        cache_ratio: the share of its rows that a cache on the GPU holds; None where it has none.
    """

    sharding_type: str
    kernel: str
    shards: tuple[RecordedShard, ...]
    cache_ratio: float | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each shard."""
        return tuple(shard.rank for shard in self.shards)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank has all of it."""
        return self.sharding_type == _REPLICATED


@dataclass(frozen=True)
class RecordedPlan:
    """A plan and what it depends on.

    Attributes:
        workers: ranks.
        local_workers: ranks of one machine.
        depends_on: each table as `describe_table` tells it.
        tables: where each lies, in the config's order.
        source: where it was read, for messages.
        is_binding: whether a config that it is not made for is refused, instead of being planned anew.
    """

    workers: int
    local_workers: int
    depends_on: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, RecordedTable]
    source: str = "the plan"
    is_binding: bool = True

    @property
    def fingerprint(self) -> str:
        """Of what it depends on."""
        text = json.dumps(self._dependencies(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _dependencies(self) -> dict[str, Any]:
        tables = {name: dict(table) for name, table in self.depends_on.items()}
        return {"workers": self.workers, "local_workers": self.local_workers, "tables": tables}

    def differences(self, specs: Sequence[TableSpec], planner: str, workers: int, local_workers: int) -> list[str]:
        """Returns a line for each thing in which a config and a world are not those that it was made for."""
        found = []
        if workers != self.workers:
            found.append(f"workers: {self.workers} in the plan, {workers} now")
        elif local_workers != self.local_workers:
            found.append(f"workers on one machine: {self.local_workers} in the plan, {local_workers} now")
        ours = {spec.name: describe_table(spec) for spec in specs}
        for name in dict.fromkeys((*self.depends_on, *ours)):
            if name not in ours or name not in self.depends_on:
                found.append(f"table '{name}': {'not in the plan' if name in ours else 'in the plan, not in the config'}")
                continue
            found += [
                f"table '{name}': {path} {_shown(theirs)} in the plan, {_shown(mine)} in the config"
                for path, mine, theirs in differences(ours[name], self.depends_on[name])
            ]
        return found + [line for spec in specs if spec.name in self.tables for line in self._against(spec, planner)]

    def _against(self, spec: TableSpec, planner: str) -> list[str]:
        """Returns in what a table's place is not what the config asks for; where it could not be cut, whole is right."""
        table, asked = self.tables[spec.name], spec.sharding
        found = [] if table.is_replicated else _memory_against(spec, table)
        if self.workers == 1 or found:
            return found
        allowed = [str(asked.type)] if planner == "explicit" else [str(kind) for kind in asked.types or DEFAULT_TYPES]
        pieces = {"row_wise": self.workers, "table_row_wise": self.local_workers, "grid_shard": self.local_workers}
        if any(leaves_empty_pieces(spec.num_embeddings, pieces[kind]) for kind in allowed if kind in pieces):
            allowed.append("table_wise")
        if table.sharding_type not in allowed:
            shown = ", ".join(allowed)
            return [f"table '{spec.name}': {table.sharding_type} in the plan, the config allows {shown}"]
        if planner == "explicit" and asked.ranks and not set(table.ranks) <= set(asked.ranks):
            return [f"table '{spec.name}': ranks {_shown(list(table.ranks))} in the plan, {_shown(asked.ranks)} asked for"]
        return []

    def applies(
        self, specs: Sequence[TableSpec], planner: str, workers: int, local_workers: int, device_type: str = "cuda"
    ) -> bool:
        """Returns whether it is the plan of this config and world, and can be had on the device.

        Raises:
            PlanError: naming each difference, if it is not and is binding.
        """
        found = self.differences(specs, planner, workers, local_workers)
        if device_type == "cpu":
            found += [
                f"table '{name}': {memory_of(table.kernel)} in the plan, which needs CUDA; this is a CPU"
                for name, table in self.tables.items()
                if table.kernel in OFF_DEVICE
            ]
        if found and self.is_binding:
            raise PlanError(
                f"{self.source} was made for another config or other workers:\n"
                + "\n".join(f"  {line}" for line in found)
                + "\nMake it anew with 'embedshard plan CONFIG --workers N --save PLAN', or train without --plan."
            )
        return not found

    def to_torchrec(self, model: nn.Module, device_type: str) -> ShardingPlan:
        """Returns the plan as TorchRec wants it for an unsharded model."""
        return ShardingPlan(
            {
                path: EmbeddingModuleShardingPlan(
                    {name: self._parameter(self.tables[name], device_type) for name in table_weights(module)}
                )
                for path, module in table_modules(model)
            }
        )

    def _parameter(self, table: RecordedTable, device_type: str) -> ParameterSharding:
        pieces = [
            ShardMetadata(
                shard_offsets=[shard.rows[0], shard.columns[0]],
                shard_sizes=[shard.num_rows, shard.num_columns],
                placement=placement(device_type, shard.rank, self.local_workers),
            )
            for shard in table.shards
        ]
        return ParameterSharding(
            sharding_type=table.sharding_type,
            compute_kernel=table.kernel,
            ranks=list(table.ranks),
            sharding_spec=None if table.is_replicated else EnumerableShardingSpec(pieces),
            cache_params=cache_params(table.kernel, table.cache_ratio),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what plan.json holds."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "depends_on": self._dependencies(),
            "tables": {
                name: {
                    "sharding_type": table.sharding_type,
                    "kernel": table.kernel,
                    **({} if table.cache_ratio is None else {"cache_ratio": table.cache_ratio}),
                    "shards": [
                        {"rank": shard.rank, "rows": list(shard.rows), "columns": list(shard.columns)}
                        for shard in table.shards
                    ],
                }
                for name, table in self.tables.items()
            },
        }

    def save(self, path: Path) -> None:
        """Writes it as a plan.json.

        Raises:
            PlanError: if it cannot be written there.
        """
        try:
            locate(str(path)).write_bytes_atomically((json.dumps(self.to_json(), indent=2) + "\n").encode())
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {path}: {error}. Give another --save.") from error

    @classmethod
    def from_json(cls, value: Any, source: str, *, is_binding: bool = True) -> RecordedPlan:
        """Returns the plan that plan.json holds.

        Raises:
            PlanError: if it is none, is of another version, or was changed by hand into one that leaves rows out.
        """
        if not isinstance(value, Mapping) or value.get("format") != _FORMAT:
            raise PlanError(
                f"{source} is not a plan of embedshard. Make one: embedshard plan CONFIG --workers N --save PLAN."
            )
        if value.get("version") != _VERSION:
            raise PlanError(
                f"{source} has version {value.get('version')} of the format, this embedshard reads {_VERSION}. Make it anew."
            )
        try:
            depends_on = value["depends_on"]
            plan = cls(
                workers=int(depends_on["workers"]),
                local_workers=int(depends_on["local_workers"]),
                depends_on=depends_on["tables"],
                tables={
                    name: RecordedTable(
                        sharding_type=str(table["sharding_type"]),
                        kernel=str(table["kernel"]),
                        shards=tuple(
                            RecordedShard(int(shard["rank"]), _span(shard["rows"]), _span(shard["columns"]))
                            for shard in table["shards"]
                        ),
                        cache_ratio=None if table.get("cache_ratio") is None else float(table["cache_ratio"]),
                    )
                    for name, table in value["tables"].items()
                },
                source=source,
                is_binding=is_binding,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{source} is damaged ({type(error).__name__}: {error}). Make it anew.") from error
        plan._check_whole(value.get("fingerprint"))
        return plan

    def _check_whole(self, fingerprint: Any) -> None:
        if fingerprint != self.fingerprint:
            raise PlanError(f"{self.source}: what it depends on was changed after it was saved. Make it anew.")
        for name, described in self.depends_on.items():
            table = self.tables.get(name)
            if table is None:
                raise PlanError(f"{self.source} says nothing of table '{name}'. Make it anew.")
            rows, columns = int(described["rows"]), int(described["dim"])
            area = sum(shard.num_rows * shard.num_columns for shard in table.shards)
            copies = self.workers if table.is_replicated else 1
            if table.kernel not in (("dense",) if table.is_replicated else ("fused", *OFF_DEVICE)):
                raise PlanError(
                    f"{self.source}: table '{name}' has kernel '{table.kernel}', under which its own optimizer would not "
                    f"train it. Make the plan anew."
                )
            if (table.cache_ratio is not None) != (table.kernel in CACHED) or not 0 < (table.cache_ratio or 0.5) < 1:
                raise PlanError(
                    f"{self.source}: table '{name}' has kernel '{table.kernel}' and cache_ratio {table.cache_ratio}: a "
                    f"share between 0 and 1 belongs to {' and '.join(CACHED)}, and to no other. Make the plan anew."
                )
            is_inside = all(
                0 <= shard.rows[0] < shard.rows[1] <= rows
                and 0 <= shard.columns[0] < shard.columns[1] <= columns
                and 0 <= shard.rank < self.workers
                for shard in table.shards
            )
            if not is_inside or area != copies * rows * columns:
                raise PlanError(
                    f"{self.source}: the shards of table '{name}' are not its {rows:,} rows x {columns} columns, each once, "
                    f"on ranks 0 to {self.workers - 1}. Make it anew."
                )


def describe_table(spec: TableSpec) -> dict[str, Any]:
    """Returns what of a table a plan depends on."""
    return {
        "rows": spec.num_embeddings,
        "dim": spec.dim,
        "dtype": spec.dtype,
        "optimizer": spec.optimizer.kind,
        "features": sorted({lookup.feature for lookup in spec.lookups}),
    }


def record_plan(plan: ShardingPlan, specs: Iterable[TableSpec], workers: int, local_workers: int) -> RecordedPlan:
    """Returns TorchRec's plan as data."""
    found = {
        name: _recorded(sharding) for module_plan in plan.plan.values() for name, sharding in cast(Any, module_plan).items()
    }
    described, tables = {}, {}
    for spec in specs:
        table = found[spec.name]
        if table.is_replicated:
            whole = ((0, spec.num_embeddings), (0, spec.dim))
            shards = tuple(RecordedShard(rank, *whole) for rank in range(workers))
            table = replace(table, shards=shards)
        described[spec.name], tables[spec.name] = describe_table(spec), table
    return RecordedPlan(workers, local_workers, described, tables)


def _recorded(sharding: ParameterSharding) -> RecordedTable:
    spec = sharding.sharding_spec
    shards = [] if spec is None else cast(EnumerableShardingSpec, spec).shards
    cache = sharding.cache_params if sharding.compute_kernel in CACHED else None
    return RecordedTable(
        sharding_type=sharding.sharding_type,
        kernel=sharding.compute_kernel,
        cache_ratio=None if cache is None else cache.load_factor,
        shards=tuple(
            RecordedShard(
                rank=rank,
                rows=(shard.shard_offsets[0], shard.shard_offsets[0] + shard.shard_sizes[0]),
                columns=(shard.shard_offsets[1], shard.shard_offsets[1] + shard.shard_sizes[1]),
            )
            for rank, shard in zip(sharding.ranks or [], shards, strict=False)
        ),
    )


def read_plan(path: Path) -> RecordedPlan:
    """Reads a plan.json.

    Raises:
        PlanError: if it is not there, or is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(
            f"{path}: there is no such file. Make a plan: embedshard plan CONFIG --workers N --save PLAN."
        ) from error
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}. Make the plan anew.") from error
    return RecordedPlan.from_json(value, str(path))


def _memory_against(spec: TableSpec, table: RecordedTable) -> list[str]:
    """Returns in what a table's memory is not what the config asks for."""
    allowed, where = kernels_allowed(spec), f"table '{spec.name}'"
    if table.kernel not in allowed:
        shown = ", ".join(memory_of(kernel) for kernel in allowed)
        return [f"{where}: memory {memory_of(table.kernel)} in the plan, the config allows {shown}"]
    if table.cache_ratio is not None and table.cache_ratio != spec.memory.ratio:
        return [f"{where}: cache_ratio {table.cache_ratio} in the plan, {spec.memory.ratio} in the config"]
    return []


def _span(value: Any) -> tuple[int, int]:
    first, last = value
    return int(first), int(last)


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
