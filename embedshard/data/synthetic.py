"""Generated interactions whose best reachable score is known.

Items belong to topics; a topic's items are met by Zipf's law, and so are topics. A user is drawn to a few topics, more
to the first than to the next, and meets items one after another, none twice: p(item | user) is known exactly. Nothing
can rank held-out items better, in expectation, than that probability does with the items left out that the user has
met: its recall is what a model can reach. Ids say nothing of topic or popularity.

Each user's last item is the test row, the one before it the validation row, the rest are training rows. `history` is what
the user met before the row among the training rows, at most `history_length` of it, most recent last: a test row's has
not the validation item.

This file owns the generator and what is true of its data; it knows nothing of models, configs and runs.
"""

from __future__ import annotations

__all__ = ["Interactions", "K", "SyntheticSpec", "generate", "is_written", "truth", "write"]

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedshard.data.columns import offsets_of
from embedshard.errors import ConfigError, DataError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

K = 20
_FORMAT = 2  # of what is written: another number whenever the same spec makes other files
_TOPICS, _ACTIVITY, _ITEMS, _IDS, _ROWS = range(5)  # streams of draws
_BLOCK_CHANCES = 2**20  # of (user, candidate) pairs that are held at once
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
    topics: int = 250
    topics_per_user: int = 2
    affinity: float = 0.85
    topic_exponent: float = 0.5
    item_exponent: float = 1.0
    activity_exponent: float = 0.3
    min_per_user: int = 5
    max_per_user: int = 40
    history_length: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that the numbers fit each other."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small. Choose at least {least}.")
        for name in ("topic_exponent", "item_exponent", "activity_exponent"):
            if not 0 <= getattr(self, name) <= 4:
                raise ConfigError(f"{name}={getattr(self, name)} is no exponent of Zipf's law here. Choose one from 0 to 4.")
        if not 0 < self.affinity < 1:
            raise ConfigError(f"affinity={self.affinity} is no share of a user's first topic. Choose one between 0 and 1.")
        if self.topics_per_user * 2 > self.topics:
            raise ConfigError(
                f"topics_per_user={self.topics_per_user} is more than half of topics={self.topics}, so users would hardly "
                f"differ. Choose at most {self.topics // 2}, or more topics."
            )
        if self.items % self.topics:
            raise ConfigError(f"items={self.items} do not divide into topics={self.topics}. Choose a multiple.")
        per_topic = self.items // self.topics
        if self.max_per_user * 2 > per_topic:
            raise ConfigError(
                f"max_per_user={self.max_per_user} is more than half of the {per_topic} items of a topic, so users would "
                f"run out of items. Choose fewer topics or more items."
            )
        if not self.min_per_user <= self.interactions / self.users <= self.max_per_user:
            raise ConfigError(
                f"interactions={self.interactions} of users={self.users} are {self.interactions / self.users:.1f} each; "
                f"they must be between min_per_user={self.min_per_user} and max_per_user={self.max_per_user}."
            )


_LEAST = {"users": 1, "items": K + 1, "topics": 2, "topics_per_user": 1, "min_per_user": 3, "history_length": 1, "seed": 0}


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

    # Whoever comes first in a race of exponential clocks, each at the rate of its probability, is a draw; whoever comes
    # next is a draw among the others. So a user's first arrivals are draws without repeats, in order of time.
    generator = _generator(spec, _ITEMS)
    rates = np.outer(shares, within).ravel()
    offsets = offsets_of(wanted)
    items = np.empty(offsets[-1], dtype=np.int64)
    for users in _blocks(spec):
        arrivals = generator.standard_exponential((len(users), len(rates))) / rates
        longest = int(wanted[users].max())
        first = np.argpartition(arrivals, longest - 1, axis=1)[:, :longest]
        ranked = np.argsort(np.take_along_axis(arrivals, first, axis=1), axis=1)
        first = np.take_along_axis(first, ranked, axis=1)
        slot, place = np.divmod(first, len(within))
        drawn = item_of[np.take_along_axis(user_topics[users], slot, axis=1), place]
        kept = np.arange(longest) < wanted[users][:, None]
        items[offsets[users[0]] : offsets[users[-1] + 1]] = drawn[kept]
    return Interactions(spec, items, offsets, user_topics, shares, item_of, within)


def _blocks(spec: SyntheticSpec) -> Iterator[IntArray]:
    """Yields users, as many at a time as keep memory small."""
    size = max(1, _BLOCK_CHANCES // (spec.topics_per_user * (spec.items // spec.topics)))
    for begin in range(0, spec.users, size):
        yield np.arange(begin, min(begin + size, spec.users), dtype=np.int64)


def _activity(spec: SyntheticSpec) -> IntArray:
    """Returns how many items each user meets: Zipf's law over users in random order, cut to the limits, of the given sum."""
    shares = _zipf(spec.users, spec.activity_exponent)
    low, high = 0.0, (spec.max_per_user + 1) / float(shares.min())
    for _ in range(100):  # the scale at which the cut numbers have the right sum
        middle = (low + high) / 2
        counts = np.clip(np.floor(shares * middle), spec.min_per_user, spec.max_per_user)
        low, high = (middle, high) if counts.sum() < spec.interactions else (low, middle)
    counts = np.clip(np.floor(shares * low), spec.min_per_user, spec.max_per_user).astype(np.int64)
    room = np.flatnonzero(counts < spec.max_per_user)
    counts[room[: spec.interactions - int(counts.sum())]] += 1
    assert counts.sum() == spec.interactions, "at the next scale, some users have one more"
    return counts[_generator(spec, _ACTIVITY).permutation(spec.users)]


def _distinct_draws(spec: SyntheticSpec) -> IntArray:
    """Returns each user's topics, one after another by the topics' popularity among those that the user has not."""
    cumulative = np.cumsum(_zipf(spec.topics, spec.topic_exponent))
    generator = _generator(spec, _TOPICS)
    topics = np.empty((spec.users, spec.topics_per_user), dtype=np.int64)
    for column in range(spec.topics_per_user):
        open_rows = np.arange(spec.users, dtype=np.int64)
        while len(open_rows):
            drawn = np.searchsorted(cumulative, generator.random(len(open_rows)), side="right")
            topics[open_rows, column] = np.minimum(drawn, spec.topics - 1)
            repeated = (topics[open_rows, :column] == topics[open_rows, column, None]).any(axis=1)
            open_rows = open_rows[repeated]
    return topics


def truth(data: Interactions) -> dict[str, Any]:
    """Returns what can be known of the data: the spec, counts, and for each held-out set the recall@20 of three rankings.

    `reachable` ranks by p(item | user), `popularity` by training counts, both without the items that the user has met
    before; ties count against them. `random` is the expectation of a random ranking.
    """
    spec, offsets = data.spec, data.offsets
    train, held_out = _split(data)
    popularity = np.bincount(data.items[train], minlength=spec.items).astype(np.float64)
    user = np.repeat(np.arange(spec.users, dtype=np.int64), np.diff(offsets))
    probabilities, rates = _probabilities(data, user), np.outer(data.shares, data.within).ravel()
    result: dict[str, Any] = {
        "format": _FORMAT,
        "spec": asdict(spec),
        "counts": {
            "train": len(train),
            **{name: len(places) for name, places in held_out.items()},
            "users": spec.users,
            "items": spec.items,
        },
    }
    for name, places in held_out.items():
        met = (places - offsets[:-1]).mean()
        result[name] = {
            f"reachable_recall@{K}": _recall(user, places, probabilities, rates),
            f"popularity_recall@{K}": _recall(user, places, popularity[data.items], popularity),
            f"random_recall@{K}": float(K / (spec.items - met)),
        }
    return result


def _split(data: Interactions) -> tuple[IntArray, dict[str, IntArray]]:
    """Returns the places in `items` of the training rows, and of each held-out set's, one a user."""
    ends = data.offsets[1:]
    is_train = np.ones(len(data.items), dtype=bool)
    is_train[ends - 1] = is_train[ends - 2] = False
    return np.flatnonzero(is_train), {"validation": ends - 2, "test": ends - 1}


def _probabilities(data: Interactions, user: IntArray) -> FloatArray:
    """Returns p(item | user) of every interaction."""
    topic_of, place_of = np.empty(data.spec.items, dtype=np.int64), np.empty(data.spec.items, dtype=np.int64)
    topic_of[data.item_of] = np.arange(data.spec.topics)[:, None]
    place_of[data.item_of] = np.arange(len(data.within))
    slot = (data.user_topics[user] == topic_of[data.items][:, None]).argmax(axis=1)
    return data.shares[slot] * data.within[place_of[data.items]]


def _recall(user: IntArray, places: IntArray, scores: FloatArray, all_scores: FloatArray) -> float:
    """Returns the recall@K of a ranking, without the items that each user met before; ties count against it.

    No ranking is made: an item is found if fewer than K others that are not yet met score as much or more.

    Args:
        user: of each interaction, (n,).
        places: of the held-out interactions, one a user.
        scores: of each interaction's item for its user, (n,).
        all_scores: of all items for any one user, in any order: users differ in which items score what, not in the
            scores that there are. Items that no held-out item can tie with may be missing.
    """
    own = scores[places]
    as_good = np.searchsorted(-np.sort(all_scores)[::-1], -own, side="right") - 1
    met_as_good = (np.arange(len(user)) < places[user]) & (scores >= own[user])
    return float((as_good - np.bincount(user[met_as_good], minlength=len(places)) < K).mean())


def write(data: Interactions, folder: Path) -> None:
    """Writes train/, validation/, test/ and, last, truth.json into a folder that is new or empty.

    Training rows are in a random order of their own, so that no file and no row group is about a few users.

    Raises:
        DataError: if the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; generated data need a folder of their own. Choose another, or remove it.")
    train, held_out = _split(data)
    train = train[_generator(data.spec, _ROWS).permutation(len(train))]
    user = np.repeat(np.arange(data.spec.users, dtype=np.int64), np.diff(data.offsets))
    for name, rows, num_files in (("train", train, _NUM_FILES), *((name, rows, 1) for name, rows in held_out.items())):
        (folder / name).mkdir(parents=True)
        for number, part in enumerate(np.array_split(rows, num_files)):
            path = folder / name / f"part-{number:05d}.parquet"
            table = _table(data, user[part], part)
            pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    (folder / "truth.json").write_text(json.dumps(truth(data), indent=2) + "\n", encoding="utf-8")


def is_written(spec: SyntheticSpec, folder: Path) -> bool:
    """Returns whether a folder holds what `write` makes of a spec today.

    Raises:
        DataError: if the folder holds things, but no generated data, so that they must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / "truth.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return bool((found.get("format"), found["spec"]) == (_FORMAT, asdict(spec)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} is there, but {path} is not the truth of generated data ({type(error).__name__}: {error}). "
            f"Choose another folder, or remove this one."
        ) from error


def _table(data: Interactions, user: IntArray, rows: IntArray) -> pa.Table:
    ends = np.minimum(rows, data.offsets[user + 1] - 2)  # training items only: nothing from the validation row on
    lengths = np.minimum(ends - data.offsets[user], data.spec.history_length)
    offsets = offsets_of(lengths)
    places = np.repeat(ends - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    history = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(data.items[places]))
    return pa.table({"user_id": user, "item_id": data.items[rows], "history": history})
