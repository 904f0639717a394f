"""The part of an export that scores by itself: programs, tables in fewer bits, and what was found when both were run."""

from __future__ import annotations

__all__ = ["WrittenPrograms", "encoder", "show_programs", "told", "write_programs"]

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from embedshard.config import Config
from embedshard.data.columns import Columns, num_rows, slice_rows
from embedshard.data.statistics import Statistics
from embedshard.data.vocabulary import Vocabulary
from embedshard.errors import ExportError
from embedshard.export.join import as_in_the_data, join, table_vectors
from embedshard.export.manifest import ExportedTable
from embedshard.export.parts import write_quantised_tables
from embedshard.export.program_checks import ProgramChecks, check_programs
from embedshard.export.program_file import load_program
from embedshard.export.programs import make_programs
from embedshard.export.quantised import Format
from embedshard.export.signature import ExportedProgram
from embedshard.export.tracing import save_program
from embedshard.export.verification import Verification
from embedshard.storage import Location
from embedshard.train.checkpoint_reader import Checkpoint

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WrittenPrograms:
    """What was written.

    Attributes:
        programs: by name.
        quantised_tables: files of the tables in fewer bits, by how and by table.
        notes: which program there is not, and why.
        checks: what was found; None where nothing was to be looked at.
    """

    programs: dict[str, ExportedProgram]
    quantised_tables: dict[Format, dict[str, str]]
    notes: list[str]
    checks: ProgramChecks | None


def write_programs(
    config: Config,
    checkpoint: Checkpoint,
    vocabularies: Mapping[str, Vocabulary],
    files: Mapping[str, str],
    resolved: Mapping[str, Any],
    tables: Mapping[str, ExportedTable],
    formats: tuple[Format, ...],
    folder: Location,
    *,
    verifies: bool,
    say: Callable[[str], None],
) -> WrittenPrograms:
    """Writes tables in fewer bits and programs, and runs them on what was written.

    Args:
        config: the run's.
        checkpoint: that is exported.
        vocabularies: of the config's tables.
        files: of vocabularies in the export, by table.
        resolved: what the run has kept of its data.
        tables: that are exported.
        formats: in which they are written too.
        folder: of the export.
        verifies: whether programs and tables are read again.
        say: is told what is being done.

    Raises:
        CheckpointError: if the checkpoint lacks something of the model.
        StorageError: if the folder cannot be written.
    """
    in_fewer: dict[Format, dict[str, str]] = {}
    for kind in formats:
        say(f"tables as {kind}")
        in_fewer[kind] = write_quantised_tables(kind, tables, folder)
    say("programs")
    statistics = Statistics.from_json(resolved.get("statistics", {}))
    made, notes = make_programs(config, checkpoint, vocabularies, files, statistics)
    for name, (traced, program) in list(made.items()):
        try:
            save_program(traced, program, folder)
        except ExportError as error:  # a model of one's own may do what no program can
            notes.append(f"There is no program '{name}': {error}")
            del made[name]
    checks = None
    if verifies and made:
        table_files = {table: exported.file for table, exported in tables.items()}
        checks = check_programs(made, checkpoint, folder, table_files, in_fewer, config.seed)
    return WrittenPrograms(
        {name: program for name, (_, program) in made.items()},
        in_fewer,
        notes,
        checks,
    )


def encoder(
    program: ExportedProgram,
    tables: Mapping[str, str],
    folder: Location,
    batch_size: int,
    kind: Format | None = None,
) -> Callable[[Columns], FloatArray]:
    """Returns what makes vectors of rows as a reader decodes them, by a tower's program over tables' files alone.

    Args:
        program: of a tower.
        tables: the file of each table.
        folder: of the export.
        batch_size: rows at a time.
        kind: of the numbers in the files.
    """
    run = load_program(folder.join(*program.file.split("/")))
    vectors = table_vectors({table: folder.join(*file.split("/")) for table, file in tables.items()}, kind)
    features = {spec.feature for spec in program.inputs}

    def encode(columns: Columns) -> FloatArray:
        own = as_in_the_data(program.inputs, {name: columns[name] for name in features})
        size = num_rows(own)
        parts = [
            run(**join(program.inputs, slice_rows(own, first, min(first + batch_size, size)), vectors))["vector"].numpy()
            for first in range(0, size, batch_size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    return encode


def told(found: Verification | None, checks: ProgramChecks | None) -> dict[str, Any] | None:
    """Returns what was found by both as plain data; None where nothing was looked at."""
    if checks is None:
        return None if found is None else found.to_json()
    tree: dict[str, Any] = {"passed": True, "problems": []} if found is None else found.to_json()
    problems = [*tree["problems"], *checks.problems]
    return tree | {"passed": not problems, "problems": problems, "programs": asdict(checks)}


def show_programs(checks: ProgramChecks, console: Console) -> None:
    """Prints what was found."""
    names = ", ".join(dict.fromkeys(output.partition(".")[0] for output in checks.error))
    console.print(
        f"Ran {names} on {checks.rows} made-up rows of the exported tables: off by at most {max(checks.error.values()):.1e}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, errors in checks.quantised.items():
        shown = ", ".join(f"{output} {error:.1e}" for output, error in errors.items())
        console.print(f"From {name}, off by: {shown}", highlight=False, soft_wrap=True)
