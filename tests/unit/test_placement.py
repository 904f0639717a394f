"""Explicit plans and what the config says of them: pure functions of sizes and the world."""

import pytest

from embedshard.config import TableSpec, table_specs
from embedshard.config.parts import InitConfig, TableOptimizerConfig, TableShardingConfig
from embedshard.errors import ConfigError, PlanError
from embedshard.sharding.explicit import Placement, leaves_empty_pieces, place_tables
from embedshard.sharding.ownership import check_ownership
from embedshard.train.assembly import assemble
from embedshard.world import open_world


def spec(name, kind, rows=99, dim=8, ranks=(), optimizer="sgd"):
    return TableSpec(
        name=name,
        rows=rows,
        dim=dim,
        dtype="fp32",
        init=InitConfig(),
        optimizer=TableOptimizerConfig(kind=optimizer),
        l2_lookup=0.0,
        weighted=False,
        lookups=(),
        sharding=TableShardingConfig(type=kind, ranks=list(ranks)),
    )


@pytest.mark.parametrize(
    ("kind", "ranks", "expected"),
    [
        ("table_wise", (), Placement("table_wise", (0,))),
        ("table_wise", (3,), Placement("table_wise", (3,))),
        ("column_wise", (), Placement("column_wise", (0, 1), 2)),
        ("column_wise", (2, 2), Placement("column_wise", (2, 2), 2)),
        ("table_column_wise", (), Placement("table_column_wise", (0, 1), 2)),
        ("table_column_wise", (3, 2), Placement("table_column_wise", (3, 2), 2)),
        ("row_wise", (), Placement("row_wise", (0, 1, 2, 3))),
        ("table_row_wise", (), Placement("table_row_wise", (0, 1))),
        ("table_row_wise", (2, 3), Placement("table_row_wise", (2, 3))),
        ("grid_shard", (), Placement("grid_shard", (0, 1, 2, 3), 2)),
        ("grid_shard", (2, 3, 0, 1), Placement("grid_shard", (2, 3, 0, 1), 2)),
        ("data_parallel", (), Placement("data_parallel", (0, 1, 2, 3))),
    ],
)
def test_each_type_lies_where_it_says_or_where_it_must(kind, ranks, expected):
    assert place_tables([spec("item", kind, ranks=ranks)], 4, 2) == {"item": expected}
    assert place_tables([spec("item", kind, ranks=ranks)], 1, 1) == {"item": Placement("table_wise", (0,))}


def test_the_largest_tables_come_first_and_each_goes_where_least_lies():
    specs = [spec(name, "table_wise", rows) for name, rows in (("a", 10), ("b", 100), ("c", 60), ("d", 50))]
    places = place_tables(specs, 2, 2)
    assert {name: place.ranks for name, place in places.items()} == {"b": (0,), "c": (1,), "d": (1,), "a": (0,)}
    assert list(places) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("rows", "pieces", "expected"),
    [(3, 4, True), (4, 4, False), (9, 4, True), (10, 4, False), (101, 64, True), (1, 1, False), (41, 4, False)],
)
def test_rows_that_would_leave_a_piece_empty_are_not_cut(rows, pieces, expected):
    assert leaves_empty_pieces(rows, pieces) == expected
    place = place_tables([spec("item", "row_wise", rows - 1)], pieces, pieces)["item"] if pieces > 1 else None
    assert place is None or (place.sharding_type == "table_wise") == expected


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("table_wise", (4,), r"names rank 4, and this run has 4 workers: ranks 0 to 3"),
        ("table_column_wise", (1, 2), r"\[1, 2\] are on several machines of 2 workers each"),
        ("table_row_wise", (1, 2), r"must be all ranks of one machine.*\[0, 1\], \[2, 3\]"),
        ("table_row_wise", (0, 1, 2, 3), r"must be all ranks of one machine"),
        ("grid_shard", (0, 1, 2), r"must be all ranks of each of its machines"),
    ],
)
def test_ranks_that_a_type_cannot_have_are_refused(kind, ranks, message):
    with pytest.raises(PlanError, match=rf"tables\.item\.sharding\.ranks.*{message}"):
        place_tables([spec("item", kind, ranks=ranks)], 4, 2)


@pytest.mark.parametrize(
    ("sharding", "planner", "message"),
    [
        ({"types": ["row_wise"]}, "explicit", r"type is missing: sharding\.planner is 'explicit'"),
        ({"type": "row_wise", "types": ["row_wise"]}, "explicit", r"types is for sharding\.planner 'auto'"),
        ({"type": "row_wise"}, "auto", r"type is for sharding\.planner 'explicit'"),
        ({"ranks": [0]}, "auto", r"ranks is for sharding\.planner 'explicit'"),
        ({"type": "row_wise", "ranks": [0, 1]}, "explicit", r"a row_wise table lies on all ranks"),
        ({"type": "table_wise", "ranks": [0, 1]}, "explicit", r"lies on one rank, given are 2"),
        ({"type": "table_wise", "ranks": [-1]}, "explicit", r"Ranks are counted from 0"),
        ({"type": "table_row_wise", "ranks": [1, 1]}, "explicit", r"names a rank twice"),
        ({"types": ["row_wise", "column_wise"]}, "auto", r"column_wise keeps one statistic .* per row and block.*adagrad"),
        (
            {"type": "column_wise", "ranks": [0, 1, 2], "allow_changed_optimizer": True},
            "explicit",
            r"8 columns do not divide into 3 equal blocks of a multiple of 4\. Give 2 ranks",
        ),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused_by_the_config(make_config, sharding, planner, message):
    user = {"type": "table_wise"} if planner == "explicit" else {}
    changes = {"sharding": {"planner": planner}, "tables": {"item": {"sharding": sharding}, "user": {"sharding": user}}}
    with pytest.raises(ConfigError, match=rf"tables\.item\.sharding.*{message}"):
        make_config(changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizer": {"kind": "adam"}}, r"dense Adam, which moves every row at each step"),
        ({"dtype": "fp16"}, r"keep its state in fp16"),
    ],
)
def test_a_data_parallel_table_that_would_train_otherwise_is_refused(make_config, table, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"tables": {"item": {**table, "sharding": {"types": ["data_parallel"]}}}})


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ({"type": "column_wise", "ranks": [1, 0]}, {"type": "table_wise", "ranks": [1]}),
        ({"type": "grid_shard"}, {"type": "table_row_wise"}),
        ({"type": "table_row_wise", "ranks": [2, 3]}, {"type": "table_row_wise", "ranks": [2, 3]}),
        ({"type": "data_parallel"}, {"type": "data_parallel"}),
    ],
)
def test_a_bias_is_cut_as_its_table_but_for_its_columns(make_config, sharding, expected):
    tables = {"item": {"sharding": sharding, "optimizer": {"kind": "sgd"}}, "user": {"sharding": {"type": "row_wise"}}}
    config = make_config({"sharding": {"planner": "explicit"}, "tables": tables}).config
    bias = table_specs(config, {"user": 40, "item": 30})[-1]
    assert bias.name == "item_id:bias"
    assert bias.sharding == TableShardingConfig.model_validate(expected)


def test_a_plan_that_changes_an_optimizer_is_refused_after_sharding_too(make_config, monkeypatch):
    with open_world("cpu") as world:
        parts = assemble(make_config().config, world)
        monkeypatch.setattr("embedshard.sharding.ownership.num_column_blocks", lambda model: dict.fromkeys(names, 2))
        names = [spec.name for spec in parts.specs]
        with pytest.raises(PlanError, match=r"table 'item' is cut into 2 blocks.*keep 2 statistics per row instead of 1"):
            check_ownership(parts.model, parts.specs, {}, {}, world)


def test_what_the_config_allows_beside_law_one_is_said(make_config):
    from embedshard.models.summary import sharding_exceptions

    changes = {
        "sharding": {"communication": "fp16"},
        "tables": {"item": {"sharding": {"types": ["column_wise"], "allow_changed_optimizer": True}}},
    }
    config = make_config(changes).config
    found = sharding_exceptions(config, table_specs(config, {"user": 40, "item": 30}))
    assert len(found) == 2
    assert "tables.item.sharding allows another optimizer: column_wise keeps" in found[0]
    assert "sharding.communication is 'fp16'" in found[1]
