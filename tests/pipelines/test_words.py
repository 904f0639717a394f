"""The words pipeline: which words are kept, and what vectors are measured by."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands import run_python

ROOT = Path(__file__).parents[2]
TEXTS = ["The end.<br /><br />The END, isn't it?", None, "42 ... <b>7</b>", "the Film; a film: the end"]


@pytest.fixture(scope="module")
def scripts():
    modules = {}
    for name in ("prepare", "evaluate"):
        spec = importlib.util.spec_from_file_location(f"words_{name}", ROOT / "pipelines" / "words" / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


def test_words_are_runs_of_letters_and_rare_ones_fall_out(scripts):
    lists = scripts["prepare"].words_of(pa.array(TEXTS))
    assert lists.to_pylist() == [["the", "end", "the", "end", "isn", "t", "it"], ["the", "film", "a", "film", "the", "end"]]
    chunked = pa.chunked_array([lists.slice(0, 1), lists.slice(1)])
    kept, vocabulary = scripts["prepare"].frequent_words(chunked, 2)
    assert vocabulary.to_pylist() == [
        {"word": "the", "count": 4}, {"word": "end", "count": 3}, {"word": "film", "count": 2},
    ]  # fmt: skip
    assert kept.to_pylist() == [["the", "end", "the", "end"], ["the", "film", "film", "the", "end"]]
    again, _ = scripts["prepare"].frequent_words(pa.chunked_array([lists.slice(1)]), 2)
    assert again.to_pylist() == [["the", "film", "film", "the"]], "offsets of a slice do not begin at 0"
    with pytest.raises(ValueError, match="no word is met 9 times"):
        scripts["prepare"].frequent_words(chunked, 9)


def test_correlations_and_analogies_are_those_of_a_naive_count(scripts):
    rows = {word: row for row, word in enumerate(["man", "woman", "king", "queen", "apple", "rare"])}
    vectors = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1], [-1, -1, 0], [0, 0.9, 1]], dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [("man", "King", 9.0), ("man", "woman", 5.0), ("apple", "queen", 1.0), ("man", "unheard", 3.0)]
    similarity = [{"dataset": "some", "word1": a, "word2": b, "score": score} for a, b, score in pairs]
    found = scripts["evaluate"].similarities(rows, vectors, similarity)
    assert found == {"some": {"spearman": pytest.approx(1.0), "known": 3, "pairs": 4}}
    turned = [{**pair, "score": -pair["score"]} for pair in similarity]
    assert scripts["evaluate"].similarities(rows, vectors, turned)["some"]["spearman"] == pytest.approx(-1.0)
    questions = [
        dict(zip(("section", "a", "b", "c", "d"), line.split(), strict=True))
        for line in (
            "family Man woman king queen",
            "family king queen man woman",
            "fruit man woman king apple",
            "other man x y z",
        )
    ]
    answers = scripts["evaluate"].analogies(rows, vectors, questions, candidates=5)
    assert (answers["asked"], answers["correct"]) == (3, 2)
    assert answers["sections"] == {"family": {"asked": 2, "correct": 2}, "fruit": {"asked": 1, "correct": 0}}
    assert scripts["evaluate"].analogies(rows, vectors, questions, candidates=3)["asked"] == 0, "an answer is out of reach"


@pytest.mark.timeout(300)
def test_a_run_from_texts_to_the_table(tmp_path, monkeypatch):
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        texts = [" ".join(generator.choice(["good", "fine", "bad", "poor"], 9)) for _ in range(200)]
        pq.write_table(pa.table({"text": texts}), source / f"{name}.parquet")
    pairs = {
        "dataset": ["ws"] * 3,
        "word1": ["good", "good", "bad"],
        "word2": ["fine", "bad", "Poor"],
        "score": [3.0, 1.0, 2.0],
    }
    pq.write_table(pa.table(pairs), source / "similarity.parquet")
    pq.write_table(
        pa.table({"section": ["s"], "a": ["good"], "b": ["fine"], "c": ["bad"], "d": ["poor"]}), source / "analogies.parquet"
    )
    monkeypatch.setenv("EMBEDSHARD_DATA", str(data))

    def called(*command):
        done = run_python(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = called("pipelines/words/prepare.py", "--source", str(source))
    assert "400 reviews, 3,600 words, 4 different ones" in printed
    for name in ("word2vec", "negative_sampling", "nce", "hierarchical_softmax"):
        small = ["--set", "train.max_steps=3", "--set", "model.subsample=null"]
        run = ["--run-dir", str(tmp_path / name)]
        called("-m", "embedshard.cli", "train", f"pipelines/words/{name}.yaml", *small, *run)
        found = json.loads(called("pipelines/words/evaluate.py", str(tmp_path / name), "--source", str(source), "--json"))
        assert found["spearman"]["ws"]["known"] == 3
        assert found["analogies"]["asked"] == 1
