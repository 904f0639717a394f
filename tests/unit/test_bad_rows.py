"""Bad values: found wherever they are, and dealt with as each feature's policy says, against naive loops."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.config import build_config
from embedshard.config.parts import CrossEntropyConfig, PointwiseConfig
from embedshard.data.columns import concatenate, good_rows
from embedshard.data.decode import Decoder, Where, column_specs
from embedshard.data.quarantine import BadRowCounts, Tally
from embedshard.data.statistics import Statistics
from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import ConfigError, DataError

WHERE = Where("part.parquet", 2, 0, 5000)
ROWS = 50


def decoder(features, on_bad_row="error", objective=None, **data):
    tower = {"features": [*features, "any"], "mlp": [4]}
    tree = {
        "data": {"train": "x", "label": "label", "on_bad_row": on_bad_row, **data},
        "features": {**features, "any": {"kind": "id", "table": "t"}},
        "tables": {"t": {"rows": ROWS, "dim": 4}},
        "model": {"kind": "two_tower", "user": tower, "item": tower},
        "objective": {"kind": "mse"},
    }
    config = build_config(tree, {}, "test")
    if objective is not None:
        config = config.model_copy(update={"objective": objective})
    names = [*features, "label:label", "weight"]
    return Decoder(column_specs(config, "train"), load_vocabularies(config), Statistics(), on_bad_row).only(names)


def decode(feature, columns, on_bad_row="error"):
    made = decoder({"f": feature}, on_bad_row).only(["f"])
    return made, made.decode(pa.table(columns), WHERE)


def as_lists(ragged):
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


ID, BAG = {"kind": "id", "table": "t"}, {"kind": "bag", "table": "t"}
WEIGHTED = {"kind": "weighted_bag", "table": "t", "weights": "w"}
NUMBER = {"kind": "dense"}
NAN, INF = float("nan"), float("inf")
IDS = {"f": pa.array([3, None, 99, -1])}
LISTS = {"f": pa.array([[3, None], None, [], [4, 99], [5]])}


@pytest.mark.parametrize(
    ("feature", "columns", "on_bad_row", "values", "reasons"),
    [
        (ID, IDS, "quarantine", [3, -1, -1, -1], [None, "f: null id", "f: unknown id", "f: unknown id"]),
        (ID | {"unknown": "oov"}, IDS, "quarantine", [3, -1, 50, 50], [None, "f: null id", None, None]),
        (ID | {"null": "empty"}, IDS, "quarantine", [3, -1, -1, -1], [None, None, "f: unknown id", "f: unknown id"]),
        (
            ID | {"null": "empty", "unknown": "quarantine"}, IDS, "error", [3, -1, -1, -1],
            [None, None, "f: unknown id", "f: unknown id"],
        ),
        (ID | {"null": "empty", "unknown": "oov"}, IDS, "error", [3, -1, 50, 50], None),
        (
            BAG, LISTS, "quarantine", [[], [], [], [], [5]],
            ["f: null id", None, None, "f: unknown id", None],
        ),
        (BAG | {"null": "empty", "unknown": "oov"}, LISTS, "error", [[3], [], [], [4, 50], [5]], None),
        (
            BAG | {"null": "empty", "unknown": "quarantine"}, LISTS, "error", [[3], [], [], [], [5]],
            [None, None, None, "f: unknown id", None],
        ),
        (
            BAG | {"null": "empty", "max_length": 2}, {"f": pa.array([[1, 2, None, None], [None, 3, 4, 5, None]])}, "error",
            [[1, 2], [4, 5]], None,
        ),
        (
            NUMBER, {"f": pa.array([1.0, None, NAN, INF, 1e300, -2.0])}, "quarantine", [1, 0, 0, 0, 0, -2],
            [None, "f: missing number", "f: missing number", "f: infinite number", "f: infinite number", None],
        ),
        (
            NUMBER | {"missing": "zero"}, {"f": pa.array([1.0, None, NAN, -INF])}, "quarantine", [1, 0, 0, 0],
            [None, None, None, "f: infinite number"],
        ),
        (
            WEIGHTED,
            {
                "f": pa.array([[1, 2], [3], [None], [4], [99], [5, 6]]),
                "w": pa.array([[0.5, 1.5], [1.0, 2.0], [1.0], [None], [INF], [1.0, -INF]]),
            },
            "quarantine",
            [[1, 2], [], [], [], [], []],
            [None, "f: lengths differ", "f: null id", "w: missing number", "f: unknown id", "w: infinite number"],
        ),
        (
            WEIGHTED | {"null": "empty"},
            {"f": pa.array([[1, None, 2], [None, 3], [4]]), "w": pa.array([[0.5, None, 1.5], [1.0, 2.0], []])},
            "quarantine",
            [[1, 2], [3], []],
            [None, None, "f: lengths differ"],
        ),
    ],
)  # fmt: skip
def test_each_policy_deals_with_each_kind_of_bad_value(feature, columns, on_bad_row, values, reasons):
    made, found = decode(feature, columns, on_bad_row)
    got = as_lists(found["f"]) if hasattr(found["f"], "offsets") else found["f"].values.tolist()
    assert got == values
    if reasons is None:
        assert "bad" not in found, "nothing can be set aside, so nothing is carried"
    else:
        codes = found["bad"].values
        assert [str(made.problems[code - 1]) if code else None for code in codes] == reasons
    kept = good_rows(found)["row"].values.tolist()
    assert kept == [5000 + i for i, reason in enumerate(reasons or [None] * len(values)) if reason is None]


def test_the_weights_of_dropped_nulls_are_dropped_with_them():
    _, found = decode(
        WEIGHTED | {"null": "empty", "pooling": "mean"},
        {"f": pa.array([[1, None, 2], [None]]), "w": pa.array([[1.0, NAN, 3.0], [5.0]])},
    )
    assert as_lists(found["f"]) == [[1, 2], []]
    assert found["f"].weights.tolist() == [0.25, 0.75]
    assert found["null:f"].values.tolist() == [1, 1]


def test_a_row_weight_must_be_at_least_0_and_labels_finite():
    made = decoder({}, "quarantine", weight="weight")
    columns = {"label": pa.array([1.0, NAN, 1.0, 1.0]), "weight": pa.array([0.0, -1.0, -0.5, None])}
    found = made.decode(pa.table(columns), WHERE)
    reasons = [str(made.problems[code - 1]) if code else None for code in found["bad"].values]
    assert reasons == [None, "label: missing number", "weight: negative weight", "weight: missing number"]
    assert found["label:label"].values.tolist() == [1, 0, 0, 0]
    assert found["weight"].values.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("objective", "labels", "bad"),
    [
        (PointwiseConfig(kind="bce"), pa.array([0, 1, 3, -1], pa.int8()), [2, 3]),
        (PointwiseConfig(kind="bce"), pa.array([0.25, 1.0, 1.5, NAN], pa.float32()), [2]),
        (CrossEntropyConfig(kind="cross_entropy", classes=3), pa.array([0, 1, 2, 3]), [3]),
        (PointwiseConfig(kind="mse"), pa.array([0, 5, -7]), []),
    ],
)
def test_a_label_that_the_objective_cannot_learn_is_bad(objective, labels, bad):
    rows = pa.table({"label": labels})
    made = decoder({}, "quarantine", objective).only(["label:label"])
    named = [str(made.problems[code - 1]) if code else None for code in made.decode(rows, WHERE)["bad"].values]
    assert [row for row, reason in enumerate(named) if reason == "label: label out of range"] == bad
    if bad:
        with pytest.raises(DataError, match=rf"row {bad[0]}: column 'label' is .* needs a number from 0 to [12], as the"):
            decoder({}, "error", objective).only(["label:label"]).decode(rows.slice(0, bad[-1] + 1), WHERE)


@pytest.mark.parametrize(
    ("feature", "array", "words"),
    [
        (ID, pa.array([1, None]), ["features.f.null to 'empty'", "data.on_bad_row to 'quarantine'"]),
        (ID, pa.array([1, 77]), ["features.f.unknown to 'oov' or 'quarantine'"]),
        (BAG, pa.array([[1, None]]), ["null at place 1", "features.f.null to 'empty'"]),
        (NUMBER, pa.array([NAN]), ["features.f.missing to 'zero'", "data.on_bad_row to 'quarantine'"]),
        (NUMBER | {"missing": "zero"}, pa.array([1e39]), ["is 1e+39", "finite float32", "data.on_bad_row to 'quarantine'"]),
    ],
)
def test_an_error_says_which_policy_would_go_on(feature, array, words):
    with pytest.raises(DataError) as caught:
        decode(feature, {"f": array})
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_is_wrong_is_found_whatever_the_policy():
    features = {"f": BAG | {"unknown": "oov", "null": "empty"}, "x": NUMBER | {"missing": "zero"}}
    made = decoder(features).only(["f", "x"])
    lists = pa.array([[1, 99, None], [], [98, 97]])
    found = made.find(pa.table({"f": lists, "x": pa.array([1.0, INF, NAN])}), WHERE)
    told = {
        str(finding.problem): (finding.rows.tolist(), [finding.value(i) for i in range(len(finding))]) for finding in found
    }
    assert told == {
        "f: null id": ([0], [None]),
        "f: unknown id": ([0, 2, 2], ["99", "98", "97"]),
        "x: missing number": ([2], ["nan"]),
        "x: infinite number": ([1], ["inf"]),
    }
    assert {str(problem): made.action(problem) for problem in made.problems} == {
        "f: null id": "empty", "f: unknown id": "oov", "x: missing number": "zero", "x: infinite number": "error",
    }  # fmt: skip


def test_a_string_that_is_not_utf8_is_told():
    config = build_config(
        {
            "data": {"train": "x", "label": "label"},
            "features": {"f": {"kind": "id", "table": "t"}},
            "tables": {"t": {"dim": 4, "vocabulary": {"kind": "file", "path": "x"}}},
            "model": {"kind": "two_tower", "user": {"features": ["f"]}, "item": {"features": ["f"]}},
            "objective": {"kind": "mse"},
        },
        {},
        "test",
    )

    class Known:
        rows, fingerprint = 1, ""

        def map_strings(self, ids):
            return np.full(len(ids), -1)

        def describe(self):
            return "none"

    specs = [spec for spec in column_specs(config, "train") if spec.name == "f"]
    made = Decoder(specs, {"t": Known()}, Statistics())
    raw = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary())
    words = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    (finding,) = made.find(pa.table({"f": words}), WHERE)
    assert [finding.value(0), finding.value(1)] == ["ok", "\ufffd\ufffd"]
    with pytest.raises(DataError, match=r"is 'ok'"):
        made.decode(pa.table({"f": words}), WHERE)
    with pytest.raises(DataError, match=r"is b'\\xff\\xfe'"):
        made.decode(pa.table({"f": words}).slice(1), WHERE)


identifiers = st.one_of(st.none(), st.integers(-2, ROWS + 1))
numbers = st.one_of(st.none(), st.sampled_from([NAN, INF, -INF, 1e300]), st.floats(-9, 9, width=16))
weighted_rows = st.lists(
    st.tuples(
        identifiers,
        st.one_of(st.none(), st.lists(identifiers, max_size=3)),
        st.one_of(st.none(), st.lists(numbers, max_size=3)),
        st.booleans(),
        numbers,
    ),
    max_size=12,
)


@given(
    weighted_rows,
    st.sampled_from(["error", "oov", "quarantine"]),
    st.sampled_from(["error", "empty"]),
    st.sampled_from(["error", "zero"]),
    st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_tables_are_decoded_and_counted_as_a_loop_over_rows_does(drawn, unknown, null, missing, cut):
    policies = {"unknown": unknown, "null": null}
    features = {"a": ID | policies, "b": WEIGHTED | policies, "x": NUMBER | {"missing": missing}}
    made = decoder(features, "quarantine").only(list(features))
    rows = [
        (a, b, (w or [])[: len(b or [])] + [1.0] * (len(b or []) - len(w or [])) if fit else w, x)
        for a, b, w, fit, x in drawn
    ]
    kinds = (pa.int64(), pa.list_(pa.int64()), pa.list_(pa.float64()), pa.float64())
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    table = pa.table({name: pa.array(list(c), kind) for name, c, kind in zip("abwx", columns, kinds, strict=True)})
    whole = made.decode(table, WHERE)
    halves = [
        made.decode(table.slice(first, size), Where("", 0, 0, 5000 + min(first, len(rows))))
        for first, size in ((0, cut), (cut, None))
    ]
    joined = concatenate(halves)
    expected = [naive(row, unknown, null, missing) for row in rows]
    counts = BadRowCounts()
    tally = Tally(made)
    tally.add(tally.of(whole, 0, len(rows)), counts)
    assert counts.by_reason == {
        reason: n for reason in {e[0] for e in expected if e[0]} if (n := sum(e[0] == reason for e in expected))
    }
    good = [e for e in expected if e[0] is None]
    if unknown == "oov":
        assert counts.oov == {"a": sum(e[1] == ROWS for e in good), "b": sum(i == ROWS for e in good for i in e[2])}
        assert counts.ids == {"a": sum(e[1] >= 0 for e in good), "b": sum(len(e[2]) for e in good)}
    if null == "empty":
        assert counts.null == {
            "a": sum(e[1] < 0 for e in good),
            "b": sum(i is None for row, e in zip(rows, expected, strict=True) if e[0] is None for i in row[1] or []),
        }
    for got in (whole, joined):
        assert got["row"].values.tolist() == [5000 + i for i in range(len(rows))]
        codes = got["bad"].values
        assert [str(made.problems[code - 1]) if code else None for code in codes] == [e[0] for e in expected]
        assert got["a"].values.tolist() == [e[1] for e in expected]
        assert as_lists(got["b"]) == [e[2] for e in expected]
        np.testing.assert_allclose(got["b"].weights, [w for e in expected for w in e[3]], rtol=1e-6)
        np.testing.assert_allclose(got["x"].values, [e[4] for e in expected], rtol=1e-6)


def naive(row, unknown, null, missing):
    """The first thing that is wrong with a row, and its id, list, weights and number."""
    a, b, w, x = row
    b, w = b or [], w or []
    wrong = []

    def look(name, i):
        if i is None:
            wrong.extend([f"{name}: null id"] if null == "error" else [])
            return -1
        if not 0 <= i < ROWS:
            wrong.extend([f"{name}: unknown id"] if unknown != "oov" else [])
            return ROWS
        return i

    def check(name, number, allowed):
        if number is None or math.isnan(number):
            wrong.extend([] if allowed else [f"{name}: missing number"])
        elif abs(number) > 3.5e38:
            wrong.append(f"{name}: infinite number")

    own = look("a", a)
    ids = [look("b", i) for i in b]
    if len(b) != len(w):
        wrong.append("b: lengths differ")
    else:
        for i, weight in zip(b, w, strict=True):
            if i is not None:
                check("w", weight, False)
    check("x", x, missing == "zero")
    order = [
        "a: null id", "a: unknown id", "b: null id", "b: unknown id", "b: lengths differ",
        "w: missing number", "w: infinite number", "x: missing number", "x: infinite number",
    ]  # fmt: skip
    if wrong:
        return min(wrong, key=order.index), -1, [], [], 0.0
    pairs = [(i, weight) for i, weight in zip(ids, w, strict=True) if i >= 0]
    return None, own, [i for i, _ in pairs], [weight for _, weight in pairs], 0.0 if x is None or math.isnan(x) else x


def test_an_item_without_an_id_is_refused_where_the_objective_learns_which_item_belongs_to_a_row():
    tree = {
        "data": {"train": "x"},
        "features": {"u": ID, "i": ID | {"null": "empty"}},
        "tables": {"t": {"rows": 5, "dim": 4}},
        "model": {"kind": "two_tower", "user": {"features": ["u"]}, "item": {"features": ["i"]}},
        "objective": {"kind": "in_batch_softmax"},
    }
    with pytest.raises(ConfigError, match=r"features\.i\.null is 'empty'.*on_bad_row 'quarantine'"):
        build_config(tree, {}, "test")
