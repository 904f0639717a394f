"""The parts of an export that need no data and no model: tables, the dense part, vocabularies and tokenizers."""

from __future__ import annotations

__all__ = [
    "copy_vocabularies",
    "kept_vocabulary",
    "tables_in",
    "write_dense",
    "write_quantised_tables",
    "write_tables",
]

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from embedshard.config import Config
from embedshard.config.parts import AutoVocabulary, FileVocabulary, TokenizerVocabulary
from embedshard.data.text import read_tokenizer
from embedshard.data.vocabulary import Vocabulary
from embedshard.export.manifest import ExportedTable
from embedshard.export.quantised import Format, write_quantised
from embedshard.export.vectors import RowsAlone, all_vectors, vector_file
from embedshard.storage import Location, locate
from embedshard.train.checkpoint_reader import Checkpoint

_CHUNK = 2**22
_PREFIX, _SUFFIX, _DENSE = "tables/", "/weight", "dense/"


def write_tables(
    checkpoint: Checkpoint, vocabularies: Mapping[str, Vocabulary | None], folder: Location
) -> dict[str, ExportedTable]:
    """Writes every table of a checkpoint, a file of the checkpoint at a time.

    Args:
        checkpoint: where they are.
        vocabularies: whose ids the rows of each are; None where they are no ids'.
        folder: of the export.

    Raises:
        CheckpointError: if a file is damaged.
        StorageError: if the folder cannot be written.
    """
    written = {}
    for table, vocabulary in vocabularies.items():
        name = f"{_PREFIX}{table}{_SUFFIX}"
        spec = checkpoint.tensors[name]
        file = f"tables/{table.replace(':', '.')}.parquet"
        ids = RowsAlone(spec.shape[0]) if vocabulary is None else vocabulary
        count, has_ids = 0, False
        with vector_file(folder.join(*file.split("/"))) as write:
            for block_ids, rows, vectors in all_vectors(checkpoint, name, ids, with_unknown=vocabulary is not None):
                count += write(block_ids, rows, vectors)
                has_ids = has_ids or block_ids.null_count < len(block_ids)
        dtype = str(spec.dtype).removeprefix("torch.")
        written[table] = ExportedTable(file=file, vectors=count, dim=spec.shape[1], dtype=dtype, has_ids=has_ids)
    return written


def write_quantised_tables(kind: Format, tables: Mapping[str, ExportedTable], folder: Location) -> dict[str, str]:
    """Writes every exported table in fewer bits, a row group at a time; returns the file of each.

    Raises:
        StorageError: if the folder cannot be written.
    """
    written = {}
    for table, exported in tables.items():
        written[table] = f"{exported.file.removesuffix('.parquet')}.{kind}.parquet"
        write_quantised(kind, folder.join(*exported.file.split("/")), folder.join(*written[table].split("/")))
    return written


def tables_in(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of a checkpoint's tables, derived ones too."""
    return sorted(
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        for name in checkpoint.tensors
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    )


def write_dense(checkpoint: Checkpoint, folder: Location) -> str | None:
    """Writes the dense part, by the names of the model's state; returns its file, None where there is no such part."""
    names = sorted(name for name in checkpoint.tensors if name.startswith(_DENSE))
    if not names:
        return None
    tensors = {name: torch.empty(checkpoint.tensors[name].shape, dtype=checkpoint.tensors[name].dtype) for name in names}
    checkpoint.read_into([(name, (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()])
    content = save({name.removeprefix(_DENSE): tensor for name, tensor in tensors.items()})
    folder.join("dense.safetensors").write_bytes_atomically(content)
    return "dense.safetensors"


def copy_vocabularies(
    config: Config, counted: Mapping[str, Location], tokenizers: Mapping[str, str], folder: Location
) -> dict[str, str]:
    """Copies the vocabularies that are files, and tokenizers; returns the file of each table's vocabulary or tokenizer."""
    files = {}
    for table, table_config in config.tables.items():
        vocabulary = table_config.vocabulary
        if isinstance(vocabulary, FileVocabulary | AutoVocabulary):
            source = locate(vocabulary.path) if isinstance(vocabulary, FileVocabulary) else counted[table]
            files[table] = f"vocabularies/{table}.parquet"
            folder.join("vocabularies").make_dirs()
            _copy(source, folder.join("vocabularies", f"{table}.parquet"))
        elif isinstance(vocabulary, TokenizerVocabulary):
            text = tokenizers.get(table) or read_tokenizer(table, vocabulary)
            files[table] = f"tokenizers/{table}.json"
            folder.join("tokenizers").make_dirs()
            folder.join("tokenizers", f"{table}.json").write_text_atomically(text)
    return files


def kept_vocabulary(config: Config, table: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Returns what tells how an id becomes a row of a table: its config, with the export's file for a path."""
    kept = config.tables[table].model_dump(mode="json", include={"rows", "dim", "vocabulary"})
    if table in files:
        kept["file"] = files[table]
        if "path" in kept["vocabulary"]:
            kept["vocabulary"]["path"] = files[table]
    return kept


def _copy(source: Location, target: Location) -> None:
    with source.open_input() as file, target.filesystem.open_output_stream(target.path) as stream:
        while chunk := file.read(_CHUNK):
            stream.write(chunk)
