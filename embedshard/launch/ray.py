"""Runs a training as workers of Ray Train, and shows in the driver what one process would show.

The workers train as they do everywhere; Ray Train starts them, notices who died, and starts them again, fewer if it must.
Each start goes on from the run's newest intact checkpoint: Ray's own checkpoints are not used. The driver does no tensor
work. It and the workers talk through a board, an actor on the driver's node: what a person should see, what went wrong,
and whether to stop.

Errors that a new start would meet again, which is all that Python raises but the operating system's and those of a lost
peer, end the run at once; deaths of workers and nodes are followed by a new start.
"""

from __future__ import annotations

__all__ = ["RayRequest", "train_on_ray", "work_on_ray"]

import errno
import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from embedshard.config import variables
from embedshard.data.order import largest_world, worlds_that_fit
from embedshard.errors import (
    CheckpointError,
    ConfigError,
    EmbedshardError,
    PeerError,
    PlanError,
    StorageError,
    TrainingError,
)
from embedshard.launch.local import load_run_config, open_run, train_in
from embedshard.launch.ray_metrics import RayMetricsReporter
from embedshard.launch.ray_shared import Board, begin_work
from embedshard.launch.request import TrainRequest
from embedshard.sharding.recorded import RecordedPlan, read_plan
from embedshard.train.loop import TrainResult
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import ConsoleReporter, Reporter, Reporters
from embedshard.world import CUBLAS_WORKSPACE, TIMEOUT, open_world, process_environment, shrink_world

if TYPE_CHECKING:
    from embedshard.data.quarantine import BadRowCounts

_POLL_S: Final = 0.2
_TELL_EVERY_S: Final = 0.3
_STARTS: Final = 3
_LEAVING_S: Final = 10.0
"""How long workers have to end by themselves after one of them has told why it failed."""
_LASTING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)
_DEFAULTS: Final = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else relative paths of configs mean something else
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_ELASTIC_DEFAULTS: Final = {
    # Right after a node is lost, Ray still counts what it had, and starts as many workers as before: they wait for a place
    # that is not there. After so long they are started anew, as many as there is place for.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


@dataclass(frozen=True)
class RayRequest:
    """How a run is spread over a Ray cluster.

    Attributes:
        least: workers without which it does not train.
        most: workers it wants.
        address: of the cluster; `auto` finds one; None: RAY_ADDRESS, else a local cluster is started and stopped.
        cpus_per_worker: CPUs that a worker reserves.
        max_failures: deaths of workers or nodes after each of which the run is started again.
    """

    least: int
    most: int
    address: str | None = None
    cpus_per_worker: float = 1.0
    max_failures: int = 3


def train_on_ray(
    request: TrainRequest, spread: RayRequest, environment: MutableMapping[str, str], console: Console
) -> TrainResult:
    """Trains a config, or continues a run, on a Ray cluster, and tells where the result lies.

    Args:
        request: what is trained.
        spread: on how many workers of which cluster.
        environment: gives configs their `${VAR}`, and Ray its settings where they are not set.
        console: where progress is shown.

    Raises:
        EmbedshardError: what a user can act on.
    """
    is_elastic = spread.least < spread.most
    for name, value in (_DEFAULTS | (_ELASTIC_DEFAULTS if is_elastic else {})).items():
        environment.setdefault(name, value)
    ray = _import_ray()
    request = request.resolved()
    loaded = load_run_config(request, environment)
    lanes = loaded.config.data.lanes
    if spread.least == spread.most and lanes % spread.most:
        fitting = ", ".join(str(size) for size in worlds_that_fit(lanes))
        raise ConfigError(
            f"--workers {spread.most}: they cannot share data.lanes={lanes} lanes evenly. Use one of {fitting}, a range "
            f"such as 1:{spread.most}, or other lanes (96 fits 1, 2, 3, 4, 6, 8, ...)."
        )
    plan = _plan(request, spread)
    teller = ConsoleReporter(console, loaded.config.train.log_every_steps)
    run = RunDirectory(open_run(request, environment, Reporter())[0]).folder.address
    needed = {name: environment[name] for name in variables(loaded.tree) if name in environment}
    with _cluster(ray, spread, environment):
        teller.said(_what_starts(spread, ray.cluster_resources()))
        board = _start_board(ray)
        work = {"run": run, "device": request.device, "environment": needed, "board": board, "lanes": lanes}
        work["plan"], work["poll_s"] = None if plan is None else plan.to_json(), request.poll_s
        trainer = _trainer(spread, request.device, run, work, ray.cluster_resources())
        return _follow(ray, trainer, board, teller)


def _plan(request: TrainRequest, spread: RayRequest) -> RecordedPlan | None:
    if request.plan is None:
        return None
    plan = read_plan(request.plan)
    if (spread.least, spread.most) != (plan.workers, plan.workers):
        asked = f"{spread.most}" if spread.least == spread.most else f"{spread.least}:{spread.most}"
        raise PlanError(
            f"{request.plan} is a plan for {plan.workers} workers, and --workers is {asked}. Use --workers {plan.workers}, "
            f"or leave --plan out: each start of the run then plans for the workers that it has."
        )
    return plan


def _what_starts(spread: RayRequest, resources: Mapping[str, float]) -> str:
    wanted = f"{spread.most}" if spread.least == spread.most else f"{spread.least} to {spread.most}"
    cpus, needed = resources.get("CPU", 0), spread.least * spread.cpus_per_worker
    waits = f" They need {needed:g}: it waits until the cluster has them." if cpus < needed else ""
    return f"Starts {wanted} workers on a Ray cluster of {cpus:g} CPUs and {resources.get('GPU', 0):g} GPUs.{waits}"


def _import_ray() -> Any:
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise ConfigError(
            f"--launcher ray needs Ray, which cannot be imported here ({error}). Install it: pip install 'embedshard[ray]'."
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any, spread: RayRequest, environment: Mapping[str, str]) -> Iterator[None]:
    """Joins the cluster, or starts a local one, and leaves or stops it."""
    address = spread.address or ("auto" if environment.get("RAY_ADDRESS") else "local")
    options: dict[str, Any] = {}
    if address == "local":
        # The workers of a laptop may be more than its cores: they share them.
        options["num_cpus"] = max(os.cpu_count() or 1, int(spread.most * spread.cpus_per_worker + 0.999))
        options["include_dashboard"] = False
    for attempt in range(_STARTS):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING", **options)
            break
        except ConnectionError as error:
            raise ConfigError(
                f"--ray-address {address}: no Ray cluster answers there ({str(error).splitlines()[0]}). Start one with "
                f"'ray start --head', give its address, or leave --ray-address out for a local cluster."
            ) from error
        except Exception as error:  # Ray raises plain ones, such as after the 30 s that it gives a busy machine
            ray.shutdown()
            if attempt + 1 == _STARTS:
                raise TrainingError(
                    f"Ray did not start here in {_STARTS} tries: {error} Its logs are in /tmp/ray/session_latest/logs."
                ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _trainer(spread: RayRequest, device: str, run: str, work: dict[str, Any], resources: Mapping[str, float]) -> Any:
    train: Any = importlib.import_module("ray.train")
    torch: Any = importlib.import_module("ray.train.torch")
    use_gpu = device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) > 0)
    work["device"] = "cuda" if use_gpu else "cpu"
    threads = str(max(1, int(spread.cpus_per_worker)))
    return torch.TorchTrainer(
        begin_work,
        train_loop_config=work,
        torch_config=torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        scaling_config=train.ScalingConfig(
            num_workers=spread.most if spread.least == spread.most else (spread.least, spread.most),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": spread.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=train.RunConfig(
            name=f"start-{time.time_ns()}",  # a name that was used would make Ray continue that start
            storage_path=f"{run}/ray",
            failure_config=train.FailureConfig(max_failures=spread.max_failures),
            worker_runtime_env={
                "env_vars": {
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "OMP_NUM_THREADS": threads,
                    "CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE,
                }
            },
        ),
    )


# ---------------------------------------------------------------------------------------------------------- the driver
def _follow(ray: Any, trainer: Any, board: Any, teller: Reporter) -> TrainResult:
    """Shows what the workers tell until they are done; passes signals on."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with _asking_to_stop(board):
        thread.start()
        failed_at: float | None = None
        while thread.is_alive():
            thread.join(_POLL_S)
            events, failure = ray.get([board.take.remote(), board.failure.remote()])
            _show(events, teller)
            failed_at = failed_at or (None if failure is None else time.monotonic())
            if failed_at is not None and time.monotonic() - failed_at > _LEAVING_S:
                break  # others wait for the one that failed in a collective that it will not join: they end with the driver
    _show(ray.get(board.take.remote()), teller)
    teller.finished()
    failure, result = ray.get([board.failure.remote(), board.result.remote()])
    if failure is not None:
        error = TrainingError(failure["text"])
        error.exit_code = failure["exit_code"]
        raise error
    if raised or result is None:
        told = str(raised[0]).strip() if raised else "the workers ended without a result"
        raise TrainingError(
            f"Ray Train gave up: {told}\nThe run resumes from its newest checkpoint: "
            f"embedshard train --launcher ray --resume RUN_DIR, with the folder above."
        )
    return TrainResult(**result)


def _show(events: list[tuple[str, tuple[Any, ...]]], teller: Reporter) -> None:
    for name, arguments in events:
        getattr(teller, name)(*arguments)


@contextmanager
def _asking_to_stop(board: Any) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into a note on the board; a second SIGINT interrupts at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        board.ask_to_stop.remote(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _start_board(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()


# ---------------------------------------------------------------------------------------------------------- a worker
def work_on_ray(work: dict[str, Any]) -> None:
    """What each worker of Ray Train does, at each start.

    Args:
        work: what the driver handed to it: the run, the device, the board, and what they need.
    """
    import ray
    import torch.distributed as dist

    board = work["board"]
    try:
        _train_as_worker(work)
    except PeerError:
        _leave()
        time.sleep(1.0)  # the peer says what it met before it goes
        if ray.get(board.failure.remote()) is None:
            raise
    except Exception as error:
        if _may_pass(error):
            raise
        known = isinstance(error, EmbedshardError)
        text = error.shown if isinstance(error, EmbedshardError) else "".join(traceback.format_exception(error))
        failure = {
            "text": f"worker {dist.get_rank() if dist.is_initialized() else '?'}: {text}",
            "exit_code": error.exit_code if isinstance(error, EmbedshardError) and known else 1,
        }
        ray.get(board.fail.remote(failure))
        _leave()


def _may_pass(error: BaseException | None) -> bool:
    """Returns whether a new start may not meet this again: a file system or a network that may be back by then.

    Data that cannot be read are told at once: pyarrow raises OSError for what is wrong with a file's content, too.
    """
    while isinstance(error, OSError | StorageError | CheckpointError):
        if isinstance(error, OSError):
            return error.errno not in _LASTING
        error = error.__cause__
    return False


def _leave() -> None:
    """Leaves the process group, so that the others learn it at once."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _train_as_worker(work: dict[str, Any]) -> None:
    import ray
    import torch.distributed as dist

    workers = dist.get_world_size()
    fitting = largest_world(work["lanes"], workers)
    if fitting < workers and not shrink_world(fitting):
        return  # idle until the next start
    environment = {**process_environment(), **work["environment"]}
    with open_world(work["device"], idle=workers - fitting) as world:
        teller = Reporter()
        if world.is_rank_zero:
            restarts = RunDirectory(work["run"]).num_attempts
            teller = Reporters([_BoardReporter(work["board"]), RayMetricsReporter(restarts)])
        request = TrainRequest(run_dir=work["run"], resume=work["run"], device=work["device"], poll_s=work["poll_s"])
        plan = None if work["plan"] is None else RecordedPlan.from_json(work["plan"], "--plan")
        result = train_in(world, request, environment, teller, _RayNotices(work["board"], world.is_rank_zero), plan)
        if world.is_rank_zero:
            value = {"stopped_by": result.stopped_by, "step": result.step, "metrics": result.metrics}
            ray.get(work["board"].finish.remote(value))


class _BoardReporter(Reporter):
    """Puts what it hears on the board; steps only now and then."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._waiting: list[tuple[str, tuple[Any, ...]]] = []
        self._told = 0.0

    def prepared(self, what: str, done: int, total: int) -> None:
        self._tell("prepared", what, done, total, now=done in (0, total))

    def started(self, first_step: int, num_steps: int) -> None:
        self._tell("started", first_step, num_steps)

    def grown(self, num_steps: int) -> None:
        self._tell("grown", num_steps)

    def stepped(self, step: int, epoch: int, loss: float, samples_per_second: float) -> None:
        self._tell("stepped", step, epoch, loss, samples_per_second, now=False)

    def counted(self, rows: int, bad_rows: BadRowCounts) -> None:
        self._tell("counted", rows, bad_rows, now=False)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        self._tell("measured", step, dict(values), now=False)

    def compared(self, metrics: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> None:
        self._tell("compared", dict(metrics), {name: dict(values) for name, values in baselines.items()})

    def said(self, message: str) -> None:
        self._tell("said", message)

    def finished(self) -> None:
        self._tell("finished")

    def _tell(self, name: str, *arguments: Any, now: bool = True) -> None:
        self._waiting.append((name, arguments))
        if now or time.monotonic() - self._told > _TELL_EVERY_S:
            import ray

            ray.get(self._board.tell.remote(self._waiting)) if now else self._board.tell.remote(self._waiting)
            self._waiting, self._told = [], time.monotonic()


class _RayNotices(Notices):
    """Looks, in a thread, at the board for a wish to stop, and at Ray for notice that a node will be taken away.

    The notice is read where Ray puts it for this worker. Ray's own way to read it, `get_preemption_info`, is a barrier of
    all workers; the loop agrees on it with every step's loss anyhow.
    """

    def __init__(self, board: Any, is_rank_zero: bool) -> None:
        super().__init__()
        self._board, self._is_rank_zero = board, is_rank_zero
        self._ended = threading.Event()
        self._known: Any = None

    def __enter__(self) -> _RayNotices:
        from ray.train.v2._internal.execution.context import get_train_context

        context = get_train_context()
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, args=(context,), name="notices", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self, context: Any) -> None:
        import ray

        while not self._ended.wait(_POLL_S):
            notice = context.preemption_context.preemption_info
            if notice is not None and notice != self._known:
                self._known, self.save = notice, True
            if self._is_rank_zero:
                self.stop = ray.get(self._board.stop_asked.remote())
