"""What a plan takes of each rank: bytes of memory, and bytes that travel each step. Pure functions of sizes.

Weights and optimizer state are exact. Activations and buffers are the large ones: the looked-up vectors and their gradients,
the outputs of linear layers, the ids on their way and the lookups' outputs before they are sent. What remains (kernels'
workspaces, the allocator's gaps, what NCCL keeps) is for the reserve.
"""

from __future__ import annotations

__all__ = ["DenseCost", "Footprint", "RankMemory", "TableSkew", "Traffic", "footprint_of"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedshard.config import TableSpec
from embedshard.sharding.demand import Demand
from embedshard.sharding.hardware import Cluster
from embedshard.sharding.memory import Lying, lying
from embedshard.sharding.recorded import RecordedPlan, RecordedTable

Floats = npt.NDArray[np.float64]

_FLOAT = 4
_LENGTH = 8  # of a row under a key, int64
_MANAGED_ROW = 72  # who holds a row: its id, counts, the index over ids, and the sketch of those without a row
_BY_ROWS = ("row_wise", "table_row_wise", "grid_shard")


@dataclass(frozen=True)
class DenseCost:
    """What a rank holds and computes beside the tables.

    Attributes:
        weight_bytes: parameters; gradients are as many, and lie in DDP's buckets where there are several workers.
        state_bytes: the dense optimizer's, and the objective's estimates.
        numbers_per_row: outputs of layers for one row of the batch.
        numbers_gathered: vectors that are gathered from all ranks.
        process_bytes: of the process and the decoded data, where they share the memory: on a cpu machine.
    """

    weight_bytes: int
    state_bytes: int
    numbers_per_row: int
    numbers_gathered: int
    process_bytes: int


@dataclass(frozen=True)
class RankMemory:
    """A rank's memory in bytes.

    Attributes:
        weights: of its shards.
        state: of the optimizers of its shards.
        activations: looked-up vectors and layers' outputs, with their gradients.
        communication: ids on their way, and lookups' outputs before they are sent.
        dense: replicated parameters, their gradients and optimizer state; gradients of replicated tables.
        process: program and decoded data, and who holds which row of managed tables, on a cpu machine.
        host: of tables in the memory of a GPU's host; beside the rest, not part of `total`.
        ssd: of tables on an SSD; the same.
    """

    weights: int
    state: int
    activations: int
    communication: int
    dense: int
    process: int
    host: int = 0
    ssd: int = 0

    @property
    def total(self) -> int:
        """All of it that is in the memory of the rank's device."""
        return self.weights + self.state + self.activations + self.communication + self.dense + self.process


@dataclass(frozen=True)
class Traffic:
    """What the busiest rank sends in a step, in bytes; its own part stays where it is.

    Attributes:
        ids: on their way to the rows.
        vectors: of looked-up vectors forward and of their gradients backward.
        gradients: of dense parameters and replicated tables, in an all-reduce.
        between: how much of it all goes to other machines.
        milliseconds: at the hardware's bandwidths, if nothing overlaps.
    """

    ids: float
    vectors: float
    gradients: float
    between: float
    milliseconds: float


@dataclass(frozen=True)
class TableSkew:
    """How evenly a table's lookups fall on the ranks that have shards of it.

    Attributes:
        lookups: of each rank that has a shard, in a step.
        max_to_mean: 1 where they are even.
    """

    lookups: Mapping[int, float]
    max_to_mean: float


@dataclass(frozen=True)
class Footprint:
    """What a plan takes.

    Attributes:
        ranks: memory of each.
        traffic: of the busiest.
        lookups: ids that each rank looks up in a step.
        skew: of each table, by name.
        lying: where each table lies, all its shards together, by name.
    """

    ranks: tuple[RankMemory, ...]
    traffic: Traffic
    lookups: tuple[float, ...]
    skew: Mapping[str, TableSkew]
    lying: Mapping[str, Lying]


def footprint_of(
    plan: RecordedPlan,
    specs: Sequence[TableSpec],
    demands: Mapping[str, Demand],
    cluster: Cluster,
    dense: DenseCost,
    global_batch_size: int,
    communication: str,
) -> Footprint:
    """Returns what a plan takes.

    Args:
        plan: which shards lie where.
        specs: the tables.
        demands: what a row asks of each.
        cluster: the workers.
        dense: what there is beside the tables.
        global_batch_size: rows of a step.
        communication: `fp32`, or what vectors are rounded to on their way.
    """
    ledger = _Ledger(cluster, global_batch_size, _FLOAT if communication == "fp32" else 2)
    for spec in specs:
        ledger.add(spec, plan.tables[spec.name], demands[spec.name])
    return ledger.footprint(dense)


class _Ledger:
    """Sums over tables, by rank."""

    def __init__(self, cluster: Cluster, batch: int, wire: int) -> None:
        world = cluster.world_size
        self._cluster, self._batch, self._local_batch, self._wire = cluster, batch, batch // world, wire
        self._weights, self._state, self._buffers, self._replicated = (np.zeros(world) for _ in range(4))
        self._host, self._ssd, self._received = np.zeros(world), np.zeros(world), np.zeros(world)
        self._ids_in, self._ids_out = np.zeros((world, 2)), np.zeros((world, 2))  # from and to: own machine, others
        self._vectors_out, self._vectors_in = np.zeros((world, 2)), np.zeros((world, 2))
        self._lookups = np.zeros(world)
        self._pooled = self._batch_ids = 0.0
        self._managed_rows = 0
        self._skew: dict[str, TableSkew] = {}
        self._lying: dict[str, Lying] = {}

    def add(self, spec: TableSpec, table: RecordedTable, demand: Demand) -> None:
        if spec.managed_by == spec.name:
            self._managed_rows += -(-spec.rows // self._cluster.world_size)
        self._pooled += self._local_batch * demand.vectors * spec.dim * _FLOAT
        self._batch_ids += self._local_batch * (demand.ids * demand.id_bytes + demand.keys * _LENGTH)
        shares = self._shares(table, demand)
        lookups: dict[int, float] = {}
        for shard, share in zip(table.shards, shares, strict=True):
            piece = lying(spec, table.kernel, table.cache_ratio, shard.num_rows, shard.num_columns)
            self._weights[shard.rank] += piece.device_weights
            self._state[shard.rank] += piece.device_state
            self._host[shard.rank] += piece.host
            self._ssd[shard.rank] += piece.ssd
            self._lying[spec.name] = self._lying.get(spec.name, Lying(0, 0)) + piece
            ids = self._batch * demand.ids * share
            lookups[shard.rank] = lookups.get(shard.rank, 0.0) + ids
            self._lookups[shard.rank] += ids
            if table.is_replicated:
                self._replicated[shard.rank] += shard.num_rows * shard.num_columns * _FLOAT
            else:
                self._move_ids(shard.rank, ids * demand.id_bytes + self._batch * demand.keys * _LENGTH)
                vectors = demand.vectors if demand.is_pooled else demand.vectors * share
                self._move_vectors(table, shard.rank, vectors * shard.num_columns)
        mean = sum(lookups.values()) / len(lookups)
        self._skew[spec.name] = TableSkew(lookups, max(lookups.values()) / mean if mean else 1.0)

    def _shares(self, table: RecordedTable, demand: Demand) -> Sequence[float]:
        if table.is_replicated:  # each rank looks its own rows up
            return [1 / self._cluster.world_size] * len(table.shards)
        if table.sharding_type not in _BY_ROWS:
            return [1.0] * len(table.shards)
        return [float(demand.shares(shard.rows)[0]) for shard in table.shards]

    def _move_ids(self, owner: int, size: float) -> None:
        """Moves ids and lengths from all ranks, evenly, to one."""
        each, peers = size / self._cluster.world_size, self._peers(owner)
        self._ids_in[owner] += each * peers.sum(axis=0)
        self._ids_out += each * peers
        self._received[owner] += size

    def _move_vectors(self, table: RecordedTable, owner: int, numbers: float) -> None:
        """Moves what a rank has looked up, whole or a part of a sum, to those whose rows they are."""
        self._buffers[owner] += self._batch * numbers * (_FLOAT + (self._wire if self._wire < _FLOAT else 0))
        each, peers = self._local_batch * numbers * self._wire, self._peers(owner)
        if table.sharding_type in ("table_row_wise", "grid_shard"):
            # Summed within the machine first: each of its ranks gets the rows of its counterparts on all machines.
            local, machines = self._cluster.local_world_size, self._cluster.num_machines
            within = each * machines * peers[:, :1] * [[1, 0]]
            self._vectors_out[owner] += [each * machines * (local - 1), each * (machines - 1)]
            counterpart = (np.arange(len(peers)) % local == owner % local)[:, None]
            self._vectors_in += within + each * peers * counterpart * [[0, 1]]
            return
        self._vectors_out[owner] += each * peers.sum(axis=0)
        self._vectors_in += each * peers

    def _peers(self, rank: int) -> Floats:
        """Returns, for each rank, whether it is another one of the same machine, and whether it is on another machine."""
        ranks, local = np.arange(self._cluster.world_size), self._cluster.local_world_size
        is_near = ranks // local == rank // local
        return np.stack([is_near & (ranks != rank), ~is_near], axis=1).astype(np.float64)

    def footprint(self, dense: DenseCost) -> Footprint:
        # The batch itself, and its ids as they are sent.
        ids = self._received + self._batch_ids + self._ids_out.sum(axis=1)
        # Those of the next batch are there, too, where they travel a step early (`ahead.py`).
        buffers = self._buffers + (2 if self._cluster.world_size > 1 and not self._managed_rows else 1) * ids
        layers = (self._local_batch * dense.numbers_per_row + dense.numbers_gathered) * _FLOAT
        ranks = [
            RankMemory(
                weights=round(float(self._weights[rank])),
                state=round(float(self._state[rank])),
                activations=round(2 * (self._pooled + layers)),
                communication=round(float(buffers[rank])),
                dense=2 * dense.weight_bytes + dense.state_bytes + round(float(self._replicated[rank])),
                process=dense.process_bytes + (self._managed_rows * _MANAGED_ROW if dense.process_bytes else 0),
                host=round(float(self._host[rank])),
                ssd=round(float(self._ssd[rank])),
            )
            for rank in range(self._cluster.world_size)
        ]
        return Footprint(tuple(ranks), self._traffic(dense), tuple(self._lookups.tolist()), self._skew, self._lying)

    def _traffic(self, dense: DenseCost) -> Traffic:
        world, machine = self._cluster.world_size, self._cluster.machine
        reduced = 2 * (world - 1) / world * (dense.weight_bytes + float(self._replicated.max()))
        vectors = self._vectors_out + self._vectors_in  # forward, and their gradients backward
        busiest = int(np.argmax((self._ids_out + vectors).sum(axis=1)))
        speed = np.array([machine.within_machine, machine.between_machines]) * 1e9
        phases = [np.maximum(self._ids_out, self._ids_in), *2 * [np.maximum(self._vectors_out, self._vectors_in)]]
        seconds = sum(float((phase / speed).max()) for phase in phases)
        seconds += reduced / float(speed[1 if self._cluster.num_machines > 1 else 0])
        is_spread = self._cluster.num_machines > 1
        return Traffic(
            ids=float(self._ids_out[busiest].sum()),
            vectors=float(vectors[busiest].sum()),
            gradients=reduced,
            between=float(self._ids_out[busiest, 1] + vectors[busiest, 1]) + (reduced if is_spread else 0.0),
            milliseconds=1e3 * seconds,
        )
