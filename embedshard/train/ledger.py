"""The record of which rows were trained, from which `audit` proves that each was trained exactly once an epoch.

A line covers a range of steps of one pass over one partition on one rank, and holds an order-free sum of hashes of the
row numbers. Its steps follow each other without a gap: where the loop skips or repeats one, a line ends, so that the
ledger says so. Lines end at checkpoints, so none holds work from before and after one. They are on the disk before the
checkpoint is committed; what a crash takes away is work after the newest checkpoint, which a resumed run does again.
"""

from __future__ import annotations

__all__ = ["Ledger", "LedgerLine", "Unreadable", "ledger_files", "read_ledger"]

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from embedshard.data.order import Digest, row_digest, sum_of_digests
from embedshard.lines import LineFile
from embedshard.storage import Location, PathOrUri, locate

if TYPE_CHECKING:  # whoever only reads ledgers need not wait for torchrec
    from embedshard.data.batch import Batch

Count = Annotated[int, Field(ge=0)]

_NAME = re.compile(r"(\d{4,})-(\d{5,})\.jsonl")


class LedgerLine(BaseModel):
    """A line of a ledger.

    Attributes:
        epoch: 0-based pass over all partitions.
        partition: which of the partitions, from 0.
        first_step: 0-based, of the run.
        last_step: itself included.
        rows: trained by this rank in these steps; padding not counted.
        weightless_rows: those among them whose weight is 0.
        digest: of the rows, 32 hexadecimal digits.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: Count
    partition: Count
    first_step: Count
    last_step: Count
    rows: Count
    weightless_rows: Count
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

    @model_validator(mode="after")
    def _check(self) -> LedgerLine:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step={self.last_step} is before first_step={self.first_step}")
        if self.weightless_rows > self.rows:
            raise ValueError(f"weightless_rows={self.weightless_rows} are more than rows={self.rows}")
        return self

    @property
    def words(self) -> Digest:
        """The digest as numbers."""
        return int(self.digest[:16], 16), int(self.digest[16:], 16)


@dataclass(frozen=True)
class Unreadable:
    """A line that a kill cut off, or that is not a ledger's.

    Attributes:
        number: of the line in its file, from 1.
        is_cut_off: whether the file ends within it.
        reason: what is wrong with it.
    """

    number: int
    is_cut_off: bool
    reason: str


class Ledger:
    """One rank's ledger of one attempt.

    Args:
        folder: `ledger/` of the run directory.
        attempt: which start of the run this is.
        rank: this process's.
    """

    def __init__(self, folder: PathOrUri | Location, attempt: int, rank: int) -> None:
        self._file = LineFile(locate(folder).join(f"{attempt:04d}-{rank:05d}.jsonl"))
        self._key: tuple[int, int] | None = None
        self._clear()

    def _clear(self) -> None:
        self._first_step = self._last_step = -1
        self._rows = self._weightless_rows = 0
        self._digest: Digest = (0, 0)

    def add(self, batch: Batch) -> None:
        """Counts a batch whose optimizer step was done."""
        position = batch.training_position
        key = (position.epoch, position.partition)
        if key != self._key or position.step != self._last_step + 1:
            self._end_line()
            self._key = key
        if self._first_step < 0:
            self._first_step = position.step
        self._last_step = position.step
        rows = batch.rows.numpy()
        self._digest = sum_of_digests([self._digest, row_digest(*key, rows)])
        if batch.is_full:
            self._rows += len(rows)
            return
        valid = rows >= 0
        self._rows += int(valid.sum())
        self._weightless_rows += int(np.count_nonzero(valid & (batch.weights.cpu().numpy() == 0)))

    def flush(self) -> None:
        """Writes what was counted since the last line, to the disk or the object store.

        Raises:
            StorageError: if it cannot be written.
        """
        self._end_line()
        self._file.keep()

    def _end_line(self) -> None:
        if self._key is None or self._first_step < 0:
            return
        line = LedgerLine(
            epoch=self._key[0],
            partition=self._key[1],
            first_step=self._first_step,
            last_step=self._last_step,
            rows=self._rows,
            weightless_rows=self._weightless_rows,
            digest="".join(f"{word:016x}" for word in self._digest),
        )
        self._file.add(json.dumps(line.model_dump()))
        self._clear()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self.flush()
        self._file.close()


def ledger_files(folder: PathOrUri | Location) -> tuple[dict[tuple[int, int], Location], list[Location]]:
    """Returns the ledgers of a folder by (attempt, rank), and the files that are named like none."""
    found, others = {}, []
    place = locate(folder)
    for name in place.list_names():
        if not name.endswith(".jsonl"):
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            others.append(place.join(name))
        else:
            found[int(match[1]), int(match[2])] = place.join(name)
    return found, others


def read_ledger(place: PathOrUri | Location) -> list[LedgerLine | Unreadable]:
    """Returns the lines of a ledger, as they follow each other."""
    found: list[LedgerLine | Unreadable] = []
    lines = locate(place).read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        is_last = number == len(lines)  # nothing, where the line before it is whole
        if is_last and not text:
            break
        try:
            found.append(LedgerLine.model_validate_json(text))
        except ValidationError as error:
            detail = error.errors()[0]
            where = "".join(f"{part}: " for part in detail["loc"])
            found.append(Unreadable(number, is_last, f"{where}{detail['msg']}"))
    return found
