"""What a check of the data tells: plain values, which become JSON as they are."""

from __future__ import annotations

__all__ = ["ColumnReport", "Known", "ProblemReport", "Refusal", "Report", "RowGroups", "SetReport"]

from dataclasses import asdict, dataclass, field
from typing import Any

from embedshard.data.distinct import Absent
from embedshard.data.findings import Action


@dataclass
class Refusal:
    """What is wrong with whole files, or with a column of them.

    Attributes:
        message: what was met and what was needed, without the file.
        files: how many there are.
        examples: the first few.
    """

    message: str
    files: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class ProblemReport:
    """The values of a column that do not fit, of one kind.

    Attributes:
        column: of the Parquet files.
        reason: what is wrong with them.
        action: what the config does about it: `error`, `quarantine`, `oov`, `empty` or `zero`.
        values: how many there are.
        rows: that hold them.
        examples: the first few: file, row group, row, and the value.
    """

    column: str
    reason: str
    action: Action
    values: int = 0
    rows: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class ColumnReport:
    """What a column holds.

    Attributes:
        name: of the decoded column: a feature, `label:<name>`, `weight` or `candidates`.
        column: of the Parquet files.
        kind: `id`, `bag`, `weighted_bag`, `weights`, `text`, `dense`, `label`, `weight` or `candidates`.
        table: whose rows ids become.
        types: Arrow's, of all files.
        values: ids or numbers; those of lists one by one; of texts, the words or runs of words that are looked up.
        nulls: null or NaN among them; null texts.
        least: of ids or finite numbers.
        greatest: of ids or finite numbers.
        unknown: ids outside the vocabulary.
        distinct: different ids; None for numbers.
        distinct_is_exact: whether they are counted; else they are estimated, within about 0.1 %.
        lists: rows that hold a list or a text, null or not; 0 where a row holds one value.
        null_lists: null among them.
        least_length: of a list.
        greatest_length: of a list.
    """

    name: str
    column: str
    kind: str
    table: str | None
    types: list[str] = field(default_factory=list)
    values: int = 0
    nulls: int = 0
    least: Any = None
    greatest: Any = None
    unknown: int = 0
    distinct: int | None = None
    distinct_is_exact: bool = True
    lists: int = 0
    null_lists: int = 0
    least_length: int | None = None
    greatest_length: int | None = None

    @property
    def null_share(self) -> float:
        """Nulls among all values, or among all texts."""
        return self.nulls / max(self.lists if self.kind == "text" else self.values, 1)

    @property
    def unknown_share(self) -> float:
        """Unknown ids among all that are not null."""
        nulls = 0 if self.kind == "text" else self.nulls
        return self.unknown / max(self.values - nulls, 1)

    @property
    def mean_length(self) -> float:
        """Of a list; a null one is empty."""
        return self.values / max(self.lists, 1)


@dataclass(frozen=True)
class RowGroups:
    """The row groups of a set: how many, and their rows."""

    count: int
    least: int
    median: int
    greatest: int


@dataclass
class SetReport:
    """What the files of a set hold.

    Attributes:
        name: `train`, `validation`, `test` or `catalogue`; partitions are numbered, `train[0]`.
        patterns: paths and globs of its files.
        files: that were found.
        skipped: what lies among them and is not Parquet.
        rows: as the footers say.
        unread_rows: that could not be read.
        row_groups: of all files that have a footer; None where there are none.
        size_bytes: of the files.
        decoded_bytes: about how many bytes its decoded columns take.
        fits_cache: whether that is at most `data.cache_bytes`; None for sets that are not trained.
        waiting_bytes: of decoded rows that are met before their turn, about, where the data are streamed by one worker.
        columns: what they hold.
        problems: values that do not fit.
        refusals: files and columns that do not fit as a whole.
        refused_rows: rows at which a run would stop.
        set_aside_rows: rows that it would set aside.
        notes: what else a person should know.
    """

    name: str
    patterns: list[str]
    files: int = 0
    skipped: list[str] = field(default_factory=list)
    rows: int = 0
    unread_rows: int = 0
    row_groups: RowGroups | None = None
    size_bytes: int = 0
    decoded_bytes: int = 0
    fits_cache: bool | None = None
    waiting_bytes: int = 0
    columns: list[ColumnReport] = field(default_factory=list)
    problems: list[ProblemReport] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    refused_rows: int = 0
    set_aside_rows: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """How much of a column's ids another set has never seen.

    Attributes:
        set_name: whose ids they are.
        column: the decoded column.
        compared_with: `train` or `catalogue`.
        absent: ids that are not there.
    """

    set_name: str
    column: str
    compared_with: str
    absent: Absent


@dataclass
class Report:
    """What all files of a config hold.

    Attributes:
        sets: training partitions, validation, test, catalogue.
        known: what evaluated sets hold that was never trained, and all sets that the catalogue lacks.
        refused: why a run would not go through; nothing where it would.
        max_bad_fraction: of the config.
    """

    sets: list[SetReport]
    known: list[Known]
    refused: list[str]
    max_bad_fraction: float

    def to_json(self) -> dict[str, Any]:
        """Returns all of it."""
        return {"would_run": not self.refused, **asdict(self)}
