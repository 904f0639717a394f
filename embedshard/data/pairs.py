"""Pairs of a centre and a context from the lists of a batch.

As in word2vec (Mikolov et al. 2013): of frequent ids some places fall out first; then each place that is left draws how
far it looks, and every place within that reach on either side is its context. Both draws are one hash of (seed, epoch,
partition, row, place in the row), so they are the same in every world and after every resumption.

Pairs are two arrays of places in the concatenated lists, made over offsets; nothing here makes an object a row.
"""

from __future__ import annotations

__all__ = ["KeptPlaces", "PairMaker", "keep_probability"]

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.compiled import compiled
from embedshard.config.parts import ItemEmbeddingConfig
from embedshard.data.columns import Ragged
from embedshard.data.hashing import GOLDEN, WordArray, finalised, hash_integers
from embedshard.data.order import Position

IntArray = npt.NDArray[np.int64]

_STREAM = 4  # beside those of order.py and negatives.py
_finalised = compiled(finalised)
_GOLDEN = np.uint64(GOLDEN)


@dataclass(frozen=True)
class KeptPlaces:
    """The places of some rows' lists that are centres and contexts.

    Attributes:
        column: their ids, V of them, by row; offsets begin at 0.
        rows: the row of each, (V,) int64.
        reach: how far each looks as a centre, (V,) int64, from 1 to the window.
    """

    column: Ragged
    rows: IntArray
    reach: IntArray

    def pairs(self) -> tuple[IntArray, IntArray]:
        """Returns the places of centres and of their contexts, (P,) int64 each, by centre and then by context.

        Both are places in `column.values`.
        """
        return _pairs(self.column.offsets, self.rows, self.reach)


@compiled
def _pairs(offsets: Any, rows: Any, reach: Any) -> Any:
    total = 0
    for place in range(len(rows)):
        begin, end = offsets[rows[place]], offsets[rows[place] + 1]
        total += min(reach[place], place - begin) + min(reach[place], end - 1 - place)
    centres, contexts = np.empty(total, np.int64), np.empty(total, np.int64)
    at = 0
    for place in range(len(rows)):
        begin, end = offsets[rows[place]], offsets[rows[place] + 1]
        for context in range(max(begin, place - reach[place]), min(end, place + reach[place] + 1)):
            if context != place:  # a centre is no context of its own
                centres[at], contexts[at] = place, context
                at += 1
    return centres, contexts


class PairMaker:
    """Decides which places of a list are kept and how far each looks.

    Args:
        config: the model's.
        seed: of the run.
        counts: how often each row of the table is met in training, (num_embeddings,) int64; None where all are kept.
    """

    def __init__(self, config: ItemEmbeddingConfig, seed: int, counts: IntArray | None) -> None:
        self.feature = config.sequence
        self.by_side = config.by_side
        self.window, self._is_dynamic, self._seed = config.window, config.dynamic_window, seed
        assert counts is not None or config.subsample is None, "ids are counted where they are sub-sampled"
        self._keep = np.zeros(0, dtype=np.float32)
        if counts is not None and config.subsample is not None:
            self._keep = keep_probability(counts, config.subsample)

    def keep(self, column: Ragged, row_numbers: IntArray, position: Position) -> KeptPlaces:
        """Returns what is kept of some rows. A place that is left alone in its row has no pair, and falls out too.

        Args:
            column: their lists, B of them.
            row_numbers: of the rows in their partition, (B,) int64; -1 for padding, whose list is empty.
            position: of the step.
        """
        offsets = np.zeros(len(column.offsets), dtype=np.int64)
        values, rows, reach = _keep(
            column.values,
            column.offsets,
            self._words(row_numbers, position),
            self._keep,
            self.window,
            self._is_dynamic,
            offsets,
        )
        return KeptPlaces(Ragged(values, offsets), rows, reach)

    def _words(self, row_numbers: IntArray, position: Position) -> WordArray:
        """Returns a word for each row, from which those of its places are counted on."""
        key = _STREAM
        for number in (self._seed, position.epoch, position.partition):
            key = int(hash_integers(np.array([number], dtype=np.int64), key)[0])
        return hash_integers(row_numbers, key)


@compiled
def _keep(
    values: Any, offsets: Any, words: Any, probabilities: Any, window: int, is_dynamic: bool, kept_offsets: Any
) -> tuple[Any, Any, Any]:
    """Fills in the offsets of what is kept of rows, and returns it: ids, rows and reaches.

    Args:
        values: of all rows, and maybe of others.
        offsets: where each row begins in them, and the last one's end, (B + 1,) int64.
        words: one for each row, (B,) uint64.
        probabilities: of each id, (n,) float32; none where all are kept.
        window: the farthest reach.
        is_dynamic: whether reaches are drawn.
        kept_offsets: (B + 1,) int64, zeros.
    """
    most, count = offsets[-1] - offsets[0], 0
    kept, rows, reach = np.empty(most, values.dtype), np.empty(most, np.int64), np.empty(most, np.int64)
    for row in range(len(words)):
        first = offsets[row]
        for place in range(offsets[row + 1] - first):
            word = _finalised(words[row] + np.uint64(place) + _GOLDEN)
            value = values[first + place]
            kept[count], rows[count], reach[count] = value, row, window
            if is_dynamic:
                lower = word & np.uint64(0xFFFFFFFF)
                reach[count] = np.int64((lower * np.uint64(window)) >> np.uint64(32)) + 1
            if len(probabilities):
                uniform = np.float32(word >> np.uint64(40)) * np.float32(2.0**-24)
                count += uniform < probabilities[value]
            else:
                count += 1
        if count - kept_offsets[row] == 1:  # alone
            count -= 1
        kept_offsets[row + 1] = count
    return kept[:count], rows[:count], reach[:count]


def keep_probability(counts: IntArray, threshold: float) -> npt.NDArray[np.float32]:
    """Returns with which probability a place with each id is kept: sqrt(t / f) + t / f, f being the id's share, (n,)."""
    ratio = threshold * max(int(counts.sum()), 1) / np.maximum(counts, 1)
    return np.minimum(np.sqrt(ratio) + ratio, 1.0).astype(np.float32)
