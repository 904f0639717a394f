"""From Arrow columns to arrays, before the config's policies: every value that does not fit is found here.

Lists come straight from Arrow's values and lengths; slices, null lists that hide values, and both widths of offsets are
Arrow's own business (`flatten`, `list_value_length`). Only bad values are looked at one by one.
"""

from __future__ import annotations

__all__ = [
    "Parsed",
    "Words",
    "add_weights",
    "is_id",
    "is_list",
    "is_number",
    "is_text",
    "out_of_range",
    "parse_ids",
    "parse_lists",
    "parse_numbers",
    "parse_texts",
    "row_of",
    "words_of",
]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.data.columns import offsets_of
from embedshard.data.findings import Finding, Problem, Reason
from embedshard.data.mapped_ids import integers, is_string, viewed
from embedshard.data.text import TextVocabulary
from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import DataError

IntArray = npt.NDArray[np.int64]

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass
class Parsed:
    """A column before the config's policies.

    Attributes:
        values: rows of the table, int64, -1 for null and unknown ids; or numbers, float64, NaN for nulls, or float32 where
            the file has these and all fit. Those of lists and of texts one after another. It may be Arrow's memory.
        among: the same as they are in the file; of texts, the texts.
        findings: those that do not fit.
        lengths: of the lists or the texts, (n,) int64; None where there are none.
        weights: of the values, float64, 0 where they are bad; None without weights.
    """

    values: npt.NDArray[Any]
    among: pa.Array
    findings: list[Finding]
    lengths: IntArray | None = None
    weights: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Words:
    """The words of texts, before any table's rows.

    Attributes:
        texts: as they are in the file.
        ids: of all texts' words one after another, -1 for unknown ones.
        lengths: how many each text has; a null has none.
    """

    texts: pa.Array
    ids: IntArray
    lengths: IntArray


def parse_ids(name: str, column: str, array: pa.ChunkedArray | pa.Array, vocabulary: Vocabulary) -> Parsed:
    """Parses an id a row.

    Args:
        name: of the decoded column.
        column: of the Parquet file.
        array: its values.
        vocabulary: of the table.

    Raises:
        DataError: if the vocabulary knows no ids of this type.
    """
    ids = _one_array(array)
    rows, wrong = _rows_of(ids, vocabulary)
    return Parsed(rows, ids, [Finding(Problem(name, column, reason), places, places, ids) for reason, places in wrong])


def parse_lists(
    name: str, column: str, array: pa.ChunkedArray | pa.Array, vocabulary: Vocabulary, masks_zero: bool = False
) -> Parsed:
    """Parses a list of ids a row, as `parse_ids` does; without the zeros if those are padding."""
    ids, lengths = _flattened(_as_lists(_one_array(array), pa.int64()))
    if masks_zero:
        ids, lengths = _without_zeros(ids, lengths)
    rows, wrong = _rows_of(ids, vocabulary)
    return Parsed(
        rows,
        ids,
        [Finding(Problem(name, column, reason), row_of(places, lengths), places, ids) for reason, places in wrong],
        lengths,
    )


def words_of(array: pa.ChunkedArray | pa.Array, vocabulary: TextVocabulary) -> Words:
    """Returns the words of a text a row; a null has none.

    Raises:
        pa.ArrowInvalid: if a text is not UTF-8.
    """
    if pa.types.is_null(array.type):
        array = array.cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray) and array.num_chunks > 1 and pa.types.is_string(array.type):
        array = array.cast(pa.large_string())  # together they may be longer than a string's offsets can hold
    texts = _one_array(array)
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    ids, lengths = vocabulary.encoder.encode(texts.fill_null("") if texts.null_count else texts)
    return Words(texts, ids, lengths)


def parse_texts(name: str, column: str, words: Words, vocabulary: TextVocabulary) -> Parsed:
    """Parses a text a row, given its words. Unknown words are nothing to find: they are -1 among the values."""
    values, lengths = vocabulary.rows_of(words.ids, words.lengths)
    nulls = np.flatnonzero(words.texts.is_null().to_numpy(zero_copy_only=False))
    findings = [Finding(Problem(name, column, "null text"), nulls, nulls, words.texts)] if len(nulls) else []
    return Parsed(values, words.texts, findings, lengths)


def add_weights(parsed: Parsed, name: str, column: str, second: str, array: pa.ChunkedArray | pa.Array) -> None:
    """Adds a second column, the weights, to a parsed column of lists, and what is wrong with them.

    Args:
        parsed: the ids.
        name: of the decoded column.
        column: of the Parquet file, the one of the ids.
        second: of the Parquet file, the one of the weights.
        array: the weights.
    """
    assert parsed.lengths is not None, "ids with weights are lists"
    numbers, lengths = _flattened(_as_lists(_one_array(array), pa.float64()))
    weights = _as_float64(numbers)
    fits = lengths == parsed.lengths
    if not fits.all():
        rows = np.flatnonzero(~fits)
        told = pa.array([f"{parsed.lengths[row]} ids, {lengths[row]} weights" for row in rows])
        parsed.findings.append(Finding(Problem(name, column, "lengths differ"), rows, np.arange(len(rows)), told))
    null_ids = [finding.places for finding in parsed.findings if finding.problem.reason == "null id"]
    shifts = offsets_of(parsed.lengths)[:-1] - offsets_of(lengths)[:-1]
    for reason, places in _wrong_numbers(weights):
        weights[places] = 0.0
        rows = row_of(places, lengths)
        # The weight of no id, and of one that is not to be told, are nothing to look at.
        meant = fits[rows] & ~np.isin(places + shifts[rows], np.concatenate([np.zeros(0, np.int64), *null_ids]))
        if meant.any():
            parsed.findings.append(Finding(Problem(name, second, reason), rows[meant], places[meant], numbers))
    if not fits.all():
        aligned = np.zeros(len(parsed.values), dtype=np.float64)
        aligned[np.repeat(fits, parsed.lengths)] = weights[np.repeat(fits, lengths)]
        weights = aligned
    parsed.weights = weights


def out_of_range(name: str) -> Reason:
    """Returns what is wrong with a number that does not lie where it must."""
    return "negative weight" if name == "weight" else "label out of range"


def parse_numbers(name: str, column: str, array: pa.ChunkedArray | pa.Array, greatest: float | None = None) -> Parsed:
    """Parses a number a row; one with a greatest value must lie between 0 and that."""
    numbers = _one_array(array)
    fitting = _fitting_float32(numbers)
    if fitting is not None and (greatest is None or not len(fitting) or (fitting.min() >= 0 and fitting.max() <= greatest)):
        return Parsed(fitting, numbers, [])
    values = _as_float64(numbers)
    wrong = list(_wrong_numbers(values))
    if greatest is not None:
        outside = np.flatnonzero(((values < 0) | (values > greatest)) & (np.abs(values) <= _LARGEST_FLOAT32))
        wrong += [(out_of_range(name), outside)] if len(outside) else []
    findings = [Finding(Problem(name, column, reason), places, places, numbers) for reason, places in wrong]
    return Parsed(values, numbers, findings)


def row_of(places: IntArray, lengths: IntArray) -> IntArray:
    """Returns the list that each place among the values of all lists belongs to."""
    return np.searchsorted(np.cumsum(lengths), places, side="right").astype(np.int64, copy=False)


def _rows_of(ids: pa.Array, vocabulary: Vocabulary) -> tuple[IntArray, list[tuple[Reason, IntArray]]]:
    """Returns the table's row of each id, -1 for what has none, and the places of nulls and of unknown ids."""
    wrong: list[tuple[Reason, IntArray]] = []
    if not ids.null_count:
        rows = _mapped(ids, vocabulary)
        if not len(rows) or rows.min() >= 0:
            return rows, wrong
        is_unknown = rows < 0
    else:
        is_null = ids.is_null().to_numpy(zero_copy_only=False)
        rows = np.full(len(ids), -1, dtype=np.int64)
        rows[~is_null] = _mapped(ids.drop_null(), vocabulary)
        wrong.append(("null id", np.flatnonzero(is_null)))
        is_unknown = (rows < 0) & ~is_null
    if is_unknown.any():
        wrong.append(("unknown id", np.flatnonzero(is_unknown)))
    return rows, wrong


def _wrong_numbers(values: npt.NDArray[np.float64]) -> Iterable[tuple[Reason, IntArray]]:
    fits = np.abs(values) <= _LARGEST_FLOAT32
    if fits.all():
        return
    is_missing = np.isnan(values)
    if is_missing.any():
        yield "missing number", np.flatnonzero(is_missing)
    is_infinite = ~fits & ~is_missing
    if is_infinite.any():
        yield "infinite number", np.flatnonzero(is_infinite)


# ------------------------------------------------------------------------------------------------------- Arrow's types
def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        if pa.types.is_dictionary(column.type):
            column = column.unify_dictionaries()
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # more values than one array's offsets can hold
        column = pa.concat_arrays([chunk.cast(pa.large_list(chunk.type.value_type)) for chunk in column.chunks])
    return _plain(column)


def _plain(array: pa.Array) -> pa.Array:
    """Returns values whose nulls are all to be seen and can be dropped.

    A dictionary may hold a null, which its array does not count; and Arrow has no filter for string views.
    """
    if pa.types.is_string_view(array.type):
        return array.cast(pa.large_string())
    is_hidden = pa.types.is_dictionary(array.type) and array.dictionary.null_count
    return array.dictionary_decode() if is_hidden else array


def _mapped(ids: pa.Array, vocabulary: Vocabulary) -> IntArray:
    """Returns the row of each id, -1 for an unknown one; there are no nulls among them."""
    if not len(ids):  # their type, which may be null, says nothing of the vocabulary
        return np.zeros(0, dtype=np.int64)
    if pa.types.is_dictionary(ids.type):
        known = _mapped(ids.dictionary, vocabulary)
        codes = ids.indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if codes.min() < 0 or codes.max() >= len(known):
            raise DataError(f"refers to values that its dictionary of {len(known)} has not. Write the file anew.")
        return known[codes]
    if pa.types.is_integer(ids.type):
        return vocabulary.map_integers(integers(ids))
    return vocabulary.map_strings(ids)


def _flattened(array: pa.Array) -> tuple[pa.Array, IntArray]:
    """Returns the values of all lists and the lists' lengths; a null list is empty, whatever it hides."""
    if pa.types.is_list(array.type) and not array.null_count and len(array):
        offsets = np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, array.offset * 4)
        first, last = int(offsets[0]), int(offsets[-1])
        return _plain(array.values.slice(first, last - first)), np.diff(offsets).astype(np.int64)
    lengths = pc.list_value_length(array).fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return _plain(array.flatten()), lengths.astype(np.int64, copy=False)


def _without_zeros(ids: pa.Array, lengths: IntArray) -> tuple[pa.Array, IntArray]:
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if not len(ids):  # their type says nothing
        return ids, lengths
    if not pa.types.is_integer(ids.type):
        raise DataError(
            f"holds lists of {ids.type}, but its feature says mask_zero: integers, of which 0 is padding. "
            f"Leave mask_zero out."
        )
    is_padding = pc.equal(ids, pa.scalar(0, ids.type)).fill_null(False).to_numpy(zero_copy_only=False)
    if not is_padding.any():
        return ids, lengths
    padding = np.bincount(row_of(np.flatnonzero(is_padding), lengths), minlength=len(lengths))
    return ids.filter(pa.array(~is_padding)), lengths - padding


def _fitting_float32(array: pa.Array) -> npt.NDArray[np.float32] | None:
    """Returns numbers as the file has them, if it has float32 and all of them are finite."""
    if array.type != pa.float32() or array.null_count:
        return None
    values: npt.NDArray[np.float32] = viewed(array, np.float32)
    # The least and the greatest are NaN where any is.
    return values if not len(values) or (np.isfinite(values.min()) and np.isfinite(values.max())) else None


def _as_float64(array: pa.Array) -> npt.NDArray[np.float64]:
    """Returns numbers, NaN for nulls."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    # Unsafe, since integers beyond 2**53 are rounded, as any number that float32 cannot hold is.
    values: npt.NDArray[Any] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.array(values, dtype=np.float64)


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _as_lists(array: pa.Array, value_type: pa.DataType) -> pa.Array:
    """Returns lists of values even where no row has one, and the file so does not tell their type."""
    no_values = pa.types.is_null(array.type) or pa.types.is_null(array.type.value_type)
    return array.cast(pa.list_(value_type)) if no_values else array


def is_id(kind: pa.DataType) -> bool:
    """Returns whether a vocabulary can know values of a type."""
    if pa.types.is_null(kind):
        return True
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind)) or is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Returns whether values of a type are strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_string(kind)


def is_number(kind: pa.DataType) -> bool:
    """Returns whether values of a type are numbers."""
    if pa.types.is_null(kind):
        return True
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    )
