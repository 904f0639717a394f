"""The export that is served now, and the thread that looks for a newer one, reads it and puts it in its place.

What is served is in memory: the files may be replaced or removed meanwhile. A batch is answered by one engine from its first
question to its last; the next batch may be answered by the next one.
"""

from __future__ import annotations

__all__ = ["CURRENT", "LiveExport", "Refusal", "Served", "candidates"]

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from embedshard.errors import EmbedshardError, ExportError
from embedshard.export.manifest import APPLYING, JOURNAL, MANIFEST, ROLLBACK, open_export
from embedshard.serve.engine import Engine
from embedshard.storage import Location, PathOrUri, locate, reaching

CURRENT: Final = "CURRENT"
"""A file in a folder of exports that names the one to be served."""
_LARGEST_MANIFEST: Final = 2**28
_LONGEST_WAIT_S: Final = 600.0


@dataclass(frozen=True)
class Candidate:
    """An export that could be served.

    Attributes:
        folder: where it is.
        digest: SHA-256 of its manifest, which names the SHA-256 of each of its files.
        written: when, in ISO 8601.
        is_named: whether it is meant, not only the newest: by `CURRENT`, or as no other could be.
    """

    folder: Location
    digest: str
    written: str
    is_named: bool = False

    @property
    def order(self) -> tuple[str, str]:
        """What sorts them by when they were written, and those of one second by name."""
        return self.written, self.folder.name


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        engine: that answers.
        export: what was chosen.
        loaded_at: when it was, in seconds since 1970.
        took_s: to check and to read it.
    """

    engine: Engine
    export: Candidate
    loaded_at: float
    took_s: float


@dataclass(frozen=True)
class Refusal:
    """An export that is to be served rather than what is, and cannot be.

    Attributes:
        export: its folder.
        digest: SHA-256 of its manifest.
        why: as a person reads it.
        at: when, in seconds since 1970.
        tries: how often it was tried.
    """

    export: str
    digest: str
    why: str
    at: float
    tries: int


class _Manifests:
    """Reads manifests; one that has not changed since is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], Candidate | None]] = {}

    def of(self, folder: Location) -> Candidate | None:
        """Returns the export in a folder; None where there is no manifest, or that of a delta, which is no export."""
        place = folder.join(MANIFEST)
        try:
            version = place.version()
            known = self._known.get(folder.path)
            if known is not None and known[0] == version:
                return known[1]
            content = place.read_bytes() if version[0] <= _LARGEST_MANIFEST else b""
        except FileNotFoundError:
            return None
        written = _written(content)
        found = None if written is None else Candidate(folder, hashlib.sha256(content).hexdigest(), written)
        self._known[folder.path] = (version, found)
        return found


def candidates(out: PathOrUri | Location, manifests: _Manifests | None = None) -> list[Candidate]:
    """Returns what could be served, the best first.

    It is an export itself; in a folder of exports the one that its file `CURRENT` names and no other, else all of them, the
    newest first. What `apply` and `rollback` make ready in an export is none.

    Raises:
        ExportError: if there is none, or an export is between two.
        StorageError: if the place cannot be read.
    """
    place, manifests = locate(out), manifests or _Manifests()
    with reaching(place):
        own = manifests.of(place)
        if own is not None:
            return [replace(own, is_named=True)]
        names = [] if place.is_file() or not place.exists() else place.list_names()
        if APPLYING in names:
            _refuse_between_two(place)
        if CURRENT in names:
            name = place.join(CURRENT).read_text().strip()
            if not name or "/" in name or name.startswith("."):
                raise ExportError(f"{place.join(CURRENT).uri} holds {name!r}; it must be the name of an export beside it.")
            named = manifests.of(place.join(name))
            if named is None:
                _refuse_between_two(place.join(name))
                raise ExportError(
                    f"{place.join(CURRENT).uri} names {name}, and {place.join(name).uri} has no {MANIFEST}. "
                    f"Name an export that is there, or export the run to it."
                )
            return [replace(named, is_named=True)]
        folders = [place.join(name) for name in names if name not in (APPLYING, ROLLBACK)]
        found = [one for folder in folders if (one := manifests.of(folder)) is not None]
    if not found:
        open_export(place)  # says why there is none
        raise ExportError(f"{place.uri} came and went. Start again.")
    return sorted(found, key=lambda one: one.order, reverse=True)


def _refuse_between_two(folder: Location) -> None:
    """Raises ExportError, as `open_export` does, if the files of an export are being exchanged."""
    if folder.join(APPLYING, JOURNAL).is_file():
        open_export(folder)


class LiveExport:
    """Holds what is served. The first export is read when it is made; `start` begins to look for newer ones.

    A newer export that is not whole, or is not what its manifest says, is not served: the one before is, further on. It is
    tried again after a while, as its files may only be on their way. One that was written earlier is not gone back to unless
    `CURRENT` names it.

    Args:
        out: an export, or a folder of exports.
        metadata: of items; read anew with each export.
        poll_s: between two looks.
        changed: is told of each engine that takes over and of each refusal.

    Raises:
        EmbedshardError: if no export can be served; says why the first was refused.

    Attributes:
        trouble: why the last look found no export; None where it did.
    """

    def __init__(
        self,
        out: PathOrUri,
        metadata: str | None = None,
        poll_s: float = 10.0,
        changed: Callable[[Served | Refusal], None] = lambda what: None,
    ) -> None:
        self._out, self._metadata, self._poll_s, self._changed = locate(out), metadata, poll_s, changed
        self._manifests = _Manifests()
        self._refusals: dict[str, Refusal] = {}
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None
        self.trouble: str | None = None
        self._served: Served | None = None
        first: EmbedshardError | None = None
        for candidate in candidates(self._out, self._manifests):
            try:
                self._served = self._read(candidate)
                break
            except EmbedshardError as error:
                first = first or error
                self._refuse(candidate, error)
        if self._served is None:
            assert first is not None, "there was a candidate"
            raise first
        self._changed(self._served)

    @property
    def served(self) -> Served:
        """What is served now: take it once for a batch."""
        assert self._served is not None, "the constructor set it"
        return self._served

    @property
    def refusal(self) -> Refusal | None:
        """The best of the exports that are to be served rather than what is, and cannot be; None where there is none."""
        return next(iter(list(self._refusals.values())), None)

    @property
    def is_watching(self) -> bool:
        """Whether the thread lives."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begins to look for newer exports, in a thread of its own."""
        self._thread = threading.Thread(target=self._watch, name="exports", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after what it reads now."""
        self._ended.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def look_soon(self) -> None:
        """Has the thread look at once, also at exports that were refused."""
        self._wanted.set()

    def look(self, at_once: bool = False) -> bool:
        """Looks for an export that is to take over, and puts it in place; returns whether one did.

        Args:
            at_once: also what was refused, and is to be tried again only later.
        """
        with self._looking:
            try:
                found = candidates(self._out, self._manifests)
            except Exception as error:  # being replaced, or gone, or out of reach: what is served is in memory
                self.trouble = _told(error)
                return False
            self.trouble = None
            newer = list(self._newer(found))
            self._keep_refusals(newer)
            for place, candidate in enumerate(newer):
                if not at_once and self._waits(candidate):
                    continue
                try:
                    self._served = self._read(candidate)
                except Exception as error:  # whatever is wrong with it, what is served goes on
                    self._refuse(candidate, error)
                    continue
                self._keep_refusals(newer[:place])
                self._changed(self._served)
                return True
            self._keep_refusals(newer)
            return False

    def _newer(self, found: list[Candidate]) -> Iterator[Candidate]:
        """Yields those that are to be served rather than what is."""
        served = self.served.export
        for candidate in found:
            if candidate.digest == served.digest:
                return
            is_same_place = candidate.folder.path == served.folder.path
            if candidate.is_named or is_same_place or candidate.order > served.order:
                yield candidate

    def _keep_refusals(self, above: list[Candidate]) -> None:
        """Forgets refusals of others than those that rank above what is served, given the best first."""
        self._refusals = {one.digest: self._refusals[one.digest] for one in above if one.digest in self._refusals}

    def _waits(self, candidate: Candidate) -> bool:
        refused = self._refusals.get(candidate.digest)
        if refused is None:
            return False
        return time.time() < refused.at + min(self._poll_s * 2**refused.tries, _LONGEST_WAIT_S)

    def _read(self, candidate: Candidate) -> Served:
        """Reads an export, every file compared with its SHA-256.

        Raises:
            EmbedshardError: if it is not what its manifest says, or its manifest was replaced meanwhile.
        """
        began = time.monotonic()
        engine = Engine(open_export(candidate.folder), self._metadata)
        now = _Manifests().of(candidate.folder)
        if now is None or now.digest != candidate.digest:
            raise ExportError(f"{candidate.folder.uri} was replaced while it was read.")
        return Served(engine, candidate, time.time(), time.monotonic() - began)

    def _refuse(self, candidate: Candidate, error: Exception) -> None:
        before = self._refusals.get(candidate.digest)
        refusal = Refusal(
            candidate.folder.uri, candidate.digest, _told(error), time.time(), 1 if before is None else before.tries + 1
        )
        self._refusals[candidate.digest] = refusal
        self._changed(refusal)

    def _watch(self) -> None:
        while not self._ended.is_set():
            at_once = self._wanted.wait(self._poll_s)
            self._wanted.clear()
            if not self._ended.is_set():
                self.look(at_once)


def _told(error: Exception) -> str:
    return error.shown if isinstance(error, EmbedshardError) else f"{type(error).__name__}: {error}"


def _written(content: bytes) -> str | None:
    """Returns when an export was written, nothing if its manifest is damaged: it is refused when it is opened.

    Returns None of a delta.
    """
    try:
        found = json.loads(content)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    written = found.get("written")
    return None if found.get("kind") == "delta" else written if isinstance(written, str) else ""
