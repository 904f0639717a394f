"""Counts many distinct strings with `embedshard vocabulary build`: its time, and the most memory that it held.

python tests/benchmarks/vocabulary_counting.py --strings 50000000 --memory 2GB
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from vocabulary_lookup import strings

from embedshard.data.hashing import hash_integers

ROW_GROUP = 1_000_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--strings", type=int, default=50_000_000)
    parser.add_argument("--memory", default="2GB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.parquet"
        schema = pa.schema([("id", pa.string()), ("label", pa.float32())])
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
            for first in range(0, given.strings, ROW_GROUP):
                ids = strings(hash_integers(np.arange(first, min(first + ROW_GROUP, given.strings)), 0))
                writer.write_table(pa.table([ids, pa.array(np.zeros(len(ids), np.float32))], schema=schema))
        config = {
            "data": {"train": str(path), "label": "label"},
            "features": {"id": {"kind": "id", "table": "t"}},
            "tables": {"t": {"dim": 4, "vocabulary": "auto"}},
            "model": {"kind": "text_classifier", "features": ["id"]},
            "objective": {"kind": "bce"},
        }
        (Path(folder) / "config.yaml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "embedshard.cli", "vocabulary", "build", f"{folder}/config.yaml"]
        begin = time.monotonic()
        subprocess.run([*command, "--out", f"{folder}/out", "--memory", given.memory], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{given.strings:,} distinct strings of 20 bytes, {path.stat().st_size / 2**20:,.0f} MiB of Parquet, --memory "
            f"{given.memory}: {time.monotonic() - begin:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU time, at most "
            f"{used.ru_maxrss / 2**20:.2f} GiB of memory"
        )


if __name__ == "__main__":
    main()
