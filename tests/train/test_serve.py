"""The HTTP API over real exports, without Ray: what is answered, what is refused, and how a newer export takes over."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason="Ray Serve is not installed: pip install -r requirements/ray.txt")
from fastapi.testclient import TestClient

from embedshard.errors import ConfigError, ExportError
from embedshard.export.delta import prepare_delta_folder, side_of, write_delta
from embedshard.export.delta_apply import apply_delta, roll_back
from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.launch.serve import ServeRequest, serve_here
from embedshard.serve.app import build_app
from embedshard.serve.deployment import Board, Note, build
from embedshard.serve.engine import Engine, Recommend, Similar
from embedshard.serve.live import LiveExport, candidates
from embedshard.serve.messages import ErrorMessage, Health, RecommendResponse, ScoreResponse, SimilarResponse
from embedshard.serve.settings import Settings, token_digests
from embedshard.storage import Location, locate

TOKEN = "a-token-of-twenty-four-b"


@pytest.fixture
def client(two_exports, one_process):
    """A function from settings to a client of a service over the newer export; the client has the service as `.service`."""

    def client(out=two_exports[1], **settings):
        service = one_process(out, **settings)
        made = TestClient(build_app(service), raise_server_exceptions=False)
        made.service = service
        return made

    return client


def vectors(out, file):
    content = pq.read_table(out / file)
    return dict(zip(content["id"].to_pylist(), np.array(content["vector"].to_pylist(), np.float32), strict=True))


def ids(answer):
    return [item["id"] for item in answer.json()["results"][0]["items"]]


# --------------------------------------------------------------------------------------------------------------- answers
def test_recommend_is_what_the_command_line_says(client, two_exports):
    served = client()
    for user in (0, 7, 39):
        expected = recommend(two_exports[1], str(user), 6).to_json()
        answer = served.post("/recommend", json={"user": user, "k": 6})
        assert answer.status_code == 200, answer.text
        [found] = answer.json()["results"]
        assert (found["user"], found["by"], found["seen"]) == (user, "user", expected["seen"])
        assert [item["id"] for item in found["items"]] == [item["id"] for item in expected["items"]]
        scores = [[item["score"] for item in one["items"]] for one in (found, expected)]
        assert np.allclose(*scores, rtol=1e-5, atol=1e-6)
        assert answer.json()["step"] == expected["step"] == int(answer.headers["X-Embedshard-Step"])
    assert served.post("/recommend", json={"user": "7", "k": 6}).json()["results"][0]["items"] == found_items(served, 7, 6)


def found_items(served, user, k):
    return served.post("/recommend", json={"user": user, "k": k}).json()["results"][0]["items"]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_answer_does_not_depend_on_its_batch(two_exports, tmp_path, kind):
    run, out = two_exports[1].parent / "run", tmp_path / "out"
    export_here(run, out, {}, index=kind, index_tolerance=1.0)
    engine = Engine(open_export(out))
    questions = [Recommend(user, k, tuple(range(k))) for user in range(40) for k in (1, 5, 12)]
    questions += [Similar(item, 4) for item in range(30)]
    together = engine.answer(questions)
    for question, answer in zip(questions, together, strict=True):
        [alone] = engine.answer([question])
        assert answer.ids == alone.ids, question
        assert np.allclose(answer.scores, alone.scores, atol=1e-5)


def test_several_users_are_answered_in_order_and_the_unknown_by_themselves(client):
    answer = client().post("/recommend", json={"users": [7, 4000, 3], "k": 2})
    assert answer.status_code == 200
    first, unknown, last = answer.json()["results"]
    assert (first["user"], last["user"]) == (7, 3)
    assert len(first["items"]) == len(last["items"]) == 2
    assert unknown["user"] == 4000
    assert "items" not in unknown
    assert "4000" in unknown["error"]


def test_excluded_items_are_left_out_and_those_that_are_none_are_named(client):
    served = client()
    best = [item["id"] for item in found_items(served, 7, 5)]
    answer = served.post("/recommend", json={"user": 7, "k": 3, "exclude": [best[0], best[2], 999, "x"]})
    assert ids(answer) == [best[1], best[3], best[4]]
    assert answer.json()["results"][0]["unknown"] == [999, "x"]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_no_list_is_longer_than_there_are_items(two_exports, tmp_path, kind):
    export_here(two_exports[1].parent / "run", tmp_path / "out", {}, index=kind, verifies=False)
    engine = Engine(open_export(tmp_path / "out"))
    longest, all_others, excluding = engine.answer([Recommend(1, 10**9), Similar(3, 10**30), Recommend(1, 10**30, (5,))])
    assert len(longest.ids) + longest.num_seen == 30
    assert sorted(all_others.ids) == sorted(set(range(30)) - {3})
    assert set(excluding.ids) == set(longest.ids) - {5}


def test_similar_items_are_those_of_the_greatest_cosine(client, two_exports):
    items = vectors(two_exports[1], "items.parquet")
    answer = client().post("/similar", json={"items": [4, 5], "k": 3, "exclude": [9]})
    assert answer.status_code == 200, answer.text
    for item, found in zip((4, 5), answer.json()["results"], strict=True):
        cosines = {
            other: float(items[item] @ vector / np.linalg.norm(items[item]) / np.linalg.norm(vector))
            for other, vector in items.items()
            if other not in (item, 9)
        }
        expected = sorted(cosines, key=cosines.get, reverse=True)[:3]
        assert [one["id"] for one in found["items"]] == expected
        assert np.allclose([one["score"] for one in found["items"]], [cosines[one] for one in expected], rtol=1e-5)


def test_scores_are_products_of_the_vectors_also_of_items_that_were_met(client, two_exports):
    users, items = (vectors(two_exports[1], f"{what}.parquet") for what in ("users", "items"))
    answer = client().post("/score", json={"user": 7, "items": [*range(30), 12345]})
    assert answer.status_code == 200, answer.text
    *scores, unknown = answer.json()["scores"]
    assert unknown is None
    assert np.allclose(scores, [users[7] @ items[item] for item in range(30)], rtol=1e-5, atol=1e-6)


def test_metadata_goes_with_the_items(client, tmp_path):
    titles = pa.table({"item_id": list(range(0, 30, 2)), "title": [f"title {item}" for item in range(0, 30, 2)]})
    pq.write_table(titles, tmp_path / "titles.parquet")
    items = found_items(client(metadata=str(tmp_path / "titles.parquet")), 7, 30)
    assert {item["id"] % 2 for item in items} == {0, 1}
    for item in items:
        assert item.get("metadata") == ({"title": f"title {item['id']}"} if item["id"] % 2 == 0 else None)


def test_hashed_ids_are_found_by_their_hash_and_told_by_their_row(
    two_exports, interactions, run_tree, make_config, tmp_path, one_process
):
    tables = {name: {"rows": None, "vocabulary": {"kind": "hash", "rows": 64}} for name in ("user", "item")}
    run_tree(make_config({"train": {"epochs": 1}, "tables": tables}).tree, tmp_path / "run")
    export_here(tmp_path / "run", tmp_path / "out", {})
    served = TestClient(build_app(one_process(tmp_path / "out")))
    expected = recommend(tmp_path / "out", "7", 5)
    items = served.post("/recommend", json={"user": 7, "k": 5}).json()["results"][0]["items"]
    assert [(item["id"], item["row"]) for item in items] == [(None, item.row) for item in expected.items]


def test_answers_are_what_the_openapi_page_says(client, tmp_path):
    pq.write_table(pa.table({"item_id": [1, 2], "price": [float("nan"), 2.5]}), tmp_path / "more.parquet")
    served = client(metadata=str(tmp_path / "more.parquet"))
    for path, body, model in (
        ("/recommend", {"users": [1, 4000], "k": 30, "exclude": [99]}, RecommendResponse),
        ("/recommend", {"user": 1, "history": [4]}, RecommendResponse),
        ("/recommend", {"history": [4]}, ErrorMessage),
        ("/similar", {"items": [1, 99], "k": 30}, SimilarResponse),
        ("/score", {"user": 1, "items": [1, 99]}, ScoreResponse),
        ("/recommend", {"user": 4000}, ErrorMessage),
        ("/recommend", {}, ErrorMessage),
    ):
        answer = served.post(path, json=body)
        assert model.model_validate_json(answer.text, strict=True)
        assert "NaN" not in answer.text
    Health.model_validate_json(served.get("/healthz").text)


# -------------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/recommend", {"k": 3}, ["neither 'user', 'users' nor 'history'"]),
        ("/recommend", {"user": 1, "users": [2]}, ["both 'user' and 'users'"]),
        ("/recommend", {"users": [1], "history": [2]}, ["'history' was given with 'users'"]),
        ("/recommend", {"user": True}, ["user", "an integer or a string", "True"]),
        ("/recommend", {"user": 2**63}, ["user", "64 bits"]),
        ("/recommend", {"user": "x" * 2000}, ["user", "1,024 characters"]),
        ("/recommend", {"user": 1, "k": 0}, ["k", "greater than or equal to 1", "it was 0"]),
        ("/recommend", {"user": 1, "k": "5"}, ["k", "integer", "'5'"]),
        ("/recommend", {"user": 1, "k": 21}, ["k is 21", "at most 20"]),
        ("/recommend", {"user": 1, "count": 3}, ["count", "not permitted"]),
        ("/recommend", {"users": [1, 2, 3, 4]}, ["'users' holds 4", "at most 3"]),
        ("/recommend", {"user": 1, "exclude": list(range(6))}, ["'exclude' holds 6", "at most 5"]),
        ("/recommend", {"history": list(range(6))}, ["'history' holds 6", "at most 5"]),
        ("/recommend", {"history": {"a": [1, 2, 3], "b": [4, 5, 6]}}, ["'history' holds 6", "at most 5"]),
        ("/recommend", {"history": {"a": []}}, ["neither 'user', 'users' nor 'history'"]),
        ("/recommend", {"history": [True]}, ["history", "an integer or a string", "True"]),
        ("/recommend", {"history": {"a": [True]}}, ["history", "a", "an integer or a string", "True"]),
        ("/recommend", {"history": 3}, ["history", "list"]),
        ("/similar", {}, ["neither of 'item' and 'items'"]),
        ("/similar", {"item": 1, "items": [1]}, ["both of 'item' and 'items'"]),
        ("/similar", {"items": [1, 2, 3, 4]}, ["'items' holds 4", "at most 3"]),
        ("/similar", {"items": []}, ["items", "at least 1 item"]),
        ("/score", {"user": 1, "items": list(range(6))}, ["'items' holds 6", "at most 5"]),
        ("/score", {"items": [1]}, ["user", "required"]),
    ],
)
def test_a_wrong_request_is_told_what_was_met_and_what_was_needed(client, path, body, words):
    answer = client(max_k=20, max_users=3, max_items=5).post(path, json=body)
    assert answer.status_code == 422, answer.text
    for word in words:
        assert word in answer.json()["error"], answer.json()["error"]


def test_a_body_that_is_no_json_is_told(client):
    answer = client().post("/recommend", content=b'{"user": ', headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert "no JSON" in answer.json()["error"]
    deep = client().post("/recommend", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert deep.status_code in (400, 422)


def test_what_is_not_known_is_not_found(client):
    served = client()
    user = served.post("/recommend", json={"user": 4000})
    assert user.status_code == 404
    assert "user 4000 was not in the data" in user.json()["error"]
    assert user.json()["error"].endswith("name one of these.")  # its tower reads more than a history
    item = served.post("/similar", json={"item": "nothing"})
    assert item.status_code == 404
    assert "item 'nothing'" in item.json()["error"]
    assert served.post("/score", json={"user": 4000, "items": [1]}).status_code == 404
    assert served.get("/nothing").status_code == 404
    assert served.get("/recommend").status_code == 405
    assert 'embedshard_serve_unknown_total{replica="only",what="user"} 2.0' in served.get("/metrics").text


def test_a_request_that_is_too_large_is_refused_before_it_is_read(client):
    served = client(max_body_bytes=2048)
    answer = served.post("/recommend", json={"user": "x" * 3000})
    assert answer.status_code == 413
    assert "2,048" in answer.json()["error"]

    def chunks():
        for _ in range(1000):
            yield b" " * 1024

    assert served.post("/recommend", content=chunks()).status_code == 413  # of unknown length
    assert served.post("/recommend", json={"user": 7}).status_code == 200


def test_more_than_it_may_have_at_a_time_is_refused_at_once(two_exports, one_process):
    """Four requests wait for their answers; a fifth is not taken, but its health is told."""
    service = one_process(two_exports[1], max_pending=4)
    app = build_app(service)
    go_on, answer = asyncio.Event(), service.ask

    async def slowly(questions):
        await go_on.wait()
        return await answer(questions)

    service.ask = slowly

    async def request(path, body=None):
        sent, given = [], [{"type": "http.request", "body": json.dumps(body).encode() if body else b"", "more_body": False}]

        async def receive():
            return given.pop() if given else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"here")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST" if body else "GET",
                 "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
                 "headers": headers, "client": ("127.0.0.1", 1), "server": ("here", 80)}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])

    async def all_of_them():
        first = [asyncio.create_task(request("/recommend", {"user": user})) for user in range(4)]
        while service.replica.pending < 4:
            await asyncio.sleep(0)
        refused = await request("/recommend", {"user": 5})
        health = await request("/healthz")
        go_on.set()
        return refused, health, await asyncio.gather(*first), await request("/recommend", {"user": 5})

    refused, health, answered, after = asyncio.run(all_of_them())
    assert refused[0] == 503
    assert refused[1][b"retry-after"] == b"1"
    assert [status for status, _ in (health, *answered, after)] == [200] * 6


def test_a_service_that_ends_takes_no_more(client):
    served = client()
    served.service.replica.is_ending = True
    answer = served.post("/recommend", json={"user": 7})
    assert answer.status_code == 503
    assert "ends" in answer.json()["error"]
    assert served.get("/healthz").status_code == 503
    assert served.get("/healthz").json()["status"] == "ending"
    assert served.get("/metrics").status_code == 200


def test_a_client_that_goes_away_while_its_body_is_read_is_no_failure_of_the_service(client):
    served, sent = client(), []
    given = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"us', "more_body": True}]

    async def receive():
        return given.pop()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": "/recommend", "raw_path": b"/recommend", "query_string": b"", "root_path": "", "headers": [],
             "client": ("127.0.0.1", 1), "server": ("here", 80)}  # fmt: skip
    asyncio.run(served.app(scope, receive, send))
    assert sent == []
    assert served.service.replica.pending == 0
    metrics = served.get("/metrics").text
    assert 'requests_total{endpoint="/recommend",replica="only",status="499"} 1.0' in metrics
    assert 'status="500"' not in metrics


def test_who_ends_does_not_wait_for_replicas_that_died(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("embedshard.serve.deployment.time", SimpleNamespace(monotonic=lambda: now[0]))

    def note(replica, pending, is_ending):
        return Note(replica, [], pending, is_ending, made=now[0])

    async def all_of_it():
        board = Board()
        await board.exchange(note("dead", pending=3, is_ending=False))
        now[0] += 3
        await board.exchange(note("alive", pending=1, is_ending=False))
        assert await board.end() == 2, "the first may yet be heard of"
        now[0] += 8
        assert (await board.exchange(note("alive", pending=1, is_ending=True))).ends
        assert await board.end() == 1
        assert set(await board.collect(note("alive", pending=1, is_ending=True))) == {"alive"}
        await board.exchange(note("alive", pending=0, is_ending=True))
        assert await board.end() == 0
        await board.exchange(note("restarted", pending=1, is_ending=False))
        now[0] += 11
        assert await board.end() == 0

    asyncio.run(all_of_it())


def test_a_note_that_was_overtaken_is_not_kept():
    async def all_of_it():
        board = Board()
        await board.exchange(Note("one", ["newer"], pending=0, is_ending=False, made=2.0))
        assert await board.collect(Note("one", ["older"], pending=0, is_ending=False, made=1.0)) == {"one": ["newer"]}
        assert await board.collect(Note("one", ["newest"], pending=0, is_ending=False, made=3.0)) == {"one": ["newest"]}

    asyncio.run(all_of_it())


# ----------------------------------------------------------------------------------------------------------------- tokens
def test_a_token_is_asked_for(client):
    other = "another-token-of-some-length"
    digests = (
        *token_digests(None, {"EMBEDSHARD_SERVE_TOKEN": TOKEN}),
        *token_digests(None, {"EMBEDSHARD_SERVE_TOKEN": other}),
    )
    served = client(token_digests=digests)
    bodies = {"/recommend": {"user": 7}, "/similar": {"item": 7}, "/score": {"user": 7, "items": [1]}, "/reload": None}
    for path, body in bodies.items():
        for header in (None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x"):
            answer = served.post(path, json=body, headers={} if header is None else {"Authorization": header})
            assert answer.status_code == 401, (path, header)
            assert answer.headers["www-authenticate"] == "Bearer"
        for token in (TOKEN, other):
            assert served.post(path, json=body, headers={"Authorization": f"Bearer {token}"}).status_code in (200, 202)
    assert served.get("/metrics").status_code == 401
    assert served.get("/nothing").status_code == 401
    assert served.post("/recommend", content=b"x" * 10**7).status_code == 401
    assert served.get("/openapi.json").status_code == served.get("/docs").status_code == 200


def test_health_needs_no_token_and_tells_less_without(client, two_exports):
    served = client(token_digests=token_digests(None, {"EMBEDSHARD_SERVE_TOKEN": TOKEN}))
    health = served.get("/healthz").json()
    assert health["status"] == "ok"
    assert health["step"] == open_export(two_exports[1]).manifest.step
    assert str(two_exports[1]) not in json.dumps(health)
    assert served.get("/healthz", headers={"Authorization": f"Bearer {TOKEN}"}).json()["export"] == str(two_exports[1])


def test_tokens_are_read_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n\nanother-token-of-some-length\n")
    assert len(token_digests(str(file), {})) == 2
    assert token_digests(None, {}) == ()
    assert TOKEN not in str(token_digests(str(file), {}))
    for content, words in (("", "holds no token"), ("short\n", "at least 16"), ("with a space in it\n", "without spaces")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=words):
            token_digests(str(file), {})
    with pytest.raises(ConfigError, match="cannot be read"):
        token_digests(str(tmp_path / "nothing"), {})


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        ({"host": "0.0.0.0"}, {}, "no token"),
        ({"asks_no_token": True}, {"EMBEDSHARD_SERVE_TOKEN": TOKEN}, "Leave one of them out"),
        ({"host": "203.0.113.7", "asks_no_token": True}, {}, "cannot be listened on"),
    ],
)
def test_where_it_listens_and_who_is_let_in_must_fit(two_exports, changes, environment, words):
    request = ServeRequest(Settings(out=str(two_exports[1])), **changes)
    with pytest.raises(ConfigError, match=words):
        serve_here(request, environment, lambda sentence: None)


def test_an_export_that_cannot_be_served_is_told_before_anything_starts(two_exports, tmp_path):
    shutil.copytree(two_exports[1], tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    notes = {"user": None, "item": None, "index": None, "notes": ["This is a dlrm."]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | notes))
    for out in (tmp_path / "out", tmp_path):
        with pytest.raises(ExportError, match=r"can recommend nothing\. This is a dlrm\."):
            serve_here(ServeRequest(Settings(out=str(out))), {}, lambda sentence: None)


def test_what_a_ray_service_is_given_is_checked(two_exports, tmp_path):
    with pytest.raises(ConfigError, match="no token"):
        build({"out": str(two_exports[1])})
    with pytest.raises(ConfigError, match="max_kk"):
        build({"out": str(two_exports[1]), "no_token": True, "max_kk": 3})
    with pytest.raises(ConfigError, match="replicas"):
        build({"out": str(two_exports[1]), "no_token": True, "replicas": 0})


# ---------------------------------------------------------------------------------------------------------------- reloads
def put(source, target):
    """Copies an export so that it appears whole."""
    shutil.copytree(source, target.parent / f".{target.name}")
    (target.parent / f".{target.name}").rename(target)


def spoil(folder, file="items.parquet"):
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)


def test_a_newer_export_in_the_folder_takes_over(client, two_exports, tmp_path):
    older, newer = two_exports
    put(older, tmp_path / "a")
    served = client(tmp_path)
    steps = [open_export(one).manifest.step for one in two_exports]
    assert served.get("/healthz").json()["step"] == steps[0]
    assert served.post("/reload").status_code == 202
    assert served.get("/healthz").json()["step"] == steps[0]
    put(newer, tmp_path / "b")
    assert served.service.replica.live.look()
    assert served.post("/recommend", json={"user": 7}).json()["step"] == steps[1]
    assert [one["id"] for one in found_items(served, 7, 6)] == [one.id for one in recommend(newer, "7", 6).items]
    assert not served.service.replica.live.look()
    metrics = served.get("/metrics").text
    assert 'embedshard_serve_reloads_total{replica="only"} 1.0' in metrics
    assert f'embedshard_serve_export_step{{replica="only"}} {float(steps[1])}' in metrics
    shutil.rmtree(tmp_path / "b")  # one that was written earlier is not gone back to by itself
    assert not served.service.replica.live.look()
    assert served.get("/healthz").json()["step"] == steps[1]
    (tmp_path / "CURRENT").write_text("a\n")
    assert served.service.replica.live.look()
    assert served.get("/healthz").json()["step"] == steps[0]


def test_an_export_that_is_written_over_takes_over_when_it_is_whole(client, two_exports, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(two_exports[0], out)
    served, live = client(out), None
    live = served.service.replica.live
    (out / "manifest.json").unlink()
    shutil.copy(two_exports[1] / "items.parquet", out)
    assert not live.look()
    assert "no manifest" in served.get("/healthz").json()["trouble"]
    assert served.post("/recommend", json={"user": 7}).status_code == 200
    shutil.copytree(two_exports[1], out, dirs_exist_ok=True)
    assert live.look()
    assert served.get("/healthz").json()["step"] == open_export(two_exports[1]).manifest.step
    assert served.get("/healthz").json()["trouble"] is None


@pytest.mark.parametrize("file", ["items.parquet", "users.parquet", "items.faiss", "seen.parquet", "manifest.json"])
def test_a_broken_export_is_refused_and_the_one_before_is_served_on(client, two_exports, tmp_path, file):
    older, newer = two_exports
    put(older, tmp_path / "a")
    served = client(tmp_path)
    step = served.get("/healthz").json()["step"]
    shutil.copytree(newer, tmp_path / "b")
    if file == "manifest.json":
        manifest = json.loads((tmp_path / "b" / file).read_text())
        (tmp_path / "b" / file).write_text(json.dumps(manifest | {"step": "soon"}))
    else:
        spoil(tmp_path / "b", file)
    assert not served.service.replica.live.look()
    health = served.get("/healthz").json()
    assert health["step"] == step
    assert file in health["refused"]["why"]
    assert health["refused"]["export"] == str(tmp_path / "b")
    assert served.post("/recommend", json={"user": 7}).json()["step"] == step
    metrics = served.get("/metrics").text
    assert 'embedshard_serve_reload_failures_total{replica="only"} 1.0' in metrics
    assert 'embedshard_serve_export_refused{replica="only"} 1.0' in metrics
    assert not served.service.replica.live.look()  # it waits before it tries again
    assert 'reload_failures_total{replica="only"} 1.0' in served.get("/metrics").text
    shutil.copytree(newer, tmp_path / "b", dirs_exist_ok=True)  # what was on its way has come
    served.post("/reload")
    assert served.get("/healthz").json()["step"] == open_export(newer).manifest.step
    assert served.get("/healthz").json()["refused"] is None
    assert 'embedshard_serve_export_refused{replica="only"} 0.0' in served.get("/metrics").text


def test_a_start_with_a_broken_newest_export_serves_the_one_before(client, two_exports, tmp_path):
    put(two_exports[0], tmp_path / "a")
    put(two_exports[1], tmp_path / "b")
    spoil(tmp_path / "b")
    health = client(tmp_path).get("/healthz").json()
    assert health["step"] == open_export(two_exports[0]).manifest.step
    assert "items.parquet" in health["refused"]["why"]
    spoil(tmp_path / "a")
    with pytest.raises(ExportError, match=r"items\.parquet has the SHA-256"):
        LiveExport(tmp_path)


def test_an_export_that_changes_while_it_is_read_is_not_served(two_exports, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(two_exports[0], out)
    live = LiveExport(out)
    shutil.copytree(two_exports[1], out, dirs_exist_ok=True)
    changed = []

    def engine(export, metadata):
        changed.append(export)
        manifest = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps(manifest))
        return Engine(export, metadata)

    monkeypatch.setattr("embedshard.serve.live.Engine", engine)
    assert not live.look()
    assert changed
    assert "replaced while it was read" in live.refusal.why


def rank(folder, when):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"written": when}))


def test_a_refused_export_is_told_until_a_newer_one_took_over(client, two_exports, tmp_path):
    for name, when in (("a", "2001"), ("b", "2002"), ("c", "2003"), ("d", "2004")):
        shutil.copytree(two_exports[1], tmp_path / f"out-{name}")
        rank(tmp_path / f"out-{name}", when)
    exports = tmp_path / "exports"
    exports.mkdir()
    spoil(tmp_path / "out-b")
    put(tmp_path / "out-a", exports / "a")
    put(tmp_path / "out-b", exports / "b")
    served = client(exports)
    live = served.service.replica.live
    assert live.refusal.export == str(exports / "b")  # at the start
    spoil(tmp_path / "out-d")
    put(tmp_path / "out-d", exports / "d")
    assert not live.look()
    assert live.refusal.export == str(exports / "d"), "it is the best that is refused"
    put(tmp_path / "out-c", exports / "c")
    assert live.look()
    assert live.served.export.folder.name == "c"
    assert live.refusal.export == str(exports / "d")
    shutil.copytree(two_exports[0], exports / ".e")
    rank(exports / ".e", "2005")
    (exports / ".e").rename(exports / "e")
    assert live.look()
    assert live.refusal is None
    assert not live.look()
    assert served.get("/healthz").json()["refused"] is None
    assert 'embedshard_serve_export_refused{replica="only"} 0.0' in served.get("/metrics").text
    (exports / "CURRENT").write_text("d")
    assert not live.look()
    assert live.refusal.export == str(exports / "d")
    (exports / "CURRENT").write_text("e")
    assert not live.look()
    assert live.refusal is None


@pytest.mark.parametrize("change", ["apply", "rollback"])
def test_while_a_delta_is_applied_to_what_is_served_it_is_served_on(two_exports, tmp_path, monkeypatch, change):
    older, newer = two_exports
    out, delta = tmp_path / "out", tmp_path / "delta"
    shutil.copytree(older, out)
    prepare_delta_folder(locate(delta))
    write_delta(side_of(open_export(older)), side_of(open_export(newer)), locate(delta))
    if change == "rollback":
        apply_delta(delta, out)
    live, met = LiveExport(out), []
    before, after = (older, newer) if change == "apply" else (newer, older)
    put_file = Location.replace_by

    def looking(self, source):
        if not (out / "manifest.json").exists() and not met:
            assert not live.look(at_once=True)
            met.append((live.trouble, live.refusal))
            with pytest.raises(ExportError) as error:
                LiveExport(out)
            met.append(str(error.value))
        put_file(self, source)

    monkeypatch.setattr(Location, "replace_by", looking)
    apply_delta(delta, out) if change == "apply" else roll_back(out)
    (trouble, refusal), at_a_start = met
    assert refusal is None
    assert "is between two exports" in trouble
    assert "is between two exports" in at_a_start
    assert live.served.engine.step == open_export(before).manifest.step
    assert live.look()
    assert live.trouble is live.refusal is None
    assert live.served.engine.step == open_export(after).manifest.step


def test_what_is_no_export_is_told(two_exports, tmp_path):
    with pytest.raises(ExportError, match="is not there"):
        candidates(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="holds no export"):
        candidates(tmp_path)
    put(two_exports[0], tmp_path / "a")
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "manifest.json").write_text(json.dumps({"kind": "delta", "written": "2999"}))
    assert [one.folder.name for one in candidates(tmp_path)] == ["a"]
    (tmp_path / "CURRENT").write_text("../a")
    with pytest.raises(ExportError, match="must be the name of an export"):
        candidates(tmp_path)
    (tmp_path / "CURRENT").write_text("b")
    with pytest.raises(ExportError, match="names b"):
        candidates(tmp_path)


def test_the_thread_finds_a_newer_export_by_itself_and_ends(two_exports, tmp_path):
    put(two_exports[0], tmp_path / "a")
    told = []
    live = LiveExport(tmp_path, poll_s=0.05, changed=told.append)
    live.start()
    assert live.is_watching
    put(two_exports[1], tmp_path / "b")
    for _ in range(1000):
        if len(told) > 1:
            break
        live._ended.wait(0.05)
    live.stop()
    assert not live.is_watching
    assert [one.engine.step for one in told] == [open_export(one).manifest.step for one in two_exports]


def test_the_metrics_page_is_of_all_replicas_and_prometheus_reads_it(client):
    from prometheus_client.parser import text_string_to_metric_families

    from embedshard.serve.metrics import page

    first, second = client(), client()
    first.post("/recommend", json={"users": [1, 2, 3]})
    second.post("/score", json={"user": 4000, "items": [1]})
    text = page({"a": first.service.replica.collect(), "b": second.service.replica.collect()}).decode()
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    requests = "embedshard_serve_requests_total"
    assert found[requests, ("endpoint", "/recommend"), ("replica", "a"), ("status", "200")] == 1
    assert found[requests, ("endpoint", "/score"), ("replica", "b"), ("status", "404")] == 1
    assert found["embedshard_serve_batch_questions_sum", ("replica", "a")] == 3
    assert found["embedshard_serve_request_seconds_count", ("endpoint", "/recommend"), ("replica", "a")] == 1


def test_the_openapi_page_tells_routes_limits_and_the_token(client):
    served = client(max_k=77, token_digests=token_digests(None, {"EMBEDSHARD_SERVE_TOKEN": TOKEN}))
    found = served.get("/openapi.json").json()
    assert set(found["paths"]) == {"/recommend", "/similar", "/score", "/healthz", "/metrics", "/reload"}
    assert "77" in found["info"]["description"]
    assert found["paths"]["/recommend"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in found["paths"]["/healthz"]["get"]
    request = found["components"]["schemas"]["RecommendRequest"]
    assert request["properties"]["history"]["description"]
    assert request["additionalProperties"] is False
