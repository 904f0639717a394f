"""Exports a run: writes all parts, reads them again, and makes them an export by a manifest if they are what the run was."""

from __future__ import annotations

__all__ = ["Exported", "export_here", "show", "write_export"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from embedshard import __version__
from embedshard.config import Config, parse_metric
from embedshard.config.parts import ItemEmbeddingConfig
from embedshard.data.columns import Columns
from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import ConfigError
from embedshard.export.item_verification import verify_items
from embedshard.export.join import table_vectors
from embedshard.export.manifest import (
    MANIFEST,
    VERIFICATION,
    ExportedTable,
    Manifest,
    check_folder,
    hash_files,
    plain,
    prepared_folder,
    write_manifest,
)
from embedshard.export.parts import copy_vocabularies, tables_in, write_dense, write_tables
from embedshard.export.program_checks import ProgramChecks, checkpoint_vectors
from embedshard.export.quantised import Format, dequantised
from embedshard.export.verification import INDEX_TOLERANCE, METRIC_TOLERANCE, Verification, prepare, verify
from embedshard.launch.export_plan import ExportPlan, planned_export
from embedshard.launch.export_programs import WrittenPrograms, encoder, show_programs, told, write_programs
from embedshard.launch.export_towers import Towers, met_in, split_of, write_held, write_near, write_towers
from embedshard.launch.run_tables import ids_in, vocabulary_table
from embedshard.quantities import size
from embedshard.storage import Location, PathOrUri, reaching
from embedshard.train.assembly import Assembly
from embedshard.train.checkpoint_reader import Checkpoint
from embedshard.train.tracking import json_text

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the folder.
        step: of the checkpoint.
        manifest: None where verification failed, and the folder is no export.
        verification: what was found; None where nothing could be, or was not to be, replayed.
        programs: what was found of programs and of tables in fewer bits; None where they were not to be verified.
    """

    out: str
    step: int
    manifest: Manifest | None
    verification: Verification | None
    programs: ProgramChecks | None = None

    @property
    def told(self) -> dict[str, Any] | None:
        """What was found by both as plain data; None where nothing was looked at."""
        return told(self.verification, self.programs)

    @property
    def problems(self) -> list[str]:
        """What is out of tolerance."""
        return (self.told or {}).get("problems", [])

    @property
    def checked(self) -> str:
        """What was looked at, in words."""
        if self.verification is not None:
            return "verified"
        return "nothing was replayed, programs were run" if self.programs is not None else "not verified"

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        files = {} if self.manifest is None else {name: file.size for name, file in self.manifest.files.items()}
        notes = [] if self.manifest is None else self.manifest.notes
        return {"out": self.out, "step": self.step, "exported": self.manifest is not None, "notes": notes,
                "verification": plain(self.told), "files": files}  # fmt: skip


def export_here(
    run_dir: PathOrUri,
    out: PathOrUri | Location,
    environment: Mapping[str, str],
    *,
    checkpoint_step: int | None = None,
    index: str = "auto",
    verifies: bool = True,
    metric_tolerance: float = METRIC_TOLERANCE,
    index_tolerance: float = INDEX_TOLERANCE,
    quantise: str = "none",
    device: str = "cpu",
    say: Callable[[str], None] = lambda sentence: None,
) -> Exported:
    """Exports a checkpoint of a run into a folder that is new or an earlier export. In one process.

    Args:
        run_dir: the run's folder.
        out: the export's.
        environment: gives configs their `${VAR}`.
        checkpoint_step: None takes the one that the run selected, else the newest.
        index: `auto` or a kind.
        verifies: whether held-out users are replayed. What fails has no manifest, and is no export.
        metric_tolerance: how far a metric may be from the run's.
        index_tolerance: which share of the exact lists the index may miss.
        quantise: `int8`, `fp16` or `int8,fp16` writes the tables in fewer bits too; `none` does not.
        device: where the towers are computed.
        say: is told what is being done.

    Raises:
        EmbedshardError: what a user can act on.
    """
    folder = check_folder(out)
    with reaching(folder):
        replaces = folder.join(MANIFEST).exists()
    with planned_export(
        run_dir, environment, checkpoint_step=checkpoint_step, index=index, quantise=quantise, device=device,
        reads_all=replaces, say=say,
    ) as plan:  # fmt: skip
        return write_export(
            plan, folder, verifies=verifies, metric_tolerance=metric_tolerance, index_tolerance=index_tolerance, say=say
        )


def write_export(
    plan: ExportPlan,
    out: Location,
    *,
    verifies: bool = True,
    metric_tolerance: float = METRIC_TOLERANCE,
    index_tolerance: float = INDEX_TOLERANCE,
    say: Callable[[str], None] = lambda sentence: None,
) -> Exported:
    """Writes what is planned into a folder that is new or an earlier export.

    Args:
        plan: as `planned_export` yields it.
        out: the folder.
        verifies: whether held-out users are replayed. What fails has no manifest, and is no export.
        metric_tolerance: how far a metric may be from the run's.
        index_tolerance: which share of the exact lists the index may miss.
        say: is told what is being done.

    Raises:
        EmbedshardError: what a user can act on.
    """
    config, checkpoint, resolved = plan.config, plan.checkpoint, plan.resolved
    with prepared_folder(out) as folder, reaching(folder):
        say("tables, dense part, vocabularies")
        tables = write_tables(checkpoint, _owners(config, checkpoint, plan.vocabularies), folder)
        dense = write_dense(checkpoint, folder)
        files = copy_vocabularies(config, plan.counted, resolved.get("tokenizers", {}), folder)
        scoring = write_programs(
            config, checkpoint, plan.vocabularies, files, resolved, tables, plan.formats, folder, verifies=verifies, say=say
        )
        if plan.why_no_towers:
            towers = Towers(notes=[plan.why_no_towers])
        elif isinstance(config.model, ItemEmbeddingConfig):
            owner = config.features[config.model.sequence].table  # type: ignore[union-attr]  # checked: a list
            towers = write_near(config, folder, files, tables, plan.vocabularies[owner].rows, plan.index, say)
            if verifies:
                say("verification")
                towers.verification = _verify_items(checkpoint, folder, towers, scoring, index_tolerance)
        elif plan.changes_hands:
            met_users = partial(met_in, config, plan.device, resolved or None, plan.run.vocabularies)
            towers = write_held(config, folder, files, tables, scoring, plan.changes_hands, plan.index, say, met_users)
        else:
            assert plan.parts is not None, "it is put together where towers are written"
            towers = write_towers(plan.parts, folder, files, plan.index, say)
            if verifies:
                say("verification")
                tolerances = metric_tolerance, index_tolerance
                towers.verification = _verify(plan.parts, folder, towers, plan.metrics, tolerances, scoring, tables)
        found = Exported(folder.uri, checkpoint.step, None, towers.verification, scoring.checks)
        if (tree := found.told) is not None:
            folder.join(VERIFICATION).write_text_atomically(json_text(plain(tree), indent=2) + "\n")
            if found.problems:
                return found
        manifest = Manifest(
            embedshard=__version__,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            run=plan.run.folder.name,
            step=checkpoint.step,
            attempt=checkpoint.attempt,
            data={
                "step": checkpoint.step,
                "samples_seen": checkpoint.state.get("train", {}).get("samples_seen"),
                "fingerprint": checkpoint.state.get("data"),
                "partitions": checkpoint.state.get("partitions"),
            },
            config=plain(plan.tree),
            metrics=plan.metrics,
            tables=tables,
            dense=dense,
            user=towers.user,
            item=towers.item,
            seen=towers.seen,
            index=towers.index,
            quantised={str(name): file for name, file in towers.quantised.items()},
            programs=scoring.programs,
            quantised_tables={str(kind): written for kind, written in scoring.quantised_tables.items()},
            verification=plain(tree),
            notes=[*towers.notes, *scoring.notes],
            files=hash_files(folder),
        )
        write_manifest(folder, manifest)
    return replace(found, manifest=manifest)


def show(found: Exported, console: Console) -> None:
    """Prints what was written and what verification found."""
    checked = found.verification
    if checked is not None:
        who = "items" if checked.split == "items" else f"users of the {checked.split} set"
        what = "cosines" if checked.split == "items" else "scores"
        console.print(
            f"Replayed {checked.queries:,} {who} through the exported files, against {checked.against}: {what} differ by at "
            f"most {checked.score_error:.1e}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        table = Table()
        for heading in ("", "run", "export", "lost"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, values in checked.metrics.items():
            lost = f"{values['run'] - values['export']:.1e}"
            table.add_row(name, f"{values['run']:.4f}", f"{values['export']:.4f}", lost)
        lists = {f"{checked.index['kind']} index": checked.index} if checked.index else {}
        for name, recall in (lists | checked.quantised).items():
            table.add_row(
                f"{name}: of the exact lists of {checked.k}", "", f"{recall['recall']:.4f}", f"{recall['recall_lost']:.1e}"
            )
        console.print(table)
    if found.programs is not None:
        show_programs(found.programs, console)
    if found.manifest is None:
        for problem in found.problems:
            console.print(f"Out of tolerance: {problem}.", markup=False, soft_wrap=True, highlight=False)
        console.print(f"{found.out} is no export: it has no manifest.", markup=False, soft_wrap=True, highlight=False)
        return
    manifest = found.manifest
    for note in manifest.notes:
        console.print(note, markup=False, soft_wrap=True, highlight=False)
    total = size(sum(file.size for file in manifest.files.values()))
    towers = [f"{tower.vectors:,} {name}" for name, tower in (("users", manifest.user), ("items", manifest.item)) if tower]
    what = ", ".join([f"{len(manifest.tables)} tables", *towers])
    console.print(f"Step {found.step}: {what}; {total} in {len(manifest.files)} files: {found.out}",
                  markup=False, soft_wrap=True, highlight=False)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- what there is
def _owners(config: Config, checkpoint: Checkpoint, vocabularies: Mapping[str, Vocabulary]) -> dict[str, Vocabulary | None]:
    """Returns whose ids the rows of each table are; None of a tree's nodes, and where an id is the sum of two rows."""
    found: dict[str, Vocabulary | None] = {}
    for table in tables_in(checkpoint):
        try:
            owner = vocabulary_table(config, table)
        except ConfigError:
            found[table] = None
            continue
        is_composed = config.tables[owner].composition is not None
        found[table] = None if is_composed else ids_in(checkpoint, owner, vocabularies[owner])
    return found


# ----------------------------------------------------------------------------------------------------------- the towers
def _verify_items(
    checkpoint: Checkpoint, folder: Location, towers: Towers, scoring: WrittenPrograms, index_tolerance: float
) -> Verification | None:
    """Returns what is found where items alone have vectors; None where they have none."""
    if towers.item is None or towers.index is None:
        return None
    table = towers.item.table
    files = {kind: folder.join(*names[table].split("/")) for kind, names in scoring.quantised_tables.items()}
    return verify_items(
        folder.join(towers.item.file),
        partial(checkpoint_vectors(checkpoint), table),
        (towers.index.kind, folder.join(towers.index.file)),
        _coarse_items(folder, towers),
        {f"{kind} tables": partial(table_vectors({table: place}, kind), table) for kind, place in files.items()},
        index_tolerance,
    )


def _coarse_items(folder: Location, towers: Towers) -> dict[str, Callable[[], FloatArray]]:
    return {f"{name} items": partial(dequantised, name, folder.join(file)) for name, file in towers.quantised.items()}


@torch.no_grad()
def _verify(
    parts: Assembly,
    folder: Location,
    towers: Towers,
    own_metrics: Mapping[str, float | None],
    tolerances: tuple[float, float],
    scoring: WrittenPrograms,
    tables: Mapping[str, ExportedTable],
) -> Verification | None:
    split = split_of(parts)
    if split is None or towers.index is None:
        return None
    if towers.user is None and ("user" not in scoring.programs or parts.config.evaluate.candidates == "catalogue"):
        return None  # nobody is named, and no lists are given
    model, sets = parts.model.module, parts.evaluator.sets
    ranked, is_whole = prepare(sets.ranked(split))
    metrics = [name for name in parts.config.evaluate.metrics if parse_metric(name).ranks]
    own = {name: value for name in metrics if (value := own_metrics.get(name)) is not None}
    has_own = is_whole and split == "test" and len(own) == len(metrics)

    def encode(what: str) -> torch.Tensor:
        if what == "queries":
            return torch.cat(list(parts.evaluator.encoded(model.encode_queries, ranked.queries, len(ranked.users))))
        catalogue = sets.catalogue
        return torch.cat(list(parts.evaluator.encoded(model.encode_candidates, catalogue.columns, len(catalogue))))

    encoders = partial(encoder, folder=folder, batch_size=parts.config.evaluate.batch_size)

    def both(kind: Format, files: Mapping[str, str], queries: Columns) -> tuple[FloatArray, FloatArray]:
        user, item = (encoders(scoring.programs[name], files, kind=kind) for name in ("user", "item"))
        return user(queries), item(sets.catalogue.columns)

    of_files = {table: exported.file for table, exported in tables.items()}
    return verify(
        split, ranked, metrics, own if has_own else None, encode,
        users=encoders(scoring.programs["user"], of_files) if towers.user is None else folder.join("users.parquet"),
        items=folder.join("items.parquet"),
        seen=None if towers.seen is None else folder.join(towers.seen),
        index=(towers.index.kind, folder.join(towers.index.file)),
        quantised=_coarse_items(folder, towers),
        tables={
            f"{kind} tables": partial(both, kind, files)
            for kind, files in scoring.quantised_tables.items()
            if {"user", "item"} <= scoring.programs.keys()
        },
        metric_tolerance=tolerances[0],
        index_tolerance=tolerances[1],
    )  # fmt: skip
