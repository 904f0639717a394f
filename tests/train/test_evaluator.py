"""Evaluation end to end: the metrics of a real model against loops over users and items."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.errors import ConfigError, DataError
from embedshard.train.assembly import assemble
from embedshard.world import open_world


def rows_of(interactions, split):
    return [row for path in sorted((interactions / split).iterdir()) for row in pq.read_table(path).to_pylist()]


@torch.no_grad()
def scores_of(parts, columns):
    """A score matrix by the model's own towers, one query at a time."""
    model = parts.model.module
    queries = parts.evaluator._encode(model.encode_queries, columns, len(columns["user_id"].values))
    candidates = parts.evaluator._encode(
        model.encode_candidates, parts.dataset.catalogue.columns, len(parts.dataset.catalogue)
    )
    return (queries @ candidates.T).numpy(), len(candidates)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranking_the_catalogue_equals_a_loop_over_users(make_config, interactions, filter_seen):
    metrics = ["recall@5", "precision@5", "hit_rate@5", "ndcg@5", "map@5", "mrr", "coverage@5"]
    config = make_config({"evaluate": {"metrics": metrics, "filter_seen": filter_seen, "batch_size": 7}}).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        for split, seen_splits in (("validation", ["train"]), ("test", ["train", "validation"])):
            found = parts.evaluator.evaluate(parts.model, split)
            rows = rows_of(interactions, split)
            scores, num_items = scores_of(parts, parts.dataset.read_held_out(split))
            seen = {}
            for row in (row for name in seen_splits for row in rows_of(interactions, name)):
                seen.setdefault(row["user_id"], set()).add(row["item_id"])
            sums, counted, covered = dict.fromkeys(metrics, 0.0), 0, set()
            for user in sorted({row["user_id"] for row in rows}):
                first = next(i for i, row in enumerate(rows) if row["user_id"] == user)
                hidden = seen.get(user, set()) if filter_seen else set()
                relevant = {row["item_id"] for row in rows if row["user_id"] == user} - hidden
                shown = [i for i in range(num_items) if i not in hidden]
                ranked = sorted(shown, key=lambda i: (-scores[first][i], i in relevant, i))
                covered |= set(sorted(shown, key=lambda i: (-scores[first][i], i))[:5])
                if not relevant:
                    continue
                counted += 1
                places = [place for place, item in enumerate(ranked, 1) if item in relevant]
                top = [place for place in places if place <= 5]
                ideal = sum(1 / math.log2(i + 1) for i in range(1, min(len(relevant), 5) + 1))
                sums["recall@5"] += len(top) / len(relevant)
                sums["precision@5"] += len(top) / 5
                sums["hit_rate@5"] += bool(top)
                sums["ndcg@5"] += sum(1 / math.log2(place + 1) for place in top) / ideal
                sums["map@5"] += sum((i + 1) / place for i, place in enumerate(top)) / min(len(relevant), 5)
                sums["mrr"] += 1 / places[0]
            for name in metrics[:-1]:
                assert found[name] == pytest.approx(sums[name] / counted, abs=1e-9), (split, name)
            assert found["coverage@5"] == pytest.approx(len(covered) / num_items)
            assert parts.evaluator.counts[split]["queries"] == counted


def test_given_candidates_and_pointwise_metrics_equal_loops(make_config, interactions, tmp_path):
    generator = np.random.default_rng(5)
    table = pq.read_table(interactions / "test" / "part-0.parquet")
    negatives = generator.integers(0, 30, (60, 9))
    table = table.append_column("negatives", pa.array(negatives.tolist(), pa.list_(pa.int16())))
    pq.write_table(table, tmp_path / "test.parquet")
    changes = {
        "data": {"test": str(tmp_path / "test.parquet"), "label": "clicked"},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["hit_rate@3", "ndcg@3", "mrr", "log_loss", "auc", "rmse"], "candidates": "negatives"},
    }
    with open_world("cpu") as world:
        parts = assemble(make_config(changes, splits=("train",)).config, world)
        found = parts.evaluator.evaluate(parts.model, "test")
        scores, _ = scores_of(parts, parts.dataset.read_held_out("test"))
    positives, labels = table["item_id"].to_numpy(), table["clicked"].to_numpy()
    hits, gains, reciprocal = [], [], []
    for row in range(60):
        own = scores[row][positives[row]]
        place = 1 + sum(scores[row][n] >= own for n in negatives[row] if n != positives[row])
        hits.append(place <= 3)
        gains.append(1 / math.log2(place + 1) if place <= 3 else 0)
        reciprocal.append(1 / place)
    assert found["hit_rate@3"] == pytest.approx(np.mean(hits))
    assert found["ndcg@3"] == pytest.approx(np.mean(gains))
    assert found["mrr"] == pytest.approx(np.mean(reciprocal))
    logits = np.array([scores[row][positives[row]] for row in range(60)], dtype=np.float64)
    p = 1 / (1 + np.exp(-logits))
    assert found["log_loss"] == pytest.approx(-np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))), abs=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((p - labels) ** 2)), abs=1e-6)
    pairs = [(a > b) + (a == b) / 2 for a in logits[labels == 1] for b in logits[labels == 0]]
    assert found["auc"] == pytest.approx(np.mean(pairs), abs=1e-6)


def test_items_with_more_than_an_id_are_ranked_from_a_catalogue(make_config, tmp_path):
    pq.write_table(
        pa.table({"item_id": list(range(29, -1, -1)), "genres": [[i % 5, 4] for i in range(30)], "price": np.arange(30.0)}),
        tmp_path / "items.parquet",
    )
    train = pa.table(
        {
            "user_id": [1, 2, 3, 1] * 16,
            "item_id": [5, 6, 7, 8] * 16,
            "genres": [[1], [2, 3], [], [4]] * 16,
            "price": [1.0, 2, 3, 4] * 16,
        }
    )
    pq.write_table(train, tmp_path / "train.parquet")
    files = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "train.parquet")}
    changes = {
        "data": {**files, "catalogue": str(tmp_path / "items.parquet")},
        "features": {
            "genres": {"kind": "bag", "table": "genre"},
            "price": {"kind": "dense"},
            "history": {"kind": "bag", "table": "genre", "column": "genres"},
            "age": {"kind": "dense", "column": "price"},
        },
        "tables": {"genre": {"rows": 5, "dim": 4}},
        "model": {
            "user": {"features": ["user_id"], "mlp": [8]},
            "item": {"features": ["item_id", "genres", "price"], "mlp": [8]},
        },
        "objective": {"kind": "sampled_softmax", "num_negatives": 64, "mixed": True},
        "evaluate": {"metrics": ["recall@5"], "filter_seen": False},
    }
    config = make_config(changes, splits=()).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        with parts.reader().batches(0, 2) as batches:
            for batch in batches:
                output = parts.model(batch)
                # What was drawn is encoded as the catalogue says it is.
                whole = parts.evaluator._encode(parts.model.module.encode_candidates, parts.dataset.catalogue.columns, 30)
                places = parts.dataset.catalogue.places()[batch.draws.ids.numpy()]
                torch.testing.assert_close(output.negative_ND, whole[places])
                parts.stepper.take(batch, stop_asked=False)
        values = parts.evaluator.evaluate(parts.model, "test")
    assert 0 <= values["recall@5"] <= 1
    without = {**changes, "data": files}
    with pytest.raises(ConfigError, match=r"data\.catalogue"):
        make_config(without, splits=())
    twice = pa.concat_tables([pq.read_table(tmp_path / "items.parquet")] * 2)
    pq.write_table(twice, tmp_path / "items.parquet")
    with open_world("cpu") as world, pytest.raises(DataError, match=r"rows 29 and 59 are the same item"):
        assemble(config, world)


def test_items_that_the_catalogue_does_not_hold_count_as_missed(make_config, interactions, tmp_path):
    pq.write_table(pa.table({"item_id": np.arange(0, 30, 2)}), tmp_path / "items.parquet")
    changes = {
        "data": {"catalogue": str(tmp_path / "items.parquet")},
        "evaluate": {"metrics": ["recall@30", "hit_rate@30"], "filter_seen": False},
    }
    with open_world("cpu") as world:
        parts = assemble(make_config(changes).config, world)
        found = parts.evaluator.evaluate(parts.model, "test")
    by_user = {}
    for row in rows_of(interactions, "test"):
        by_user.setdefault(row["user_id"], set()).add(row["item_id"])
    shares = [sum(item % 2 == 0 for item in items) / len(items) for items in by_user.values()]
    assert found["recall@30"] == pytest.approx(np.mean(shares))
    assert found["hit_rate@30"] == pytest.approx(np.mean([share > 0 for share in shares]))


def test_a_hashed_vocabulary_ranks_the_rows_in_use(make_config):
    changes = {"tables": {"item": {"rows": None, "vocabulary": {"kind": "hash", "rows": 500}}}}
    with open_world("cpu") as world:
        parts = assemble(make_config(changes).config, world)
        assert 25 <= len(parts.dataset.catalogue) <= 30


def test_a_model_that_cannot_rank_is_told_so(make_config):
    with open_world("cpu") as world:
        parts = assemble(make_config().config, world)
        with pytest.raises(ConfigError, match=r"needs a method 'encode_queries\(batch\)'"):
            parts.evaluator.evaluate(torch.nn.Linear(1, 1), "test")
        parts.model.module.train()
        parts.evaluator.evaluate(parts.model, "test")
        assert parts.model.module.training, "evaluation leaves the mode as it was"
