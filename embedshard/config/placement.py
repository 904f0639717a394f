"""What each sharding type asks of a table, and what it leaves of its optimizer.

TorchRec cuts a table in seven ways. A fused optimizer that keeps one statistic per row keeps one per row *and block of
columns* where columns are cut, which trains other weights. A data-parallel table is trained by a dense optimizer: the
same for SGD and both Adagrads, which leave a row without a gradient alone.
"""

from __future__ import annotations

__all__ = [
    "ALL_TYPES",
    "COLUMN_TYPES",
    "DEFAULT_TYPES",
    "SEQUENCE_TYPES",
    "changed_optimizer",
    "check_table_sharding",
    "impossible",
    "sharding_of_bias",
]

from typing import get_args

from embedshard.config.parts import ManagedVocabulary, ShardingType, TableConfig, TableShardingConfig

ALL_TYPES: tuple[ShardingType, ...] = get_args(ShardingType)
COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")
DEFAULT_TYPES: tuple[ShardingType, ...] = ("table_wise", "row_wise", "table_row_wise")
"""What the planner may choose where a table names nothing: every optimizer and dtype is the same under them."""
SEQUENCE_TYPES: tuple[ShardingType, ...] = ("table_wise", "column_wise", "row_wise")
"""What works for tables that are looked up place by place."""

_VECTOR = 4
"""Columns that FBGEMM handles at once: blocks of columns are multiples of it."""
_UNCUT: dict[ShardingType, ShardingType] = {
    "column_wise": "table_wise",
    "table_column_wise": "table_wise",
    "grid_shard": "table_row_wise",
}


def changed_optimizer(sharding_type: str, optimizer: str) -> str | None:
    """Returns what a sharding type makes of an optimizer, if that is another one."""
    if sharding_type in COLUMN_TYPES and optimizer == "rowwise_adagrad":
        return (
            f"{sharding_type} keeps one statistic of row-wise Adagrad per row and block of columns, instead of one per row"
        )
    return None


def impossible(sharding_type: str, optimizer: str, dtype: str, is_sequence: bool, is_managed: bool) -> str | None:
    """Returns why a table cannot be trained under a sharding type at all, if so."""
    if is_sequence and sharding_type not in SEQUENCE_TYPES:
        if sharding_type == "data_parallel":
            return "FBGEMM's kernel of data_parallel tables pools on a CPU, and a sequence wants a vector a place"
        return f"TorchRec has no {sharding_type} for tables that a sequence looks up"
    if sharding_type != "data_parallel":
        return None
    if optimizer == "adam":
        return "data_parallel trains a table by a dense Adam, which moves every row at each step, also those not looked up"
    if dtype != "fp32":
        return f"data_parallel trains a table by a dense optimizer, which would compute and keep its state in {dtype}"
    if is_managed:
        return "rows of a managed vocabulary change hands, which the dense optimizer of data_parallel does not follow"
    return None


def check_table_sharding(name: str, table: TableConfig, optimizer: str, planner: str, is_sequence: bool) -> None:
    """Checks a table's `sharding` by itself: what it depends on the world for is checked when a plan is made.

    Raises:
        ValueError: saying what is wrong and what to do.
    """
    sharding, where = table.sharding, f"tables.{name}.sharding"
    if planner == "explicit" and sharding.type is None:
        raise ValueError(f"{where}.type is missing: sharding.planner is 'explicit'. Choose one of {', '.join(ALL_TYPES)}")
    if planner == "explicit" and sharding.types:
        raise ValueError(f"{where}.types is for sharding.planner 'auto', and it is 'explicit'. Leave it out")
    if planner == "auto" and (sharding.type is not None or sharding.ranks):
        met = "type" if sharding.type is not None else "ranks"
        raise ValueError(
            f"{where}.{met} is for sharding.planner 'explicit', and it is 'auto'. Set sharding.planner to 'explicit', or "
            f"give '{where}.types', what the planner may choose"
        )
    for kind in sharding.asked:
        if why := impossible(kind, optimizer, table.dtype, is_sequence, isinstance(table.vocabulary, ManagedVocabulary)):
            raise ValueError(f"{where}: {why}. Choose another type, such as row_wise")
        why = changed_optimizer(kind, optimizer)
        if why and not sharding.allow_changed_optimizer:
            raise ValueError(
                f"{where}: {why}: that trains other weights than in one process. Choose among {', '.join(DEFAULT_TYPES)}, "
                f"or the optimizer 'adagrad' or 'sgd'; or ask for it by name with {where}.allow_changed_optimizer: true"
            )
    _check_ranks(where, sharding, table.dim)


def sharding_of_bias(sharding: TableShardingConfig) -> TableShardingConfig:
    """Returns how the bias beside a table is cut: as the table, but its four columns are never."""
    types = list(dict.fromkeys(_UNCUT.get(kind, kind) for kind in sharding.types))
    kind = sharding.type and _UNCUT.get(sharding.type, sharding.type)
    ranks = sharding.ranks if kind == sharding.type else sharding.ranks[:1] if kind == "table_wise" else []
    return TableShardingConfig(types=types, type=kind, ranks=ranks)


def _check_ranks(where: str, sharding: TableShardingConfig, dim: int) -> None:
    ranks, kind = sharding.ranks, sharding.type
    if not ranks:
        return
    shown = ", ".join(map(str, ranks))
    if min(ranks) < 0:
        raise ValueError(f"{where}.ranks: [{shown}] holds {min(ranks)}. Ranks are counted from 0")
    if kind in ("row_wise", "data_parallel"):
        raise ValueError(f"{where}.ranks: a {kind} table lies on all ranks. Leave 'ranks' out")
    if kind == "table_wise" and len(ranks) > 1:
        raise ValueError(f"{where}.ranks: a table_wise table lies on one rank, given are {len(ranks)}: [{shown}]")
    if kind in ("table_row_wise", "grid_shard") and len(set(ranks)) < len(ranks):
        raise ValueError(f"{where}.ranks: [{shown}] names a rank twice, and a {kind} table has one piece on each")
    if kind in ("column_wise", "table_column_wise") and dim % (_VECTOR * len(ranks)):
        most = max(
            blocks for blocks in range(1, dim // _VECTOR + 1) if dim % (_VECTOR * blocks) == 0 and blocks <= len(ranks)
        )
        raise ValueError(
            f"{where}.ranks: {dim} columns do not divide into {len(ranks)} equal blocks of a multiple of {_VECTOR}. "
            f"Give {most} rank{'s' if most > 1 else ''}"
        )
