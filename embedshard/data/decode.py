"""From Arrow columns to arrays: ids become rows of tables, numbers are normalised, and what does not fit is an error.

Lists come straight from Arrow's values and lengths; slices, null lists that hide values, and both widths of offsets are
Arrow's own business (`flatten`, `list_value_length`). Only the path of an error looks at single rows.
"""

from __future__ import annotations

__all__ = ["ColumnSpec", "Decoder", "Where", "column_specs"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.config import Config
from embedshard.config.parts import BagFeature, DenseFeature, IdFeature, WeightedBagFeature
from embedshard.data.columns import Columns, Flat, Ragged
from embedshard.data.statistics import Statistics
from embedshard.data.vocabulary import Vocabulary, integers
from embedshard.errors import DataError

IntArray = npt.NDArray[np.int64]
Role = Literal["train", "evaluation", "catalogue"]
ListFeature = BagFeature | WeightedBagFeature

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_POINTWISE = ("rmse", "mae", "log_loss", "auc")


@dataclass(frozen=True)
class ColumnSpec:
    """What a Parquet column becomes.

    Attributes:
        name: of the decoded column.
        column: of the Parquet file.
        feature: how it is decoded; None for labels, weights and candidates.
        table: whose rows ids become, if it holds ids.
        second: another column that belongs to it: a weighted bag's weights.
    """

    name: str
    column: str
    feature: IdFeature | BagFeature | WeightedBagFeature | DenseFeature | None = None
    table: str | None = None
    second: str | None = None

    @property
    def is_list(self) -> bool:
        """Whether a row holds a list."""
        return isinstance(self.feature, BagFeature | WeightedBagFeature) or self.name == "candidates"

    @property
    def max_length(self) -> int | None:
        """How much of a list is kept."""
        return self.feature.max_length if isinstance(self.feature, BagFeature | WeightedBagFeature) else None


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
    needs_label = any(name in _POINTWISE for name in config.evaluate.metrics)
    if role == "train" or (role == "evaluation" and needs_label):
        specs += [ColumnSpec(f"label:{name}", column) for name, column in config.data.label_columns.items()]
    if role == "train" and config.data.weight is not None:
        specs.append(ColumnSpec("weight", config.data.weight))
    if role == "evaluation" and config.evaluate.candidates != "catalogue":
        item_id = config.identity("item_id")
        item = next(feature for name, feature in config.features.items() if name == item_id)
        assert isinstance(item, IdFeature), "the config checks that an item is named by an id"
        specs.append(ColumnSpec("candidates", config.evaluate.candidates, None, item.table))
    return tuple(specs)


@dataclass(frozen=True)
class Where:
    """Which rows are being decoded.

    Attributes:
        uri: of the file.
        row_group: of the file.
        first_row: of the row group.
        first_dataset_row: the number in the data set of the first row.
    """

    uri: str
    row_group: int
    first_row: int
    first_dataset_row: int

    def row(self, row: int) -> str:
        """Returns where the row-th of them is."""
        return f"{self.uri}, row group {self.row_group}, row {self.first_row + row}"


class Decoder:
    """Decodes tables of a data set.

    Args:
        specs: the columns.
        vocabularies: of each table.
        statistics: of standardised features; those without are left as they are, NaN where missing.
    """

    def __init__(self, specs: Sequence[ColumnSpec], vocabularies: Mapping[str, Vocabulary], statistics: Statistics) -> None:
        self.specs, self._vocabularies, self._statistics = tuple(specs), vocabularies, statistics

    @property
    def columns(self) -> list[str]:
        """The Parquet columns that are read."""
        names = [name for spec in self.specs for name in (spec.column, spec.second) if name is not None]
        return list(dict.fromkeys(names))

    @property
    def standardised(self) -> list[str]:
        """The features that need statistics."""
        return [
            spec.name
            for spec in self.specs
            if isinstance(spec.feature, DenseFeature) and spec.feature.normalise == "standardise"
        ]

    def narrowed(self, names: Iterable[str]) -> Decoder:
        """Returns a decoder of these columns alone."""
        kept = set(names)
        return Decoder([spec for spec in self.specs if spec.name in kept], self._vocabularies, self._statistics)

    def with_statistics(self, statistics: Statistics) -> Decoder:
        """Returns a decoder that standardises by these."""
        return Decoder(self.specs, self._vocabularies, statistics)

    def check_type(self, spec: ColumnSpec, column: str, kind: pa.DataType) -> str | None:
        """Returns what a Parquet column must be, if its Arrow type cannot be decoded; None if it can."""
        if pa.types.is_null(kind):
            return None  # a column of nothing but nulls: what they mean is decided as for any null
        if column == spec.second:
            return None if _is_list(kind) and _is_number(_value_type(kind)) else "a list of numbers"
        if spec.is_list:
            if not _is_list(kind):
                return "a list of integers or strings"
            return None if _is_id(_value_type(kind)) else "a list of integers or strings"
        if spec.table is not None:
            return None if _is_id(kind) else "integers or strings"
        return None if _is_number(kind) else "a number"

    def decode(self, table: pa.Table | pa.RecordBatch, where: Where) -> Columns:
        """Returns the decoded columns, and `row`, the rows' numbers in the data set.

        Raises:
            DataError: naming file, row group, row, column and what to do.
        """
        decoded: Columns = {
            "row": Flat(np.arange(where.first_dataset_row, where.first_dataset_row + table.num_rows, dtype=np.int64))
        }
        for spec in self.specs:
            array = _one_array(table.column(spec.column))
            if spec.is_list:
                array = _as_lists(array, pa.int64())
                second = None
                if spec.second is not None:
                    second = _as_lists(_one_array(table.column(spec.second)), pa.float64())
                decoded[spec.name] = self._lists(spec, array, second, where)
            elif spec.table is not None:
                self._refuse_nulls(spec, array, where)
                decoded[spec.name] = Flat(self._rows(spec, array, where, np.arange(table.num_rows)))
            else:
                decoded[spec.name] = Flat(self._numbers(spec, array, where))
        return decoded

    # ---------------------------------------------------------------------------------------------------------- ids
    def _refuse_nulls(self, spec: ColumnSpec, array: pa.Array, where: Where) -> None:
        if array.null_count:
            row = int(np.flatnonzero(_nulls(array))[0])
            raise DataError(
                f"{where.row(row)}: column '{spec.column}' is null ({array.null_count} of {len(array)} rows read here "
                f"are); '{spec.name}' needs an id in each row. Fill or remove these rows."
            )

    def _rows(self, spec: ColumnSpec, ids: pa.Array, where: Where, row_of_id: IntArray) -> IntArray:
        """Returns the table's row of each id; `row_of_id` is asked only to say where an unknown one is."""
        assert spec.table is not None
        vocabulary = self._vocabularies[spec.table]
        try:
            rows = _mapped(ids, vocabulary)
        except DataError as error:
            raise DataError(f"{where.uri}, column '{spec.column}': {error}") from error
        except pa.ArrowInvalid as error:
            raise DataError(f"{where.uri}, row group {where.row_group}, column '{spec.column}': {error}") from error
        unknown = rows < 0
        if not unknown.any():
            return rows
        if getattr(spec.feature, "unknown", "error") == "oov":
            return np.where(unknown, vocabulary.rows, rows)
        first = int(np.flatnonzero(unknown)[0])
        raise DataError(
            f"{where.row(int(row_of_id[first]))}: column '{spec.column}' is {_shown(ids[first])}, which is not among "
            f"{vocabulary.describe()} ({int(unknown.sum())} of {len(rows)} ids read here are not). "
            f"Give table '{spec.table}' more rows or another vocabulary, or set features.{spec.name}.unknown to 'oov'."
        )

    # -------------------------------------------------------------------------------------------------------- lists
    def _lists(self, spec: ColumnSpec, array: pa.Array, second: pa.Array | None, where: Where) -> Ragged:
        values, lengths = _flattened(array)
        offsets = _offsets(lengths)
        if values.null_count:
            place = int(np.flatnonzero(_nulls(values))[0])
            row = int(np.searchsorted(offsets, place, side="right")) - 1
            raise DataError(
                f"{where.row(row)}: the list in column '{spec.column}' holds a null at place {place - offsets[row]}; "
                f"'{spec.name}' needs ids. Remove nulls from the lists (a null or empty list is fine)."
            )
        weights = None if second is None else self._bag_weights(spec, second, lengths, where)
        row_of_id = np.repeat(np.arange(len(lengths)), lengths)
        ids = self._rows(spec, values, where, row_of_id)
        if spec.max_length is not None and len(lengths) and int(lengths.max()) > spec.max_length:
            kept = np.minimum(lengths, spec.max_length)
            assert isinstance(spec.feature, BagFeature | WeightedBagFeature)
            starts = offsets[:-1] if spec.feature.keep == "first" else offsets[1:] - kept
            offsets = _offsets(kept)
            places = np.repeat(starts - offsets[:-1], kept) + np.arange(offsets[-1])
            ids, weights = ids[places], None if weights is None else weights[places]
            lengths = kept
        if weights is not None and isinstance(spec.feature, WeightedBagFeature) and spec.feature.pooling == "mean":
            weights = _scaled_to_one(weights, lengths)
        return Ragged(ids, offsets, weights)

    def _bag_weights(self, spec: ColumnSpec, second: pa.Array, lengths: IntArray, where: Where) -> npt.NDArray[np.float32]:
        values, weight_lengths = _flattened(second)
        differing = np.flatnonzero(weight_lengths != lengths)
        if len(differing):
            row = int(differing[0])
            raise DataError(
                f"{where.row(row)}: column '{spec.column}' lists {lengths[row]} ids and '{spec.second}' "
                f"{weight_lengths[row]} weights; '{spec.name}' needs as many of each. Correct the row."
            )
        weights = _as_float64(values)
        bad = np.flatnonzero(~_fits_float32(weights))
        if len(bad):
            row = int(np.searchsorted(_offsets(lengths), bad[0], side="right")) - 1
            raise DataError(
                f"{where.row(row)}: column '{spec.second}' holds {values[int(bad[0])].as_py()!r}; weights are finite "
                f"float32. Correct the row."
            )
        return weights.astype(np.float32)

    # ------------------------------------------------------------------------------------------------------ numbers
    def _numbers(self, spec: ColumnSpec, array: pa.Array, where: Where) -> npt.NDArray[np.floating]:
        values = _as_float64(array)
        missing = np.isnan(values)
        feature = spec.feature
        tolerant = isinstance(feature, DenseFeature) and feature.missing == "zero"
        bad = ~_fits_float32(values)
        if tolerant:
            bad &= ~missing
        if spec.name == "weight":
            bad |= values < 0
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            need = "a finite float32 of at least 0" if spec.name == "weight" else "a finite float32"
            advice = f"set features.{spec.name}.missing to 'zero', or correct the rows" if feature else "correct the rows"
            raise DataError(
                f"{where.row(row)}: column '{spec.column}' is {array[row].as_py()!r} ({int(bad.sum())} of {len(values)} "
                f"rows read here are so); '{spec.name}' needs {need} in each row. You can {advice}."
            )
        if not isinstance(feature, DenseFeature):
            return values.astype(np.float32)
        if feature.normalise == "log1p":
            values = np.sign(values) * np.log1p(np.abs(values))
        elif feature.normalise == "standardise":
            if spec.name not in self._statistics.moments:
                return values
            mean, deviation = self._statistics.moments[spec.name]
            values = (values - mean) / deviation
        values[missing] = 0.0
        return values.astype(np.float32)


# ------------------------------------------------------------------------------------------------------- Arrow's types
def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        if pa.types.is_dictionary(column.type):
            column = column.unify_dictionaries()
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # more values than one array's offsets can hold
        column = pa.concat_arrays([chunk.cast(pa.large_list(chunk.type.value_type)) for chunk in column.chunks])
    if pa.types.is_dictionary(column.type) and column.dictionary.null_count:
        column = column.dictionary_decode()
    return column


def _nulls(array: pa.Array) -> npt.NDArray[np.bool_]:
    return array.is_null().to_numpy(zero_copy_only=False)


def _mapped(ids: pa.Array, vocabulary: Vocabulary) -> IntArray:
    if not len(ids):  # their type, which may be null, says nothing of the vocabulary
        return np.zeros(0, dtype=np.int64)
    if pa.types.is_dictionary(ids.type):
        known = _mapped(ids.dictionary, vocabulary)
        codes = ids.indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if codes.min() < 0 or codes.max() >= len(known):
            raise DataError(
                f"refers to values that its dictionary of {len(known)} has not. It is damaged: write the file anew."
            )
        return known[codes]
    if pa.types.is_integer(ids.type):
        return vocabulary.map_integers(integers(ids))
    return vocabulary.map_strings(ids)


def _flattened(array: pa.Array) -> tuple[pa.Array, IntArray]:
    """Returns the values of all lists and the lists' lengths; a null list is empty, whatever it hides."""
    lengths = pc.list_value_length(array).fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return array.flatten(), lengths.astype(np.int64, copy=False)


def _offsets(lengths: IntArray) -> IntArray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _as_float64(array: pa.Array) -> npt.NDArray[np.float64]:
    """Returns numbers, NaN for nulls."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    # Unsafe, since integers beyond 2**53 are rounded, as any number that float32 cannot hold is.
    values: npt.NDArray[Any] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.array(values, dtype=np.float64)


def _fits_float32(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Returns which numbers are finite, and still so as float32."""
    return np.abs(values) <= _LARGEST_FLOAT32


def _shown(value: pa.Scalar) -> str:
    """Returns an id as a message shows it, even if it is a string that is not UTF-8."""
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:
        return repr(pa.array([value]).cast(pa.large_string()).cast(pa.large_binary())[0].as_py())


def _scaled_to_one(weights: npt.NDArray[np.float32], lengths: IntArray) -> npt.NDArray[np.float32]:
    if not len(weights):
        return weights
    # Each row is summed by itself: a difference of running sums would depend on the rows that are read before it.
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=weights, minlength=len(lengths))
    scale = np.divide(1.0, sums, out=np.zeros_like(sums), where=np.abs(sums) > 1e-12)
    return (weights * np.repeat(scale, lengths)).astype(np.float32)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type


def _as_lists(array: pa.Array, value_type: pa.DataType) -> pa.Array:
    """Returns lists of values even where no row has one, and the file so does not tell their type."""
    no_values = pa.types.is_null(array.type) or pa.types.is_null(_value_type(array.type))
    return array.cast(pa.list_(value_type)) if no_values else array


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(pa.types.is_integer(kind) or is_string)


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    )
