"""Which id holds which row of a managed table: admission, eviction and the search for ids, as arrays of numbers.

A table's rows are cut into virtual buckets, and an id belongs to the bucket that its hash names. Each bucket has its own
rows, counts and evictions, and lies whole on one rank: so what happens to an id depends on the ids of its bucket and on the
step, and on no world size. Nothing here knows ranks, torch or tables; `managed.py` brings the ids of all ranks here.

An id without a row is counted in a count-min sketch (Cormode and Muthukrishnan 2005), which never counts too few; its counts
are halved now and then, so that a stream without an end does not fill it (TinyLFU: Einziger et al. 2017).
"""

from __future__ import annotations

__all__ = ["FREE", "Eviction", "Met", "Slots", "bucket_bounds", "sketch_width"]

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from embedshard.data.hashing import WordArray, hash_integers

IntArray = npt.NDArray[np.int64]
Eviction = Literal["lfu", "lru", "distance_lfu"]

FREE: Final = -1
"""What stands in the place of an id where a row has none."""

SKETCH_DEPTH: Final = 2
_MOST_SIGHTINGS = 2**15 - 1
_SIGHTINGS_PER_COUNTER = 8
_EVICTED_AT_ONCE = 64  # a full bucket gives up a 64th of its rows, so that it need not look for the least useful each step
_EMPTY, _DELETED = -1, -2


def bucket_bounds(rows: int, buckets: int) -> IntArray:
    """Returns where each bucket's rows begin, and where the last one's end, (buckets + 1,)."""
    return np.arange(buckets + 1, dtype=np.int64) * rows // buckets


def sketch_width(rows: int, buckets: int) -> int:
    """Returns how many counters a line of a bucket's sketch has: a power of two, at least twice its rows."""
    return max(64, 1 << (2 * -(-rows // buckets) - 1).bit_length())


@dataclass(frozen=True)
class Met:
    """What became of the ids of a step.

    Attributes:
        rows: of each id, in the table; the row for unknown ids where it has none.
        evicted: rows that were taken from their ids, ascending. They are free or hold another id now.
        admitted: how many ids were given a row.
    """

    rows: IntArray
    evicted: IntArray
    admitted: int


class Slots:
    """The rows of a run of buckets.

    Args:
        rows: of the whole table; row `rows` is for unknown ids.
        buckets: of the whole table.
        first: bucket that is here.
        last: after the last bucket that is here.
        min_count: sightings at which an id is given a row.
        eviction: what makes an id the least useful of a full bucket: the fewest sightings (`lfu`), the longest time unseen
            (`lru`), or the fewest sightings a step since it was seen last (`distance_lfu`).
        ttl_steps: steps without a sighting after which an id has lost its row; None never.
        seed: of the hash.

    Attributes:
        ids: of each row that is here, (R,) int64; FREE where it has none.
        counts: sightings of each, (R,) int64.
        last_steps: when each was seen last, (R,) int64.
        sightings: sketch of ids without a row, (buckets here, 2, width) int16.
        sighted: what was added to each sketch since it was halved, (buckets here,) int64.
    """

    def __init__(
        self,
        rows: int,
        buckets: int,
        first: int,
        last: int,
        min_count: int,
        eviction: Eviction,
        ttl_steps: int | None,
        seed: int,
    ) -> None:
        self.rows, self.buckets, self.first, self.last = rows, buckets, first, last
        self._min_count, self._eviction, self._ttl_steps, self._seed = min_count, eviction, ttl_steps, seed
        bounds = bucket_bounds(rows, buckets)[first : last + 1]
        self.first_row = int(bounds[0])
        self._bounds = bounds - self.first_row
        size = int(self._bounds[-1])
        self.ids: IntArray = np.full(size, FREE, dtype=np.int64)
        self.counts: IntArray = np.zeros(size, dtype=np.int64)
        self.last_steps: IntArray = np.zeros(size, dtype=np.int64)
        width = sketch_width(rows, buckets)
        self.sightings: npt.NDArray[np.int16] = np.zeros((last - first, SKETCH_DEPTH, width), dtype=np.int16)
        self.sighted: IntArray = np.zeros(last - first, dtype=np.int64)
        self.load()

    def load(self) -> None:
        """Makes what is found from the state anew, after the state was filled."""
        free = self.ids == FREE
        used = np.flatnonzero(~free)
        self._index = np.full(max(8, 1 << (2 * len(self.ids)).bit_length()), _EMPTY, dtype=np.int64)
        self._deleted = 0
        self._free = [
            np.flatnonzero(free[begin:end])[::-1] + begin for begin, end in zip(self._bounds, self._bounds[1:], strict=False)
        ]
        self._enter(self._hashes(self.ids[used]), used)

    def num_used(self) -> IntArray:
        """Returns how many rows of each bucket hold an id, (buckets here,)."""
        return np.diff(self._bounds) - np.array([len(free) for free in self._free], dtype=np.int64)

    def find(self, ids: IntArray, step: int) -> IntArray:
        """Returns the row of each id, (n,), and changes nothing. It may be called for ids of any bucket that is here."""
        slots = self._find(ids, self._hashes(ids))
        if self._ttl_steps is not None:
            slots = np.where(self._is_expired(slots, step), _EMPTY, slots)
        return np.where(slots >= 0, slots + self.first_row, self.rows)

    def meet(self, ids: IntArray, counts: IntArray, step: int) -> Met:
        """Counts the ids of a step, gives and takes rows, and returns them.

        Args:
            ids: different ones, of buckets that are here.
            counts: sightings of each.
            step: that is trained.
        """
        hashes = self._hashes(ids)
        slots = self._find(ids, hashes)
        evicted: list[IntArray] = []
        if self._ttl_steps is not None:
            expired = np.flatnonzero(self._is_expired(slots, step))
            if len(expired):
                evicted.append(self._evict(np.sort(slots[expired])))
                slots[expired] = _EMPTY
        known = slots >= 0
        self.counts[slots[known]] += counts[known]
        self.last_steps[slots[known]] = step
        unknown = np.flatnonzero(~known)
        totals = counts[unknown]
        if self._min_count > 1:
            totals = self._sight(hashes[unknown], totals)
            is_admitted = totals >= self._min_count
            unknown, totals = unknown[is_admitted], totals[is_admitted]
        admitted = 0
        if len(unknown):
            buckets = self._local_bucket(hashes[unknown])
            order = np.lexsort((ids[unknown], hashes[unknown], -totals, buckets))
            unknown, totals, buckets = unknown[order], totals[order], buckets[order]
            met, needed = np.unique(buckets, return_counts=True)
            is_full = needed > np.array([len(self._free[bucket]) for bucket in met.tolist()])
            if is_full.any():
                evicted.append(self._make_room(met[is_full], needed[is_full], step))
            given = np.full(len(unknown), _EMPTY, dtype=np.int64)
            for bucket, begin, count in zip(
                met.tolist(), (np.cumsum(needed) - needed).tolist(), needed.tolist(), strict=True
            ):
                free = self._free[bucket]
                left = max(len(free) - count, 0)
                given[begin : begin + len(free) - left] = free[left:][::-1]
                self._free[bucket] = free[:left]
            has_row = given >= 0
            at, new = unknown[has_row], given[has_row]
            self.ids[new], self.counts[new], self.last_steps[new] = ids[at], totals[has_row], step
            self._enter(hashes[at], new)
            slots[at] = new
            admitted = len(new)
        if self._deleted > len(self._index) // 4:
            self.load()
        rows = np.where(slots >= 0, slots + self.first_row, self.rows)
        lost = np.unique(np.concatenate(evicted)) if evicted else np.zeros(0, dtype=np.int64)
        return Met(rows, lost + self.first_row, admitted)

    def bucket_of(self, ids: IntArray) -> IntArray:
        """Returns the bucket of each id, among those of the whole table."""
        return self._bucket(self._hashes(ids))

    def take_over(self, former: Slots, step: int) -> tuple[IntArray, IntArray]:
        """Gives rows to the ids of another size of the same table, the most useful of a bucket first. All buckets are here.

        Args:
            former: has the ids.
            step: after the last one.

        Returns:
            The rows that ids held, and those that they hold now.
        """
        assert (self.first, self.last) == (0, self.buckets), "all buckets are here"
        slots = np.flatnonzero(former.ids != FREE)
        buckets = former.bucket_of(former.ids[slots])
        order = former._least_useful_first(slots, buckets, step)
        slots, buckets = slots[order], buckets[order]
        sizes = np.bincount(buckets, minlength=self.buckets)
        place = sizes[buckets] - 1 - _places_in_groups(sizes)  # the most useful is the first
        has_row = place < np.diff(self._bounds)[buckets]
        taken, rows = slots[has_row], (self._bounds[buckets] + place)[has_row]
        for name in ("ids", "counts", "last_steps"):
            getattr(self, name)[rows] = getattr(former, name)[taken]
        self.load()
        return taken, rows

    # ------------------------------------------------------------------------------------------------------- eviction
    def _is_expired(self, slots: IntArray, step: int) -> npt.NDArray[np.bool_]:
        assert self._ttl_steps is not None, "asked where ids expire"
        return (slots >= 0) & (step - self.last_steps[slots] > self._ttl_steps)

    def _make_room(self, buckets: IntArray, needed: IntArray, step: int) -> IntArray:
        """Takes the rows of each bucket's least useful ids, those of the step left alone, and returns them.

        Args:
            buckets: here, ascending.
            needed: rows that each must have free, (n,). It frees a share of a bucket at least.
            step: that is trained.
        """
        begins, sizes = self._bounds[buckets], self._bounds[buckets + 1] - self._bounds[buckets]
        of = np.repeat(np.arange(len(buckets)), sizes)
        slots = _places_in_groups(sizes) + begins[of]
        may = (self.ids[slots] != FREE) & (self.last_steps[slots] < step)
        slots, of = slots[may], of[may]
        order = self._least_useful_first(slots, of, step)
        place = _places_in_groups(np.bincount(of, minlength=len(buckets)))
        free = np.array([len(self._free[bucket]) for bucket in buckets.tolist()], dtype=np.int64)
        missing = np.maximum(needed - free, (self._bounds[buckets + 1] - begins) // _EVICTED_AT_ONCE)
        return self._evict(np.sort(slots[order][place < missing[of]]))

    def _least_useful_first(self, slots: IntArray, of: IntArray, step: int) -> IntArray:
        """Returns the order of rows that hold ids: by group, and in each group the least useful id first."""
        counts, last_steps = self.counts[slots], self.last_steps[slots]
        worth: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {
            "lru": (last_steps, counts),
            "lfu": (counts, last_steps),
            "distance_lfu": (counts / np.maximum(step - last_steps, 1), last_steps),
        }
        first, second = worth[self._eviction]
        lives = np.ones(len(slots), dtype=np.bool_) if self._ttl_steps is None else ~self._is_expired(slots, step)
        return np.lexsort((slots, second, first, lives, of))

    def _evict(self, slots: IntArray) -> IntArray:
        """Takes rows from their ids; slots ascend."""
        places = self._places(self.ids[slots], self._hashes(self.ids[slots]))
        self._index[places] = _DELETED
        self._deleted += len(places)
        self.ids[slots], self.counts[slots], self.last_steps[slots] = FREE, 0, 0
        buckets = np.searchsorted(self._bounds, slots, side="right") - 1
        for bucket in np.unique(buckets).tolist():
            self._free[bucket] = np.sort(np.concatenate([self._free[bucket], slots[buckets == bucket]]))[::-1]
        return slots

    # --------------------------------------------------------------------------------------------------------- search
    def _hashes(self, ids: IntArray) -> WordArray:
        return hash_integers(ids, self._seed)

    def _bucket(self, hashes: WordArray) -> IntArray:
        return ((hashes >> np.uint64(32)) % np.uint64(self.buckets)).astype(np.int64)

    def _local_bucket(self, hashes: WordArray) -> IntArray:
        return self._bucket(hashes) - self.first

    def _find(self, ids: IntArray, hashes: WordArray) -> IntArray:
        places = self._places(ids, hashes)
        return np.where(places >= 0, self._index[places], _EMPTY)

    def _places(self, ids: IntArray, hashes: WordArray) -> IntArray:
        """Returns where in the index each id stands, -1 where it does not: by linear probing, all ids together."""
        mask = len(self._index) - 1
        found = np.full(len(ids), _EMPTY, dtype=np.int64)
        if not len(self.ids):
            return found
        places = (hashes & np.uint64(mask)).astype(np.int64)
        looking = np.arange(len(ids))
        while len(looking):
            slots = self._index[places[looking]]
            is_it = (slots >= 0) & (self.ids[np.maximum(slots, 0)] == ids[looking])
            found[looking[is_it]] = places[looking[is_it]]
            looking = looking[~is_it & (slots != _EMPTY)]
            places[looking] = (places[looking] + 1) & mask
        return found

    def _enter(self, hashes: WordArray, slots: IntArray) -> None:
        """Writes ids that are not there into the index."""
        mask = len(self._index) - 1
        places = (hashes & np.uint64(mask)).astype(np.int64)
        waiting = np.arange(len(slots))
        while len(waiting):
            is_open = self._index[places[waiting]] < 0
            _, first = np.unique(places[waiting], return_index=True)
            may = np.zeros(len(waiting), dtype=np.bool_)
            may[first] = True
            writes = waiting[is_open & may]
            self._deleted -= int((self._index[places[writes]] == _DELETED).sum())
            self._index[places[writes]] = slots[writes]
            waiting = waiting[~(is_open & may)]
            taken = self._index[places[waiting]] >= 0
            places[waiting[taken]] = (places[waiting[taken]] + 1) & mask

    # --------------------------------------------------------------------------------------------------------- sketch
    def _sight(self, hashes: WordArray, counts: IntArray) -> IntArray:
        """Adds sightings of ids without a row, and returns how often each was sighted at most."""
        width = self.sightings.shape[2]
        buckets = self._local_bucket(hashes)
        estimates = np.full(len(hashes), _MOST_SIGHTINGS, dtype=np.int64)
        columns = []
        for line in range(SKETCH_DEPTH):
            column = (hash_integers(hashes, line) & np.uint64(width - 1)).astype(np.int64)
            columns.append(column)
            flat, inverse = np.unique(buckets * width + column, return_inverse=True)
            added = np.bincount(inverse, weights=counts, minlength=len(flat)).astype(np.int64)
            at = (flat // width, np.full(len(flat), line), flat % width)
            self.sightings[at] = np.minimum(self.sightings[at] + added, _MOST_SIGHTINGS)
        for line, column in enumerate(columns):
            estimates = np.minimum(estimates, self.sightings[buckets, line, column])
        np.add.at(self.sighted, buckets, counts)
        for bucket in np.flatnonzero(self.sighted >= _SIGHTINGS_PER_COUNTER * width).tolist():
            self.sightings[bucket] //= 2
            self.sighted[bucket] //= 2
        return estimates


def _places_in_groups(sizes: IntArray) -> IntArray:
    """Returns 0, 1, ... for each group, one group after another."""
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
