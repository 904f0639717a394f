"""What the footers of a data set's files say: the inventory, which is kept with a run.

A resumed run goes on with the same data or not at all.
"""

from __future__ import annotations

__all__ = ["Inventory", "InventoryFile", "RowGroup", "changes", "fingerprint_of"]

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from embedshard.data.split import Selection

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class InventoryFile:
    """A file, as its footer tells.

    Attributes:
        name: the last part of its path; the folder may change.
        size_bytes: of the file.
        row_groups: rows of each.
        footer_sha256: of the footer, which holds the columns' places, encodings and least and greatest values.
    """

    name: str
    size_bytes: int
    row_groups: tuple[int, ...]
    footer_sha256: str


@dataclass(frozen=True)
class RowGroup:
    """A row group of a data set.

    Attributes:
        file: which of the files.
        index: within the file.
        num_rows: its rows that are in the data set.
        first_row: the first one's number in the data set.
        num_file_rows: all its rows in the file.
        first_file_row: the first one's number among all rows of all files.
    """

    file: int
    index: int
    num_rows: int
    first_row: int
    num_file_rows: int
    first_file_row: int


@dataclass(frozen=True)
class Inventory:
    """All files of a data set, sorted by path.

    Attributes:
        files: what their footers say.
        selection: which of their rows are in the data set; None for all. The others have no number, and nobody who reads
            the data set meets them.
    """

    files: tuple[InventoryFile, ...]
    selection: Selection | None = None

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """All row groups, in file order."""
        groups, first_row, first_file_row = [], 0, 0
        for number, file in enumerate(self.files):
            for index, file_rows in enumerate(file.row_groups):
                end = first_file_row + file_rows
                rows = file_rows if self.selection is None else self.selection.count(first_file_row, end)
                groups.append(RowGroup(number, index, rows, first_row, file_rows, first_file_row))
                first_row, first_file_row = first_row + rows, end
        return tuple(groups)

    @cached_property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def num_file_rows(self) -> int:
        """Rows of the files, selected or not."""
        return sum(sum(file.row_groups) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Of all that the inventory holds; another folder does not change it."""
        held = repr(self.files) if self.selection is None else repr((self.files, self.selection))
        return hashlib.sha256(held.encode()).hexdigest()

    def selected_rows(self, group: RowGroup) -> IntArray | None:
        """Returns which rows of a row group are in the data set, ascending; None for all."""
        if self.selection is None:
            return None
        return self.selection.rows(group.first_file_row, group.first_file_row + group.num_file_rows)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what a run keeps: the files. What is selected of them its config says."""
        return [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "row_groups": list(file.row_groups),
                "footer_sha256": file.footer_sha256,
            }
            for file in self.files
        ]

    @classmethod
    def from_json(cls, files: Sequence[Mapping[str, Any]]) -> Inventory:
        """Returns what a run has kept."""
        return cls(
            tuple(
                InventoryFile(file["name"], file["size_bytes"], tuple(file["row_groups"]), file["footer_sha256"])
                for file in files
            )
        )


def fingerprint_of(inventories: Sequence[Inventory]) -> str:
    """Returns the fingerprint of a training set, given the inventory of each partition."""
    digest = hashlib.sha256()
    for inventory in inventories:
        digest.update(inventory.fingerprint.encode())
    return digest.hexdigest()


def changes(saved: Inventory, now: Inventory) -> str:
    """Returns how files differ from what they were, naming those that are missing, new, or changed; empty if they don't."""
    if saved.files == now.files:
        return ""
    before, after = ({file.name: file for file in inventory.files} for inventory in (saved, now))
    found = [
        *(f"{name} is missing" for name in before if name not in after),
        *(f"{name} is new" for name in after if name not in before),
        *(f"{name} has changed" for name in before if name in after and before[name] != after[name]),
    ] or ["the files are the same but in another order"]
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
