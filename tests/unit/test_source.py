"""Files of a data set: the inventory, and what is refused with its file, row group and column."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import build_config
from embedshard.data.columns import concatenate, num_rows
from embedshard.data.decode import Decoder, column_specs
from embedshard.data.inventory import Inventory, changes
from embedshard.data.source import open_source
from embedshard.data.statistics import Statistics, compute_statistics, count_ids
from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import DataError


@pytest.fixture
def decoder():
    config = build_config(
        {
            "data": {"train": "x", "label": "label"},
            "features": {
                "user": {"kind": "id", "table": "t"},
                "bag": {"kind": "bag", "table": "t", "max_length": 2},
                "x": {"kind": "dense", "normalise": "standardise", "missing": "zero"},
            },
            "tables": {"t": {"rows": 100, "dim": 4}},
            "model": {
                "kind": "two_tower",
                "user": {"features": ["user", "bag", "x"], "mlp": [4]},
                "item": {"features": ["user"]},
            },
            "objective": {"kind": "mse"},
        },
        {},
        "test",
    )
    return Decoder(column_specs(config, "train"), load_vocabularies(config), Statistics())


def table(rows, seed=0, user_type=None):
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "user": pa.array(generator.integers(0, 100, rows), user_type),
            "bag": pa.array([list(range(i % 4)) for i in range(rows)], pa.list_(pa.int32())),
            "x": pa.array([None if i % 7 == 3 else 1e6 + float(i) for i in range(rows)]),
            "label": generator.random(rows),
            "unread": ["text"] * rows,
        }
    )


def test_row_groups_of_any_size_and_files_of_any_width_are_one_data_set(decoder, tmp_path):
    tables = [table(23, 0), table(0, 1), table(11, 2, pa.int8()), table(8, 3, pa.uint32())]
    for i, (part, size) in enumerate(zip(tables, (5, 9, 100, 1), strict=True)):
        pq.write_table(part, tmp_path / f"{i}.parquet", row_group_size=size)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".hidden.parquet").write_text("junk")
    source = open_source([str(tmp_path / "*")], decoder)
    assert source.inventory.num_rows == 42
    expected = np.concatenate([part["user"].to_numpy().astype(np.int64) for part in tables])
    whole = concatenate([source.read_row_group(i) for i in range(len(source.inventory.row_groups))])
    np.testing.assert_array_equal(whole["user"].values, expected)
    np.testing.assert_array_equal(whole["row"].values, np.arange(42))
    assert "unread" not in whole
    for batch_rows in (1, 3, 100):
        for skip in (0, 2, 4):
            pieces = [(count, dict(columns)) for count, columns in source.iter_row_group(0, batch_rows, skip)]
            parts = [columns for _, columns in pieces]
            assert [num_rows(part) for part in parts] == [count for count, _ in pieces]
            assert sum(count for count, _ in pieces) == 5 - skip
            np.testing.assert_array_equal(concatenate(parts)["user"].values, expected[skip:5])
    assert source.describe_row(24).endswith("2.parquet, row group 0, row 1")


def test_files_that_are_not_parquet_are_skipped_and_known_unless_they_are_named(decoder, tmp_path):
    pq.write_table(table(10), tmp_path / "part-00000")
    pq.write_table(table(4), tmp_path / "b.parquet")
    (tmp_path / "README.txt").write_text("not data")
    (tmp_path / "empty").write_text("")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".b.parquet.crc").write_text("x")
    by_glob = open_source([str(tmp_path / "*")], decoder)
    assert by_glob.inventory.num_rows == 14, "what begins as Parquet is Parquet, whatever its name"
    assert [location.name for location in by_glob.skipped] == [".b.parquet.crc", "README.txt", "_SUCCESS", "empty"]
    folder = open_source([str(tmp_path)], decoder)
    assert folder.inventory.num_rows == 4, "a folder stands for its *.parquet files"
    assert [location.name for location in folder.narrowed(["user"]).skipped] == [
        ".b.parquet.crc", "README.txt", "_SUCCESS", "empty", "part-00000",
    ]  # fmt: skip
    for name in ("README.txt", "_SUCCESS", "empty"):
        with pytest.raises(DataError, match=rf"{name}.* (is not|has)"):
            open_source([str(tmp_path / name)], decoder)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet is not a whole Parquet file"):
        open_source([str(tmp_path / "*")], decoder)
    with pytest.raises(DataError, match=r"none of the files there is Parquet: README\.txt"):
        open_source([str(tmp_path / "*.txt")], decoder)


def test_bad_values_are_found_again_by_their_rows(decoder, tmp_path):
    users = [[5, 500, 6, None], [7, 8, 900, 9]]
    for number, ids in enumerate(users):
        part = table(4).set_column(0, "user", pa.array(ids, pa.int64()))
        pq.write_table(part, tmp_path / f"{number}.parquet", row_group_size=3)
    source = open_source([str(tmp_path)], decoder)
    found = [
        (str(finding.problem), finding.rows.tolist(), finding.value(0))
        for group, rows in ((0, [0, 1]), (1, [0]), (2, [1, 2]))
        for finding in source.find(group, ["user"], np.array(rows))
    ]
    assert found == [
        ("user: unknown id", [1], "500"), ("user: null id", [0], None), ("user: unknown id", [2], "900"),
    ]  # fmt: skip


def test_the_inventory_knows_a_changed_an_added_and_a_missing_file(decoder, tmp_path):
    for name in ("a", "b"):
        pq.write_table(table(10), tmp_path / f"{name}.parquet")
    saved = open_source([str(tmp_path)], decoder).inventory
    assert Inventory.from_json(saved.to_json()) == saved
    assert not changes(saved, open_source([str(tmp_path)], decoder).inventory)
    changed = table(10)
    users = changed["user"].to_numpy().copy()
    users[3] = 99 if users.max() < 99 else 0
    pq.write_table(changed.set_column(0, "user", pa.array(users)), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").rename(tmp_path / "c.parquet")
    now = open_source([str(tmp_path)], decoder).inventory
    assert now.fingerprint != saved.fingerprint
    assert changes(saved, now) == "b.parquet is missing; c.parquet is new; a.parquet has changed"


def test_uris_and_globs_over_folders_name_the_same_rows(decoder, tmp_path):
    for day in (1, 2):
        (tmp_path / f"day={day}").mkdir()
        pq.write_table(table(10, day), tmp_path / f"day={day}" / "part.parquet")
    by_glob = open_source([str(tmp_path / "day=*" / "*.parquet")], decoder)
    by_uri = open_source([f"file://{tmp_path}/**/*.parquet"], decoder)
    assert by_glob.inventory == by_uri.inventory
    np.testing.assert_array_equal(by_glob.read_row_group(1)["user"].values, by_uri.read_row_group(1)["user"].values)


def twice(data, column):
    return data.append_column(column, data[column])


def misname(path, name, other):
    pq.write_table(table(5), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(name, other))


def miscount(path):
    pq.write_table(table(77), path)
    in_footer = b"\x16\x9a\x01\x19"  # Thrift's 77, before the list of row groups
    content = path.read_bytes()
    assert content.count(in_footer) == 1
    path.write_bytes(content.replace(in_footer, b"\x16\x9c\x01\x19"))


def require_elements(path):
    """Flips a bit of the schema. Whoever asks pyarrow what such a footer says of the column ends the process."""
    pq.write_table(table(5), path, store_schema=False)
    optional, required = b"\x25\x02\x18\x07element", b"\x25\x00\x18\x07element"
    assert path.read_bytes().count(optional) == 1
    path.write_bytes(path.read_bytes().replace(optional, required))


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[20:120] = b"\xff" * 100
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), ["x.parquet", "not a whole Parquet file"]),
        (lambda path: path.write_bytes(b"PAR1"), ["x.parquet", "4 bytes"]),
        (lambda path: path.write_bytes(b"PAR1" + b"\0" * 50 + b"\xff\xff\xff\xffPAR1"), ["x.parquet"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\xff" * 30 + path.read_bytes()[-10:]), ["x.parquet"]),
        (lambda path: pq.write_table(table(5).drop(["user"]), path), ["no column 'user'"]),
        (
            lambda path: pq.write_table(table(5).rename_columns(["usr", "bag", "x", "label", "unread"]), path),
            ["no column 'user'", "Did you mean 'usr'?"],
        ),
        (
            lambda path: pq.write_table(table(5).set_column(0, "user", [[1.5] * 5]), path),
            ["column 'user' is double", "integers"],
        ),
        (lambda path: pq.write_table(table(5).set_column(1, "bag", [[1] * 5]), path), ["column 'bag' is int64", "a list"]),
        (
            lambda path: pq.write_table(table(5).set_column(3, "label", [["a"] * 5]), path),
            ["column 'label' is string", "number"],
        ),
        (lambda path: pq.write_table(table(0), path), ["without a row"]),
        (lambda path: pq.write_table(twice(table(5), "user"), path), ["2 columns named 'user'", "one"]),
        (lambda path: misname(path, b"user", b"us\xed\xff"), ["x.parquet", "cannot be read as Parquet", "utf-8"]),
        (lambda path: require_elements(path), ["x.parquet", "level histogram size mismatch"]),
        (lambda path: miscount(path), ["x.parquet", "says 78 rows", "row groups of 77 rows"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_when_it_is_opened(decoder, tmp_path, spoil, words):
    path = tmp_path / "x.parquet"
    pq.write_table(table(30), path)
    spoil(path)
    with pytest.raises(DataError) as caught:
        open_source([str(path)], decoder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_damaged_row_group_is_refused_when_it_is_read(decoder, tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(3000), path, row_group_size=1000, compression="zstd", write_page_checksum=True)
    corrupt(path)
    source = open_source([str(path)], decoder)
    told = r"x\.parquet, row group 0: cannot be read.* \(column user\)"  # no other column, whatever else is read with it
    with pytest.raises(DataError, match=told):
        source.read_row_group(0)
    with pytest.raises(DataError, match=told):
        list(source.iter_row_group(0, 100))
    with pytest.raises(DataError, match=told):
        [dict(columns) for _, columns in source.iter_row_group(0, 1000)]
    with pytest.raises(DataError, match=told):
        source.find(0, ["user", "x"], np.arange(3))
    assert num_rows(source.read_row_group(2)) == 1000


def test_the_decoded_size_is_known_from_the_footers(decoder, tmp_path):
    pq.write_table(table(4000), tmp_path / "x.parquet", row_group_size=500)
    source = open_source([str(tmp_path / "x.parquet")], decoder)
    columns = concatenate([source.read_row_group(i) for i in range(8)])
    actual = sum(
        column.values.nbytes + (column.offsets.nbytes if hasattr(column, "offsets") else 0) for column in columns.values()
    )
    assert source.decoded_bytes() == pytest.approx(actual, rel=0.25)


def test_a_damaged_path_in_a_footer_does_not_crash_the_size(decoder, tmp_path):
    pq.write_table(table(40), tmp_path / "x.parquet", store_schema=False, compression="none")
    size = open_source([str(tmp_path)], decoder).decoded_bytes()
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    place = content.rfind(b"bag")  # the row group's, after the schema's
    content[place : place + 3] = b"b\xed\xff"
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    assert open_source([str(tmp_path)], decoder).decoded_bytes() == size


def test_statistics_are_those_of_all_rows_however_they_are_cut(decoder, tmp_path):
    pq.write_table(table(500), tmp_path / "a.parquet", row_group_size=37)
    pq.write_table(table(300, 1), tmp_path / "b.parquet")
    values = [x for part in (table(500), table(300, 1)) for x in part["x"].to_pylist() if x is not None]
    found = compute_statistics([open_source([str(tmp_path)], decoder)])
    mean, deviation = found.moments["x"]
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert deviation == pytest.approx(np.std(values), rel=1e-9), "a mean of a million does not swallow it"
    assert Statistics.from_json(found.to_json()) == found
    standardised = open_source([str(tmp_path)], decoder).with_statistics(found).read_row_group(0)["x"].values
    assert standardised[3] == 0.0
    assert abs(standardised[0] - (1e6 - mean) / deviation) < 1e-4


def test_a_constant_and_an_empty_feature(decoder, tmp_path):
    constant = table(5).set_column(2, "x", [[4.0] * 5])
    pq.write_table(constant, tmp_path / "a.parquet")
    assert compute_statistics([open_source([str(tmp_path)], decoder)]).moments["x"] == (4.0, 1.0)
    pq.write_table(table(5).set_column(2, "x", pa.array([None] * 5, pa.float64())), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'x' is to be standardised"):
        compute_statistics([open_source([str(tmp_path)], decoder)])


def test_ids_are_counted_by_row(decoder, tmp_path):
    pq.write_table(table(1000), tmp_path / "a.parquet", row_group_size=77)
    counts = count_ids(open_source([str(tmp_path)], decoder), "user", 100)
    np.testing.assert_array_equal(counts, np.bincount(table(1000)["user"].to_numpy(), minlength=101))
