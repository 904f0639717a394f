"""For tests of models of your own: that no plan and no number of workers changes what is trained."""

from __future__ import annotations

__all__ = ["assert_plan_invariant"]

from collections.abc import Mapping, Sequence
from pathlib import Path

from embedshard.config import Config, load_config
from embedshard.launch.rehearsing import LocalGroup
from embedshard.launch.verify import verify_plans


def assert_plan_invariant(
    config: Config | str | Path,
    *,
    steps: int = 20,
    worlds: Sequence[int] = (1, 2),
    types: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    groups: Mapping[int, LocalGroup] | None = None,
) -> None:
    """Asserts that a config's first steps give the same losses and weights under every sharding type and world.

    Starts a process for each rank on this machine's CPUs, and ends all of them. A model of your own must be importable
    by them, as it is here: they get this process's `sys.path`.

    Args:
        config: a config, or the path of one. A module under test is its `model: {kind: custom, factory: ...}`.
        steps: how many are trained.
        worlds: numbers of workers; each must divide `data.lanes`.
        types: sharding types; all where None.
        environment: where `${VAR}` of a config file is looked up.
        groups: by world size, processes that were started before, as `embedshard.launch.rehearsing.LocalGroup(2)`, and that
            stay: the next call need not start any. They import what the `sys.path` of their start has.

    Raises:
        AssertionError: naming each case that differs, its largest difference, and where.
        EmbedshardError: if the config cannot be trained at all.
    """
    if not isinstance(config, Config):
        config = load_config(config, environment or {}).config
    found = verify_plans(config, steps=steps, worlds=worlds, types=types, groups=groups)
    failed = [case.describe() for case in found.cases if case.status == "fail"]
    assert not failed, "the plan or the world changes what is trained:\n" + "\n".join(f"  {line}" for line in failed)
