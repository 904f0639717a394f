"""Exact top-k evaluation: the run's own ranking of the whole catalogue, beside the products of matrices that it needs."""

from __future__ import annotations

__all__ = ["ranking_measure"]

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from embedshard.bench.measure import Limit, Measure, Timer
from embedshard.config import parse_metric
from embedshard.data.columns import gather
from embedshard.evaluate.held_out import SPLITS, RetrievalSet
from embedshard.evaluate.lists import BLOCK_BYTES
from embedshard.evaluate.scores import DotProducts
from embedshard.train.assembly import Assembly

_PAIRS: Final = 2**27
"""Of a query and a candidate, that a pass scores at most."""


def ranking_measure(parts: Assembly, timer: Timer) -> Measure:
    """Measures ranking the catalogue for queries of the test set, else of the validation set."""
    name, what, evaluator = "exact top-k", "queries against the whole catalogue", parts.evaluator
    metrics = [metric for metric in parts.config.evaluate.metrics if parse_metric(metric).ranks]
    splits = [split for split in SPLITS if evaluator.has(split)]
    model = parts.model.module
    if not metrics or not splits:
        why = "the config has no metric that ranks" if not metrics else "the config has no held-out set"
        return Measure(name, what, not_applicable=why)
    found = evaluator.sets.ranked(splits[-1])
    if not isinstance(found, RetrievalSet):
        return Measure(name, what, not_applicable="the config ranks given candidates, not the catalogue")
    found = _first(found, max(1, _PAIRS // found.num_candidates))
    was_training = model.training
    model.eval()
    try:
        catalogue = evaluator.sets.catalogue
        candidate_ND = torch.cat(list(evaluator.encoded(model.encode_candidates, catalogue.columns, len(catalogue))))
        query_QD = torch.cat(list(evaluator.encoded(model.encode_queries, found.queries, len(found.users))))
    finally:
        model.train(was_training)
    beyond = candidate_ND.new_zeros(found.num_candidates - len(catalogue), candidate_ND.shape[1])
    candidate_ND = torch.cat([candidate_ND, beyond])
    scores = DotProducts(query_QD, candidate_ND)
    block = max(1, BLOCK_BYTES // (4 * found.num_candidates))
    out = torch.empty(min(block, len(query_QD)), found.num_candidates, device=query_QD.device)
    turned_DN = candidate_ND.T

    def multiply() -> None:
        for begin in range(0, len(query_QD), block):
            part_BD = query_QD[begin : begin + block]
            torch.mm(part_BD, turned_DN, out=out[: len(part_BD)])

    own, limit = timer.in_turns([(lambda: found.rank(scores, metrics, None), None), (multiply, None)])
    pairs = len(query_QD) * found.num_candidates
    return Measure(
        name,
        f"{len(query_QD):,} queries, {found.num_candidates:,} candidates, dim {query_QD.shape[1]}: {', '.join(metrics)}",
        "pairs",
        pairs,
        own,
        Limit("matrix product of the same vectors", pairs, limit),
        timer.peak_bytes,
    )


def _first(found: RetrievalSet, count: int) -> RetrievalSet:
    if count >= len(found.users):
        return found
    chosen = np.arange(count)
    return replace(
        found,
        queries=gather(found.queries, chosen, None),
        users=found.users[:count],
        relevant=found.relevant.pick(chosen),
        seen=None if found.seen is None else found.seen.pick(chosen),
    )
