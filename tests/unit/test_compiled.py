"""Compiled loops that are kept are made anew when what they are made of has changed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

LOOP = """
from embedshard.compiled import compiled
from made_of_other import other

@compiled
def added(numbers):
    total = 0
    for at in range(len(numbers)):
        total += {term}
    return total
"""

CALLED = """
from embedshard.compiled import compiled

@compiled
def inner(number):
    return number + {number}

@compiled
def other(number):
    return inner(number)
"""

GENERATED = """
from llvmlite import ir
from numba.extending import intrinsic

@intrinsic
def other(context, number):
    def code(context, builder, signature, arguments):
        return builder.add(arguments[0], ir.Constant(arguments[0].type, {number}))

    return number(number), code
"""


def loaded(folder: Path, term: str, other: str) -> object:
    """Returns the loop of a module that has just been written, as a process that is started would have it."""
    (folder / "made_of_other.py").write_text(other)
    (folder / "made_of_loop.py").write_text(LOOP.format(term=term))
    for name in ("made_of_other", "made_of_loop"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module("made_of_loop").added


@pytest.mark.parametrize(
    ("term", "other"),
    [("other(numbers[at])", CALLED), ("other(numbers[at])", GENERATED), ("numbers[at] + other", "other = {number}\n")],
    ids=["a loop in another file", "code in another file", "a number of another file"],
)
def test_a_kept_loop_is_made_anew_when_another_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str, other: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    numbers = np.arange(3)
    for number, is_kept in ((1, False), (1, True), (10, False), (10, True)):
        loop = loaded(tmp_path, term, other.format(number=number))
        assert loop(numbers) == 3 + 3 * number
        assert bool(loop.stats.cache_hits) == is_kept
    for name in ("made_of_other", "made_of_loop"):
        sys.modules.pop(name, None)
