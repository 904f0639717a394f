"""What crosses from the data floor to the model: one rank's part of a step, as tensors."""

from __future__ import annotations

__all__ = ["Batch", "Draws", "Pairs", "Paths", "on_device"]

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embedshard.data.order import Position

Move = Callable[[Any], Any]
"""From a tensor or a KeyedJaggedTensor to the same elsewhere."""


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device, itself where it is there. Unlike torch's `to`, it does not wait for what CUDA is at."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _pinned(part: Any) -> Any:
    return (part.sync() if isinstance(part, KeyedJaggedTensor) else part).pin_memory()


@dataclass
class Draws:
    """This rank's share of the candidates drawn for a step, the same for all rows of the global batch.

    The shares of all ranks, in rank order, are what a single process would draw. Their ids travel in the batch's
    KeyedJaggedTensors, under the keys of slots, from the first place on.

    Attributes:
        ids: rows of the item's table, (n,) int64.
        log_q: natural log of the probability with which one draw gives this candidate, (n,) float32; infinite for one
            that stands for none.
        own_log_q: the same of each row's own item, (B,) float32, or of each id of the rows' lists where they are drawn
            from, (I,); -inf where it is no candidate.
        dense: the candidates' dense features, (n, F) float32, in config order.
    """

    ids: torch.Tensor
    log_q: torch.Tensor
    own_log_q: torch.Tensor
    dense: torch.Tensor

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.log_q, self.own_log_q, self.dense

    def moved(self, move: Move) -> Draws:
        """Returns what a function makes of each tensor."""
        return Draws(*map(move, self._tensors()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors' memory until the stream is done with it."""
        for tensor in self._tensors():
            tensor.record_stream(stream)


@dataclass
class Paths:
    """The way from the root of a tree to each id of a batch's lists.

    The nodes on these ways, each once, travel in the batch's KeyedJaggedTensors, in the first row.

    Attributes:
        offsets: where each id's way begins in `nodes` and `signs`, and where the last one ends, (I + 1,) int64.
        nodes: places among the nodes that travel, from the root on, (E,) int64.
        signs: 1 where the way goes left, -1 where it goes right, (E,) float32.
    """

    offsets: torch.Tensor
    nodes: torch.Tensor
    signs: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns its tensors, in the order in which they are given."""
        return self.offsets, self.nodes, self.signs


@dataclass
class Pairs:
    """Pairs of a centre and a context of the rows' lists, by centre; where contexts go by side, those before centres first.

    The ids of the lists, each once, travel in the batch's KeyedJaggedTensors, in the first row.

    Attributes:
        ids: of each place of the concatenated lists, which of the ids that travel it holds, (V,) int64.
        centres: places in the concatenated lists, (P,) int64.
        contexts: the same of the contexts, (P,) int64.
        rows: the place of each pair's row in the batch, (P,) int64.
        weights: of each pair, (P,) float32: its row's.
        lanes: where the places of each of this rank's lanes begin, and V.
        window: how far a context may be from its centre.
        paths: to the contexts, where the objective goes down a tree.
        before: how many pairs have their context before their centre, where contexts go by side; None where they do not.
    """

    ids: torch.Tensor
    centres: torch.Tensor
    contexts: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    lanes: tuple[int, ...]
    window: int
    paths: Paths | None = None
    before: int | None = None

    @property
    def sides(self) -> tuple[slice, ...]:
        """Which pairs are on each side; one side has all where contexts do not go by side."""
        return (slice(None),) if self.before is None else (slice(self.before), slice(self.before, None))

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.centres, self.contexts, self.rows, self.weights

    def moved(self, move: Move) -> Pairs:
        """Returns what a function makes of each tensor."""
        paths = None if self.paths is None else Paths(*map(move, self.paths.tensors()))
        ids, centres, contexts, rows, weights = map(move, self._tensors())
        return Pairs(ids, centres, contexts, rows, weights, self.lanes, self.window, paths, self.before)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors' memory until the stream is done with it."""
        for tensor in (*self._tensors(), *(() if self.paths is None else self.paths.tensors())):
            tensor.record_stream(stream)


@dataclass
class Batch(Pipelineable):
    """One rank's rows of one step.

    A place without a row (padding, only in the last step of an epoch) has weight 0, row number -1 and empty features. A row
    that is set aside has weight 0 and empty features.

    Attributes:
        sparse: ids of the features over unweighted tables; None if there are none.
        weighted: ids and weights of the features over weighted tables; None if there are none.
        sequences: ids of the features over tables that are looked up place by place, with the weights by which those of
            them are pooled that are no sequences; None if there are none.
        dense: (B, F) float32, dense features in config order.
        labels: (B, L) float32, labels in config order.
        weights: (B,) float32, at least 0.
        ids: rows of tables, (B,) int64 each, -1 where absent, of the features that name the user and the item.
        rows: row numbers in the partition, (B,) int64; -1 for padding. Stays on the CPU.
        draws: candidates drawn for the step, if the objective asks for them.
        position: where the step is in the data; None outside training.
        bad: (B,) int16, 0 or the code of what is wrong with a row that is set aside; None where none can be. Stays on the
            CPU.
        tally: what was counted in the rows, (n,) int64, as `Tally` names it; None outside training. Stays on the CPU.
        pairs: of the rows' lists, if the model learns from them; None outside training.
        is_full: whether each place is known to have a row, and each row a weight of 1.
    """

    sparse: KeyedJaggedTensor | None
    weighted: KeyedJaggedTensor | None
    dense: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    ids: dict[str, torch.Tensor]
    rows: torch.Tensor
    draws: Draws | None = None
    position: Position | None = None
    bad: torch.Tensor | None = None
    tally: torch.Tensor | None = None
    sequences: KeyedJaggedTensor | None = None
    pairs: Pairs | None = None
    is_full: bool = False

    @property
    def training_position(self) -> Position:
        """Where the step is in the data; only batches of the training data know."""
        assert self.position is not None, "batches of the training data know where they are"
        return self.position

    @property
    def size(self) -> int:
        """Places, padding included."""
        return len(self.rows)

    def sequence_lengths(self, name: str) -> torch.Tensor:
        """Returns how many ids each row has of a feature of `sequences`, (B,)."""
        assert self.sequences is not None, "the collator fills what sequences are looked up by"
        names = self.sequences.keys()
        return self.sequences.lengths().view(len(names), -1)[names.index(name)]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Returns a copy on a device; itself where it is there already."""
        if self.weights.device == device:
            return self
        return self.moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns a copy that a CUDA device can fetch while other work goes on.

        How many ids each key has is counted before, as TorchRec else asks the device for it, and waits for the copy.
        """
        return replace(self.moved(_pinned), rows=self.rows.pin_memory())

    def moved(self, move: Move) -> Batch:
        """Returns what a function makes of each tensor and KeyedJaggedTensor, but for those that stay on the CPU."""
        return replace(
            self,
            sparse=None if self.sparse is None else move(self.sparse),
            weighted=None if self.weighted is None else move(self.weighted),
            sequences=None if self.sequences is None else move(self.sequences),
            dense=move(self.dense),
            labels=move(self.labels),
            weights=move(self.weights),
            ids={name: move(ids) for name, ids in self.ids.items()},
            draws=None if self.draws is None else self.draws.moved(move),
            pairs=None if self.pairs is None else self.pairs.moved(move),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors' memory until the stream is done with it."""
        for part in (self.sparse, self.weighted, self.sequences, self.draws, self.pairs):
            if part is not None:
                part.record_stream(stream)
        for tensor in (self.dense, self.labels, self.weights, *self.ids.values()):
            tensor.record_stream(stream)
