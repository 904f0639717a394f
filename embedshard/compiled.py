"""Loops over arrays that are compiled by Numba when they are first called.

The machine code is kept in a folder (`NUMBA_CACHE_DIR`, else beside the loop's file, else the user's cache). It is made anew
when anything changes of which it is made. All loops let go of Python's lock.
"""

from __future__ import annotations

__all__ = ["compiled"]

import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Has a loop compiled at its first call; kept for other processes where there is a folder to write to.

    Sums over the numbers of a vector may be added up several at a time, and products not be rounded before they are added.
    A division by zero gives what IEEE 754 says, as in numpy: to look for one keeps a loop from taking several at a time.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
    try:
        loop: _Function = numba.njit(**options, cache=True)(function)
        cache = cast(Any, loop)._cache
        cache._cache_file._source_stamp = cache._cache_file._source_stamp, _made_of(function)
    except (RuntimeError, AttributeError, OSError):
        # Numba's, where neither its folder nor the user's can be written to; or a Numba that keeps its stamp elsewhere: what
        # it has kept may be of before a change; or there are no files.
        return cast(_Function, numba.njit(**options)(function))
    if hasattr(cache, "save_overload"):
        save = cache.save_overload

        def save_if_possible(*given: Any) -> None:
            with suppress(OSError):  # a full disk: the loop is there all the same
                save(*given)

        cache.save_overload = save_if_possible
    return loop


def _made_of(function: Any) -> str:
    """Returns a digest of what a loop is made of beside its own file, which is all that Numba looks at.

    That is how it is compiled (this file), the numbers that it takes from its module, and the files of the loops and the
    pieces of code (`numba.extending.intrinsic`) that it calls, theirs as well.
    """
    found, waiting, met = [_digest(Path(__file__))], [function], {function}
    while waiting:
        one = waiting.pop()
        for name in one.__code__.co_names:
            value = one.__globals__.get(name)
            if isinstance(value, bool | int | float | np.generic):
                found.append(f"{name}={value!r}")
            called = getattr(value, "__wrapped__", None)
            if inspect.isfunction(called) and called not in met:
                met.add(called)
                waiting.append(called)
                found.append(_digest(Path(inspect.getfile(called))))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
