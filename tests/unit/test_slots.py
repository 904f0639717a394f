"""Who holds which row: against the same rules one id at a time, and cut into any number of parts."""

import itertools
from collections import Counter

import numpy as np
import pytest

from embedshard.data.hashing import hash_integers
from embedshard.sharding.slots import FREE, Slots, bucket_bounds, sketch_width

ROWS, BUCKETS = 43, 4


def make(first=0, last=BUCKETS, **changes):
    options = {"min_count": 1, "eviction": "lfu", "ttl_steps": None, "seed": 3} | changes
    return Slots(ROWS, BUCKETS, first, last, **options)


class OneByOne:
    """The rules, spelt out with dictionaries. Sightings are counted exactly."""

    def __init__(self, min_count, eviction, ttl_steps, seed):
        self.min_count, self.eviction, self.ttl_steps, self.seed = min_count, eviction, ttl_steps, seed
        bounds = bucket_bounds(ROWS, BUCKETS)
        self.free = [list(range(bounds[b], bounds[b + 1])) for b in range(BUCKETS)]
        self.sizes = np.diff(bounds)
        self.held = [{} for _ in range(BUCKETS)]  # id: [row, count, last step]
        self.sightings = Counter()

    def worth(self, item, step):
        row, count, last = item[1]
        expired = self.ttl_steps is not None and step - last > self.ttl_steps
        by = {"lfu": (count, last), "lru": (last, count), "distance_lfu": (count / max(step - last, 1), last)}
        return (not expired, *by[self.eviction], row)

    def lose(self, bucket, id_, lost):
        row = self.held[bucket].pop(id_)[0]
        self.free[bucket] = sorted([*self.free[bucket], row])
        lost.add(row)

    def meet(self, counts, step):
        hashes = {id_: int(hash_integers(np.array([id_]), self.seed)[0]) for id_ in counts}
        lost, waiting = set(), [[] for _ in range(BUCKETS)]
        for id_, count in counts.items():
            bucket = (hashes[id_] >> 32) % BUCKETS
            held = self.held[bucket].get(id_)
            if held is not None and self.ttl_steps is not None and step - held[2] > self.ttl_steps:
                self.lose(bucket, id_, lost)
                held = None
            if held is not None:
                held[1], held[2] = held[1] + count, step
                continue
            if self.min_count > 1:
                self.sightings[id_] += count
                count = self.sightings[id_]
            if count >= self.min_count:
                waiting[bucket].append((-count, hashes[id_], id_))
        for bucket, ids in enumerate(waiting):
            ids.sort()
            if len(ids) > len(self.free[bucket]):
                old = [item for item in self.held[bucket].items() if item[1][2] < step]
                old.sort(key=lambda item: self.worth(item, step))
                for id_, _ in old[: max(len(ids) - len(self.free[bucket]), self.sizes[bucket] // 64)]:
                    self.lose(bucket, id_, lost)
            for count, _, id_ in ids:
                if self.free[bucket]:
                    self.held[bucket][id_] = [self.free[bucket].pop(0), -count, step]
        rows = {id_: self.held[(hashes[id_] >> 32) % BUCKETS].get(id_, [ROWS])[0] for id_ in counts}
        return rows, lost


def stream(steps, seed=0, ids=400, size=30):
    """Ids that are met once or often, and drift."""
    generator = np.random.default_rng(seed)
    for step in range(steps):
        met = (generator.zipf(1.3, size) % ids + step * 3).astype(np.int64)
        yield step, *np.unique(met, return_counts=True)


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
@pytest.mark.parametrize(("min_count", "ttl_steps"), [(1, None), (2, None), (3, 12), (1, 4)])
def test_rules(eviction, min_count, ttl_steps, monkeypatch):
    monkeypatch.setattr("embedshard.sharding.slots.sketch_width", lambda rows, buckets: 2**18)  # nothing collides
    options = {"min_count": min_count, "eviction": eviction, "ttl_steps": ttl_steps, "seed": 3}
    slots, expected = make(**options), OneByOne(**options)
    lost_rows = 0
    for step, ids, counts in stream(120):
        met = slots.meet(ids, counts, step)
        rows, lost = expected.meet(dict(zip(ids.tolist(), counts.tolist(), strict=True)), step)
        assert dict(zip(ids.tolist(), met.rows.tolist(), strict=True)) == rows, step
        assert met.evicted.tolist() == sorted(lost), step
        assert np.array_equal(slots.find(ids, step), met.rows)
        lost_rows += len(lost)
        holding = slots.ids[slots.ids != FREE]
        assert len(np.unique(holding)) == len(holding), "no two rows have one id"
        assert slots.num_used().sum() == len(holding)
    assert lost_rows > 20, "the stream drives ids out"


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_are_the_whole(parts):
    whole = make(min_count=2, ttl_steps=20)
    cuts = [BUCKETS * part // parts for part in range(parts + 1)]
    several = [make(first, last, min_count=2, ttl_steps=20) for first, last in itertools.pairwise(cuts)]
    for step, ids, counts in stream(80, seed=5):
        expected = whole.meet(ids, counts, step)
        rows, evicted = np.empty_like(expected.rows), []
        for part in several:
            mine = (part.bucket_of(ids) >= part.first) & (part.bucket_of(ids) < part.last)
            met = part.meet(ids[mine], counts[mine], step)
            rows[mine] = met.rows
            evicted += met.evicted.tolist()
        assert np.array_equal(rows, expected.rows)
        assert evicted == expected.evicted.tolist()
    for name in ("ids", "counts", "last_steps", "sightings", "sighted"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in several]), getattr(whole, name)), name


def test_goes_on_from_its_state():
    first = make(min_count=2, ttl_steps=15)
    steps = list(stream(100, seed=2))
    for step, ids, counts in steps[:50]:
        first.meet(ids, counts, step)
    second = make(min_count=2, ttl_steps=15)
    for name in ("ids", "counts", "last_steps", "sightings", "sighted"):
        getattr(second, name)[:] = getattr(first, name)
    second.load()
    for step, ids, counts in steps[50:]:
        assert np.array_equal(second.meet(ids, counts, step).rows, first.meet(ids, counts, step).rows)


def test_ids_of_one_step_do_not_drive_each_other_out():
    slots = make()
    ids = np.arange(1000, dtype=np.int64)
    met = slots.meet(ids, np.ones(1000, dtype=np.int64), 0)
    assert met.admitted == ROWS
    assert len(met.evicted) == 0
    assert sorted(met.rows[met.rows < ROWS].tolist()) == list(range(ROWS))
    assert (met.rows == ROWS).sum() == 1000 - ROWS


def test_sketch_never_counts_too_few_and_forgets():
    slots = make(min_count=30_000)
    generator = np.random.default_rng(0)
    seen = Counter()
    for step in range(20):
        ids, counts = np.unique(generator.integers(0, 300, 40), return_counts=True)
        slots.meet(ids, counts, step)
        seen.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    ids = np.array(sorted(seen), dtype=np.int64)
    before = slots.sighted.copy()
    estimates = slots._sight(hash_integers(ids, 3), np.zeros(len(ids), dtype=np.int64))
    assert (estimates >= [seen[id_] for id_ in ids.tolist()]).all()
    width = sketch_width(ROWS, BUCKETS)
    for step in range(20, 20 + 8 * width // 8):
        ids, counts = np.unique(generator.integers(0, 300, 40), return_counts=True)
        slots.meet(ids, counts, step)
    assert (slots.sighted < before + 8 * width).all(), "halved when 8 sightings a counter were added"
    assert (slots.sighted > 0).all()


def test_extreme_ids():
    slots = make()
    ids = np.array([0, 1, 2**62, 2**63 - 2], dtype=np.int64)
    rows = slots.meet(ids, np.ones(4, dtype=np.int64), 0).rows
    assert len(set(rows.tolist())) == 4
    assert (rows < ROWS).all()


def test_a_rank_of_one_row():
    slots = Slots(2, 2, 0, 1, min_count=1, eviction="lru", ttl_steps=None, seed=0)
    ids = np.arange(200, dtype=np.int64)
    mine = ids[slots.bucket_of(ids) == 0]
    for step, id_ in enumerate(mine.tolist()):
        met = slots.meet(np.array([id_]), np.array([1]), step)
        assert met.rows.tolist() == [0]
        assert met.evicted.tolist() == ([0] if step else [])
