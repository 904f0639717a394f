"""Ids that become two rows: which, what a batch makes of them, what is refused, and how many collide."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from embedshard.config import build_config, table_specs
from embedshard.config.composition import Composition, colliding_ids, collision_share
from embedshard.data.collate import Collator
from embedshard.data.columns import Flat, Ragged
from embedshard.data.hashing import hash_integers, hash_strings
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.errors import ConfigError, DataError
from embedshard.launch.local import summarise_config
from embedshard.launch.similar import _table_of
from embedshard.sharding.demand import key_lengths

QR = {"kind": "quotient_remainder", "ids": 10}
HASH = {"kind": "double_hash", "rows": 7, "seed": 3}


def tree(vocabulary, **changes):
    made = {
        "data": {"train": "x", "label": "y", "lanes": 1},
        "features": {
            "u": {"kind": "id", "table": "t", "unknown": "oov"},
            "mean": {"kind": "bag", "table": "t", "pooling": "mean"},
            "item": {"kind": "id", "table": "film"},
        },
        "tables": {"t": {"dim": 4, "vocabulary": vocabulary}, "film": {"dim": 4, "rows": 5}},
        "model": {
            "kind": "two_tower",
            "user": {"features": ["u", "mean"]},
            "item": {"features": ["item"]},
            "biases": ["user"],
        },
        "objective": {"kind": "mse"},
        "train": {"global_batch_size": 4},
    }
    return made | changes


def specs_of(config):
    return table_specs(config, table_rows(load_vocabularies(config)))


def test_no_two_ids_have_the_same_quotient_and_remainder():
    for num_ids, remainders in ((1, None), (10, None), (10, 3), (10, 10), (10, 1), (97, 5), (10_000, None)):
        given = {} if remainders is None else {"remainders": remainders}
        table = build_config(tree({"kind": "quotient_remainder", "ids": num_ids} | given), {}, "test").tables["t"]
        composition = table.composition
        rows, counts = composition.rows_of(np.arange(num_ids + 1))
        assert counts.tolist() == [2] * num_ids + [1]
        assert rows[-1] == composition.rows == table.known_rows, "the row for unknown ids"
        pairs = rows[:-1].reshape(-1, 2)
        assert len(np.unique(pairs, axis=0)) == num_ids
        assert (pairs[:, 0] < composition.first).all()
        assert ((pairs[:, 1] >= composition.first) & (pairs[:, 1] < composition.rows)).all()
        if remainders is None:
            assert composition.rows <= 2 * math.sqrt(num_ids) + 1


def test_two_hashes_choose_a_row_of_each_half():
    config = build_config(tree(HASH), {}, "test")
    loaded, composition = load_vocabularies(config)["t"], config.tables["t"].composition
    assert composition == Composition(12, 3, 4)
    ids = np.array([0, 5, -3, 2**62])
    rows = composition.rows_of(loaded.map_integers(ids))[0].reshape(-1, 2)
    assert rows[:, 0].tolist() == (hash_integers(ids, 3) % np.uint64(3)).tolist()
    assert rows[:, 1].tolist() == (3 + hash_integers(ids, 4) % np.uint64(4)).tolist()
    words = pa.array(["a", "", "Käse"])
    rows = composition.rows_of(loaded.map_strings(words))[0].reshape(-1, 2)
    assert rows[:, 0].tolist() == (hash_strings(words, 3) % np.uint64(3)).tolist()
    assert rows[:, 1].tolist() == (3 + hash_strings(words, 4) % np.uint64(4)).tolist()
    assert load_vocabularies(build_config(tree(HASH | {"seed": 4}), {}, "test"))["t"].fingerprint != loaded.fingerprint


def test_a_quotient_is_of_integers_from_zero():
    loaded = load_vocabularies(build_config(tree(QR), {}, "test"))["t"]
    assert loaded.map_integers(np.array([0, 9, 10, -1])).tolist() == [0, 9, -1, -1]
    with pytest.raises(DataError, match="'quotient_remainder', for integers from 0"):
        loaded.map_strings(pa.array(["a"]))


def test_a_batch_holds_two_rows_for_an_id_and_weights_of_ids():
    config = build_config(tree(QR | {"remainders": 4}), {}, "test")
    specs = {spec.name: spec for spec in specs_of(config)}
    assert (specs["t"].rows, specs["t"].num_embeddings, specs["t"].num_ids) == (7, 8, 11)
    assert (specs["u:bias"].rows, specs["film"].num_ids) == (7, 6), "a bias is composed as its table is"
    columns = {
        "u": Flat(np.array([9, -1, 10, 4])),
        "mean": Ragged(np.array([0, 5, 10, 7, 7]), np.array([0, 3, 3, 4, 5])),
        "item": Flat(np.array([0, 1, 2, 3])),
        "label:y": Flat(np.zeros(4, np.float32)),
    }
    batch = Collator(config, specs_of(config)).batch(columns, 0, 4)
    weighted = batch.weighted
    assert weighted.keys() == ["u", "mean"]
    assert weighted["u"].lengths().tolist() == [2, 0, 1, 2]
    assert weighted["u"].values().tolist() == [2, 3 + 1, 7, 1, 3 + 0]
    assert weighted["u"].weights().tolist() == [1.0] * 5
    assert weighted["mean"].lengths().tolist() == [5, 0, 2, 2]
    assert weighted["mean"].values().tolist() == [0, 3, 1, 3 + 1, 7, 1, 3 + 3, 1, 3 + 3]
    third = np.float32(1 / 3)
    assert weighted["mean"].weights().tolist() == [third] * 5 + [1.0] * 4, "the mean is of ids, not of rows"
    assert batch.sparse["u:bias"].values().tolist() == [2, 4, 7, 1, 3]
    assert batch.ids["u"].tolist() == [9, -1, 10, 4], "who somebody is stays one number"
    assert key_lengths(config, specs_of(config), None, 4)["u"] == 2.0


def test_what_does_not_go_with_two_rows_is_refused():
    sequence = {"kind": "sequence", "table": "t", "max_length": 3}
    model = {"kind": "text_classifier", "text": "s", "encoder": {"kind": "flatten"}}
    rest = {"features": {"s": sequence}, "model": model, "objective": {"kind": "bce"}}
    with pytest.raises(ConfigError, match=r"features\.s is a sequence.*'quotient_remainder'.*'bag', or"):
        build_config({**tree(QR, **rest), "tables": {"t": {"dim": 4, "vocabulary": QR}}}, {}, "test")
    items = {"t": {"dim": 4, "vocabulary": QR}, "film": {"dim": 4, "vocabulary": HASH}}
    drawn = {"kind": "sampled_softmax", "num_negatives": 4}
    with pytest.raises(ConfigError, match=r"tables\.film\.vocabulary is 'double_hash'.*'sampled_softmax' draws.*'quotient"):
        build_config(tree(QR, tables=items, objective=drawn), {}, "test")
    softmax = {"kind": "in_batch_softmax"}
    with pytest.raises(ConfigError, match=r"metric 'recall@5' ranks items of feature 'item'"):
        build_config(tree(QR, tables=items, objective=softmax, evaluate={"metrics": ["recall@5"]}), {}, "test")
    with pytest.raises(ConfigError, match=r"rows=8, but 10 ids have 3 quotients and 4 remainders: 7 rows"):
        build_config(
            tree(QR, tables={"t": {"dim": 4, "vocabulary": QR, "rows": 8}, "film": {"dim": 4, "rows": 5}}), {}, "test"
        )
    with pytest.raises(ConfigError, match=r"needs 'rows', the number of rows to hash to"):
        build_config(tree({"kind": "double_hash"}), {}, "test")
    config = build_config(tree(QR), {}, "test")
    with pytest.raises(ConfigError, match=r"table 't' has the vocabulary 'quotient_remainder'.*sum of two rows"):
        _table_of(None, config, "t")


def test_the_share_of_ids_that_collide_is_the_expected_one(tmp_path):
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        places = generator.integers(0, 50, 30)
        shares.append((np.bincount(places, minlength=50)[places] > 1).mean())
    assert collision_share(50, 30) == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / math.sqrt(200))
    assert collision_share(50, 1) == 0.0
    assert collision_share(1, 2) == 1.0
    assert collision_share(10**12, 10**6) == pytest.approx(1e-6, rel=1e-3), "no cancellation"
    assert collision_share(1000, round(colliding_ids(1000, 0.1))) == pytest.approx(0.1, abs=0.001)
    made = tree(QR)
    made["tables"]["film"] = {"dim": 4, "vocabulary": {"kind": "hash", "rows": 1000}}
    made["tables"]["more"] = {"dim": 4, "vocabulary": {"kind": "double_hash", "rows": 200}}
    made["features"]["more"] = {"kind": "id", "table": "more"}
    made["model"]["user"]["features"].append("more")
    (tmp_path / "c.yaml").write_text(json.dumps(made))
    notes = {row.name: row.note for row in summarise_config(tmp_path / "c.yaml", [], {}).tables}
    assert notes["t"].endswith("3 quotients + 4 remainders: no two ids share both")
    assert notes["film"].endswith("1 - (1 - 1/1,000)^(N-1) share its row with another: 1% of 11, 10% of 106, 50% of 694")
    assert "100 + 100 rows, a hash for each; of N ids 1 - (1 - 1/10,000)^(N-1) share both rows" in notes["more"]
    known = summarise_config(tmp_path / "c.yaml", [], {}, ["film=500", "more=500"]).tables
    notes = {row.name: row.note for row in known}
    assert notes["film"].endswith("of 500 ids 39.30 % share its row with another")
    assert notes["more"].endswith("of 500 ids 4.87 % share both rows with another")
    with pytest.raises(ConfigError, match="--ids flm=5: there is no table 'flm'"):
        summarise_config(tmp_path / "c.yaml", [], {}, ["flm=5"])
