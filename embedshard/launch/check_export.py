"""Shows what became of an export's files, or a delta's."""

from __future__ import annotations

__all__ = ["show_checked"]

from rich.console import Console

from embedshard.export.check import Checked
from embedshard.quantities import size


def show_checked(found: Checked, console: Console) -> None:
    """Prints what is not as it was written, or that all is."""
    for problem in found.problems:
        console.print(problem, markup=False, soft_wrap=True, highlight=False)
    outcome = f"{len(found.problems)} are not as they were written" if found.problems else "all are as they were written"
    what = "Export" if found.kind == "export" else "Delta"
    console.print(
        f"{what} of run '{found.run}', step {found.step}: {found.num_files} files, {size(found.bytes)}; {outcome}: "
        f"{found.folder}",
        markup=False, soft_wrap=True, highlight=False,
    )  # fmt: skip
