"""Messages between processes of one machine, through memory that they share.

Each process writes what it sends into a segment of its own, once, and the others read it there: two copies and a
semaphore, where a socket takes four and wakes two threads (docs/performance.md has what that saves). Segments are
anonymous files (`memfd_create`), so that they need no room in /dev/shm and are gone when their processes are.

Linux only. Semaphores are POSIX's, which order what is written before a post before what is read after a wait.
"""

from __future__ import annotations

__all__ = ["PeerIsGoneError", "Post", "open_post"]

import ctypes
import errno
import mmap
import os
import secrets
import select
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

_NAME: Final = "embedshard"
_TOKEN_BYTES: Final = 32
_SEMAPHORE_BYTES: Final = 64
"""Of a semaphore's own cache line; glibc's and musl's have 32 bytes on 64-bit machines."""
_MESSAGES: Final = 256
"""That a process may have sent and not all others have taken."""
_ALIGNMENT: Final = 64
_SEGMENT_BYTES: Final = 2**36
"""Addresses of a segment. Memory is taken as it is first needed."""
_LEAST_TAKEN: Final = 2**22
_KEPT_BYTES: Final = 2**26
"""Of a segment's memory that stays however long no more is wanted."""
_IDLE_MESSAGES: Final = 1_000
"""After so many that want no more than that, memory beyond it goes back to the kernel."""
_SPINS: Final = 50
_SLICE_S: Final = 0.2
"""How long a wait lasts until it looks whether the other process lives, and lets signals be handled."""


class PeerIsGoneError(RuntimeError):
    """Another process ended, or did not answer in time."""


@dataclass(frozen=True)
class Offer:
    """How others find a process's segment.

    Attributes:
        place: the system and the namespace in which the id is that process's.
        process: its id.
        descriptor: of the segment in that process.
        token: that the segment begins with, so that nothing else is taken for it.
    """

    place: tuple[str, str]
    process: int
    descriptor: int
    token: bytes


class Segment:
    """A process's memory for what it sends: a token, semaphores, a table of messages, and the messages.

    Args:
        descriptor: of the file, which is closed.
        count: processes.

    Attributes:
        sent: address of the semaphore that is posted for each process when there is a message for it.
        taken: address of the one that each process posts when it has taken a message.
        table_MP2: where the part of each of the last messages for each process begins in the bytes, and its length.
        bytes: of all messages.
    """

    def __init__(self, descriptor: int, count: int) -> None:
        try:
            self._memory = mmap.mmap(descriptor, _SEGMENT_BYTES)
        finally:
            os.close(descriptor)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        semaphores = [address + _TOKEN_BYTES * 2 + _SEMAPHORE_BYTES * number for number in range(2 * count)]
        self.sent, self.taken = semaphores[:count], semaphores[count:]
        table = _TOKEN_BYTES * 2 + _SEMAPHORE_BYTES * 2 * count
        self.first_byte = _header_bytes(count)
        self.table_MP2 = np.frombuffer(self._memory, np.int64, _MESSAGES * count * 2, table).reshape(_MESSAGES, count, 2)
        self.bytes = torch.frombuffer(
            self._memory, dtype=torch.uint8, count=_SEGMENT_BYTES - self.first_byte, offset=self.first_byte
        )

    @property
    def token(self) -> bytes:
        """The bytes that it begins with."""
        return bytes(self._memory[:_TOKEN_BYTES])

    @token.setter
    def token(self, token: bytes) -> None:
        self._memory[:_TOKEN_BYTES] = token

    def release(self, begin: int, end: int) -> None:
        """Gives the memory of messages back to the kernel; both places are of pages."""
        self._memory.madvise(mmap.MADV_REMOVE, self.first_byte + begin, end - begin)


def _header_bytes(count: int) -> int:
    size = _TOKEN_BYTES * 2 + _SEMAPHORE_BYTES * 2 * count + _MESSAGES * count * 16
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass
class Letter:
    """A message that is under way, as one process knows it.

    Attributes:
        number: of the message, which every process counts alike.
        take: what is done with the parts of it that are for this process, one of each process, when all are there.
        is_done: whether it has been.
    """

    number: int
    take: Callable[[Sequence[torch.Tensor]], None] | None
    is_done: bool = False


class Post:
    """Sends and takes messages. Every process sends as many, each with a part for every process, in the same order.

    Not for several threads at a time.

    Args:
        rank: this process's.
        own: its segment, whose memory it alone takes.
        descriptor: of the own segment's file.
        segments: of all processes, in rank order, its own too.
        processes: by which it is known whether each other process lives; None of its own.
        timeout_s: how long a wait may take.

    Attributes:
        sent_bytes: to others, so far.
    """

    def __init__(
        self, rank: int, descriptor: int, segments: Sequence[Segment], processes: Sequence[int | None], timeout_s: float
    ) -> None:
        self.rank, self.count, self.sent_bytes = rank, len(segments), 0
        self._segments, self._own, self._descriptor = segments, segments[rank], descriptor
        self._processes, self._timeout_s = processes, timeout_s
        self._others = [other for other in range(self.count) if other != rank]
        self._under_way: deque[Letter] = deque()
        self._areas: deque[tuple[int, int, int]] = deque()  # number, begin, end of what is not known to be taken
        self._num_sent, self._num_done = 0, 0
        self._arrived, self._taken = [0] * self.count, [0] * self.count
        self._memory_bytes = self._last_large = 0

    def send(self, parts: Sequence[torch.Tensor | None], take: Callable[[Sequence[torch.Tensor]], None]) -> Letter:
        """Sends a message; returns what `finish` waits for.

        Args:
            parts: a tensor on the CPU for each process, of any strides, None for none; or a single one that all get.
            take: is given the bytes (uint8, one axis) that each process sent to this one, in rank order, in memory that is
                another message's afterwards.

        Raises:
            MemoryError: if the machine has no memory for it.
            PeerIsGoneError: if others do not take what was sent before.
        """
        self._make_room_in_table()
        sizes = [0 if part is None else part.numel() * part.element_size() for part in parts]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        first = self._place(end)
        table_P2 = self._own.table_MP2[self._num_sent % _MESSAGES]
        for begin, size, part in zip(begins, sizes, parts, strict=True):
            if part is not None and size:
                place = self._own.bytes[first + begin : first + begin + size]
                place.view(part.dtype).view(part.shape).copy_(part)
        if len(parts) == 1:
            begins, sizes = begins * self.count, sizes * self.count
        table_P2[:, 0] = [first + begin for begin in begins]
        table_P2[:, 1] = sizes
        if end:
            self._areas.append((self._num_sent, first, first + end))
        for other in self._others:
            _post(self._own.sent[other])
            self.sent_bytes += sizes[other]
        letter = Letter(self._num_sent, take)
        self._under_way.append(letter)
        self._num_sent += 1
        return letter

    def finish(self, letter: Letter) -> None:
        """Waits until a message has come from all and is taken, and all that were sent before it.

        Raises:
            PeerIsGoneError: if another process has ended, or does not send its part in time.
        """
        while not letter.is_done:
            self._take_next()

    def _take_next(self) -> None:
        letter = self._under_way[0]
        for other in self._others:
            while self._arrived[other] <= letter.number:
                self._wait(self._segments[other].sent[self.rank], other)
                self._arrived[other] += 1
        parts = []
        for segment in self._segments:
            begin, size = segment.table_MP2[letter.number % _MESSAGES, self.rank].tolist()
            parts.append(segment.bytes[begin : begin + size])
        self._under_way.popleft()
        take, letter.take, letter.is_done = letter.take, None, True
        assert take is not None, "each is taken once"
        try:
            take(parts)
        finally:
            self._num_done += 1
            for other in self._others:
                _post(self._segments[other].taken[self.rank])

    def _make_room_in_table(self) -> None:
        while self._num_sent - min(self._num_done, *(self._taken[other] for other in self._others)) >= _MESSAGES:
            if self._under_way and self._num_sent - self._num_done >= _MESSAGES:
                self._take_next()
                continue
            slowest = min(self._others, key=self._taken.__getitem__)
            self._wait(self._own.taken[slowest], slowest)
            self._taken[slowest] += 1

    def _place(self, size: int) -> int:
        """Returns where so many bytes are free: as low as can be, so that few pages are ever in use."""
        for other in self._others:
            while _is_posted(self._own.taken[other]):
                self._taken[other] += 1
        num_free = min(self._num_done, *(self._taken[other] for other in self._others))
        while self._areas and self._areas[0][0] < num_free:
            self._areas.popleft()
        is_idle = self._num_sent - self._last_large > _IDLE_MESSAGES
        if not self._areas and is_idle and self._memory_bytes > _KEPT_BYTES:
            self._own.release(_KEPT_BYTES, self._memory_bytes)
            self._memory_bytes = _KEPT_BYTES
        place = 0
        for begin, end in sorted((begin, end) for _, begin, end in self._areas):
            if begin - place >= size:
                break
            place = max(place, end)
        if place + size > self._memory_bytes:
            self._take_memory(place + size)
        if place + size > _KEPT_BYTES:
            self._last_large = self._num_sent
        return place

    def _take_memory(self, size: int) -> None:
        """Takes memory of the kernel before it is written to, so that there is an error where there is none left."""
        wanted = -(-max(size, self._memory_bytes + _LEAST_TAKEN) // mmap.PAGESIZE) * mmap.PAGESIZE
        first = self._own.first_byte
        try:
            if first + wanted > _SEGMENT_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._descriptor, first + self._memory_bytes, wanted - self._memory_bytes)
        except OSError as error:
            raise MemoryError(
                f"rank {self.rank} needs {wanted:,} bytes of memory that it shares with the other workers of this machine, "
                f"for what it sends them, and the system gives none: {error.strerror}. Give it more memory, or train "
                "smaller batches."
            ) from error
        self._memory_bytes = wanted

    def _wait(self, semaphore: int, other: int) -> None:
        """Waits for a semaphore that another process posts."""
        for _ in range(_SPINS):
            if _is_posted(semaphore):
                return
        limit = time.monotonic() + self._timeout_s
        while not _is_posted_within(semaphore, _SLICE_S):
            process = self._processes[other]
            assert process is not None, "nobody waits for himself"
            if _has_ended(process) and not _is_posted(semaphore):
                raise PeerIsGoneError(f"Connection closed by peer: rank {other} of this machine has ended.")
            if time.monotonic() > limit:
                raise PeerIsGoneError(
                    f"Timed out waiting {self._timeout_s:.0f} s for rank {other} of this machine, which has not ended."
                )


def open_post(rank: int, count: int, timeout_s: float, gather: Callable[[Any], list[Any]]) -> Post | str:
    """Shares memory with the other processes, if all can; else returns why not, which is the same for all. Collective.

    Args:
        rank: this process's.
        count: processes.
        timeout_s: how long a wait may take.
        gather: gives each process's value to all, in rank order; collective.
    """
    with ExitStack() as opened:
        own: int | None = None
        offer: Offer | str
        try:
            if sys.platform != "linux":
                raise OSError(errno.ENOSYS, f"{sys.platform} has no anonymous files")
            own = _new_segment(count)
            opened.callback(os.close, own)
            token = secrets.token_bytes(_TOKEN_BYTES)
            segment = Segment(os.dup(own), count)
            segment.token = token
            for semaphore in (*segment.sent, *segment.taken):
                _begin(semaphore)
            offer = Offer(_place(), os.getpid(), own, token)
        except (OSError, AttributeError, ValueError) as error:
            offer = f"rank {rank}: {error}"
        offers = gather(offer)
        failures = [other for other in offers if isinstance(other, str)]
        if failures:
            return failures[0]
        if len({other.place for other in offers}) > 1:
            return "they are not all on one machine"
        segments: list[Segment] = []
        processes: list[int | None] = []
        outcome: str | None = None
        try:
            for number, other in enumerate(offers):
                if number == rank:
                    segments.append(segment)
                    processes.append(None)
                    continue
                segments.append(_segment_of(other, count))
                process = os.pidfd_open(other.process)
                opened.callback(os.close, process)
                processes.append(process)
        except (OSError, AttributeError, ValueError) as error:
            outcome = f"rank {rank}: {error}"
        failures = [told for told in gather(outcome) if told is not None]
        if failures:
            return failures[0]
        assert own is not None, "it was offered"
        post = Post(rank, own, segments, processes, timeout_s)
        weakref.finalize(post, opened.pop_all().close)
        return post


def _place() -> tuple[str, str]:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")


def _segment_of(other: Offer, count: int) -> Segment:
    path = f"/proc/{other.process}/fd/{other.descriptor}"
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(errno.ENXIO, "it is no shared memory", path)
    found = Segment(os.open(path, os.O_RDWR | os.O_CLOEXEC), count)
    if found.token != other.token:
        raise OSError(errno.ENXIO, "it is the memory of another run", path)
    return found


def _new_segment(count: int) -> int:
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _SEGMENT_BYTES)
        os.posix_fallocate(descriptor, 0, _header_bytes(count))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _has_ended(process: int) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _function(library: ctypes.CDLL, name: str, *types: Any) -> Any:
    found = getattr(library, name, None)  # macOS has not all
    if found is not None:
        found.argtypes, found.restype = types, ctypes.c_int
    return found


# What never blocks keeps the interpreter's lock, which the reader's thread might not give back for some milliseconds.
_holding, _letting_go = ctypes.PyDLL(None, use_errno=True), ctypes.CDLL(None, use_errno=True)
_sem_init = _function(_holding, "sem_init", ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_sem_post = _function(_holding, "sem_post", ctypes.c_void_p)
_sem_trywait = _function(_holding, "sem_trywait", ctypes.c_void_p)
_sem_timedwait = _function(_letting_go, "sem_timedwait", ctypes.c_void_p, ctypes.POINTER(_TimeSpec))


def _begin(semaphore: int) -> None:
    if _sem_init(semaphore, 1, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _post(semaphore: int) -> None:
    if _sem_post(semaphore):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _is_posted(semaphore: int) -> bool:
    """Takes one off a semaphore that is above zero; returns whether it was."""
    return _sem_trywait(semaphore) == 0


def _is_posted_within(semaphore: int, seconds: float) -> bool:
    """Takes one off a semaphore as soon as it is above zero; returns whether it was in time, and no signal came."""
    until = time.time() + seconds
    spec = _TimeSpec(int(until), int(until % 1 * 1e9))
    if _sem_timedwait(semaphore, ctypes.byref(spec)) == 0:
        return True
    if ctypes.get_errno() not in (errno.ETIMEDOUT, errno.EINTR):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return False
