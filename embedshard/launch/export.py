"""Exports a run: writes all parts, reads them again, and makes them an export by a manifest if they are what the run was."""

from __future__ import annotations

__all__ = ["Exported", "export_here", "show"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from embedshard import __version__
from embedshard.config import Config
from embedshard.config.parts import ManagedVocabulary, SASRecConfig, TwoTowerConfig
from embedshard.data.columns import Columns
from embedshard.data.vocabulary import Vocabulary, load_vocabularies
from embedshard.data.vocabulary_building import kept_vocabularies
from embedshard.errors import ConfigError
from embedshard.evaluate.ranking import parse_metric
from embedshard.export.index import choose_kind
from embedshard.export.manifest import (
    VERIFICATION,
    ExportedTable,
    Manifest,
    hash_files,
    plain,
    prepare_folder,
    write_manifest,
)
from embedshard.export.parts import copy_vocabularies, tables_in, write_dense, write_tables
from embedshard.export.program_checks import ProgramChecks
from embedshard.export.quantised import Format, dequantised, quantised_formats
from embedshard.export.verification import INDEX_TOLERANCE, METRIC_TOLERANCE, Verification, prepare, verify
from embedshard.launch.export_programs import WrittenPrograms, encoder, show_programs, told, write_programs
from embedshard.launch.export_towers import Towers, met_in, split_of, write_held, write_towers
from embedshard.launch.run_tables import ids_in, open_checkpoint_of, vocabulary_table
from embedshard.quantities import size
from embedshard.storage import Location, PathOrUri, reaching
from embedshard.train.assembly import Assembly, assemble
from embedshard.train.checkpoint_reader import Checkpoint
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.train.tracking import json_text
from embedshard.world import open_world

FloatArray = npt.NDArray[np.float32]

_RANKING = "recall@10"
"""What users are replayed by where the run has no metric that ranks."""


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

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        found = told(self.verification, self.programs)
        files = {} if self.manifest is None else {name: file.size for name, file in self.manifest.files.items()}
        notes = [] if self.manifest is None else self.manifest.notes
        return {"out": self.out, "step": self.step, "exported": self.manifest is not None, "notes": notes,
                "verification": plain(found), "files": files}  # fmt: skip


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
        quantise: `int8` or `fp16` writes the tables in fewer bits too; `none` does not.
        device: where the towers are computed.
        say: is told what is being done.

    Raises:
        EmbedshardError: what a user can act on.
    """
    choose_kind(index, 0)
    formats = quantised_formats(quantise)
    run = RunDirectory.open(run_dir)
    loaded = run.load_config(environment)
    config, checkpoint = loaded.config, open_checkpoint_of(run, checkpoint_step)
    resolved, result = run.read_json("inventory.json") or {}, run.read_json("result.json") or {}
    tokenizers, counted = resolved.get("tokenizers", {}), kept_vocabularies(config, run.vocabularies)
    vocabularies = load_vocabularies(config, tokenizers, counted)
    folder = prepare_folder(out)
    with reaching(folder):
        say("tables, dense part, vocabularies")
        tables = write_tables(checkpoint, _owners(config, checkpoint, vocabularies), folder)
        dense = write_dense(checkpoint, folder)
        files = copy_vocabularies(config, counted, tokenizers, folder)
        scoring = write_programs(
            config, checkpoint, vocabularies, files, resolved, tables, formats, folder, verifies=verifies, say=say
        )
        why_not, changes_hands = _why_no_towers(config), _that_changes_hands(config)
        own_metrics = plain(result.get("metrics", {})) if result.get("selected_step") == checkpoint.step else {}
        if why_not:
            towers = Towers(notes=[why_not])
        elif changes_hands:
            met_users = partial(met_in, config, device, resolved or None, run.vocabularies)
            towers = write_held(config, folder, files, tables, scoring, changes_hands, index, say, met_users)
        else:
            with open_world(device) as world:
                if world.world_size > 1:
                    raise ConfigError(
                        f"an export is written by one process, and {world.world_size} were started. Start one."
                    )
                say("data and model")
                config = _that_ranks(config)
                parts = assemble(config, world, resolved or None, vocabularies=run.vocabularies, initialises=False)
                restore_model(checkpoint, parts.model, parts.managed)
                towers = write_towers(parts, folder, files, index, say)
                if verifies:
                    say("verification")
                    tolerances = metric_tolerance, index_tolerance
                    towers.verification = _verify(parts, folder, towers, own_metrics, tolerances, scoring, tables)
        found, checks = towers.verification, scoring.checks
        tree = told(found, checks)
        if tree is not None:
            folder.join(VERIFICATION).write_text_atomically(json_text(plain(tree), indent=2) + "\n")
            if not tree["passed"]:
                return Exported(folder.uri, checkpoint.step, None, found, checks)
        manifest = Manifest(
            embedshard=__version__,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            run=run.folder.name,
            step=checkpoint.step,
            attempt=checkpoint.attempt,
            data={
                "step": checkpoint.step,
                "samples_seen": checkpoint.state.get("train", {}).get("samples_seen"),
                "fingerprint": checkpoint.state.get("data"),
                "partitions": checkpoint.state.get("partitions"),
            },
            config=plain(loaded.tree),
            metrics=own_metrics,
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
    return Exported(folder.uri, checkpoint.step, manifest, found, checks)


def show(found: Exported, console: Console) -> None:
    """Prints what was written and what verification found."""
    checked = found.verification
    if checked is not None:
        console.print(
            f"Replayed {checked.queries:,} users of the {checked.split} set through the exported files, against "
            f"{checked.against}: scores differ by at most {checked.score_error:.1e}",
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
        for problem in (told(checked, found.programs) or {}).get("problems", []):
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


def _why_no_towers(config: Config) -> str:
    """Returns why there are no vectors of users and items; nothing where there are."""
    model = config.model
    if not isinstance(model, TwoTowerConfig | SASRecConfig):
        return f"Vectors of users and items are exported of a two_tower and a sasrec; this is a {model.kind}."
    for role in ("user_id", "item_id"):
        feature = config.identity(role)
        if feature is None and isinstance(model, SASRecConfig):
            continue  # a user is a history
        if feature is None:
            return f"There are no vectors of users and items: no id feature names the {role.removesuffix('_id')}."
    if config.data.catalogue is None and config.item_features() != [config.identity("item_id")]:
        return (
            "There are no vectors of users and items: the item tower reads more than the id, and there is no data.catalogue."
        )
    return ""


def _that_changes_hands(config: Config) -> str:
    """Returns the table of users or items whose rows change hands, so that nothing ranks by them; nothing where none do."""
    features = [config.features[name] for role in ("user_id", "item_id") if (name := config.identity(role)) is not None]
    tables = [getattr(feature, "table", "") for feature in features]
    return next((name for name in tables if isinstance(config.tables[name].vocabulary, ManagedVocabulary)), "")


def _that_ranks(config: Config) -> Config:
    """Returns the config, with a metric that ranks where it has none: the catalogue is opened for it."""
    if any(parse_metric(name).ranks for name in config.evaluate.metrics):
        return config
    if config.identity("user_id") is None:
        return config  # a list of candidates is all that could be ranked
    metrics = [*config.evaluate.metrics, _RANKING]
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metrics": metrics})})


# ----------------------------------------------------------------------------------------------------------- the towers
@torch.no_grad()
def _verify(
    parts: Assembly,
    folder: Location,
    towers: Towers,
    own_metrics: Mapping[str, float],
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
    has_own = is_whole and split == "test" and all(name in own_metrics for name in metrics)

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
        split, ranked, metrics, own_metrics if has_own else None, encode,
        users=encoders(scoring.programs["user"], of_files) if towers.user is None else folder.join("users.parquet"),
        items=folder.join("items.parquet"),
        seen=None if towers.seen is None else folder.join(towers.seen),
        index=(towers.index.kind, folder.join(towers.index.file)),
        quantised={
            f"{name} items": partial(dequantised, name, folder.join(file)) for name, file in towers.quantised.items()
        },
        tables={
            f"{kind} tables": partial(both, kind, files)
            for kind, files in scoring.quantised_tables.items()
            if {"user", "item"} <= scoring.programs.keys()
        },
        metric_tolerance=tolerances[0],
        index_tolerance=tolerances[1],
    )  # fmt: skip
