"""`embedshard data check`: what it counts against naive loops, and that it refuses what a run would."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard.data.check import check_data
from embedshard.data.distinct import DistinctIds
from tests.commands import run_command


def column(report, name, of=0):
    return next(found for found in report.sets[of].columns if found.column == name)


def copy_table(interactions, folder, change=lambda table: table, split="train", **options):
    folder.mkdir(exist_ok=True)
    table = pq.read_table(interactions / split)
    pq.write_table(change(table), folder / "part-0.parquet", **options)
    return table


def with_values(name, changes):
    """A change of a table: other values in some rows of a column."""

    def change(table):
        values = table[name].to_pylist()
        for row, value in changes.items():
            values[row] = value
        return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))

    return change


def test_what_is_counted_is_what_naive_loops_count(make_config, interactions, tmp_path):
    spoilt = {3: None, 5: [1, None, 2], 8: [7, 99, -1]}
    copy_table(interactions, tmp_path / "train", with_values("history", spoilt), row_group_size=40)
    changes = {"features": {"history": {"unknown": "oov", "null": "empty"}}, "data": {"train": str(tmp_path / "train")}}
    report = check_data(make_config(changes).config)
    assert report.refused == []
    rows = pq.read_table(tmp_path / "train").to_pylist()
    train = report.sets[0]
    assert (train.name, train.rows, train.files, train.unread_rows) == ("train", 203, 1, 0)
    assert (train.row_groups.count, train.row_groups.least, train.row_groups.median, train.row_groups.greatest) == (
        6,
        3,
        40,
        40,
    )
    assert train.size_bytes == (tmp_path / "train" / "part-0.parquet").stat().st_size
    assert train.fits_cache is True

    users = [row["user_id"] for row in rows]
    found = column(report, "user_id")
    assert (found.types, found.values, found.nulls, found.unknown) == (["int32"], 203, 0, 0)
    assert (found.least, found.greatest, found.distinct) == (min(users), max(users), len(set(users)))
    ids = [one for row in rows for one in row["history"] or []]
    known = [one for one in ids if one is not None]
    found = column(report, "history")
    assert (found.types, found.values, found.nulls) == (["list<int32>"], len(ids), 1)
    assert (found.least, found.greatest, found.distinct) == (-1, 99, len(set(known)))
    assert (found.unknown, found.unknown_share) == (2, 2 / len(known))
    lengths = [len(row["history"] or []) for row in rows]
    assert (found.lists, found.null_lists) == (203, 1)
    assert (found.least_length, found.greatest_length) == (min(lengths), max(lengths))
    assert found.mean_length == pytest.approx(sum(lengths) / 203)
    ages = [row["age"] for row in rows]
    assert (column(report, "age").least, column(report, "age").greatest) == (min(ages), max(ages))

    oov, empty = sorted(train.problems, key=lambda problem: problem.reason, reverse=True)
    path = tmp_path / "train" / "part-0.parquet"
    assert (oov.reason, oov.action, oov.values, oov.rows) == ("unknown id", "oov", 2, 1)
    assert oov.examples == [f"{path}, row group 0, row 8: 99"]
    assert (empty.reason, empty.action, empty.values, empty.rows) == ("null id", "empty", 1, 1)
    assert empty.examples == [f"{path}, row group 0, row 5: null"]

    for name in ("user_id", "item_id"):
        trained = {row[name] for row in rows}
        for split in ("validation", "test"):
            held_out = pq.read_table(interactions / split)[name].to_pylist()
            absent = next(one.absent for one in report.known if (one.set_name, one.column) == (split, name))
            assert absent.ids == len(set(held_out) - trained)
            assert absent.value_share == pytest.approx(sum(one not in trained for one in held_out) / len(held_out))


def test_a_row_that_is_bad_twice_counts_once_and_policies_tell_refused_from_set_aside(make_config, interactions, tmp_path):
    def spoil(table):
        table = with_values("item_id", {0: None, 1: 77, 2: 78})(table)
        return with_values("age", {1: math.nan, 4: None})(table)

    copy_table(interactions, tmp_path / "train", spoil)
    data = {"train": str(tmp_path / "train")}
    refused = check_data(make_config({"data": data}).config)
    assert (refused.sets[0].refused_rows, refused.sets[0].set_aside_rows) == (4, 0)
    assert [(one.column, one.reason, one.values) for one in refused.sets[0].problems] == [
        ("item_id", "null id", 1), ("item_id", "unknown id", 2), ("age", "missing number", 2),
    ]  # fmt: skip
    assert len(refused.refused) == 1
    assert "train: 4 of 203 rows" in refused.refused[0]

    lenient = {"on_bad_row": "quarantine", "max_bad_fraction": 4 / 203}
    aside = check_data(make_config({"data": data | lenient}).config)
    assert (aside.sets[0].refused_rows, aside.sets[0].set_aside_rows, aside.refused) == (0, 4, [])
    strict = check_data(make_config({"data": data | lenient | {"max_bad_fraction": 3.9 / 203}}).config)
    assert len(strict.refused) == 1
    assert "4 of 203 rows (1.97%) would be set aside" in strict.refused[0]


def test_the_share_of_bad_rows_is_that_of_all_partitions(make_config, interactions, tmp_path):
    copy_table(interactions, tmp_path / "a", with_values("item_id", {0: 77, 1: 77}))
    copy_table(interactions, tmp_path / "b")
    data = {"train": None, "partitions": [str(tmp_path / "a"), str(tmp_path / "b")], "on_bad_row": "quarantine"}
    report = check_data(make_config({"data": data | {"max_bad_fraction": 2 / 406}}).config)
    assert [one.name for one in report.sets] == ["train[0]", "train[1]", "validation", "test"]
    assert [one.set_aside_rows for one in report.sets[:2]] == [2, 0]
    assert report.refused == []
    assert check_data(make_config({"data": data | {"max_bad_fraction": 1.9 / 406}}).config).refused


def damage_page(path):
    content = bytearray(path.read_bytes())
    content[60:160] = b"\xff" * 100
    path.write_bytes(bytes(content))


def test_every_file_is_looked_at_whatever_is_wrong_with_the_others(make_config, interactions, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    table = pq.read_table(interactions / "train")
    pq.write_table(table, folder / "a.parquet", row_group_size=50, write_page_checksum=True, compression="zstd")
    damage_page(folder / "a.parquet")
    pq.write_table(with_values("item_id", {7: 30})(table), folder / "b.parquet")
    (folder / "c.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-7])
    for name in ("d", "e", "f", "g"):
        pq.write_table(table.drop(["age"]), folder / f"{name}.parquet")
    words = table.set_column(0, "user_id", table["user_id"].cast(pa.string()))
    pq.write_table(words.set_column(4, "age", words["user_id"]), folder / "h.parquet")
    (folder / "_SUCCESS").touch()
    report = check_data(make_config({"data": {"train": f"{folder}/*", "test": f"{tmp_path}/nothing/*.parquet"}}).config)
    train = report.sets[0]
    assert (train.files, train.rows, train.unread_rows) == (8, 7 * 203, 50)
    assert [uri.rpartition("/")[2] for uri in train.skipped] == ["_SUCCESS"]
    refusals = {refusal.message[:28]: refusal for refusal in train.refusals}
    assert refusals["row group 0: cannot be read:"].examples == [f"{folder}/a.parquet"]
    assert refusals["is not a whole Parquet file:"].examples == [f"{folder}/c.parquet"]
    missing = refusals["has no column 'age', which '"]
    assert (missing.files, missing.examples) == (4, [f"{folder}/{name}.parquet" for name in "def"])
    assert refusals["column 'age' is string, 'age"].files == 1
    assert refusals["column 'user_id': the column"].files == 1
    assert train.refused_rows == 1
    assert column(report, "item_id").values == 7 * 203 - 50, "other columns of these files are read all the same"
    assert "no file matches" in report.sets[2].refusals[0].message
    assert len(report.refused) == 7


def test_a_catalogue_with_an_item_twice_is_refused(make_config, interactions, tmp_path):
    pq.write_table(pa.table({"item_id": [0, 1, 2, 1, 1]}), tmp_path / "items.parquet")
    report = check_data(make_config({"data": {"catalogue": str(tmp_path / "items.parquet")}}).config)
    assert report.refused == ["catalogue: 2 rows repeat an earlier item; a catalogue needs one row per item."]
    trained = set(pq.read_table(interactions / "train")["item_id"].to_pylist())
    lacking = next(one for one in report.known if (one.set_name, one.compared_with) == ("train", "catalogue"))
    assert lacking.absent.ids == len(trained - {0, 1, 2})


def test_what_a_run_finds_out_late_is_refused(make_config, interactions, tmp_path):
    nothing = lambda table: table.set_column(4, "age", pa.nulls(table.num_rows, pa.float64()))  # noqa: E731
    copy_table(interactions, tmp_path / "train", nothing)
    age = {"kind": "dense", "normalise": "standardise", "missing": "zero"}
    report = check_data(make_config({"data": {"train": str(tmp_path / "train")}, "features": {"age": age}}).config)
    assert report.refused == ["train: feature 'age' is to be standardised, but has no value at all."]
    vocabulary = {"kind": "file", "path": str(tmp_path / "ids.parquet")}
    report = check_data(make_config({"tables": {"user": {"rows": None, "vocabulary": vocabulary}}}).config)
    assert len(report.refused) == 1
    assert "tables.user.vocabulary" in report.refused[0]
    assert column(report, "item_id").values == 203, "what does not need that vocabulary is read"


def test_a_column_that_slices_the_test_set_is_looked_at(make_config, interactions, tmp_path):
    by_day = tmp_path / "day=3"
    nulls = with_values("country", dict.fromkeys(range(5)))

    def with_country(table):
        return nulls(table.append_column("country", pa.array(["AT", "CH"] * table.num_rows)[: table.num_rows]))

    copy_table(interactions, by_day, with_country, split="validation")
    changes = {"data": {"validation": str(by_day), "test": None, "label": "rating"}, "objective": {"kind": "mse"}}
    changes["evaluate"] = {"metrics": ["rmse"], "slice_by": ["country"]}
    report = check_data(make_config(changes).config)
    assert report.refused == []
    found = column(report, "country", of=1)
    assert (found.kind, found.nulls, found.distinct) == ("slice", 5, 2)
    assert report.sets[1].problems == []
    changes["evaluate"]["slice_by"] = ["day"]
    report = check_data(make_config(changes).config)
    (reason,) = report.refused
    assert reason.startswith("validation (1 file): has no column 'day', which 'slice:day' needs")
    assert reason.endswith("it stands in the folder's name, which is not read.")


def test_lanes_that_share_row_groups_are_told(make_config, interactions, tmp_path):
    copy_table(interactions, tmp_path / "train", row_group_size=1000)
    data = {"train": str(tmp_path / "train"), "cache_bytes": 0}
    train = check_data(make_config({"data": data}).config).sets[0]
    assert train.waiting_bytes == 0, "the window is the whole lane"
    copy_table(interactions, tmp_path / "train", row_group_size=25)
    data |= {"window_steps": 1}
    train = check_data(make_config({"data": data}).config).sets[0]
    # Four lanes of 8 rows each step: each touches one row group of 25, or two where it begins in one's last rows.
    assert 0 < train.waiting_bytes <= train.decoded_bytes
    assert "wait for their turn" in train.notes[0]
    assert "at most 50 rows" in train.notes[0]
    data |= {"cache_bytes": train.waiting_bytes, "window_steps": 1}
    assert check_data(make_config({"data": data}).config).sets[0].notes == []


def test_progress_goes_from_nothing_to_all_rows(make_config):
    heard = []
    check_data(make_config().config, lambda done, total: heard.append((done, total)))
    assert heard[0] == (0, 203 + 60 + 60)
    assert heard[-1] == (323, 323)
    assert heard == sorted(heard)


# ----------------------------------------------------------------------------------------------------------- distinct
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_few_ids_are_counted(kind):
    ids = pa.array([3, 3, None, 1, 2, 3])
    ids = ids.cast(pa.string()).cast(kind) if pa.types.is_dictionary(kind) or kind == pa.string() else ids.cast(kind)
    counted = DistinctIds()
    counted.add(ids)
    counted.add(ids.slice(3))
    assert (counted.estimate(), counted.is_exact) == (3, True)
    other = DistinctIds()
    other.add(ids.slice(3, 1))
    absent = counted.absent_from([other])
    assert (absent.ids, absent.id_share, absent.value_share, absent.is_exact) == (2, 2 / 3, 6 / 8, True)


def test_many_ids_are_estimated_from_a_sample_that_all_sets_share():
    generator = np.random.default_rng(5)
    ids = generator.permutation(200_000)
    some, others = DistinctIds(kept=4096), DistinctIds(kept=4096)
    for part in np.split(ids, 20):
        some.add(pa.array(np.repeat(part, 2)))
    others.add(pa.array(np.sort(ids)[:50_000]))
    assert not some.is_exact
    assert some.estimate() == pytest.approx(200_000, rel=0.05), "three deviations of 1/sqrt(4096)"
    absent = some.absent_from([others])
    assert not absent.is_exact
    assert absent.id_share == pytest.approx(0.75, abs=0.03)
    assert absent.value_share == pytest.approx(0.75, abs=0.03)
    assert others.absent_from([some]).ids == 0


# ------------------------------------------------------------------------------------------------------- command line
def run(*arguments, columns=80):
    return run_command("data", "check", *arguments, COLUMNS=str(columns))


def test_the_command_ends_with_0_1_or_2(make_config, interactions, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(make_config().tree))
    sound = run(path)
    assert sound.returncode == 0, sound.stderr
    assert "Nothing would be refused." in sound.stdout
    assert "203 rows in 2 files" in sound.stdout
    assert max(len(line) for line in sound.stdout.splitlines() if "/" not in line) <= 80

    refused = run(path, "--set", "tables.item.rows=29", "--json")
    assert refused.returncode == 1, refused.stderr
    found = json.loads(refused.stdout)
    assert found["would_run"] is False
    items = pq.read_table(interactions / "train").to_pylist()
    assert found["sets"][0]["refused_rows"] == sum(29 in [row["item_id"], *row["history"]] for row in items)
    shown = run(path, "--set", "tables.item.rows=29", columns=160)
    assert shown.returncode == 1
    assert "refused  item_id: unknown id" in shown.stdout
    assert "and " in shown.stdout
    assert run(path, "--set", "data.trian=x").returncode == 2


def test_it_does_without_torch():
    code = "import sys, embedshard.launch.data_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
