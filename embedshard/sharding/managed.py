"""Tables whose ids come and go: raw ids to rows, before any lookup, the same in every world.

TorchRec remaps ids inside its sharded lookup, each rank with a capacity and a row for misses of its own, so that another
world is another model; and only row-wise, in one kind of collection. Here the ids of a batch travel to the rank that has
their virtual bucket (`slots.py`), and their rows come back: whatever the plan, any table that takes rows is then looked up
as any other. Each rank's buckets of a table are one `ManagedRows`, behind the interface of TorchRec's managed collision
modules. What TorchRec's eviction lacks on a CPU, and skips of optimizers' state anywhere, is done here: a row that is taken
from its id begins anew, weights and state, on every rank that has a piece of it.
"""

from __future__ import annotations

__all__ = ["ManagedRows", "ManagedTables", "VocabularyCounts"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec.modules.mc_modules import ManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embedshard.config import TableSpec
from embedshard.config.parts import ManagedVocabulary
from embedshard.data.batch import Batch
from embedshard.data.vocabulary import UNKNOWN_ID
from embedshard.models.embeddings import EmbeddingLookup
from embedshard.sharding.initialise import scattered_rows
from embedshard.sharding.shards import Shard
from embedshard.sharding.slots import FREE, Slots, bucket_bounds
from embedshard.world import World

IntArray = npt.NDArray[np.int64]


@dataclass
class VocabularyCounts:
    """What became of a table's ids since it was last asked, on all ranks.

    Attributes:
        lookups: ids that were looked up in training.
        unknown: of them, those that had no row.
        admitted: ids that were given a row.
        evicted: ids that lost theirs.
        used: rows that hold an id now.
    """

    lookups: int = 0
    unknown: int = 0
    admitted: int = 0
    evicted: int = 0
    used: int = 0


class ManagedRows(ManagedCollisionModule):
    """A run of buckets of one table.

    Its state are buffers, cut by row or bucket: `ids`, `counts`, `last_steps` of each row, `sightings`, `sighted` of each
    bucket's ids without a row.

    Args:
        vocabulary: the table's.
        rows: of the whole table.
        buckets: of the whole table.
        first: bucket that is here.
        last: after the last bucket that is here.
    """

    def __init__(self, vocabulary: ManagedVocabulary, rows: int, buckets: int, first: int, last: int) -> None:
        super().__init__(torch.device("cpu"), [0, rows], skip_state_validation=False)
        self._vocabulary, self._rows, self._num_buckets = vocabulary, rows, buckets
        self.slots = Slots(
            rows=rows,
            buckets=buckets,
            first=first,
            last=last,
            min_count=vocabulary.admission.min_count,
            eviction=vocabulary.eviction,
            ttl_steps=vocabulary.ttl_steps,
            seed=vocabulary.seed,
        )
        for name in ("ids", "counts", "last_steps", "sightings", "sighted"):
            self.register_buffer(name, torch.from_numpy(getattr(self.slots, name)))  # one memory
        self.step = 0
        self.admitted = 0
        self._evicted: list[IntArray] = []

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Returns the ids as they are: the data floor has made them numbers of at least 0."""
        return features

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Counts the ids of a training step, different ones with their sightings as weights; gives and takes rows.

        Returns the rows in place of the ids.
        """
        found = {}
        for name, jagged in features.items():
            met = self.slots.meet(jagged.values().numpy(), jagged.weights().numpy().astype(np.int64), self.step)
            self.admitted += met.admitted
            self._evicted.append(met.evicted)
            found[name] = JaggedTensor(values=torch.from_numpy(met.rows), lengths=jagged.lengths())
        return found

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: torch.Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """Returns the rows in place of ids, and changes nothing. An id without a row has the row for unknown ids."""
        return {
            name: JaggedTensor(
                values=torch.from_numpy(self.slots.find(jagged.values().numpy(), self.step)), lengths=jagged.lengths()
            )
            for name, jagged in features.items()
        }

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        """Returns the rows in place of ids: `profile` in training, else `remap`."""
        return self.profile(features) if self.training else self.remap(features, mutate_miss_lengths)

    def evict(self) -> torch.Tensor | None:
        """Returns the rows that were taken from their ids since it was last called, ascending; None if there are none."""
        evicted = np.unique(np.concatenate(self._evicted)) if self._evicted else np.zeros(0, dtype=np.int64)
        self._evicted = []
        return torch.from_numpy(evicted) if len(evicted) else None

    def output_size(self) -> int:
        """Rows of the whole table, that for unknown ids included."""
        return self._rows + 1

    def input_size(self) -> int:
        """What ids are below."""
        return UNKNOWN_ID

    def buckets(self) -> int:
        """Buckets of the whole table."""
        return self._num_buckets

    def open_slots(self) -> torch.Tensor:
        """Returns how many rows that are here hold no id, (1,)."""
        return torch.tensor([len(self.slots.ids) - int(self.slots.num_used().sum())])

    def validate_state(self) -> None:
        """Makes what is derived from the state anew, after it was loaded.

        Raises:
            ValueError: if an id holds two rows, or lies in a bucket that is not its own.
        """
        slots = self.slots
        used = np.flatnonzero(slots.ids != FREE)
        if len(np.unique(slots.ids[used])) < len(used):
            raise ValueError("an id holds two rows")
        own = bucket_bounds(self._rows, self._num_buckets)
        if (np.searchsorted(own, used + slots.first_row, side="right") - 1 != slots.bucket_of(slots.ids[used])).any():
            raise ValueError("an id lies in a bucket that is not its own")
        slots.load()

    def rebuild_with_output_id_range(
        self, output_id_range: tuple[int, int], output_segments: list[int], device: torch.device | None = None
    ) -> ManagedRows:
        """Returns an empty one of the buckets whose rows these are."""
        bounds = bucket_bounds(self._rows, self._num_buckets).tolist()
        first, last = (bounds.index(row) for row in output_id_range)
        return ManagedRows(self._vocabulary, self._rows, self._num_buckets, first, last)


class ManagedTables:
    """All managed tables of a model.

    Args:
        specs: all its tables.
        vocabularies: of those that are managed, by the config's table.
        buckets: of each of them.
        world: whose ranks share the buckets.
        seed: of the rows' first values.

    Attributes:
        by_table: this rank's rows of each table.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        vocabularies: Mapping[str, ManagedVocabulary],
        buckets: Mapping[str, int],
        world: World,
        seed: int,
    ) -> None:
        self._world, self._seed = world, seed
        self._specs = {spec.name: spec for spec in specs if spec.managed_by is not None}
        self._table_of_key = {
            lookup.key: spec.managed_by for spec in specs if spec.managed_by is not None for lookup in spec.lookups
        }
        self.by_table: dict[str, ManagedRows] = {}
        self._bounds: dict[str, IntArray] = {}
        self._counts = {table: VocabularyCounts() for table in vocabularies}
        for table, vocabulary in vocabularies.items():
            rows = next(spec.rows for spec in specs if spec.name == table)
            bounds = np.arange(world.world_size + 1, dtype=np.int64) * buckets[table] // world.world_size
            self._bounds[table] = bounds
            first, last = int(bounds[world.rank]), int(bounds[world.rank + 1])
            self.by_table[table] = ManagedRows(vocabulary, rows, buckets[table], first, last)
        self._shards: Callable[[], Iterator[Shard]] | None = None
        self._own_shards: list[Shard] = []
        self._met_step = -1

    def attach(self, model: nn.Module, shards: Callable[[], Iterator[Shard]]) -> None:
        """Has a sharded model's lookups be given rows instead of ids.

        Args:
            model: sharded.
            shards: gives this rank's pieces of weights and optimizers' state.
        """
        self._shards = shards
        for module in model.modules():
            if isinstance(module, EmbeddingLookup):
                module.to_rows = self.to_rows

    def to_rows(self, batch: Batch, is_training: bool) -> Batch:
        """Returns a batch with rows in place of ids. Collective.

        In training, where the batch has a position, ids are counted, admitted and evicted before.
        """
        step = batch.position.step if is_training and batch.position is not None else None
        if step is not None and step == self._met_step:
            step = None  # a model that looks a batch up twice meets its ids once
        self._met_step = self._met_step if step is None else step
        parts = {"sparse": batch.sparse, "weighted": batch.weighted, "sequences": batch.sequences}
        values = {name: None if part is None else part.values().clone() for name, part in parts.items()}
        for table, rows in self.by_table.items():
            spans = [
                (values[name], span)
                for name, part in parts.items()
                if part is not None
                for key, span in _spans(part)
                if self._table_of_key.get(key) == table
            ]
            ids = torch.cat([tensor[span] for tensor, span in spans if tensor is not None]).cpu().numpy()
            found = torch.from_numpy(self._rows_of(table, rows, ids, step))
            at = 0
            for tensor, span in spans:
                assert tensor is not None, "spans are of what is there"
                size = span.stop - span.start
                tensor[span] = found[at : at + size].to(tensor.device)
                at += size
            if step is not None:
                self._begin_anew(table, rows)
        changed = {name: _with_values(part, values[name]) for name, part in parts.items()}
        return replace(batch, **changed)

    def take_counts(self) -> dict[str, VocabularyCounts]:
        """Returns what became of each table's ids since it was last called. Collective."""
        taken = {}
        for table, rows in self.by_table.items():
            counts = self._counts[table]
            counts.admitted, rows.admitted = rows.admitted, 0
            counts.used = int(rows.slots.num_used().sum())
            numbers = [counts.lookups, counts.unknown, counts.admitted, counts.evicted, counts.used]
            total = self._world.sum(torch.tensor(numbers, dtype=torch.int64)).tolist()
            taken[table] = VocabularyCounts(*(int(number) for number in total))
            self._counts[table] = VocabularyCounts()
        return taken

    def described(self) -> dict[str, Any]:
        """Returns, by table, its rows, how many hold an id, and the same of each bucket, as JSON. Collective."""
        found = {}
        for table, rows in self.by_table.items():
            used = [one for of_rank in self._world.gather_objects(rows.slots.num_used().tolist()) for one in of_rank]
            sizes = np.diff(bucket_bounds(rows.slots.rows, rows.slots.buckets)).tolist()
            buckets = [list(pair) for pair in zip(used, sizes, strict=True)]
            found[table] = {"rows": rows.slots.rows, "used": sum(used), "buckets": buckets}
        return found

    def state(self) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
        """Yields this rank's part of the state, live: (name, block, offset, shape of the whole). Not collective."""
        for table, rows in self.by_table.items():
            slots = rows.slots
            for name in ("ids", "counts", "last_steps"):
                yield f"{table}/{name}", rows.get_buffer(name), (slots.first_row,), (slots.rows,)
            sightings = rows.get_buffer("sightings")
            yield f"{table}/sightings", sightings, (slots.first, 0, 0), (slots.buckets, *sightings.shape[1:])
            yield f"{table}/sighted", rows.get_buffer("sighted"), (slots.first,), (slots.buckets,)

    def loaded(self, step: int) -> None:
        """Has the tables go on from the state that was loaded into them, after so many steps."""
        for rows in self.by_table.values():
            rows.validate_state()
            rows.step = max(step - 1, 0)

    def count_steps_anew(self) -> None:
        """Has the next step be number 0, for a run that goes on where another one ended."""
        for rows in self.by_table.values():
            slots = rows.slots
            slots.last_steps[slots.ids != FREE] -= rows.step + 1
            rows.step = 0

    # ------------------------------------------------------------------------------------------------------- the ranks
    def _rows_of(self, table: str, rows: ManagedRows, ids: IntArray, step: int | None) -> IntArray:
        """Returns the row of each of this rank's ids. Collective."""
        distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        is_known = distinct != UNKNOWN_ID
        found = np.full(len(distinct), rows.slots.rows, dtype=np.int64)
        asked, sightings = distinct[is_known], counts[is_known]
        owner = np.searchsorted(self._bounds[table], rows.slots.bucket_of(asked), side="right") - 1
        order = np.argsort(owner, kind="stable")
        sizes = np.bincount(owner, minlength=self._world.world_size)
        sent = torch.from_numpy(np.stack([asked[order], sightings[order]], axis=1))
        received, received_sizes = self._world.exchange(sent, sizes.tolist())
        answers = self._answer(table, rows, received.numpy(), step)
        back, _ = self._world.exchange(torch.from_numpy(answers), received_sizes)
        of_asked = np.empty(len(asked), dtype=np.int64)
        of_asked[order] = back.numpy()
        found[is_known] = of_asked
        if step is not None:
            self._counts[table].lookups += len(ids)
            self._counts[table].unknown += int(counts[found == rows.slots.rows].sum())
        return found[inverse]

    def _answer(self, table: str, rows: ManagedRows, received: IntArray, step: int | None) -> IntArray:
        """Returns the row of each id that was sent here."""
        if step is not None:
            rows.step = step
        ids, inverse = np.unique(received[:, 0], return_inverse=True)
        counts = np.bincount(inverse, weights=received[:, 1], minlength=len(ids))
        jagged = JaggedTensor(
            values=torch.from_numpy(ids), lengths=torch.tensor([len(ids)]), weights=torch.from_numpy(counts)
        )
        rows.train(step is not None)
        found: IntArray = rows({table: jagged})[table].values().numpy()
        return found[inverse]

    def _begin_anew(self, table: str, rows: ManagedRows) -> None:
        """Gives all rows that were taken from their ids their first values and empty optimizer state. Collective."""
        evicted = rows.evict()
        mine = torch.zeros(0, dtype=torch.int64) if evicted is None else evicted
        if not int(self._world.sum(torch.tensor([len(mine)])).item()):
            return
        self._counts[table].evicted += len(mine)
        everywhere = [mine] * self._world.world_size
        sizes = [len(mine)] * self._world.world_size
        lost, _ = self._world.exchange(torch.cat(everywhere), sizes)
        assert self._shards is not None, "attached before the first step"
        if not self._own_shards:  # live views, the same for as long as the model lasts
            self._own_shards = list(self._shards())
        for shard in self._own_shards:
            spec = self._specs.get(shard.table)
            if spec is not None and spec.managed_by == table:
                _begin_anew(shard, spec, lost.numpy(), self._seed)


def _begin_anew(shard: Shard, spec: TableSpec, lost: IntArray, seed: int) -> None:
    first = shard.offset[0]
    here = lost[(lost >= first) & (lost < first + len(shard.tensor))]
    if not len(here):
        return
    at = torch.from_numpy(here - first).to(shard.tensor.device)
    with torch.no_grad():
        if shard.kind != "weight":
            shard.tensor.index_fill_(0, at, 0.0)
            return
        columns = slice(shard.offset[1], shard.offset[1] + shard.tensor.shape[1])
        values = torch.from_numpy(np.ascontiguousarray(scattered_rows(seed, spec, here)[:, columns]))
        shard.tensor.index_copy_(0, at, values.to(shard.tensor.device, shard.tensor.dtype))


def _spans(ids: KeyedJaggedTensor) -> Iterator[tuple[str, slice]]:
    offsets = ids.offset_per_key()
    for key, begin, end in zip(ids.keys(), offsets, offsets[1:], strict=False):
        yield key, slice(begin, end)


def _with_values(ids: KeyedJaggedTensor | None, values: torch.Tensor | None) -> Any:
    if ids is None or values is None:
        return None
    return KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=ids.lengths(), weights=ids.weights_or_none())
