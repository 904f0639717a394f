"""Writes Criteo's click logs as Parquet, in memory that does not grow with them.

From the official files (`--tsv day_0.gz day_1.gz ...`), or others of their form: a row a line, a label, 13 integers and 26
strings of 8 hexadecimal digits between tabs, any of the latter two empty. The last file is held out as MLPerf holds out day
23: its first half is the validation set, its second half the test set.

The strings become integers, c1 to c26; the integers are i1 to i13.

From a sample as Parquet (`--source DIR` with rows.parquet: part, label, i1 .. i13, c1 .. c26): the last part is the test
set, and each other part a file of the training set, so that a config can hold some of them out.

    python pipelines/criteo/prepare.py --tsv criteo/day_*.gz
    python pipelines/criteo/prepare.py --source ../shared/data/criteo-1tb-80k
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

INTEGERS = [f"i{number}" for number in range(1, 14)]
STRINGS = [f"c{number}" for number in range(1, 27)]
COLUMNS = ["label", *INTEGERS, *STRINGS]
SCHEMA = pa.schema(
    [("label", pa.int8()), *((name, pa.int32()) for name in INTEGERS), *((name, pa.int64()) for name in STRINGS)]
)
BLOCK_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 65_536
DIGITS = 8


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--tsv", type=Path, nargs="+", help="the official files in order, as .gz or plain; the last is held out"
    )
    given.add_argument("--source", type=Path, help="folder with rows.parquet, a sample in parts")
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "criteo"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        counts = from_text(arguments.tsv, arguments.out) if arguments.tsv else from_sample(arguments.source, arguments.out)
    except (OSError, EOFError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{arguments.out}: " + ", ".join(f"{name} {count:,} rows" for name, count in counts.items()))


# ------------------------------------------------------------------------------------------------------ the official files
def from_text(files: Sequence[Path], out: Path) -> dict[str, int]:
    """Writes each file as one Parquet file, the last as two; returns how many rows each set has.

    Raises:
        ValueError: if there are not two files, or a line is not what it must be.
    """
    if len(files) < 2:
        raise ValueError(f"--tsv names {len(files)} file; the last of at least two is held out. Name all files in order")
    clear(out)
    counts = {"train": 0, "validation": 0, "test": 0}
    for file in files[:-1]:
        counts["train"] += write(out / "train" / f"{stem(file)}.parquet", batches_of(file))
    held_out = files[-1]
    half = count_lines(held_out) // 2
    for name, first, last in (("validation", 0, half), ("test", half, None)):
        counts[name] += write(out / name / f"{stem(held_out)}.parquet", rows_between(batches_of(held_out), first, last))
    return counts


def batches_of(file: Path) -> Iterator[pa.RecordBatch]:
    """Yields a file's rows, a block at a time."""
    types = {"label": pa.int8(), **dict.fromkeys(INTEGERS, pa.int32()), **dict.fromkeys(STRINGS, pa.string())}
    options = {
        "read_options": csv.ReadOptions(block_size=BLOCK_BYTES, column_names=COLUMNS, use_threads=False),
        "parse_options": csv.ParseOptions(delimiter="\t", quote_char=False),
        "convert_options": csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
    }
    try:
        with opened(file) as stream:
            for batch in csv.open_csv(stream, **options):
                numbers = [number_of(batch.column(name), name, file) for name in STRINGS]
                plain = [batch.column(name) for name in COLUMNS[: 1 + len(INTEGERS)]]
                yield pa.record_batch([*plain, *numbers], schema=SCHEMA)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: {error}") from error


def number_of(strings: pa.Array, name: str, file: Path) -> pa.Array:
    """Returns the numbers that strings of 8 hexadecimal digits are, null where there is none.

    Raises:
        ValueError: if one is something else.
    """
    there = strings.drop_null()
    has_digits = pc.equal(pc.binary_length(there), DIGITS)
    if pc.all(has_digits).as_py() is False:
        bad = there.filter(pc.invert(has_digits))[0].as_py()
        raise ValueError(f"{file}, column {name}: {bad!r} is not {DIGITS} hexadecimal digits")
    packed = there.cast(pa.binary()).cast(pa.binary(DIGITS)).buffers()[1] if len(there) else b""
    values = np.frombuffer(packed, dtype=np.uint8, count=DIGITS * len(there))
    digits = _DIGIT_OF[values].reshape(-1, DIGITS)
    if (digits < 0).any():
        bad = there[int(np.flatnonzero((digits < 0).any(axis=1))[0])].as_py()
        raise ValueError(f"{file}, column {name}: {bad!r} is not {DIGITS} hexadecimal digits")
    numbers = np.zeros(len(strings), dtype=np.int64)
    is_null = strings.is_null().to_numpy(zero_copy_only=False)
    numbers[~is_null] = digits @ (16 ** np.arange(DIGITS - 1, -1, -1, dtype=np.int64))
    return pa.array(numbers, mask=is_null)


_DIGIT_OF = np.full(256, -1, dtype=np.int64)
for _value, _digit in enumerate("0123456789abcdef"):
    _DIGIT_OF[ord(_digit)] = _DIGIT_OF[ord(_digit.upper())] = _value


def rows_between(batches: Iterator[pa.RecordBatch], first: int, last: int | None) -> Iterator[pa.RecordBatch]:
    """Yields the rows from `first` to before `last`; to the end where it is None."""
    begin = 0
    for batch in batches:
        end = begin + batch.num_rows
        low, high = max(first, begin), end if last is None else min(last, end)
        if low < high:
            yield batch.slice(low - begin, high - low)
        if last is not None and end >= last:
            return
        begin = end


def count_lines(file: Path) -> int:
    """Returns how many lines a file has; the last one may lack its end."""
    count, last = 0, b"\n"
    with opened(file) as stream:
        while block := stream.read(BLOCK_BYTES):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def opened(file: Path) -> BinaryIO:
    """Opens a file, unpacked if it is a .gz."""
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def stem(file: Path) -> str:
    """Returns a file's name without endings."""
    return file.name.partition(".")[0]


# --------------------------------------------------------------------------------------------------------------- a sample
def from_sample(source: Path, out: Path) -> dict[str, int]:
    """Writes a sample's parts as files, the last one as the test set; returns how many rows each set has."""
    rows = pq.read_table(source / "rows.parquet")
    parts = sorted(set(rows["part"].to_pylist()))
    clear(out)
    counts = {"train": 0, "test": 0}
    for part in parts:
        name = "test" if part == parts[-1] else "train"
        of_part = rows.filter(pc.equal(rows["part"], part)).select(COLUMNS).cast(SCHEMA)
        counts[name] += write(out / name / f"part-{part}.parquet", iter(of_part.to_batches()))
    return counts


# ------------------------------------------------------------------------------------------------------------------ both
def clear(out: Path) -> None:
    """Removes what a former call wrote."""
    for name in ("train", "validation", "test"):
        shutil.rmtree(out / name, ignore_errors=True)


def write(path: Path, batches: Iterator[pa.RecordBatch]) -> int:
    """Writes batches as row groups of equal size; half a file never has the file's name. Returns how many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    count, waiting, size = 0, [], 0
    with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            waiting.append(batch)
            size += batch.num_rows
            while size >= ROW_GROUP_ROWS:
                table = pa.Table.from_batches(waiting, SCHEMA)
                writer.write_table(table.slice(0, ROW_GROUP_ROWS))
                waiting, size = table.slice(ROW_GROUP_ROWS).to_batches(), size - ROW_GROUP_ROWS
                count += ROW_GROUP_ROWS
        if size:
            writer.write_table(pa.Table.from_batches(waiting, SCHEMA))
            count += size
    partial.rename(path)
    return count


if __name__ == "__main__":
    main()
