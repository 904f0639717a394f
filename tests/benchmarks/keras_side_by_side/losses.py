"""The loss of held-out rows from the weights alone, in NumPy: the same sums for whichever program trained them.

A function of the model's name takes a reader of weights (by the names of embedshard's checkpoints) and the columns of
the rows; for `nce` the law of the noise is among them.
"""

import numpy as np
from cases import PAIR_NEGATIVES, TOWER_TEMPERATURE

TOWER_BATCH = 1_024
HELD_OUT_PAIRS = 200_000


def softplus(values):
    return np.logaddexp(0.0, values)


def layer(weights, name, vectors):
    return vectors @ weights(f"dense/{name}.weight").T + weights(f"dense/{name}.bias")


def text_flatten(weights, rows):
    vectors = weights("tables/word/weight")[rows["words"]].reshape(len(rows["words"]), -1)
    logits = layer(weights, "head.2", np.maximum(layer(weights, "head.0", vectors), 0.0))[:, 0]
    return float(np.mean(softplus(logits) - rows["label"] * logits))


def user_item(weights, rows):
    """Is infinite where the training diverged."""
    users, items = weights("tables/user/weight")[rows["user_id"]], weights("tables/item/weight")[rows["item_id"]]
    with np.errstate(over="ignore", invalid="ignore"):
        loss = float(np.mean((np.einsum("rd,rd->r", users, items) - rows["rating"]) ** 2))
    return loss if np.isfinite(loss) else float("inf")


def nce(weights, rows):
    table, context, bias = (weights(f"tables/{name}/weight") for name in ("word", "words:context", "words:context:bias"))
    noise = rows["noise"]
    drawn = np.random.default_rng(0).choice(len(noise), PAIR_NEGATIVES, p=noise / noise.sum())
    with np.errstate(divide="ignore"):  # an id that was never seen in training is never noise: its loss is 0
        correction = np.log(PAIR_NEGATIVES * noise)
    centres, contexts = rows["centre"][:HELD_OUT_PAIRS], rows["context"][:HELD_OUT_PAIRS]
    own = np.einsum("pd,pd->p", table[centres], context[contexts]) + bias[contexts, 0] - correction[contexts]
    others = table[centres] @ context[drawn].T + bias[drawn, 0] - correction[drawn]
    return float(np.mean(softplus(-own) + softplus(others).sum(axis=1)))


def two_tower(weights, rows):
    vectors = []
    for side in ("user", "item"):
        looked_up = weights(f"tables/{side}/weight")[rows[f"{side}_id"]]
        hidden = np.maximum(layer(weights, f"{side}_tower.mlp.0", looked_up), 0.0)
        vectors.append(layer(weights, f"{side}_tower.mlp.2", hidden).reshape(-1, TOWER_BATCH, hidden.shape[1] // 2))
    logits = np.einsum("bud,bid->bui", *vectors) / TOWER_TEMPERATURE
    own = np.einsum("buu->bu", logits)
    most = logits.max(axis=2)
    return float(np.mean(np.log(np.exp(logits - most[:, :, None]).sum(axis=2)) + most - own))


LOSSES = {loss.__name__: loss for loss in (text_flatten, user_item, nce, two_tower)}
