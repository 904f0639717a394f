"""The processes that train together, as a value.

`open_world` adopts a process group that exists (Ray's workers), else joins torchrun's, else makes a group of one that
needs no port, no environment and no launcher: a single process runs the same code as many. The few collectives that
others use are methods of `World`.

Beside the command line, this is the only module that reads the environment.
"""

from __future__ import annotations

__all__ = [
    "RENDEZVOUS",
    "World",
    "launched_world_size",
    "open_local_group",
    "open_world",
    "process_environment",
    "release_freed_memory",
    "set_process_environment",
    "shrink_world",
    "usable_cores",
]

import ctypes
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from embedshard.errors import ConfigError, PeerError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

CUBLAS_WORKSPACE = ":4096:8"
"""Of `CUBLAS_WORKSPACE_CONFIG`: `train.deterministic` asks for it, else the first product of matrices on CUDA fails."""
TIMEOUT = timedelta(seconds=300)
"""How long a collective waits: the only detector of a hung one."""

RENDEZVOUS = "EMBEDSHARD_RENDEZVOUS"
"""Environment variable: the URL of a file by which processes that were started together find each other."""

_SIGN_OF_LIFE_S = 5.0
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
)

T = TypeVar("T")


def set_process_environment() -> None:
    """Keeps OpenMP threads from spinning, unless the environment says otherwise, and libraries from chatting.

    Call it before torch is imported. Spinning threads that want a busy core make small kernels up to 80 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        # Arrow's default, mimalloc, gives large blocks back to the kernel and asks for them again, and so does jemalloc with
        # the largest: the system's keeps them, as it is told here (docs/performance.md).
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        _keep_freed_memory()
    # The library of tokenizers has threads of its own: as many as OpenMP is given, where that is said.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        os.environ.setdefault("RAYON_NUM_THREADS", threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if threads == "1" else "true")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    # torch.fx warns at each sharded model that TorchRec uses one of its functions in its old sense.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # The planner advises a factory that guesses what it is told here, and an estimate that is not asked for.
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    # TorchRec's and FBGEMM's own use of what torch and they themselves are to drop.
    for library in ("torchrec", "fbgemm_gpu", "torch"):
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}\.")
    # FBGEMM's hook of tables that fetch ahead: ids, their only input, have no gradients, which it does without.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def usable_cores() -> list[int]:
    """Returns the logical cores that this process may run on; all there are where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep the memory of batches and gradients for the next ones, instead of the kernel clearing it anew.

    Blocks of up to 32 MiB come from the heap, of which up to 512 MiB may stay free. There is one heap for all threads: what
    one has made another lets go of, and a heap of a thread's own holds 64 MiB at most. Processes that are started hear of it
    by their environment.
    """
    options = {
        "MALLOC_MMAP_THRESHOLD_": (-3, 2**25),
        "MALLOC_TRIM_THRESHOLD_": (-1, 2**29),
        "MALLOC_ARENA_MAX": (-8, 1),
    }
    for name, (parameter, value) in options.items():
        if name not in os.environ:
            os.environ[name] = str(value)
            with suppress(OSError, AttributeError):  # another libc has no such options
                ctypes.CDLL(None).mallopt(parameter, value)


def release_freed_memory() -> None:
    """Gives back to the kernel what malloc keeps, after work whose memory is not wanted again."""
    with suppress(OSError, AttributeError):  # another libc has no such function
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class World:
    """This process's place among those that train together.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: processes that train.
        local_rank: its number on this machine.
        local_world_size: processes on this machine.
        device: where it computes.
        group: the process group of exactly these processes.
        idle: workers that were started beyond those that can share the lanes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    group: dist.ProcessGroup
    idle: int = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks. Collective; without gradient."""
        import torch.distributed as dist

        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone().contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def begin_sum(self, numbers: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Returns what waits for the sum of a few numbers over all ranks, added up in rank order. Collective.

        All ranks' numbers go to all: for few of them quicker than `sum`, and the others need not be waited for at once.
        """
        if self.world_size == 1:
            return lambda: numbers
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(numbers) for _ in range(self.world_size)]
        work = dist.all_gather(parts, numbers.contiguous(), group=self.group, async_op=True)

        def total() -> torch.Tensor:
            work.wait()
            return torch.stack(parts).sum(dim=0)

        return total

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns all ranks' tensors, concatenated along the first axis in rank order. Collective.

        With gradient: the backward pass sums over ranks what each did with this rank's part. All ranks give equal shapes.
        """
        if self.world_size == 1:
            return tensor
        import torch.distributed as dist
        from torch.distributed import _functional_collectives as functional

        if tensor.requires_grad:
            # torch 2.11 has the latter name alone, and reduces gradients as they lie; 2.13 has both, and warns of it.
            if hasattr(functional, "all_gather_single_autograd"):
                return functional.all_gather_single_autograd(tensor.contiguous(), 0, self.group)
            gathered: torch.Tensor = functional.all_gather_tensor_autograd(tensor.contiguous(), 0, self.group)
            gathered.register_hook(lambda gradient: gradient.contiguous())  # type: ignore[no-untyped-call]
            return gathered
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        import torch

        return torch.cat(parts)

    def exchange(self, tensor: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Sends each rank its part of a tensor, and returns what all sent here, in rank order. Collective.

        Args:
            tensor: on the CPU; the parts for ranks 0, 1, ... one after another along the first axis.
            sizes: of the parts.

        Returns:
            The parts for this rank, one after another, and their sizes.
        """
        if self.world_size == 1:
            return tensor, sizes
        import torch
        import torch.distributed as dist

        theirs = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_to_all_single(theirs, torch.tensor(sizes, dtype=torch.int64), group=self.group)
        received = tensor.new_empty((int(theirs.sum()), *tensor.shape[1:]))
        dist.all_to_all_single(received, tensor.contiguous(), theirs.tolist(), sizes, group=self.group)
        return received, theirs.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's value on every rank. Collective. Between processes of one run only: it pickles."""
        import torch.distributed as dist

        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """Returns, on every rank, what work on rank 0 returns. Collective. Between processes of one run only: it pickles.

        The work may take longer than a collective may wait: it is done in a thread, and the others hear every few
        seconds that it goes on.

        Raises:
            PeerError: on the other ranks, if the work failed; rank 0 raises what it raised.
        """
        if self.world_size == 1:
            return work()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work) if self.is_rank_zero else None
            self._wait_for_all(future)
        failure = None if future is None else future.exception()
        told = self.broadcast_object(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise PeerError(f"rank 0 failed in what it did for all: {told}")
        result: T = self.broadcast_object(None if future is None else future.result())
        return result

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Returns what work on each rank returns, in rank order, on every rank. Collective; it pickles.

        The work may take longer than a collective may wait, as in `from_rank_zero`.

        Raises:
            PeerError: on the ranks whose own work did not fail, if another's did; that one raises what it raised.
        """
        if self.world_size == 1:
            return [work()]
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            self._wait_for_all(future)
        failure = future.exception()
        told = self.gather_objects(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed:
            raise PeerError(f"rank {failed[0][0]} failed in its share of what all did: {failed[0][1]}")
        return self.gather_objects(future.result())

    def _wait_for_all(self, future: Future[Any] | None) -> None:
        """Waits until no rank's work goes on; all hear every few seconds that some does. Collective."""
        import torch

        goes_on = True
        while goes_on:
            is_mine_open = future is not None and bool(wait([future], timeout=_SIGN_OF_LIFE_S).not_done)
            goes_on = bool(self.sum(torch.tensor(int(is_mine_open))).item())

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns every rank's value, in rank order, on every rank. Collective; it pickles."""
        import torch.distributed as dist

        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Waits for all ranks. Collective."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.barrier(group=self.group)

    def describe(self) -> str:
        """Returns the rank, host and device, for messages."""
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()} ({self.device})"


def _device(asked: str, local_rank: int) -> torch.device:
    import torch

    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", asked) is None:
        raise ConfigError(f"--device {asked}: there is no such device. Choose cpu, cuda, or auto.")
    device = torch.device(asked)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device {asked}: torch {torch.__version__} sees no CUDA device. "
                f"Use --device cpu, or look at 'embedshard doctor'."
            )
        if ":" not in asked:
            count = torch.cuda.device_count()
            if local_rank >= count:
                raise ConfigError(
                    f"--device {asked}: worker {local_rank} of this machine has no CUDA device of its own; there are "
                    f"{count}. Use at most {count} workers a machine, or --device cpu."
                )
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device


def process_environment() -> dict[str, str]:
    """Returns this process's environment, for workers that no command line started."""
    return dict(os.environ)


def launched_world_size(environment: Mapping[str, str]) -> int | None:
    """Returns how many processes a launcher started this one among; None if none did."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    return None


@contextmanager
def open_world(device: str = "auto", idle: int = 0) -> Iterator[World]:
    """Opens the world that this process belongs to, and closes what it opened.

    Args:
        device: `cpu`, `cuda`, or `auto` for the first of the two that is there.
        idle: workers that were left out by `shrink_world`.

    Raises:
        ConfigError: if the device is not there.
        PeerError: if what was done in this world failed since another process is gone.
    """
    import torch.distributed as dist

    adopted = dist.is_initialized()
    launched = not adopted and launched_world_size(os.environ) is not None
    environment = os.environ if adopted or launched else {}
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    chosen = _device(device, local_rank)
    if not adopted:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        if launched:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            url = os.environ.get(RENDEZVOUS, "env://")
            dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size, timeout=TIMEOUT)
        else:
            os.environ["LOCAL_WORLD_SIZE"] = "1"  # TorchRec reads it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None, "the process group was just initialised"
    if chosen.type == "cpu":
        group = _nearest(group)
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, chosen, group, idle)
    try:
        yield world
    except BaseException as error:
        if not adopted:
            dist.destroy_process_group()  # no barrier: the others may never come
        if world.world_size > 1 and _says_that_a_peer_is_gone(error):
            raise PeerError(
                f"{world.describe()}: another process of this run failed, was killed, or did not answer for "
                f"{TIMEOUT.total_seconds():.0f} s. Its own message says why."
            ) from error
        raise
    else:
        if not adopted:
            world.barrier()
            dist.destroy_process_group()


def _nearest(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Returns the quickest group of gloo's processes. Collective."""
    if group.size() == 1:
        return group
    from embedshard.neighbours import as_neighbours

    return as_neighbours(group, os.environ, TIMEOUT)


def shrink_world(size: int) -> bool:
    """Makes the process group one of its first ranks alone; returns whether this process is one of them. Collective.

    The whole group is replaced, since TorchRec makes groups of its own, which are collective over all of it.

    Args:
        size: ranks that stay.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    rank, backend = dist.get_rank(), dist.get_backend_config()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname() + os.environ.get("NODE_RANK", ""))
    store = _get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    if rank >= size:
        return False
    counts = {hosts[:size].count(host) for host in hosts[:size]}
    # TorchRec takes machines to have equally many workers; where they have not, each worker is a machine of its own.
    os.environ["LOCAL_WORLD_SIZE"] = str(counts.pop() if len(counts) == 1 else 1)
    store = dist.PrefixStore("embedshard-shrunk", store)
    dist.init_process_group(str(backend), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return True


def _says_that_a_peer_is_gone(error: BaseException) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_IS_GONE)


@contextmanager
def open_local_group(rank: int, world_size: int, local_world_size: int, rendezvous: Path) -> Iterator[World]:
    """Opens a world of processes on this machine's CPUs that meet in a file, and closes it.

    Args:
        rank: this process's.
        world_size: how many there are.
        local_world_size: how many are taken to be on one machine.
        rendezvous: a file that is not there yet, the same for all.
    """
    import torch
    import torch.distributed as dist

    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)  # TorchRec reads it
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None, "the process group was just initialised"
    group = _nearest(group)
    yield World(rank, world_size, rank % local_world_size, local_world_size, torch.device("cpu"), group)
    dist.barrier()
    dist.destroy_process_group()
