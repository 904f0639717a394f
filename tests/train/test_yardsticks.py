"""Baselines, slices and statistics of ids at a run's end, against loops over the files' rows."""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.train.tracking import Reporter
from embedshard.world import open_world

USERS, ITEMS = 40, 30
RANKING = ["recall@5", "ndcg@5", "mrr"]
SLACK = 1e-4  # within which float32 may order scores as it likes


class Recorder(Reporter):
    """Keeps what was said of baselines, and what was compared."""

    def __init__(self):
        self.sentences, self.tables = [], []

    def said(self, message):
        if "aseline" in message:
            self.sentences.append(message)

    def compared(self, metrics, baselines):
        self.tables.append((dict(metrics), dict(baselines)))


@pytest.fixture
def folder(interactions, tmp_path):
    """The interactions, in which some users of the test set have no training rows."""
    root = tmp_path / "data"
    shutil.copytree(interactions, root)
    for path in (root / "train").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.filter(pa.array(table["user_id"].to_numpy() < 35)), path, row_group_size=40)
    return root


def run(make_config, folder, path, changes):
    """Takes two steps; returns the run, its result and what was told."""
    data = {split: str(folder / split / "*.parquet") for split in ("train", "validation", "test")} | changes.pop("data", {})
    changes = {"evaluate": {"metrics": RANKING}, "train": {"max_steps": 2}} | changes
    loaded = make_config({**changes, "data": data}, splits=())
    directory, told = RunDirectory.create(path, loaded), Recorder()
    with open_world("cpu") as world:
        train(loaded.config, world, directory, told)
    return loaded.config, json.loads((path / "result.json").read_text()), told


def rows_of(folder, *splits):
    return [
        row for split in splits for path in sorted((folder / split).iterdir()) for row in pq.read_table(path).to_pylist()
    ]


def model_scores(config, path):
    """The (test rows, items) scores of a run's model."""
    with open_world("cpu") as world:
        parts = assemble(config, world)
        restore_model(newest_intact(RunDirectory(path).checkpoints), parts.model)
        model, evaluator, catalogue = parts.model.module, parts.evaluator, parts.dataset.catalogue
        columns = parts.dataset.read_held_out("test")
        with torch.no_grad():
            queries = evaluator._encode(model.encode_queries, columns, len(columns["user_id"].values))
            candidates = evaluator._encode(model.encode_candidates, catalogue.columns, len(catalogue))
        scores = np.full((len(queries), ITEMS), np.nan)
        scores[:, catalogue.ids] = (queries @ candidates.T).numpy()
        return scores


def baseline_scores(folder, kept, l2):
    """The (users, items) scores of each baseline, fitted on the items that are kept."""
    train_rows = [row for row in rows_of(folder, "train") if row["item_id"] in kept]
    counts = Counter(row["item_id"] for row in train_rows)
    met = np.zeros((USERS, ITEMS))
    for row in train_rows:
        met[row["user_id"], row["item_id"]] = 1.0
    inverse = np.linalg.inv(met.T @ met + l2 * np.eye(ITEMS))
    lengths = np.sqrt(met.sum(axis=0))
    cosines = met.T @ met / np.maximum(np.outer(lengths, lengths), 1.0)
    np.fill_diagonal(cosines, 0.0)
    return {
        "popularity": np.tile([float(counts[item]) for item in range(ITEMS)], (USERS, 1)),
        "ease": met @ (np.eye(ITEMS) - inverse / np.diag(inverse)),
        "item_knn": met @ cosines,
    }


def positions(scores, relevant, listed, slack):
    """The position of each relevant item that is listed: others with its score stand before it, surely if it is 0."""
    found = {}
    for item in sorted(relevant & listed, key=lambda item: (-scores[item], item)):
        own = scores[item]
        others = sum(scores[i] == own == 0 or scores[i] >= own - slack for i in listed - relevant)
        found[item] = 1 + others + len(found)
    return found


def ranking_values(queries, slack, only=None):
    """The metrics of queries (scores, relevant items, listed items), of some relevant items alone."""
    values = []
    for scores, relevant, listed in queries:
        mine = relevant if only is None else relevant & only
        if not mine:
            continue
        places = sorted(place for item, place in positions(scores, relevant, listed, slack).items() if item in mine)
        top = [place for place in places if place <= 5]
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(len(mine), 5) + 1))
        gain = sum(1 / math.log2(place + 1) for place in top)
        values.append((len(top) / len(mine), gain / ideal, 1 / places[0] if places else 0.0))
    return dict(zip(RANKING, np.mean(values, axis=0) if values else [math.nan] * 3, strict=True)), len(values)


def assert_within(found, queries, slack, only=None):
    """Asserts that metrics are those of the queries, whatever the order within the slack."""
    worst, best = (ranking_values(queries, sign * slack, only)[0] for sign in (1, -1))
    for name in RANKING:
        assert worst[name] - 1e-9 <= found[name] <= best[name] + 1e-9, (name, worst[name], found[name], best[name])
        assert best[name] - worst[name] < 0.03, "or it says nothing"


def catalogue_queries(folder, scores_of, kept, filter_seen):
    """A query for each user of the test set."""
    rows, seen = rows_of(folder, "test"), {}
    for row in rows_of(folder, "train", "validation"):
        seen.setdefault(row["user_id"], set()).add(row["item_id"])
    queries = []
    for user in sorted({row["user_id"] for row in rows}):
        hidden = seen.get(user, set()) & kept if filter_seen else set()
        relevant = {row["item_id"] for row in rows if row["user_id"] == user} - hidden
        first = next(number for number, row in enumerate(rows) if row["user_id"] == user)
        queries.append((scores_of(user, first), relevant, kept - hidden))
    return queries


def slices_by_loop(folder, catalogue):
    kept = set(catalogue)
    counts = Counter(row["item_id"] for row in rows_of(folder, "train") if row["item_id"] in kept)
    total, together, slices = (
        sum(counts.values()),
        0,
        {"head": set(), "torso": set(), "tail": set(range(ITEMS)) - set(counts)},
    )
    for item in sorted(counts, key=lambda item: (-counts[item], catalogue.index(item))):
        slices["head" if 2 * together < total else "torso" if 5 * together < 4 * total else "tail"].add(item)
        together += counts[item]
    return slices


THREE = {"baselines": ["popularity", {"kind": "ease", "l2": 2.0}, {"kind": "item_knn", "neighbours": 100}]}


@pytest.mark.parametrize("catalogue", [range(ITEMS), range(ITEMS - 2, -1, -2)], ids=["all items", "a catalogue of half"])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_over_the_catalogue_a_result_equals_loops_over_the_files(make_config, folder, tmp_path, filter_seen, catalogue):
    changes = {"evaluate": {"metrics": RANKING, "filter_seen": filter_seen, **THREE}}
    if len(catalogue) < ITEMS:
        pq.write_table(pa.table({"item_id": list(catalogue)}), tmp_path / "items.parquet")
        changes["data"] = {"catalogue": str(tmp_path / "items.parquet")}
    config, result, told = run(make_config, folder, tmp_path / "run", changes)
    kept = set(catalogue)
    assert list(result["baselines"]) == ["popularity", "ease", "item_knn"]
    for name, scores in baseline_scores(folder, kept, 2.0).items():
        queries = catalogue_queries(folder, lambda user, first, scores=scores: scores[user], kept, filter_seen)
        assert_within(result["baselines"][name], queries, 0.0 if name == "popularity" else SLACK)
    assert told.tables == [(result["metrics"], result["baselines"])]
    assert not told.sentences

    scores = model_scores(config, tmp_path / "run")
    queries = catalogue_queries(folder, lambda user, first: scores[first], kept, filter_seen)
    assert_within(result["metrics"], queries, 1e-6)
    slices = slices_by_loop(folder, catalogue)
    assert list(result["slices"]) == ["head", "torso", "tail"]
    for name, items in slices.items():
        found = result["slices"][name]
        assert list(found) == [*RANKING, "queries", "items"]
        assert_within(found, queries, 1e-6, items)
        assert found["queries"] == ranking_values(queries, 0.0, items)[1]
        assert found["items"] == len(items & kept)
    assert result["slices"]["tail"]["queries"] > 0


def test_over_given_candidates_a_result_equals_loops_over_the_files(make_config, folder, tmp_path):
    rng = np.random.default_rng(5)
    for split in ("validation", "test"):
        path = folder / split / "part-0.parquet"
        negatives = rng.integers(0, ITEMS, (60, 9)).tolist()
        pq.write_table(pq.read_table(path).append_column("negatives", pa.array(negatives, pa.list_(pa.int16()))), path)
    changes = {"evaluate": {"metrics": RANKING, "candidates": "negatives", **THREE}}
    config, result, _ = run(make_config, folder, tmp_path / "run", changes)
    rows = rows_of(folder, "test")

    def queries_by(scores_of):
        """The row's item as number 0 among its negatives, of which one that is listed twice stands before it twice."""
        queries = []
        for number, row in enumerate(rows):
            scores, others = scores_of(row["user_id"], number), [i for i in row["negatives"] if i != row["item_id"]]
            queries.append((scores[[row["item_id"], *others]], {0}, set(range(len(others) + 1))))
        return queries

    for name, scores in baseline_scores(folder, set(range(ITEMS)), 2.0).items():
        queries = queries_by(lambda user, n, scores=scores: scores[user])
        assert_within(result["baselines"][name], queries, 0.0 if name == "popularity" else SLACK)
    scores = model_scores(config, tmp_path / "run")
    queries = queries_by(lambda user, n: scores[n])
    for name, items in slices_by_loop(folder, range(ITEMS)).items():
        mine = [query for query, row in zip(queries, rows, strict=True) if row["item_id"] in items]
        assert_within(result["slices"][name], mine, 1e-6)
        assert result["slices"][name]["queries"] == len(mine)


def naive_predictions(folder, label, damping, sigmoid):
    """The mean's and the biases' predictions of the test rows, by the definitions."""
    rows, test = rows_of(folder, "train"), rows_of(folder, "test")
    y, w = (np.array([row[name] for row in rows], dtype=float) for name in (label, "weight"))
    sides = {name: np.array([row[name] for row in rows]) for name in ("user_id", "item_id")}
    if sigmoid:
        rate = ((y * w).sum() + 1) / (w.sum() + 2)
        mean = math.log(rate / (1 - rate))

        def offset(name, id_):
            mine = sides[name] == id_
            positive, negative = (y * w)[mine].sum() + damping * rate, ((1 - y) * w)[mine].sum() + damping * (1 - rate)
            return math.log(positive / negative) - mean

        logits = [mean + offset("user_id", row["user_id"]) + offset("item_id", row["item_id"]) for row in test]
        return [1 / (1 + np.exp(-np.array(values))) for values in ([mean] * len(test), logits)]
    mean = (y * w).sum() / w.sum()
    biases = {"user_id": np.zeros(USERS), "item_id": np.zeros(ITEMS)}
    for _ in range(10):
        for name, other in (("item_id", "user_id"), ("user_id", "item_id")):
            rest = y - mean - biases[other][sides[other]]
            for id_ in range(len(biases[name])):
                mine = sides[name] == id_
                biases[name][id_] = (rest * w)[mine].sum() / (damping + w[mine].sum())
    predicted = [mean + biases["user_id"][row["user_id"]] + biases["item_id"][row["item_id"]] for row in test]
    return [np.full(len(test), mean), np.array(predicted)]


@pytest.mark.parametrize("damping", [10.0, 1.0])
@pytest.mark.parametrize("objective", ["mse", "bce"])
def test_where_labels_are_predicted_a_result_equals_loops_over_the_files(make_config, folder, tmp_path, objective, damping):
    label, metrics = {"mse": ("rating", ["rmse", "mae"]), "bce": ("clicked", ["log_loss", "auc", "rmse"])}[objective]
    baselines = "auto" if damping == 10.0 else ["mean", {"kind": "bias", "damping": damping}]
    changes = {
        "data": {"label": label, "weight": "weight"},
        "objective": {"kind": objective},
        "evaluate": {"metrics": metrics, "baselines": baselines},
    }
    _, result, told = run(make_config, folder, tmp_path / "run", changes)
    assert list(result["baselines"]) == ["mean", "bias"]
    assert result["slices"] == {}, "nothing is ranked"
    assert not told.sentences
    labels = np.array([row[label] for row in rows_of(folder, "test")], dtype=float)
    predictions = naive_predictions(folder, label, damping, objective == "bce")
    for name, p in zip(("mean", "bias"), predictions, strict=True):
        found = result["baselines"][name]
        assert list(found) == metrics
        assert found["rmse"] == pytest.approx(np.sqrt(np.mean((p - labels) ** 2)))
        if objective == "mse":
            assert found["mae"] == pytest.approx(np.mean(np.abs(p - labels)))
            continue
        assert found["log_loss"] == pytest.approx(-np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))))
        pairs = [(a > b) + (a == b) / 2 for a in p[labels == 1] for b in p[labels == 0]]
        assert found["auc"] == pytest.approx(np.mean(pairs))


def test_metrics_of_both_kinds_have_baselines_of_both_kinds(make_config, folder, tmp_path):
    changes = {
        "data": {"label": "clicked"},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["recall@5", "rmse", "mrr"]},
    }
    _, result, _ = run(make_config, folder, tmp_path / "run", changes)
    named = {name: list(values) for name, values in result["baselines"].items()}
    assert named == {"popularity": ["recall@5", "mrr"], "mean": ["rmse"], "bias": ["rmse"]}


def test_the_ids_of_a_result_are_counted_in_the_training_files(make_config, folder, tmp_path):
    changes = {
        "features": {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}},
        "tables": {"user": {"rows": 30}},
    }
    _, result, _ = run(make_config, folder, tmp_path / "run", changes)
    rows = rows_of(folder, "train")
    lookups = {
        "user_id": Counter(min(row["user_id"], 30) for row in rows),
        "item_id": Counter(row["item_id"] for row in rows),
        "history": Counter(item for row in rows for item in row["history"][-4:]),
    }
    assert (result["ids"]["rows"], result["ids"]["rows_counted"]) == (len(rows), len(rows))
    assert result["ids"]["features"].keys() == lookups.keys()
    for name, counts in lookups.items():
        found = result["ids"]["features"][name]
        hottest = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        assert found["ids"] == sum(counts.values())
        assert found["oov_share"] == (counts[30] / len(rows) if name == "user_id" else 0)
        assert found["hottest"] == [[row, count, None if row == 30 else row] for row, count in hottest]
    assert result["ids"]["features"]["user_id"]["oov_share"] > 0


@pytest.mark.parametrize("limit", [0, 40])
def test_ids_are_counted_in_as_many_rows_as_the_config_says(make_config, folder, tmp_path, limit):
    changes = {"evaluate": {"metrics": ["recall@5"], "id_statistics_rows": limit}}
    _, result, _ = run(make_config, folder, tmp_path / "run", changes)
    if not limit:
        assert result["ids"] == {}
        return
    groups = [
        pq.ParquetFile(path).metadata.row_group(group)
        for path in sorted((folder / "train").iterdir())
        for group in (0, 1, 2)
    ]
    assert result["ids"]["rows"] == sum(group.num_rows for group in groups)
    assert result["ids"]["rows_counted"] == groups[3].num_rows
    assert result["ids"]["features"]["user_id"]["ids"] == groups[3].num_rows


def test_without_a_test_set_ids_are_counted_and_nothing_is_compared(make_config, folder, tmp_path):
    _, result, told = run(make_config, folder, tmp_path / "run", {"data": {"test": None}})
    assert (result["metrics"], result["baselines"], result["slices"]) == ({}, {}, {})
    assert result["ids"]["features"]["item_id"]["ids"] == len(rows_of(folder, "train"))
    assert not told.tables


def test_a_baseline_that_needs_too_much_memory_is_left_out_and_said(make_config, folder, tmp_path):
    _, whole, _ = run(make_config, folder, tmp_path / "whole", {"evaluate": {"metrics": RANKING, **THREE}})
    little = {"evaluate": {"metrics": RANKING, **THREE, "baseline_bytes": 10_000}}
    _, result, told = run(make_config, folder, tmp_path / "little", little)
    assert result["baselines"] == {"popularity": whole["baselines"]["popularity"]}
    assert len(told.sentences) == 2
    rows = len(rows_of(folder, "train"))
    for name, sentence in zip(("ease", "item_knn"), told.sentences, strict=True):
        assert f"'{name}' is left out" in sentence
        assert f"30 items and {rows} training rows" in sentence
        needed = int(sentence.partition("Set it to ")[2].partition(",")[0])
        for allowed, is_measured in ((needed, True), (needed - 1, False)):
            enough = {"evaluate": {"metrics": RANKING, **THREE, "baseline_bytes": allowed}}
            _, result, _ = run(make_config, folder, tmp_path / f"{name}-{allowed}", enough)
            assert (name in result["baselines"]) == is_measured


def test_a_bias_that_needs_too_much_memory_is_left_out_and_said(make_config, folder, tmp_path):
    changes = {
        "data": {"label": "rating"},
        "objective": {"kind": "mse"},
        "evaluate": {"metrics": ["rmse"], "baseline_bytes": 10_000},
    }
    _, result, told = run(make_config, folder, tmp_path / "run", changes)
    assert list(result["baselines"]) == ["mean"]
    assert len(told.sentences) == 1
    for words in ("'bias' is left out", "41 users, 31 items", "evaluate.baseline_bytes"):
        assert words in told.sentences[0]


def test_ease_that_cannot_be_inverted_is_left_out_and_said(make_config, folder, tmp_path):
    baselines = {"baselines": ["popularity", {"kind": "ease", "l2": 1e-12}, {"kind": "item_knn"}]}
    for path in (folder / "train").iterdir():  # two items that the same users met
        table = pq.read_table(path)
        twin = table.set_column(1, "item_id", pa.array(np.where(table["item_id"].to_numpy() == 3, 4, 3), pa.int64()))
        met = pa.array(np.isin(table["item_id"].to_numpy(), [3, 4]))
        pq.write_table(pa.concat_tables([table, twin.filter(met)]), path)
    _, result, told = run(make_config, folder, tmp_path / "run", {"evaluate": {"metrics": RANKING, **baselines}})
    assert list(result["baselines"]) == ["popularity", "item_knn"]
    assert told.sentences == [
        "Baseline 'ease' is left out: its Gram matrix of 30 items cannot be inverted with l2=1e-12. Give it a larger l2."
    ]


def test_an_empty_list_measures_no_baseline(make_config, folder, tmp_path):
    changes = {"evaluate": {"metrics": RANKING, "baselines": []}}
    _, result, told = run(make_config, folder, tmp_path / "run", changes)
    assert result["baselines"] == {}
    assert not told.sentences
    assert list(result["slices"]) == ["head", "torso", "tail"], "which are the model's own"


def test_labels_that_log_odds_cannot_tell_leave_their_baselines_out(make_config, folder, tmp_path):
    changes = {"data": {"label": "rating"}, "evaluate": {"metrics": ["recall@5", "rmse"]}}
    _, result, told = run(make_config, folder, tmp_path / "run", changes)
    assert list(result["baselines"]) == ["popularity"]
    assert [sentence.partition(":")[0] for sentence in told.sentences] == [
        "Baseline 'mean' is left out", "Baseline 'bias' is left out",
    ]  # fmt: skip
