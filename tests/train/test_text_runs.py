"""Runs over texts: the tokenizer is made once, by rank 0, kept with the run, and used from then on."""

import json
import shutil
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from rich.console import Console

from embedshard.config import Loaded, build_config
from embedshard.data.check import check_data
from embedshard.data.dataset import open_dataset
from embedshard.errors import ConfigError, DataError, ExportError
from embedshard.export.check import check_files
from embedshard.export.manifest import open_export
from embedshard.export.unseen import kept_vocabulary_of
from embedshard.launch.data_check import show
from embedshard.launch.export import export_here
from embedshard.launch.local import evaluate_here, summarise_config
from embedshard.launch.planning import plan_here
from embedshard.launch.similar import similar_here, vectors_here
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import ConsoleReporter, Reporter
from embedshard.world import open_world

WORDS = ["good", "bad", "film", "plot", "the", "a", "of", "actor", "fine", "dull"]


def write_texts(folder, rows, seed, known=WORDS):
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(known, generator.integers(0, 12))) for _ in range(rows)]
    labels = np.array(["good" in text for text in texts], np.int8)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "part-0.parquet", row_group_size=50)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with train/ and test/ Parquet of texts; test has a word that train has not."""
    root = tmp_path_factory.mktemp("texts")
    write_texts(root / "train", 203, 1)
    write_texts(root / "test", 60, 2, [*WORDS, "xyzzy"])
    return root


def loaded(root, **changes):
    tree = {
        "data": {"train": f"{root}/train", "test": f"{root}/test", "label": "label", "lanes": 4},
        "features": {
            "words": {"kind": "text", "table": "words", "column": "text", "pooling": "mean", "max_length": 8},
            "pairs": {"kind": "text", "table": "pairs", "column": "text", "pooling": "sum", "distinct": True},
        },
        "tables": {
            "words": {"dim": 4, "vocabulary": {"kind": "words", "num_words": 50}},
            "pairs": {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "words", "rows": 64}},
        },
        "model": {
            "kind": "two_tower",
            "user": {"features": ["words"]},
            "item": {"features": ["pairs"]},
            "biases": ["global"],
        },
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 32, "epochs": 2},
        "evaluate": {"metrics": ["auc"]},
        "tracking": {"tensorboard": False},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for name in parents:
            node = node[name]
        node[last] = value
    return Loaded(build_config(tree, {}, "test"), tree, "test")


class StopAt(Reporter):
    """Asks for a stop after a step, and keeps what was told."""

    def __init__(self, notices, step):
        self._notices, self._step = notices, step
        self.prepared_rows, self.losses = [], {}

    def prepared(self, what, done, total):
        self.prepared_rows.append((what, done, total))

    def stepped(self, step, epoch, loss, samples_per_second):
        self.losses[step] = loss
        if step == self._step:
            self._notices.stop = "SIGTERM"


def run(config, run_directory, stop_at=None, resume_from=None):
    notices = Notices()
    reporter = StopAt(notices, stop_at)
    with open_world("cpu") as world:
        train(config.config, world, run_directory, reporter, resume_from, notices)
    return reporter


def test_a_run_keeps_its_tokenizer_and_goes_on_with_it_bit_for_bit(texts, tmp_path, saved_tensors, assert_same_tensors):
    config = loaded(texts)
    whole = RunDirectory.create(tmp_path / "whole", config)
    heard = run(config, whole)
    assert heard.prepared_rows[0] == ("tokenizer of table 'words'", 0, 203)
    assert heard.prepared_rows[-1] == ("tokenizer of table 'words'", 203, 203)
    kept = whole.read_json("inventory.json")
    assert kept["table_rows"] == {"words": 10, "pairs": 64}, "ten words are met"
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "whole" / "tokenizers" / "words.json"))
    assert library.to_str() == kept["tokenizers"]["words"]
    assert sorted(path.name for path in (tmp_path / "whole" / "tokenizers").iterdir()) == ["words.json"]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert {word for *_, word in result["ids"]["features"]["words"]["hottest"]} == set(WORDS)
    assert result["bad_rows"]["test"]["oov"]["words"] > 0
    assert result["bad_rows"]["train"]["oov"]["words"] == 0

    stopped = RunDirectory.create(tmp_path / "stopped", config)
    first = run(config, stopped, stop_at=5)
    again = run(config, stopped, resume_from=newest_intact(stopped.checkpoints))
    assert first.prepared_rows
    assert not again.prepared_rows, "nothing is made anew"
    assert first.losses | again.losses == heard.losses
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "stopped"))


def test_a_tokenizer_goes_with_the_export_and_finds_what_it_found_in_training(texts, tmp_path):
    config, out = loaded(texts), tmp_path / "out"
    run(config, RunDirectory.create(tmp_path / "run", config))
    manifest = export_here(tmp_path / "run", out, {}).manifest
    assert "tokenizers/words.json" in manifest.files
    assert [spec.vocabulary["file"] for spec in manifest.programs["user"].inputs] == ["tokenizers/words.json"]
    shutil.rmtree(tmp_path / "run")
    with open_world("cpu") as world:
        dataset = open_dataset(config.config, world, None)
        columns = dataset.read_held_out("test")["words"]
    content = pq.read_table(texts / "test" / "part-0.parquet")["text"]
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizers" / "words.json"))
    kept = kept_vocabulary_of(open_export(out), "words", manifest.programs["user"].inputs[0].vocabulary)
    words = pq.read_table(out / "tables" / "words.parquet")["id"].to_pylist()
    assert words == [*kept.tokenizer.words, None]
    met = 0
    for number, text in enumerate(content.to_pylist()):
        of_training = columns.values[columns.offsets[number] : columns.offsets[number + 1]].tolist()
        rows, _ = kept.encoder.encode(pa.array([text]))
        assert [kept.rows if row < 0 else row for row in rows.tolist()][-8:] == of_training
        assert library.encode(text, add_special_tokens=False).ids[-8:] == of_training
        assert [words[row] for row in of_training] == [word if word in WORDS else None for word in text.split()][-8:]
        met += len(of_training)
    assert met > 100
    file = out / "tokenizers" / "words.json"
    file.write_text(file.read_text().replace('"good"', '"bood"'))
    with pytest.raises(ExportError, match=r"tokenizers/words\.json has the SHA-256"):
        kept_vocabulary_of(open_export(out), "words", manifest.programs["user"].inputs[0].vocabulary)
    [problem] = check_files(out).problems
    assert "tokenizers/words.json" in problem


def test_evaluation_and_resumption_use_the_tokenizer_that_was_kept(texts, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(texts, folder)
    config = loaded(folder)
    directory = RunDirectory.create(tmp_path / "run", config)
    run(config, directory)
    before = evaluate_here(tmp_path / "run", None, "cpu", {})
    kept = directory.read_json("inventory.json")
    other = json.loads(kept["tokenizers"]["words"])
    vocab = other["model"]["vocab"]
    other["model"]["vocab"] = {word: {0: 1, 1: 0}.get(row, row) for word, row in vocab.items()}
    spoilt = kept | {"tokenizers": {"words": json.dumps(other)}}
    with open_world("cpu") as world:
        dataset = open_dataset(config.config, world, kept)
        assert dataset.resolved() == kept
        with pytest.raises(DataError, match="table 'words': its vocabulary is another"):
            open_dataset(config.config, world, spoilt)
    assert evaluate_here(tmp_path / "run", None, "cpu", {}) == before


def test_neighbours_of_words_are_found_by_the_tokenizer_that_was_kept(texts, tmp_path, saved_tensors):
    config = loaded(texts)
    run(config, RunDirectory.create(tmp_path / "run", config))
    found = similar_here(tmp_path / "run", "good", 3, {}, table="words")
    assert len({near.id for near in found.neighbours} & set(WORDS)) == 3, "words, by their names"
    ids, vectors = vectors_here(tmp_path / "run", {}, table="words")
    weight = saved_tensors(tmp_path / "run")[1]["tables/words/weight"].numpy()
    assert set(WORDS) <= set(ids)
    assert np.array_equal(vectors, weight[: len(ids)])
    assert ids[found.query.row] == "good"
    with pytest.raises(DataError, match=r"'goood' is not among .* Did you mean 'good'"):
        similar_here(tmp_path / "run", "goood", 3, {}, table="words")
    with pytest.raises(ConfigError, match=r"'word_ngrams': a run of words looks up the row of its hash.*: --table words\."):
        similar_here(tmp_path / "run", "good bad", 3, {}, table="pairs")
    ids, vectors = vectors_here(tmp_path / "run", {}, table="pairs")
    assert ids == [None] * 64, "no one word has a hashed row"
    assert vectors.shape == (64, 4)


def test_a_ready_tokenizer_is_kept_with_the_run_too(texts, tmp_path):
    model = tokenizers.models.WordLevel({"good": 0, "bad": 1, "[UNK]": 2}, unk_token="[UNK]")
    ready = tokenizers.Tokenizer(model)
    ready.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ready.save(str(tmp_path / "ready.json"))
    config = loaded(texts, tables__words__vocabulary={"kind": "words", "path": str(tmp_path / "ready.json")})
    directory = RunDirectory.create(tmp_path / "run", config)
    run(config, directory, stop_at=3)
    (tmp_path / "ready.json").unlink()
    run(config, directory, resume_from=newest_intact(directory.checkpoints))
    assert directory.read_json("inventory.json")["table_rows"]["words"] == 2


def test_what_has_no_tokenizer_yet_knows_the_most_rows_or_says_what_to_do(texts, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(loaded(texts).tree))
    found = {row.name: row for row in summarise_config(tmp_path / "config.yaml", [], {}).tables}
    assert found["words"].shape == (51, 4)
    assert found["words"].note.endswith("so many rows at most: a run makes the tokenizer")
    assert "at most" not in found["pairs"].note
    with pytest.raises(Exception, match=r"num_words is null.*--set tables\.words\.vocabulary\.num_words=100000"):
        summarise_config(tmp_path / "config.yaml", ["tables.words.vocabulary.num_words=null"], {})
    planned = plan_here(tmp_path / "config.yaml", [], 1, "cpu", {}, Console(file=StringIO()))
    depends_on = planned.draft.plan.depends_on
    assert {name: table["rows"] for name, table in depends_on.items()} == {"words": 11, "pairs": 65}, (
        "and one for unknown ids"
    )
    assert planned.sample.features["words"].found.distinct_rows == len(WORDS)
    unread = plan_here(tmp_path / "config.yaml", ["data.train=nowhere"], 1, "cpu", {}, Console(file=StringIO()))
    assert unread.sample is None
    with pytest.raises(DataError, match=r"--set 'tables\.words\.vocabulary="):
        plan_here(
            tmp_path / "config.yaml",
            ["data.train=nowhere", "tables.words.vocabulary.num_words=null"], 1, "cpu", {}, Console(file=StringIO()),
        )  # fmt: skip


def test_the_check_of_the_data_covers_texts(texts, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(texts, folder)
    table = pq.read_table(folder / "test")
    column = table["text"].to_pylist()
    column[3] = None
    pq.write_table(table.set_column(0, "text", pa.array(column)), folder / "test" / "part-0.parquet")
    told = []
    report = check_data(loaded(folder).config, lambda done, total: told.append((done, total)))
    assert (203, 203) in told
    assert told[-1] == (263, 263)
    test = next(one for one in report.sets if one.name == "test")
    found = next(one for one in test.columns if one.name == "words")
    words = [text.split() if text is not None else [] for text in column]
    values = [word for each in words for word in each]
    assert (found.kind, found.types, found.values, found.nulls) == ("text", ["string"], len(values), 1)
    assert (found.unknown, found.distinct) == (values.count("xyzzy"), len(WORDS))
    assert found.unknown_share == values.count("xyzzy") / len(values)
    assert (found.lists, found.null_share) == (60, 1 / 60)
    assert (found.least_length, found.greatest_length) == (0, max(map(len, words)))
    assert [(one.column, one.reason, one.action, one.rows) for one in test.problems] == 2 * [
        ("text", "null text", "error", 1)
    ]
    assert len(report.refused) == 1
    assert "test: 1 of 60 rows (text: null text" in report.refused[0]
    screen = StringIO()
    show(report, Console(file=screen, width=200))
    assert "0 to 11" in screen.getvalue()
    table = pa.table({"text": [1, 2], "label": [0, 1]})
    pq.write_table(table, folder / "train" / "part-0.parquet")
    refused = check_data(loaded(folder).config).refused
    assert any("column 'text' is int64" in reason and "needs a text" in reason for reason in refused), refused


def test_the_console_shows_that_a_tokenizer_is_made():
    for terminal in (False, True):
        screen = StringIO()
        reporter = ConsoleReporter(Console(file=screen, force_terminal=terminal, width=100), 10)
        for done in (0, 50, 100):
            reporter.prepared("tokenizer of table 'words'", done, 100)
        reporter.started(0, 2)
        reporter.stepped(1, 0, 0.5, 10.0)
        reporter.finished()
        assert "tokenizer of table 'words'" in screen.getvalue()
