"""From Arrow columns to what is trained: ids are rows of tables, numbers are normalised, and bad values are dealt with.

`parse.py` finds every value that does not fit, whatever the config says of it. The config's policies decide here: an error,
something in the value's place, or the row is set aside. Such a row keeps its place, with nothing in it, and the column `bad`
says why.
"""

from __future__ import annotations

__all__ = ["ColumnSpec", "Decoder", "Where", "column_specs", "slice_column"]

import math
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedshard.config import POINTWISE_METRICS, Config
from embedshard.config.parts import (
    BagFeature,
    CrossEntropyConfig,
    DenseFeature,
    IdFeature,
    ListFeature,
    PointwiseConfig,
    SequenceFeature,
    TextFeature,
    WeightedBagFeature,
)
from embedshard.data.columns import Columns, Flat, Ragged, offsets_of
from embedshard.data.findings import Action, Finding, Problem, Reason, shown
from embedshard.data.parse import (
    Parsed,
    Words,
    add_weights,
    is_id,
    is_list,
    is_number,
    is_text,
    out_of_range,
    parse_ids,
    parse_lists,
    parse_numbers,
    parse_texts,
    row_of,
    words_of,
)
from embedshard.data.row_group import Rows
from embedshard.data.statistics import Statistics
from embedshard.data.text import TextVocabulary
from embedshard.data.vocabulary import Vocabulary, unknown_number
from embedshard.errors import DataError

IntArray = npt.NDArray[np.int64]
Role = Literal["train", "evaluation", "catalogue"]

_BYTES_PER_WORD = 4
_SORTED_LISTS = 64
"""How many lists are sorted together: what is sorted stays in a cache."""


@dataclass(frozen=True)
class ColumnSpec:
    """What a Parquet column becomes.

    Attributes:
        name: of the decoded column.
        column: of the Parquet file.
        feature: how it is decoded; None for labels, weights and candidates.
        table: whose rows ids become, if it holds ids.
        second: another column that belongs to it: a weighted bag's weights.
        greatest: of a weight, or a label, that must lie between 0 and this; None where any number will do.
    """

    name: str
    column: str
    feature: IdFeature | ListFeature | TextFeature | DenseFeature | None = None
    table: str | None = None
    second: str | None = None
    greatest: float | None = None

    @property
    def is_list(self) -> bool:
        """Whether a row holds a list."""
        return isinstance(self.feature, ListFeature) or self.name == "candidates"

    @property
    def is_text(self) -> bool:
        """Whether a row holds a text."""
        return isinstance(self.feature, TextFeature)

    @property
    def max_length(self) -> int | None:
        """How much of a list or a text is kept."""
        return self.feature.max_length if isinstance(self.feature, ListFeature | TextFeature) else None

    @property
    def masks_zero(self) -> bool:
        """Whether the id 0 is padding."""
        return isinstance(self.feature, BagFeature | SequenceFeature) and self.feature.mask_zero

    @property
    def problems(self) -> list[Problem]:
        """All that can be wrong with it, in the order of precedence."""
        if self.table is None:
            reasons: list[Reason] = ["missing number", "infinite number"]
            if self.greatest is not None:
                reasons.append(out_of_range(self.name))
            return [Problem(self.name, self.column, reason) for reason in reasons]
        if self.is_text:
            return [Problem(self.name, self.column, "null text")]
        found = [Problem(self.name, self.column, "null id"), Problem(self.name, self.column, "unknown id")]
        if self.second is not None:
            found.append(Problem(self.name, self.column, "lengths differ"))
            found += [Problem(self.name, self.second, reason) for reason in ("missing number", "infinite number")]
        return found


def column_specs(config: Config, role: Role) -> tuple[ColumnSpec, ...]:
    """Returns what is read of a row.

    Args:
        config: the config.
        role: `train`: features, labels, the weight. `evaluation`: features, the label if a metric needs it, candidates if
            they are given. `catalogue`: the features that describe an item.
    """
    wanted = config.item_features() if role == "catalogue" else list(config.features)
    specs = []
    for name in wanted:
        feature = config.features[name]
        table = None if isinstance(feature, DenseFeature) else feature.table
        second = feature.weights if isinstance(feature, WeightedBagFeature) else None
        specs.append(ColumnSpec(name, feature.column or name, feature, table, second))
    needs_label = any(name in POINTWISE_METRICS for name in config.evaluate.metrics)
    if role == "train" or (role == "evaluation" and needs_label):
        greatest = _greatest_label(config)
        specs += [
            ColumnSpec(f"label:{name}", column, greatest=greatest) for name, column in config.data.label_columns.items()
        ]
    if role == "train" and config.data.weight is not None:
        specs.append(ColumnSpec("weight", config.data.weight, greatest=math.inf))
    if role == "evaluation":
        specs += [ColumnSpec(slice_column(name), name, None, slice_column(name)) for name in config.evaluate.slice_by]
    if role == "evaluation" and config.evaluate.candidates != "catalogue":
        item_id = config.identity("item_id")
        item = next(feature for name, feature in config.features.items() if name == item_id)
        assert isinstance(item, IdFeature), "the config checks that an item is named by an id"
        specs.append(ColumnSpec("candidates", config.evaluate.candidates, None, item.table))
    return tuple(specs)


def _greatest_label(config: Config) -> float | None:
    """Returns the greatest label that the objective takes, of which 0 is the least; None where any number will do."""
    objective = config.objective
    if isinstance(objective, CrossEntropyConfig):
        return objective.classes - 1
    return 1 if isinstance(objective, PointwiseConfig) and objective.kind == "bce" else None


def slice_column(column: str) -> str:
    """Returns the name of the decoded column, and of the vocabulary, of a Parquet column by whose values a set is sliced."""
    return f"slice:{column}"


@dataclass(frozen=True)
class Where:
    """Which rows are being decoded.

    Attributes:
        uri: of the file.
        row_group: of the file.
        first_row: the first one's place among the row group's rows that are in the data set.
        first_dataset_row: the number in the data set of the first row.
        rows: their places in the row group, (n,) int64; None where they follow each other from `first_row`.
    """

    uri: str
    row_group: int
    first_row: int
    first_dataset_row: int
    rows: IntArray | None = None

    def place(self, row: int) -> int:
        """Returns the place in the row group of the row-th of them."""
        return self.first_row + row if self.rows is None else int(self.rows[row])

    def row(self, row: int) -> str:
        """Returns where the row-th of them is."""
        return f"{self.uri}, row group {self.row_group}, row {self.place(row)}"


class _LastWords(threading.local):
    """The words that a thread found last: table, column, encoder, words."""

    found: tuple[object, str, object, Words] | None = None


class Decoder:
    """Decodes tables of a data set.

    Args:
        specs: the columns.
        vocabularies: of each table.
        statistics: of standardised features; those without are left as they are, NaN where missing.
        on_bad_row: what a value does that its feature does not allow and has no policy for.
        wanted: names of the columns that are asked for; all where absent.
    """

    def __init__(
        self,
        specs: Sequence[ColumnSpec],
        vocabularies: Mapping[str, Vocabulary],
        statistics: Statistics,
        on_bad_row: Literal["error", "quarantine"] = "error",
        wanted: Collection[str] | None = None,
    ) -> None:
        self.specs, self._vocabularies, self._statistics = tuple(specs), vocabularies, statistics
        self._on_bad_row = on_bad_row
        self._wanted = [spec.name for spec in self.specs if wanted is None or spec.name in wanted]
        self._specs = {spec.name: spec for spec in self.specs}
        self._uses = Counter(name for spec in self.specs for name in (spec.column, spec.second) if name is not None)
        texts = [spec.column for spec in self.specs if spec.is_text]
        self._shared_texts = {column for column in texts if texts.count(column) > 1}
        self._last_words = _LastWords()
        self.problems: tuple[Problem, ...] = tuple(problem for spec in self.specs for problem in spec.problems)
        """All that can be wrong with a row; the column `bad` holds 1 + the place herein."""
        self._codes = {problem: code for code, problem in enumerate(self.problems, start=1)}
        self.quarantines = any(self.action(problem) == "quarantine" for problem in self.problems)
        """Whether a row can be set aside: there is a column `bad` then."""

    @property
    def columns(self) -> list[str]:
        """The Parquet columns that are read."""
        return list(self._uses)

    @property
    def shared_columns(self) -> set[str]:
        """The Parquet columns that more than one decoded column is made of."""
        return {name for name, uses in self._uses.items() if uses > 1}

    @property
    def standardised(self) -> list[str]:
        """The features that need statistics."""
        features = {name: self._specs[name].feature for name in self._wanted}
        return [
            name
            for name, feature in features.items()
            if isinstance(feature, DenseFeature) and feature.normalise == "standardise"
        ]

    @property
    def unknown_rows(self) -> dict[str, int]:
        """The table's row for unknown ids of each column that sends them there."""
        return {
            spec.name: unknown_number(self._vocabularies[spec.table])
            for spec in self.specs
            if spec.table is not None and getattr(spec.feature, "unknown", None) == "oov"
        }

    @property
    def integer_types(self) -> dict[str, np.dtype[Any]]:
        """The least type that holds what stands for the ids of each decoded column, -1 among them; they are int64."""
        return {
            spec.name: np.min_scalar_type(-1 - unknown_number(self._vocabularies[spec.table]))
            for spec in self.specs
            if spec.table is not None
        }

    @property
    def with_empty_nulls(self) -> list[str]:
        """The columns in which a null counts as no id."""
        return [spec.name for spec in self.specs if getattr(spec.feature, "null", None) == "empty"]

    def narrowed(self, names: Iterable[str]) -> Decoder:
        """Returns a decoder of these columns alone. Where rows can be set aside, the others are read to know which."""
        wanted = set(names)
        specs = self.specs if self.quarantines else [spec for spec in self.specs if spec.name in wanted]
        return Decoder(specs, self._vocabularies, self._statistics, self._on_bad_row, wanted)

    def only(self, names: Iterable[str]) -> Decoder:
        """Returns a decoder that reads these columns alone, and knows of no bad values in others."""
        wanted = set(names)
        specs = [spec for spec in self.specs if spec.name in wanted]
        return Decoder(specs, self._vocabularies, self._statistics, self._on_bad_row)

    def with_statistics(self, statistics: Statistics) -> Decoder:
        """Returns a decoder that standardises by these."""
        return Decoder(self.specs, self._vocabularies, statistics, self._on_bad_row, self._wanted)

    def lookups_of_text(self, spec: ColumnSpec, size_bytes: int) -> int:
        """Returns about how many rows of its table a text of a size looks up: somewhat more than in English."""
        vocabulary = self._vocabularies[spec.table or ""]
        assert isinstance(vocabulary, TextVocabulary), "the config checks that texts look words up"
        return size_bytes // _BYTES_PER_WORD * vocabulary.lookups_per_word

    def check_type(self, spec: ColumnSpec, column: str, kind: pa.DataType) -> str | None:
        """Returns what a Parquet column must be, if its Arrow type cannot be decoded; None if it can."""
        if pa.types.is_null(kind):
            return None  # a column of nothing but nulls: what they mean is decided as for any null
        if column == spec.second:
            return None if is_list(kind) and is_number(kind.value_type) else "a list of numbers"
        if spec.is_list:
            if not is_list(kind):
                return "a list of integers or strings"
            return None if is_id(kind.value_type) else "a list of integers or strings"
        if spec.is_text:
            return None if is_text(kind) else "a text, which is a string, in each row"
        if spec.table is not None:
            return None if is_id(kind) else "integers or strings"
        return None if is_number(kind) else "a number"

    def action(self, problem: Problem) -> Action:
        """Returns what the config does about a problem."""
        feature = self._specs[problem.name].feature
        if problem.name.startswith(slice_column("")):
            return "empty"  # a null is a slice of its own
        policy: Action = "error"
        if problem.reason == "unknown id" and isinstance(feature, IdFeature | ListFeature):
            policy = feature.unknown
        elif problem.reason in ("null id", "null text") and isinstance(feature, IdFeature | ListFeature | TextFeature):
            policy = feature.null
        elif problem.reason == "missing number" and isinstance(feature, DenseFeature):
            policy = feature.missing
        return self._on_bad_row if policy == "error" else policy

    def parse(self, spec: ColumnSpec, table: Rows, where: Where) -> Parsed:
        """Returns a column before the config's policies, and what is wrong with it.

        Raises:
            DataError: if it is of a type that its vocabulary does not know.
        """
        array = table.column(spec.column)
        if spec.table is None:
            return parse_numbers(spec.name, spec.column, array, spec.greatest)
        vocabulary = self._vocabularies[spec.table]
        try:
            if spec.is_text:
                assert isinstance(vocabulary, TextVocabulary), "the config checks that texts look words up"
                return parse_texts(spec.name, spec.column, self._words(spec.column, table, array, vocabulary), vocabulary)
            if not spec.is_list:
                return parse_ids(spec.name, spec.column, array, vocabulary)
            parsed = parse_lists(spec.name, spec.column, array, vocabulary, spec.masks_zero)
        except DataError as error:
            raise DataError(f"{where.uri}, column '{spec.column}': {error}") from error
        except pa.ArrowInvalid as error:
            raise DataError(f"{where.uri}, row group {where.row_group}, column '{spec.column}': {error}") from error
        if spec.second is not None:
            add_weights(parsed, spec.name, spec.column, spec.second, table.column(spec.second))
        return parsed

    def _words(self, column: str, table: Rows, array: pa.ChunkedArray | pa.Array, vocabulary: TextVocabulary) -> Words:
        """Returns the words of a column of texts. Where several features read it, they are found once."""
        last = self._last_words.found
        if last is not None and last[0] is table and last[1] == column and last[2] is vocabulary.encoder:
            return last[3]
        words = words_of(array, vocabulary)
        if column in self._shared_texts:
            self._last_words.found = (table, column, vocabulary.encoder, words)
        return words

    def find(self, table: Rows, where: Where) -> list[Finding]:
        """Returns every value that does not fit, whatever the config does about it, in the order of the columns.

        Raises:
            DataError: if a column is of a type that its vocabulary does not know.
        """
        return [finding for spec in self.specs for finding in self.parse(spec, table, where).findings]

    def looked_up(self, spec: ColumnSpec, table: Rows, where: Where) -> pa.Array:
        """Returns the ids of a column, as Arrow has them, that are looked up in training, each as often as it is.

        Nulls and padding are none, and neither is what a list has beyond its `max_length`. Of a column of ids, not of texts.

        Raises:
            DataError: if a column is of a type that its vocabulary does not know.
        """
        parsed = self.parse(spec, table, where)
        ids, lengths = parsed.among, parsed.lengths
        if ids.null_count:
            is_null = ids.is_null().to_numpy(zero_copy_only=False)
            if lengths is not None:
                lengths = lengths - np.bincount(row_of(np.flatnonzero(is_null), lengths), minlength=len(lengths))
            ids = ids.drop_null()
        if lengths is not None and spec.max_length is not None and len(lengths) and int(lengths.max()) > spec.max_length:
            assert isinstance(spec.feature, ListFeature), "what has lengths and is no text is a list"
            places, _ = _kept(lengths, spec.max_length, keeps_first=spec.feature.keep == "first")
            ids = ids.take(pa.array(places))
        return ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids

    def decode(self, table: Rows, where: Where) -> Columns:
        """Returns the wanted columns decoded; `row`, the rows' numbers in the data set; `bad` where rows can be set aside.

        Raises:
            DataError: naming file, row group, row, column and what to do.
        """
        return dict(self.decode_each(table, where))

    def decode_each(self, table: Rows, where: Where) -> Iterator[tuple[str, Flat | Ragged]]:
        """Yields what `decode` returns, one column after the other, each as soon as it can be told: see `RowsByColumn`.

        Raises:
            DataError: as `decode`, when it comes to the column.
        """
        numbers = np.arange(where.first_dataset_row, where.first_dataset_row + table.num_rows, dtype=np.int64)
        yield "row", Flat(numbers)
        bad = np.zeros(table.num_rows, dtype=np.int16)
        decoded: Columns = {}
        for spec in self.specs:
            parsed = self.parse(spec, table, where)
            for finding in parsed.findings:
                action = self.action(finding.problem)
                if action == "error":
                    raise DataError(self._refusal(spec, parsed, finding, where))
                if action == "quarantine":
                    bad[finding.rows] = np.where(bad[finding.rows], bad[finding.rows], self._codes[finding.problem])
            if spec.name not in self._wanted:
                continue
            if self.quarantines:  # a later column may set a row aside
                decoded |= self._decoded(spec, parsed)
            else:
                yield from self._decoded(spec, parsed).items()
        self._last_words.found = None
        if self.quarantines:
            is_bad = bad > 0
            yield from ((name, _emptied(column, is_bad) if bad.any() else column) for name, column in decoded.items())
            yield "bad", Flat(bad)

    # ------------------------------------------------------------------------------------------------------ policies
    def _decoded(self, spec: ColumnSpec, parsed: Parsed) -> Columns:
        if spec.table is None:
            return {spec.name: Flat(self._normalised(spec, parsed))}
        if isinstance(spec.feature, TextFeature):
            return self._decoded_text(spec, spec.feature, parsed)
        values, nulls = parsed.values, np.zeros(0, dtype=np.int64)
        for finding in parsed.findings:
            if self.action(finding.problem) == "oov":
                values = values.copy()  # it may be Arrow's memory
                values[finding.places] = unknown_number(self._vocabularies[spec.table])
            elif self.action(finding.problem) == "empty":
                nulls = finding.places
        if parsed.lengths is None:
            return {spec.name: Flat(values)}
        lengths = parsed.lengths
        weights = None if parsed.weights is None else parsed.weights.astype(np.float32)
        columns: Columns = {}
        if getattr(spec.feature, "null", None) == "empty":
            dropped = np.bincount(row_of(nulls, lengths), minlength=len(lengths))
            columns[f"null:{spec.name}"] = Flat(dropped.astype(np.int32))
            if len(nulls):
                values, lengths = np.delete(values, nulls), lengths - dropped
                weights = None if weights is None else np.delete(weights, nulls)
        if spec.max_length is not None and len(lengths) and int(lengths.max()) > spec.max_length:
            assert isinstance(spec.feature, ListFeature)
            places, lengths = _kept(lengths, spec.max_length, keeps_first=spec.feature.keep == "first")
            values, weights = values[places], None if weights is None else weights[places]
        offsets = offsets_of(lengths)
        if weights is not None and isinstance(spec.feature, WeightedBagFeature) and spec.feature.pooling == "mean":
            weights = _scaled_to_one(weights, lengths)
        columns[spec.name] = Ragged(values, offsets, weights)
        return columns

    def _decoded_text(self, spec: ColumnSpec, feature: TextFeature, parsed: Parsed) -> Columns:
        assert spec.table is not None, "a text is looked up"
        assert parsed.lengths is not None, "a text has words"
        values, lengths = parsed.values, parsed.lengths
        is_unknown = values < 0
        if feature.unknown == "oov":
            values = np.where(is_unknown, self._vocabularies[spec.table].rows, values)
        elif is_unknown.any():
            unknown = np.bincount(row_of(np.flatnonzero(is_unknown), lengths), minlength=len(lengths))
            values, lengths = values[~is_unknown], lengths - unknown
        if feature.max_length is not None and len(lengths) and int(lengths.max()) > feature.max_length:
            places, lengths = _kept(lengths, feature.max_length, keeps_first=feature.truncation == "post")
            values = values[places]
        if feature.distinct:
            values, lengths = _distinct(values, lengths)
        columns: Columns = {spec.name: Ragged(values, offsets_of(lengths))}
        if feature.null == "empty":
            is_null = np.zeros(len(lengths), dtype=np.int32)
            for finding in parsed.findings:
                is_null[finding.rows] = 1
            columns[f"null:{spec.name}"] = Flat(is_null)
        return columns

    def _normalised(self, spec: ColumnSpec, parsed: Parsed) -> npt.NDArray[np.floating]:
        """Returns numbers as a model reads them; 0 for those that did not fit."""
        values: npt.NDArray[np.floating] = parsed.values
        for finding in parsed.findings:
            values[finding.places] = 0.0
        if isinstance(spec.feature, DenseFeature) and spec.feature.normalise != "none":
            values = values.astype(np.float64, copy=False)
            if spec.feature.normalise == "log1p":
                values = np.sign(values) * np.log1p(np.abs(values))
            elif spec.feature.normalise == "standardise":
                moments = self._statistics.moments.get(spec.name)
                mean, deviation = (0.0, 1.0) if moments is None else moments
                values = (values - mean) / deviation
                for finding in parsed.findings:
                    values[finding.places] = np.nan if moments is None else 0.0
                if moments is None:
                    return values
        return values.astype(np.float32, copy=False)

    # -------------------------------------------------------------------------------------------------------- errors
    def _refusal(self, spec: ColumnSpec, parsed: Parsed, finding: Finding, where: Where) -> str:
        """Returns the message of the first value of a finding: what was met, what is needed, where, what to do."""
        row, column, name = int(finding.rows[0]), finding.problem.column, spec.name
        value = shown(finding.among[int(finding.places[0])])
        counts, aside = f"{len(finding)} of {len(finding.among)}", "data.on_bad_row to 'quarantine'"
        met = f"{where.row(row)}: column '{column}' is {value}"
        if finding.problem.reason == "null id":
            advice = f"set features.{name}.null to 'empty' or {aside}" if spec.feature is not None else f"set {aside}"
            if parsed.lengths is None:
                return (
                    f"{where.row(row)}: column '{column}' is null ({counts} rows read here are); '{name}' needs an id in "
                    f"each row. Fill or remove these rows, or {advice}."
                )
            place = int(finding.places[0] - offsets_of(parsed.lengths)[row])
            return (
                f"{where.row(row)}: the list in column '{column}' holds a null at place {place}; '{name}' needs ids. "
                f"Remove nulls from the lists (a null or empty list is fine), or {advice}."
            )
        if finding.problem.reason == "null text":
            return (
                f"{where.row(row)}: column '{column}' is null ({counts} rows read here are); '{name}' needs a text in each "
                f"row, which may be empty. Fill or remove these rows, or set features.{name}.null to 'empty' or {aside}."
            )
        if finding.problem.reason == "unknown id":
            assert spec.table is not None
            policy = f"features.{name}.unknown to 'oov' or 'quarantine'" if spec.feature is not None else aside
            return (
                f"{met}, which is not among {self._vocabularies[spec.table].describe()} ({counts} ids read here are not). "
                f"Give table '{spec.table}' more rows or another vocabulary, or set {policy}."
            )
        if finding.problem.reason == "lengths differ":
            ids, weights = str(finding.value(0)).split(", ")
            return (
                f"{where.row(row)}: column '{column}' lists {ids} and '{spec.second}' {weights}; '{name}' needs as many of "
                f"each. Correct the row, or set {aside}."
            )
        if parsed.lengths is not None:
            return (
                f"{where.row(row)}: column '{column}' holds {value}; weights are finite float32. "
                f"Correct the row, or set {aside}."
            )
        need = "a finite float32"
        if spec.greatest == math.inf:
            need = "a finite float32 of at least 0"
        elif spec.greatest is not None:
            need = f"a number from 0 to {spec.greatest:g}, as the objective does,"
        zero = f"features.{name}.missing to 'zero' or " if isinstance(spec.feature, DenseFeature) else ""
        zero = zero if finding.problem.reason == "missing number" else ""
        return (
            f"{met} ({counts} rows read here are so); '{name}' needs {need} in each row. "
            f"Correct the rows, or set {zero}{aside}."
        )


def _kept(lengths: IntArray, most: int, keeps_first: bool) -> tuple[IntArray, IntArray]:
    """Returns which of all lists' values are kept where a list keeps so many at most, and the lengths then."""
    offsets, kept = offsets_of(lengths), np.minimum(lengths, most)
    starts = offsets[:-1] if keeps_first else offsets[1:] - kept
    ends = offsets_of(kept)
    return np.repeat(starts - ends[:-1], kept) + np.arange(ends[-1]), kept


def _distinct(values: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Returns the different values of each list, ascending, and how many each has. Values are from 0 to 2**56."""
    ends, counts = np.cumsum(lengths), np.zeros(len(lengths), dtype=np.int64)
    parts = [values[:0]]
    for first in range(0, len(lengths), _SORTED_LISTS):
        last = min(first + _SORTED_LISTS, len(lengths))
        own = values[ends[first] - lengths[first] : ends[last - 1]]
        step = int(own.max()) + 1 if len(own) else 1
        found = np.unique(own + step * np.repeat(np.arange(last - first), lengths[first:last]))
        rows, kept = np.divmod(found, step)
        parts.append(kept)
        counts[first:last] = np.bincount(rows, minlength=last - first)
    return np.concatenate(parts), counts


def _emptied(column: Flat | Ragged, rows: npt.NDArray[np.bool_]) -> Flat | Ragged:
    """Returns a column with nothing in these rows: an empty list, a number of 0, an id of -1."""
    if isinstance(column, Flat):
        return Flat(np.where(rows, column.values.dtype.type(-1 if column.values.dtype == np.int64 else 0), column.values))
    lengths = np.diff(column.offsets)
    kept = ~np.repeat(rows, lengths)
    weights = None if column.weights is None else column.weights[kept]
    return Ragged(column.values[kept], offsets_of(np.where(rows, 0, lengths)), weights)


def _scaled_to_one(weights: npt.NDArray[np.float32], lengths: IntArray) -> npt.NDArray[np.float32]:
    if not len(weights):
        return weights
    # Each row is summed by itself: a difference of running sums would depend on the rows that are read before it.
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=weights, minlength=len(lengths))
    scale = np.divide(1.0, sums, out=np.zeros_like(sums), where=np.abs(sums) > 1e-12)
    return (weights * np.repeat(scale, lengths)).astype(np.float32)
