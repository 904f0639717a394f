"""What each memory that a table may lie in asks of the table, and fetching rows ahead of the model."""

from __future__ import annotations

__all__ = ["check_prefetch", "check_table_memory", "memory_of_bias"]

from typing import TYPE_CHECKING

from embedshard.config.parts import CustomModelConfig, ManagedVocabulary, TableConfig, TableMemoryConfig

if TYPE_CHECKING:
    from embedshard.config.root import Config


def check_table_memory(name: str, table: TableConfig, optimizer: str) -> None:
    """Checks a table's `memory` by itself: what it depends on the device for is checked when the model is sharded.

    Raises:
        ValueError: saying what is wrong and what to do.
    """
    memory, where = table.memory, f"tables.{name}.memory"
    if memory.cache_ratio is not None and memory.kind in ("device", "uvm"):
        raise ValueError(
            f"{where}.cache_ratio is of a cache on the GPU, and memory.kind '{memory.kind}' has none. Leave it out, or "
            f"choose 'uvm_caching' or 'auto'"
        )
    if memory.kind == "ssd" and memory.ssd_path is None:
        raise ValueError(f"{where}.ssd_path is missing: memory.kind is 'ssd'. Give a folder on the SSD")
    if memory.kind != "ssd" and memory.ssd_path is not None:
        raise ValueError(f"{where}.ssd_path is of memory.kind 'ssd', and it is '{memory.kind}'. Leave it out")
    if memory.kind == "ssd" and optimizer != "rowwise_adagrad":
        raise ValueError(
            f"{where}.kind: FBGEMM's tables on an SSD are trained by row-wise Adagrad here, and '{name}' by '{optimizer}'. "
            f"Choose the optimizer 'rowwise_adagrad', or memory.kind 'uvm_caching'"
        )
    if memory.kind != "device" and "data_parallel" in table.sharding.asked:
        raise ValueError(
            f"{where}.kind: a data_parallel table lies in the memory of every device, and memory.kind is '{memory.kind}'. "
            f"Leave data_parallel out of tables.{name}.sharding, or choose 'device'"
        )
    if memory.kind not in ("device", "uvm") and isinstance(table.vocabulary, ManagedVocabulary):
        raise ValueError(
            f"{where}.kind: a managed vocabulary resets rows where they lie, and under '{memory.kind}' a cache may hold "
            f"others in their stead. Choose 'device' or 'uvm'"
        )


def check_prefetch(config: Config) -> None:
    """Checks that it is known before a step what the step looks up, if that is to be fetched.

    Raises:
        ValueError: saying what is in the way and what to do.
    """
    if not config.train.prefetch:
        return
    if isinstance(config.model, CustomModelConfig):
        raise ValueError(
            "train.prefetch fetches rows before their step, and only a custom model's own code knows which it will look "
            "up. Leave it out"
        )
    for name, table in config.tables.items():
        if isinstance(table.vocabulary, ManagedVocabulary):
            raise ValueError(
                f"train.prefetch fetches rows before their step, and ids of tables.{name}, whose vocabulary is managed, "
                f"become rows as they are looked up. Leave it out, or give the table another vocabulary"
            )


def memory_of_bias(memory: TableMemoryConfig) -> TableMemoryConfig:
    """Returns where the bias beside a table lies: where the table does; beside one on an SSD, on the device."""
    return TableMemoryConfig() if memory.kind == "ssd" else memory
