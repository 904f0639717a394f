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
from typing import Any, Final

import ray
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
_FORGET_AFTER_S = 30.0
_BESIDE_S = 5.0
_BESIDE = 32  # health checks and scrapes, which are answered however much there is to do


class Board:
    """What replicas know of each other: their metrics, and how often a reload was asked for. One for all of them."""

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[float, list[Metric]]] = {}
        self._asked = 0

    async def exchange(self, replica: str, metrics: list[Metric]) -> int:
        """Takes a replica's metrics; returns how often a reload was asked for."""
        self._metrics[replica] = (time.monotonic(), metrics)
        return self._asked

    async def collect(self) -> dict[str, list[Metric]]:
        """Returns the metrics of the replicas that were heard of lately."""
        oldest = time.monotonic() - _FORGET_AFTER_S
        self._metrics = {name: entry for name, entry in self._metrics.items() if entry[0] >= oldest}
        return {name: metrics for name, (_, metrics) in self._metrics.items()}

    async def ask_reload(self) -> int:
        """Notes that a reload is asked for; returns how often it was."""
        self._asked += 1
        return self._asked


class ServedReplica:
    """A replica on Ray Serve: the app, over a thread that answers one batch after another.

    Args:
        settings: the service's.
        board: handle of the board.
    """

    def __init__(self, settings: dict[str, Any], board: Any) -> None:
        made = Settings.model_validate(settings)
        self.replica = Replica(made, serve.get_replica_context().replica_tag)
        self._board, self._asked = board, 0
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
        """Returns the metrics of all replicas, by their names; of the others, as they were about a second ago."""
        others: dict[str, list[Metric]] = await self._board.collect.remote()
        return {**others, self.replica.name: self.replica.collect()}

    async def reload(self) -> None:
        """Has all replicas look for a newer export at once."""
        await self._board.ask_reload.remote()

    def check_health(self) -> None:
        """Raises RuntimeError where Ray Serve is to start this replica again."""
        if not self.replica.live.is_watching:
            raise RuntimeError("the thread that looks for newer exports has ended")

    async def _exchange(self) -> None:
        while True:
            try:
                asked = await self._board.exchange.remote(self.replica.name, self.replica.collect())
                if asked != self._asked:  # after a new start of the board it may be fewer
                    self._asked = asked
                    if asked:
                        self.replica.live.look_soon()
            except Exception:  # the board is being started again: nothing but notes is on it
                await asyncio.sleep(_BESIDE_S)
            await asyncio.sleep(_EXCHANGE_S)

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
def serving(settings: Settings, host: str, port: int, num_cpus: int) -> Iterator[None]:
    """Serves on a Ray cluster of its own, on this machine, until the block ends; requests that are under way are answered.

    Args:
        settings: the service's.
        host: address to listen on.
        port: to listen on.
        num_cpus: that the cluster may give away.

    Raises:
        ConfigError: if the address cannot be listened on.
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
        options = {"host": host, "port": port, "request_timeout_s": settings.request_timeout_s}
        try:
            serve.start(http_options=options)
            serve.run(application(settings), name=NAME, route_prefix="/", logging_config={"enable_access_log": False})
        except Exception as error:  # Ray Serve raises plain ones
            raise ExportError(f"the service did not start. {_why(error)}") from error
        yield
    finally:
        serve_.shutdown()
        ray_.shutdown()


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
