"""What models hand to objectives.

Shapes: B rows on this rank, D dim, N drawn candidates on this rank, C classes, L labels; of
lists, V places in all rows, I distinct
ids, P pairs, S sides of contexts (two where they go by side, else one), U nodes of a tree.
"""

from __future__ import annotations

__all__ = ["ClassOutput", "LabelOutput", "NextItemOutput", "Output", "PairOutput", "RetrievalOutput", "in_full"]

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch

from embedshard.data.batch import Pairs
from embedshard.models.dots import row_dots


class Output(Protocol):
    """What every objective can ask of a model's output.

    One whose losses are not one a row also has `weights` and `rows`, the weight of each loss and the place of its row in the
    batch.

    Attributes:
        lookups: pooled vectors by key, (B, D) each; empty where the model does not hand them on.
    """

    lookups: dict[str, torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        """One number a row, before any link function, (B,)."""
        ...


@dataclass
class ClassOutput:
    """Logits of classes.

    Attributes:
        logits_BC: one for each class; one alone, the log odds of the label 1, where there are two.
        lookups: looked-up vectors by key, for penalties.
    """

    logits_BC: torch.Tensor
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """The log odds of the label 1, (B,)."""
        assert self.logits_BC.shape[1] == 1, "several classes have no one logit"
        return self.logits_BC[:, 0]


@dataclass
class LabelOutput:
    """A logit for each label.

    Attributes:
        logits_BL: in config order.
        lookups: looked-up vectors by key, for penalties.
    """

    logits_BL: torch.Tensor
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """The logit of the one label, (B,)."""
        assert self.logits_BL.shape[1] == 1, "several labels have no one logit"
        return self.logits_BL[:, 0]


@dataclass
class NextItemOutput:
    """Vectors of the places of lists, and of what comes next at each; a loss a place.

    Attributes:
        query_VD: what is known at each place.
        item_V: the item of each, its row of the table, int64.
        target_VD: the item that comes next.
        target_V: its row of the table, int64.
        negative_ND: this rank's share of the drawn items.
        weights: of each place's loss, (V,): its row's.
        rows: the place in the batch of each one's row, (V,) int64.
        lookups: empty, since penalties are for pooled vectors.
    """

    query_VD: torch.Tensor
    item_V: torch.Tensor
    target_VD: torch.Tensor
    target_V: torch.Tensor
    negative_ND: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class RetrievalOutput:
    """Vectors whose dot product is the score of a query and a candidate; biases are columns of both.

    Attributes:
        query_BD: one a row.
        candidate_BD: the row's own item.
        negative_ND: this rank's share of the drawn candidates, if there are any.
        lookups: pooled vectors by key, for penalties.
    """

    query_BD: torch.Tensor
    candidate_BD: torch.Tensor
    negative_ND: torch.Tensor | None = None
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """Each row's own score, (B,)."""
        return row_dots(self.query_BD, self.candidate_BD)


@dataclass
class PairOutput:
    """Vectors of the places of lists, of which some are pairs: one loss a pair.

    Attributes:
        pairs: which centre meets which context.
        ids_I: rows of the table, int64, each once.
        centre_VD: each place as a centre.
        context_VD: each place as a context, (V, S * D), its sides beside each other; None where a way is what counts.
        bias_IS: of each id as a context, if there are biases.
        candidate_ND: this rank's share of the drawn contexts, (N, S * D), if there are any.
        candidate_bias_NS: of them, if there are biases.
        node_UD: the nodes on the ways to the contexts, if there are any.
        lookups: empty, since penalties are for pooled vectors.
    """

    pairs: Pairs
    ids_I: torch.Tensor
    centre_VD: torch.Tensor
    context_VD: torch.Tensor | None = None
    bias_IS: torch.Tensor | None = None
    candidate_ND: torch.Tensor | None = None
    candidate_bias_NS: torch.Tensor | None = None
    node_UD: torch.Tensor | None = None
    lookups: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> torch.Tensor:
        """Of each pair's loss, (P,)."""
        return self.pairs.weights

    @property
    def rows(self) -> torch.Tensor:
        """The place of each pair's row in the batch, (P,)."""
        return self.pairs.rows


def in_full(output: Any) -> Any:
    """Returns an output whose tensors that are in bfloat16 are in float32; of a custom model's, those of its dataclass."""
    if not is_dataclass(output) or isinstance(output, type):
        return output
    values = {part.name: getattr(output, part.name) for part in fields(output) if part.init}
    halves = {
        name: value.float()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    }
    return replace(output, **halves) if halves else output
