"""A vocabulary of many strings: how fast they are mapped to rows, and what 1, 2 and 4 processes of a machine hold of it.

The former way looked strings up with `pyarrow.compute.index_in`, which makes a hash table of the whole vocabulary in each
call, in each process. The present one maps sorted hashes that all processes of a machine share (data/mapped_ids.py).

    python tests/benchmarks/vocabulary_lookup.py --strings 5000000
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.data.vocabulary_file import load_id_file
from embedshard.storage import locate

BATCH = 65_536


def strings(numbers):
    """Strings of 20 bytes, as of an id behind a name."""
    words = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    content = np.empty((len(words), 20), np.uint8)
    content[:, :4] = np.frombuffer(b"user", np.uint8)
    for place in range(16):
        content[:, 4 + place] = digits[(words >> np.uint64(60 - 4 * place)) & np.uint64(15)]
    offsets = np.arange(0, 20 * (len(words) + 1), 20, dtype=np.int32)
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(offsets), pa.py_buffer(content.tobytes()))


class Former:
    """What `_File` did until 2026-11-25."""

    def __init__(self, path):
        self._strings = pq.read_table(path)["id"].combine_chunks().cast(pa.large_string())

    def map_strings(self, ids):
        found = pc.index_in(ids.cast(pa.large_string()), value_set=self._strings)
        return found.fill_null(-1).cast(pa.int64()).to_numpy(zero_copy_only=False)


def opened(way, path):
    return Former(path) if way == "former" else load_id_file("t", locate(path), str(path), None)


def memory(fields=("Rss", "Pss")):
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return [int(lines[field].split()[0]) / 1024 for field in fields]


def worker(way, path, folder, total, ready, go, out):
    tempfile.tempdir = folder
    ids = strings(np.random.default_rng(1).integers(0, total, 16 * BATCH))
    before = memory()
    vocabulary = opened(way, path)
    peak = memory()
    for first in range(0, len(ids), BATCH):
        vocabulary.map_strings(ids.slice(first, BATCH))
        peak = max(peak, memory())
    ready.wait()  # all hold it
    out.put((before, memory(), peak))
    go.wait()


def measure_memory(way, path, folder, total, processes):
    context = multiprocessing.get_context("spawn")
    ready, go, out = context.Barrier(processes), context.Event(), context.Queue()
    started = [context.Process(target=worker, args=(way, path, folder, total, ready, go, out)) for _ in range(processes)]
    for process in started:
        process.start()
    found = [out.get() for _ in started]
    go.set()
    for process in started:
        process.join()
    before, after, peak = (np.array([each[i] for each in found]) for i in range(3))
    return before[:, 1].sum(), after[:, 0].mean(), after[:, 1].sum(), peak[:, 0].mean()


def timed(work):
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--strings", type=int, default=5_000_000)
    total = parser.parse_args().strings
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.parquet"
        pq.write_table(pa.table({"id": strings(np.arange(total))}), path, row_group_size=2**20)
        tempfile.tempdir = folder
        seconds, present = timed(lambda: opened("present", path))
        print(f"{total:,} strings of 20 bytes; laid out in {seconds:.1f} s")
        ways = {"former": opened("former", path), "present": present}
        print(f"opened again in {timed(lambda: opened('present', path))[0]:.2f} s")
        numbers = np.random.default_rng(0).permutation(total)
        ids = strings(numbers)
        zipf = strings(np.random.default_rng(0).zipf(1.2, total) % total)
        for name, asked in (("each string once, in any order", ids), ("Zipf 1.2", zipf)):
            for size in (len(asked), 2**20, BATCH):
                batches = [asked.slice(first, size) for first in range(0, len(asked), size)][:8]
                count = sum(map(len, batches))
                found, times = {}, {}
                for way, vocabulary in ways.items():
                    work = lambda vocabulary=vocabulary, batches=batches: [vocabulary.map_strings(b) for b in batches]  # noqa: E731
                    times[way], found[way] = timed(work)
                assert all(map(np.array_equal, found["former"], found["present"]))
                shown = ", ".join(f"{way} {count / times[way] / 1e6:.2f}" for way in ways)
                print(f"{name}, {size:,} at once: {shown} million strings/s")
        for way in ways:
            for processes in (1, 2, 4):
                before, rss, pss, peak = measure_memory(way, path, folder, total, processes)
                print(
                    f"{way}, {processes} processes: PSS of all {pss:,.0f} MiB ({before:,.0f} before), RSS of each "
                    f"{rss:,.0f} MiB, at most {peak:,.0f} MiB"
                )


if __name__ == "__main__":
    main()
