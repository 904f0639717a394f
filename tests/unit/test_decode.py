"""Decoding: every Arrow type against naive lists, and what errors say."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedshard.config import build_config
from embedshard.data.decode import Decoder, Where, column_specs
from embedshard.data.hashing import hash_integers
from embedshard.data.statistics import Statistics
from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import DataError

WHERE = Where("data/part-3.parquet", 2, 100, 5000)


def decoder(feature, table=None, statistics=None, **data):
    tables = {"t": table or {"rows": 50, "dim": 4}}
    if feature["kind"] == "dense":
        tree_features = {"f": feature, "id": {"kind": "id", "table": "t"}}
    else:
        tree_features = {"f": {"table": "t", **feature}}
    towers = {"user": {"features": list(tree_features), "mlp": [4]}, "item": {"features": list(tree_features), "mlp": [4]}}
    config = build_config(
        {
            "data": {"train": "x", "label": "label", **data},
            "features": tree_features,
            "tables": tables,
            "model": {"kind": "two_tower", **towers},
            "objective": {"kind": "mse"},
        },
        {},
        "test",
    )
    return Decoder(column_specs(config, "train"), load_vocabularies(config), statistics or Statistics()).narrowed(["f"])


def decode(feature, array, **options):
    return decoder(feature, **options).decode(pa.table({"f": array}), WHERE)["f"]


def as_lists(ragged):
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize("dictionary", [False, True])
def test_ids_of_every_integer_width(kind, dictionary):
    array = pa.array([3, 49, 0, 3], kind)
    if dictionary:
        array = array.dictionary_encode()
    chunked = pa.chunked_array([array.slice(1), array.slice(0, 1)])
    assert decode({"kind": "id"}, chunked).values.tolist() == [49, 0, 3, 3]


lists = st.lists(st.one_of(st.none(), st.lists(st.integers(0, 49), max_size=6)), max_size=25)
list_types = st.sampled_from([pa.list_, pa.large_list])


@given(
    lists, list_types, st.sampled_from(INTEGERS), st.integers(0, 5), st.integers(1, 4), st.sampled_from(["first", "last"])
)
@settings(max_examples=200, deadline=None)
def test_bags_of_every_type_slice_null_and_length(rows, list_type, width, skip, keep, end):
    whole = pa.array([[1, 2, 3]] * skip + rows, list_type(width))
    array = pa.chunked_array([whole.slice(skip, len(rows) // 2), whole.slice(skip + len(rows) // 2)])
    got = decode({"kind": "bag", "max_length": keep, "keep": end}, array)
    expected = [(row or [])[:keep] if end == "first" else (row or [])[-keep:] for row in rows]
    assert as_lists(got) == expected


def test_a_null_list_that_hides_values_is_empty():
    offsets = pa.array([0, 2, 4, 5], pa.int32())
    hidden = pa.ListArray.from_arrays(offsets, pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False]))
    assert as_lists(decode({"kind": "bag"}, hidden)) == [[1, 2], [], [5]]


def test_fixed_size_lists_and_lists_of_dictionaries():
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2))
    assert as_lists(decode({"kind": "bag"}, fixed)) == [[1, 2], [], [3, 4]]
    values = pa.array([7, 8, 7]).dictionary_encode()
    encoded = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), values)
    assert as_lists(decode({"kind": "bag"}, encoded)) == [[7], [8, 7]]


def test_strings_are_hashed_alike_whatever_holds_them():
    table = {"dim": 4, "vocabulary": {"kind": "hash", "rows": 1000}}
    words = ["", "a", "ab", "Käse", "ab", "x" * 300]
    plain = decode({"kind": "id"}, pa.array(words), table=table).values
    assert plain[2] == plain[4]
    assert len(set(plain.tolist())) == 5
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        array = pa.chunked_array([pa.array(["skipped", *words]).cast(kind).slice(1)])
        np.testing.assert_array_equal(decode({"kind": "id"}, array, table=table).values, plain)


@pytest.mark.parametrize(
    ("feature", "array", "options", "words"),
    [
        ({"kind": "id"}, pa.array([1, None, 3]), {}, ["row 101", "column 'f' is null", "Fill or remove"]),
        ({"kind": "id"}, pa.array([1, 2, 50]), {}, ["row 102", "column 'f' is 50", "0 to 49", "oov"]),
        ({"kind": "id"}, pa.array([1, -1]), {}, ["row 101", "column 'f' is -1", "0 to 49"]),
        ({"kind": "id"}, pa.array([2**63 + 1], pa.uint64()), {}, ["row group 2", "column 'f'"]),
        ({"kind": "id"}, pa.array(["a"]), {}, ["column 'f'", "strings", "identity"]),
        ({"kind": "bag"}, pa.array([[1], [2, None]]), {}, ["row 101", "null at place 1", "'f'"]),
        ({"kind": "bag"}, pa.array([[1], [], [2, 99]]), {}, ["row 102", "is 99", "0 to 49"]),
        ({"kind": "dense"}, pa.array([1.0, float("nan")]), {}, ["row 101", "is nan", "missing to 'zero'"]),
        ({"kind": "dense"}, pa.array([1.0, None]), {}, ["row 101", "is None", "missing to 'zero'"]),
        ({"kind": "dense", "missing": "zero"}, pa.array([1.0, float("inf")]), {}, ["row 101", "is inf"]),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_row(feature, array, options, words):
    with pytest.raises(DataError) as caught:
        decode(feature, array, **options)
    for word in ["data/part-3.parquet", "row group 2" if "strings" not in words else "data/", *words]:
        assert word in str(caught.value), str(caught.value)


def test_an_unknown_id_may_look_up_the_row_for_unknown_ids():
    got = decode({"kind": "id", "unknown": "oov"}, pa.array([1, 50, -7]))
    assert got.values.tolist() == [1, 50, 50]


def test_unknown_strings_look_up_their_row_though_arrow_owns_the_memory(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / "ids.parquet")
    table = {"dim": 4, "vocabulary": {"kind": "file", "path": str(tmp_path / "ids.parquet")}}
    got = decode({"kind": "id", "unknown": "oov"}, pa.array(["b", "x", "a"]), table=table)
    assert got.values.tolist() == [1, 2, 0]


def test_a_null_among_string_views_is_found():
    table = {"dim": 4, "vocabulary": {"kind": "hash", "rows": 1000}}
    with pytest.raises(DataError, match="row 101: column 'f' is null"):
        decode({"kind": "id"}, pa.array(["a", None], pa.string_view()), table=table)


def test_weighted_bags_and_their_mean():
    array = pa.table({"f": [[1, 2], [], [3]], "w": [[1.0, 3.0], None, [0.0]]})
    for pooling, expected in (("sum", [1.0, 3.0, 0.0]), ("mean", [0.25, 0.75, 0.0])):
        feature = {"kind": "weighted_bag", "weights": "w", "pooling": pooling}
        got = decoder(feature).decode(array, WHERE)["f"]
        assert as_lists(got) == [[1, 2], [], [3]]
        np.testing.assert_allclose(got.weights, expected)


@pytest.mark.parametrize(
    ("weights", "words"),
    [([[1.0], [2.0]], ["row 100", "2 ids", "1 weights"]), ([[1.0, float("nan")], [1.0]], ["row 100", "'w'", "nan"])],
)
def test_weights_that_do_not_fit_are_refused(weights, words):
    array = pa.table({"f": [[1, 2], [3]], "w": weights})
    with pytest.raises(DataError) as caught:
        decoder({"kind": "weighted_bag", "weights": "w"}).decode(array, WHERE)
    for word in words:
        assert word in str(caught.value)


def test_numbers_of_every_type_and_normalisation():
    raw = [0, 1, 3]
    for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 2)):
        array = pa.array(raw).cast(pa.float64()).cast(kind) if pa.types.is_decimal(kind) else pa.array(raw).cast(kind)
        assert decode({"kind": "dense"}, array).values.tolist() == raw
    assert decode({"kind": "dense"}, pa.array([True, False])).values.tolist() == [1.0, 0.0]
    logs = decode({"kind": "dense", "normalise": "log1p"}, pa.array([0.0, -3.0, 3.0])).values
    np.testing.assert_allclose(logs, [0, -np.log(4), np.log(4)], rtol=1e-6)
    scaled = decode(
        {"kind": "dense", "normalise": "standardise", "missing": "zero"},
        pa.array([1.0, None, 5.0]),
        statistics=Statistics({"f": (3.0, 2.0)}),
    )
    assert scaled.values.tolist() == [-1.0, 0.0, 1.0]


def test_ids_of_64_unsigned_bits_are_not_refused():
    words = pa.array([1, 2**63 + 1, 2**64 - 1], pa.uint64())
    hashed = {"dim": 4, "vocabulary": {"kind": "hash", "rows": 1000}}
    assert decode({"kind": "id"}, words, table=hashed).values.tolist() == [
        hash_integers(np.array([word], np.uint64), 0)[0] % 1000 for word in words.to_pylist()
    ]
    assert decode({"kind": "id", "unknown": "oov"}, words).values.tolist() == [1, 50, 50]


@pytest.mark.parametrize(("kind", "other"), [(pa.uint64(), pa.int64()), (pa.int64(), pa.uint64())], ids=str)
def test_a_vocabulary_of_64_bits_does_not_take_one_sign_for_the_other(tmp_path, kind, other):
    ids = {pa.uint64(): [5, 2**63, 2**64 - 1], pa.int64(): [5, -(2**63), -1]}  # the same bits
    pq.write_table(pa.table({"id": pa.array(ids[kind], kind)}), tmp_path / "ids.parquet")
    options = {"table": {"dim": 4, "vocabulary": {"kind": "file", "path": str(tmp_path / "ids.parquet")}}}
    feature = {"kind": "id", "unknown": "oov"}
    assert decode(feature, pa.array(ids[kind], kind), **options).values.tolist() == [0, 1, 2]
    assert decode(feature, pa.array(ids[other], other), **options).values.tolist() == [0, 3, 3]


def test_an_unknown_string_that_is_not_utf8_is_shown_and_not_a_crash(tmp_path):
    broken = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "ids.parquet")
    table = {"dim": 4, "vocabulary": {"kind": "file", "path": str(tmp_path / "ids.parquet")}}
    with pytest.raises(DataError, match=r"row 100: column 'f' is b'caf\\xe9'"):
        decode({"kind": "id"}, broken, table=table)
    pq.write_table(pa.table({"id": broken}), tmp_path / "ids.parquet")
    assert decode({"kind": "id"}, broken, table=table).values.tolist() == [0]


def test_integers_that_float64_does_not_hold_are_rounded_and_not_a_crash():
    big = 2**53 + 1
    assert decode({"kind": "dense"}, pa.array([big, 2**63 - 1])).values.tolist() == [float(np.float32(big)), 2.0**63]


@pytest.mark.parametrize("feature", [{"kind": "dense"}, {"kind": "dense", "missing": "zero", "normalise": "log1p"}])
def test_a_number_too_large_for_float32_does_not_become_infinite(feature):
    with pytest.raises(DataError, match=r"row 101: column 'f' is 1e\+39 .* finite float32"):
        decode(feature, pa.array([3.4e38, 1e39]))
    with pytest.raises(DataError, match="row 100: column 'w' holds -1e\\+39; weights are finite"):
        decoder({"kind": "weighted_bag", "weights": "w"}).decode(pa.table({"f": [[1]], "w": [[-1e39]]}), WHERE)


def test_the_mean_of_a_weighted_bag_does_not_depend_on_rows_before_it():
    feature = {"kind": "weighted_bag", "weights": "w", "pooling": "mean"}
    rows = pa.table({"f": [[1], [2, 3]], "w": [[1e30], [0.1, 0.3]]})
    whole = decoder(feature).decode(rows, WHERE)["f"].weights
    alone = decoder(feature).decode(rows.slice(1), WHERE)["f"].weights
    np.testing.assert_allclose(alone, [0.25, 0.75], rtol=1e-6)
    np.testing.assert_array_equal(whole[1:], alone)


@pytest.mark.parametrize("code", [-1, 2])
def test_a_dictionary_that_is_damaged_is_refused_and_not_a_crash(code):
    codes = pa.array([0, 1, code], pa.int32())
    damaged = pa.DictionaryArray.from_arrays(codes, pa.array([7, 8]), safe=False)
    with pytest.raises(DataError, match="column 'f': refers to values that its dictionary of 2 has not"):
        decode({"kind": "id"}, damaged)


def test_lists_without_a_value_say_nothing_of_the_vocabulary(tmp_path):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "ids.parquet")
    table = {"dim": 4, "vocabulary": {"kind": "file", "path": str(tmp_path / "ids.parquet")}}
    assert as_lists(decode({"kind": "bag"}, pa.array([[], None], pa.list_(pa.null())), table=table)) == [[], []]
    assert as_lists(decode({"kind": "bag"}, pa.nulls(2), table=table)) == [[], []]


def test_lists_of_strings_without_a_value_do_not_crash_where_zero_is_masked():
    found = decode({"kind": "bag", "mask_zero": True}, pa.array([[], None, []], pa.list_(pa.string())))
    assert as_lists(found) == [[], [], []]


def test_columns_of_nothing_but_nulls_or_empty_lists():
    nothing = pa.nulls(3)
    assert as_lists(decode({"kind": "bag"}, nothing)) == [[], [], []]
    assert as_lists(decode({"kind": "bag"}, pa.array([[], None, []], pa.list_(pa.null())))) == [[], [], []]
    assert decode({"kind": "dense", "missing": "zero"}, nothing).values.tolist() == [0, 0, 0]
    assert decode({"kind": "id"}, pa.nulls(0)).values.tolist() == []
    with pytest.raises(DataError, match="column 'f' is null"):
        decode({"kind": "id"}, nothing)


def test_rows_are_numbered_in_the_data_set():
    columns = decoder({"kind": "id"}).decode(pa.table({"f": [1, 2]}), WHERE)
    assert columns["row"].values.tolist() == [5000, 5001]
