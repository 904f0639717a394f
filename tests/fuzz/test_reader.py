"""The reader, fuzzed: 10,000 data sets, whole and damaged; nothing but a DataError or the right rows comes out.

`make test` reads 1,500 of them, `make test-all` all. A case is made of its number alone.
`python -m tests.fuzz.test_reader NUMBER` runs one, here and now.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models

from embedshard.config import Config, build_config, table_specs
from embedshard.data.batch import Batch
from embedshard.data.check import check_data
from embedshard.data.collate import Collator
from embedshard.data.columns import Columns, Flat, Ragged, concatenate, num_rows
from embedshard.data.decode import Decoder, Where, column_specs
from embedshard.data.inventory import RowGroup
from embedshard.data.order import Order
from embedshard.data.reader import BatchReader
from embedshard.data.source import Source, open_source
from embedshard.data.statistics import Statistics
from embedshard.data.tokenizer import UNKNOWN_WORD, blank_tokenizer
from embedshard.data.tokenizer_training import train_tokenizers
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.errors import DataError
from tests.fuzz.cases import Case, make_case
from tests.fuzz.damage import cut, flip, page_bodies, spoil
from tests.fuzz.oracle import Row, decoded_rows, known_words

WHOLE, ALL, CHUNK = 6500, 10_000, 500
IN_EVERY_SUITE = {*range(0, 1000, CHUNK), WHOLE}
"""The first cases of the chunks that `make test` runs; `make test-all` runs all."""
MOMENTS = {"age": (3.5, 2.0), "price": (-1e3, 1e4)}
SECONDS_PER_CASE = 60
MEMORY_BYTES = 4 * 1024**3
DAMAGES = ["cut", "spoilt", "spoilt", "spoilt", "page", "page", "cut after", "spoilt after", "gone after"]


def chunks(start: int, stop: int) -> list[Any]:
    slow = pytest.mark.slow
    return [first if first in IN_EVERY_SUITE else pytest.param(first, marks=slow) for first in range(start, stop, CHUNK)]


@pytest.mark.parametrize("first", chunks(0, WHOLE))
def test_whole_files_give_the_right_rows_or_a_data_error(first, tmp_path):
    run_apart(range(first, first + CHUNK), tmp_path)


@pytest.mark.parametrize("first", chunks(WHOLE, ALL))
def test_damaged_files_give_the_right_rows_or_a_data_error(first, tmp_path):
    run_apart(range(first, first + CHUNK), tmp_path)


# ------------------------------------------------------------------------------------------------ processes of their own
def run_apart(numbers: Sequence[int], folder: Path) -> None:
    """Runs cases in another process, whose death, standstill or hunger for memory is a case's failure, too."""
    context = multiprocessing.get_context("fork")
    failures: list[str] = []
    left = list(numbers)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_all, args=(left, folder, sender))
        process.start()
        sender.close()
        number = left[0]
        try:
            while receiver.poll(SECONDS_PER_CASE):
                number, failure = receiver.recv()
                left = [other for other in left if other > number]
                if failure:
                    failures.append(failure)
            failures.append(f"case {left[0]}: did not end within {SECONDS_PER_CASE} s")
            left = left[1:]
        except EOFError:
            process.join()
            if process.exitcode:
                failures.append(f"case {left[0]}: the process ended with {process.exitcode}")
                left = left[1:]
        finally:
            process.kill()
            process.join()
    assert not failures, f"{len(failures)} of {len(numbers)} cases failed:\n" + "\n".join(failures[:5])


def _run_all(numbers: Sequence[int], folder: Path, sender: Connection) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a case's few texts are not worth threads
    gc.freeze()  # what torch has brought along need not be looked through again and again
    for number in numbers:
        try:
            run_case(number, folder)
        except BaseException:
            sender.send((number, f"case {number}: {traceback.format_exc()}"))
        else:
            sender.send((number, None))


# ----------------------------------------------------------------------------------------------------------------- a case
def run_case(number: int, folder: Path) -> None:
    """Makes a case, writes it, damages it if it is to be, reads it in every way, and compares."""
    case = make_case(number, folder)
    expected = decoded_rows(case, MOMENTS)
    vocabularies = load_vocabularies(case.config, _tokenizers(case))
    decoder = Decoder(column_specs(case.config, "train"), vocabularies, Statistics(MOMENTS))
    if not case.is_refused and case.random.random() < 0.35:
        _check_in_memory(case, decoder, expected)
    paths = case.write(folder)
    damage = case.random.choice(DAMAGES) if number >= WHOLE else None
    place = case.random.randrange(len(paths))
    damaged = paths[place]
    is_strict = damage in (None, "cut", "cut after", "gone after") or (
        damage == "page" and case.files[place].options["write_page_checksum"]
    )
    try:
        if damage is not None and not damage.endswith("after"):
            _damage(case, damage, damaged)
        if case.random.random() < 0.05:
            _check_the_check(case, paths, expected, damage is not None)
        if damage is None and not case.is_refused and case.random.random() < 0.3:
            _check_tokenizers(case, paths)
        source, error = attempt(lambda: open_source([str(path) for path in paths], decoder))
        if error:
            assert case.is_refused or damage in ("cut", "spoilt"), f"refused without a reason: {error}"
            assert str(folder) in error
            return
        source.decoded_bytes()
        assert not case.is_refused or not is_strict, "what cannot be decoded was opened"
        assert damage != "cut", "a file that is cut off was opened"
        if case.is_refused:
            return
        if damage is not None and damage.endswith("after"):
            _damage(case, damage, damaged)
        _Reading(case, source, table_rows(vocabularies), expected, damage is not None, is_strict).check()
    finally:
        for path in folder.glob(f"{number}-*"):
            path.unlink()


def attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """Returns what is read, and the message of the DataError if there is one instead."""
    try:
        return read(), ""
    except DataError as error:
        return None, str(error)


def _batches(reader: BatchReader, start: int, stop: int) -> list[Batch]:
    with reader.batches(start, stop) as batches:
        return list(batches)


def _damage(case: Case, damage: str, path: Path) -> None:
    content = path.read_bytes()
    if damage.startswith("gone"):
        path.unlink()
    elif damage.startswith("cut"):
        path.write_bytes(cut(case.random, content))
    elif damage == "page":
        places = page_bodies(content, pq.read_metadata(path))
        spoilt = bytearray(content)
        if places:
            flip(case.random, spoilt, places, case.random.choice([1, 1, 3]))
        path.write_bytes(bytes(spoilt))
    else:
        path.write_bytes(spoil(case.random, content))


def _tokenizers(case: Case) -> dict[str, str]:
    """Returns the tokenizer that knows the words that it should."""
    if "words" not in case.tree["tables"]:
        return {}
    words = known_words(case)
    tokenizer = blank_tokenizer(case.config.tables["words"].vocabulary)
    numbers = {word: number for number, word in enumerate([*words, UNKNOWN_WORD])}
    tokenizer.model = models.WordLevel(numbers, unk_token=UNKNOWN_WORD)
    return {"words": tokenizer.to_str()}


def _check_tokenizers(case: Case, paths: list[Path]) -> None:
    """What is trained of the files knows the words that it should, and no others."""
    found, error = attempt(lambda: train_tokenizers(_config_over(case, paths)))
    if error:
        assert known_words(case) == ["never met"], error
        assert "there is no tokenizer to make" in error
        return
    wanted = {table: {word: n for n, word in enumerate([*known_words(case), UNKNOWN_WORD])} for table in found}
    assert {table: tokenizers.Tokenizer.from_str(text).get_vocab() for table, text in found.items()} == wanted


def _config_over(case: Case, paths: list[Path]) -> Config:
    tree = case.tree | {"data": case.tree["data"] | {"train": [str(path) for path in paths]}}
    return build_config(tree, {}, "fuzz")


def _check_in_memory(case: Case, decoder: Decoder, expected: list[Row | None]) -> None:
    """Decodes slices of what no file can hold: offsets that begin in the middle, values under nulls."""
    first = 0
    for file in case.files:
        skip = case.random.randint(0, file.table.num_rows)
        rows = expected[first + skip : first + file.table.num_rows]
        part, where = file.table.slice(skip), Where("a table", 0, skip, first + skip)
        columns, error = attempt(lambda part=part, where=where: decoder.decode(part, where))
        if error:
            assert None in rows or case.trouble == "other kind", f"refused without a reason: {error}"
        else:
            assert_right(columns, rows, first + skip)
        first += file.table.num_rows


def _check_the_check(case: Case, paths: list[Path], expected: list[Row | None], is_damaged: bool) -> None:
    """`embedshard data check` refuses what training would, and counts what no reading of single rows does."""
    report = check_data(_config_over(case, paths))
    if is_damaged or case.trouble == "other kind":
        return
    assert report.sets[0].rows == len(expected)
    refused = [reason for reason in report.refused if "has no value at all" not in reason]
    without_words = known_words(case) == ["never met"]
    assert bool(refused) == (case.is_refused or without_words or None in expected), report.refused
    if not case.is_refused:
        assert report.sets[0].refused_rows == expected.count(None)


class _Reading:
    """The ways to read a source, each compared with what is expected.

    Args:
        case: the case.
        source: opened over its files.
        table_rows: ids of each table.
        expected: of all rows; None for those to be refused.
        is_damaged: whether a DataError needs no reason in the rows.
        is_strict: whether what comes out must be the right rows; else as many rows, fit to be looked up, are enough.
    """

    def __init__(
        self,
        case: Case,
        source: Source,
        table_rows: dict[str, int],
        expected: list[Row | None],
        is_damaged: bool,
        is_strict: bool,
    ) -> None:
        self.case, self.source, self.table_rows, self.expected = case, source, table_rows, expected
        self.tolerates_errors, self.is_strict = is_damaged or case.trouble == "other kind", is_strict

    def check(self) -> None:
        groups = self.source.inventory.row_groups
        if self.is_strict:
            assert [group.num_rows for group in groups] == self.case.group_sizes()
        else:
            assert sum(group.num_rows for group in groups) == len(self.expected)
            if [group.num_rows for group in groups] != self.case.group_sizes():
                return
        for number, group in enumerate(groups):
            if self.case.random.random() < 0.5:
                self._check_whole(number, group)
            else:
                self._check_pieces(number, group)
        if self.case.random.random() < 0.5:
            self._check_batches()

    def _check_whole(self, number: int, group: RowGroup) -> None:
        rows = self.expected[group.first_row : group.first_row + group.num_rows]
        columns = self._outcome(lambda: self.source.read_row_group(number), rows)
        if columns is not None:
            self._compare(columns, rows, group.first_row)

    def _check_pieces(self, number: int, group: RowGroup) -> None:
        batch_rows, skip = self.case.random.randint(1, 8), self.case.random.randint(0, group.num_rows)
        rows = self.expected[group.first_row + skip : group.first_row + group.num_rows]
        read = self.source.iter_row_group
        pieces = self._outcome(lambda: [dict(columns) for _, columns in read(number, batch_rows, skip)], rows)
        if pieces is None:
            return
        assert all(num_rows(piece) <= batch_rows for piece in pieces)
        assert sum(num_rows(piece) for piece in pieces) == len(rows)
        if pieces:
            self._compare(concatenate(pieces), rows, group.first_row + skip)

    def _outcome(self, read: Callable[[], Any], rows: list[Row | None]) -> Any:
        """Returns what is read; None for a DataError that the rows give reason for."""
        found, error = attempt(read)
        if error:
            assert None in rows or self.tolerates_errors, f"refused without a reason: {error}"
            self._check_place(error)
            return None
        assert None not in rows or not self.is_strict, "a row that does not fit was decoded"
        return found

    def _check_place(self, message: str) -> None:
        """Checks that the row that an error names is one that does not fit."""
        place = re.search(r"-(\d+)\.parquet, row group (\d+), row (\d+)", message)
        if place is None or self.tolerates_errors:
            return
        file, index, row = (int(word) for word in place.groups())
        group = next(g for g in self.source.inventory.row_groups if (g.file, g.index) == (file, index))
        assert self.expected[group.first_row + row] is None, f"not the row that does not fit: {message}"

    def _compare(self, columns: Columns, rows: list[Row | None], first_row: int) -> None:
        if self.is_strict:
            assert_right(columns, rows, first_row)
        else:
            assert_fit(columns, len(rows), self.source, self.table_rows)

    # ------------------------------------------------------------------------------------------------------- batches
    def _check_batches(self) -> None:
        """Trains' view: the batches of some rank from some step on, out of a cache or streamed."""
        draw, config = self.case.random, self.case.config
        order = Order(
            seed=config.seed,
            lanes=config.data.lanes,
            global_batch_size=config.train.global_batch_size,
            window_steps=(draw.choice([0, 1, 2, 5]),),
            row_groups=(tuple(group.num_rows for group in self.source.inventory.row_groups),),
            shuffle=config.data.shuffle,
        )
        world_size = draw.choice([size for size in range(1, config.data.lanes + 1) if config.data.lanes % size == 0])
        rank = draw.randrange(world_size)
        stop = config.train.epochs * order.epoch_steps
        start = draw.choice([0, 0, draw.randint(0, stop)])
        is_cached = draw.random() < 0.5
        cache_bytes = draw.choice([0, 10_000, 2**30])
        collator = Collator(config, table_specs(config, self.table_rows))
        reader = BatchReader(order, [self.source], [is_cached], cache_bytes, collator, None, rank, world_size)
        wanted = self._row_numbers(order, range(start, stop), order.lane_block(rank, world_size))
        read: list[Row | None] = [self.expected[row] for step in wanted for row in step if row >= 0]
        found, error = attempt(lambda: _batches(reader, start, stop))
        if error:
            assert None in self.expected or self.tolerates_errors, f"refused without a reason: {error}"
            self._check_place(error)
            return
        assert None not in read or not self.is_strict, "a row that does not fit was trained"
        assert [batch.rows.tolist() for batch in found] == wanted
        if self.is_strict:
            for batch in found:
                self._check_batch(batch)

    def _row_numbers(self, order: Order, steps: range, lanes: tuple[int, int]) -> list[list[int]]:
        """Returns the rows of each step, -1 for padding: one after another out of the shuffled row groups."""
        found, tables = [], {}
        for step in steps:
            position = order.position(step)
            epoch = order.epoch_order(position.epoch, 0)
            window = epoch.window_of(position.step_in_epoch)
            if (position.epoch, window) not in tables:
                groups = [self.source.inventory.row_groups[number] for number in epoch.group_order]
                in_epoch = [group.first_row + row for group in groups for row in range(group.num_rows)]
                table = epoch.rows(window, lanes).tolist()
                tables[position.epoch, window] = [[in_epoch[row] if row >= 0 else -1 for row in rows] for rows in table]
            found.append(tables[position.epoch, window][position.step_in_epoch - window * epoch.window_steps])
        return found

    def _check_batch(self, batch: Batch) -> None:
        rows = [self.expected[row] if row >= 0 else None for row in batch.rows.tolist()]
        features = self.case.tree["features"]
        by_place = {feature["table"] for feature in features.values() if _is_looked_up_by_place(feature)}
        by_weights = {
            feature["table"]
            for feature in features.values()
            if feature.get("pooling") == "mean" or feature["kind"] == "weighted_bag"
        }
        for table in self.case.tree["tables"]:
            over = {name: feature for name, feature in features.items() if feature.get("table") == table}
            is_sequence = table in by_place
            weighted = bool(by_place & by_weights) if is_sequence else table in by_weights
            jagged = batch.sequences if is_sequence else batch.weighted if weighted else batch.sparse
            assert jagged is not None
            keys, lengths, values = jagged.keys(), jagged.lengths().tolist(), jagged.values().tolist()
            for name, feature in over.items():
                first = keys.index(name) * len(rows)
                begin, end = sum(lengths[:first]), sum(lengths[: first + len(rows)])
                bags = [_ids(row, name) for row in rows]
                assert lengths[first : first + len(rows)] == [len(ids) for ids in bags], name
                assert values[begin:end] == [one for ids in bags for one in ids], name
                if weighted:
                    weights = [weight for row in rows for weight in _weights(row, name, feature)]
                    assert_close(jagged.weights().numpy()[begin:end], weights, 1e-6, name)
        for name, ids in batch.ids.items():
            assert ids.tolist() == [-1 if row is None else row[name] for row in rows]
        dense = [name for name, feature in features.items() if feature["kind"] == "dense"]
        labels = [f"label:{name}" for name in self.case.config.data.label_columns]
        for tensor, names in ((batch.dense, dense), (batch.labels, labels)):
            numbers = [0.0 if row is None else row[name] for row in rows for name in names]
            assert tensor.shape == (len(rows), len(names))
            assert_close(tensor.numpy().ravel(), numbers, 2e-7, ", ".join(names))
        wanted = [0.0 if row is None else row.get("weight", 1.0) for row in rows]
        assert batch.weights.tolist() == wanted


def _is_looked_up_by_place(feature: dict[str, Any]) -> bool:
    return feature["kind"] == "sequence" or (feature["kind"] == "text" and feature["pooling"] is None)


def _ids(row: Row | None, name: str) -> list[int]:
    if row is None:
        return []
    return [row[name]] if isinstance(row[name], int) else [one for one, _ in row[name]]


def _weights(row: Row | None, name: str, feature: dict[str, Any]) -> list[float]:
    ids = _ids(row, name)
    if row is None or feature["kind"] == "id" or _is_looked_up_by_place(feature):
        return [1.0] * len(ids)
    if feature["kind"] == "weighted_bag":
        return [weight for _, weight in row[name]]
    return [1.0 if feature["pooling"] == "sum" else 1.0 / len(ids) for _ in ids]


# -------------------------------------------------------------------------------------------------------------- columns
def assert_right(columns: Columns, rows: list[Row | None], first_row: int) -> None:
    """Asserts that decoded columns are these rows."""
    assert columns["row"].values.tolist() == list(range(first_row, first_row + len(rows)))
    assert None not in rows, "a row that does not fit was decoded"
    for name in rows[0] or [] if rows else []:
        column, wanted = columns[name], [row[name] for row in rows if row is not None]
        if isinstance(column, Ragged):
            spans = list(zip(column.offsets[:-1].tolist(), column.offsets[1:].tolist(), strict=True))
            assert [column.values[a:b].tolist() for a, b in spans] == [[one for one, _ in bag] for bag in wanted], name
            if column.weights is not None:
                got = column.weights[spans[0][0] : spans[-1][1]]
                assert_close(got, [weight for bag in wanted for _, weight in bag], 1e-6, name)
        elif column.values.dtype == np.int64:
            assert column.values.tolist() == wanted, name
        else:
            assert_close(column.values, wanted, 2e-7, name)


def assert_close(got: np.ndarray, wanted: list[float], tolerance: float, what: str) -> None:
    """Asserts that numbers are those wanted, but for rounding."""
    assert len(got) == len(wanted), what
    expected = np.array(wanted, dtype=np.float64)
    assert (np.abs(got - expected) <= tolerance * np.abs(expected)).all(), f"{what}: {got} for {wanted}"


def assert_fit(columns: Columns, count: int, source: Source, table_rows: dict[str, int]) -> None:
    """Asserts that columns of damaged files hold as many rows, and nothing that a table has no row for."""
    assert num_rows(columns) == count
    for spec in source.decoder.specs:
        column = columns[spec.name]
        if isinstance(column, Ragged):
            assert len(column.offsets) == count + 1
            assert (np.diff(column.offsets) >= 0).all()
            assert column.offsets[-1] <= len(column.values)
        if spec.table is not None:
            assert ((column.values >= 0) & (column.values <= table_rows[spec.table])).all()
        else:
            assert isinstance(column, Flat)
            assert np.isfinite(column.values).all()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        run_case(int(sys.argv[1]), Path(scratch))
