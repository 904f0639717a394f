"""Shows a user's list."""

from __future__ import annotations

__all__ = ["show", "shown"]

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard.export.recommend import Recommendations


def show(found: Recommendations, console: Console) -> None:
    """Prints it as a table."""
    columns = list(dict.fromkeys(name for item in found.items for name in item.metadata))
    left_out = f", without {found.num_seen:,} that the user has met" if found.num_seen else ""
    who = "an unseen user" if found.user is None else f"user {found.user}"
    of_history = "" if found.history is None else f", who met {found.history}"
    title = f"For {who}{of_history}, step {found.step}{left_out}"
    console.print(title, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("", justify="right")
    table.add_column("id")
    table.add_column("score", justify="right")
    for name in columns:
        table.add_column(escape(name))
    for place, item in enumerate(found.items, start=1):
        cells = [escape(shown(item.metadata.get(name, ""))) for name in columns]
        id_ = f"row {item.row}" if item.id is None else str(item.id)
        table.add_row(str(place), escape(id_), f"{item.score:.4f}", *cells)
    console.print(table)
    if found.asked > len(found.items):
        there = f"{found.num_items:,} that the export has{left_out}"
        told = f"{found.asked:,} items were asked for, of {there}: {len(found.items):,}."
        console.print(told, markup=False, soft_wrap=True)


def shown(value: Any) -> str:
    """Returns what is told of an item beside its score."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
