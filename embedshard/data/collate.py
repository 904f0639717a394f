"""From columns in final order to a `Batch`: slices and concatenations, nothing per row."""

from __future__ import annotations

__all__ = ["Collator"]

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.config import Config, Lookup, TableSpec
from embedshard.config.parts import DenseFeature
from embedshard.data.batch import Batch, Draws, Pairs, Paths
from embedshard.data.columns import Columns, Flat, Ragged, rebased, repeated, slice_rows
from embedshard.data.huffman import HuffmanTree
from embedshard.data.negatives import DrawnCandidates
from embedshard.data.order import Position
from embedshard.data.pairs import PairMaker
from embedshard.data.quarantine import Tally

_NODES = ":nodes"  # a column of what paths visit, by a name that no feature has

Jagged = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None]
"""Values, lengths, and weights if they are asked for."""


class Collator:
    """Builds batches from columns, in several threads if need be.

    Args:
        config: the config.
        specs: its tables: which ids travel under which key.
        tally: counts what is wrong with the rows of a training batch; None counts nothing.
        pair_maker: makes pairs of the lists of a training batch; None makes none.
        tree: down which the objective goes to a context; None where it does not.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[TableSpec],
        tally: Tally | None = None,
        pair_maker: PairMaker | None = None,
        tree: HuffmanTree | None = None,
    ) -> None:
        self._config, self._tally, self._pair_maker, self._tree = config, tally, pair_maker, tree
        pooled, sequences = ([spec for spec in specs if spec.is_sequence is kind] for kind in (False, True))
        self._rows_per_lane = config.train.global_batch_size // config.data.lanes
        self._plain = [lookup for spec in pooled if not spec.weighted for lookup in spec.lookups]
        self._weighted = [lookup for spec in pooled if spec.weighted for lookup in spec.lookups]
        self._sequences = [lookup for spec in sequences for lookup in spec.lookups]
        self._compositions = {
            lookup.key: spec.composition for spec in specs if spec.composition is not None for lookup in spec.lookups
        }
        self._all_ones = torch.ones(0, dtype=torch.int64)
        self._pools_by_weights = any(spec.weighted for spec in sequences)
        self._dense = [name for name, feature in config.features.items() if isinstance(feature, DenseFeature)]
        self._labels = [f"label:{name}" for name in config.data.label_columns]
        self._identities = list(
            dict.fromkeys(name for role in ("user_id", "item_id") if (name := config.identity(role)) is not None)
        )

    def batch(
        self,
        columns: Columns,
        first: int,
        last: int,
        draws: DrawnCandidates | None = None,
        position: Position | None = None,
    ) -> Batch:
        """Builds a batch of the rows [first, last).

        Args:
            columns: features, labels and weights by name. A feature that is absent is empty in every row.
            first: of the rows.
            last: after the last of the rows.
            draws: this rank's share of the candidates drawn for the step.
            position: where the step is.

        Returns:
            A batch that shares no memory with `columns`, and with other batches none but the lengths of ids, one a row.
        """
        size = last - first
        rows = _flat(columns, "row", first, last, np.int64, -1 if position is not None else 0)
        weights = _flat(columns, "weight", first, last, np.float32, 1.0)
        is_padded = bool(size) and int(rows.min()) < 0
        if is_padded:
            weights[rows < 0] = 0.0
        bad = _flat(columns, "bad", first, last, np.int16, 0) if "bad" in columns else None
        if bad is not None:
            weights[bad != 0] = 0.0
        tally = self._count(columns, first, last) if position is not None else None
        pairs = None
        if self._pair_maker is not None and position is not None:
            columns = _widened(columns, first, last)
            first, last = 0, size
            columns, pairs = self._pairs(self._pair_maker, columns, rows, weights, position)
        return Batch(
            sparse=self._jagged(self._plain, columns, first, last, draws, with_weights=False),
            weighted=self._jagged(self._weighted, columns, first, last, draws, with_weights=True),
            sequences=self._jagged(self._sequences, columns, first, last, draws, with_weights=self._pools_by_weights),
            dense=torch.from_numpy(self._stack(self._dense, columns, first, last)),
            labels=torch.from_numpy(self._stack(self._labels, columns, first, last)),
            weights=torch.from_numpy(weights),
            ids={name: torch.from_numpy(_flat(columns, name, first, last, np.int64, -1)) for name in self._identities},
            rows=torch.from_numpy(rows),
            draws=None if draws is None else self._draws(draws, columns, first, last),
            position=position,
            bad=None if bad is None else torch.from_numpy(bad),
            tally=tally,
            pairs=pairs,
            is_full=not is_padded and bad is None and "weight" not in columns,
        )

    def _pairs(
        self,
        maker: PairMaker,
        columns: Columns,
        rows: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        position: Position,
    ) -> tuple[Columns, Pairs]:
        """Returns the columns with the ids that are kept of the list, beside them the nodes on their ways, and its pairs."""
        column = columns[maker.feature]
        assert isinstance(column, Ragged), "the config checks that pairs are made of lists"
        kept = maker.keep(column, rows, position)
        distinct, ids = np.unique(kept.column.values, return_inverse=True)
        columns = {**columns, maker.feature: _in_first_row(distinct, len(rows))}
        paths = None
        if self._tree is not None:
            found = self._tree.paths(distinct)
            columns[_NODES] = _in_first_row(found.visited, len(rows))
            paths = Paths(*map(torch.from_numpy, (found.offsets, found.nodes, found.signs)))
        centres, contexts = kept.pairs()
        before = None
        if maker.by_side:
            is_after = contexts > centres
            order = np.concatenate([np.flatnonzero(~is_after), np.flatnonzero(is_after)])
            centres, contexts, before = centres[order], contexts[order], len(order) - int(is_after.sum())
        pair_rows = kept.rows[centres]
        return columns, Pairs(
            ids=torch.from_numpy(ids),
            centres=torch.from_numpy(centres),
            contexts=torch.from_numpy(contexts),
            rows=torch.from_numpy(pair_rows),
            weights=torch.from_numpy(weights[pair_rows]),
            lanes=tuple(kept.column.offsets[:: self._rows_per_lane].tolist()),
            window=maker.window,
            paths=paths,
            before=before,
        )

    def _count(self, columns: Columns, first: int, last: int) -> torch.Tensor | None:
        return None if self._tally is None else torch.from_numpy(self._tally.of(columns, first, last))

    def _jagged(
        self,
        lookups: Sequence[Lookup],
        columns: Columns,
        first: int,
        last: int,
        draws: DrawnCandidates | None,
        with_weights: bool,
    ) -> KeyedJaggedTensor | None:
        if not lookups:
            return None
        parts = [
            self._composed(lookup.key, self._part(lookup, columns, first, last, draws, with_weights)) for lookup in lookups
        ]
        weights = [part[2] for part in parts if part[2] is not None]
        return KeyedJaggedTensor(
            keys=[lookup.key for lookup in lookups],
            values=torch.from_numpy(np.concatenate([part[0] for part in parts], dtype=np.int64)),
            lengths=self._joined_lengths([part[1] for part in parts]),
            weights=torch.from_numpy(np.concatenate(weights)) if with_weights else None,
        )

    def _joined_lengths(self, parts: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
        """Returns all lengths one after another. Where each row has one id, batches share them: none writes to them."""
        ones = _ones(len(parts[0]))
        if any(part is not ones for part in parts):
            return torch.from_numpy(np.concatenate(parts, dtype=np.int64))
        count = len(parts) * len(ones)
        held = self._all_ones
        if len(held) < count:
            held = self._all_ones = torch.ones(count, dtype=torch.int64)  # another thread may put shorter ones there
        return held[:count]

    def _part(
        self,
        lookup: Lookup,
        columns: Columns,
        first: int,
        last: int,
        draws: DrawnCandidates | None,
        with_weights: bool,
    ) -> Jagged:
        size = last - first
        if lookup.is_node:
            return self._jagged_column(_NODES, columns, first, last, with_weights)
        if lookup.slot is None:
            return self._jagged_column(lookup.feature, columns, first, last, with_weights)
        if draws is None:
            return _empty(size, with_weights)
        if lookup.is_sequence:
            in_first_row: Columns = {lookup.feature: _in_first_row(draws.ids, size)}
            return self._jagged_column(lookup.feature, in_first_row, 0, size, with_weights)
        begin = min(lookup.slot * size, draws.count)
        end = min(begin + size, draws.count)
        values, lengths, weights = self._jagged_column(lookup.feature, draws.columns, begin, end, with_weights)
        return values, np.concatenate([lengths, np.zeros(size - len(lengths), dtype=np.int64)]), weights

    def _composed(self, key: str, ids: Jagged) -> Jagged:
        """Returns the two rows of each id in its place, with its weight each, where the table's ids become two rows."""
        composition = self._compositions.get(key)
        if composition is None:
            return ids
        values, lengths, weights = ids
        rows, counts = composition.rows_of(values.astype(np.int64, copy=False))
        ends = np.cumsum(np.append(0, counts))[np.cumsum(np.append(0, lengths))]
        return rows, np.diff(ends), None if weights is None else np.repeat(weights, counts)

    def _jagged_column(self, feature: str, columns: Columns, first: int, last: int, with_weights: bool) -> Jagged:
        column = columns.get(feature)
        if column is None:
            return _empty(last - first, with_weights)
        if isinstance(column, Flat):
            values = column.values[first:last]
            if not len(values) or values.min() >= 0:
                lengths = _ones(len(values))
            else:
                valid = values >= 0
                values, lengths = values[valid], valid.astype(np.int64)
            return values, lengths, np.ones(len(values), dtype=np.float32) if with_weights else None
        offsets = column.offsets[first : last + 1]
        lengths = np.diff(offsets)
        span = slice(offsets[0], offsets[-1])
        return column.values[span], lengths, self._weights(feature, column, span, lengths) if with_weights else None

    def _weights(self, feature: str, column: Ragged, span: slice, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if column.weights is not None:
            return column.weights[span]
        bag = self._config.features.get(feature)
        power = {"mean": 1.0, "sqrtn": 0.5}.get(str(getattr(bag, "pooling", None)))
        if power is not None and len(lengths):
            shares = (1.0 / np.maximum(np.arange(int(lengths.max()) + 1), 1) ** power).astype(np.float32)
            return repeated(np.take(shares, lengths), lengths, span.stop - span.start)
        return np.ones(span.stop - span.start, dtype=np.float32)

    @staticmethod
    def _stack(names: Sequence[str], columns: Columns, first: int, last: int) -> npt.NDArray[np.float32]:
        stacked = np.zeros((last - first, len(names)), dtype=np.float32)
        for place, name in enumerate(names):
            column = columns.get(name)
            if column is not None:
                stacked[:, place] = column.values[first:last]
        return stacked

    def _draws(self, draws: DrawnCandidates, columns: Columns, first: int, last: int) -> Draws:
        feature = self._config.drawn_feature()
        assert feature is not None, "the config checks that what draws items knows them"
        lists = columns.get(feature)
        if isinstance(lists, Ragged):
            own = lists.values[lists.offsets[first] : lists.offsets[last]].astype(np.int64, copy=False)
        else:
            own = _flat(columns, feature, first, last, np.int64, -1)
        own_log_q = np.where(own >= 0, draws.log_q_of_row[np.maximum(own, 0)], -np.inf).astype(np.float32)
        return Draws(
            ids=torch.from_numpy(draws.ids.copy()),
            log_q=torch.from_numpy(draws.log_q.copy()),
            own_log_q=torch.from_numpy(own_log_q),
            dense=torch.from_numpy(self._stack(self._dense, draws.columns, 0, draws.count)),
        )


def _flat(columns: Columns, name: str, first: int, last: int, dtype: type, default: float) -> npt.NDArray[Any]:
    column = columns.get(name)
    if column is None:
        return np.full(last - first, default, dtype=dtype)
    return column.values[first:last].astype(dtype, copy=True)


@lru_cache(maxsize=4)
def _ones(size: int) -> npt.NDArray[np.int64]:
    ones = np.ones(size, dtype=np.int64)
    ones.setflags(write=False)
    return ones


def _widened(columns: Columns, first: int, last: int) -> Columns:
    """Returns the rows [first, last), with their own lists alone and int64 for integers of smaller types."""
    widened: Columns = {}
    for name, column in slice_rows(columns, first, last).items():
        column = rebased(column) if isinstance(column, Ragged) else column
        is_integer = column.values.dtype.kind == "i"
        widened[name] = replace(column, values=column.values.astype(np.int64)) if is_integer else column
    return widened


def _in_first_row(values: npt.NDArray[np.int64], size: int) -> Ragged:
    """Returns a column whose first row has all of the values."""
    offsets = np.full(size + 1, len(values), dtype=np.int64)
    offsets[0] = 0
    return Ragged(values, offsets)


def _empty(size: int, with_weights: bool) -> Jagged:
    none = np.zeros(0, dtype=np.int64)
    return none, np.zeros(size, dtype=np.int64), np.zeros(0, dtype=np.float32) if with_weights else None
