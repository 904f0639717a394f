"""Tokenizers as this project builds them, and texts to the ids of their words.

A tokenizer is the library `tokenizers`' own, kept as its JSON. Those that are built here find words in each stretch between
two spaces by itself. So texts are divided at spaces by Arrow, each different stretch is given to the library once, and
the words of all are put together by index: the same words, several times as fast. A tokenizer from elsewhere is given
the texts whole.
"""

from __future__ import annotations

__all__ = ["UNKNOWN_WORD", "Tokenizer", "blank_tokenizer"]

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedshard.config.parts import BpeVocabulary, TokenizerVocabulary, WordsVocabulary
from embedshard.data.columns import offsets_of
from embedshard.errors import DataError

if TYPE_CHECKING:
    import tokenizers

IntArray = npt.NDArray[np.int64]

UNKNOWN_WORD = "[UNK]"
"""The word that stands for all that a `words` tokenizer does not know; its id is the table's row for unknown ids."""

_TAG = "</?[A-Za-z][^<>]*>"
_LETTERS = r"[\p{L}\p{M}\p{N}]+"
_WORD = f"{_LETTERS}(?:['\u2019]{_LETTERS})*"
_PATTERNS = {"remove": _WORD, "separate": rf"{_WORD}|[^\s]"}
_BATCH_TEXTS = 8_192
_SLICE_BYTES = 2**26


def blank_tokenizer(vocabulary: TokenizerVocabulary) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a vocabulary describes, without any words."""
    import tokenizers
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    model: Any = models.WordLevel(unk_token=UNKNOWN_WORD) if isinstance(vocabulary, WordsVocabulary) else models.BPE()
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(Regex(_TAG), " ")] if vocabulary.strip_html else []
    steps += [normalizers.Lowercase()] if vocabulary.lower else []
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if isinstance(vocabulary, WordsVocabulary):
        pattern = _PATTERNS.get(vocabulary.punctuation)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.WhitespaceSplit()
            if pattern is None
            else pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
        )
        from tokenizers import decoders

        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Tokenizer:
    """A trained tokenizer.

    Args:
        text: its JSON.
        where: it is from, for messages.

    Attributes:
        text: its JSON.
        fingerprint: of it.
        words: by id; None where an id has none.
        rows: ids that have a row of their own.

    Raises:
        DataError: if it is none.
    """

    def __init__(self, text: str, where: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise DataError(
                f"{where} is not the JSON of a tokenizer: {error}. It is the file that Tokenizer.save of the library "
                f"'tokenizers' writes."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.text, self.fingerprint = text, hashlib.sha256(text.encode()).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.words: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
        for word, number in ids.items():
            self.words[number] = word
        if not ids:
            raise DataError(f"{where} knows no words.")
        content = json.loads(text)
        if content["model"].get("dropout"):
            raise DataError(
                f"{where} joins bytes by chance (its model has dropout={content['model']['dropout']}), so a text would not "
                f"have the same words twice. Save it with dropout=None."
            )
        self._unknown = self._unknown_id(content["model"])
        if self._unknown == len(self.words) - 1:
            self.words.pop()
        self.rows = len(self.words)
        self._splits, self._strips = False, False
        own = None if content["added_tokens"] or content["post_processor"] else _own(content)
        if own is not None:
            self._splits, self._strips = True, own.strip_html
            # What is taken away before the texts are divided need not be looked for again.
            self._tokenizer.normalizer = blank_tokenizer(own.model_copy(update={"strip_html": False})).normalizer

    def _unknown_id(self, model: dict[str, Any]) -> int | None:
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        token = model.get("unk_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, texts: pa.Array) -> tuple[IntArray, IntArray]:
        """Returns the ids of all texts' words one after another, -1 for unknown ones, and how many each text has.

        Args:
            texts: strings without nulls.

        Raises:
            pa.ArrowInvalid: if one is not UTF-8.
        """
        texts.validate(full=True)
        parts = [self._encode_slice(part) for part in _slices(texts)]
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *(part[0] for part in parts)])
        if self._unknown is not None:
            ids[ids == self._unknown] = -1
        return ids, np.concatenate([np.zeros(0, dtype=np.int64), *(part[1] for part in parts)])

    def _encode_slice(self, texts: pa.Array) -> tuple[IntArray, IntArray]:
        if not self._splits:
            return self._encode_whole(texts.to_pylist())
        if self._strips:
            texts = pc.replace_substring_regex(texts, _TAG, " ")
        divided = pc.split_pattern(texts, " ")
        stretches = divided.flatten().dictionary_encode()
        codes = stretches.indices.to_numpy(zero_copy_only=False)
        ids, lengths = self._encode_whole(stretches.dictionary.to_pylist())
        starts = (np.cumsum(lengths) - lengths)[codes]
        counts = lengths[codes]
        ends = offsets_of(counts)
        places = np.repeat(starts - ends[:-1], counts)
        places += np.arange(ends[-1])
        num_stretches = pc.list_value_length(divided).cast(pa.int64()).to_numpy(zero_copy_only=False)
        borders = offsets_of(num_stretches)
        return ids[places], np.diff(ends[borders])

    def _encode_whole(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        words: list[IntArray] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        for first in range(0, len(texts), _BATCH_TEXTS):
            found = [
                encoding.ids
                for encoding in self._tokenizer.encode_batch_fast(
                    list(texts[first : first + _BATCH_TEXTS]), add_special_tokens=False
                )
            ]
            lengths[first : first + len(found)] = list(map(len, found))
            words.append(np.fromiter(chain.from_iterable(found), dtype=np.int64))
        return np.concatenate([np.zeros(0, dtype=np.int64), *words]), lengths


def _own(content: dict[str, Any]) -> TokenizerVocabulary | None:
    """Returns what a tokenizer's JSON was built from here; None if it is from elsewhere."""
    pipeline = (content["normalizer"], content["pre_tokenizer"])
    return next((vocabulary for vocabulary, known in _known_pipelines() if known == pipeline), None)


@cache
def _known_pipelines() -> list[tuple[TokenizerVocabulary, tuple[Any, Any]]]:
    found: list[tuple[TokenizerVocabulary, tuple[Any, Any]]] = []
    for lower, strip_html in product((False, True), repeat=2):
        kinds: Iterable[TokenizerVocabulary] = (
            WordsVocabulary(kind="words", lower=lower, strip_html=strip_html, punctuation="remove"),
            WordsVocabulary(kind="words", lower=lower, strip_html=strip_html, punctuation="separate"),
            WordsVocabulary(kind="words", lower=lower, strip_html=strip_html, punctuation="keep"),
            BpeVocabulary(kind="bpe", lower=lower, strip_html=strip_html),
        )
        for vocabulary in kinds:
            content = json.loads(blank_tokenizer(vocabulary).to_str())
            found.append((vocabulary, (content["normalizer"], content["pre_tokenizer"])))
    return found


def _slices(texts: pa.Array) -> Iterator[pa.Array]:
    """Yields texts in order, about `_SLICE_BYTES` at once: what is made of them on the way takes several times as much."""
    ends = np.cumsum(pc.binary_length(texts).cast(pa.int64()).to_numpy(zero_copy_only=False))
    first = 0
    while first < len(texts):
        begin = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, begin + _SLICE_BYTES, side="right")), first + 1)
        yield texts.slice(first, last - first)
        first = last
