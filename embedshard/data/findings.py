"""What can be wrong with a value. The decoder finds it, in one place; the config says what is done about it."""

from __future__ import annotations

__all__ = ["Action", "Finding", "Problem", "Reason", "shown", "text_of"]

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.int64]

Reason = Literal[
    "null id",
    "null text",
    "unknown id",
    "lengths differ",
    "missing number",
    "infinite number",
    "negative weight",
    "label out of range",
]
"""`lengths differ`: of a row's ids and weights. `missing number`: null or NaN. `infinite number`: as float32."""

Action = Literal["error", "quarantine", "oov", "empty", "zero"]
"""What is done about a bad value: stop the run, set its row aside, or put something in its place."""


@dataclass(frozen=True)
class Problem:
    """One thing that can be wrong with the values of a Parquet column.

    Attributes:
        name: of the decoded column that cannot use them: a feature, `label:<name>`, `weight` or `candidates`.
        column: of the Parquet file.
        reason: what is wrong.
    """

    name: str
    column: str
    reason: Reason

    def __str__(self) -> str:
        return f"{self.column}: {self.reason}"


@dataclass(frozen=True)
class Finding:
    """The bad values of one kind in a table.

    Attributes:
        problem: what is wrong with them.
        rows: the table's row of each, (n,) int64, ascending; a list may hold several.
        places: where each is in `among`, (n,) int64.
        among: the values of the column, those of all lists one after another.
    """

    problem: Problem
    rows: IntArray
    places: IntArray
    among: pa.Array

    def __len__(self) -> int:
        """How many values are bad."""
        return len(self.rows)

    def value(self, number: int) -> str | None:
        """Returns the text of the number-th of them; None for a null."""
        return text_of(self.among[int(self.places[number])])


def text_of(value: pa.Scalar) -> str | None:
    """Returns a value as text, even a string that is not UTF-8; None for a null."""
    if not value.is_valid:
        return None
    try:
        return str(value.as_py())
    except UnicodeDecodeError:
        return _raw(value).decode("utf-8", "replace")


def shown(value: pa.Scalar) -> str:
    """Returns a value as a message shows it, even a string that is not UTF-8."""
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:
        return repr(_raw(value))


def _raw(value: pa.Scalar) -> bytes:
    array = pa.array([value])
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    raw: bytes = array.cast(pa.large_string()).cast(pa.large_binary())[0].as_py()
    return raw
