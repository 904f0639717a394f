"""What is found in the training set after training, against loops over the rows of the files."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.data.dataset import open_dataset
from embedshard.data.source import Source
from embedshard.data.survey import Wanted, take_survey
from embedshard.world import open_world

USERS, ITEMS = 12, 9
EVERYTHING = Wanted(item_counts=True, interactions=True, labels=True, id_rows=10**9)


@pytest.fixture
def folder(tmp_path):
    """Two files of row groups of 20 rows, with nulls and ids that no vocabulary has."""
    rng = np.random.default_rng(7)

    def spoilt(values, *others):
        return [others[rng.integers(len(others))] if rng.random() < 0.15 else value for value in values]

    for number, count in enumerate((70, 43)):
        bags = [spoilt(rng.integers(0, ITEMS, rng.integers(0, 7)).tolist(), None, ITEMS + 4) for _ in range(count)]
        table = pa.table(
            {
                "user_id": pa.array(spoilt(rng.integers(0, USERS, count).tolist(), None, USERS, USERS + 7), pa.int32()),
                "item_id": pa.array(spoilt(rng.integers(0, ITEMS, count).tolist(), None, ITEMS + 1, ITEMS + 2), pa.int64()),
                "history": pa.array(spoilt(bags, None), pa.list_(pa.int64())),
                "age": pa.array(spoilt(rng.random(count).tolist(), None)),
                "clicked": pa.array(rng.integers(0, 2, count), pa.int8()),
                "importance": pa.array(rng.random(count), pa.float32()),
            }
        )
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=20)
    return tmp_path


def opened(make_config, folder, item_policy="oov", **changes):
    tree = {
        "data": {
            "train": str(folder), "label": "clicked", "weight": "importance", "on_bad_row": "quarantine",
            "max_bad_fraction": 1.0,
        },
        "features": {
            "user_id": {"kind": "id", "table": "user", "unknown": "oov", "null": "empty"},
            "item_id": {"kind": "id", "table": "item", "unknown": item_policy, "null": "empty"},
            "history": {"kind": "bag", "table": "item", "max_length": 4, "unknown": "oov", "null": "empty"},
        },
        "tables": {"user": {"rows": USERS}, "item": {"rows": ITEMS}},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["recall@5", "log_loss"]},
        "tracking": {},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] |= values
    with open_world("cpu") as world:
        return open_dataset(make_config(tree, splits=()).config, world, None)


def good_rows_of(folder, item_policy):
    """The rows of all row groups as their policies leave them: a missing age, or here an unknown item, sets one aside."""
    groups = []
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            kept = []
            for row in file.read_row_group(group).to_pylist():
                unknown = row["item_id"] is not None and row["item_id"] >= ITEMS
                if row["age"] is None or (item_policy == "quarantine" and unknown):
                    continue
                ids = [min(id_, ITEMS) for id_ in row["history"] or [] if id_ is not None]
                user, item = row["user_id"], row["item_id"]
                user, item = user and min(user, USERS), item and min(item, ITEMS)
                kept.append({**row, "user_id": user, "item_id": item, "history": ids[-4:]})
            groups.append(kept)
    return groups


@pytest.mark.parametrize("partitions", [False, True])
@pytest.mark.parametrize("item_policy", ["oov", "quarantine"])
def test_everything_is_counted_as_a_loop_over_the_files_counts_it(make_config, folder, item_policy, partitions):
    two = {"train": None, "partitions": [str(folder / f"part-{number}.parquet") for number in (0, 1)]}
    dataset = opened(make_config, folder, item_policy, data=two if partitions else {})
    found = take_survey(dataset, EVERYTHING)
    rows = [row for group in good_rows_of(folder, item_policy) for row in group]
    assert len(rows) < found.rows == found.rows_counted == 113

    items = Counter(row["item_id"] for row in rows if row["item_id"] is not None)
    assert found.item_counts.tolist() == [items[item] for item in range(ITEMS + 1)]
    assert (items[ITEMS] > 0) == (item_policy == "oov")

    both = [row for row in rows if row["user_id"] is not None and row["item_id"] is not None]
    assert len(both) < len(rows)
    assert found.interactions.users.tolist() == [row["user_id"] for row in both]
    assert found.interactions.items.tolist() == [row["item_id"] for row in both]
    assert found.interactions.labels.tolist() == [row["clicked"] for row in both]
    assert found.interactions.weights.tolist() == [row["importance"] for row in both]
    assert found.label_sum == pytest.approx(sum(row["clicked"] * row["importance"] for row in rows))
    assert found.label_weight == pytest.approx(sum(row["importance"] for row in rows))

    bags = Counter(id_ for row in rows for id_ in row["history"])
    users = Counter(row["user_id"] for row in rows if row["user_id"] is not None)
    told = found.ids_json(dataset)
    assert (told["rows"], told["rows_counted"]) == (113, 113)
    assert list(told["features"]) == ["user_id", "item_id", "history"]
    for name, counts, unknown in (("user_id", users, USERS), ("item_id", items, ITEMS), ("history", bags, ITEMS)):
        hottest = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        assert told["features"][name] == {
            "table": "user" if name == "user_id" else "item",
            "ids": sum(counts.values()),
            "oov_share": counts[unknown] / sum(counts.values()),
            "distinct_rows": len(counts),
            "hottest": [[row, count, None if row == unknown else row] for row, count in hottest],
        }
    assert told["features"]["history"]["oov_share"] > 0


def test_ids_of_a_file_vocabulary_are_told_as_they_are_in_the_file(make_config, folder):
    ids = [100 * (i + 1) for i in range(USERS)]
    pq.write_table(pa.table({"id": ids}), folder / "users.parquet")
    for path in folder.glob("part-*.parquet"):
        table = pq.read_table(path)
        moved = [None if user is None else ids[user] if user < USERS else 5 for user in table["user_id"].to_pylist()]
        pq.write_table(table.set_column(0, "user_id", pa.array(moved, pa.int32())), path)
    vocabulary = {"rows": None, "vocabulary": {"kind": "file", "path": str(folder / "users.parquet")}}
    dataset = opened(make_config, folder, data={"train": str(folder / "part-*")}, tables={"user": vocabulary})
    users = take_survey(dataset, EVERYTHING).ids_json(dataset)["features"]["user_id"]
    assert users["oov_share"] > 0
    assert all(id_ == (None if row == USERS else ids[row]) for row, _, id_ in users["hottest"])


def test_ids_that_share_a_row_of_a_hashed_table_are_not_told(make_config, folder):
    hashed = {"rows": None, "vocabulary": {"kind": "hash", "rows": 4}}
    dataset = opened(make_config, folder, tables={"user": hashed, "item": {"rows": ITEMS}})
    users = take_survey(dataset, EVERYTHING).ids_json(dataset)["features"]["user_id"]
    assert (users["oov_share"], users["distinct_rows"]) == (0.0, 4)
    assert [id_ for _, _, id_ in users["hottest"]] == [None] * 4


def test_of_a_sample_of_row_groups_only_ids_are_counted_from_them_alone(make_config, folder):
    dataset = opened(make_config, folder)
    groups = good_rows_of(folder, "oov")
    assert len(groups) == 7
    whole = take_survey(dataset, EVERYTHING)
    found = take_survey(dataset, Wanted(item_counts=True, interactions=True, labels=True, id_rows=50))
    chosen = [1, 3, 5]
    told = found.ids_json(dataset)
    assert (told["rows"], told["rows_counted"]) == (113, 20 + 10 + 20)
    rows = [row for number in chosen for row in groups[number]]
    assert told["features"]["history"]["ids"] == sum(len(row["history"]) for row in rows)
    assert told["features"]["user_id"]["ids"] == sum(row["user_id"] is not None for row in rows)
    assert found.item_counts.tolist() == whole.item_counts.tolist(), "all else is from every row"
    assert found.interactions.users.tolist() == whole.interactions.users.tolist()
    assert found.label_sum == whole.label_sum


@pytest.mark.parametrize(
    ("wanted", "reads"),
    [
        (Wanted(), 0),
        (Wanted(id_rows=1), 1),
        (Wanted(id_rows=10**9), 7),
        (Wanted(item_counts=True), 7),
        (Wanted(item_counts=True, id_rows=50), 7),
    ],
)
def test_a_row_group_is_read_once_and_only_where_it_is_wanted(make_config, folder, monkeypatch, wanted, reads):
    dataset = opened(make_config, folder)
    read, original = [], Source.read_row_group

    def counting(self, group):
        read.append((self.inventory.row_groups[group].file, group))
        return original(self, group)

    monkeypatch.setattr(Source, "read_row_group", counting)
    found = take_survey(dataset, wanted)
    assert len(read) == len(set(read)) == reads
    assert (found.item_counts is not None, found.interactions is not None) == (wanted.item_counts, wanted.interactions)
    assert bool(found.ids) == bool(wanted.id_rows)
    assert found.label_sum == found.label_weight == 0


@pytest.mark.parametrize("id_rows", [0, 10**9])
def test_rows_without_a_weight_weigh_one_unless_they_are_set_aside(make_config, folder, id_rows):
    wanted = Wanted(interactions=True, labels=True, id_rows=id_rows)
    found = take_survey(opened(make_config, folder, data={"weight": None}), wanted)
    rows = [row for group in good_rows_of(folder, "oov") for row in group]
    assert (found.label_sum, found.label_weight) == (sum(row["clicked"] for row in rows), len(rows))
    assert set(found.interactions.weights.tolist()) == {1.0}


def test_private_ids_are_hashed(make_config, folder):
    told = {}
    for is_private in (False, True):
        loaded = opened(make_config, folder, tracking={"private": is_private})
        told[is_private] = take_survey(loaded, EVERYTHING).ids_json(loaded)["features"]["user_id"]["hottest"]
    assert [count for _, count, _ in told[True]] == [count for _, count, _ in told[False]]
    assert [row for row, _, _ in told[True]] == [None] * len(told[True])
    assert all(id_.startswith("#") and len(id_) == 13 for _, _, id_ in told[True])
    assert len({id_ for _, _, id_ in told[True]}) == len(told[True])
