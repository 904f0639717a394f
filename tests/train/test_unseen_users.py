"""`embedshard recommend --history`, and exports whose users are histories or whose rows change hands."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.data.columns import Flat
from embedshard.errors import ConfigError, DataError, ExportError
from embedshard.export.manifest import open_export
from embedshard.export.program_file import load_program
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.world import open_world
from tests.commands import run_command

SEQUENCE = {"kind": "sequence", "table": "item", "column": "history", "max_length": 4}
UNSEEN = {
    "features": {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}, "age": {"kind": "dense", "missing": "zero"}},
}


def test_an_unseen_user_is_recommended_by_the_items_that_they_met(exported):
    _, out, _ = exported(UNSEEN)
    vectors = {
        name: {row["row"]: np.array(row["vector"]) for row in pq.read_table(out / "tables" / f"{name}.parquet").to_pylist()}
        for name in ("user", "item")
    }
    items = np.array(pq.read_table(out / "items.parquet")["vector"].to_pylist())
    program = load_program(open_export(out).file("programs/user.pt2"))
    history = [29, 3, 3, 7, 1]
    for user, row in ((None, 40), ("4000", 40), ("5", 5)):
        bag = np.mean([vectors["item"][item] for item in history[-4:]], axis=0)
        vector = program(
            user_id=torch.tensor(vectors["user"][row], dtype=torch.float32)[None],
            history=torch.tensor(bag, dtype=torch.float32)[None],
            age=torch.tensor([float("nan")], dtype=torch.float64),
        )["vector"][0]
        found = recommend(out, user, 5, history="29,3,3,7,1")
        seen = {1, 3, 7, 29}  # 29 too, which is not among the last four that the tower reads
        if row == 5:
            pairs = pq.read_table(out / "seen.parquet").to_pylist()
            seen |= {pair["item"] for pair in pairs if pair["user"] == 5}
        scores = items @ vector.numpy()
        expected = [item for item in np.argsort(-scores).tolist() if item not in seen][:5]
        assert [item.id for item in found.items] == expected
        assert [item.score for item in found.items] == pytest.approx(scores[expected].tolist(), abs=1e-5)
        assert found.num_seen == len(seen)
        assert found.user == user
    with pytest.raises(DataError, match=r"--history.*'77' is not among"):
        recommend(out, None, 5, history="3,77")
    with pytest.raises(DataError, match="names no item"):
        recommend(out, None, 5, history=" ,")
    with pytest.raises(ConfigError, match="neither a user nor a history"):
        recommend(out, None, 5)
    with pytest.raises(DataError, match=r"no vector of user '4000'.*--history 1,5,9"):
        recommend(out, "4000", 5)
    shown = run_command("recommend", out, "--history", "3,7", "-k", "2", "--json")
    told = json.loads(shown.stdout)
    assert (told["user"], told["history"], len(told["items"]), told["seen"]) == (None, "3,7", 2, 2)
    file = out / "programs" / "user.pt2"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ExportError, match=r"programs/user\.pt2"):
        recommend(out, None, 5, history="3")


def test_what_an_unseen_user_lacks_is_named(exported):
    _, out, _ = exported({})
    with pytest.raises(DataError, match=r"reads more than a history: .*'user_id' \(id, .*'age' \(dense, .*missing: zero"):
        recommend(out, None, 5, history="3")
    with pytest.raises(DataError, match=r"'age' \(dense"):
        recommend(out, "7", 5, history="3")


def test_lists_are_told_apart_and_a_tower_without_any_says_so(exported):
    two = {"kind": "bag", "table": "item", "column": "history", "pooling": "sum"}
    tower = {"kind": "two_tower", "item": {"features": ["item_id"]}}
    user_id = {"kind": "id", "table": "user", "unknown": "oov"}
    read = ["user_id", "history", "other"]
    changes = {"features": {"user_id": user_id, "other": two}, "model": tower | {"user": {"features": read}}}
    _, out, _ = exported(changes)
    with pytest.raises(DataError, match=r"several lists of items, history, other.*--history history=3"):
        recommend(out, None, 5, history="3")
    one, another = (recommend(out, None, 5, history=f"{name}=3,3,4") for name in ("history", "other"))
    assert [item.score for item in one.items] != [item.score for item in another.items]
    _, out, _ = exported({"model": tower | {"user": {"features": ["user_id"]}}})
    with pytest.raises(DataError, match=r"reads no list of items, only 'user_id' \(id\)\."):
        recommend(out, None, 5, history="3")


def test_a_sasrec_without_users_is_replayed_and_recommends_by_histories(exported, interactions, tmp_path):
    table = pq.read_table(interactions / "test" / "part-0.parquet")
    negatives = np.random.default_rng(5).integers(0, 30, (60, 9)).tolist()
    pq.write_table(table.append_column("negatives", pa.array(negatives, pa.list_(pa.int16()))), tmp_path / "test.parquet")
    changes = {
        "data": {"test": str(tmp_path / "test.parquet"), "validation": None},
        "features": {"history": SEQUENCE, "age": None, "user_id": None},
        "tables": {"user": None},
        "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "heads": 2},
        "objective": {"kind": "sampled_softmax", "num_negatives": 20},
        "evaluate": {"metrics": ["hit_rate@3"], "candidates": "negatives"},
    }
    _, out, found = exported(changes, quantise="int8")
    assert found.verification.passed
    assert found.verification.against == "result.json"
    assert found.verification.queries == 60
    assert found.verification.metrics["hit_rate@3"]["run"] > 0
    assert "int8 tables" in found.verification.quantised
    assert found.manifest.user is None
    assert found.manifest.item.vectors == 30
    best = recommend(out, None, 27, history="3,9,4")
    assert {item.id for item in best.items} == set(range(30)) - {3, 9, 4}
    assert best.num_seen == 3
    with pytest.raises(ExportError, match="no feature names them"):
        recommend(out, "3", 5)


def test_vectors_of_ids_that_hold_a_row_are_the_models(exported, interactions):
    managed = {"kind": "managed", "rows": 24, "buckets": 4}
    tower = {"kind": "two_tower", "user": {"features": ["user_id"]}, "item": {"features": ["item_id"]}, "biases": ["item"]}
    changes = {
        "features": {"history": None, "age": None},
        "tables": {name: {"rows": None, "vocabulary": managed} for name in ("user", "item")},
        "model": tower,
        "evaluate": {"metrics": []},
    }
    run, out, found = exported(changes, quantise="fp16")
    assert found.programs.problems == []
    manifest = open_export(out).manifest
    with open_world("cpu") as world:
        parts = assemble(RunDirectory.open(run).load_config({}).config, world, initialises=False)
        restore_model(newest_intact(RunDirectory(run).checkpoints), parts.model, parts.managed)
        model = parts.model.eval().module
        columns = {"user_id": Flat(np.arange(40)), "item_id": Flat(np.arange(40) % 30)}
        batch = parts.collator.batch(columns, 0, 40)
        with torch.no_grad():
            made = {"user": model.encode_queries(batch), "item": model.encode_candidates(batch)}
    for side, tower in (("user", manifest.user), ("item", manifest.item)):
        rows = pq.read_table(out / tower.file).to_pylist()
        table = pq.read_table(out / manifest.tables[side].file).to_pylist()
        assert [(one["id"], one["row"]) for one in rows] == [
            (one["id"], one["row"]) for one in table if one["id"] is not None
        ]
        assert 10 < len(rows) <= 24, "not all of them hold a row"
        for one in rows:
            assert one["vector"] == pytest.approx(made[side][one["id"]].tolist(), abs=1e-6)
    known = pq.read_table(out / "users.parquet")["id"].to_pylist()
    lost = next(user for user in range(40) if user not in known)
    items = {one["id"]: np.array(one["vector"]) for one in pq.read_table(out / "items.parquet").to_pylist()}
    scores = {item: float(vector @ made["user"][known[0]].numpy()) for item, vector in items.items()}
    best = recommend(out, str(known[0]), 5).items
    assert [one.id for one in best] == sorted(scores, key=lambda item: -scores[item])[:5]
    with pytest.raises(DataError, match=f"no vector of user '{lost}'.*ids that hold one"):
        recommend(out, str(lost), 5)


def test_where_a_program_is_missing_the_notes_say_so_of_the_vectors(exported, monkeypatch):
    import embedshard.launch.export_programs as module

    save = module.save_program

    def untraced(traced, program, folder):
        if program.file == "programs/item.pt2":
            raise ExportError("torch.export cannot trace the model: RuntimeError: a reason")
        save(traced, program, folder)

    monkeypatch.setattr(module, "save_program", untraced)
    managed = {"kind": "managed", "rows": 24, "buckets": 4}
    changes = {
        "tables": {"item": {"rows": None, "vocabulary": managed}},
        "evaluate": {"metrics": []},
    }
    notes = exported(changes)[2].manifest.notes
    assert "There are no vectors of items: the program 'item', which would make them, is missing." in notes
    assert "There are no vectors of users: their tower reads history, age, which no id alone tells." in notes
    assert any(note.startswith("There is no program 'item': torch.export cannot trace") for note in notes)


def test_where_items_alone_change_hands_users_are_those_of_the_training_data(exported, interactions):
    changes = {
        "features": {"history": None, "age": None},
        "tables": {
            "item": {"rows": None, "vocabulary": {"kind": "managed", "rows": 24, "buckets": 4}},
            "user": {"rows": 90},
        },
        "model": {"kind": "two_tower", "user": {"features": ["user_id"]}, "item": {"features": ["item_id"]}},
        "evaluate": {"metrics": []},
    }
    run, out, _ = exported(changes)
    met = {user for file in (interactions / "train").iterdir() for user in pq.read_table(file)["user_id"].to_pylist()}
    assert pq.read_table(out / "users.parquet")["id"].to_pylist() == sorted(met)
    assert len(recommend(out, str(min(met)), 5).items) == 5
    with pytest.raises(DataError, match="user '77' was not in the data"):
        recommend(out, "77", 5)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(interactions / "train"), str(interactions / "gone")))
    manifest = export_here(run, out, {}).manifest
    assert manifest.user is None
    assert manifest.item is not None
    assert "of whom the data tell which there are" in manifest.notes[-1]
