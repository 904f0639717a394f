"""Generates the data of a case: as Parquet for embedshard, as .npy for Keras, the same rows in the same order.

Ids follow Zipf's law. Each set has a planted signal, so that losses fall: words have a sentiment, users and items have
factors, neighbours and what is clicked share a topic.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cases import HELD_OUT_ROWS, NOISE_POOL, NOISE_POWER, PAIR_WINDOW, SENTENCE_LENGTH, TEXT_LENGTH

TOPICS, FACTORS = 50, 8


def zipf(generator, vocabulary, size):
    """Draws ids, 0 the most frequent, the k-th as often as 1 / k: by the inverse of its (continuous) distribution."""
    return (np.exp(generator.random(size) * np.log(vocabulary + 1)) - 1).astype(np.int64).clip(max=vocabulary - 1)


def of_topic(generator, topics, vocabulary):
    """Draws an id of each topic, which are the ids that leave that remainder."""
    return zipf(generator, vocabulary // TOPICS, len(topics)) * TOPICS + topics


def text_flatten(generator, vocabulary, rows):
    words = zipf(generator, vocabulary, (rows, TEXT_LENGTH))
    sentiment = generator.normal(size=vocabulary)
    score = sentiment[words].sum(axis=1) / np.sqrt(TEXT_LENGTH)
    label = score + generator.normal(scale=0.3, size=rows) > 0
    return {"words": words, "label": label.astype(np.float32)}


def user_item(generator, vocabulary, rows):
    users, items = zipf(generator, vocabulary, rows), zipf(generator, vocabulary, rows)
    user_factors, item_factors = (generator.normal(size=(vocabulary, FACTORS)) / FACTORS**0.25 for _ in range(2))
    rating = np.einsum("rf,rf->r", user_factors[users], item_factors[items]) + generator.normal(scale=0.3, size=rows)
    return {"user_id": users, "item_id": items, "rating": rating.astype(np.float32)}


def nce(generator, vocabulary, rows):
    topics = generator.integers(TOPICS, size=rows)
    return {"words": of_topic(generator, np.repeat(topics, SENTENCE_LENGTH), vocabulary).reshape(rows, SENTENCE_LENGTH)}


def two_tower(generator, vocabulary, rows):
    users = zipf(generator, vocabulary, rows)
    is_own = generator.random(rows) < 0.8
    topics = np.where(is_own, users % TOPICS, generator.integers(TOPICS, size=rows))
    return {"user_id": users, "item_id": of_topic(generator, topics, vocabulary)}


GENERATORS = {generate.__name__: generate for generate in (text_flatten, user_item, nce, two_tower)}


def generate(name, vocabulary, rows, folder, seed=0):
    """Writes the data of a case, unless they are there."""
    if (folder / "done").exists():
        return
    columns = GENERATORS[name](np.random.default_rng(seed), vocabulary, rows + HELD_OUT_ROWS)
    for part, span in (("train", slice(0, rows)), ("test", slice(rows, None))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for column, values in for_keras(name, {column: values[span] for column, values in columns.items()}).items():
            dtype = np.int32 if values.dtype == np.int64 else np.float32
            np.save(folder / part / f"{column}.npy", values.astype(dtype))
        table = pa.table({column: _arrow(values[span]) for column, values in columns.items()})
        pq.write_table(table, folder / part / "rows.parquet", row_group_size=65_536)
    if name == "nce":
        shares = np.bincount(columns["words"][:rows].ravel(), minlength=vocabulary) ** NOISE_POWER
        noise = shares / shares.sum()
        np.save(folder / "noise.npy", noise.astype(np.float32))
        np.save(
            folder / "drawn.npy", np.random.default_rng(seed + 1).choice(vocabulary, NOISE_POOL, p=noise).astype(np.int32)
        )
    (folder / "done").touch()


def for_keras(name, columns):
    """Returns the arrays that Keras reads: of sentences, the pairs of a centre and a context, sentence by sentence."""
    if name != "nce":
        return columns
    places = np.arange(SENTENCE_LENGTH)
    centres, contexts = np.nonzero((np.abs(places[:, None] - places) <= PAIR_WINDOW) & (places[:, None] != places))
    return {name: columns["words"][:, chosen].ravel() for name, chosen in (("centre", centres), ("context", contexts))}


def _arrow(values):
    if values.ndim == 1:
        return pa.array(values)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.ravel())
