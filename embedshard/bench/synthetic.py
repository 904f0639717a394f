"""Data and a config of their own, where none are given: Criteo's shape, and two towers over it.

26 columns of ids, whose popularity falls by Zipf's law, 13 numbers and a label, zstd, row groups of 65,536. No model could
learn anything of them: they are for measuring speed.
"""

from __future__ import annotations

__all__ = ["ROWS", "synthetic_config", "write_criteo_shape"]

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

ROWS: Final = 262_144
_HELD_OUT: Final = 4_096
_ROW_GROUP: Final = 65_536
_TABLES: Final = 26
_DENSE: Final = 13
_USERS, _ITEMS = 400_000, 50_000
_SIZES: Final = (_USERS, *(200_000,) * 3, *(50_000,) * 5, *(10_000,) * 6, *(1_000,) * 6, *(100,) * 4, _ITEMS)
"""Ids of each column; the first is the user, the last the item."""
_EXPONENT: Final = 1.05


def write_criteo_shape(folder: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Writes train.parquet and test.parquet."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    for name, count in (("train", rows), ("test", min(rows, _HELD_OUT))):
        schema, writer = None, None
        for begin in range(0, count, _ROW_GROUP):
            table = _rows(generator, min(_ROW_GROUP, count - begin))
            if writer is None:
                schema = table.schema
                writer = pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd")
            writer.write_table(table, row_group_size=_ROW_GROUP)
        assert writer is not None, "there is at least a row"
        writer.close()


def _rows(generator: np.random.Generator, count: int) -> pa.Table:
    columns: dict[str, Any] = {f"c{number + 1}": _ids(generator, size, count) for number, size in enumerate(_SIZES)}
    columns |= {f"i{number + 1}": generator.exponential(100.0, count).astype(np.float32) for number in range(_DENSE)}
    columns["label"] = (generator.random(count) < 0.25).astype(np.int8)
    return pa.table(columns)


def _ids(generator: np.random.Generator, size: int, count: int) -> npt.NDArray[np.int32]:
    """Draws ids by Zipf's law, its continuous form inverted; which id is popular is shuffled by a multiplication."""
    power = 1.0 - _EXPONENT
    drawn = (1.0 + generator.random(count) * ((size + 1.0) ** power - 1.0)) ** (1.0 / power)
    ranks = np.minimum(drawn.astype(np.int64) - 1, size - 1)
    return (ranks * 2_654_435_761 % size).astype(np.int32)


def synthetic_config(folder: Path, batch_size: int = 8_192) -> dict[str, Any]:
    """Returns the tree of a config over what `write_criteo_shape` wrote."""
    ids = [f"c{number + 1}" for number in range(_TABLES)]
    dense = [f"i{number + 1}" for number in range(_DENSE)]
    item = ids[-1]
    return {
        "name": "bench",
        "data": {
            "train": str(folder / "train.parquet"),
            "test": str(folder / "test.parquet"),
            "label": "label",
        },
        "features": {name: {"kind": "id", "table": name} for name in ids}
        | {name: {"kind": "dense", "normalise": "log1p"} for name in dense},
        "tables": {
            name: {
                "rows": size,
                "dim": 64 if name == item else 16,
                "sharding": {"type": "row_wise" if size >= _ITEMS else "table_wise"},
            }
            for name, size in zip(ids, _SIZES, strict=True)
        },
        "model": {
            "kind": "two_tower",
            "user": {"features": [*ids[:-1], *dense], "mlp": [128, 64]},
            "item": {"features": [item]},
        },
        "objective": {"kind": "bce"},
        "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}},
        "sharding": {"planner": "explicit"},
        "train": {"global_batch_size": batch_size},
        "evaluate": {"metrics": ["recall@20"], "baselines": []},
        "tracking": {"tensorboard": False},
    }
