"""Exports what changed since an earlier export: a whole export is written and verified, and kept as its difference alone."""

from __future__ import annotations

__all__ = ["ExportedDelta", "export_since", "show_applied", "show_delta"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from embedshard.config import differences
from embedshard.errors import ExportError
from embedshard.export.delta import (
    RESULT,
    ChangedBytes,
    ChangedRows,
    DeltaManifest,
    State,
    check_delta_folder,
    prepare_delta_folder,
    side_of,
    write_delta,
)
from embedshard.export.delta_apply import Applied
from embedshard.export.manifest import MANIFEST, VERIFICATION, OpenExport, alone_in, open_export, plain
from embedshard.export.parts import tables_in
from embedshard.quantities import size
from embedshard.storage import Location, PathOrUri, locate, reaching
from embedshard.train.run_directory import FREE_TO_CHANGE, is_below

if TYPE_CHECKING:
    from embedshard.export.manifest import Manifest
    from embedshard.launch.export import Exported
    from embedshard.launch.export_plan import ExportPlan

_SHOWN: Final = 5
_FEW: Final = 0.1


@dataclass(frozen=True)
class ExportedDelta:
    """What was written.

    Attributes:
        out: the folder.
        base: the export that it is of.
        exported: the whole export that it makes of it, which is deleted by now.
        manifest: None where verification failed, and the folder is no delta.
        relation: what a person should know of the earlier export who took it for an earlier step of the same run.
    """

    out: str
    base: State
    exported: Exported
    manifest: DeltaManifest | None = None
    relation: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all parts of the delta."""
        return 0 if self.manifest is None else sum(part.size for part in self.manifest.parts.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the whole export."""
        whole = self.exported.manifest
        return {} if whole is None else {name: file.size for name, file in whole.files.items()}

    @property
    def whole(self) -> int:
        """Bytes of the whole export."""
        return sum(self.sizes.values())

    @property
    def keeps_nothing(self) -> bool:
        """Whether hardly a row of the files that changed is as it was: the delta is about a whole export."""
        changes = () if self.manifest is None else self.manifest.changes.values()
        rows = [one for one in changes if isinstance(one, ChangedRows)]
        kept, total = sum(one.kept for one in rows), sum(one.kept + one.changed + one.added for one in rows)
        return total > 0 and kept < _FEW * total

    @property
    def notes(self) -> list[str]:
        """What is not in it, and why."""
        return [] if self.exported.manifest is None else self.exported.manifest.notes

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        changes = {} if self.manifest is None else {name: one.model_dump() for name, one in self.manifest.changes.items()}
        removed = [] if self.manifest is None else self.manifest.removed
        return {
            "out": self.out, "base": self.base.model_dump(), "step": self.exported.step,
            "exported": self.manifest is not None, "relation": list(self.relation), "notes": self.notes,
            "verification": plain(self.exported.told),
            "bytes": self.bytes, "whole_bytes": self.whole, "changes": changes, "removed": removed,
        }  # fmt: skip


def export_since(
    run_dir: PathOrUri,
    out: PathOrUri,
    since: PathOrUri,
    environment: Mapping[str, str],
    *,
    checkpoint_step: int | None = None,
    index: str = "auto",
    quantise: str = "none",
    device: str = "cpu",
    say: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> ExportedDelta:
    """Exports a checkpoint of a run as what changed since an earlier export. In one process.

    The whole export is written below the delta's folder, verified there as any other, and deleted when the delta is there:
    each file that the delta makes of the earlier export was compared with the one that was verified. An earlier delta goes
    when all that the export is made of was read.

    Args:
        run_dir: the run's folder.
        out: the delta's, new or an earlier delta's.
        since: the manifest of the earlier export, which lies beside its files, or its folder.
        environment: gives configs their `${VAR}`.
        checkpoint_step: None takes the one that the run selected, else the newest.
        index: `auto` or a kind.
        quantise: as `export_here` takes it.
        device: where the towers are computed.
        say: is told what is being done.
        options: those of `write_export`.

    Raises:
        EmbedshardError: what a user can act on.
    """
    from embedshard.launch.export import write_export  # and with it the model's libraries
    from embedshard.launch.export_plan import planned_export

    folder, base = locate(out), _open_earlier(locate(since))
    if _is_within(folder, base.folder) or _is_within(base.folder, folder):
        raise ExportError(
            f"{folder.uri} and the earlier export {base.folder.uri} are one, or one in the other. Name a new folder."
        )
    with reaching(folder):
        check_delta_folder(folder)
        replaces = folder.join(MANIFEST).exists()
    with reaching(base.folder):
        say("files of the earlier export")
        earlier = side_of(base)
        for name in earlier.files:
            base.file(name)
    with planned_export(
        run_dir, environment, checkpoint_step=checkpoint_step, index=index, quantise=quantise, device=device,
        reads_all=replaces, say=say,
    ) as plan, reaching(folder):  # fmt: skip
        check_comparable(base, plan)
        folder.make_dirs()
        with alone_in(folder):
            prepare_delta_folder(folder)
            result = folder.join(RESULT)
            try:
                exported = write_export(plan, result, say=say, **options)
                found = ExportedDelta(folder.uri, earlier.state, exported, relation=relation_of(base.manifest, plan))
                if exported.manifest is None:
                    folder.join(VERIFICATION).write_bytes_atomically(result.join(VERIFICATION).read_bytes())
                    return found
                say("what changed")
                return replace(found, manifest=write_delta(earlier, side_of(open_export(result)), folder))
            finally:
                result.delete_tree()


def show_delta(found: ExportedDelta, console: Console) -> None:
    """Prints what was written."""
    if found.manifest is None:
        for sentence in found.relation:
            console.print(sentence, markup=False, soft_wrap=True)
        for problem in found.exported.problems:
            console.print(f"Out of tolerance: {problem}.", markup=False, soft_wrap=True)
        console.print(f"{found.out} is no delta: it has no manifest.", markup=False, soft_wrap=True)
        return
    table = Table()
    for heading in ("file", "changed", "added", "gone", "kept", "delta", "whole"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    parts, sizes = found.manifest.parts, found.sizes
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
    for sentence in (*found.relation, *found.notes, *(f"{name} is there no longer." for name in found.manifest.removed)):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(
        f"Step {found.base.step} -> {found.exported.step}, {found.exported.checked}: {size(found.bytes)} for "
        f"{size(found.whole)}: {found.out}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if found.keeps_nothing:
        told = "Hardly a row is as it was, so the delta is about a whole export: 'export' without --since writes that."
        console.print(told, markup=False, soft_wrap=True)
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


def check_comparable(base: OpenExport, plan: ExportPlan) -> None:
    """Checks that something of an earlier export may be left in what is exported.

    Raises:
        ExportError: if it is of another kind of model, or no table has the name and the dim that it has there.
    """
    was, kind = base.manifest.config.get("model", {}).get("kind"), plan.config.model.kind
    whole = f"Export whole: embedshard export {plan.run.folder.uri} OUT; or name an export of this run with --since."
    if was != kind:
        raise ExportError(
            f"{base.folder.uri} is an export of run '{base.manifest.run}', whose model is a {was}; that of "
            f"{plan.run.folder.uri} is a {kind}. There is nothing to compare. {whole}"
        )
    before = {name: table.dim for name, table in base.manifest.tables.items()}
    after = {name: plan.checkpoint.tensors[f"tables/{name}/weight"].shape[1] for name in tables_in(plan.checkpoint)}
    if before and not before.items() & after.items():
        shown = (", ".join(f"{name} {dim}" for name, dim in sorted(dims.items())) for dims in (before, after))
        raise ExportError(
            f"{base.folder.uri} is an export of run '{base.manifest.run}' with tables of dim {next(shown)}; "
            f"{plan.run.folder.uri} has {next(shown)}. No row could be kept. {whole}"
        )


def relation_of(base: Manifest, plan: ExportPlan) -> tuple[str, ...]:
    """Returns in what an earlier export is none of an earlier step of the same run; nothing where it is one."""
    told, run = [], plan.run.folder.name
    others = [one for one in differences(base.config, plain(plan.tree)) if not is_below(one[0], FREE_TO_CHANGE)]
    if base.run != run or others:
        shown = ", ".join(path for path, _, _ in others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        whose = f"run '{base.run}', and this is run '{run}'" if base.run != run else f"a run of the same name, '{run}'"
        config = f"their configs differ in {shown}" if others else "their configs are the same"
        told.append(f"The earlier export is of {whose}; {config}.")
    if base.data.get("fingerprint") != plan.checkpoint.state.get("data"):
        told.append("The earlier export is of other training data.")
    if not told and base.step == plan.checkpoint.step and base.attempt == plan.checkpoint.attempt:
        told.append(f"The earlier export is of the same checkpoint, step {base.step}.")
    elif base.step > plan.checkpoint.step:
        told.append(
            f"The earlier export is of a later step: this delta goes back, from {base.step} to {plan.checkpoint.step}."
        )
    return tuple(told)


def _open_earlier(place: Location) -> OpenExport:
    """Opens an earlier export by its manifest or its folder."""
    if place.name == MANIFEST:
        return open_export(place.parent)
    with reaching(place):
        if place.is_file():
            raise ExportError(
                f"--since {place.uri} is no {MANIFEST}. Name that of an earlier export, or the folder in which it lies."
            )
    return open_export(place)


def _is_within(one: Location, other: Location) -> bool:
    return f"{one.address.rstrip('/')}/".startswith(f"{other.address.rstrip('/')}/")
