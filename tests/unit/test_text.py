"""Texts to rows of tables, against plain Python: words, cuts, runs of words, unknown words, nulls, Arrow's types."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import embedshard
from embedshard.config import build_config
from embedshard.config.parts import BpeVocabulary, WordsVocabulary
from embedshard.data.decode import Decoder, Where, column_specs
from embedshard.data.hashing import hash_ngrams
from embedshard.data.statistics import Statistics
from embedshard.data.tokenizer import Tokenizer, blank_tokenizer
from embedshard.data.tokenizer_training import train_tokenizers
from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import ConfigError, DataError

WHERE = Where("data/part-3.parquet", 2, 100, 5000)
MASK = 2**64 - 1
TEXTS = [
    "The cat sat on the mat; the cat's mat!",
    "A dog sat. <br /><br />The DOG's mat?",
    "",
    "  \t\n ",
    "no known word: xyzzy",
    "the",
    "Ärger über 42 Käse — don\u2019t 'quote' rock''n'roll",
    "<i>the</i> a<b mat 3 < 4 > 2",
]


def config(features, tables, train="x", **data):
    towers = {"user": {"features": list(features), "mlp": [4]}, "item": {"features": list(features), "mlp": [4]}}
    return build_config(
        {
            "data": {"train": str(train), "label": "label", **data},
            "features": {name: as_text(one) for name, one in features.items()},
            "tables": tables,
            "model": {"kind": "two_tower", **towers},
            "objective": {"kind": "mse"},
        },
        {},
        "test",
    )


def as_text(feature):
    return feature if "kind" in feature else {"kind": "text", "column": "text", "pooling": "mean", **feature}


def words_table(**options):
    return {"dim": 4, "vocabulary": {"kind": "words", **options}}


def write(path, texts, **options):
    path.mkdir(exist_ok=True)
    column = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
    pq.write_table(pa.table({"text": column, "label": np.zeros(len(texts), np.int8)}), path / "part-0.parquet", **options)
    return path


# ------------------------------------------------------------------------------------------------------ plain Python
def is_letter(character):
    return unicodedata.category(character)[0] in "LMN"


def naive_words(text, lower=True, strip_html=False, punctuation="remove"):
    if strip_html:
        text = re.sub("</?[A-Za-z][^<>]*>", " ", text)
    if lower:
        text = "".join(character.lower() for character in text)
    if punctuation == "keep":
        return text.split()
    words, place = [], 0
    while place < len(text):
        if not is_letter(text[place]):
            if punctuation == "separate" and not text[place].isspace():
                words.append(text[place])
            place += 1
            continue
        end = place
        while end < len(text) and (
            is_letter(text[end]) or (text[end] in "'\u2019" and end + 1 < len(text) and is_letter(text[end + 1]))
        ):
            end += 1
        words.append(text[place:end])
        place = end
    return words


def naive_vocabulary(texts, num_words=None, min_count=1, **options):
    counts = Counter(word for text in texts if text is not None for word in naive_words(text, **options))
    ordered = sorted((word for word in counts if counts[word] >= min_count), key=lambda w: (-counts[w], w.encode()))
    return ordered[:num_words]


def splitmix(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def naive_ngrams(ids, sizes, seed):
    hashes = []
    for begin in range(len(ids)):
        for size in sorted(sizes):
            if begin + size <= len(ids):
                hashed = 0
                for one in ids[begin : begin + size]:
                    hashed = splitmix((hashed + one + (seed + 1) * 0x9E3779B97F4A7C15) & MASK)
                hashes.append(hashed)
    return hashes


def as_lists(ragged):
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


# ---------------------------------------------------------------------------------------------------------- the words
OPTIONS = [
    {},
    {"lower": False},
    {"strip_html": True},
    {"punctuation": "separate"},
    {"punctuation": "separate", "strip_html": True, "lower": False},
    {"punctuation": "keep"},
    {"punctuation": "keep", "strip_html": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("limits", [{}, {"num_words": 5}, {"num_words": None, "min_count": 2}], ids=str)
def test_words_are_counted_as_plain_python_counts_them(tmp_path, options, limits):
    write(tmp_path / "train", [*TEXTS, None], row_group_size=3)
    wanted = config({"f": {"table": "t", "null": "empty"}}, {"t": words_table(**options, **limits)}, tmp_path / "train")
    text = train_tokenizers(wanted)["t"]
    vocabulary = load_vocabularies(wanted, {"t": text})["t"]
    expected = naive_vocabulary(TEXTS, **limits, **options) if limits else naive_vocabulary(TEXTS, 20_000, **options)
    assert vocabulary.ids_of(np.arange(vocabulary.rows + 1)) == [*expected, None]
    assert vocabulary.rows == len(expected)
    assert train_tokenizers(wanted)["t"] == text

    decoder = Decoder(column_specs(wanted, "train"), {"t": vocabulary}, Statistics()).narrowed(["f"])
    got = decoder.decode(pa.table({"text": [*TEXTS, None]}), WHERE)["f"]
    number = {word: row for row, word in enumerate(expected)}
    words = [naive_words(text, **options) for text in TEXTS]
    assert as_lists(got) == [[number.get(word, len(expected)) for word in each] for each in words] + [[]]

    (tmp_path / "own.json").write_text(text)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "own.json"))
    assert [library.encode(text).ids for text in TEXTS] == as_lists(got)[:-1], "the library alone finds the same"


alphabet = st.sampled_from([*"aAbéÜß'\u2019.-<>/ \t\n0٣ǅ\u0301\u00a0\u2028\x1c\x85İ", "the", "<br />", "日本", "🧀"])
some_texts = st.lists(st.lists(alphabet, max_size=12).map("".join), max_size=8)
vocabularies = st.sampled_from(
    [WordsVocabulary(kind="words", **options) for options in OPTIONS]
    + [BpeVocabulary(kind="bpe"), BpeVocabulary(kind="bpe", lower=False, strip_html=True)]
)


@given(some_texts, vocabularies, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_texts_that_are_divided_first_have_the_words_of_whole_ones(texts, vocabulary, skip):
    blank = blank_tokenizer(vocabulary)
    trainers = tokenizers.trainers
    if isinstance(vocabulary, WordsVocabulary):
        trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=280, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
    blank.train_from_iterator([["a A bb the 0 日本 < b'b <br /> the the", "the A . ä"]], trainer)
    content = json.loads(blank.to_str())
    content["added_tokens"] = []
    whole = tokenizers.Tokenizer.from_str(json.dumps(content))
    own = Tokenizer(json.dumps(content), "test")
    assert own._splits
    ids, lengths = own.encode(pa.array(["skipped"] * skip + texts, pa.string()).slice(skip))
    expected = [encoding.ids for encoding in whole.encode_batch(texts)]
    unknown = whole.token_to_id("[UNK]")
    assert ids.tolist() == [-1 if one == unknown else one for each in expected for one in each]
    assert lengths.tolist() == [len(each) for each in expected]


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_other_processes_make_the_same_tokenizer(tmp_path, kind):
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abcdefgh"), generator.integers(1, 9))) for _ in range(500)]
    texts = [" ".join(generator.choice(words, 40)) for _ in range(200)]
    write(tmp_path / "train", texts, row_group_size=50)
    table = words_table(num_words=200) if kind == "words" else {"dim": 4, "vocabulary": {"kind": "bpe", "num_words": 500}}
    wanted = config({"f": {"table": "t"}}, {"t": table}, tmp_path / "train")
    (tmp_path / "config.json").write_text(wanted.model_dump_json())
    program = (
        "import sys; from embedshard.config import Config; from embedshard.data.tokenizer_training import train_tokenizers\n"
        "print(train_tokenizers(Config.model_validate_json(open(sys.argv[1]).read()))['t'], end='')"
    )
    here = train_tokenizers(wanted)["t"]
    for threads in ("true", "false"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "config.json")],
            capture_output=True, text=True, check=True, env={"TOKENIZERS_PARALLELISM": threads, **environment()},
        )  # fmt: skip
        assert done.stdout == here
    assert load_vocabularies(wanted, {"t": here})["t"].rows == (200 if kind == "words" else 500)


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    return kept | {"PYTHONPATH": str(Path(embedshard.__file__).parents[1])}


def test_a_limit_of_rows_takes_evenly_spaced_row_groups_and_no_more_rows(tmp_path):
    texts = [f"word{row}" for row in range(100)]
    write(tmp_path / "train", texts, row_group_size=10)
    wanted = config({"f": {"table": "t"}}, {"t": words_table(max_train_rows=25)}, tmp_path / "train")
    told = []
    text = train_tokenizers(wanted, lambda what, done, total: told.append((what, done, total)))["t"]
    found = load_vocabularies(wanted, {"t": text})["t"]
    assert found.rows == 20, "two whole groups of ten, which lie in the middle of each half"
    assert set(found.tokenizer.words) == {f"word{row}" for row in (*range(20, 30), *range(70, 80))}
    assert told[0] == ("tokenizer of table 't'", 0, 20)
    assert told[-1] == ("tokenizer of table 't'", 20, 20)
    whole = config({"f": {"table": "t"}}, {"t": words_table(max_train_rows=3)}, tmp_path / "train")
    assert load_vocabularies(whole, train_tokenizers(whole))["t"].rows == 3


def test_rows_that_are_set_aside_do_not_count(tmp_path):
    table = pa.table({"text": ["good", None, "bad", "good"], "label": [1.0, 1.0, None, 0.0]})
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet")
    wanted = config({"f": {"table": "t"}}, {"t": words_table()}, tmp_path / "train", on_bad_row="quarantine")
    assert load_vocabularies(wanted, train_tokenizers(wanted))["t"].tokenizer.words == ["good"]


def test_byte_pairs_know_every_text(tmp_path):
    write(tmp_path / "train", TEXTS * 3)
    wanted = config(
        {"f": {"table": "t"}}, {"t": {"dim": 4, "vocabulary": {"kind": "bpe", "num_words": 300}}}, tmp_path / "train"
    )
    text = train_tokenizers(wanted)["t"]
    found = load_vocabularies(wanted, {"t": text})["t"]
    assert 256 <= found.rows <= 300
    ids, lengths = found.encoder.encode(pa.array(["The 日本 🧀 zebra", ""]))
    assert (ids >= 0).all()
    assert lengths.tolist() == [len(ids), 0]
    assert tokenizers.Tokenizer.from_str(text).decode(ids.tolist()) == " the 日本 🧀 zebra"


# ---------------------------------------------------------------------------------------------------------- the rows
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config's tables, and vocabularies of them: words of TEXTS, and two kinds of runs of them."""
    folder = write(tmp_path_factory.mktemp("text") / "train", TEXTS)
    tables = {
        "t": words_table(num_words=6, strip_html=True),
        "pairs": {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "t", "rows": 1000}},
        "runs": {"dim": 4, "rows": 77, "vocabulary": {"kind": "word_ngrams", "of": "t", "n": [3, 1], "seed": 5}},
    }
    names = {"f": {"table": "t"}, "p": {"table": "pairs"}, "r": {"table": "runs"}}
    made = train_tokenizers(config(names, tables, folder))

    def decode(features, array, role="train"):
        whole = {**names, **{name: {**names[name], **one} for name, one in features.items()}}
        wanted = config(whole, tables, folder)
        loaded = load_vocabularies(wanted, made)
        table = array if isinstance(array, pa.Table) else pa.table({"text": array})
        return Decoder(column_specs(wanted, role), loaded, Statistics()).narrowed(list(whole)).decode(table, WHERE)

    return decode, naive_vocabulary(TEXTS, 6, strip_html=True)


texts_or_nulls = st.lists(
    st.one_of(st.none(), st.lists(st.sampled_from(["the", "cat", "MAT", "dog's", "xyzzy", "<br />"]), max_size=7)),
    max_size=12,
)


@given(
    texts_or_nulls,
    st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]),
    st.integers(0, 4),
    st.integers(1, 5),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["oov", "empty"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_type_slice_cut_unknown_word_and_null(trained, rows, kind, skip, most, end, unknown, distinct):
    decode, words = trained
    texts = [None if row is None else " ".join(row) for row in rows]
    whole = pa.array(["the cat"] * skip + texts, pa.string()).cast(kind)
    array = pa.chunked_array([whole.slice(skip, len(texts) // 2), whole.slice(skip + len(texts) // 2)])
    options = {"max_length": most, "truncation": end, "null": "empty", "unknown": unknown, "distinct": distinct}
    got = decode({name: options for name in "fpr"}, array)
    number = {word: row for row, word in enumerate(words)}
    ids = [[number.get(word, 6) for word in naive_words(text or "", strip_html=True)] for text in texts]
    kept = [[one for one in each if unknown == "oov" or one < 6] for each in ids]

    def cut(each):
        left = each[:most] if end == "post" else each[-most:]
        return sorted(set(left)) if distinct else left

    assert as_lists(got["f"]) == [cut(each) for each in kept]
    assert got["null:f"].values.tolist() == [int(text is None) for text in texts]
    pairs = [[hashed % 1000 for hashed in naive_ngrams(each, [2], 0)] for each in ids]
    assert as_lists(got["p"]) == [cut(each) for each in pairs]
    runs = [[hashed % 77 for hashed in naive_ngrams(each, [1, 3], 5)] for each in ids]
    assert as_lists(got["r"]) == [cut(each) for each in runs]


@given(
    st.lists(st.lists(st.integers(0, 2**62), max_size=6), max_size=8),
    st.sets(st.integers(1, 5), min_size=1),
    st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_runs_never_cross_the_borders_of_rows(rows, sizes, seed):
    ids = np.array([one for row in rows for one in row], dtype=np.int64)
    hashes, counts = hash_ngrams(ids, np.array([len(row) for row in rows], dtype=np.int64), sizes, seed)
    expected = [naive_ngrams(row, sizes, seed) for row in rows]
    assert hashes.tolist() == [one for row in expected for one in row]
    assert counts.tolist() == [len(row) for row in expected]


def test_the_hash_of_a_run_is_pinned():
    hashes, _ = hash_ngrams(np.array([1, 2]), np.array([2]), [2], 0)
    assert hashes.tolist() == naive_ngrams([1, 2], [2], 0)


def test_nothing_but_nulls_and_no_rows(trained):
    decode, _ = trained
    options = {name: {"null": "empty"} for name in "fpr"}
    assert as_lists(decode(options, pa.nulls(2))["f"]) == [[], []]
    assert as_lists(decode(options, pa.array([], pa.string()))["p"]) == []


def test_what_is_distinct_is_so_in_each_of_many_texts_by_itself(trained):
    decode, _ = trained
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(["the", "cat", "mat", "xyzzy"], draw.integers(0, 9))) for _ in range(300)]
    got = decode({name: {"distinct": True} for name in "fpr"}, pa.array(texts))
    plain = decode({}, pa.array(texts))
    for name in "fpr":
        assert as_lists(got[name]) == [sorted(set(each)) for each in as_lists(plain[name])]


def test_texts_longer_than_a_slice_are_put_together(trained, monkeypatch):
    decode, _ = trained
    whole = as_lists(decode({}, pa.array(TEXTS))["p"])
    monkeypatch.setattr("embedshard.data.tokenizer._SLICE_BYTES", 20)
    monkeypatch.setattr("embedshard.data.tokenizer._BATCH_TEXTS", 3)
    assert as_lists(decode({}, pa.array(TEXTS))["p"]) == whole


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array(["a", None]), ["row 101", "column 'text' is null", "features.f.null to 'empty'"]),
        (pa.array([b"caf\xe9"], pa.binary()).view(pa.string()), ["row group 2", "column 'text'", "Invalid UTF8"]),
    ],
)
def test_texts_that_do_not_fit_are_refused(trained, array, words):
    decode, _ = trained
    with pytest.raises(DataError) as caught:
        decode({}, array)
    for word in ["data/part-3.parquet", *words]:
        assert word in str(caught.value)


def test_a_column_that_holds_no_texts_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [["a", "list"]], "label": [1]}), path)
    with pytest.raises(DataError, match=r"column 'text' is list<.*'f' needs a text, which is a string, in each row"):
        train_tokenizers(config({"f": {"table": "t"}}, {"t": words_table()}, path))


def test_texts_without_words_make_no_tokenizer(tmp_path):
    write(tmp_path / "train", ["", "..."])
    with pytest.raises(DataError, match=r"tables\.t\.vocabulary: no word is met 1 times in column 'text'"):
        train_tokenizers(config({"f": {"table": "t"}}, {"t": words_table()}, tmp_path / "train"))
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    write(tmp_path / "train", broken)
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 0.*not UTF-8"):
        train_tokenizers(config({"f": {"table": "t"}}, {"t": words_table()}, tmp_path / "train"))


# ---------------------------------------------------------------------------------------------------- ready tokenizers
def ready(model, path, **parts):
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_from_elsewhere_is_taken_as_it_is(tmp_path):
    words = {"[UNK]": 0, "[CLS]": 1, "the": 2, "cat": 3, "##s": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "ready.json"))
    table = words_table(path=str(tmp_path / "ready.json"))
    wanted = config({"f": {"table": "t"}}, {"t": table})
    found = load_vocabularies(wanted, train_tokenizers(wanted))["t"]
    assert found.rows == 5
    ids, lengths = found.encoder.encode(pa.array(["the cats dog the cat", ""]))
    assert ids.tolist() == [2, 3, 4, -1, 2, 3]
    assert lengths.tolist() == [6, 0]


def test_ready_tokenizers_that_are_none_are_refused(tmp_path):
    for name, content, words in (
        ("no.json", None, "cannot be read"),
        ("a.json", "{}", "is not the JSON of a tokenizer"),
        ("b.json", tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "knows no words"),
        ("c.json", tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [], dropout=0.5)).to_str(), "dropout=0.5"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        wanted = config({"f": {"table": "t"}}, {"t": words_table(path=str(tmp_path / name))})
        with pytest.raises(DataError, match=words):
            load_vocabularies(wanted)


def test_words_that_are_divided_already_are_looked_up_as_they_stand(tmp_path):
    model = tokenizers.models.WordLevel({"b": 0, "A": 1, "[UNK]": 2}, unk_token="[UNK]")
    path = ready(model, tmp_path / "ready.json", pre_tokenizer=tokenizers.pre_tokenizers.WhitespaceSplit())
    feature = {"kind": "bag", "unknown": "oov"}
    wanted = config({"f": {"table": "t", **feature, "column": "words"}}, {"t": words_table(path=str(path))})
    decoder = Decoder(column_specs(wanted, "train"), load_vocabularies(wanted), Statistics()).narrowed(["f"])
    got = decoder.decode(pa.table({"words": [["A", "b", "a b"], None, ["[UNK]"]]}), WHERE)["f"]
    assert as_lists(got) == [[1, 0, 2], [], [2]]
    with pytest.raises(DataError, match="holds integers, but its table's vocabulary is the 2 words"):
        decoder.decode(pa.table({"words": [[1]]}), WHERE)


# ---------------------------------------------------------------------------------------------------------- the config
@pytest.mark.parametrize(
    ("feature", "table", "words"),
    [
        ({"pooling": None, "distinct": True}, words_table(), "'distinct' leaves no order of words"),
        ({"kind": "id"}, words_table(path="x"), "is of kind 'id'.*'words', which is looked up by texts"),
        ({"kind": "bag"}, {"dim": 4, "vocabulary": {"kind": "bpe", "path": "x"}}, "is of kind 'bag'.*'bpe'"),
        ({}, {"dim": 4, "vocabulary": "hash", "rows": 9}, "is a text, but table 't' has the vocabulary 'hash'"),
        ({}, words_table() | {"rows": 9}, "'rows' comes from the tokenizer"),
        ({}, words_table(path="x", lower=False, num_words=3), "'path' gives a ready tokenizer.*Leave lower, num_words out"),
        ({"kind": "bag"}, words_table(), "no feature of kind 'text' looks this table up"),
        ({}, {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "t"}}, "a word_ngrams vocabulary needs 'rows'"),
        ({}, {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "t", "rows": 9}}, "table 't' has no tokenizer"),
        ({}, {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "u", "rows": 9}}, "there is no table 'u'"),
        ({}, {"dim": 4, "vocabulary": {"kind": "word_ngrams", "of": "t", "rows": 9, "n": [2, 2]}}, "different numbers"),
        ({}, {"dim": 4, "vocabulary": {"kind": "bpe", "num_words": 9}}, "num_words"),
    ],
)
def test_what_does_not_go_together_is_refused(feature, table, words):
    with pytest.raises(ConfigError, match=words):
        config({"f": {"table": "t", **feature}}, {"t": table})
