"""Replays held-out users through what was exported alone, and says how far that is from the run, loss by loss.

What is compared: the scores of exported vectors with the model's; the run's metrics with those of the exported vectors,
ranked exactly; and what the index, and vectors of fewer bits, lose of the exact lists.

Shapes: Q queries, N items, D dim, K length of the lists.
"""

from __future__ import annotations

__all__ = [
    "INDEX_TOLERANCE",
    "LEAST_K",
    "METRIC_TOLERANCE",
    "MOST_LISTS",
    "MOST_SCORED",
    "SCORE_TOLERANCE",
    "Verification",
    "compare_lists",
    "prepare",
    "spread",
    "verify",
]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config import parse_metric
from embedshard.data.columns import Columns, gather
from embedshard.evaluate.held_out import GivenSet, RankedSet, RetrievalSet, Split
from embedshard.evaluate.jagged import JaggedIds
from embedshard.evaluate.lists import topk
from embedshard.evaluate.scores import DotProducts
from embedshard.export.index import load_index, look_up
from embedshard.export.read import rows_of, seen_by, vector_blocks, vectors_of
from embedshard.storage import Location

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

METRIC_TOLERANCE: Final = 1e-3
"""How far a metric may be from the run's: near ties that batches of another size round otherwise."""
INDEX_TOLERANCE: Final = 0.05
"""Which share of the exact lists the index may miss."""
SCORE_TOLERANCE: Final = 1e-4
"""Of scores, relative where they are above 1."""
MOST_LISTS: Final = 2000
"""Of so many users, at even distances, lists are compared."""
MOST_SCORED: Final = 256
"""Of so many, scores are."""
_TIE: Final = 1e-6
"""Scores that are as near as this, relative where they are above 1, are as good as each other."""
LEAST_K: Final = 10
"""Length of the lists that are compared, at least."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        split: whose users were replayed; `items` where there are no users and items asked for those near them.
        queries: how many.
        against: what the metrics are compared with: the run's result.json, or the model evaluated now; of items their
            vectors, the checkpoint's.
        tolerances: `metric`, `score` (relative where scores are above 1) and `recall` (lost by the index).
        score_error: the largest difference between a score of the model and one of the exported vectors.
        metrics: by name the `run` and the `export`.
        k: length of the lists that are compared.
        index: `kind`, and the `recall` of the exact lists; `recall_lost` is the rest.
        quantised: the same of vectors in fewer bits, by their name; of tables also the largest `score_error`, through the
            towers. They are reported, not judged.
        problems: what is out of tolerance.
    """

    split: Split | Literal["items"]
    queries: int
    against: str
    tolerances: dict[str, float]
    score_error: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    k: int = LEAST_K
    index: dict[str, Any] = field(default_factory=dict)
    quantised: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is out of tolerance."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {"passed": self.passed, **asdict(self)}


def prepare(ranked: RankedSet) -> tuple[RankedSet, bool]:
    """Returns a held-out set with one query a user, since an export has one vector of each, and whether it was so before."""
    if isinstance(ranked, RetrievalSet) or (len(ranked.users) and (ranked.users < 0).all()):  # or nobody is named
        return ranked, True
    known = np.flatnonzero(ranked.users >= 0)
    _, first = np.unique(ranked.users[known], return_index=True)
    chosen = np.sort(known[first]).astype(np.int64)
    if len(chosen) == len(ranked.users):
        return ranked, True
    return GivenSet(
        queries=gather(ranked.queries, chosen, None),
        users=ranked.users[chosen],
        positive=ranked.positive[chosen],
        negatives=ranked.negatives.pick(chosen),
        num_candidates=ranked.num_candidates,
    ), False


def verify(
    split: Split,
    ranked: RankedSet,
    metrics: Sequence[str],
    expected: Mapping[str, float] | None,
    encode: Callable[[str], torch.Tensor],
    users: Location | Callable[[Columns], FloatArray],
    items: Location,
    seen: Location | None,
    index: tuple[str, Location],
    quantised: Mapping[str, Callable[[], FloatArray]],
    tables: Mapping[str, Callable[[Columns], tuple[FloatArray, FloatArray]]] = MappingProxyType({}),
    metric_tolerance: float = METRIC_TOLERANCE,
    index_tolerance: float = INDEX_TOLERANCE,
) -> Verification:
    """Replays a held-out set.

    Args:
        split: which set.
        ranked: as `prepare` returns it.
        metrics: names of ranking metrics.
        expected: the run's own metrics of the same queries; None measures the model now.
        encode: returns the model's vectors of `queries` or of `candidates`, in the order of the set and the catalogue.
        users: the file of users' vectors; where no feature names the user, what makes the queries' of their columns.
        items: that of items' vectors.
        seen: that of what users have met; None where nothing is left out.
        index: its kind and file.
        quantised: return the items' vectors as their files give them back, by name.
        tables: of tables in fewer bits, by name, return what the towers make of queries and of the whole catalogue.
        metric_tolerance: how far a metric may be from the run's.
        index_tolerance: which share of the exact lists the index may miss.
    """
    parsed = [parse_metric(name) for name in metrics]
    k = max([LEAST_K, *(metric.k for metric in parsed if metric.k is not None)])
    found = Verification(
        split, len(ranked.users), "the model" if expected is None else "result.json",
        {"metric": metric_tolerance, "score": SCORE_TOLERANCE, "recall": index_tolerance}, k=k,
    )  # fmt: skip
    if isinstance(users, Location):
        query_QD, has_vector = vectors_of(users, ranked.users)
    else:
        query_QD, has_vector = users(ranked.queries), np.ones(len(ranked.users), dtype=np.bool_)
    if not has_vector.all():
        found.problems.append(
            f"{int((~has_vector).sum())} of {len(has_vector)} users of the {split} set have no exported vector"
        )
        return found
    item_ND, item_rows = np.concatenate(list(vector_blocks(items))), rows_of(items)
    model_QD, model_ND = encode("queries").float().cpu(), encode("candidates").float().cpu()
    if model_ND.shape != item_ND.shape or model_QD.shape != query_QD.shape:
        found.problems.append(f"{item_ND.shape[0]} items of {item_ND.shape[1]} numbers were exported, the model has others")
        return found
    _compare_scores(found, torch.from_numpy(query_QD), torch.from_numpy(item_ND), model_QD, model_ND)
    exported = ranked
    if seen is not None and isinstance(ranked, RetrievalSet):
        exported = replace(ranked, seen=seen_by(seen, ranked.users, item_rows))
    replayed = _rank(exported, torch.from_numpy(query_QD), torch.from_numpy(item_ND), metrics)
    reference = _rank(ranked, model_QD, model_ND, metrics) if expected is None else expected
    for name in metrics:
        ours, theirs = replayed[name], reference[name]
        found.metrics[name] = {"run": theirs, "export": ours}
        if abs(ours - theirs) > metric_tolerance or math.isnan(ours) != math.isnan(theirs):
            found.problems.append(f"{name} is {ours:.6f}, the run's {theirs:.6f}; they may differ by {metric_tolerance:g}")
    chosen = spread(len(query_QD), MOST_LISTS)
    hidden = None if seen is None else seen_by(seen, ranked.users[chosen], item_rows)
    encoded = {name: partial(encode_both, gather(ranked.queries, chosen, None)) for name, encode_both in tables.items()}
    compare_lists(found, query_QD[chosen], item_ND, hidden, index, quantised, encoded, index_tolerance)
    return found


def _rank(ranked: RankedSet, query_QD: torch.Tensor, item_ND: torch.Tensor, metrics: Sequence[str]) -> dict[str, float]:
    beyond = item_ND.new_zeros(ranked.num_candidates - len(item_ND), item_ND.shape[1])
    candidates = torch.cat([item_ND, beyond]) if len(beyond) else item_ND
    return ranked.rank(DotProducts(query_QD, candidates), list(metrics), None).result()


def _compare_scores(
    found: Verification, query_QD: torch.Tensor, item_ND: torch.Tensor, model_QD: torch.Tensor, model_ND: torch.Tensor
) -> None:
    """Notes the largest difference of a score, over some users and all items."""
    chosen = torch.from_numpy(spread(len(query_QD), MOST_SCORED))
    largest = 0.0
    for query in chosen.tolist():
        ours, theirs = item_ND @ query_QD[query], model_ND @ model_QD[query]
        if len(theirs):
            found.score_error = max(found.score_error, float((ours - theirs).abs().max()))
            largest = max(largest, float(theirs.abs().max()))
    allowed = SCORE_TOLERANCE * max(1.0, largest)
    if not found.score_error <= allowed:
        found.problems.append(f"a score is off by {found.score_error:.2e}; allowed are {allowed:.2e}")


def compare_lists(
    found: Verification,
    queries: FloatArray,
    item_ND: FloatArray,
    hidden: JaggedIds | None,
    index: tuple[str, Location],
    quantised: Mapping[str, Callable[[], FloatArray]],
    tables: Mapping[str, Callable[[], tuple[FloatArray, FloatArray]]],
    index_tolerance: float,
) -> None:
    """Notes how much of the exact lists other ways of looking find. Lists are as `recommend` makes them.

    Args:
        found: where it is noted; its `k` is the lists' length.
        queries: (Q, D).
        item_ND: of all items.
        hidden: places that each query's list may not hold.
        index: its kind and file.
        quantised: return the items' vectors as their files give them back, by name.
        tables: of tables in fewer bits, by name, return the vectors of the queries and of all items.
        index_tolerance: which share of the exact lists the index may miss.
    """
    recall_of = partial(_recall, queries, item_ND, *_exact(queries, item_ND, found.k, hidden))
    kind, place = index
    places, _ = look_up(load_index(place), queries, found.k, hidden)
    found.index = {"kind": kind, **recall_of(places)}
    if found.index["recall_lost"] > index_tolerance:
        found.problems.append(
            f"the {kind} index misses {found.index['recall_lost']:.2%} of the exact lists of {found.k}; allowed are "
            f"{index_tolerance:.2%}"
        )
    for name, load in quantised.items():
        found.quantised[name] = recall_of(_exact(queries, load(), found.k, hidden)[0])
    for name, encode in tables.items():
        coarse_QD, coarse_ND = encode()
        scored = spread(len(queries), MOST_SCORED).tolist()
        errors = [float(np.abs(coarse_ND @ coarse_QD[i] - item_ND @ queries[i]).max(initial=0.0)) for i in scored]
        recall = recall_of(_exact(coarse_QD, coarse_ND, found.k, hidden)[0])
        found.quantised[name] = recall | {"score_error": max(errors, default=0.0)}


def _exact(queries: FloatArray, item_ND: FloatArray, k: int, hidden: JaggedIds | None) -> tuple[IntArray, Any]:
    return topk(DotProducts(torch.from_numpy(queries), torch.from_numpy(item_ND)), k, hidden)


def _recall(
    query_QD: FloatArray, item_ND: FloatArray, exact: IntArray, scores: FloatArray, places: IntArray
) -> dict[str, float]:
    """Returns which share of what the exact lists hold the others hold too, or items that score as high as their last."""
    wanted, hits = int((exact >= 0).sum()), 0
    for query_D, row, its_scores, other in zip(query_QD, exact, scores, places, strict=True):
        if not (count := int((row >= 0).sum())):
            continue
        last = float(its_scores[count - 1])
        found = item_ND[other[other >= 0]] @ query_D >= last - _TIE * max(1.0, abs(last))
        hits += min(count, int(found.sum()))
    recall = hits / wanted if wanted else 1.0
    return {"recall": recall, "recall_lost": 1.0 - recall}


def spread(count: int, most: int) -> IntArray:
    """Returns places at even distances among so many, all of them or the most that are wanted."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).astype(np.int64))
