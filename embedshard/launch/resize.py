"""`embedshard checkpoint resize`: another number of rows for a managed table of a run."""

from __future__ import annotations

__all__ = ["resize_here"]

from collections.abc import Callable, Mapping

from embedshard.config import table_specs
from embedshard.config.parts import ManagedVocabulary
from embedshard.data.vocabulary import load_vocabularies, table_rows
from embedshard.data.vocabulary_building import kept_vocabularies
from embedshard.errors import CheckpointError, ConfigError, nearest
from embedshard.storage import PathOrUri, reaching
from embedshard.train.checkpoint import Checkpointer, find_steps, open_step
from embedshard.train.resize import Resized, resize_checkpoint
from embedshard.train.run_directory import Origin, RunDirectory


def resize_here(
    run_dir: PathOrUri,
    table: str,
    rows: int,
    environment: Mapping[str, str],
    told: Callable[[Resized], None] = lambda resized: None,
) -> list[Resized]:
    """Writes all checkpoints of a run anew, and its config: the run goes on with so many rows. It must not be training.

    If it is interrupted, it is called again.

    Args:
        run_dir: the run's folder.
        table: the config's table, whose vocabulary is managed.
        rows: that ids can hold from now on.
        environment: gives configs their `${VAR}`.
        told: hears of each checkpoint that was written.

    Raises:
        EmbedshardError: what a user can act on.
    """
    run = RunDirectory.open(run_dir)
    before = run.load_config(environment).config
    if table not in before.tables:
        raise ConfigError(f"--table: there is no table '{table}'. {nearest(table, before.tables)}")
    vocabulary = before.tables[table].vocabulary
    if not isinstance(vocabulary, ManagedVocabulary):
        raise ConfigError(
            f"--table: '{table}' has the vocabulary '{vocabulary.kind}', under which another number of rows gives ids other "
            f"rows. Only a table with a 'managed' one can be resized; for others, start a new run with init_from."
        )
    where = f"tables.{table}.rows" if before.tables[table].rows is not None else f"tables.{table}.vocabulary.rows"
    loaded = run.load_config(environment, [f"{where}={rows}"])
    config = loaded.config
    inventory = run.read_json("inventory.json") or {}
    known = load_vocabularies(config, inventory.get("tokenizers", {}), kept_vocabularies(config, run.vocabularies))
    specs = {spec.name: spec for spec in table_specs(config, table_rows(known)) if spec.managed_by == table}
    with reaching(run.checkpoints):
        steps = find_steps(run.checkpoints)
        if not steps:
            raise CheckpointError(
                f"{run.folder.uri} has no checkpoint yet. Start it anew with another number of rows: --set {where}={rows}."
            )
        newest = open_step(run.checkpoints, steps[-1])
        attempt = run.begin_attempt(1, Origin(step=newest.step, attempt=int(newest.attempt)))
        done = []
        for step in steps:
            with Checkpointer(run.checkpoints, 0, 1, f"{attempt.attempt:04d}", mode="blocking") as checkpointer:
                checkpoint = open_step(run.checkpoints, step)
                buckets = config.num_buckets(table)
                done.append(resize_checkpoint(checkpoint, checkpointer, vocabulary, specs, table, buckets, config.seed))
            told(done[-1])
    run.save_config(loaded)
    if inventory:
        run.write_json("inventory.json", inventory | {"table_rows": inventory.get("table_rows", {}) | {table: rows}})
    with reaching(run.folder):
        run.folder.join("plan.json").delete_file()  # of tables of another size
    return done
