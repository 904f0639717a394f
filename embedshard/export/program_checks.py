"""Runs programs on tables' files, and says how far that is from the model over the checkpoint, and what fewer bits cost.

Rows are made up: ids at even distances of their tables, lists of them, numbers about as the data have them. So it needs no
data, and looks at every table. What a program takes is joined from the export's files; beside it runs what it was traced
from, over vectors out of the checkpoint itself.

Shapes: B rows.
"""

from __future__ import annotations

__all__ = ["ProgramChecks", "check_programs", "checkpoint_vectors"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from embedshard.config.composition import Composition
from embedshard.data.columns import Columns, Flat, Ragged, offsets_of
from embedshard.export.join import Vectors, join, table_vectors
from embedshard.export.program_file import load_program
from embedshard.export.quantised import Format
from embedshard.export.read import spread_rows
from embedshard.export.signature import ExportedProgram, ProgramInput
from embedshard.export.tracing import Traced
from embedshard.storage import Location
from embedshard.train.checkpoint_reader import Checkpoint

IntArray = npt.NDArray[np.int64]

_ROWS: Final = 64
_LONGEST: Final = 8
_TOLERANCE: Final = 1e-5
"""Of what a program returns, relative where it is above 1."""


@dataclass
class ProgramChecks:
    """What was found.

    Attributes:
        rows: how many were made up.
        error: of each program, by output: the largest difference from the model.
        quantised: the same of its results from tables in fewer bits, by their name and by program: of scores, where towers
            are two. They are reported, not judged.
        problems: what is out of tolerance.
    """

    rows: int = _ROWS
    error: dict[str, float] = field(default_factory=dict)
    quantised: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_programs(
    programs: Mapping[str, tuple[Traced, ExportedProgram]],
    checkpoint: Checkpoint,
    folder: Location,
    tables: Mapping[str, str],
    quantised: Mapping[Format, Mapping[str, str]],
    seed: int,
) -> ProgramChecks:
    """Reads every program and every table again, and compares.

    Args:
        programs: what was written, with what it was traced from.
        checkpoint: that was exported.
        folder: of the export.
        tables: the file of each table.
        quantised: the files in fewer bits of each table, by how.
        seed: of the rows that are made up.

    Raises:
        ExportError: if a file is not what was written.
    """
    found, generator = ProgramChecks(), np.random.default_rng(seed)
    of_files = table_vectors(_places(folder, tables))
    in_fewer = {kind: table_vectors(_places(folder, files), kind) for kind, files in quantised.items()}
    held = checkpoint_vectors(checkpoint)
    exact: dict[str, torch.Tensor] = {}
    coarse: dict[Format, dict[str, torch.Tensor]] = {kind: {} for kind in in_fewer}
    for name, (traced, program) in programs.items():
        columns = _made_up(program.inputs, folder, tables, generator)
        run = load_program(folder.join(*program.file.split("/")))
        with torch.no_grad():
            expected = traced(**join(program.inputs, columns, held))
        exact |= _named(name, run(**join(program.inputs, columns, of_files)))
        for output, value in _named(name, expected).items():
            error = float((exact[output] - value).abs().max())
            found.error[output] = error
            allowed = _TOLERANCE * max(1.0, float(value.abs().max()))
            if not error <= allowed:
                found.problems.append(f"program '{output}' is off by {error:.2e}; allowed are {allowed:.2e}")
        for kind, vectors in in_fewer.items():
            coarse[kind] |= _named(name, run(**join(program.inputs, columns, vectors)))
    for fewer, values in coarse.items():
        errors = {output: float((values[output] - exact[output]).abs().max()) for output in exact}
        if {"user.vector", "item.vector"} <= exact.keys():
            scores, of_fewer = (one["user.vector"] @ one["item.vector"].T for one in (exact, values))
            errors["score"] = float((scores - of_fewer).abs().max())
        found.quantised[f"{fewer} tables"] = errors
    return found


def checkpoint_vectors(checkpoint: Checkpoint) -> Vectors:
    """Returns what reads rows out of a checkpoint."""

    def vectors(table: str, rows: IntArray) -> npt.NDArray[np.float32]:
        name = f"tables/{table}/weight"
        found = np.zeros((len(rows), checkpoint.tensors[name].shape[1]), dtype=np.float32)
        blocks = checkpoint.row_blocks(name, lambda first, last: bool(((rows >= first) & (rows < last)).any()))
        for first, block in blocks:
            here = (rows >= first) & (rows < first + len(block))
            found[here] = block[torch.from_numpy(rows[here] - first)].float().numpy()
        return found

    return vectors


def _places(folder: Location, files: Mapping[str, str]) -> dict[str, Location]:
    return {table: folder.join(*file.split("/")) for table, file in files.items()}


def _named(program: str, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{program}.{output}": value for output, value in outputs.items()}


def _made_up(
    inputs: list[ProgramInput], folder: Location, tables: Mapping[str, str], generator: np.random.Generator
) -> Columns:
    columns: Columns = {}
    for spec in inputs:
        if spec.feature in columns:
            continue
        if spec.kind == "dense":
            numbers = generator.standard_normal(_ROWS) * (spec.deviation or 1.0) + (spec.mean or 0.0)
            if spec.config["missing"] == "zero":
                numbers[0] = np.nan
            columns[spec.feature] = Flat(numbers)
            continue
        assert spec.table is not None, "what is no number is looked up"
        if spec.pair is not None:
            known = np.linspace(0, Composition(**spec.pair).num_ids, _ROWS).astype(np.int64)
        else:
            known = spread_rows(folder.join(*tables[spec.table].split("/")), _ROWS)
        if spec.config["kind"] == "id":
            columns[spec.feature] = Flat(generator.choice(known, _ROWS))
            continue
        most = min(_LONGEST, spec.config.get("max_length") or _LONGEST)
        lengths = generator.integers(0, most + 1, _ROWS)
        lengths[0], lengths[1] = 0, most
        total = int(lengths.sum())
        weights = generator.random(total).astype(np.float32) if spec.config["kind"] == "weighted_bag" else None
        offsets = offsets_of(lengths)
        columns[spec.feature] = Ragged(generator.choice(known, total), offsets, weights)
    return columns
