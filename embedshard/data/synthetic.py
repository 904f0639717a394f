"""Generated interactions whose best reachable score is known.

Items belong to topics; a topic's items are met by Zipf's law, and so are topics. A user is drawn to a few topics, more
to the first than to the next, and meets items one after another, none twice: p(item | user) is known exactly. Nothing
can rank held-out items better, in expectation, than that probability does with the items left out that the user has
met: its recall is what a model can reach. Ids say nothing of topic or popularity.

Each user's last item is the test row, the one before it the validation row. `history` is what the user had met before the
row, at most `history_length` of it, most recent last.
"""

from __future__ import annotations

__all__ = ["Interactions", "SyntheticSpec", "generate", "truth", "write"]

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

K = 20
_TOPICS, _AFFINITY, _ITEMS, _IDS, _ROWS = range(5)  # streams of draws
_BLOCK_USERS = 8192
_NUM_FILES, _ROW_GROUP_ROWS = 4, 65_536


@dataclass(frozen=True)
class SyntheticSpec:
    """What is generated.

    Attributes:
        users: how many.
        items: how many, a multiple of topics.
        interactions: in all, held-out rows included; at least min_per_user a user.
        topics: how many.
        topics_per_user: topics that a user is drawn to.
        affinity: share of the first of them; each next one has this share of the rest.
        topic_exponent: Zipf's exponent over topics.
        item_exponent: Zipf's exponent over a topic's items.
        activity_exponent: Zipf's exponent of users' numbers of interactions.
        min_per_user: fewest interactions of a user, at least 3.
        max_per_user: most interactions of a user.
        history_length: items kept of a history.
        seed: of every draw.
    """

    users: int = 100_000
    items: int = 50_000
    interactions: int = 1_000_000
    topics: int = 500
    topics_per_user: int = 2
    affinity: float = 0.8
    topic_exponent: float = 0.5
    item_exponent: float = 1.0
    activity_exponent: float = 0.3
    min_per_user: int = 5
    max_per_user: int = 40
    history_length: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that the numbers fit each other."""
        if self.items % self.topics:
            raise ConfigError(f"items={self.items} do not divide into topics={self.topics}. Choose a multiple.")
        per_topic = self.items // self.topics
        if self.max_per_user * 2 > per_topic:
            raise ConfigError(
                f"max_per_user={self.max_per_user} is more than half of the {per_topic} items of a topic, so users would "
                f"run out of items. Choose fewer topics or more items."
            )
        if not 3 <= self.min_per_user <= self.interactions / self.users <= self.max_per_user:
            raise ConfigError(
                f"interactions={self.interactions} of users={self.users} are {self.interactions / self.users:.1f} each; "
                f"they must be between min_per_user={self.min_per_user} (at least 3) and max_per_user={self.max_per_user}."
            )


@dataclass(frozen=True)
class Interactions:
    """What was generated: every user's items in order of time, and the probabilities behind them.

    Attributes:
        spec: what was asked for.
        items: (n,) item ids, user after user.
        offsets: (users + 1,) where each user's begin.
        user_topics: (users, topics_per_user) topics.
        shares: (topics_per_user,) the probability of each of a user's topics.
        item_of: (topics, items per topic) item ids, most popular first.
        within: (items per topic,) the probability of each item of a topic.
    """

    spec: SyntheticSpec
    items: IntArray
    offsets: IntArray
    user_topics: IntArray
    shares: FloatArray
    item_of: IntArray
    within: FloatArray


def _generator(spec: SyntheticSpec, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[spec.seed, stream]))


def _zipf(count: int, exponent: float) -> FloatArray:
    shares: FloatArray = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return shares / shares.sum()


def generate(spec: SyntheticSpec) -> Interactions:
    """Generates interactions, the same for the same spec."""
    item_of = _generator(spec, _IDS).permutation(spec.items).reshape(spec.topics, -1).astype(np.int64)
    within = _zipf(item_of.shape[1], spec.item_exponent)
    user_topics = _distinct_draws(spec)
    shares: FloatArray = spec.affinity * (1.0 - spec.affinity) ** np.arange(spec.topics_per_user, dtype=np.float64)
    shares /= shares.sum()
    wanted = _activity(spec)

    generator = _generator(spec, _ITEMS)
    met = np.zeros(0, dtype=np.int64)  # user * items + item, in order of time within a user
    order = np.zeros(0, dtype=np.int64)
    missing, round_number = wanted.copy(), 0
    while missing.any():
        # Draws that repeat an item are thrown away: drawing on until enough differ is drawing without repeats.
        users = np.repeat(np.arange(spec.users, dtype=np.int64), np.where(missing > 0, missing * 2 + 2, 0))
        slot = np.searchsorted(np.cumsum(shares), generator.random(len(users)), side="right")
        place = np.searchsorted(np.cumsum(within), generator.random(len(users)), side="right")
        slot, place = np.minimum(slot, len(shares) - 1), np.minimum(place, len(within) - 1)
        drawn = users * spec.items + item_of[user_topics[users, slot], place]
        times = np.arange(len(users), dtype=np.int64) + (round_number << 40)
        everything, times = np.concatenate([met, drawn]), np.concatenate([order, times])
        _, first = np.unique(everything, return_index=True)
        first.sort()
        everything, times = everything[first], times[first]
        by_user = np.lexsort((times, everything // spec.items))
        everything, times = everything[by_user], times[by_user]
        owner = everything // spec.items
        begins = np.searchsorted(owner, np.arange(spec.users))
        nth = np.arange(len(owner)) - begins[owner]
        kept = nth < wanted[owner]
        met, order = everything[kept], times[kept]
        missing = wanted - np.bincount(met // spec.items, minlength=spec.users)
        round_number += 1
    offsets = np.concatenate([[0], np.cumsum(wanted)]).astype(np.int64)
    return Interactions(spec, met % spec.items, offsets, user_topics, shares, item_of, within)


def _activity(spec: SyntheticSpec) -> IntArray:
    """Returns how many items each user meets: Zipf's law over users in random order, cut to the limits, of the given sum."""
    shares = _zipf(spec.users, spec.activity_exponent)
    low, high = 0.0, float(spec.interactions) * spec.users
    for _ in range(100):  # the scale at which the cut numbers have the right sum
        middle = (low + high) / 2
        counts = np.clip(np.floor(shares * middle), spec.min_per_user, spec.max_per_user)
        low, high = (middle, high) if counts.sum() < spec.interactions else (low, middle)
    counts = np.clip(np.floor(shares * low), spec.min_per_user, spec.max_per_user).astype(np.int64)
    room = np.flatnonzero(counts < spec.max_per_user)
    counts[room[: spec.interactions - int(counts.sum())]] += 1
    return counts[_generator(spec, _AFFINITY).permutation(spec.users)]


def _distinct_draws(spec: SyntheticSpec) -> IntArray:
    """Returns each user's topics, all different, drawn by the topics' popularity."""
    cumulative = np.cumsum(_zipf(spec.topics, spec.topic_exponent))
    generator = _generator(spec, _TOPICS)

    def draw(count: int) -> IntArray:
        return np.minimum(np.searchsorted(cumulative, generator.random(count), side="right"), spec.topics - 1)

    topics = draw(spec.users * spec.topics_per_user).reshape(spec.users, -1).astype(np.int64)
    while True:
        ordered = np.sort(topics, axis=1)
        repeated = np.flatnonzero((np.diff(ordered, axis=1) == 0).any(axis=1))
        if not len(repeated):
            return topics
        topics[repeated] = draw(len(repeated) * spec.topics_per_user).reshape(len(repeated), -1)


def truth(data: Interactions) -> dict[str, Any]:
    """Returns what can be known of the data: counts, and for each held-out set the recall@20 of three rankings.

    `reachable` ranks by p(item | user), `popularity` by training counts, both without the items that the user has met
    before; ties count against them. `random` is the expectation of a random ranking.
    """
    spec, offsets = data.spec, data.offsets
    held_out = {"validation": offsets[1:] - 2, "test": offsets[1:] - 1}
    is_train = np.ones(len(data.items), dtype=bool)
    for places in held_out.values():
        is_train[places] = False
    popularity = np.bincount(data.items[is_train], minlength=spec.items)
    result: dict[str, Any] = {
        "spec": asdict(spec),
        "rows": {"train": int(is_train.sum()), "validation": spec.users, "test": spec.users},
    }
    for name, places in held_out.items():
        met = (places - offsets[:-1]).mean()
        result[name] = {
            f"reachable_recall@{K}": _reachable(data, places),
            f"popularity_recall@{K}": _by_popularity(data, places, popularity),
            f"random_recall@{K}": float(K / (spec.items - met)),
        }
    return result


def _reachable(data: Interactions, places: IntArray) -> float:
    spec = data.spec
    hits = 0
    for users, met, row in _met_before(data, places):
        candidates = data.item_of[data.user_topics[users]].reshape(len(users), -1)
        chances = (data.shares[:, None] * data.within[None, :]).ravel()
        scores = np.tile(chances, (len(users), 1))
        scores[np.isin(candidates + (users - users[0])[:, None] * spec.items, met + row * spec.items)] = -1.0
        target = data.items[places[users]][:, None]
        own = np.where(candidates == target, scores, -1.0).max(axis=1, keepdims=True)
        ahead = ((scores >= own) & (candidates != target)).sum(axis=1)
        hits += int((ahead < K).sum())
    return hits / spec.users


def _by_popularity(data: Interactions, places: IntArray, popularity: IntArray) -> float:
    # An item is found if fewer than K items that are at least as popular have not been met.
    ordered = np.sort(popularity)[::-1]
    hits = 0
    for users, met, row in _met_before(data, places):
        own = popularity[data.items[places[users]]]
        at_least = np.searchsorted(-ordered, -own, side="right") - 1
        met_ahead = np.bincount(row, weights=popularity[met] >= own[row], minlength=len(users))
        hits += int((at_least - met_ahead < K).sum())
    return hits / data.spec.users


def _met_before(data: Interactions, places: IntArray) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Yields blocks of users, the items that they met before their held-out row, and whose each is within the block."""
    for begin in range(0, data.spec.users, _BLOCK_USERS):
        users = np.arange(begin, min(begin + _BLOCK_USERS, data.spec.users), dtype=np.int64)
        lengths = places[users] - data.offsets[users]
        row = np.repeat(np.arange(len(users), dtype=np.int64), lengths)
        starts = np.repeat(data.offsets[users] - np.cumsum(lengths) + lengths, lengths)
        yield users, data.items[starts + np.arange(len(row))], row


def write(data: Interactions, folder: Path) -> None:
    """Writes train/, validation/, test/ and truth.json below a folder."""
    spec, offsets = data.spec, data.offsets
    user = np.repeat(np.arange(spec.users, dtype=np.int64), np.diff(offsets))
    held_out = {"validation": offsets[1:] - 2, "test": offsets[1:] - 1}
    is_train = np.ones(len(user), dtype=bool)
    for places in held_out.values():
        is_train[places] = False
    train = np.flatnonzero(is_train)
    train = train[_generator(spec, _ROWS).permutation(len(train))]
    for name, rows, files in (("train", train, _NUM_FILES), *((n, p, 1) for n, p in held_out.items())):
        (folder / name).mkdir(parents=True)
        for number, part in enumerate(np.array_split(rows, files)):
            table = _table(data, user, part)
            path = folder / name / f"part-{number:05d}.parquet"
            pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    (folder / "truth.json").write_text(json.dumps(truth(data), indent=2) + "\n", encoding="utf-8")


def _table(data: Interactions, user: IntArray, rows: IntArray) -> pa.Table:
    lengths = np.minimum(rows - data.offsets[user[rows]], data.spec.history_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.repeat(rows - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    history = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(data.items[places]))
    return pa.table({"user_id": user[rows], "item_id": data.items[rows], "history": history})
