"""Reads all files of a config against it, and tells what they hold and what a run would refuse.

Training stops at the first thing that does not fit. Here every file is read to its end, whatever is wrong with it or with
the others, a batch of rows at a time, and what was found is counted. What counts as wrong, and what the config does about
it, is the decoder's business, as in training.
"""

from __future__ import annotations

__all__ = ["Progress", "check_data"]

import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.config import Config
from embedshard.config.parts import AutoVocabulary, DenseFeature, TokenizerVocabulary, WordNgramsVocabulary
from embedshard.data.check_report import ColumnReport, Known, ProblemReport, Refusal, Report, RowGroups, SetReport
from embedshard.data.decode import ColumnSpec, Decoder, Role, Where, column_specs, slice_column
from embedshard.data.distinct import DistinctIds
from embedshard.data.findings import Action, Finding, Problem, text_of
from embedshard.data.footers import data_files
from embedshard.data.inventory import Inventory, InventoryFile
from embedshard.data.order import Order
from embedshard.data.parse import Parsed
from embedshard.data.partitions import find_partitions
from embedshard.data.source import Source, open_file
from embedshard.data.split import Selection
from embedshard.data.statistics import Statistics
from embedshard.data.tokenizer_training import train_tokenizers
from embedshard.data.training_set import held_out_of_training, without_held_out
from embedshard.data.vocabulary import MetVocabulary, Vocabulary, load_vocabularies
from embedshard.data.vocabulary_building import build_vocabularies, counted_tables
from embedshard.data.windows import rows_that_wait, window_steps
from embedshard.errors import DataError
from embedshard.quantities import size
from embedshard.storage import Location, locate

_BATCH_ROWS = 65_536
_READERS = 4
_EXAMPLES = 3

Progress = Callable[[int, int], None]
"""Hears how many rows were read, and of how many."""


# ------------------------------------------------------------------------------------------------------------ checking
def check_data(config: Config, progress: Progress | None = None) -> Report:
    """Reads all sets of a config.

    Args:
        config: the config.
        progress: hears how far it is; of making tokenizers first, if the config has any.

    Raises:
        ConfigError: if a path cannot be understood, or vocabularies and tables disagree.
    """
    vocabularies, refused = _load_vocabularies(config, progress)
    vocabularies |= {slice_column(column): MetVocabulary() for column in config.evaluate.slice_by}
    sets = [_SetCheck(config, *named, vocabularies) for named in _sets(config)]
    refused += _hold_out(config, sets)
    for check in sets:
        check.measure()
    counter = _Counter(sum(check.report.rows for check in sets), progress)
    with ThreadPoolExecutor(_READERS) as pool:
        work = [pool.submit(check.read, source, counter) for check in sets for source in check.sources]
        for done in work:
            done.result()
    for check in sets:
        check.finish()
        refused += _refused(check.report)
    reports = [check.report for check in sets]
    refused += _too_many(reports, config.data.max_bad_fraction)
    refused += _without_values(config, [check for check in sets if check.role == "train"])
    return Report(reports, _known(config, sets), refused, config.data.max_bad_fraction)


def _sets(config: Config) -> Iterable[tuple[str, Role, list[list[str]]]]:
    """Yields the name, role and files of each set: those of several patterns one after the other."""
    partitions = [list(partition.patterns) for partition in find_partitions(config.data)]
    for number, patterns in enumerate(partitions):
        yield f"train[{number}]" if len(partitions) > 1 else "train", "train", [patterns]
    if config.data.validation_fraction is not None:
        yield "validation", "evaluation", partitions
    held_out: list[tuple[str, Role, list[str] | None]] = [
        ("validation", "evaluation", config.data.validation),
        ("test", "evaluation", config.data.test),
        ("catalogue", "catalogue", config.data.catalogue),
    ]
    for name, role, patterns_or_none in held_out:
        if patterns_or_none is not None:
            yield name, role, [patterns_or_none]


def _hold_out(config: Config, sets: Sequence[_SetCheck]) -> list[str]:
    """Shares the rows of the training files out between training and validation, if the config says so."""
    if config.data.validation_fraction is None:
        return []
    train = [check for check in sets if check.role == "train"]
    files = [Inventory(check.files) for check in train]
    if not any(inventory.num_rows for inventory in files):
        return []  # which is refused already
    try:
        selections = [inventory.selection for inventory in without_held_out(config.data, files)]
        for check, selection in zip(train, selections, strict=True):
            check.select(selection)
        validation = next(check for check in sets if check.report.name == "validation")
        validation.select(held_out_of_training(config.data, Inventory(validation.files)).selection)
    except DataError as error:
        return [str(error)]
    return []


def _load_vocabularies(config: Config, progress: Progress | None) -> tuple[dict[str, Vocabulary], list[str]]:
    """Loads what can be loaded of them, and says why the others cannot."""
    loaded: dict[str, Vocabulary] = {}
    refused = []
    tokenizers: dict[str, str] = {}

    def told(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    try:
        tokenizers = train_tokenizers(config, told)
    except DataError as error:
        refused.append(str(error))
    with tempfile.TemporaryDirectory(prefix="embedshard-vocabularies-") as folder:
        counted: dict[str, Location] = {}
        for name in counted_tables(config):
            try:
                counted |= build_vocabularies(config, locate(folder), progress=told, tables=[name])
            except DataError as error:
                refused.append(str(error))
        for name, table in config.tables.items():
            vocabulary = table.vocabulary
            words = vocabulary.of if isinstance(vocabulary, WordNgramsVocabulary) else name
            if isinstance(config.tables[words].vocabulary, TokenizerVocabulary) and words not in tokenizers:
                continue
            if isinstance(vocabulary, AutoVocabulary) and name not in counted:
                continue
            tables = {each: config.tables[each] for each in (words, name)}
            try:
                loaded |= load_vocabularies(config.model_copy(update={"tables": tables}), tokenizers, counted)
            except DataError as error:
                refused.append(str(error))
    return loaded, list(dict.fromkeys(refused))


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.add(0)

    def add(self, rows: int) -> None:
        with self._lock:
            self._done += rows
            if self._progress is not None:
                self._progress(self._done, self._total)


class _SetCheck:
    """Checks one set. Its files are read in several threads, and what they hold is added up under a lock."""

    def __init__(
        self, config: Config, name: str, role: Role, partitions: list[list[str]], vocabularies: dict[str, Vocabulary]
    ) -> None:
        self.role = role
        self.report = SetReport(name, [pattern for patterns in partitions for pattern in patterns])
        self.sources: list[Source] = []
        self._config = config
        specs = [spec for spec in column_specs(config, role) if spec.table is None or spec.table in vocabularies]
        self._decoder = Decoder(specs, vocabularies, Statistics(), config.data.on_bad_row)
        self.columns = {(spec.name, spec.column): (_TextCheck if spec.is_text else _ColumnCheck)(spec) for spec in specs}
        self.columns |= {(spec.name, spec.second): _WeightsCheck(spec) for spec in specs if spec.second is not None}
        self._problems: dict[Problem, ProblemReport] = {}
        self._examples: dict[Problem, list[tuple[tuple[str, int, int], str]]] = defaultdict(list)
        self._refusals: dict[str, Refusal] = {}
        self._slices = {slice_column(column) for column in config.evaluate.slice_by}
        self._lock = threading.Lock()
        item_id = config.identity("item_id")
        self._item_rows = (
            np.zeros(vocabularies[table].rows + 1, dtype=np.bool_)
            if role == "catalogue" and (table := _table_of(specs, item_id)) is not None
            else None
        )
        self._repeated_items = 0
        for patterns in partitions:
            self._open(patterns)

    @property
    def files(self) -> tuple[InventoryFile, ...]:
        """Those that could be opened."""
        return tuple(file for source in self.sources for file in source.inventory.files)

    def _open(self, patterns: list[str]) -> None:
        try:
            locations, skipped = data_files(patterns)
        except DataError as error:
            self._refuse("", str(error))
            return
        self.report.files += len(locations)
        self.report.skipped += [location.uri for location in skipped]
        with ThreadPoolExecutor(_READERS) as pool:
            opened = list(pool.map(self._open_file, locations))
        self.sources += [source for source in opened if source is not None]

    def select(self, selection: Selection | None) -> None:
        """Leaves out the rows that are on the other side of a split of the training set."""
        assert selection is not None, "asked for where rows are held out"
        sources, first_row = [], selection.first_row
        for source in self.sources:
            of_file = replace(source.inventory, selection=replace(selection, first_row=first_row))
            sources.append(source.of(of_file))
            first_row += of_file.num_file_rows
        self.sources = sources

    def measure(self) -> None:
        """Writes down what the footers say of all files."""
        groups = [group.num_rows for source in self.sources for group in source.inventory.row_groups]
        report = self.report
        if not self.report.files:
            return
        report.rows = sum(groups)
        report.size_bytes = sum(file.size_bytes for source in self.sources for file in source.inventory.files)
        report.decoded_bytes = sum(source.decoded_bytes() for source in self.sources)
        if groups:
            report.row_groups = RowGroups(len(groups), min(groups), int(np.median(groups)), max(groups))
        if self.role == "train":
            report.fits_cache = report.decoded_bytes <= self._config.data.cache_bytes
            if not report.fits_cache:
                self._look_at_lanes(groups)
        if not report.rows and len(self.sources) == report.files:
            self._refuse("", f"{', '.join(report.patterns)}: {report.files} files without a row.")

    def _open_file(self, location: Location) -> Source | None:
        try:
            source, refusals = open_file(location, self._decoder)
        except DataError as error:
            self._refuse(location.uri, str(error))
            return None
        for message in refusals.values():
            self._refuse(location.uri, message)
        return source

    def _look_at_lanes(self, groups: Sequence[int]) -> None:
        """Finds how much of what is decoded for the first window has to wait: lanes begin all over the files at once."""
        data, rows = self._config.data, sum(groups)
        steps = window_steps(self._config, self.report.decoded_bytes, rows)
        order = Order(0, data.lanes, self._config.train.global_batch_size, (steps,), (tuple(groups),), shuffle=False)
        waiting = rows_that_wait(order.epoch_order(0, 0), (0, data.lanes), self._config.train.epochs > 1)
        self.report.waiting_bytes = waiting * self.report.decoded_bytes // max(rows, 1)
        beyond = self.report.waiting_bytes - data.cache_bytes
        if beyond > 0:
            self.report.notes.append(
                f"{data.lanes} lanes begin in {len(groups)} row groups of up to {max(groups):,} rows, and a worker decodes "
                f"each once: so up to {size(self.report.waiting_bytes)} of rows wait for their turn, and what is more "
                f"than data.cache_bytes waits in {tempfile.gettempdir()} (TMPDIR), up to {size(beyond)}. Less waits with "
                f"row groups of at most {max(rows // data.lanes, 1):,} rows, fewer data.lanes, or more workers."
            )

    # ------------------------------------------------------------------------------------------------------- reading
    def read(self, source: Source, counter: _Counter) -> None:
        """Reads a file to its end."""
        specs = {spec.name: spec for spec in source.decoder.specs}
        for number, group in enumerate(source.inventory.row_groups):
            done = 0
            try:
                for table, where in source.iter_tables(number, _BATCH_ROWS) if specs else ():
                    self._look_at(source.decoder, specs, table, where)
                    done += table.num_rows
                    counter.add(table.num_rows)
            except DataError as error:
                self._refuse(source.uri_of(group), str(error))
                with self._lock:
                    self.report.unread_rows += group.num_rows - done
            counter.add(group.num_rows - done)

    def _look_at(self, decoder: Decoder, specs: dict[str, ColumnSpec], table: pa.RecordBatch, where: Where) -> None:
        refused = np.zeros(table.num_rows, dtype=np.bool_)
        set_aside = np.zeros(table.num_rows, dtype=np.bool_)
        for name, spec in list(specs.items()):
            try:
                parsed = decoder.parse(spec, table, where)
            except DataError as error:
                self._refuse(where.uri, str(error))
                del specs[name]
                continue
            for finding in parsed.findings:
                action = decoder.action(finding.problem)
                if action == "error":
                    refused[finding.rows] = True
                elif action == "quarantine":
                    set_aside[finding.rows] = True
                if name not in self._slices:  # in which a null is a value like others
                    self._count_problem(finding, action, where)
            self.columns[spec.name, spec.column].add(parsed, table.schema.field(spec.column).type, table.column(spec.column))
            if spec.second is not None:
                weights = table.column(spec.second)
                self.columns[spec.name, spec.second].add(parsed, weights.type, weights)
            if self._item_rows is not None and name == self._config.identity("item_id"):
                self._count_items(parsed.values)
        with self._lock:
            self.report.refused_rows += int(np.count_nonzero(refused))
            self.report.set_aside_rows += int(np.count_nonzero(set_aside & ~refused))

    def _count_problem(self, finding: Finding, action: Action, where: Where) -> None:
        rows, firsts = np.unique(finding.rows, return_index=True)
        with self._lock:
            problem = finding.problem
            report = self._problems.setdefault(problem, ProblemReport(problem.column, problem.reason, action))
            report.values += len(finding)
            report.rows += len(rows)
            for row, first in zip(rows[:_EXAMPLES].tolist(), firsts[:_EXAMPLES].tolist(), strict=True):
                value = finding.value(first)
                place = (where.uri, where.row_group, where.place(row))
                self._examples[problem].append((place, f"{where.row(row)}: {'null' if value is None else value}"))
            self._examples[problem] = sorted(self._examples[problem])[:_EXAMPLES]  # whichever thread comes first

    def _count_items(self, rows: npt.NDArray[np.int64]) -> None:
        assert self._item_rows is not None, "only the catalogue's items are counted"
        with self._lock:
            ids, counts = np.unique(rows[rows >= 0], return_counts=True)
            self._repeated_items += int(counts.sum() - len(ids) + self._item_rows[ids].sum())
            self._item_rows[ids] = True

    def _refuse(self, uri: str, message: str) -> None:
        """Notes what is wrong with a file, together with others of which the same is wrong."""
        bare = message.replace(uri, "", 1).lstrip(":, ") if uri else message
        with self._lock:
            refusal = self._refusals.setdefault(bare, Refusal(bare))
            refusal.files += 1
            if uri:
                refusal.examples = sorted([*refusal.examples, uri])[:_EXAMPLES]

    def finish(self) -> None:
        """Writes down what was counted."""
        if self._repeated_items:
            self._refuse("", f"{self._repeated_items} rows repeat an earlier item; a catalogue needs one row per item.")
        self.report.columns = [column.report() for column in self.columns.values()]
        for problem in self._decoder.problems:
            if problem in self._problems:
                self._problems[problem].examples = [text for _, text in self._examples[problem]]
                self.report.problems.append(self._problems[problem])
        self.report.refusals = sorted(self._refusals.values(), key=lambda refusal: (refusal.examples, refusal.message))


class _ColumnCheck:
    """Adds up what a column holds."""

    def __init__(self, spec: ColumnSpec) -> None:
        kind = spec.feature.kind if spec.feature is not None else spec.name.partition(":")[0]
        self._report = ColumnReport(spec.name, spec.column, kind, spec.table)
        self.distinct = DistinctIds() if spec.table is not None else None
        self._types: set[str] = set()
        self._lock = threading.Lock()

    def add(self, parsed: Parsed, kind: pa.DataType, array: pa.Array) -> None:
        """Adds a batch: as it was parsed, and as the file has it."""
        if self.distinct is None:
            self._add(kind, parsed.values, int(np.isnan(parsed.values).sum()), _range_of_numbers(parsed.values))
            return
        limits = _range_of_ids(parsed.among)
        unknown = sum(len(finding) for finding in parsed.findings if finding.problem.reason == "unknown id")
        self._add(kind, parsed.values, parsed.among.null_count, limits, unknown)
        if parsed.lengths is not None:
            self._add_lengths(parsed.lengths, array.null_count)
        with self._lock:
            self.distinct.add(parsed.among)

    def _add(
        self, kind: pa.DataType, values: npt.NDArray[Any], nulls: int, limits: tuple[Any, Any] | None, unknown: int = 0
    ) -> None:
        with self._lock:
            report = self._report
            self._types.add(_type_text(kind))
            report.values += len(values)
            report.nulls += nulls
            report.unknown += unknown
            if limits is not None:
                report.least = _first(report.least, limits[0], min)
                report.greatest = _first(report.greatest, limits[1], max)

    def _add_lengths(self, lengths: npt.NDArray[np.int64], nulls: int) -> None:
        with self._lock:
            report = self._report
            report.lists += len(lengths)
            report.null_lists += nulls
            if len(lengths):
                report.least_length = _first(report.least_length, int(lengths.min()), min)
                report.greatest_length = _first(report.greatest_length, int(lengths.max()), max)

    def report(self) -> ColumnReport:
        """Returns what was added up."""
        self._report.types = sorted(self._types)
        if self.distinct is not None:
            self._report.distinct, self._report.distinct_is_exact = self.distinct.estimate(), self.distinct.is_exact
        return self._report


class _TextCheck(_ColumnCheck):
    """Adds up what a column of texts holds: values are what is looked up, words or runs of them."""

    def add(self, parsed: Parsed, kind: pa.DataType, array: pa.Array) -> None:
        """Adds a batch."""
        assert self.distinct is not None, "a text looks rows of a table up"
        assert parsed.lengths is not None, "a text has words"
        known = parsed.values[parsed.values >= 0]
        self._add(kind, parsed.values, parsed.among.null_count, None, len(parsed.values) - len(known))
        self._add_lengths(parsed.lengths, parsed.among.null_count)
        with self._lock:
            self.distinct.add(pa.array(known))


class _WeightsCheck(_ColumnCheck):
    """Adds up what the column of a weighted bag's weights holds."""

    def __init__(self, spec: ColumnSpec) -> None:
        assert spec.second is not None, "only weighted bags have weights"
        super().__init__(ColumnSpec(spec.name, spec.second))
        self._report.kind = "weights"

    def add(self, parsed: Parsed, kind: pa.DataType, array: pa.Array) -> None:
        """Adds a batch as the file has it: what is parsed has no weights where they do not fit."""
        if pa.types.is_null(kind):
            numbers, lengths = np.zeros(0), np.zeros(len(array), dtype=np.int64)
        else:
            numbers = np.array(
                pc.list_flatten(array).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64
            )
            lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        self._add(kind, numbers, int(np.isnan(numbers).sum()), _range_of_numbers(numbers))
        self._add_lengths(lengths, array.null_count)


def _type_text(kind: pa.DataType) -> str:
    """Returns a type as Arrow writes it, without the names of what a list holds."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{'large_' if pa.types.is_large_list(kind) else ''}list<{_type_text(kind.value_type)}>"
    if pa.types.is_fixed_size_list(kind):
        return f"list<{_type_text(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_dictionary(kind):
        return f"dictionary<{_type_text(kind.value_type)}>"
    return str(kind)


def _first(former: Any, latter: Any, choose: Callable[[Any, Any], Any]) -> Any:
    if former is None or latter is None:
        return latter if former is None else former
    if isinstance(former, str) != isinstance(latter, str):  # files of two kinds
        former, latter = str(former), str(latter)
    return choose(former, latter)


def _range_of_numbers(values: npt.NDArray[np.float64]) -> tuple[Any, Any] | None:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else None


def _range_of_ids(ids: pa.Array) -> tuple[Any, Any] | None:
    if ids.null_count == len(ids):
        return None
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    limits = pc.min_max(ids)
    if pa.types.is_integer(ids.type):
        return limits["min"].as_py(), limits["max"].as_py()
    return text_of(limits["min"]), text_of(limits["max"])


# ------------------------------------------------------------------------------------------------------------- verdicts
def _refused(report: SetReport) -> list[str]:
    reasons = []
    for refusal in report.refusals:
        files = f" ({refusal.files} {'file' if refusal.files == 1 else 'files'})" if refusal.examples else ""
        reasons.append(f"{report.name}{files}: {refusal.message.partition('. ')[0].rstrip('.')}.")
    if report.refused_rows:
        kinds = ", ".join(f"{problem.column}: {problem.reason}" for problem in report.problems if problem.action == "error")
        reasons.append(f"{report.name}: {report.refused_rows:,} of {report.rows:,} rows ({kinds}).")
    return reasons


def _too_many(reports: Sequence[SetReport], limit: float) -> list[str]:
    groups = {"train": [report for report in reports if report.name.startswith("train")]}
    groups |= {report.name: [report] for report in reports if not report.name.startswith("train")}
    reasons = []
    for name, group in groups.items():
        set_aside, rows = sum(report.set_aside_rows for report in group), sum(report.rows for report in group)
        if set_aside > limit * rows:
            reasons.append(
                f"{name}: {set_aside:,} of {rows:,} rows ({set_aside / rows:.2%}) would be set aside, more than "
                f"data.max_bad_fraction={limit:g} allows."
            )
    return reasons


def _without_values(config: Config, train: Sequence[_SetCheck]) -> list[str]:
    """Returns which features are to be standardised and have no value to do it by."""
    reasons = []
    for name, feature in config.features.items():
        if not isinstance(feature, DenseFeature) or feature.normalise != "standardise":
            continue
        columns = [column for check in train for column in check.report.columns if column.name == name]
        if columns and any(column.values for column in columns) and all(column.least is None for column in columns):
            reasons.append(f"train: feature '{name}' is to be standardised, but has no value at all.")
    return reasons


def _known(config: Config, sets: Sequence[_SetCheck]) -> list[Known]:
    found = []
    for role in ("user_id", "item_id"):
        name = config.identity(role)
        by_set = {check.report.name: check for check in sets if (ids := _distinct(check, name)) and ids.estimate()}
        for against in ("train", "catalogue"):
            others = [ids for check in by_set.values() if check.role == against and (ids := _distinct(check, name))]
            for set_name, check in by_set.items():
                ids = _distinct(check, name)
                if others and ids is not None and name is not None and check.role not in (against, "catalogue"):
                    found.append(Known(set_name, name, against, ids.absent_from(others)))
    return found


def _distinct(check: _SetCheck, name: str | None) -> DistinctIds | None:
    return next((column.distinct for (decoded, _), column in check.columns.items() if decoded == name), None)


def _table_of(specs: Sequence[ColumnSpec], name: str | None) -> str | None:
    return next((spec.table for spec in specs if spec.name == name), None)
