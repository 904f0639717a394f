"""In which memory a table lies: the GPU's, the host's, the host's behind a cache on the GPU, or an SSD. Pure functions.

The words are the config's and TorchRec's: `device` is its kernel `fused`, `uvm` is `fused_uvm`, `uvm_caching` is
`fused_uvm_caching`, `ssd` is `key_value`. FBGEMM keeps a row-wise statistic on the GPU whatever the kernel is, and any other
state where the rows are. Its cache has sets of 32 rows, and an index of it on the GPU.
"""

from __future__ import annotations

__all__ = [
    "CACHED",
    "OFF_DEVICE",
    "Lying",
    "cache_params",
    "check_memory",
    "fewest_spilled",
    "has_ssd_kernels",
    "in_memory",
    "kernels_allowed",
    "key_value_params",
    "lying",
    "memory_of",
]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import CacheParams, KeyValueParams

from embedshard.config import TableSpec
from embedshard.errors import ConfigError, PlanError

Found = TypeVar("Found")

_DEVICE: Final = EmbeddingComputeKernel.FUSED.value
_UVM: Final = EmbeddingComputeKernel.FUSED_UVM.value
_CACHING: Final = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_SSD: Final = EmbeddingComputeKernel.KEY_VALUE.value
CACHED: Final = (_CACHING, _SSD)
"""Kernels with a cache on the GPU."""

OFF_DEVICE: Final = (_UVM, _CACHING, _SSD)
"""Kernels of tables that do not lie on the GPU."""

_KERNELS: Final = {
    "auto": (_DEVICE, _CACHING),
    "device": (_DEVICE,),
    "uvm": (_UVM,),
    "uvm_caching": (_CACHING,),
    "ssd": (_SSD,),
}
_WORDS: Final = {_UVM: "uvm", _CACHING: "uvm_caching", _SSD: "ssd"}
_FLOAT, _WEIGHT = 4, {"fp32": 4, "fp16": 2}
_WAYS: Final = 32  # FBGEMM's DEFAULT_ASSOC: rows of a set of its cache
_INDEX_OF_ROW, _INDEX_OF_SLOT = 4, 16  # int32 a row: its table; int64 twice a slot: the row that it holds, when it was used


@dataclass(frozen=True)
class Lying:
    """Bytes of a table, or of a piece of one, by the memory that they lie in.

    Attributes:
        device_weights: on the GPU (on a CPU machine, in its memory): rows, or the cache of them and its index.
        device_state: the same, of the optimizer's state.
        cache: of `device_weights`, the rows that the cache holds.
        host: in the memory of the GPU's host: rows, and state that is not one number a row.
        ssd: on the SSD.
    """

    device_weights: int
    device_state: int
    cache: int = 0
    host: int = 0
    ssd: int = 0

    def __add__(self, other: Lying) -> Lying:
        """Returns both together."""
        return Lying(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))


def _numbers(place: Lying) -> tuple[int, ...]:
    return (place.device_weights, place.device_state, place.cache, place.host, place.ssd)


def lying(spec: TableSpec, kernel: str, cache_ratio: float | None, rows: int, columns: int) -> Lying:
    """Returns where a piece of a table lies.

    Args:
        spec: the table.
        kernel: TorchRec's word.
        cache_ratio: the share of rows in the cache; None where there is none.
        rows: of the piece.
        columns: of the piece.
    """
    size, width = _WEIGHT[spec.dtype], rows * columns
    of_rows = {"sgd": 0, "rowwise_adagrad": rows, "adagrad": 0, "adam": 0}[spec.optimizer.kind] * _FLOAT
    of_numbers = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2}[spec.optimizer.kind] * width * _FLOAT
    if kernel not in _WORDS:
        return Lying(width * size, of_rows + of_numbers)
    if cache_ratio is None:
        return Lying(0, of_rows, host=width * size + of_numbers)
    slots = max(1, -(-int(rows * cache_ratio) // _WAYS)) * _WAYS
    cache = slots * columns * size
    index = slots * _INDEX_OF_SLOT + (rows * _INDEX_OF_ROW if kernel == _CACHING else 0)
    if kernel == _SSD:
        return Lying(cache + index, of_rows, cache, ssd=width * size + of_numbers)
    return Lying(cache + index, of_rows, cache, host=width * size + of_numbers)


def memory_of(kernel: str) -> str:
    """Returns the config's word for the memory of TorchRec's kernel."""
    return _WORDS.get(kernel, "device")


def kernels_allowed(spec: TableSpec, device_type: str = "cuda") -> tuple[str, ...]:
    """Returns TorchRec's kernels among which a table's memory leaves the choice, on a device; replicated tables aside."""
    return _KERNELS[spec.memory.kind] if device_type == "cuda" else (_DEVICE,)


def in_memory(spec: TableSpec, kind: Literal["device", "uvm_caching"]) -> TableSpec:
    """Returns an `auto` table as one that was told its memory."""
    update: Mapping[str, Any] = {"kind": kind, "cache_ratio": None if kind == "device" else spec.memory.ratio}
    return replace(spec, memory=spec.memory.model_copy(update=update))


def cache_params(kernel: str, ratio: float | None) -> CacheParams | None:
    """Returns what TorchRec wants to know of a table's cache; None where it has none."""
    return CacheParams(load_factor=ratio) if kernel in CACHED else None


def key_value_params(spec: TableSpec, kernel: str) -> KeyValueParams | None:
    """Returns what TorchRec wants to know of a table on an SSD; None where it is on none."""
    if kernel != _SSD:
        return None
    cache = lying(spec, kernel, spec.memory.ratio, spec.num_embeddings, spec.dim).cache
    return KeyValueParams(ssd_storage_directory=spec.memory.ssd_path, max_l1_cache_size=-(-cache // 1024**2))


def fewest_spilled(
    specs: Sequence[TableSpec], lengths: Mapping[str, float], attempt: Callable[[Sequence[TableSpec]], Found]
) -> Found:
    """Returns what an attempt finds where as few `auto` tables as possible leave the GPUs' memory.

    Those with the most bytes for each lookup leave it first. It is tried with none, with all, and then by halves.

    Args:
        specs: all tables.
        lengths: mean ids a row under each key; 1 where absent.
        attempt: finds places for tables whose memory is told.

    Raises:
        PlanError: the attempt's, with all of them outside.
    """

    def weight(spec: TableSpec) -> tuple[float, str]:
        lookups = sum(lengths.get(lookup.key, 1.0) for lookup in spec.lookups)
        return -(spec.weight_bytes + spec.state_bytes) / max(lookups, 1e-9), spec.name

    leaving = [spec.name for spec in sorted((spec for spec in specs if spec.memory.kind == "auto"), key=weight)]

    def told(count: int) -> list[TableSpec]:
        outside = set(leaving[:count])
        return [
            in_memory(spec, "uvm_caching" if spec.name in outside else "device") if spec.memory.kind == "auto" else spec
            for spec in specs
        ]

    if not leaving:
        return attempt(specs)
    try:
        return attempt(told(0))
    except PlanError:
        found = attempt(told(len(leaving)))
    fails, works = 0, len(leaving)
    while works - fails > 1:
        middle = (fails + works) // 2
        try:
            found, works = attempt(told(middle)), middle
        except PlanError:
            fails = middle
    return found


def has_ssd_kernels() -> bool:
    """Returns whether this build of FBGEMM has key-value tables: the published ones have not."""
    try:
        return torch.classes.fbgemm.EmbeddingRocksDBWrapper is not None
    except RuntimeError:  # torch's answer where the class is not registered
        return False


def check_memory(specs: Sequence[TableSpec], device: torch.device, *, is_training: bool) -> None:
    """Checks that tables can lie where their config says, on a device.

    Args:
        specs: the tables.
        device: it need not be there.
        is_training: whether the kernels are to be made, or only planned.

    Raises:
        ConfigError: naming the table, and what can be done.
    """
    for spec in specs:
        kind = spec.memory.kind
        if device.type == "cpu" and kind not in ("auto", "device"):
            raise ConfigError(
                f"tables.{spec.name}.memory.kind is '{kind}', which is a GPU's: FBGEMM has UVM, its cache and key-value "
                f"tables on CUDA alone. Choose 'auto' or 'device', or train on CUDA ('embedshard plan --hardware h100x8' "
                f"plans it anywhere)."
            )
        if kind == "ssd" and is_training:
            lacks = (
                "embedshard does not train them yet: their rows cannot be given first values or saved as those in memory are"
                if has_ssd_kernels()
                else "this build of FBGEMM has no key-value kernels (torch.classes.fbgemm.EmbeddingRocksDBWrapper)"
            )
            raise ConfigError(
                f"tables.{spec.name}.memory.kind is 'ssd', and {lacks}. Choose 'uvm_caching', which keeps the rows in the "
                f"host's memory."
            )
