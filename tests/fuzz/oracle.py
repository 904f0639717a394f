"""What must come of a case's rows, one Python value at a time, without Arrow and without the project's decoder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.fuzz.cases import Case

MASK = 2**64 - 1


class Refused(Exception):
    """A value that must not be decoded."""


Row = dict[str, Any]
"""Feature, label or weight to an int, a float, or a list of (row of the table, weight or None)."""


def decoded_rows(case: Case, statistics: dict[str, tuple[float, float]]) -> list[Row | None]:
    """Returns each row of the case as it must be decoded; None where it must be refused."""
    return [_row(case, row, statistics) for row in case.rows]


def _row(case: Case, row: dict[str, Any], statistics: dict[str, tuple[float, float]]) -> Row | None:
    decoded: Row = {}
    try:
        for name, feature in case.tree["features"].items():
            value = row[feature.get("column", name)]
            match feature["kind"]:
                case "id":
                    decoded[name] = table_row(case, feature, value)
                case "dense":
                    decoded[name] = _number(value, feature, statistics.get(name))
                case _:
                    decoded[name] = _bag(case, feature, value, row.get(feature.get("weights")))
        for name, column in case.config.data.label_columns.items():
            decoded[f"label:{name}"] = _number(row[column], {}, None)
        if case.config.data.weight is not None:
            decoded["weight"] = _number(row[case.config.data.weight], {}, None)
            if decoded["weight"] < 0:
                return None
    except Refused:
        return None
    return decoded


def table_row(case: Case, feature: dict[str, Any], value: Any) -> int:
    """Returns the row of an id."""
    if value is None:
        raise Refused
    table = case.tree["tables"][feature["table"]]
    if "rows" in table:
        if isinstance(value, str):
            raise Refused
        rows, known = table["rows"], value if 0 <= value < table["rows"] else None
    elif feature["table"] in case.vocabularies:
        ids = case.vocabularies[feature["table"]]
        if isinstance(value, str) != isinstance(ids[0], str):
            raise Refused
        rows, known = len(ids), ids.index(value) if value in ids else None
    else:
        spec = table["vocabulary"]
        rows, known = spec["rows"], _hash(value, spec["seed"]) % spec["rows"]
    if known is not None:
        return known
    if feature["unknown"] == "oov":
        return rows
    raise Refused


def _hash(value: Any, seed: int) -> int:
    word = value
    if isinstance(value, str):
        word = 0xCBF29CE484222325
        for byte in value.encode():
            word = ((word ^ byte) * 0x100000001B3) & MASK
    word = (word + (seed + 1) * 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def _bag(case: Case, feature: dict[str, Any], ids: Any, weights: Any) -> list[tuple[int, float | None]]:
    pairs: list[tuple[int, float | None]] = [(table_row(case, feature, one), None) for one in ids or []]
    if "weights" in feature:
        if len(weights or []) != len(pairs):
            raise Refused
        pairs = [(row, _single(weight)) for (row, _), weight in zip(pairs, weights or [], strict=True)]
    length = feature.get("max_length")
    if length is not None:
        pairs = pairs[:length] if feature["keep"] == "first" else pairs[-length:]
    if "weights" in feature and feature["pooling"] == "mean":
        total = sum(weight for _, weight in pairs)
        pairs = [(row, weight / total if abs(total) > 1e-12 else 0.0) for row, weight in pairs]
    return pairs


def _number(value: Any, feature: dict[str, Any], moments: tuple[float, float] | None) -> float:
    if value is None or math.isnan(value):
        if feature.get("missing") == "zero":
            return 0.0
        raise Refused
    _single(value)
    number = float(value)
    if feature.get("normalise") == "log1p":
        number = math.copysign(math.log1p(abs(number)), number)
    elif feature.get("normalise") == "standardise":
        assert moments is not None
        number = (number - moments[0]) / moments[1]
    return _single(number)


def _single(number: Any) -> float:
    """Returns a number as float32 holds it."""
    if number is None or not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise Refused
    return float(np.float32(number))
