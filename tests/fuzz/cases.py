"""Random data sets: a case is a config and Parquet files, and its number makes all of it anew.

Values are plain Python: the oracle never sees what pyarrow or the project made of them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.config import Config, build_config

WORDS = ["", "a", "ab", "Käse", "naïve", "x" * 70, "🧀", "A", " ", "user-7", "0", "\n", "z\0z"]
PIECES = [
    "good", "Good", "bad", "Bad", "film", "it's", "l\u2019été", "'tis", "Käse", "e\u0301", "ÉTÉ", "x1", "42", "🧀", "<b>",
    "</i>", "<br />", "<BR\n/>", "1 < 2", "a<b", "R&B", "well-made", "...", "!", "''", "日本", "٣", "_", "<>", "ß",
]  # fmt: skip
SPACES = [" ", " ", " ", "", "  ", "\n", "\t", "\u00a0", ", ", "-", "'"]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal32(9, 3), pa.decimal64(15, 3), pa.decimal128(20, 3), pa.decimal256(40, 3)]
STRINGS = [pa.string(), pa.large_string(), pa.string_view()]
LIMITS = {kind: (np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max) for kind in INTEGERS}
LARGEST = {number: float(np.finfo(number).max) for number in (np.float16, np.float32, np.float64)}
TROUBLES = ["null", "unknown", "other kind", "not finite", "too large", "lengths", "type", "missing", "twice", "empty"]


@dataclass
class File:
    """A file of a case: which rows it holds, of which types, written how.

    Attributes:
        groups: rows of each row group.
        table: its rows as Arrow holds them before they are written: sliced, chunked, with values under nulls.
        options: of the writer.
    """

    groups: list[int]
    table: pa.Table
    options: dict[str, Any]


@dataclass
class Case:
    """A config, the values of all rows, and the files that hold them.

    Attributes:
        number: makes it.
        tree: the config's.
        config: built of it.
        vocabularies: ids in row order, of tables whose vocabulary is a file.
        rows: of the data set in file order: column to value.
        files: in the order of their names.
        trouble: what may not fit.
        random: what is still to be drawn, as how it is read.
    """

    number: int
    tree: dict[str, Any]
    config: Config
    vocabularies: dict[str, list[Any]]
    random: random.Random
    trouble: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[File] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether the files' columns are not what the config needs, so that they cannot be opened."""
        return self.trouble in ("type", "missing", "twice", "empty")

    def group_sizes(self) -> list[int]:
        """Returns the rows of all row groups."""
        return [size for file in self.files for size in file.groups]

    def write(self, folder: Path) -> list[Path]:
        """Writes the files."""
        return [write_file(folder / f"{self.number}-{place}.parquet", file) for place, file in enumerate(self.files)]


def make_case(number: int, folder: Path) -> Case:
    """Makes a case.

    Args:
        number: what it is made of.
        folder: where vocabularies are written.
    """
    draw = random.Random(number)
    trouble = draw.choice(TROUBLES) if draw.random() < 0.45 else None
    case = _config(number, draw, trouble, folder)
    columns = _columns(case)
    sizes = _file_sizes(draw, trouble)
    drawn = {column: [_value(draw, case, *plan) for _ in range(sum(map(sum, sizes)))] for column, plan in columns.items()}
    _add_nulls_and_padding(draw, case, drawn)
    _lengths_agree(draw, case, drawn)
    if trouble is not None:
        _spoil_values(draw, trouble, case, columns, drawn)
    case.rows = [dict(zip(drawn, row, strict=True)) for row in zip(*drawn.values(), strict=True)]
    kinds = {column: _kinds(case, *plan) for column, plan in columns.items()}
    first = 0
    for groups in sizes:
        values = {column: values[first : first + sum(groups)] for column, values in drawn.items()}
        arrays = {column: _array(draw, values[column], columns[column][0] == "lists", kinds[column]) for column in columns}
        first += sum(groups)
        case.files.append(File(groups, pa.table(arrays), {}))
    if trouble in ("type", "missing", "twice"):
        _spoil_schema(draw, trouble, draw.choice(case.files))
    for file in case.files:
        _add_columns(draw, file)
        file.options = _options(draw, file.table.schema)
    return case


# ---------------------------------------------------------------------------------------------------------- the config
def _config(number: int, draw: random.Random, trouble: str | None, folder: Path) -> Case:
    vocabularies: dict[str, list[Any]] = {}
    tables = {name: _table(draw, number, name, folder, vocabularies) for name in ("user", "item")}
    unknown = lambda: draw.choice(["error", "error", "oov"])  # noqa: E731
    features: dict[str, Any] = {
        "user_id": {"kind": "id", "table": "user", "unknown": unknown()},
        "item_id": {"kind": "id", "table": "item", "unknown": unknown()},
    }
    for name in ("history", "likes"):
        if draw.random() < 0.4:
            length = (
                {"max_length": draw.randint(1, 4), "keep": draw.choice(["first", "last"])} if draw.random() < 0.5 else {}
            )
            pooling = draw.choice(["sum", "mean"])
            features[name] = {
                "kind": "bag",
                "table": draw.choice(["user", "item"]),
                "pooling": pooling,
                "unknown": unknown(),
            }
            features[name] |= length | _nulls_and_padding(draw, number, features[name]["table"], tables, vocabularies)
    if draw.random() < 0.3:
        length = {"max_length": draw.randint(1, 4), "keep": draw.choice(["first", "last"])} if draw.random() < 0.5 else {}
        features["clicks"] = {"kind": "sequence", "table": draw.choice(["user", "item"]), "unknown": unknown()} | length
        features["clicks"] |= _nulls_and_padding(draw, number, features["clicks"]["table"], tables, vocabularies)
    if draw.random() < 0.4:
        length = {"max_length": draw.randint(1, 4), "keep": draw.choice(["first", "last"])} if draw.random() < 0.5 else {}
        features["basket"] = {
            "kind": "weighted_bag",
            "table": draw.choice(["user", "item"]),
            "weights": "basket_weights",
            "pooling": draw.choice(["sum", "mean"]),
            "unknown": unknown(),
        } | length
    for name in ("age", "price"):
        if draw.random() < 0.4:
            normalise = draw.choice(["none", "log1p", "standardise"])
            features[name] = {"kind": "dense", "normalise": normalise, "missing": draw.choice(["error", "zero"])}
    for name in list(features):
        if draw.random() < 0.2:
            features[name]["column"] = f"{name}.column" if draw.random() < 0.5 else f"{name} ü"
    if draw.random() < 0.25:
        _add_texts(draw, features, tables)
    lanes = draw.choice([1, 2, 3, 4])
    in_towers = [name for name, one in features.items() if one["kind"] != "sequence" and one.get("pooling", "") is not None]
    tree: dict[str, Any] = {
        "seed": number,
        "data": {"train": "unread", "lanes": lanes, "shuffle": draw.random() < 0.8},
        "features": features,
        "tables": tables,
        "model": {
            "kind": "two_tower",
            "user": {"features": [name for name in in_towers if name != "item_id"], "mlp": [4]},
            "item": {"features": ["item_id"], "mlp": [4]},
        },
        "objective": {"kind": "in_batch_softmax"},
        "train": {"global_batch_size": lanes * draw.randint(1, 6), "epochs": draw.choice([1, 1, 2])},
    }
    if draw.random() < 0.5:
        tree["data"]["weight"] = "sample_weight"
    match draw.randrange(3):
        case 1:
            tree["data"]["label"] = "rating"
            tree["objective"] = {"kind": draw.choice(["mse", "bce"])}
        case 2:
            tree["data"]["labels"] = {"click": "clicked", "buy": "bought"}
    return Case(number, tree, build_config(tree, {}, "fuzz"), vocabularies, draw, trouble)


def _nulls_and_padding(
    draw: random.Random, number: int, table: str, tables: dict[str, Any], vocabularies: dict[str, list[Any]]
) -> dict[str, Any]:
    """Draws what a list's feature says of nulls and of zeros, which only integers can be."""
    known = vocabularies.get(table, WORDS if number % 3 == 0 and "rows" not in tables[table] else [0])
    masks = not isinstance(known[0], str) and draw.random() < 0.3
    return {"null": draw.choice(["error", "error", "empty"]), "mask_zero": masks}


def _add_texts(draw: random.Random, features: dict[str, Any], tables: dict[str, Any]) -> None:
    """Adds a text, and maybe the runs of words of the same column."""
    tables["words"] = {"dim": 4, "vocabulary": {
        "kind": "words",
        "num_words": draw.choice([None, 1, 3, 8]),
        "min_count": draw.choice([1, 1, 2]),
        "lower": draw.random() < 0.5,
        "strip_html": draw.random() < 0.5,
        "punctuation": draw.choice(["remove", "separate", "keep"]),
    }}  # fmt: skip
    runs = {
        "kind": "word_ngrams", "of": "words", "n": draw.choice([[1], [2], [3, 1], [2, 1, 4]]),
        "rows": draw.choice([1, 50, 2**40]), "seed": draw.randrange(3),
    }  # fmt: skip
    column = draw.choice(["words", "review ü"])
    for name in ["words", "runs"] if draw.random() < 0.5 else ["words"]:
        length = (
            {"max_length": draw.randint(1, 5), "truncation": draw.choice(["pre", "post"])} if draw.random() < 0.6 else {}
        )
        features[name] = {
            "kind": "text",
            "table": name,
            "column": column,
            "pooling": draw.choice(["sum", "mean", None]),
            "unknown": draw.choice(["oov", "empty"]),
            "null": draw.choice(["error", "empty"]),
        } | length
        if features[name]["pooling"] is not None:
            features[name]["distinct"] = draw.random() < 0.3
    if "runs" in features:
        tables["runs"] = {"dim": 4, "vocabulary": runs}


def _table(draw: random.Random, number: int, name: str, folder: Path, vocabularies: dict[str, list[Any]]) -> dict[str, Any]:
    kind = draw.choice([*["identity"] * 3, *["hash"] * 3, "file of integers", "file of strings"])
    if kind == "identity":
        return {"dim": 4, "rows": draw.choice([1, 7, 40, 200, 70_000])}
    if kind == "hash":
        return {"dim": 4, "vocabulary": {"kind": "hash", "rows": draw.choice([1, 13, 1000]), "seed": draw.randrange(3)}}
    if kind == "file of integers":
        edges, integer = draw.choice([([-5, -(2**63), 2**63 - 1], pa.int64()), ([2**63, 2**64 - 1], pa.uint64())])
        ids: list[Any] = draw.sample([*range(100), *edges], draw.randint(1, 30))
        array = pa.array(ids, integer)
    else:
        ids = draw.sample(WORDS, draw.randint(1, len(WORDS)))
        array = pa.array(ids, pa.string())
    path = folder / f"{number}-{name}.ids"
    pq.write_table(pa.table({"id": array}), path)
    vocabularies[name] = ids
    return {"dim": 4, "vocabulary": {"kind": "file", "path": str(path)}}


def _columns(case: Case) -> dict[str, tuple[str, str | None]]:
    """Returns what each Parquet column holds: `ids`, `lists`, `texts` or a kind of numbers; and of which table."""
    columns: dict[str, tuple[str, str | None]] = {}
    for name, feature in case.tree["features"].items():
        column = feature.get("column", name)
        numbers = case.random.choice(["integers", "bits", "eighths", "any"])
        kind = {"id": "ids", "text": "texts", "dense": numbers}.get(feature["kind"], "lists")
        columns[column] = (kind, feature.get("table"))
        if "weights" in feature:
            columns[feature["weights"]] = ("lists", None)
    of_labels = ["integers", "bits", "eighths", "any"]
    if case.tree["objective"]["kind"] == "bce":
        of_labels = ["bits", "bits", "bits", "eighths"]  # numbers that it does not learn now and then
    for column in case.config.data.label_columns.values():
        columns[column] = (case.random.choice(of_labels), None)
    if case.config.data.weight is not None:
        columns[case.config.data.weight] = ("positive", None)
    return columns


# ---------------------------------------------------------------------------------------------------------- the values
def _file_sizes(draw: random.Random, trouble: str | None) -> list[list[int]]:
    if trouble == "empty":
        return [[0] * draw.randrange(3) for _ in range(draw.randint(1, 2))]
    group = lambda: draw.choice([0, 1, 2, 5, draw.randint(0, 20)])  # noqa: E731
    sizes = [[group() for _ in range(draw.choice([0, 1, 1, 2, 3]))] for _ in range(draw.choice([1, 1, 2, 3]))]
    return sizes if sum(map(sum, sizes)) else [[1]]


def _value(draw: random.Random, case: Case, kind: str, table: str | None) -> Any:
    if kind == "lists":
        if draw.random() < 0.2:
            return None
        one = (lambda: _id(draw, case, table)) if table is not None else (lambda: draw.randint(-40, 80) / 8)
        return [one() for _ in range(draw.choice([0, 1, 2, 2, 5]))]
    if kind == "ids":
        return _id(draw, case, table)
    if kind == "texts":
        return "".join(draw.choice(PIECES) + draw.choice(SPACES) for _ in range(draw.choice([0, 1, 3, 7])))
    match kind:
        case "bits":
            return draw.randrange(2)
        case "integers":
            return draw.choice([0, 1, -1, 100, 2**53 + 1, draw.randint(-(2**63), 2**63 - 1)])
        case "eighths":
            return draw.randint(-400, 400) / 8
        case "positive":
            return draw.randint(0, 400) / 8
        case _:
            return draw.choice([draw.uniform(-1e6, 1e6), draw.uniform(-1, 1), 0.0, -0.0, 1e-310, 3e38])


def _id(draw: random.Random, case: Case, table: str | None) -> Any:
    """Draws an id that the table's vocabulary knows, if it knows any."""
    assert table is not None
    if table in case.vocabularies:
        return draw.choice(case.vocabularies[table] or [0])
    spec = case.tree["tables"][table]
    if "rows" in spec:
        return draw.randrange(min(spec["rows"], draw.choice([10, 70_000])))
    if _is_hashed_text(case, table):
        return draw.choice(WORDS)
    return draw.choice([draw.randrange(100), draw.randrange(2**63), draw.randrange(2**64) if case.number % 3 == 1 else -7])


def _is_hashed_text(case: Case, table: str) -> bool:
    return case.number % 3 == 0 and "rows" not in case.tree["tables"][table] and table not in case.vocabularies


def _add_nulls_and_padding(draw: random.Random, case: Case, drawn: dict[str, list[Any]]) -> None:
    """Puts nulls and zeros where they are no mistake."""
    for name, feature in case.tree["features"].items():
        column = feature.get("column", name)
        extra = [None] * (feature.get("null") == "empty") + [0] * feature.get("mask_zero", False)
        if feature["kind"] == "text":
            policies = {one["null"] for one in case.tree["features"].values() if one.get("column") == column}
            drawn[column] = [None if policies == {"empty"} and draw.random() < 0.1 else one for one in drawn[column]]
        elif extra and draw.random() < 0.6:
            drawn[column] = [_padded(draw, value, extra) if value else value for value in drawn[column]]


def _padded(draw: random.Random, value: list[Any], extra: list[Any]) -> list[Any]:
    """Returns a list with what falls out of it anywhere in it."""
    for _ in range(draw.choice([0, 1, 1, 3])):
        value.insert(draw.randint(0, len(value)), draw.choice(extra))
    return value


def _lengths_agree(draw: random.Random, case: Case, drawn: dict[str, list[Any]]) -> None:
    """Gives each list of ids as many weights."""
    basket = case.tree["features"].get("basket")
    if basket is None:
        return
    ids, weights = drawn[basket.get("column", "basket")], drawn["basket_weights"]
    for row, listed in enumerate(ids):
        if listed:
            weights[row] = [draw.choice([0.0, 0.5, 1.0, -2.0, 3.25]) for _ in listed]
        else:
            weights[row] = draw.choice([None, []])


def _spoil_values(
    draw: random.Random, trouble: str, case: Case, columns: dict[str, tuple[str, str | None]], drawn: dict[str, list[Any]]
) -> None:
    """Puts values that do not fit into some rows of a column, wherever they may stand in it."""
    column = draw.choice(list(columns))
    kind, table = columns[column]
    if kind == "texts" and trouble != "null":
        return  # any text has words, and those that are unknown are no mistake
    values = drawn[column]
    holds_ids = table is not None
    spoilt: list[Any] = [None]
    if trouble == "unknown":
        known = [value for value in _flat(values) if value is not None]
        if any(isinstance(value, str) for value in known):
            spoilt = ["unknown", "Ä"]
        elif holds_ids and (min(known, default=0) < 0 or (draw.random() < 0.5 and max(known, default=0) < 2**63)):
            spoilt = [-1, -7, 10**6, 2**63 - 1, -(2**63)]
        elif holds_ids:
            spoilt = [10**6, 2**63 - 1, 2**63, 2**64 - 1]
    elif trouble == "other kind" and holds_ids:
        is_text = any(isinstance(value, str) for value in _flat(values))
        values[:] = [_mapped(value, lambda one: 3 if is_text else "a word") for value in values]
        return
    elif trouble in ("not finite", "too large") and not holds_ids:
        values[:] = [_mapped(value, lambda one: one if one is None else np.float64(one).item()) for value in values]
        spoilt = [math.nan, math.inf, -math.inf] if trouble == "not finite" else [1e300, -4e38, 3.5e38, -1.5]
    elif trouble == "lengths" and kind == "lists":
        values[:] = [
            value if draw.random() < 0.7 else draw.choice([None, [], [values[0][0]] if values[0] else []])
            for value in values
        ]
        return
    rate = draw.choice([0.02, 0.2, 1.0])
    for row, value in enumerate(values):
        if draw.random() < rate:
            one = draw.choice(spoilt)
            if kind != "lists":
                values[row] = one
            elif value:
                values[row] = [one if draw.random() < 0.5 else old for old in value]


def _flat(values: list[Any]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _mapped(value: Any, change: Any) -> Any:
    if value is None:
        return None
    return [change(one) for one in value] if isinstance(value, list) else change(value)


# ---------------------------------------------------------------------------------------------------------- the arrays
def _kinds(case: Case, kind: str, table: str | None) -> list[pa.DataType]:
    """Returns the types of a column's values, where there are none to tell."""
    if table is None:
        return [*INTEGERS, *FLOATS, *DECIMALS, pa.bool_()]
    known = case.vocabularies.get(table, WORDS if _is_hashed_text(case, table) else [0])
    return STRINGS if kind == "texts" or isinstance(known[0], str) else INTEGERS


def _array(draw: random.Random, values: list[Any], is_list: bool, kinds: list[pa.DataType]) -> pa.ChunkedArray:
    """Returns the values as one of the types that hold them, sliced out of more rows, in some chunks."""
    before, after = draw.choice([0, 0, 1, 3]), draw.choice([0, 0, 2])
    filler = [value for value in values if value is not None][:1] or [None]
    padded = filler * before + values + filler * after
    whole = _lists(draw, padded, kinds) if is_list else _flat_array(draw, padded, kinds)
    array = whole.slice(before, len(values))
    if pa.types.is_dictionary(array.type) or draw.random() < 0.6:
        return pa.chunked_array([array])
    cuts = sorted(draw.randint(0, len(values)) for _ in range(draw.randint(1, 2)))
    return pa.chunked_array(
        [array.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)], array.type
    )


def _flat_array(draw: random.Random, values: list[Any], kinds: list[pa.DataType]) -> pa.Array:
    distinct = set(values) - {None}
    if distinct and pa.bool_() not in kinds:
        kinds = [*INTEGERS, *STRINGS]
    if not distinct and draw.random() < 0.4:
        kinds = [pa.null()]
    first = draw.randrange(len(kinds))
    kind = next(kind for kind in kinds[first:] + kinds[:first] if all(_holds(kind, value) for value in distinct))
    array = pa.array([_as(kind, value) for value in values], kind)
    if not pa.types.is_null(kind) and kind not in (pa.string_view(), pa.float16(), *DECIMALS[:2]) and draw.random() < 0.25:
        array = array.dictionary_encode()
        if draw.random() < 0.5:
            array = array.cast(pa.dictionary(draw.choice([pa.int8(), pa.uint16(), pa.int64()]), kind))
    return array


def _lists(draw: random.Random, values: list[Any], kinds: list[pa.DataType]) -> pa.Array:
    if all(value is None for value in values) and draw.random() < 0.3:
        return pa.nulls(len(values))
    hides = draw.random() < 0.3
    hidden = next((value for value in values if value), []) if hides else []
    shown = [hidden if value is None else value for value in values]
    lengths = {len(value) for value in values if value is not None}
    fixed = len(lengths) == 1 and 0 not in lengths
    if fixed and draw.random() < 0.7:
        shown = [next(v for v in values if v is not None) if value is None else value for value in values]
    else:
        fixed = False
    inner = _flat_array(draw, [one for value in shown for one in value], kinds)
    mask = pa.array([value is None for value in values], pa.bool_())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(inner, lengths.pop(), mask=mask)
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in shown], dtype=np.int64)])
    if draw.random() < 0.3:
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), inner, mask=mask)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, mask=mask)


def _holds(kind: pa.DataType, value: Any) -> bool:
    """Whether a type holds a value exactly."""
    if value is None:
        return True
    if isinstance(value, str) or kind in STRINGS:
        return isinstance(value, str) and kind in STRINGS
    if pa.types.is_boolean(kind):
        return value in (0, 1)
    if not math.isfinite(value):
        return bool(pa.types.is_floating(kind))
    if pa.types.is_integer(kind):
        fits = LIMITS[kind][0] <= value <= LIMITS[kind][1]
        return fits and int(value) == value and not (value == 0 and math.copysign(1, value) < 0)
    if pa.types.is_decimal(kind):
        return isinstance(value, float) and abs(value) < 1e5 and value * 8 == int(value * 8)
    if isinstance(value, int):
        return False  # ids are no floats, and numbers that are integers stay what they are
    number = kind.to_pandas_dtype()
    return abs(value) <= LARGEST[number] and float(number(value)) == value


def _as(kind: pa.DataType, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if pa.types.is_boolean(kind):
        return bool(value)
    if pa.types.is_integer(kind):
        return int(value)
    if pa.types.is_decimal(kind):
        return Decimal(int(value * 1000)).scaleb(-3)
    return kind.to_pandas_dtype()(value)


# ---------------------------------------------------------------------------------------------------------- the files
def _spoil_schema(draw: random.Random, trouble: str, file: File) -> None:
    """Takes a column away, gives it a type that cannot be decoded, or has it twice."""
    place = draw.randrange(file.table.num_columns)
    name, rows = file.table.column_names[place], file.table.num_rows
    if trouble == "missing":
        file.table = file.table.remove_column(place)
    elif trouble == "twice":
        file.table = file.table.append_column(name, file.table.column(place))
    else:
        wrong = draw.choice(
            [
                pa.timestamp("us"), pa.date32(), pa.binary(), pa.binary(4), pa.struct([("x", pa.int32())]), pa.time32("s"),
                pa.map_(pa.string(), pa.int32()), pa.list_(pa.list_(pa.int32())), pa.list_(pa.date32()), pa.date64(),
                pa.list_(pa.binary()), pa.dictionary(pa.int32(), pa.binary()), pa.list_(pa.struct([("x", pa.int32())])),
            ]
        )  # fmt: skip
        file.table = file.table.set_column(place, name, pa.nulls(rows, wrong))


def _add_columns(draw: random.Random, file: File) -> None:
    """Adds columns that nobody reads, and mixes all."""
    table = file.table
    taken = table.column_names[0]
    extra = {
        "unread": pa.timestamp("ns"),
        f"{taken}.x": pa.int8(),
        "nested": pa.struct([("user_id", pa.int32()), ("deep", pa.list_(pa.string()))]),
        "nothing": pa.null(),
        "user": pa.map_(pa.string(), pa.int8()),
    }
    for name, kind in extra.items():
        if draw.random() < 0.15 and name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
    places = list(range(table.num_columns))
    draw.shuffle(places)
    file.table = table.select(places)


def _options(draw: random.Random, schema: pa.Schema) -> dict[str, Any]:
    """Draws how a file is written."""
    options: dict[str, Any] = {
        "compression": draw.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        "data_page_version": draw.choice(["1.0", "2.0"]),
        "data_page_size": draw.choice([300, 1000, 1 << 20]),
        "write_batch_size": draw.choice([1, 4, 1024]),
        "version": draw.choice(["1.0", "2.4", "2.6"]),
        "write_page_checksum": draw.random() < 0.5,
        "write_page_index": draw.random() < 0.3,
        "write_statistics": draw.random() < 0.7,
        "store_schema": draw.random() < 0.8,
        "use_compliant_nested_type": draw.random() < 0.8,
        "dictionary_pagesize_limit": draw.choice([1, 1 << 20]),
    }
    if draw.random() < 0.5:
        leaf = "element" if options["use_compliant_nested_type"] else "item"
        encodings = {}
        for column in schema:
            kind, path = column.type, column.name
            if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
                kind, path = kind.value_type, f"{path}.list.{leaf}"
            encodings[path] = draw.choice(_encodings(kind))
        options |= {"use_dictionary": False, "column_encoding": {path: name for path, name in encodings.items() if name}}
    return options


def _encodings(kind: pa.DataType) -> list[str | None]:
    if pa.types.is_integer(kind):
        return ["PLAIN", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"]
    if pa.types.is_floating(kind):
        return ["PLAIN", "BYTE_STREAM_SPLIT"]
    if kind in STRINGS:
        return ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]
    if pa.types.is_boolean(kind):
        return ["PLAIN", "RLE"]
    return [None]


def write_file(path: Path, file: File) -> Path:
    """Writes a file with its row groups, empty ones too."""
    with pq.ParquetWriter(path, file.table.schema, **file.options) as writer:
        first = 0
        for size in file.groups:
            writer.write_table(file.table.slice(first, size), row_group_size=max(size, 1))
            first += size
    return path
