"""Explicit plans: on which ranks each table's pieces lie, decided by pure functions of sizes and the world.

What the config leaves open is chosen by size: the largest tables first, each where least lies so far. A table with too few
rows to give each rank some of them is not cut by rows: FBGEMM 1.8 on CPU reads beyond its memory where a piece is empty.
"""

from __future__ import annotations

__all__ = ["Placement", "leaves_empty_pieces", "place_tables"]

from collections.abc import Sequence
from dataclasses import dataclass

from embedshard.config import TableSpec
from embedshard.errors import PlanError

_VECTOR = 4


@dataclass(frozen=True)
class Placement:
    """How a table is cut and where.

    Attributes:
        sharding_type: TorchRec's word.
        ranks: of each piece, in TorchRec's order of pieces.
        num_blocks: into how many blocks columns are cut; 1 if they are not.
    """

    sharding_type: str
    ranks: tuple[int, ...]
    num_blocks: int = 1


def place_tables(specs: Sequence[TableSpec], world_size: int, local_world_size: int) -> dict[str, Placement]:
    """Returns each table's place, by name.

    In a world of one each table lies whole on rank 0, whatever its type.

    Args:
        specs: the tables, each with a `sharding.type`.
        world_size: ranks.
        local_world_size: ranks of one machine.

    Raises:
        PlanError: if a table's ranks are not there, or not those that its type needs.
    """
    if world_size == 1:
        return {spec.name: Placement("table_wise", (0,)) for spec in specs}
    ground = _Ground(world_size, local_world_size)
    largest_first = sorted(specs, key=lambda spec: (-spec.weight_bytes - spec.state_bytes, spec.name))
    # Those with a given place first: the others fill what is left.
    places = {spec.name: ground.place(spec) for spec in sorted(largest_first, key=lambda spec: not spec.sharding.ranks)}
    return {spec.name: places[spec.name] for spec in specs}


def leaves_empty_pieces(num_rows: int, num_pieces: int) -> bool:
    """Returns whether cutting rows leaves a piece empty: each gets the same number, rounded up, while there are any."""
    return -(-num_rows // -(-num_rows // num_pieces)) < num_pieces


class _Ground:
    """The ranks, the machines that they are on, and the bytes that lie there so far."""

    def __init__(self, world_size: int, local_world_size: int) -> None:
        self._bytes = [0] * world_size
        # As TorchRec does where the world is not made of whole machines.
        self._local = local_world_size if world_size % local_world_size == 0 else world_size
        self._nodes = [tuple(range(first, first + self._local)) for first in range(0, world_size, self._local)]

    def place(self, spec: TableSpec) -> Placement:
        placement = self._given(spec) if spec.sharding.ranks else self._chosen(spec)
        cuts_rows = placement.sharding_type in ("row_wise", "table_row_wise", "grid_shard")
        if cuts_rows and leaves_empty_pieces(spec.num_embeddings, len(placement.ranks) // placement.num_blocks):
            placement = Placement("table_wise", self._emptiest(placement.ranks, 1))
        share = (spec.weight_bytes + spec.state_bytes) // len(placement.ranks)
        for rank in placement.ranks:
            self._bytes[rank] += share
        return placement

    def _chosen(self, spec: TableSpec) -> Placement:
        kind, everyone = spec.sharding.type, tuple(range(len(self._bytes)))
        assert kind is not None, "the config checks that an explicit plan has a type for each table"
        match kind:
            case "table_wise":
                return Placement(kind, self._emptiest(everyone, 1))
            case "column_wise":
                blocks = _most_blocks(spec.dim, len(everyone))
                return Placement(kind, self._emptiest(everyone, blocks), blocks)
            case "table_column_wise":
                blocks = _most_blocks(spec.dim, self._local)
                return Placement(kind, self._emptiest(self._emptiest_nodes(1)[0], blocks), blocks)
            case "table_row_wise":
                return Placement(kind, self._emptiest_nodes(1)[0])
            case "grid_shard":
                blocks = _most_blocks(spec.dim, len(self._nodes))
                return Placement(kind, sum(self._emptiest_nodes(blocks), ()), blocks)
            case "row_wise" | "data_parallel":
                return Placement(kind, everyone)

    def _given(self, spec: TableSpec) -> Placement:
        kind, ranks = spec.sharding.type, tuple(spec.sharding.ranks)
        assert kind is not None, "the config checks that ranks come with a type"
        if max(ranks) >= len(self._bytes):
            raise PlanError(
                f"tables.{spec.name}.sharding.ranks names rank {max(ranks)}, and this run has {len(self._bytes)} workers: "
                f"ranks 0 to {len(self._bytes) - 1}. Start more workers, or leave 'ranks' out."
            )
        nodes = self._nodes_of(ranks)
        shown = ", ".join(map(str, ranks))
        if kind == "table_column_wise" and not any(set(ranks) <= set(node) for node in self._nodes):
            raise PlanError(
                f"tables.{spec.name}.sharding.ranks: [{shown}] are on several machines of {self._local} workers each, and a "
                f"table_column_wise table lies on one. Choose ranks of one machine, or column_wise."
            )
        if kind in ("table_row_wise", "grid_shard") and (nodes is None or (kind == "table_row_wise" and len(nodes) > 1)):
            wanted = "one machine" if kind == "table_row_wise" else "each of its machines"
            raise PlanError(
                f"tables.{spec.name}.sharding.ranks: [{shown}] must be all ranks of {wanted} for a {kind} table, machine by "
                f"machine. Here they are {', '.join(str(list(node)) for node in self._nodes)}."
            )
        if kind == "grid_shard":
            assert nodes is not None, "checked above"
            if spec.dim % (_VECTOR * len(nodes)):
                raise PlanError(
                    f"tables.{spec.name}.sharding.ranks: {spec.dim} columns do not divide into {len(nodes)} equal blocks, "
                    f"one for each machine, of a multiple of {_VECTOR}. Name the ranks of fewer machines."
                )
            return Placement(kind, ranks, len(nodes))
        return Placement(kind, ranks, len(ranks) if kind in ("column_wise", "table_column_wise") else 1)

    def _nodes_of(self, ranks: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """Returns the machines whose ranks these are, one after the other; None if they are not whole."""
        parts = [ranks[first : first + self._local] for first in range(0, len(ranks), self._local)]
        return parts if all(part in self._nodes for part in parts) else None

    def _emptiest(self, ranks: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(sorted(sorted(ranks, key=lambda rank: (self._bytes[rank], rank))[:count]))

    def _emptiest_nodes(self, count: int) -> list[tuple[int, ...]]:
        return sorted(sorted(self._nodes, key=lambda node: (sum(self._bytes[rank] for rank in node), node))[:count])


def _most_blocks(dim: int, most: int) -> int:
    """Returns into how many equal blocks of whole vectors columns can be cut, at most so many."""
    return max(blocks for blocks in range(1, most + 1) if dim % (_VECTOR * blocks) == 0)
