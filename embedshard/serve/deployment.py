"""The service on Ray Serve: replicas that answer HTTP and batch what comes together, and a board where they leave notes.

`build` is what a RayService or `serve deploy` names as its import path.
"""

from __future__ import annotations

__all__ = ["NAME", "application", "build", "serving"]

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
import torch
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from pydantic import ValidationError
from ray import serve

from embedshard.errors import ConfigError, ExportError
from embedshard.serve.app import build_app
from embedshard.serve.engine import Question
from embedshard.serve.replica import Answered, Replica
from embedshard.serve.settings import Settings, token_digests
from embedshard.world import process_environment

NAME: Final = "embedshard"
"""Of the application on Ray Serve."""

_EXCHANGE_S = 1.0
_HURRY_S = 0.1
_FORGET_AFTER_S = 10.0
_BESIDE_S = 5.0
_BESIDE = 32  # health checks and scrapes, which are answered however much there is to do


@dataclass(frozen=True)
class Orders:
    """What is asked of all replicas.

    Attributes:
        reloads: how often a reload was asked for.
        ends: whether no more requests are to be taken.
    """

    reloads: int = 0
    ends: bool = False


@dataclass(frozen=True)
class Note:
    """What a replica tells of itself.

    Attributes:
        replica: its name.
        metrics: what it counts.
        pending: requests that it is answering.
        is_ending: whether it takes no more.
        made: when, by the replica's clock.
        at: when it was told, by the board's clock.
    """

    replica: str
    metrics: list[Metric]
    pending: int
    is_ending: bool
    made: float
    at: float = 0.0


class Board:
    """What replicas know of each other: their metrics, and what was asked of all. One for all of them."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}
        self._orders = Orders()

    async def exchange(self, note: Note) -> Orders:
        """Takes what a replica tells; returns what is asked of it."""
        self._take(note)
        return self._orders

    async def collect(self, note: Note) -> dict[str, list[Metric]]:
        """Takes what a replica tells; returns the metrics of those that were heard of lately, which it now is."""
        self._take(note)
        return {name: note.metrics for name, note in self._notes.items()}

    async def ask_reload(self) -> None:
        """Asks all replicas to look for a newer export."""
        self._orders = replace(self._orders, reloads=self._orders.reloads + 1)

    async def end(self) -> int:
        """Asks all replicas to take no more requests; returns how many have not done so, or still answer some."""
        self._orders = replace(self._orders, ends=True)
        self._forget()
        return sum(not note.is_ending or note.pending > 0 for note in self._notes.values())

    def _take(self, note: Note) -> None:
        """Keeps a note unless a later one of its replica came before it: calls may overtake each other."""
        known = self._notes.get(note.replica)
        if known is None or known.made <= note.made:
            self._notes[note.replica] = replace(note, at=time.monotonic())
        self._forget()

    def _forget(self) -> None:
        """Forgets replicas that were not heard of for several exchanges: they are dead, and would be waited for."""
        oldest = time.monotonic() - _FORGET_AFTER_S
        self._notes = {name: note for name, note in self._notes.items() if note.at >= oldest}


class ServedReplica:
    """A replica on Ray Serve: the app, over a thread that answers one batch after another.

    Args:
        settings: the service's.
        board: handle of the board.
    """

    def __init__(self, settings: dict[str, Any], board: Any) -> None:
        made = Settings.model_validate(settings)
        torch.set_num_threads(1)  # a user's program is small: `cpus_per_replica` are for the searches
        self.replica = Replica(made, serve.get_replica_context().replica_tag)
        self._board, self._orders = board, Orders()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._batched: Callable[[Sequence[Question]], Any] = serve.batch(
            max_batch_size=made.max_batch, batch_wait_timeout_s=made.batch_wait_ms / 1000
        )(self._answer)
        self.replica.live.start()
        self._exchanging = asyncio.get_running_loop().create_task(self._exchange())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self)

    async def _answer(self, requests: list[Sequence[Question]]) -> list[Answered]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.replica.answer, requests)

    async def ask(self, questions: Sequence[Question]) -> Answered:
        """Returns the answers to a request, batched with others."""
        answered: Answered = await self._batched(questions)
        return answered

    async def collect(self) -> dict[str, list[Metric]]:
        """Returns the metrics of all replicas, by their names; of the others, as they were about a second ago.

        Its own go by the board too: the next page may be another replica's, and no count of it may be less than on this
        one, which Prometheus takes for a replica that began anew.
        """
        metrics: dict[str, list[Metric]] = await self._board.collect.remote(self._note())
        return metrics

    async def reload(self) -> None:
        """Has all replicas look for a newer export at once."""
        await self._board.ask_reload.remote()

    def check_health(self) -> None:
        """Raises RuntimeError where Ray Serve is to start this replica again."""
        if not self.replica.live.is_watching:
            raise RuntimeError("the thread that looks for newer exports has ended")

    def _note(self) -> Note:
        replica = self.replica
        return Note(replica.name, replica.collect(), replica.pending, replica.is_ending, made=time.monotonic())

    async def _exchange(self) -> None:
        while True:
            replica = self.replica
            try:
                orders: Orders = await self._board.exchange.remote(self._note())
                replica.is_ending = replica.is_ending or orders.ends
                if orders.reloads > self._orders.reloads:
                    replica.live.look_soon()
                self._orders = orders
            except Exception:  # the board is being started again: nothing but notes is on it
                await asyncio.sleep(_BESIDE_S)
            await asyncio.sleep(_HURRY_S if self.replica.is_ending else _EXCHANGE_S)

    async def __del__(self) -> None:
        """Ends what it started."""
        self._exchanging.cancel()
        await asyncio.to_thread(self.replica.live.stop)
        self._thread.shutdown(wait=False)


def application(settings: Settings) -> Any:
    """Returns the service as an application of Ray Serve."""
    quiet = {"enable_access_log": False}
    board = serve.deployment(
        name="board", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, logging_config=quiet
    )(Board)
    threads = str(max(1, int(settings.cpus_per_replica)))
    replicas = serve.deployment(
        name="replica",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_pending + _BESIDE,
        max_queued_requests=settings.max_pending + _BESIDE,
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}},
        },
        logging_config=quiet,
    )(serve.ingress()(ServedReplica))
    return replicas.bind(settings.model_dump(mode="json"), board.bind())


def build(args: dict[str, Any]) -> Any:
    """Returns the service for `serve deploy` and RayService.

    Args:
        args: `out`, and what else `Settings` has; `token_file` names a file that holds a token a line. Without it the token
            is in the environment; `no_token: true` says that none is wanted.

    Raises:
        ConfigError: if there is no token, or a setting is not one.
    """
    given = dict(args)
    token_file, is_open = given.pop("token_file", None), bool(given.pop("no_token", False))
    digests = () if is_open else token_digests(token_file, process_environment())
    if not digests and not is_open:
        raise ConfigError("no token: give token_file, put one into EMBEDSHARD_SERVE_TOKEN, or say no_token: true.")
    try:
        settings = Settings(**given, token_digests=digests)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "args"
        raise ConfigError(f"{where}: {detail['msg']}; it was {detail['input']!r}.") from error
    return application(settings)


@contextmanager
def serving(
    settings: Settings, host: str, port: int, num_cpus: int, has_cluster: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Serves on a Ray cluster of its own, on this machine, until the block ends; requests that are under way are answered.

    Args:
        settings: the service's.
        host: address to listen on.
        port: to listen on.
        num_cpus: that the cluster may give away.
        has_cluster: is called when the cluster is there, and Ray has taken the signals.

    Raises:
        ExportError: if the replicas do not start.
    """
    ray_: Any = ray  # some of it has no types, some types that are too narrow
    serve_: Any = serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
        object_store_memory=100 * 2**20, _system_config={"worker_niceness": 0},
    )  # fmt: skip
    try:
        has_cluster()
        options = {"host": host, "port": port, "request_timeout_s": settings.request_timeout_s}
        try:
            serve.start(http_options=options)
            serve.run(application(settings), name=NAME, route_prefix="/", logging_config={"enable_access_log": False})
        except Exception as error:  # Ray Serve raises plain ones
            raise ExportError(f"the service did not start. {_why(error)}") from error
        yield
        _end_requests(settings.request_timeout_s)
    finally:
        serve_.shutdown()
        ray_.shutdown()


def _end_requests(timeout_s: float) -> None:
    """Has all replicas take no more requests, and waits until theirs are answered: Ray Serve would drop them."""
    board, until = serve.get_deployment_handle("board", NAME), time.monotonic() + timeout_s
    while board.end.remote().result(timeout_s=timeout_s) and time.monotonic() < until:
        time.sleep(_HURRY_S)
    time.sleep(_EXCHANGE_S)  # the last answers are on their way through the proxy


def _why(error: Exception) -> str:
    """Returns what Ray Serve knows of an application that did not start."""
    try:
        found = serve.status().applications.get(NAME)
    except Exception:  # Ray itself is gone
        found = None
    told = [] if found is None else [found.message, *(one.message for one in found.deployments.values())]
    lines = [line.strip() for text in told for line in text.splitlines()]
    own = [line for line in lines if "Error: " in line]
    return own[-1] if own else str(error)
