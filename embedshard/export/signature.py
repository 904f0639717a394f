"""What a program takes and returns, as data: enough to join tables and programs without embedshard."""

from __future__ import annotations

__all__ = ["ExportedProgram", "Pooling", "ProgramInput", "ProgramOutput"]

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Pooling = Literal["sum", "mean", "sqrtn", "weighted_sum", "weighted_mean"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ProgramInput(_Part):
    """A tensor that a program takes, by keyword.

    Attributes:
        name: the keyword.
        feature: of the config, whose value it is.
        kind: `pooled`: a row's vectors made one; `sequence`: all of a row's vectors, in order, padded at their end;
            `lengths`: how many of them each row has; `dense`: a number as it is in the data.
        shape: `batch` and `length` are free; `length` is 1 at least, and `max_length` of `config` at most.
        dtype: torch's name.
        config: the feature's, as the run's config has it with what it leaves out: `column`, and of lists `max_length` and
            `keep`, `unknown` and `null`.
        table: among the manifest's tables, in which ids are looked up.
        dim: of a vector.
        pooling: how a row's vectors become one. An id has one; a row without any has zeros.
        vocabulary: how an id becomes a row of the table: the config of the table that owns it, with the export's file.
        unknown_row: the row that ids outside the vocabulary look up, where `config` lets them.
        pair: of ids that look up two rows: `first` rows for quotients by `second`, then `second` for remainders; both
            vectors count as one id's, added up.
        mean: of a dense feature that is standardised.
        deviation: of the same.
    """

    name: str
    feature: str
    kind: Literal["pooled", "sequence", "lengths", "dense"]
    shape: list[int | Literal["batch", "length"]]
    dtype: Literal["float32", "float64", "int64"]
    config: dict[str, Any]
    table: str | None = None
    dim: int | None = None
    pooling: Pooling | None = None
    vocabulary: dict[str, Any] | None = None
    unknown_row: int | None = None
    pair: dict[Literal["num_ids", "first", "second"], int] | None = None
    mean: float | None = None
    deviation: float | None = None


class ProgramOutput(_Part):
    """A tensor that a program returns, in a dict.

    Attributes:
        name: its key.
        shape: `batch` is free.
        link: what makes a prediction of it; of a tower's vector `product`: the dot product of two is the score.
    """

    name: str
    shape: list[int | Literal["batch"]]
    link: Literal["product", "identity", "sigmoid", "softmax"]


class ExportedProgram(_Part):
    """A `torch.export` program of a tower, or of a whole model, without its tables.

    Attributes:
        file: that `torch.export.load` reads.
        torch: the version that wrote it.
        inputs: in order.
        outputs: in order, float32.
    """

    file: Annotated[str, Field(pattern=r"^programs/[a-z_]+\.pt2$")]
    torch: str
    inputs: list[ProgramInput]
    outputs: list[ProgramOutput]
