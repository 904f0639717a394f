"""The tables of a run's checkpoints: which table is meant, whose ids its rows are, and the checkpoint that holds it."""

from __future__ import annotations

__all__ = ["check_holds", "ids_in", "open_checkpoint_of", "table_of", "vocabulary_table"]

import numpy as np
import numpy.typing as npt

from embedshard.config import Config, bias_key, context_key
from embedshard.config.parts import DenseFeature, ItemEmbeddingConfig, WordNgramsVocabulary
from embedshard.data.vocabulary import ManagedIds, Vocabulary, load_vocabularies
from embedshard.data.vocabulary_building import kept_vocabularies
from embedshard.errors import CheckpointError, ConfigError, nearest
from embedshard.sharding.slots import FREE
from embedshard.storage import reaching
from embedshard.train.checkpoint_reader import Checkpoint, find_steps, newest_intact, open_step, step_folder
from embedshard.train.run_directory import RunDirectory


def table_of(run: RunDirectory, config: Config, table: str | None) -> tuple[str, str, Vocabulary]:
    """Returns the table that is meant, the config's table whose ids its rows are, and their vocabulary.

    Raises:
        ConfigError: if there is no such table, or none is meant by itself.
        DataError: if the vocabulary cannot be read.
    """
    table = _default_table(config) if table is None else table
    owner = vocabulary_table(config, table)
    own = config.tables[owner].vocabulary
    if config.tables[owner].composition is not None:
        raise ConfigError(
            f"table '{owner}' has the vocabulary '{own.kind}': an id's vector there is the sum of two rows, and no row is "
            f"an id's. Name another table with --table. {_tables(config)}"
        )
    needed = [owner, own.of] if isinstance(own, WordNgramsVocabulary) else [owner]
    alone = config.model_copy(update={"tables": {name: config.tables[name] for name in needed}})
    kept = (run.read_json("inventory.json") or {}).get("tokenizers", {})
    return table, owner, load_vocabularies(alone, kept, kept_vocabularies(alone, run.vocabularies))[owner]


def vocabulary_table(config: Config, table: str) -> str:
    """Returns the config's table whose ids a table's rows are.

    Raises:
        ConfigError: if there is none.
    """
    if table in config.tables:
        return table
    if isinstance(config.model, ItemEmbeddingConfig):
        feature = config.model.sequence
        if table in (context_key(feature), bias_key(context_key(feature))):
            return config.features[feature].table  # type: ignore[union-attr]  # checked: a list
    for name, feature_config in config.features.items():
        if table == bias_key(name) and not isinstance(feature_config, DenseFeature):
            return feature_config.table
    raise ConfigError(f"--table: there is no table '{table}' whose rows are ids. {nearest(table, config.tables)}")


def open_checkpoint_of(run: RunDirectory, step: int | None) -> Checkpoint:
    """Opens a run's checkpoint: that of a step, or the one that the run selected, else the newest.

    Raises:
        CheckpointError: if it is not there, or its manifest is damaged.
    """
    root = run.checkpoints
    if step is None:
        step = (run.read_json("result.json") or {}).get("selected_step")
    with reaching(root):
        if not find_steps(root) and (not step or not step_folder(root, step).exists()):
            has_ended = run.read_json("result.json") is not None
            why = "it ended before its first step" if has_ended else "it has not got so far"
            more = " --set train.max_steps=null" if has_ended else ""
            raise CheckpointError(
                f"{run.folder.uri} has no checkpoint: {why}. Train on: embedshard train --resume {run.folder.quoted}{more}"
            )
        found = newest_intact(root, verify=False) if step is None else open_step(root, step)
    assert found is not None, "there is one, or an error"
    return found


def ids_in(checkpoint: Checkpoint, owner: str, vocabulary: Vocabulary) -> Vocabulary:
    """Returns a vocabulary as it was at a checkpoint: of a managed one, which id held which row.

    Raises:
        CheckpointError: if the checkpoint does not tell, or is damaged.
    """
    if not isinstance(vocabulary, ManagedIds):
        return vocabulary
    name = f"vocabularies/{owner}/ids"
    ids: npt.NDArray[np.int64] = checkpoint.read(name).numpy()
    if vocabulary.ttl_steps is not None:
        unseen = checkpoint.step - 1 - checkpoint.read(f"vocabularies/{owner}/last_steps").numpy()
        ids[unseen > vocabulary.ttl_steps] = FREE
    return vocabulary.held(ids)


def check_holds(checkpoint: Checkpoint, name: str) -> None:
    """Checks that a checkpoint holds a tensor.

    Raises:
        CheckpointError: if it does not.
    """
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder.uri} does not hold '{name}'. {nearest(name, checkpoint.tensors)}")


def _default_table(config: Config) -> str:
    feature = config.drawn_feature()
    if feature is None:
        if len(config.tables) == 1:
            return next(iter(config.tables))
        raise ConfigError(f"the model has no item whose table could be meant: name one with --table. {_tables(config)}")
    return config.features[feature].table  # type: ignore[union-attr]  # what is drawn is looked up


def _tables(config: Config) -> str:
    return f"There are {', '.join(config.tables)}." if config.tables else "There are none."
