"""What one replica holds: the live export, its metrics, and how the requests of a batch are answered. No HTTP, no Ray."""

from __future__ import annotations

__all__ = ["Answered", "Replica"]

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.metrics_core import Metric

from embedshard.serve.engine import Answer, ItemList, Question, Unknown
from embedshard.serve.live import LiveExport
from embedshard.serve.metrics import ServeMetrics
from embedshard.serve.settings import Settings


@dataclass(frozen=True)
class Answered:
    """The answers to a request, all of one export.

    Attributes:
        answers: in the order of its questions.
        step: of the export.
        digest: SHA-256 of its manifest.
    """

    answers: tuple[Answer, ...]
    step: int
    digest: str


class Replica:
    """A replica. What it is made with is loaded when it is made.

    Raises:
        EmbedshardError: if there is no export that can be served.

    Attributes:
        name: by which it is known among others.
        settings: what it was told.
        metrics: what it counts.
        live: what it serves.
        pending: requests that it is answering.
        is_ending: whether it takes no more requests.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self.name, self.settings = name, settings
        self.metrics = ServeMetrics()
        self.pending, self.is_ending = 0, False
        self.live = LiveExport(settings.out, settings.metadata, settings.poll_s, self.metrics.changed)

    def answer(self, requests: Sequence[Sequence[Question]]) -> list[Answered]:
        """Answers a batch of requests by what is served when it begins. One at a time: it has a thread of its own."""
        served, began = self.live.served, time.perf_counter()
        questions = [question for request in requests for question in request]
        answers = served.engine.answer(questions)
        answered, first = [], 0
        for request in requests:
            own = tuple(answers[first : first + len(request)])
            answered.append(Answered(own, served.engine.step, served.export.digest))
            first += len(request)
        self.metrics.batch_seconds.observe(time.perf_counter() - began)
        self.metrics.batch_requests.observe(len(requests))
        self.metrics.batch_questions.observe(len(questions))
        for answer in answers:
            if isinstance(answer, Unknown):
                self.metrics.unknown.labels(answer.what).inc()
            elif isinstance(answer, ItemList) and answer.unknown:
                self.metrics.unknown.labels("item").inc(len(answer.unknown))
        return answered

    def collect(self) -> list[Metric]:
        """Returns what it counts."""
        return self.metrics.collect(self.pending, self.live.refusal is not None)

    def health(self, shows_all: bool) -> dict[str, Any]:
        """Returns what is served, and what could not be; where things are and why only on request."""
        served, refusal = self.live.served, self.live.refusal
        brief = {
            "status": "ending" if self.is_ending else "ok",
            "replica": self.name,
            "step": served.engine.step,
            "manifest": served.export.digest,
            "written": served.export.written,
            "refused": None if refusal is None else {"manifest": refusal.digest, "at": refusal.at, "tries": refusal.tries},
        }
        if not shows_all:
            return brief
        return brief | {
            "refused": None if refusal is None else asdict(refusal),
            "export": served.export.folder.uri,
            "loaded_at": served.loaded_at,
            "users": served.engine.num_users,
            "items": served.engine.num_items,
            "trouble": self.live.trouble,
        }
