"""Item embeddings through the trainer: pairs that no world changes, exact resumption, groups that are told apart."""

import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from embedshard.cli import app
from embedshard.config import build_config
from embedshard.data.order import Position
from embedshard.errors import ConfigError, DataError, ExportError
from embedshard.export import towers
from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.launch.local import evaluate_here
from embedshard.launch.similar import similar_here, similar_to
from embedshard.serve.app import build_app
from embedshard.testing import assert_plan_invariant
from embedshard.train.assembly import assemble
from embedshard.train.state import TrainState
from embedshard.train.tracking import JsonLinesReporter
from embedshard.train.unlearnt import check_learnt
from embedshard.world import open_world
from tests.commands import run_ranks

WORDS = [f"{group}{number}" for number in range(12) for group in ("even", "odd")]
OBJECTIVES = {
    "negative_sampling": {"num_negatives": 32, "distribution": "popularity", "negative_weight": 5},
    "nce": {"num_negatives": 64, "distribution": "popularity"},
    "sampled_softmax": {"num_negatives": 32},
    "softmax": {},
    "hierarchical_softmax": {},
}


def write_sentences(folder, rows, seed):
    """Sentences of 0 to 11 words, all of one group or the other; some words are far more frequent than others."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, 13)
    sentences = []
    for _ in range(rows):
        group, length = generator.integers(0, 2), generator.integers(0, 12)
        numbers = generator.choice(12, length, p=popularity / popularity.sum())
        sentences.append([WORDS[2 * number + group] for number in numbers])
    weights = generator.choice([0.5, 1.0, 2.0], rows)
    pq.write_table(pa.table({"words": sentences, "weight": weights}), folder / "part.parquet", row_group_size=70)


@pytest.fixture
def make_tree(tmp_path):
    def make(objective="negative_sampling", **model):
        folder = tmp_path / "train"
        if not folder.exists():
            write_sentences(folder, 310, 1)
            pq.write_table(pa.table({"id": WORDS}), tmp_path / "words.parquet")
        return {
            "seed": 3,
            "data": {"train": str(folder), "lanes": 4, "weight": "weight"},
            "features": {"words": {"kind": "sequence", "table": "word"}},
            "tables": {
                "word": {"dim": 8, "vocabulary": {"kind": "file", "path": str(tmp_path / "words.parquet")}},
            },
            "model": {"kind": "item_embedding", "sequence": "words", "window": 3, "subsample": 0.1} | model,
            "objective": {"kind": objective} | OBJECTIVES[objective],
            "optimizer": {"tables": {"lr": 0.1}},
            "train": {"global_batch_size": 32, "epochs": 1},
            "tracking": {"tensorboard": False},
        }  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("objective", "drawn_for", "by_side"),
    [
        ("negative_sampling", "batch", False),
        ("negative_sampling", "batch", True),
        ("nce", "lane", True),
        ("hierarchical_softmax", None, False),
    ],
)
def test_no_world_and_no_cut_changes_what_is_trained(make_tree, objective, drawn_for, by_side, groups):
    tree = make_tree(objective, by_side=by_side)
    if drawn_for is not None:
        tree["objective"]["drawn_for"] = drawn_for
    assert_plan_invariant(build_config(tree, {}, "test"), steps=6, worlds=(2,), types=["row_wise"], groups=groups)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_run_goes_on_bit_for_bit(run_tree, make_tree, tmp_path, saved_tensors, assert_same_tensors, objective):
    tree = make_tree(objective)
    tree["train"]["epochs"] = 2
    run_tree(tree, tmp_path / "whole")
    path = tmp_path / "run"
    run_tree({**tree, "train": {**tree["train"], "max_steps": 13}}, path)
    (path / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    run_tree(tree, path, resume_step=13)
    assert_same_tensors(saved_tensors(path), saved_tensors(tmp_path / "whole"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_words_that_stand_together_end_together(run_tree, make_tree, tmp_path, objective):
    tree = make_tree(objective, subsample=None)
    tree["train"] |= {"epochs": 12}
    run_tree(tree, tmp_path / "run")
    for word in ("even0", "odd3"):
        found = similar_here(tmp_path / "run", word, 8, {})
        assert found.table == "word"
        group = word.rstrip("0123456789")
        names = [neighbour.id for neighbour in found.neighbours]
        assert word not in names
        assert sum(name.startswith(group) for name in names) >= 7, names
        scores = [neighbour.cosine for neighbour in found.neighbours]
        assert scores == sorted(scores, reverse=True)


def test_tables_are_derived_with_the_rows_that_they_need(run_tree, make_tree, tmp_path, saved_tensors):
    shapes = {}
    for objective in OBJECTIVES:
        run_tree({**make_tree(objective), "train": {"global_batch_size": 32, "max_steps": 1}}, tmp_path / objective)
        tensors = saved_tensors(tmp_path / objective)[1]
        shapes[objective] = {
            name.split("/")[1]: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("/weight")
        }
    pair = {"word": (25, 8), "words:context": (25, 8)}
    assert shapes["negative_sampling"] == shapes["sampled_softmax"] == shapes["softmax"] == pair
    assert shapes["nce"] == pair | {"words:context:bias": (25, 4)}
    assert shapes["hierarchical_softmax"] == {"word": (25, 8), "words:node": (24, 8)}


def test_a_batch_holds_the_same_pairs_in_every_world(make_tree):
    config = build_config(make_tree(), {}, "test")
    with open_world("cpu") as world:
        parts = assemble(config, world)
        readers = {
            (rank, size): type(parts.reader())(
                parts.dataset.order, parts.dataset.train, parts.dataset.cached, config.data.cache_bytes, parts.collator,
                parts.dataset.sampler, rank, size,
            )
            for size in (1, 4)
            for rank in range(size)
        }  # fmt: skip
        found = {}
        for (rank, size), reader in readers.items():
            with reader.batches(0, 12) as batches:
                found[rank, size] = [as_words(next(batches)) for _ in range(12)]
    for step in range(12):
        assert [pair for rank in range(4) for pair in found[rank, 4][step]] == found[0, 1][step]
    assert found[0, 1][0]


def as_words(batch):
    """The pairs of a batch as (row, centre's id, context's id, weight)."""
    pairs, ids = batch.pairs, batch.sequences["words"].values()[batch.pairs.ids]
    rows = batch.rows[pairs.rows]
    return list(
        zip(rows.tolist(), ids[pairs.centres].tolist(), ids[pairs.contexts].tolist(), pairs.weights.tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": {"words": {"kind": "bag", "table": "word"}}}, "model.sequence: feature 'words' is a bag"),
        ({"model": {"kind": "item_embedding", "sequence": "word"}}, "no feature 'word'. Did you mean 'words'"),
        ({"objective": {"kind": "bpr"}}, "'bpr' does not learn pairs of a list"),
        ({"objective": {"kind": "sampled_softmax", "mixed": True}}, "objective.mixed takes the items of other rows"),
        ({"objective": {"kind": "nce", "num_negatives": 6}}, "num_negatives=6 does not divide into data.lanes=4"),
        (
            {
                "model": {"kind": "item_embedding", "sequence": "words", "by_side": True},
                "objective": {"kind": "hierarchical_softmax"},
            },
            "model.by_side: 'hierarchical_softmax' compares centres with the nodes of a tree",
        ),
        ({"evaluate": {"metrics": ["recall@5"]}}, "Choose 'loss'"),
        ({"evaluate": {"metrics": ["loss"], "baselines": ["popularity"]}}, "evaluate.baselines"),
    ],
)
def test_what_makes_no_pairs_is_refused(make_tree, changes, words):
    with pytest.raises(ConfigError, match=words):
        build_config(make_tree() | changes, {}, "test")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lists_without_a_pair_train_nothing_and_say_so(run_tree, make_tree, tmp_path, objective):
    """All lists were of one word: the run ended well, with a loss of 0."""
    tree = make_tree(objective)
    pq.write_table(pa.table({"words": [["even0"]] * 80 + [[]] * 20, "weight": [1.0] * 100}), tmp_path / "single.parquet")
    tree["data"]["train"] = str(tmp_path / "single.parquet")
    words = r"epoch 1 of the training data, up to step 4, has no list with two places.*column 'words'.*A list needs two ids"
    with pytest.raises(DataError, match=words):
        run_tree(tree, tmp_path / "run")
    tree["train"] |= {"max_steps": 2}
    with pytest.raises(DataError, match="the training data of the run, up to step 2"):
        run_tree(tree, tmp_path / "short")


def test_a_later_epoch_without_a_pair_is_said(make_tree):
    config = build_config(make_tree(), {}, "test")
    said = []

    def look(idle, step, is_epoch_end=True):
        state = TrainState(step=step, steps_without_loss=idle)
        check_learnt(config, state, Position(step - 1, 1, 0, 9, is_epoch_end), 10, False, said.append)

    look(9, 20)
    look(10, 15, is_epoch_end=False)
    assert not said, "a step had a pair, or the epoch goes on"
    look(10, 20)
    assert "Nothing was learnt in 10 steps: epoch 2 of the training data" in said[0]
    with pytest.raises(DataError, match="nothing was learnt"):
        look(20, 20)


def test_other_features_and_models_are_refused(make_tree):
    tree = make_tree()
    tree["features"]["age"] = {"kind": "dense"}
    with pytest.raises(ConfigError, match=r"features\.age: an item_embedding reads 'words' alone"):
        build_config(tree, {}, "test")
    tree = make_tree("hierarchical_softmax")
    tree["features"] = {"user": {"kind": "id", "table": "word"}, "item": {"kind": "id", "table": "word"}}
    tree["model"] = {"kind": "two_tower", "user": {"features": ["user"]}, "item": {"features": ["item"]}}
    with pytest.raises(ConfigError, match="learns pairs of a list, which a model of kind 'item_embedding' makes"):
        build_config(tree, {}, "test")
    tree["objective"] = {"kind": "negative_sampling", "drawn_for": "lane"}
    with pytest.raises(ConfigError, match=r"objective\.drawn_for: 'lane' is for a model of kind 'item_embedding'"):
        build_config(tree, {}, "test")
    tree["objective"] = {"kind": "sampled_softmax", "mask_list": True}
    with pytest.raises(ConfigError, match=r"objective\.mask_list is for a model of kind 'sasrec'"):
        build_config(tree, {}, "test")


def test_a_softmax_over_a_large_vocabulary_is_refused(run_tree, make_tree, tmp_path):
    tree = make_tree("softmax")
    tree["tables"]["word"] = {"dim": 8, "rows": 70_000, "vocabulary": "hash"}
    with pytest.raises(ConfigError, match=r"has 70,000; it takes 65,535 at most\. Choose 'sampled_softmax'"):
        run_tree(tree, tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- similar
def cosines(vectors, row):
    """Every row's cosine with one, in float64."""
    vectors = vectors.double()
    return (vectors @ vectors[row] / (vectors.norm(dim=1) * vectors[row].norm())).tolist()


def test_similar_prints_the_neighbours_by_cosine(run_tree, make_tree, tmp_path, saved_tensors):
    path = tmp_path / "run"
    run_tree(make_tree(), path)
    shapes = pa.table({"shape": ["round", "square"], "words": ["even0", "odd1"], "of": [["a", "b"], []]})
    pq.write_table(shapes, tmp_path / "shapes.parquet")
    vectors = saved_tensors(path)[1]
    for table in ("word", "words:context"):
        asked = ["similar", str(path), "odd2", "-k", "30", "--table", table, "--json"]
        printed = CliRunner().invoke(app, [*asked, "--metadata", str(tmp_path / "shapes.parquet")])
        assert printed.exit_code == 0, printed.output
        found = json.loads(printed.output)
        assert found["query"] == {"id": "odd2", "row": 5}
        expected = cosines(vectors[f"tables/{table}/weight"], 5)
        ranked = sorted((row for row in range(24) if row != 5), key=lambda row: -expected[row])
        assert [near["row"] for near in found["neighbours"]] == ranked, "neither itself nor the row for unknown ids"
        assert [near["id"] for near in found["neighbours"]] == [WORDS[row] for row in ranked]
        for near in found["neighbours"]:
            assert near["cosine"] == pytest.approx(expected[near["row"]], abs=1e-5)
        known = {near["id"]: near["metadata"] for near in found["neighbours"] if "metadata" in near}
        assert known == {"even0": {"shape": "round", "of": ["a", "b"]}, "odd1": {"shape": "square", "of": []}}
    asked = ["similar", str(path), "even0", "-k", "1", "--metadata", str(tmp_path / "shapes.parquet")]
    assert "Nearest to even0 (round; a, b) in table 'word'" in CliRunner().invoke(app, asked).output
    shown = CliRunner().invoke(app, ["similar", str(path), "odd2", "-k", "3"])
    assert shown.exit_code == 0
    assert "Nearest to odd2 in table 'word', step 10" in shown.output
    nearest = similar_here(path, "odd2", 3, {}).neighbours
    assert all(near.id in shown.output for near in nearest)


@pytest.mark.parametrize("kind", ["auto", "hnsw"])
def test_an_export_has_the_words_by_which_the_nearest_are_found(
    run_tree, make_tree, tmp_path, saved_tensors, one_process, kind
):
    path, out = tmp_path / "run", tmp_path / "out"
    run_tree(make_tree(), path)
    found = export_here(path, out, {}, index=kind, quantise="int8,fp16")
    vectors = saved_tensors(path)[1]["tables/word/weight"]
    expected = torch.nn.functional.normalize(vectors[:24], dim=1).numpy()
    items = pq.read_table(out / "items.parquet")
    assert items["id"].to_pylist() == WORDS, "without the row for unknown words"
    assert np.allclose(np.array(items["vector"].to_pylist()), expected, atol=1e-6)
    manifest = found.manifest
    assert manifest.item.vectors == 24
    assert manifest.item.is_unit
    assert manifest.index.kind == ("hnsw" if kind == "hnsw" else "flat")
    assert manifest.user is manifest.seen is None
    checked = found.verification
    assert (checked.split, checked.queries, checked.against) == ("items", 24, "the checkpoint")
    assert 0 <= checked.score_error < 1e-6
    assert checked.index["recall_lost"] <= 0.05
    assert checked.quantised.keys() == {"fp16 items", "int8 items", "fp16 tables", "int8 tables"}
    assert all(0.7 < one["recall"] <= 1 for one in checked.quantised.values())
    assert checked.quantised["fp16 items"]["recall"] >= checked.quantised["int8 items"]["recall"]
    of_run = similar_here(path, "odd2", 6, {})
    shutil.rmtree(path)
    of_export = similar_to(out, "odd2", 6, {})
    assert [near.id for near in of_export.neighbours] == [near.id for near in of_run.neighbours]
    assert [near.cosine for near in of_export.neighbours] == pytest.approx(
        [near.cosine for near in of_run.neighbours], abs=1e-5
    )
    assert (of_export.query.id, of_export.table, of_export.step) == ("odd2", "word", of_run.step)
    assert len(similar_to(out, "odd2", 10**9, {}).neighbours) == 23
    with pytest.raises(DataError, match="Did you mean 'even3'"):
        similar_to(out, "evn3", 3, {})
    with pytest.raises(ConfigError, match=r"--table was given, and .* is an export"):
        similar_to(out, "odd2", 3, {}, table="word")
    with pytest.raises(
        ExportError, match=r"can recommend nothing\. There are no users in an item_embedding: .*similar OUT ID"
    ):
        recommend(out, "odd2", 3)
    with pytest.raises(ExportError, match=r"makes no vectors of histories\. There are no users in an item_embedding"):
        recommend(out, None, 3, history="odd2,odd1")
    client = TestClient(build_app(one_process(out)))
    [served] = client.post("/similar", json={"item": "odd2", "k": 6}).json()["results"]
    assert [one["id"] for one in served["items"]] == [near.id for near in of_run.neighbours]
    assert client.post("/similar", json={"item": "nothing"}).status_code == 404
    for asked in ({"user": 3}, {"users": [3, 4]}, {"history": ["odd2"]}):
        refused = client.post("/recommend", json=asked)
        assert refused.status_code == 422
        assert "there are no users. Ask /similar" in refused.json()["error"]
    assert client.post("/score", json={"user": 3, "items": ["odd2"]}).status_code == 422
    printed = CliRunner().invoke(app, ["similar", str(out), "odd2", "-k", "3"])
    assert f"Nearest to odd2 in table 'word', step {of_run.step}" in printed.output


def test_what_an_export_of_words_loses_is_found(run_tree, make_tree, tmp_path, monkeypatch):
    import embedshard.launch.export_towers as module

    run_tree(make_tree(), tmp_path / "run")
    build, write = module.build_index, module.write_near_items

    def faulty_index(kind, blocks, *rest):
        return build(kind, lambda: (np.roll(block, 7, axis=0) for block in blocks()), *rest)

    def faulty_items(table, unknown_row, place):
        written = write(table, unknown_row, place)
        content = pq.read_table(place.path)
        order = pa.array(np.roll(np.arange(len(content)), 1))
        pq.write_table(content.set_column(2, "vector", content["vector"].take(order)), place.path)
        return written

    with monkeypatch.context() as patched:
        patched.setattr(module, "build_index", faulty_index)
        found = export_here(tmp_path / "run", tmp_path / "out", {})
    assert found.manifest is None
    [problem] = found.problems
    assert problem.startswith("the flat index misses")
    monkeypatch.setattr(module, "write_near_items", faulty_items)
    found = export_here(tmp_path / "run", tmp_path / "out", {})
    assert found.manifest is None
    [problem] = found.problems
    assert problem.startswith("a cosine is off by")


def test_rows_of_zeros_are_near_nothing_and_a_tokenizers_words_are_items(run_tree, make_tree, tmp_path, monkeypatch):
    tree = make_tree()
    lines = [" ".join(words) for words in pq.read_table(tmp_path / "train" / "part.parquet")["words"].to_pylist()]
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"words": lines}), tmp_path / "texts" / "part.parquet", row_group_size=70)
    tree["data"] = {"train": str(tmp_path / "texts"), "lanes": 4}
    tree["features"] = {"words": {"kind": "text", "table": "word"}}
    tree["tables"] = {"word": {"dim": 8, "vocabulary": {"kind": "words"}}}
    run_tree(tree, tmp_path / "run")
    zeroed = towers.write_near_items

    def with_zeros(table, unknown_row, place):
        content = pq.read_table(table.path)
        vectors = np.array(content["vector"].to_pylist(), np.float32)
        vectors[4] = 0
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(content.set_column(2, "vector", flat), table.path)
        return zeroed(table, unknown_row, place)

    monkeypatch.setattr("embedshard.launch.export_towers.write_near_items", with_zeros)
    export_here(tmp_path / "run", tmp_path / "out", {}, verifies=False)
    manifest = open_export(tmp_path / "out").manifest
    words = pq.read_table(tmp_path / "out" / "tables" / "word.parquet")["id"].to_pylist()
    assert manifest.item.vectors == len(words) - 2
    assert any(note.startswith("1 rows of table 'word' are all zeros") for note in manifest.notes)
    assert words[4] not in pq.read_table(tmp_path / "out" / "items.parquet")["id"].to_pylist()
    with pytest.raises(DataError, match=f"'{words[4]}' has no vector"):
        similar_to(tmp_path / "out", words[4], 3, {})
    near = similar_to(tmp_path / "out", words[0], 30, {}).neighbours
    assert {one.id for one in near} == {*words} - {None, words[0], words[4]}


def test_similar_names_what_it_does_not_find(run_tree, make_tree, tmp_path):
    path = tmp_path / "run"
    run_tree({**make_tree("hierarchical_softmax"), "train": {"global_batch_size": 32, "max_steps": 1}}, path)
    with pytest.raises(DataError, match=r"'evn3' is not among .*, the ids of table 'word'\. Did you mean 'even3'\?"):
        similar_here(path, "evn3", 3, {})
    with pytest.raises(ConfigError, match="no table 'words:node' whose rows are ids"):
        similar_here(path, "even3", 3, {}, table="words:node")
    with pytest.raises(DataError, match="'7' is not among the 24 ids of"):
        similar_here(path, "7", 3, {})


# ---------------------------------------------------------------------------------------------------- the held-out loss
def measured(path, name="validation/loss"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_the_loss_of_held_out_pairs_is_what_a_loop_over_them_adds_up(run_tree, make_tree, tmp_path, saved_tensors):
    tree = make_tree("softmax", subsample=None, dynamic_window=False)
    write_sentences(tmp_path / "test", 75, 2)
    tree["data"]["test"] = str(tmp_path / "test")
    tree["evaluate"] = {"metrics": ["loss"]}
    result = run_tree(tree, tmp_path / "run")
    tables = {name: tensor.numpy() for name, tensor in saved_tensors(tmp_path / "run")[1].items()}
    centres, contexts = tables["tables/word/weight"], tables["tables/words:context/weight"]
    losses = []
    for sentence in pq.read_table(tmp_path / "test")["words"].to_pylist():
        ids = [WORDS.index(word) for word in sentence]
        for place, other in itertools.permutations(range(len(ids)), 2):
            if abs(place - other) <= 3:
                logits = contexts @ centres[ids[place]]
                losses.append(np.log(np.exp(logits).sum()) - logits[ids[other]])
    assert result["metrics"] == {"loss": pytest.approx(np.mean(losses), rel=1e-5)}
    assert result["baselines"] == {}
    again = evaluate_here(tmp_path / "run", None, "cpu", {})
    assert again["test"] == result["metrics"], "the same draws each time"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_share_of_the_lists_is_held_out_and_the_best_checkpoint_has_the_least_loss(
    run_tree, make_tree, tmp_path, objective
):
    tree = make_tree(objective)
    tree["data"]["validation_fraction"] = 0.2
    tree["train"]["epochs"] = 6
    tree["evaluate"] = {"metrics": ["loss"]}
    result = run_tree(tree, tmp_path / "run", reporter=JsonLinesReporter(tmp_path / "run.jsonl", 1))
    losses = measured(tmp_path / "run.jsonl")
    assert list(losses) == [8 * epoch for epoch in range(1, 7)], "248 of 310 rows in batches of 32"
    assert losses[48] < losses[8]
    assert result["selected_step"] == min(losses, key=losses.get)
    # Measuring draws nothing that training draws: without it, the same rows are trained to the same weights.
    tree["evaluate"]["every_steps"] = 3
    run_tree(tree, tmp_path / "often", reporter=JsonLinesReporter(tmp_path / "often.jsonl", 1))
    assert len(measured(tmp_path / "often.jsonl")) > len(losses)
    assert measured(tmp_path / "often.jsonl", "train/loss") == measured(tmp_path / "run.jsonl", "train/loss")


def test_two_ranks_measure_the_loss_of_one(make_tree, tmp_path):
    tree = make_tree("nce")
    tree["data"]["validation_fraction"] = 0.2
    tree["evaluate"] = {"metrics": ["loss"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    for size in (1, 2):
        run_ranks(size, "train", tmp_path / "config.yaml", "--run-dir", tmp_path / f"{size}")
    one, two = (measured(tmp_path / f"{size}" / "metrics.jsonl") for size in (1, 2))
    assert list(one) == [8]
    assert two == pytest.approx(one, rel=1e-5)
