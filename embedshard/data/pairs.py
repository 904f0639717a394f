"""Pairs of a centre and a context from the lists of a batch.

As in word2vec (Mikolov et al. 2013): of frequent ids some places fall out first; then each place that is left draws how
far it looks, and every place within that reach on either side is its context. Both draws are one hash of (seed, epoch,
partition, row, place in the row), so they are the same in every world and after every resumption.

Pairs are two arrays of places in the concatenated lists, made over offsets; nothing here makes an object a row.
"""

from __future__ import annotations

__all__ = ["KeptPlaces", "PairMaker", "keep_probability"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedshard.config.parts import ItemEmbeddingConfig
from embedshard.data.columns import Ragged
from embedshard.data.hashing import WordArray, hash_integers
from embedshard.data.order import Position

IntArray = npt.NDArray[np.int64]

_STREAM = 4  # beside those of order.py and negatives.py


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
        places = np.arange(len(self.rows), dtype=np.int64)
        before = np.minimum(self.reach, places - self.column.offsets[self.rows])
        after = np.minimum(self.reach, self.column.offsets[self.rows + 1] - 1 - places)
        counts = before + after
        ends = np.cumsum(counts)
        centres = np.repeat(places, counts)
        contexts = np.repeat(places - before - (ends - counts), counts)
        contexts += np.arange(len(centres), dtype=np.int64)
        contexts += contexts >= centres  # a centre is no context of its own
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
        self._keep = None if counts is None or config.subsample is None else keep_probability(counts, config.subsample)

    def keep(self, column: Ragged, row_numbers: IntArray, position: Position) -> KeptPlaces:
        """Returns what is kept of some rows. A place that is left alone in its row has no pair, and falls out too.

        Args:
            column: their lists, B of them.
            row_numbers: of the rows in their partition, (B,) int64; -1 for padding, whose list is empty.
            position: of the step.
        """
        first, last = int(column.offsets[0]), int(column.offsets[-1])
        values, starts = column.values[first:last], column.offsets[:-1] - first
        lengths = np.diff(column.offsets)
        rows = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        words = self._words(row_numbers, position)[rows]
        words += (np.arange(len(rows), dtype=np.int64) - starts[rows]).astype(np.uint64)
        words = hash_integers(words, 0)
        is_kept = np.ones(len(rows), dtype=np.bool_)
        if self._keep is not None:
            uniform = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
            is_kept = uniform < self._keep[values]
        alone = np.bincount(rows[is_kept], minlength=len(lengths)) == 1
        if alone.any():
            is_kept &= ~alone[rows]
        rows, words = rows[is_kept], words[is_kept]
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(lengths)), out=offsets[1:])
        reach = np.full(len(rows), self.window, dtype=np.int64)
        if self._is_dynamic:
            lower = words & np.uint64(0xFFFFFFFF)
            reach = ((lower * np.uint64(self.window)) >> np.uint64(32)).astype(np.int64) + 1
        return KeptPlaces(Ragged(values[is_kept], offsets), rows, reach)

    def _words(self, row_numbers: IntArray, position: Position) -> WordArray:
        """Returns a word for each row, from which those of its places are counted on."""
        key = _STREAM
        for number in (self._seed, position.epoch, position.partition):
            key = int(hash_integers(np.array([number], dtype=np.int64), key)[0])
        return hash_integers(row_numbers, key)


def keep_probability(counts: IntArray, threshold: float) -> npt.NDArray[np.float32]:
    """Returns with which probability a place with each id is kept: sqrt(t / f) + t / f, f being the id's share, (n,)."""
    ratio = threshold * max(int(counts.sum()), 1) / np.maximum(counts, 1)
    return np.minimum(np.sqrt(ratio) + ratio, 1.0).astype(np.float32)
