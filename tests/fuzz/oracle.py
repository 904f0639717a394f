"""What must come of a case's rows, one Python value at a time, without Arrow and without the project's decoder."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
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
    words = {word: number for number, word in enumerate(known_words(case))}
    return [_row(case, row, statistics, words) for row in case.rows]


def _row(case: Case, row: dict[str, Any], statistics: dict[str, tuple[float, float]], words: dict[str, int]) -> Row | None:
    decoded: Row = {}
    try:
        for name, feature in case.tree["features"].items():
            value = row[feature.get("column", name)]
            match feature["kind"]:
                case "id":
                    decoded[name] = table_row(case, feature, value)
                case "dense":
                    decoded[name] = _number(value, feature, statistics.get(name))
                case "text":
                    decoded[name] = _text(case, feature, value, words)
                case _:
                    decoded[name] = _bag(case, feature, value, row.get(feature.get("weights")))
        for name, column in case.config.data.label_columns.items():
            decoded[f"label:{name}"] = _number(row[column], {}, None)
            if case.tree["objective"]["kind"] == "bce" and not 0 <= row[column] <= 1:
                return None
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
    listed = [one for one in ids or [] if not (feature.get("mask_zero") and one is not None and one == 0)]
    listed = [one for one in listed if not (one is None and feature.get("null") == "empty")]
    pairs: list[tuple[int, float | None]] = [(table_row(case, feature, one), None) for one in listed]
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


# -------------------------------------------------------------------------------------------------------------- texts
def known_words(case: Case) -> list[str]:
    """Returns the words that a tokenizer of the case's texts knows, most frequent first; one that is never met if none."""
    if "words" not in case.tree["tables"]:
        return []
    spec, column = case.tree["tables"]["words"]["vocabulary"], case.tree["features"]["words"]["column"]
    counts = Counter(word for row in case.rows for word in words_of(row[column] or "", spec))
    met = [word for word in counts if counts[word] >= spec["min_count"]]
    return sorted(met, key=lambda word: (-counts[word], word.encode()))[: spec["num_words"]] or ["never met"]


def words_of(text: str, spec: dict[str, Any]) -> Iterator[str]:
    """Yields the words of a text as a vocabulary of the kind `words` divides it, character by character."""
    if spec["strip_html"]:
        text = re.sub("</?[A-Za-z][^<>]*>", " ", text)
    if spec["lower"]:
        text = text.lower()
    if spec["punctuation"] == "keep":
        yield from text.split()
        return
    place = 0
    while place < len(text):
        end = place
        while end < len(text) and (_is_letter(text[end]) or (end > place and _is_inner_apostrophe(text, end))):
            end += 1
        if end > place:
            yield text[place:end]
        elif spec["punctuation"] == "separate" and not text[place].isspace():
            yield text[place]
        place = max(end, place + 1)


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _is_inner_apostrophe(text: str, place: int) -> bool:
    between = text[place] in "'\u2019" and place + 1 < len(text)
    return between and _is_letter(text[place - 1]) and _is_letter(text[place + 1])


def _text(case: Case, feature: dict[str, Any], text: str | None, words: dict[str, int]) -> list[tuple[int, None]]:
    if text is None and feature["null"] == "error":
        raise Refused
    numbers = [words.get(word) for word in words_of(text or "", case.tree["tables"]["words"]["vocabulary"])]
    spec = case.tree["tables"][feature["table"]]["vocabulary"]
    if spec["kind"] == "word_ngrams":
        known = [len(words) if number is None else number for number in numbers]
        rows = [
            _hash_of_run(known[begin : begin + size], spec["seed"]) % spec["rows"]
            for begin in range(len(known))
            for size in sorted(spec["n"])
            if begin + size <= len(known)
        ]
    elif feature["unknown"] == "oov":
        rows = [len(words) if number is None else number for number in numbers]
    else:
        rows = [number for number in numbers if number is not None]
    length = feature.get("max_length")
    if length is not None:
        rows = rows[:length] if feature["truncation"] == "post" else rows[-length:]
    if feature.get("distinct"):
        rows = sorted(set(rows))
    return [(row, None) for row in rows]


def _hash_of_run(numbers: list[int], seed: int) -> int:
    word = 0
    for number in numbers:
        word = _hash((word + number) & MASK, seed)
    return word


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
