"""`/recommend` with a history, over real exports: the user's program makes the vector, as `recommend --history` has it."""

import json
import threading

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason="Ray Serve is not installed: pip install -r requirements/ray.txt")
from fastapi.testclient import TestClient

from embedshard.errors import ExportError
from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.serve import histories
from embedshard.serve.app import build_app
from embedshard.serve.engine import Engine, ItemList, Recommend

SEQUENCE = {"kind": "sequence", "table": "item", "column": "history", "max_length": 4}
ATTENTION = {"history": {"kind": "attention"}}
UNSEEN = {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}, "age": {"kind": "dense", "missing": "zero"}}
TOWER = {
    "kind": "two_tower",
    "user": {"features": ["user_id", "history", "age"], "mlp": [16, 8]},
    "item": {"features": ["item_id"]},
}
SASREC = {
    "data": {"validation": None},
    "features": {"history": SEQUENCE, "age": None, "user_id": None},
    "tables": {"user": None},
    "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "heads": 2},
    "objective": {"kind": "sampled_softmax", "num_negatives": 20},
    "evaluate": {"metrics": ["hit_rate@3"], "candidates": "negatives"},
}  # fmt: skip


@pytest.fixture
def client(one_process):
    """A function from the folder of an export to a client of a service over it."""
    return lambda out: TestClient(build_app(one_process(out)), raise_server_exceptions=False)


def assert_as_recommended(served, out, user, history, k=6, typed=None):
    """Asserts that an answer is what `recommend --history` says."""
    typed = ",".join(map(str, history)) if typed is None else typed
    expected = recommend(out, None if user is None else str(user), k, history=typed).to_json()
    answer = served.post("/recommend", json={"user": user, "history": history, "k": k})
    assert answer.status_code == 200, answer.text
    [found] = answer.json()["results"]
    assert (found["user"], found["by"], found["seen"]) == (user, "history", expected["seen"])
    assert [one["id"] for one in found["items"]] == [one["id"] for one in expected["items"]]
    assert [one["score"] for one in found["items"]] == pytest.approx([one["score"] for one in expected["items"]], abs=1e-5)


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_a_history_is_answered_as_the_command_line_does(exported, kind, client):
    changes = {"features": UNSEEN, "tables": {"user": {"rows": 60}}}
    if kind == "sequence":
        changes |= {"features": {**UNSEEN, "history": SEQUENCE}}
        changes |= {"model": {**TOWER, "user": {**TOWER["user"], "sequences": ATTENTION}}}
    _, out, _ = exported(changes)
    served = client(out)
    for history in ([3], [29, 3, 3, 7, 1, 12], [4, 5, 6]):
        for user in (None, 4000, "nobody", 55):  # 55 is in the vocabulary, and has no vector
            assert_as_recommended(served, out, user, history)
    for user in (None, 55):  # the row of an id counts, also where it was never trained
        answer = served.post("/recommend", json={"user": user, "history": [3, 11], "exclude": [4], "k": 30}).json()
        [found] = answer["results"]
        assert {one["id"] for one in found["items"]} == set(range(30)) - {3, 11, 4}
    known = served.post("/recommend", json={"user": 7, "history": [3, 11], "k": 30}).json()["results"][0]
    assert known["by"] == "user"
    assert not {3, 11} & {one["id"] for one in known["items"]}
    partly = served.post("/recommend", json={"history": [999, 3, "x"], "k": 6}).json()["results"][0]
    assert partly["unknown"] == [999, "x"]
    assert partly["items"] == served.post("/recommend", json={"history": [3], "k": 6}).json()["results"][0]["items"]
    nothing = served.post("/recommend", json={"history": [999]})
    assert nothing.status_code == 404
    assert "of the 1 items in 'history' none is known" in nothing.json()["error"]
    stranger = served.post("/recommend", json={"user": 4000})
    assert stranger.status_code == 404
    assert "as 'history'" in stranger.json()["error"]


def test_a_sasrec_without_users_is_served_by_histories(exported, interactions, tmp_path, client):
    table = pq.read_table(interactions / "test" / "part-0.parquet")
    negatives = np.random.default_rng(5).integers(0, 30, (60, 9)).tolist()
    pq.write_table(table.append_column("negatives", pa.array(negatives, pa.list_(pa.int16()))), tmp_path / "test.parquet")
    _, out, _ = exported({**SASREC, "data": {**SASREC["data"], "test": str(tmp_path / "test.parquet")}})
    served = client(out)
    for history in ([3], [3, 9, 4], [1, 2, 3, 4, 5, 6, 7]):
        assert_as_recommended(served, out, None, history, k=20)
        assert_as_recommended(served, out, 12, history, k=20)
    assert served.post("/recommend", json={"user": 12}).status_code == 404
    assert served.post("/score", json={"user": 12, "items": [3]}).status_code == 404
    assert served.post("/similar", json={"item": 12}).status_code == 200


def test_histories_of_a_batch_are_encoded_together_and_none_depends_on_another(exported, monkeypatch):
    model = {**TOWER, "user": {**TOWER["user"], "sequences": ATTENTION}}
    _, out, _ = exported({"features": {**UNSEEN, "history": {**SEQUENCE, "max_length": 9}}, "model": model})
    engine, generator = Engine(open_export(out)), np.random.default_rng(3)
    questions = [
        Recommend(None, 5, (), tuple(generator.integers(0, 30, length).tolist()))
        for length in range(1, 12)
        for _ in range(3)
    ]
    questions += [Recommend(user, 5) for user in (3, 4)] + [Recommend(None, 5, (), (999,))]
    sizes, encode = [], histories.UserTower.encode

    def counted(tower, run, met, vectors):
        sizes.append(len(met))
        return encode(tower, run, met, vectors)

    monkeypatch.setattr(histories.UserTower, "encode", counted)
    together = engine.answer(questions)
    assert sizes == [33]
    monkeypatch.setattr(histories, "_MOST_PLACES", 20)  # as few as two of the longest
    in_parts = engine.answer(questions)
    assert len(sizes) > 5
    assert sum(sizes[1:]) == 33
    for question, answer, part in zip(questions, together, in_parts, strict=True):
        [alone] = engine.answer([question])
        if not isinstance(answer, ItemList):
            assert answer == alone == part
            continue
        assert answer.ids == alone.ids == part.ids, question
        assert np.allclose(answer.scores, alone.scores, atol=1e-5)
        assert np.allclose(answer.scores, part.scores, atol=1e-5)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_histories_are_looked_up_in_the_index(exported, kind, client):
    run, out, _ = exported({"features": UNSEEN})
    export_here(run, out, {}, index=kind, index_tolerance=1.0)
    served = client(out)
    for history in ([3], [4, 5, 6]):
        assert_as_recommended(served, out, None, history)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["no user was named", "more than a history", "'user_id' (id", "'age' (dense", "`missing: zero`"]),
        ({"features": {"user_id": UNSEEN["user_id"]}}, ["more than a history", "'age' (dense"]),
        ({"features": {"age": UNSEEN["age"]}}, ["more than a history", "'user_id' (id", "`unknown: oov`"]),
        ({"model": {**TOWER, "user": {"features": ["user_id"]}}}, ["no list of items, only 'user_id' (id)"]),
    ],
)
def test_what_a_history_does_not_tell_is_named(exported, changes, words, one_process):
    _, out, _ = exported(changes)
    service = one_process(out)
    assert not hasattr(service.replica.live.served.engine._histories, "_tables"), "nothing is held for what cannot be asked"
    answer = TestClient(build_app(service)).post("/recommend", json={"history": [3]})
    assert answer.status_code == 422
    for word in words:
        assert word in answer.json()["error"], answer.json()["error"]
    answer = TestClient(build_app(service)).post("/recommend", json={"user": 7, "history": [3]})
    assert answer.json()["results"][0]["by"] == "user"


def test_where_the_id_is_needed_those_whom_the_vocabulary_knows_are_answered(exported, client):
    _, out, _ = exported({"features": {"age": UNSEEN["age"]}, "tables": {"user": {"rows": 60}}})
    served = client(out)
    assert_as_recommended(served, out, 55, [3, 4])
    for user in (None, 4000):
        answer = served.post("/recommend", json={"user": user, "history": [3, 4]})
        assert answer.status_code == 422
        assert "'user_id' (id" in answer.json()["error"]


def test_lists_are_told_apart(exported, client):
    other = {"kind": "bag", "table": "item", "column": "history", "pooling": "sum"}
    read = ["user_id", "history", "other"]
    changes = {"features": {"user_id": UNSEEN["user_id"], "other": other}, "model": {**TOWER, "user": {"features": read}}}
    _, out, _ = exported(changes)
    served = client(out)
    for name in ("history", "other"):
        assert_as_recommended(served, out, None, {name: [3, 3, 4]}, typed=f"{name}=3,3,4")
    both = served.post("/recommend", json={"history": {"history": [3], "other": [4]}, "k": 30}).json()["results"][0]
    alone = served.post("/recommend", json={"history": {"history": [3]}, "k": 30}).json()["results"][0]
    assert {one["id"] for one in both["items"]} == set(range(30)) - {3, 4}
    assert both["items"][0]["score"] != alone["items"][0]["score"]
    for history, words in (
        ([3], "several lists of items, history, other"),
        ({"owned": [3]}, "'owned' in 'history' is no list"),
    ):
        answer = served.post("/recommend", json={"history": history})
        assert answer.status_code == 422
        assert words in answer.json()["error"]
    known = served.post("/recommend", json={"user": 7, "history": {"other": [3]}, "k": 30}).json()["results"][0]
    assert known["by"] == "user"
    assert 3 not in {one["id"] for one in known["items"]}


def test_unknown_items_count_where_the_list_takes_them_and_met_ones_stay_where_the_config_says(exported, client):
    bag = {"kind": "bag", "table": "item", "unknown": "oov", "mask_zero": True}
    _, out, _ = exported({"features": {**UNSEEN, "history": bag}, "evaluate": {"filter_seen": False}})
    served = client(out)
    for history in ([999], [0, 3, 999], [3, 5]):
        assert_as_recommended(served, out, None, history, k=30)
    answer = served.post("/recommend", json={"history": [3, 999], "k": 30}).json()["results"][0]
    assert answer["unknown"] == [999]
    assert 3 in {one["id"] for one in answer["items"]}
    by_the_unknown_row = [served.post("/recommend", json={"history": [one]}).json()["results"][0] for one in (999, "x")]
    assert [one["unknown"] for one in by_the_unknown_row] == [[999], ["x"]]
    assert by_the_unknown_row[0]["items"] == by_the_unknown_row[1]["items"]
    padding = served.post("/recommend", json={"history": [0]})
    assert padding.status_code == 404, "nothing is left of it"


def test_tables_that_are_sums_of_two_rows_are_looked_up(exported, client):
    in_two = {"rows": None, "vocabulary": {"kind": "quotient_remainder", "ids": 60}}
    clicks = {"data": {"label": "clicked"}, "objective": {"kind": "bce"}, "evaluate": {"metrics": ["auc"]}}
    model = {**TOWER, "biases": ["user"]}
    _, out, _ = exported({"features": UNSEEN, "tables": {"user": in_two}, "model": model, **clicks})
    served = client(out)
    for user in (None, 4000, 55):
        assert_as_recommended(served, out, user, [3, 4])


def test_a_program_leaves_the_threads_of_searches_alone_and_a_wrong_one_is_refused(exported):
    _, out, _ = exported({"features": UNSEEN})
    engine, found = Engine(open_export(out)), []

    def search():
        faiss.omp_set_num_threads(3)
        found.extend(engine.answer([Recommend(None, 5, (), (3,))]))
        found.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert len(found[0].ids) == 5
    assert found[1] == 3
    manifest = json.loads((out / "manifest.json").read_text())
    programs = {
        **manifest["programs"],
        "user": manifest["programs"]["user"] | {"file": manifest["programs"]["item"]["file"]},
    }
    (out / "manifest.json").write_text(json.dumps(manifest | {"programs": programs}))
    with pytest.raises(ExportError, match=r"programs/item\.pt2 does not run"):
        Engine(open_export(out))
