"""Makes the tokenizers of a config from its training texts, which are read once, a few thousand at a time."""

from __future__ import annotations

__all__ = ["PreparationProgress", "train_tokenizers"]

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedshard.config import Config
from embedshard.config.parts import BpeVocabulary, TokenizerVocabulary, WordsVocabulary
from embedshard.data.decode import Decoder, column_specs
from embedshard.data.partitions import Partition
from embedshard.data.source import Source
from embedshard.data.spacing import evenly_spaced
from embedshard.data.statistics import Statistics
from embedshard.data.text import read_tokenizer
from embedshard.data.tokenizer import UNKNOWN_WORD, blank_tokenizer
from embedshard.data.training_set import open_training
from embedshard.data.vocabulary import load_vocabularies
from embedshard.errors import DataError

_BATCH_ROWS = 4_096
_NO_LIMIT = 2**32

PreparationProgress = Callable[[str, int, int], None]
"""Hears what is made before training, how many rows were read for it, and of how many."""


def train_tokenizers(
    config: Config, progress: PreparationProgress | None = None, partitions: Sequence[Partition] | None = None
) -> dict[str, str]:
    """Returns the tokenizer of each table that has one, as JSON: read where it is ready, else trained.

    Rows that are set aside do not count.

    Args:
        config: the config.
        progress: hears how far it is.
        partitions: of the training set; None looks for them.

    Raises:
        DataError: if a file cannot be read, or there are no words.
    """
    found = {}
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, TokenizerVocabulary):
            is_ready = vocabulary.path is not None
            found[name] = (
                read_tokenizer(name, vocabulary) if is_ready else _train(config, name, vocabulary, progress, partitions)
            )
    return found


def _train(
    config: Config,
    table: str,
    vocabulary: TokenizerVocabulary,
    progress: PreparationProgress | None,
    partitions: Sequence[Partition] | None,
) -> str:
    features = config.texts(table)
    decoder = Decoder(column_specs(config, "train"), load_vocabularies(config), Statistics(), config.data.on_bad_row)
    narrowed = decoder.narrowed(features)
    sources = open_training(config, narrowed, partitions)
    columns = list(dict.fromkeys(feature.column or name for name, feature in features.items()))

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(f"tokenizer of table '{table}'", done, total)

    texts = _texts(sources, columns, vocabulary.max_train_rows, told)
    text = _train_words(vocabulary, texts) if isinstance(vocabulary, WordsVocabulary) else _train_bpe(vocabulary, texts)
    if text is None:
        raise DataError(
            f"tables.{table}.vocabulary: no word is met {vocabulary.min_count} times in column "
            f"{' and '.join(repr(column) for column in columns)} of the training set, so there is no tokenizer to make. "
            f"Look at the texts, or give a lower min_count."
        )
    return text


def _train_words(vocabulary: WordsVocabulary, texts: Iterator[list[str]]) -> str | None:
    from tokenizers import models, trainers

    tokenizer = blank_tokenizer(vocabulary)
    most = vocabulary.num_words or _NO_LIMIT
    # One more, which may be the word for unknown ones itself.
    trainer = trainers.WordLevelTrainer(vocab_size=most + 1, min_frequency=vocabulary.min_count, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids: dict[str, int] = tokenizer.get_vocab()
    words = [word for word in sorted(ids, key=ids.__getitem__) if word != UNKNOWN_WORD][:most]
    numbers = {word: number for number, word in enumerate([*words, UNKNOWN_WORD])}
    tokenizer.model = models.WordLevel(numbers, unk_token=UNKNOWN_WORD)
    return tokenizer.to_str() if words else None


def _train_bpe(vocabulary: TokenizerVocabulary, texts: Iterator[list[str]]) -> str | None:
    from tokenizers import pre_tokenizers, trainers

    assert isinstance(vocabulary, BpeVocabulary), "the other kind of tokenizer"
    tokenizer = blank_tokenizer(vocabulary)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.num_words,
        min_frequency=vocabulary.min_count,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return tokenizer.to_str() if content["model"]["vocab"] else None


def _texts(
    sources: Sequence[Source], columns: Sequence[str], limit: int | None, told: Callable[[int, int], None]
) -> Iterator[list[str]]:
    """Yields the texts of some columns, those of a few thousand rows at once."""
    groups = [(source, number) for source in sources for number in range(len(source.inventory.row_groups))]
    sizes = [source.inventory.row_groups[number].num_rows for source, number in groups]
    chosen = sorted(range(len(groups)) if limit is None else evenly_spaced(sizes, limit))
    total = sum(sizes[number] for number in chosen)
    left = total = total if limit is None else min(total, limit)
    told(0, total)
    for number in chosen:
        source, group = groups[number]
        for table, where in source.iter_tables(group, _BATCH_ROWS):
            rows = table.slice(0, left)
            if source.decoder.quarantines:
                bad = source.decoder.decode(rows, where)["bad"].values
                rows = rows.filter(pa.array(np.equal(bad, 0)))
            for column in columns:
                yield _strings(rows.column(column), where.row(0))
            left -= min(left, table.num_rows)
            told(total - left, total)
            if not left:
                break


def _strings(column: pa.Array, where: str) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return [text for text in column.to_pylist() if text is not None]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} or one after it: a text is not UTF-8: {error}. Write the texts anew.") from error
