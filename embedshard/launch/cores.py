"""Which cores each worker of this machine runs on.

A worker that is moved from core to core leaves its cache behind, and two that meet on one core while another is idle wait
for each other at the next exchange. So each gets cores of its own, as MPI's launchers give them.
"""

from __future__ import annotations

__all__ = ["BIND", "shares"]

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from embedshard.errors import ConfigError
from embedshard.world import usable_cores

BIND: Final = "EMBEDSHARD_BIND_CORES"
"""Environment variable: 0 leaves it to the system where workers run."""

_TOPOLOGY: Final = Path("/sys/devices/system/cpu")


def shares(workers: int, environment: Mapping[str, str], topology: Path = _TOPOLOGY) -> list[set[int]] | None:
    """Returns the logical cores of each worker; None where workers are not bound.

    The usable ones are cut into equal parts, socket by socket: whole physical cores, so that no two workers share one, or,
    where there are more workers than physical cores, logical ones. The first parts are larger if there is a rest.

    Args:
        workers: on this machine.
        environment: may say that they are not to be bound.
        topology: where the system describes its cores.

    Raises:
        ConfigError: if the environment says neither 0 nor 1.
    """
    wish = environment.get(BIND, "1")
    if wish not in ("0", "1"):
        raise ConfigError(f"{BIND} is '{wish}'. It must be 1, which gives each worker cores of its own, or 0.")
    cores = usable_cores()
    if wish == "0" or workers == 1 or workers > len(cores) or not hasattr(os, "sched_setaffinity"):
        return None
    physical: dict[tuple[int, int, int], list[int]] = {}
    for core in cores:
        physical.setdefault(_place(core, topology / f"cpu{core}" / "topology"), []).append(core)
    units = [physical[place] for place in sorted(physical)]
    if len(units) < workers:
        units = [[core] for unit in units for core in unit]
    return [{core for unit in part for core in unit} for part in _cut(units, workers)]


def _place(core: int, folder: Path) -> tuple[int, int, int]:
    """Returns the socket, the die and the physical core of a logical one; one of its own where the system does not tell.

    Cores are numbered anew in each die. Linux before 5.2 tells of none.
    """
    try:
        die = int((folder / "die_id").read_text()) if (folder / "die_id").exists() else 0
        return int((folder / "physical_package_id").read_text()), die, int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0, core


def _cut(units: Sequence[list[int]], parts: int) -> list[Sequence[list[int]]]:
    size, rest = divmod(len(units), parts)
    ends = [(part + 1) * size + min(part + 1, rest) for part in range(parts)]
    return [units[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
