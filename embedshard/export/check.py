"""Compares all files of an export, or of a delta, with the hashes in its manifest, and the programs with what is written."""

from __future__ import annotations

__all__ = ["Checked", "check_files"]

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from embedshard.errors import ExportError
from embedshard.export.delta import open_delta
from embedshard.export.manifest import DELTA_MARKER, FileHash, open_export
from embedshard.export.program_file import check_archive
from embedshard.storage import Location, PathOrUri, locate, reaching


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        folder: that was read.
        kind: what it is.
        run: whose export it is, or becomes by the delta.
        step: of the checkpoint of that.
        num_files: that the manifest lists.
        bytes: in them.
        problems: what is wrong with each file that is not as it was written.
    """

    folder: str
    kind: Literal["export", "delta"]
    run: str
    step: int
    num_files: int
    bytes: int
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self) | {"passed": not self.problems, "problems": list(self.problems)}


def check_files(out: PathOrUri | Location, say: Callable[[str], None] = lambda file: None) -> Checked:
    """Reads every file of an export or a delta, and says of each what is not as it was written.

    The manifest itself is not signed: who can change it can change the files with it.

    Args:
        out: the folder.
        say: is told the file at hand.

    Raises:
        ExportError: if it is neither, did not finish, or its manifest is damaged.
        StorageError: if it cannot be read.
    """
    folder = locate(out)
    files: dict[str, FileHash]
    with reaching(folder):
        if folder.join(DELTA_MARKER).exists():
            delta = open_delta(folder)
            kind: Literal["export", "delta"] = "delta"
            state, files, place = delta.manifest.target, dict(delta.manifest.parts), delta.part
            run, step = state.run, state.step
        else:
            export = open_export(folder)
            kind, files, place = "export", dict(export.manifest.files), export.file
            run, step = export.manifest.run, export.manifest.step
        problems = []
        for name in sorted(files):
            say(name)
            try:
                found = place(name)
                if kind == "export" and name.startswith("programs/"):
                    check_archive(found.read_bytes(), found.uri)
            except ExportError as error:
                problems.append(str(error))
    return Checked(folder.uri, kind, run, step, len(files), sum(file.size for file in files.values()), tuple(problems))
