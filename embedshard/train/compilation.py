"""The dense part of a model through `torch.compile`: what comes after the lookup, in one graph, in training alone.

A model does not know of it: from outside, its `dense` is given another body, on the object. Lookups, objective, evaluation,
checkpoints and exports are as they were, and so are the names of parameters.
"""

from __future__ import annotations

__all__ = ["CompiledDense"]

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, Final

import torch
from torch import nn

from embedshard.config.parts import CompileConfig
from embedshard.data.batch import Batch, on_device
from embedshard.errors import ConfigError, TrainingError
from embedshard.models.repeats import Repeats
from embedshard.world import World

_NEEDS: Final = {
    "cpu": "a C++ compiler (g++; another by CXX), Python's headers, and a folder to write to (TORCHINDUCTOR_CACHE_DIR)",
    "cuda": "Triton, a C compiler, Python's headers, and a folder to write to (TORCHINDUCTOR_CACHE_DIR)",
}
_numbers = count()


class CompiledDense:
    """The dense part of a model, compiled when it is first called in training, and anew for batches that need another graph.

    Sizes that differ from step to step are marked before anything is compiled, and others are constants, so that by what a
    batch is computed depends on it alone and not on those before it: a run that resumes gives the same, bit for bit.

    Args:
        model: sharded, of a config that says that it can be compiled. Its `dense` is called through this from now on: make
            it once.
        world: whose ranks compile, each for itself.
        config: how.
    """

    def __init__(self, model: nn.Module, world: World, config: CompileConfig) -> None:
        inner = getattr(model, "module", model)
        assert isinstance(inner, nn.Module), "the wrapper holds the model"
        self._model, self._world, self._mode = inner, world, config.mode
        self._plain: Callable[..., Any] = inner.dense  # type: ignore[assignment]  # the config checks that it has one
        self._graphs: _Graphs | None = None
        self._ended: str | None = None
        self._num_told, self._told_end = 0, False
        setattr(inner, "dense", self._dense)  # noqa: B010

    def news(self) -> list[str]:
        """Returns what is to be told since the last time: of compiling on rank 0, of its end on any. Collective."""
        ended = self._world.gather_objects(self._ended)
        told = []
        if self._graphs is not None and self._graphs.number != self._num_told:
            self._num_told = self._graphs.number
            graphs = "1 graph" if self._num_told == 1 else f"{self._num_told} graphs"
            told.append(f"The dense part is compiled: {graphs} in {self._graphs.seconds:.1f} s by now.")
        if any(ended) and not self._told_end:
            self._told_end = True
            ranks = [rank for rank, why in enumerate(ended) if why]
            where = "" if len(ended) == 1 else f" on rank {', '.join(map(str, ranks))}"
            told.append(
                f"The dense part is no longer compiled{where}, and trained without from here on: {ended[ranks[0]]}. The "
                f"result is the same, but for rounding."
            )
        return told

    def _dense(self, lookups: dict[str, torch.Tensor], batch: Batch, *more: Repeats | None) -> Any:
        if self._ended is not None or not self._model.training:
            return self._plain(lookups, batch, *more)
        if self._graphs is None:
            self._graphs = _Graphs(self._plain, self._world.device, self._mode == "reduce-overhead")
        try:
            return self._graphs(lookups, batch, more)
        except self._graphs.too_many as error:
            # Nothing has been computed yet, and what was looked up is here: no other rank notices.
            self._ended = f"torch compiles no more than {self._graphs.number} graphs ({error.__cause__ or error})"
            return self._plain(lookups, batch, *more)


class _Graphs:
    """What is compiled of one function.

    Args:
        dense: the function.
        device: of what it is given.
        records: whether CUDA graphs are recorded.

    Raises:
        ConfigError: if the device has no CUDA graphs, or what compiling needs is not there.

    Attributes:
        number: of graphs.
        seconds: that their first calls have taken.
        too_many: the exception where a batch needs another graph and there are as many as torch allows.
    """

    def __init__(self, dense: Callable[..., Any], device: torch.device, records: bool) -> None:
        if records and device.type != "cuda":
            raise ConfigError(
                "train.compile.mode is 'reduce-overhead', which records CUDA graphs, and this run is on a "
                f"{device.type.upper()}. Choose 'default', or train on CUDA."
            )
        _check_compiler(device)
        from torch import _dynamo as dynamo  # half a second where nothing has imported it yet

        self.too_many = dynamo.exc.FailOnRecompileLimitHit
        self._failure, self._counts = dynamo.exc.TorchDynamoException, dynamo.utils.counters["stats"]
        self._mark = dynamo.maybe_mark_dynamic
        self._device, self._records = device, records
        options = _options(device) | ({"triton.cudagraphs": True} if records else {})
        self._compiled = torch.compile(_with_code_of_its_own(dense), fullgraph=True, dynamic=False, options=options)
        self.number, self.seconds = 0, 0.0

    def __call__(self, lookups: dict[str, torch.Tensor], batch: Batch, more: tuple[Repeats | None, ...]) -> Any:
        if self._records:
            # What the last step has made is no longer needed.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        else:
            for part in _of_any_length(lookups, batch, more):
                self._mark(part, 0)
        before, begin = self._counts["unique_graphs"], time.monotonic()
        try:
            output = self._compiled(lookups, _on_device(batch, self._device), *more)
        except self.too_many:
            raise
        except self._failure as error:
            raise TrainingError(
                f"train.compile: torch cannot compile the model's dense part: {error}\nGo on without: embedshard train "
                f"--resume RUN --set train.compile=false."
            ) from error
        if self._counts["unique_graphs"] != before:
            self.number += self._counts["unique_graphs"] - before
            self.seconds += time.monotonic() - begin
        return output


def _options(device: torch.device) -> dict[str, Any]:
    """Returns inductor's options: on a CPU no processes that compile beside this one, which has one kernel at a time."""
    return {"compile_threads": 1} if device.type == "cpu" else {}


def _check_compiler(device: torch.device) -> None:
    """Compiles next to nothing, so that what is missing is told in words of ours.

    Raises:
        ConfigError: if that does not work.
    """
    try:
        compiled = torch.compile(_next_to_nothing, fullgraph=True, dynamic=False, options=_options(device))
        compiled(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler, a linker or a file system may say
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"train.compile: torch.compile does not work here ({type(error).__name__}: {lines[0] if lines else error}). It "
            f"needs {_NEEDS[device.type]}. Install what is missing, or leave train.compile out."
        ) from error


def _next_to_nothing(numbers: torch.Tensor) -> torch.Tensor:
    return numbers * 2 + 1


def _with_code_of_its_own(dense: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that torch has met nowhere: by name and place it remembers sizes, and counts what it compiles."""

    def run(*given: Any) -> Any:
        return dense(*given)

    run.__code__ = run.__code__.replace(co_name=f"dense_{next(_numbers)}")
    return run


def _of_any_length(
    lookups: dict[str, torch.Tensor], batch: Batch, more: tuple[Repeats | None, ...]
) -> Iterator[torch.Tensor]:
    """Yields what may have another number of rows in each step. A batch always has as many: it is filled up."""
    yield from lookups.values()
    for repeats in more:
        if repeats is not None:
            yield from (repeats.firsts, repeats.begins)
    if batch.draws is not None:
        yield from (batch.draws.ids, batch.draws.dense)


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch whose row numbers are on the device and whose step is a tensor there, for draws by counter.

    A step that is a number would be a constant of the graph, and each step another graph.
    """
    position = batch.training_position
    step: Any = torch.full((), position.step, device=device)  # unlike a copy, it does not wait for the device
    return replace(batch, rows=on_device(batch.rows, device), position=replace(position, step=step))
