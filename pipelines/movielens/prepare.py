"""Writes MovieLens-1M as Parquet in the protocols of this folder's configs, with validation sets cut from the training sets.

`ncf`, for ncf.yaml: each user's last rating is the test row, with 99 given negatives (He et al. 2017). The validation set is
made the same way from what is left: each user's last training rating, with 99 items that the user has not rated in training.

`ratings`, for ratings.yaml: the first nine tenths of default_rng(0).permutation over the ratings' file order train, the
rest is the test set (`split_ratings`). The last twentieth of the training rows, in that order, is the validation set.

`histories`, for item2vec.yaml: a row a user, with the movies that the user rated in order of time, from all ratings; beside
it movies.parquet with each movie's title and genres.

`ctr`, for ctr.yaml: what a user liked, a label of 1 above 3 stars and of 0 below, with the user's and the movie's
attributes; ratings of 3 stars are left out (Song et al. 2019, AutoInt). Of default_rng(0).permutation over the rows that are
left, in file order, the first eight tenths train, the next tenth is the validation set, the last the test set.

`next`, for sasrec.yaml: of the movies with five ratings or more that a user rated, in order of time, the last is the test
row's item, the one before the validation row's, and the one before that the training row's, each with the movies before it
as its history; the former two with 100 movies that the user has not rated (Kang and McAuley 2018). Training histories are
cut to the last 200, and what is before them makes further training rows: the movie that the last history begins after, with
the up to 200 before it, and so on, so that each rating but a user's first is to be told once. Ratings of the same second
have no order: they are put in one that is drawn (README.md says why). Movies are numbered anew, as movies.parquet says.

Without --source the official files are fetched: for all protocols unless --protocol names one. A source is a folder
with train.parquet and test.parquet (ncf), with ratings.parquet (ratings), with movies.parquet too (histories), or with
users.parquet as well (ctr).

    python pipelines/movielens/prepare.py --source ../shared/data/ncf-ml-1m
    python pipelines/movielens/prepare.py --source ../shared/data/ml-1m
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedshard.data.preparation import fetch, last_of_each, negatives_for, write_sets

NCF_FILES = "https://raw.githubusercontent.com/hexiangnan/neural_collaborative_filtering/master/Data"
NCF_NAMES = ("ml-1m.train.rating", "ml-1m.test.negative")
RATINGS_ARCHIVE = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
NUM_NEGATIVES = 99
NUM_RANDOM = 100
FEWEST_RATINGS = 5
LONGEST = 200
VALIDATION_SHARE = 0.05
SEED = 7
PROTOCOLS = ("ncf", "ratings", "histories", "ctr", "next")


def main() -> None:
    """Parses arguments, prepares, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with the data as Parquet; else the official files are fetched")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: what the source holds; without a source, all")
    parser.add_argument("--out", type=Path, help="folder to write (default: $EMBEDSHARD_DATA/movielens/PROTOCOL)")
    arguments = parser.parse_args()
    root = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "movielens"
    try:
        protocols = [arguments.protocol] if arguments.protocol else protocols_of(arguments.source)
        if arguments.out and len(protocols) > 1:
            raise ValueError(f"--out is one folder, for one of {', '.join(protocols)}. Name it with --protocol")
        for protocol in protocols:
            sets = prepare(protocol, arguments.source, root / "official")
            out = arguments.out or root / protocol
            counts = write_sets(sets, out)
            if protocol in ("histories", "next"):
                movies = read_movies(arguments.source, root / "official")
                pq.write_table(movies if protocol == "histories" else numbered(movies, sets), out / "movies.parquet")
            print(f"{out}: " + ", ".join(f"{name} {count:,} rows" for name, count in counts.items()))
            largest = {
                name: pc.max(sets["train"][name]).as_py() for name in sets["train"].column_names if name.endswith("_id")
            }
            print("  greatest ids in training: " + ", ".join(f"{name} {most}" for name, most in largest.items()))
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")


def protocols_of(source: Path | None) -> list[str]:
    """Returns the protocols that a source is for; all without one."""
    if source is None:
        return list(PROTOCOLS)
    if (source / "ratings.parquet").exists():
        others = ["histories", "next", *(["ctr"] if (source / "users.parquet").exists() else [])]
        return ["ratings", *(others if (source / "movies.parquet").exists() else [])]
    if (source / "train.parquet").exists():
        return ["ncf"]
    raise OSError(f"{source} holds neither ratings.parquet (ratings) nor train.parquet and test.parquet (ncf)")


def prepare(protocol: str, source: Path | None, downloads: Path) -> dict[str, pa.Table]:
    """Returns the sets of a protocol, from a source or from the official files."""
    if protocol == "ratings":
        ratings = pq.read_table(source / "ratings.parquet") if source else read_archive(fetch(RATINGS_ARCHIVE, downloads))
        return split_ratings(ratings.select(["user_id", "movie_id", "rating"]))
    if protocol == "ctr":
        ratings = pq.read_table(source / "ratings.parquet") if source else read_archive(fetch(RATINGS_ARCHIVE, downloads))
        return liked(ratings, read_users(source, downloads), read_movies(source, downloads))
    if protocol == "next":
        if source:
            ratings = pq.read_table(source / "ratings.parquet")
            if "timestamp" not in ratings.column_names:
                ratings = ratings.append_column("timestamp", pa.nulls(ratings.num_rows, pa.int64()))
            return next_items(ratings.select(["user_id", "movie_id", "seq_pos", "timestamp"]), "seq_pos", "timestamp")
        return next_items(read_archive(fetch(RATINGS_ARCHIVE, downloads)), "time", "time")
    if protocol == "histories":
        if source:
            columns = ["user_id", "movie_id", "seq_pos"]
            return {"train": histories(pq.read_table(source / "ratings.parquet", columns=columns), "seq_pos")}
        return {"train": histories(read_archive(fetch(RATINGS_ARCHIVE, downloads)), "time")}
    if source:
        train = pq.read_table(source / "train.parquet", columns=["user_id", "item_id", "seq_pos"])
        train = train.rename_columns(["user_id", "item_id", "time"])
        test = pq.read_table(source / "test.parquet", columns=["user_id", "item_id", "negatives"])
    else:
        train, test = read_official(*(fetch(f"{NCF_FILES}/{name}", downloads) for name in NCF_NAMES))
    return {**split_last(train), "test": test}


# ----------------------------------------------------------------------------------------------------------------- ncf
def read_official(ratings: Path, negatives: Path) -> tuple[pa.Table, pa.Table]:
    """Returns (train, test) of the text files of NCF's authors."""
    rating = np.loadtxt(ratings, dtype=np.int64, delimiter="\t", ndmin=2)
    train = pa.table({"user_id": rating[:, 0], "item_id": rating[:, 1], "time": rating[:, 3]})
    users, items, others = [], [], []
    for line in negatives.read_text().splitlines():
        pair, *given = line.split("\t")
        user, item = pair.strip("()").split(",")
        users.append(int(user))
        items.append(int(item))
        others.append([int(number) for number in given])
    return train, pa.table({"user_id": users, "item_id": items, "negatives": pa.array(others, pa.list_(pa.int64()))})


def split_last(train: pa.Table) -> dict[str, pa.Table]:
    """Returns the training set without each user's last item, and the validation set of those."""
    user, item, time = (train[name].to_numpy() for name in ("user_id", "item_id", "time"))
    is_last = last_of_each(user, time)
    held_out = np.flatnonzero(is_last)[np.argsort(user[is_last], kind="stable")]
    validation = {"user_id": user[held_out], "item_id": item[held_out]}
    return {
        "train": pa.table({"user_id": user[~is_last], "item_id": item[~is_last]}),
        "validation": pa.table({**validation, "negatives": negatives_for(user[held_out], user, item, NUM_NEGATIVES, SEED)}),
    }


# ------------------------------------------------------------------------------------------------------------- ratings
def read_archive(path: Path) -> pa.Table:
    """Returns the ratings of the official archive, in file order."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("ml-1m/ratings.dat").replace(b"::", b"\t")
    columns = np.loadtxt(io.BytesIO(text), dtype=np.int64, delimiter="\t", ndmin=2)
    names = ("user_id", "movie_id", "rating", "time")
    return pa.table({name: columns[:, place] for place, name in enumerate(names)})


def split_ratings(ratings: pa.Table) -> dict[str, pa.Table]:
    """Returns the training, validation and test set of ratings in file order."""
    order = np.random.default_rng(0).permutation(ratings.num_rows)
    cut = ratings.num_rows * 9 // 10
    last = cut - int(cut * VALIDATION_SHARE)
    return {
        "train": ratings.take(pa.array(order[:last])),
        "validation": ratings.take(pa.array(order[last:cut])),
        "test": ratings.take(pa.array(order[cut:])),
    }


# ----------------------------------------------------------------------------------------------------------------- ctr
def liked(ratings: pa.Table, users: pa.Table, movies: pa.Table) -> dict[str, pa.Table]:
    """Returns the training, validation and test set of ratings in file order, with attributes, as likes and dislikes."""
    ratings = ratings.filter(pc.not_equal(ratings["rating"], 3))
    columns = {name: ratings[name].cast(pa.int32()) for name in ("user_id", "movie_id")}
    for table, key in ((users, "user_id"), (movies.select(["movie_id", "genres"]), "movie_id")):
        places = pc.index_in(ratings[key].cast(pa.int64()), value_set=table[key].cast(pa.int64()).combine_chunks())
        if places.null_count:
            raise ValueError(f"{places.null_count} ratings have a {key} that has no attributes")
        columns |= {name: table[name].take(places) for name in table.column_names if name != key}
    rows = pa.table({**columns, "liked": pc.greater(ratings["rating"], 3).cast(pa.int8())})
    order = np.random.default_rng(0).permutation(rows.num_rows)
    first, second = rows.num_rows * 8 // 10, rows.num_rows * 9 // 10
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: rows.take(pa.array(part)) for name, part in parts.items()}


def read_users(source: Path | None, downloads: Path) -> pa.Table:
    """Returns user_id, gender, age, occupation and zip of each user."""
    if source:
        return pq.read_table(source / "users.parquet", columns=["user_id", "gender", "age", "occupation", "zip"])
    with zipfile.ZipFile(fetch(RATINGS_ARCHIVE, downloads)) as archive:
        lines = [line.split("::") for line in archive.read("ml-1m/users.dat").decode("latin-1").splitlines()]
    user, gender, age, occupation, code = zip(*lines, strict=True)
    numbers = {"user_id": map(int, user), "age": map(int, age), "occupation": map(int, occupation)}
    return pa.table({**{name: list(values) for name, values in numbers.items()}, "gender": gender, "zip": code})


# ----------------------------------------------------------------------------------------------------------- histories
def histories(ratings: pa.Table, time: str) -> pa.Table:
    """Returns a row for each user: user_id, and the movies in order of time, ties in file order."""
    users = ratings["user_id"].to_numpy()
    order = np.lexsort((ratings[time].to_numpy(), users))
    first = np.append(np.flatnonzero(np.diff(users[order], prepend=users[order[0]] - 1)), len(order))
    movies = pa.ListArray.from_arrays(pa.array(first, pa.int32()), pa.array(ratings["movie_id"].to_numpy()[order]))
    return pa.table({"user_id": users[order[first[:-1]]], "movies": movies})


# ---------------------------------------------------------------------------------------------------------------- next
def next_items(ratings: pa.Table, order: str, time: str) -> dict[str, pa.Table]:
    """Returns rows of what came before an item, and the item.

    In the validation and the test set there is one a user, with what the user has not rated; in the training set `pieces`.

    Args:
        ratings: of users.
        order: the column whose order within a user is that of time.
        time: the column of the seconds, null where it is not known.
    """
    seconds = seconds_of(ratings["user_id"].to_numpy(), ratings[order].to_numpy(), ratings[time].to_numpy())
    ids, counts = np.unique(ratings["movie_id"].to_numpy(), return_counts=True)
    kept = ids[counts >= FEWEST_RATINGS]
    is_kept = np.isin(ratings["movie_id"].to_numpy(), kept)
    ratings, seconds = ratings.filter(pa.array(is_kept)), seconds[is_kept]
    users, movies = ratings["user_id"].to_numpy(), np.searchsorted(kept, ratings["movie_id"].to_numpy())
    order = chronological(users, ratings[order].to_numpy(), seconds)
    known, first, lengths = np.unique(users[order], return_index=True, return_counts=True)
    if not len(kept):
        raise ValueError(f"no movie has {FEWEST_RATINGS} ratings, which protocol 'next' asks of each")
    if lengths.min() < 4:
        raise ValueError(f"user {known[lengths.argmin()]} has {lengths.min()} ratings; each needs four")
    negatives = negatives_for(known, users, movies, NUM_RANDOM, SEED)
    movies, lasts = movies[order], first + lengths
    sets = {"train": pieces(known, movies, first, lasts - 3)}
    for back, name in ((2, "validation"), (1, "test")):
        sets[name] = followed(known, movies, first, lasts - back).append_column("negatives", negatives)
    sets["train"] = sets["train"].replace_schema_metadata({"movies": ",".join(map(str, kept.tolist()))})
    return sets


def followed(users: np.ndarray, movies: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> pa.Table:
    """Returns a row for each user, of whom one may be there several times: the movies of a span, and the one after it."""
    spans = [movies[begin:end] for begin, end in zip(begins, ends, strict=True)]
    offsets = np.append(0, np.cumsum(ends - begins)).astype(np.int32)
    history = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(spans)))
    return pa.table({"user_id": users, "history": history, "item_id": movies[ends]})


def pieces(users: np.ndarray, movies: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> pa.Table:
    """Returns such rows of LONGEST movies at most: of a longer span the last ones, then what is before, cut the same way."""
    counts = -((begins - ends) // LONGEST)
    earlier = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.repeat(ends, counts) - LONGEST * earlier
    return followed(np.repeat(users, counts), movies, np.maximum(np.repeat(begins, counts), ends - LONGEST), ends)


def seconds_of(users: np.ndarray, places: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the second of each row as far as it can be told, NaN where it cannot.

    Rows between two of the same second are of that second, and so are those after a user's latest known one, which is the
    user's latest.

    Args:
        users: of each row; of all rows, before any is left out.
        places: whose order within a user is that of time.
        times: of each row, NaN where it is not known.
    """
    order = np.lexsort((places, users))
    users, times = users[order], np.asarray(times, dtype=np.float64)[order]
    index, is_known = np.arange(len(users)), ~np.isnan(times)
    before = np.maximum.accumulate(np.where(is_known, index, -1))
    after = np.minimum.accumulate(np.where(is_known, index, len(users))[::-1])[::-1]
    has_before, has_after = before >= 0, after < len(users)
    has_before[has_before] = users[before[has_before]] == users[has_before]
    has_after[has_after] = users[after[has_after]] == users[has_after]
    same = has_before & ~has_after
    both = has_before & has_after
    same[both] = times[before[both]] == times[after[both]]
    seconds = np.full(len(users), np.nan)
    seconds[order[same]] = times[before[same]]
    return seconds


def chronological(users: np.ndarray, places: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns the order of rows by user and time, those of the same second in an order drawn from SEED.

    Args:
        users: of each row.
        places: whose order within a user is that of time.
        seconds: of each row, NaN where the place alone counts.
    """
    order = np.lexsort((places, users))
    users, seconds = users[order], seconds[order]
    starts = np.append(True, (users[1:] != users[:-1]) | ~(seconds[1:] == seconds[:-1]))[: len(users)]
    drawn = np.random.default_rng(SEED).random(len(users))
    return order[np.lexsort((drawn, np.cumsum(starts)))]


def numbered(movies: pa.Table, sets: dict[str, pa.Table]) -> pa.Table:
    """Returns the movies that have a number, in order: item_id, movie_id, title, genres."""
    kept = pa.array([int(text) for text in sets["train"].schema.metadata[b"movies"].split(b",")], pa.int64())
    places = pc.index_in(kept, value_set=movies["movie_id"].cast(pa.int64()).combine_chunks())
    return movies.take(places).add_column(0, "item_id", pa.array(np.arange(len(kept))))


def read_movies(source: Path | None, downloads: Path) -> pa.Table:
    """Returns movie_id, title and genres of each movie."""
    if source:
        return pq.read_table(source / "movies.parquet", columns=["movie_id", "title", "genres"])
    with zipfile.ZipFile(fetch(RATINGS_ARCHIVE, downloads)) as archive:
        lines = [line.split("::") for line in archive.read("ml-1m/movies.dat").decode("latin-1").splitlines()]
    columns = {"movie_id": [int(line[0]) for line in lines], "title": [line[1] for line in lines]}
    return pa.table({**columns, "genres": [line[2].split("|") for line in lines]})


if __name__ == "__main__":
    main()
