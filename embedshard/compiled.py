"""Loops over arrays that are compiled by Numba when they are first called.

The machine code is kept in a folder (`NUMBA_CACHE_DIR`, else beside the loop's file, else the user's cache). All loops let
go of Python's lock.
"""

from __future__ import annotations

__all__ = ["compiled"]

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Has a loop compiled at its first call; kept for other processes where there is a folder to write to.

    Sums over the numbers of a vector may be added up several at a time, and products not be rounded before they are added.
    A division by zero gives what IEEE 754 says, as in numpy: to look for one keeps a loop from taking several at a time.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
    try:
        loop: _Function = numba.njit(**options, cache=True)(function)
    except RuntimeError:  # numba's, where neither its folder nor the user's can be written to
        return cast(_Function, numba.njit(**options)(function))
    cache: Any = getattr(loop, "_cache", None)
    if hasattr(cache, "save_overload"):
        save = cache.save_overload

        def save_if_possible(*given: Any) -> None:
            with suppress(OSError):  # a full disk: the loop is there all the same
                save(*given)

        cache.save_overload = save_if_possible
    return loop
