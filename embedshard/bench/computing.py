"""A step's parts on one worker: the batch to the device, lookup, backward with the fused update, the dense part."""

from __future__ import annotations

__all__ = ["OWN_LOOKUP", "Touched", "bytes_of_rows", "computing_measures", "lookup_of", "take_batches", "touched_rows"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode

from embedshard.bench.machine import PlainRows, matmul, random_rows
from embedshard.bench.measure import Limit, Measure, Timer
from embedshard.config import TableSpec
from embedshard.data.batch import Batch
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.models.output import in_full
from embedshard.train.assembly import Assembly

IntArray = npt.NDArray[np.int64]

_BATCHES: Final = 8
_ITEM_BYTES: Final = {"fp32": 4, "fp16": 2}
OWN_LOOKUP: Final = "the custom model looks up in a way of its own, not by its context's lookup()"
_STATE_BYTES: Final[dict[str, Callable[[int], int]]] = {
    "sgd": lambda dim: 0,
    "rowwise_adagrad": lambda dim: 4,
    "adagrad": lambda dim: 4 * dim,
    "adam": lambda dim: 8 * dim,
}
"""Bytes of a row's optimizer state, by optimizer."""


@dataclass(frozen=True)
class Touched:
    """What a batch's lookups touch.

    Attributes:
        rows: what each id looks up, as a number among the rows of all tables; as often as it is.
        distinct: the different ones among them, ascending.
        read: bytes of `rows`.
        changed: bytes of `distinct` and of their optimizers' state, read and written.
    """

    rows: IntArray
    distinct: IntArray
    read: int
    changed: int


def touched_rows(specs: Sequence[TableSpec], ids: Mapping[str, Sequence[IntArray]]) -> Touched:
    """Returns what lookups touch.

    Args:
        specs: the tables.
        ids: by table, the rows of it that each of its features looks up.
    """
    rows, distinct = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    first = read = changed = 0
    for spec in specs:
        met = np.concatenate([np.zeros(0, np.int64), *ids.get(spec.name, ())])
        different, row = np.unique(met), bytes_of_rows(spec)
        rows.append(first + met)
        distinct.append(first + different)
        read += len(met) * row
        changed += 2 * len(different) * (row + _STATE_BYTES[spec.optimizer.kind](spec.dim))
        first += spec.num_embeddings
    return Touched(np.concatenate(rows), np.concatenate(distinct), read, changed)


def bytes_of_rows(spec: TableSpec) -> int:
    """Returns the bytes of a table's row."""
    return spec.dim * _ITEM_BYTES[spec.dtype]


def take_batches(parts: Assembly, count: int = _BATCHES) -> list[Batch]:
    """Returns this rank's first batches, on the device."""
    count = min(count, parts.num_steps)
    with parts.reader().batches(0, count) as batches:
        return [batch.to(parts.world.device) for batch in batches]


def touched(parts: Assembly, batch: Batch) -> Touched:
    """Returns what a batch's lookups touch, managed ids as the rows that they have."""
    if parts.managed is not None:
        batch = parts.managed.to_rows(batch, is_training=False)
    ids: dict[str, list[IntArray]] = {}
    for spec in parts.specs:
        jagged = batch.sequences if spec.is_sequence else batch.weighted if spec.weighted else batch.sparse
        if jagged is not None:
            ids[spec.name] = [jagged[lookup.key].values().cpu().numpy() for lookup in spec.lookups]
    return touched_rows(parts.specs, ids)


def computing_measures(parts: Assembly, timer: Timer) -> Iterator[Measure]:
    """Measures a step's parts in a world of one."""
    device, batches, lookup = parts.world.device, take_batches(parts), lookup_of(parts.model)
    yield _copied(batches[0], timer, device)
    if lookup is None:
        for name in ("lookup", "backward, fused update", "dense forward, backward"):
            yield Measure(name, f"{batches[0].size:,} samples", not_applicable=OWN_LOOKUP)
        return
    found = [touched(parts, batch) for batch in batches]
    looked_up = _mean([len(one.rows) for one in found])
    row_bytes = _mean([one.read for one in found]) / max(looked_up, 1)
    num_rows = sum(spec.num_embeddings for spec in parts.specs)
    yield random_rows(timer, round(looked_up), row_bytes, num_rows, device)
    read = PlainRows(_tensors_of(one.rows for one in found), row_bytes, num_rows, device)
    yield _looked_up(parts, lookup, batches, found, read, timer)
    changed = PlainRows(_tensors_of(one.distinct for one in found), row_bytes, num_rows, device)
    yield _updated(parts, lookup, batches, found, changed, timer)
    yield _dense(parts, lookup, batches[0], timer)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tensors_of(rows: Iterable[IntArray]) -> list[torch.Tensor]:
    return [torch.from_numpy(one) for one in rows]


def _looked_up(
    parts: Assembly,
    lookup: EmbeddingLookup,
    batches: Sequence[Batch],
    found: Sequence[Touched],
    plain: PlainRows,
    timer: Timer,
) -> Measure:
    turn = cycle(batches)

    def look_up() -> None:
        with torch.no_grad():
            lookup(next(turn))

    own, limit = timer.in_turns([(look_up, None), (plain.read, None)])
    rows, distinct = (_mean([len(one) for one in many]) for many in zip(*((f.rows, f.distinct) for f in found), strict=True))
    size = sum(spec.num_embeddings * bytes_of_rows(spec) for spec in parts.specs)
    return Measure(
        "lookup",
        f"{rows:,.0f} rows of {len(parts.specs)} tables, {size / 2**20:,.0f} MiB, for {batches[0].size:,} samples",
        "B",
        _mean([one.read for one in found]),
        own,
        Limit("the same rows of a plain tensor", plain.work, limit),
        timer.peak_bytes,
        note=f"{distinct / max(rows, 1):.0%} of the rows are different; with the model's telling apart of features",
    )


def lookup_of(model: torch.nn.Module) -> EmbeddingLookup | None:
    """Returns the part of a model that looks up; None of a custom one that does so in another way."""
    return next((module for module in model.modules() if isinstance(module, EmbeddingLookup)), None)


def _copied(batch: Batch, timer: Timer, device: torch.device) -> Measure:
    name, what = "host to device", f"a batch of {batch.size:,} samples"
    if device.type == "cpu":
        return Measure(name, what, not_applicable="there is no device beside the host: batches are used where they are made")
    host = batch.to(torch.device("cpu")).pin_memory()  # as the reader makes them
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(host))
    raw = torch.empty(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    own, limit = timer.in_turns(
        [(lambda: host.to(device, non_blocking=True), None), (lambda: target.copy_(raw, non_blocking=True), None)]
    )
    return Measure(name, what, "B", size, own, Limit("pinned copy", size, limit), timer.peak_bytes)


def _tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for ids in (batch.sparse, batch.weighted, batch.sequences):
        if ids is not None:
            yield from (ids.values(), ids.lengths())
            if ids.weights_or_none() is not None:
                yield ids.weights()
    yield from (batch.dense, batch.labels, batch.weights, *batch.ids.values())


def _updated(
    parts: Assembly,
    lookup: EmbeddingLookup,
    batches: Sequence[Batch],
    found: Sequence[Touched],
    plain: PlainRows,
    timer: Timer,
) -> Measure:
    turn = cycle(batches)

    def look_up() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parts.optimizers.zero_grad()
        vectors = [vector for vector in lookup(next(turn)).values() if vector.requires_grad]
        return vectors, [torch.full_like(vector, 1e-6) for vector in vectors]

    def update(given: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        torch.autograd.backward(given[0], given[1])

    own, limit = timer.in_turns([(update, look_up), (plain.add, None)])
    kinds = " and ".join(sorted({spec.optimizer.kind for spec in parts.specs}))
    replicated = [name for name, table in parts.plan.tables.items() if table.is_replicated]
    note = "bytes of the rows that change and of their optimizer's state, read and written"
    if replicated:
        note += f"; {len(replicated)} tables are data-parallel: theirs is the dense optimizer's step, which is not in it"
    return Measure(
        "backward, fused update",
        f"{_mean([len(one.distinct) for one in found]):,.0f} different rows, {kinds}",
        "B",
        _mean([one.changed for one in found]),
        own,
        Limit("the same rows of a plain tensor, added to", 2 * plain.work, limit),
        timer.peak_bytes,
        note=note,
    )


def _dense(parts: Assembly, lookup: EmbeddingLookup, batch: Batch, timer: Timer) -> Measure:
    """Measures the model beyond its tables and the objective, forward and backward, from vectors that were looked up."""
    name, device, precision = "dense forward, backward", parts.world.device, parts.config.train.precision
    with torch.no_grad():
        vectors = {key: vector.detach().clone() for key, vector in lookup(batch).items()}

    def step(_: object = None) -> None:
        given = {key: vector.requires_grad_() for key, vector in vectors.items()}
        with _instead(lookup, given), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = in_full(parts.model(batch))
        losses = parts.objective(output, batch)
        weights = getattr(output, "weights", batch.weights)
        loss = torch.where(weights > 0, losses * weights, 0.0).sum() / weights.sum().clamp(min=1e-6)
        torch.autograd.backward(loss)

    def ready() -> None:
        parts.optimizers.zero_grad()
        for vector in vectors.values():
            vector.grad = None

    ready()
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    what = f"{batch.size:,} samples, {flops / max(batch.size, 1):,.0f} floating-point operations each"
    if not flops:
        own = timer.alone(step, ready)
        note = "it multiplies no matrices, so a product of matrices is no limit"
        return Measure(name, f"{batch.size:,} samples", "samples", batch.size, own, peak_bytes=timer.peak_bytes, note=note)
    product = matmul(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    own, limit = timer.in_turns([(step, ready), (product, None)])
    note = f"operations of matrix products alone, {precision}; with the objective, without the optimizer"
    return Measure(name, what, "FLOP", flops, own, Limit("matrix product", product.work, limit), timer.peak_bytes, note)


@contextmanager
def _instead(lookup: EmbeddingLookup, vectors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Makes a lookup give vectors that are there already."""
    lookup.forward = lambda batch: dict(vectors)  # type: ignore[method-assign]  # of this one alone, for a while
    try:
        yield
    finally:
        del lookup.forward
