"""The errors that a user can act on.

Each message says four things: what was met, what was needed, where, and what to do. The command line shows them
without a traceback and ends with `exit_code`. A mistake of the programmer is an `assert`, never one of these.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmbedshardError",
    "ExportError",
    "PeerError",
    "PlanError",
    "StorageError",
    "TrainingError",
    "nearest",
    "sentence",
    "with_article",
]

import difflib
from collections.abc import Iterable


class EmbedshardError(Exception):
    """A mistake or a failure that a user can act on."""

    exit_code = 2

    @property
    def shown(self) -> str:
        """The message as a user sees it."""
        return f"{type(self).__name__}: {self}"


class ConfigError(EmbedshardError):
    """The config asks for something that does not exist, or that contradicts itself."""

    @property
    def shown(self) -> str:
        """The message alone: most mistakes are of this kind."""
        return str(self)


class DataError(EmbedshardError):
    """A file, a column or a row is not what the config says it is."""


class PlanError(EmbedshardError):
    """A sharding plan cannot be made, or would change what is trained."""


class CheckpointError(EmbedshardError):
    """A checkpoint is missing, unfinished, damaged, or belongs to another run."""


class ExportError(EmbedshardError):
    """An export is missing, unfinished or damaged, or a folder that is none stands in its place."""


class StorageError(EmbedshardError):
    """A disk or an object store cannot be reached, or does not do what it is asked for. It may be back later."""


class TrainingError(EmbedshardError):
    """Training met something that makes its result worthless, such as a loss that is not finite."""

    exit_code = 1


class PeerError(TrainingError):
    """Another process of the run failed or is gone; what it met stands in its own message."""


def sentence(text: str) -> str:
    """Returns a text with a stop at its end, unless it has one."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def with_article(word: str) -> str:
    """Returns a kind's name behind its article: `an id`, `a bag`, `an mmoe`."""
    return f"{'an' if word[0] in 'aeio' or word == 'mmoe' else 'a'} {word}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a sentence that offers the known name nearest to `word`, or lists the known names."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    if not names:
        return "There are none to choose from."
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Known names: {shown}."
