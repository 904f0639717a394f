"""Every kind of model and objective on a device that is not the CPU: what a GPU runs, without one.

`tests/elsewhere.py` is the device: its tensors refuse those of the CPU and numpy, as CUDA's do, and code that asks is told
that it is on no CPU. So what a GPU goes through beyond its kernels and streams runs here, is refused where it mixes
devices, and must give what a CPU gives.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.conftest import merged
from tests.train.test_item_embedding import OBJECTIVES
from tests.train.test_item_embedding import make_tree as make_sentences
from tests.train.test_ranking_models import MODELS, clicks
from tests.train.test_ranking_models import make_tree as make_clicks
from tests.train.test_sasrec import tree as walks
from tests.train.test_text_classifier import make_tree as make_texts
from tests.two_devices import compare, refuses

__all__ = ["clicks", "make_clicks", "make_sentences", "make_texts", "walks"]

STEPS = 3
DRAWN = {"num_negatives": 16}
TOWERS = {
    "in_batch_softmax": {},
    "in_batch_softmax, hashed": {"objective": {"kind": "in_batch_softmax", "log_q_half_life_steps": 3, "log_q_buckets": 7}},
    "in_batch_softmax, local": {
        "objective": {"kind": "in_batch_softmax", "negatives": "local", "log_q": "off", "mask_accidental_hits": False}
    },
    "sampled_softmax": {"objective": {"kind": "sampled_softmax", **DRAWN}},
    "sampled_softmax, mixed": {
        "objective": {"kind": "sampled_softmax", "mixed": True, "mask_accidental_hits": False, **DRAWN}
    },
    "bpr": {"objective": {"kind": "bpr", **DRAWN}},
    "negative_sampling": {"objective": {"kind": "negative_sampling", **DRAWN}},
    "cosine_contrastive": {
        "objective": {"kind": "cosine_contrastive", **DRAWN},
        "model": {"similarity": "cosine", "biases": []},
    },
    "bce": {"objective": {"kind": "bce"}, "data": {"label": "clicked"}, "evaluate": {"metrics": ["auc", "ndcg@5"]}},
    "mse": {"objective": {"kind": "mse"}, "data": {"label": "rating"}, "evaluate": {"metrics": ["rmse"]}},
    "penalties, weights, clipping": {
        "tables": {"user": {"l2_lookup": 0.01}},
        "data": {"weight": "weight"},
        "optimizer": {"dense": {"kind": "adamw", "clip_norm": 0.5}},
    },
    "a sequence, pooled": {
        "features": {"history": {"kind": "sequence", "table": "item", "max_length": 4}},
        "model": {"user": {"features": ["user_id", "history"], "mlp": [8], "sequences": {"history": {"kind": "max"}}}},
    },
    "weighted bags": {"features": {"history": {"kind": "weighted_bag", "table": "item", "weights": "history_weight"}}},
    "quotient and remainder": {"tables": {"item": {"vocabulary": {"kind": "quotient_remainder", "ids": 30}, "rows": None}}},
    "managed": {
        "tables": {"item": {"rows": 20, "vocabulary": {"kind": "managed"}}},
        "objective": {"kind": "bce"},
        "data": {"label": "clicked"},
        "evaluate": {"metrics": ["auc"]},
    },
    "replicated": {"tables": {"user": {"sharding": {"types": ["data_parallel"]}}}},
}


@pytest.fixture(scope="module")
def elsewhere():
    """A function that runs a function of `tests/two_devices.py` in a process that has the other device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda run, *given: pool.submit(run, *given).result()


@pytest.mark.parametrize("case", TOWERS)
def test_two_towers(elsewhere, make_config, case):
    elsewhere(compare, make_config(TOWERS[case]).tree, STEPS)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [(kind, {"dlrm": "batch", "mmoe": "layer"}.get(kind, "none")) for kind in MODELS],
)
def test_ranking_models(elsewhere, make_clicks, kind, norm):
    tree = make_clicks({**MODELS[kind], "norm": norm, "dropout": 0.3, "user_id": "user"})
    tree["train"] |= {"metrics": ["auc", "gauc", "log_loss"], "log_every_steps": 100}
    tree["evaluate"] = {"metrics": ["auc", "gauc", "log_loss"], "bootstrap": 5, "slice_by": ["shop"]}
    elsewhere(compare, tree, STEPS)


def test_sasrec(elsewhere, walks):
    elsewhere(compare, merged(walks, {"model": {**walks["model"], "dropout": 0.3}}), STEPS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_item_embeddings(elsewhere, make_sentences, objective):
    elsewhere(compare, make_sentences(objective), STEPS)
    if objective != "hierarchical_softmax":
        elsewhere(compare, make_sentences(objective, by_side=True), STEPS)


@pytest.mark.parametrize(
    ("encoder", "objective"),
    [
        ("mean", {"kind": "bce"}),
        ("max", {"kind": "bce"}),
        ("attention", {"kind": "cross_entropy", "classes": 3}),
        ({"kind": "flatten"}, {"kind": "bce"}),
        ({"kind": "conv", "channels": 4}, {"kind": "bce"}),
    ],
    ids=str,
)  # fmt: skip
def test_text_classifiers(elsewhere, make_texts, encoder, objective):
    """But for `gru` and `lstm`: off the CPU torch takes kernels for these that a CPU has not."""
    elsewhere(compare, make_texts(encoder, objective=objective, features=["user", "age"]), STEPS)


def test_a_tensor_that_is_forgotten_on_the_cpu_is_found(elsewhere, make_config):
    elsewhere(refuses, make_config().tree)
