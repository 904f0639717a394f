"""One optimizer step: forward, backward to what was looked up, the loss agreed by all ranks, tables, the dense update."""

from __future__ import annotations

__all__ = ["StepResult", "Stepper"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from embedshard.config import TableSpec
from embedshard.data.batch import Batch, on_device
from embedshard.errors import TrainingError
from embedshard.evaluate.streaming import StreamingMetrics
from embedshard.models.objectives.objective import Objective, l2_penalty
from embedshard.models.output import in_full
from embedshard.sharding.ahead import Ahead
from embedshard.sharding.halves import LookedUp
from embedshard.sharding.optimizers import Optimizers
from embedshard.stages import STEP_STAGES, Laps
from embedshard.world import World


@dataclass(frozen=True)
class StepResult:
    """What all ranks know of a step.

    Attributes:
        loss: mean over the global batch's weights.
        rows: rows of the global batch, padding not counted.
        stop_asked: whether any rank was asked to stop.
        save_asked: whether any rank was asked to save.
        tally: sum of the batches' tallies.
        bytes_read: sum of the ranks' bytes read so far.
        has_loss: whether anything of the global batch had a loss that counts.
    """

    loss: float
    rows: int
    stop_asked: bool
    save_asked: bool = False
    tally: tuple[float, ...] = ()
    bytes_read: int = 0
    has_loss: bool = True


class Stepper:
    """Takes steps.

    Args:
        model: the sharded model.
        objective: gives the loss of each row, or of each of what the model's output has weights for.
        optimizers: of tables and the dense part.
        specs: the tables, for penalties.
        world: whose ranks step together.
        seed: of modules that draw from torch's global generator.
        describe_row: names a row of the data, given partition and row number.
        streaming: measures the rows as they are predicted; None measures nothing.
        laps: whose stages it ends; None: its own.
        precision: what products of the dense part are computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizers: Optimizers,
        specs: Sequence[TableSpec],
        world: World,
        seed: int,
        describe_row: Callable[[int, int], str],
        streaming: StreamingMetrics | None = None,
        laps: Laps | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self._laps = Laps(STEP_STAGES) if laps is None else laps
        self._model, self._objective, self._optimizers = model, objective, optimizers
        self._world, self._seed, self._describe_row, self._streaming = world, seed, describe_row, streaming
        self._precision = precision
        self._autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")
        self._ahead, self._looked_up = Ahead(model, world), LookedUp(model)
        self._penalties: Mapping[str, float] = {
            lookup.key: spec.l2_lookup for spec in specs if spec.l2_lookup for lookup in spec.lookups if lookup.slot is None
        }

    def take(
        self,
        batch: Batch,
        stop_asked: bool,
        save_asked: bool = False,
        bytes_read: int = 0,
        upcoming: Batch | None = None,
    ) -> StepResult:
        """Takes one step. Collective.

        The gradient is that of the mean loss over the global batch's weights: each rank's sum is scaled by
        world size / total weight, since TorchRec divides by the world size.

        Args:
            batch: this rank's rows.
            stop_asked: whether this rank was asked to stop; any rank's wish is all ranks'.
            save_asked: whether this rank was asked to save; likewise.
            bytes_read: by this rank so far, to be summed.
            upcoming: the next step's batch, which is brought to where it is needed while this one is trained; None leaves
                that to its step.

        Raises:
            TrainingError: if the loss is not finite on any rank; no table has changed then.
        """
        position, lap = batch.training_position, self._laps.lap
        # For modules that draw from the global generator (dropout): a resumed run draws the same.
        _seed_generator((self._seed * 1_000_003 + position.step) * 65_537 + self._world.rank, self._world.device)
        batch = self._ahead.take(batch)
        lap("copy")
        if upcoming is not None:
            self._ahead.send(upcoming)
            lap("input_dist")
        self._optimizers.zero_grad()
        lap("dense_update")
        with self._looked_up.apart(), self._autocast:
            output = self._model(batch)
        if self._precision != "fp32":
            output = in_full(output)
        lap("dense_forward")
        losses = self._objective(output, batch)
        if self._penalties:
            losses = losses + l2_penalty(output.lookups, self._penalties)
        weighted, weight_sum, rows_here = _weighted(losses, getattr(output, "weights", None), batch)
        loss_sum = weighted.sum()
        lap("loss")
        told = [stop_asked, save_asked, bytes_read, *([] if batch.tally is None else batch.tally.tolist())]
        agreed = self._world.begin_sum(_in_a_row([loss_sum.detach(), weight_sum, rows_here, *told], loss_sum.device))
        lap("agree")
        self._ahead.send_ids()
        lap("input_dist")
        # As if all rows weighed 1: what they weigh is known when the others have answered, and mostly it is that.
        places = batch.size * self._world.world_size
        torch.autograd.backward(loss_sum, torch.full_like(loss_sum, self._world.world_size / places))
        lap("dense_backward")
        self._ahead.fetch()  # a GPU has the backward pass before it by now, and is not kept waiting
        lap("input_dist")
        total_loss, total_weight, rows, stops, saves, read, *tally = agreed().tolist()
        lap("agree")
        if not math.isfinite(total_loss):
            raise TrainingError(self._not_finite(batch, _of_rows(weighted.detach(), output, batch)))
        if self._streaming is not None:
            logits_BL = output.logits_BL if hasattr(output, "logits_BL") else output.logits.unsqueeze(1)
            users_B = None if self._streaming.users is None else self._streaming.users.of(batch)
            self._streaming.update(logits_BL, batch.labels, batch.weights, users_B)
            lap("metrics")
        factor = places / total_weight if total_weight else 0.0
        if total_weight:
            self._looked_up.go_on(factor)
            lap("table_backward")
        self._ahead.wait_for_fetching()
        self._optimizers.sum_gradients(factor / self._world.world_size)
        lap("dense_sync")
        if total_weight:
            self._optimizers.step()
            lap("dense_update")
        mean_loss = total_loss / total_weight if total_weight else 0.0
        return StepResult(mean_loss, round(rows), stops > 0, saves > 0, tuple(tally), round(read), total_weight > 0)

    def end(self) -> None:
        """Lets go of an upcoming batch whose step is not taken. Collective."""
        self._ahead.drop()

    def _not_finite(self, batch: Batch, weighted_B: torch.Tensor) -> str:
        position = batch.training_position
        where = f"step {position.step + 1} (epoch {position.epoch + 1}, partition {position.partition + 1})"
        bad = torch.nonzero(~torch.isfinite(weighted_B)).flatten().tolist()
        if bad:
            worst = [
                f"{self._describe_row(position.partition, int(batch.rows[row]))}: loss {float(weighted_B[row])}"
                for row in bad[:5]
            ]
        else:
            largest = weighted_B.abs().topk(min(5, len(weighted_B)))
            worst = [
                f"{self._describe_row(position.partition, int(batch.rows[row]))}: loss {value:.6g}"
                for value, row in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
            ]
        count = f"{len(bad)} of {batch.size} rows are not finite" if bad else "the largest rows are"
        told = "\n".join([f"On {self._world.describe()}, {count}:", *(f"  {line}" for line in worst)])
        of_all = self._world.gather_objects((bool(bad), told))
        shown = [told for is_bad, told in of_all if is_bad] or [told for _, told in of_all]
        return (
            f"{where}: the loss is not finite. It must be, or every row looked up would be spoilt; no table was changed. "
            + "\n".join(shown)
            + "\nLook at these rows' labels, weights and dense features; else lower the learning rates, or warm up. "
            "The run resumes from its newest checkpoint."
        )


def _seed_generator(seed: int, device: torch.device) -> None:
    """Seeds the global generator of a device and of the CPU.

    torch.manual_seed does too, and for each kind of device that is not there it takes the stack down as text, at each step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _weighted(
    losses: torch.Tensor, own_weights: torch.Tensor | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor | int, torch.Tensor | int]:
    """Returns losses times their weights, the sum of these, and how many rows there are.

    Args:
        losses: of rows, or of what a model's output has weights for.
        own_weights: of the latter; None where there are none.
        batch: the rows.
    """
    if own_weights is None and batch.is_full:
        return losses, batch.size, batch.size
    weights = batch.weights if own_weights is None else own_weights
    rows = batch.size if batch.is_full else (batch.rows >= 0).sum()
    return torch.where(weights > 0, losses * weights, 0.0), weights.sum(), rows


def _in_a_row(numbers: Sequence[torch.Tensor | float], device: torch.device) -> torch.Tensor:
    """Returns numbers as one tensor of a device, (n,) float64, without waiting for it or for those that are there."""
    if device.type == "cpu":
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    is_there = [isinstance(number, torch.Tensor) and number.device == device for number in numbers]
    known = [0.0 if there else float(number) for number, there in zip(numbers, is_there, strict=True)]
    row = on_device(torch.tensor(known, dtype=torch.float64), device)
    for at, number in enumerate(numbers):
        if is_there[at]:
            row[at] = number
    return row


def _of_rows(weighted: torch.Tensor, output: object, batch: Batch) -> torch.Tensor:
    """Returns the sum of each row's weighted losses, (B,)."""
    rows: torch.Tensor | None = getattr(output, "rows", None)
    return weighted if rows is None else weighted.new_zeros(batch.size).index_add(0, rows, weighted)
