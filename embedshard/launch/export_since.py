"""Exports what changed since an earlier export: a whole export is written and verified, and kept as its difference alone."""

from __future__ import annotations

__all__ = ["ExportedDelta", "export_since", "show_applied", "show_delta"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from embedshard.errors import ExportError
from embedshard.export.delta import (
    RESULT,
    ChangedBytes,
    ChangedRows,
    DeltaManifest,
    State,
    prepare_delta_folder,
    side_of,
    write_delta,
)
from embedshard.export.delta_apply import Applied
from embedshard.export.manifest import MANIFEST, VERIFICATION, open_export, plain
from embedshard.quantities import size
from embedshard.storage import Location, PathOrUri, locate, reaching

if TYPE_CHECKING:
    from embedshard.export.verification import Verification


@dataclass(frozen=True)
class ExportedDelta:
    """What was written.

    Attributes:
        out: the folder.
        base: the export that it is of.
        step: of the checkpoint.
        manifest: None where verification failed, and the folder is no delta.
        verification: what was found; None where nothing could be, or was not to be, replayed.
        whole: bytes of the whole export.
        sizes: bytes of each of its files, of those that changed.
        notes: what is not in it, and why.
    """

    out: str
    base: State
    step: int
    manifest: DeltaManifest | None
    verification: Verification | None
    whole: int = 0
    sizes: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all parts of the delta."""
        return 0 if self.manifest is None else sum(part.size for part in self.manifest.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        found = None if self.verification is None else self.verification.to_json()
        changes = {} if self.manifest is None else {name: one.model_dump() for name, one in self.manifest.changes.items()}
        removed = [] if self.manifest is None else self.manifest.removed
        return {
            "out": self.out, "base": self.base.model_dump(), "step": self.step, "exported": self.manifest is not None,
            "notes": list(self.notes), "verification": plain(found), "bytes": self.bytes, "whole_bytes": self.whole,
            "changes": changes, "removed": removed,
        }  # fmt: skip


def export_since(
    run_dir: PathOrUri,
    out: PathOrUri,
    since: PathOrUri,
    environment: Mapping[str, str],
    *,
    say: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> ExportedDelta:
    """Exports a checkpoint of a run as what changed since an earlier export. In one process.

    The whole export is written below the delta's folder, verified there as any other, and deleted when the delta is there:
    each file that the delta makes of the earlier export was compared with the one that was verified.

    Args:
        run_dir: the run's folder.
        out: the delta's, new or an earlier delta's.
        since: the manifest of the earlier export, which lies beside its files, or its folder.
        environment: gives configs their `${VAR}`.
        say: is told what is being done.
        options: those of `export_here`.

    Raises:
        EmbedshardError: what a user can act on.
    """
    from embedshard.export.quantised import quantised_formats
    from embedshard.launch.export import export_here  # and with it the model's libraries

    quantised_formats(options.get("quantise", "none"))  # before an earlier delta goes

    place, folder = locate(since), locate(out)
    base = open_export(place.parent if place.name == MANIFEST else place)
    if _is_within(folder, base.folder) or _is_within(base.folder, folder):
        raise ExportError(
            f"{folder.uri} and the earlier export {base.folder.uri} are one, or one in the other. Name a new folder."
        )
    with reaching(base.folder):
        say("files of the earlier export")
        earlier = side_of(base)
        for name in earlier.files:
            base.file(name)
    with reaching(folder):
        prepare_delta_folder(folder)
        result = folder.join(RESULT)
        try:
            exported = export_here(run_dir, result, environment, say=say, **options)
            if exported.manifest is None:
                folder.join(VERIFICATION).write_bytes_atomically(result.join(VERIFICATION).read_bytes())
                return ExportedDelta(folder.uri, earlier.state, exported.step, None, exported.verification)
            say("what changed")
            later = side_of(open_export(result))
            manifest = write_delta(earlier, later, folder)
        finally:
            result.delete_tree()
    sizes = {name: later.files[name].size for name in manifest.changes}
    whole = sum(file.size for file in later.files.values())
    notes = tuple(exported.manifest.notes)
    return ExportedDelta(folder.uri, earlier.state, exported.step, manifest, exported.verification, whole, sizes, notes)


def show_delta(found: ExportedDelta, console: Console) -> None:
    """Prints what was written."""
    if found.manifest is None:
        for problem in found.verification.problems if found.verification is not None else ():
            console.print(f"Out of tolerance: {problem}.", markup=False, soft_wrap=True)
        console.print(f"{found.out} is no delta: it has no manifest.", markup=False, soft_wrap=True)
        return
    table = Table()
    for heading in ("file", "changed", "added", "gone", "kept", "delta", "whole"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    parts, sizes = found.manifest.parts, found.sizes or {}
    for name, change in found.manifest.changes.items():
        if isinstance(change, ChangedRows):
            counts = [f"{count:,}" for count in (change.changed, change.added, change.gone, change.kept)]
            weight = parts[change.rows].size + (parts[change.removed].size if change.removed else 0)
        elif isinstance(change, ChangedBytes):
            counts, weight = [size(change.changed), "", "", ""], parts[change.bytes].size
        else:
            counts, weight = ["whole", "", "", ""], parts[change.file].size
        table.add_row(name, *counts, size(weight), size(sizes[name]))
    console.print(table)
    for sentence in (*found.notes, *(f"{name} is there no longer." for name in found.manifest.removed)):
        console.print(sentence, markup=False, soft_wrap=True)
    checked = "not replayed" if found.verification is None else "verified"
    console.print(
        f"Step {found.base.step} -> {found.step}, {checked}: {size(found.bytes)} for {size(found.whole)}: {found.out}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"Apply it: embedshard apply {found.out} EXPORT", markup=False, soft_wrap=True)


def show_applied(found: Applied, console: Console) -> None:
    """Prints what became of an export."""
    if found.had_been:
        how = "what was begun is finished" if found.finished else "it had been applied, nothing was to do"
        console.print(f"{found.folder} is step {found.after.step}: {how}", markup=False, soft_wrap=True)
    else:
        total = {what: sum(rows[what] for rows in found.rows.values()) for what in ("changed", "added", "gone")}
        rows = ", ".join(f"{count:,} {what}" for what, count in total.items())
        detail = f"; rows: {rows}" if found.rows else ""
        console.print(
            f"{found.folder}: step {found.before.step} -> {found.after.step}; {len(found.files)} files{detail}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if found.earlier:
        steps = ", then ".join(map(str, found.earlier))
        console.print(f"Back to step {steps}: embedshard rollback {found.folder}", markup=False, soft_wrap=True)


def _is_within(one: Location, other: Location) -> bool:
    return f"{one.address.rstrip('/')}/".startswith(f"{other.address.rstrip('/')}/")
