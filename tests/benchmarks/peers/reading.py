"""Reads an epoch of files in one way and prints its rows a second. Started by run.py, a fresh process each time.

python reading.py FOLDER ids|lists pyarrow|embedshard|ray|dataloader SETTING BATCH
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if sys.argv[3:4] == ["embedshard"]:  # what its command line does first
    from embedshard.world import set_process_environment

    set_process_environment()
elif sys.argv[3:4] == ["pyarrow"] and sys.argv[4] in ("jemalloc", "system"):
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = sys.argv[4]

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from data import DENSE, IDS, criteo_tree

CACHE_SHARE = 4
COLUMNS = [*IDS, *DENSE, "label"]


def decoded_bytes(folder: Path) -> int:
    """Returns what the files take in memory, by their footers."""
    total = 0
    for path in sorted(folder.glob("*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        total += sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return total


def by_pyarrow(folder: Path, is_list: bool, setting: str, batch: int) -> int:
    """Decodes all row groups, one after the other, and does nothing with them."""
    rows = 0
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            rows += file.read_row_group(group, columns=COLUMNS, use_threads=False).num_rows
    return rows


def by_embedshard(folder: Path, is_list: bool, setting: str, batch: int) -> int:
    """Has the run's reader make its batches, which hold KeyedJaggedTensors; the setting is how many threads decode."""
    from embedshard.config.load import load_config
    from embedshard.train.assembly import assemble
    from embedshard.world import open_world

    config_file = folder / "reading.json"
    tree = criteo_tree(folder, is_list, batch, 4, lanes=64, cache_bytes=decoded_bytes(folder) // CACHE_SHARE)
    tree["data"]["threads"] = int(setting) if setting.isdigit() else 1
    config_file.write_text(json.dumps(tree))
    with open_world("cpu") as world:
        parts = assemble(load_config(str(config_file), os.environ, []).config, world)
        assert not any(parts.dataset.cached), "the data are to be larger than the cache"
        reader = parts.reader()
        started()
        rows = 0
        with reader.batches(0, parts.num_steps) as batches:
            for one in batches:
                rows += one.size
    return rows


def by_ray(folder: Path, is_list: bool, setting: str, batch: int) -> int:
    """Ray Data's own batches of tensors, shuffled within a buffer."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(str(folder), columns=COLUMNS)
    options = {"local_shuffle_buffer_size": {"batch": 2 * batch, "group": 65_536, "large": 262_144}[setting]}
    started()
    rows = 0
    if is_list:  # lists of unlike lengths are no tensors: the nearest that Ray Data hands out
        for one in dataset.iter_batches(batch_size=batch, batch_format="pyarrow", **options):
            rows += len(one)
            jagged(one)
    else:
        for one in dataset.iter_torch_batches(batch_size=batch, **options):
            rows += len(one["label"])
    ray.shutdown()
    return rows


def by_dataloader(folder: Path, is_list: bool, setting: str, batch: int) -> int:
    """A DataLoader over pyarrow: row by row with a collate function, or in batches that the dataset makes itself."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class Rows(IterableDataset):
        def __iter__(self):
            for table in tables(folder):
                yield from (row for part in table.to_batches(batch) for row in part.to_pylist())

    class Batches(IterableDataset):
        def __iter__(self):
            for table in tables(folder):
                order = np.random.default_rng(0).permutation(len(table))
                for begin in range(0, len(table), batch):
                    yield jagged(table.take(order[begin : begin + batch]))

    def collate(rows):
        found = {name: torch.tensor([row[name] for row in rows]) for name in (*DENSE, "label")}
        for name in IDS:
            if is_list:
                found[name] = torch.tensor([number for row in rows for number in row[name]])
                found[f"{name}.lengths"] = torch.tensor([len(row[name]) for row in rows])
            else:
                found[name] = torch.tensor([row[name] for row in rows])
        return found

    if setting == "rows":
        loader = DataLoader(Rows(), batch_size=batch, collate_fn=collate)
    else:
        loader = DataLoader(Batches(), batch_size=None, num_workers=1 if setting == "worker" else 0)
    started()
    rows, limit = 0, 131_072 if setting == "rows" else None
    for one in loader:
        rows += len(one["label"])
        if limit and rows >= limit:
            break
    return rows


def tables(folder: Path):
    """Yields row groups."""
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            yield file.read_row_group(group, columns=COLUMNS, use_threads=False)


def jagged(table: pa.Table) -> dict:
    """Returns the columns as tensors, lists as values and lengths."""
    import torch

    found = {}
    for name in COLUMNS:
        column = table[name].combine_chunks() if isinstance(table[name], pa.ChunkedArray) else table[name]
        if pa.types.is_list(column.type):
            found[name] = torch.from_numpy(column.flatten().to_numpy())
            found[f"{name}.lengths"] = torch.from_numpy(np.diff(column.offsets.to_numpy()))
        else:
            found[name] = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
    return found


def started() -> None:
    """Says that what is measured begins: what came before was making ready."""
    global begin
    begin = time.perf_counter()


begin = time.perf_counter()
READERS = {"pyarrow": by_pyarrow, "embedshard": by_embedshard, "ray": by_ray, "dataloader": by_dataloader}

if __name__ == "__main__":
    folder, kind, reader, setting, batch = sys.argv[1:]
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    count = READERS[reader](Path(folder), kind == "lists", setting, int(batch))
    print(json.dumps({"rows_per_second": count / (time.perf_counter() - begin), "rows": count}))
