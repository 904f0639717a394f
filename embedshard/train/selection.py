"""By what the best checkpoint of a run is chosen, and what is said where nothing can be."""

from __future__ import annotations

__all__ = ["selected_metric", "why_not_judged"]

import math
from collections.abc import Mapping
from typing import Final

from embedshard.config import Config

_BOTH: Final = "rows of both labels"
_NEEDS: Final = {
    "auc": _BOTH,
    "pr_auc": "rows of the label 1",
    "gauc": "users with rows of both labels",
    "normalised_entropy": _BOTH,
}


def selected_metric(config: Config) -> str:
    """Returns the name of the value of the validation set by which the best checkpoint is chosen."""
    return config.evaluate.select or config.evaluate.metrics[0]


def why_not_judged(config: Config, values: Mapping[str, float], step: int) -> str | None:
    """Returns a sentence where the selected metric has no value, so that a step cannot be the best; None where it has.

    Args:
        config: the run's.
        values: of the validation set, by name.
        step: steps done.
    """
    selected = selected_metric(config)
    if not math.isnan(values[selected]):
        return None
    parts = {name: value for name, value in values.items() if name.startswith(f"{selected}:")}
    missing = [name for name, value in parts.items() if math.isnan(value)]
    other = next((name for name, value in parts.items() if not math.isnan(value)), None)
    cause = f": {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} none" if missing else ""
    need = _NEEDS.get(selected.partition(":")[0], "rows that it can be measured on")
    return (
        f"evaluate.select: '{selected}' has no value on the validation set after step {step}{cause}, so this step cannot be "
        f"selected; if no other can, the last step is. It needs {need}: give data.validation such rows, or select by "
        f"{'another metric' if other is None else f'another, such as {other!r}'}."
    )
