"""What is to be exported: the run, a checkpoint, the data and the model, looked at before anything is written."""

from __future__ import annotations

__all__ = ["ExportPlan", "planned_export"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from embedshard.config import Config, parse_metric, table_specs
from embedshard.config.parts import CustomModelConfig, ItemEmbeddingConfig, ManagedVocabulary, SASRecConfig, TwoTowerConfig
from embedshard.data.vocabulary import Vocabulary, load_vocabularies, table_rows
from embedshard.data.vocabulary_building import kept_vocabularies
from embedshard.errors import ConfigError, with_article
from embedshard.export.index import choose_kind
from embedshard.export.manifest import plain
from embedshard.export.quantised import Format, quantised_formats
from embedshard.export.towers import has_towers
from embedshard.launch.run_tables import open_checkpoint_of
from embedshard.models.registry import build_model
from embedshard.storage import Location, PathOrUri
from embedshard.train.assembly import Assembly, assemble
from embedshard.train.checkpoint_reader import Checkpoint
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.world import open_world

_RANKING = "recall@10"
"""What users are replayed by where the run has no metric that ranks."""


@dataclass(frozen=True)
class ExportPlan:
    """What is to be exported, and how.

    Attributes:
        run: whose it is.
        config: the run's.
        tree: it as it was written, with its `${VAR}`.
        checkpoint: that is exported.
        resolved: what the run has kept of its data.
        metrics: the run's own, where they are of this checkpoint.
        counted: files of the vocabularies that the run has counted, by table.
        vocabularies: of the config's tables.
        index: `auto` or a kind.
        formats: in which tables are written too.
        device: where towers are computed.
        why_no_towers: why there are no vectors of users and items; empty where there are, or of items alone.
        changes_hands: the table of users or items whose rows do; empty where none does.
        parts: with the checkpoint's model, where towers are written by it.
    """

    run: RunDirectory
    config: Config
    tree: Mapping[str, Any]
    checkpoint: Checkpoint
    resolved: dict[str, Any]
    metrics: dict[str, float | None]
    counted: Mapping[str, Location]
    vocabularies: Mapping[str, Vocabulary]
    index: str
    formats: tuple[Format, ...]
    device: str
    why_no_towers: str
    changes_hands: str
    parts: Assembly | None


@contextmanager
def planned_export(
    run_dir: PathOrUri,
    environment: Mapping[str, str],
    *,
    checkpoint_step: int | None = None,
    index: str = "auto",
    quantise: str = "none",
    device: str = "cpu",
    reads_all: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Iterator[ExportPlan]:
    """Reads and checks all that an export is made of, and keeps it open; nothing is written. In one process.

    Args:
        run_dir: the run's folder.
        environment: gives configs their `${VAR}`.
        checkpoint_step: None takes the one that the run selected, else the newest.
        index: `auto` or a kind.
        quantise: formats for the tables too, as `quantised_formats` takes them.
        device: where the towers are computed.
        reads_all: whether a checkpoint is read through though no model is made of it: something would be lost if it were
            found damaged later.
        say: is told what is being done.

    Raises:
        EmbedshardError: what a user can act on.
    """
    choose_kind(index, 0)
    formats = quantised_formats(quantise)
    run = RunDirectory.open(run_dir)
    loaded = run.load_config(environment)
    config, checkpoint = loaded.config, open_checkpoint_of(run, checkpoint_step)
    resolved, result = run.read_json("inventory.json") or {}, run.read_json("result.json") or {}
    counted = kept_vocabularies(config, run.vocabularies)
    vocabularies = load_vocabularies(config, resolved.get("tokenizers", {}), counted)
    own = None
    if isinstance(config.model, CustomModelConfig):
        own = build_model(config, table_specs(config, table_rows(vocabularies)))  # it may not be there
    why_not, changes_hands = _why_no_towers(config, own), _that_changes_hands(config)
    parts = None
    with ExitStack() as stack:
        if why_not or changes_hands or isinstance(config.model, ItemEmbeddingConfig):
            if reads_all:
                say("files of the checkpoint")
                checkpoint.verify()
        else:
            world = stack.enter_context(open_world(device))
            if world.world_size > 1:
                raise ConfigError(f"an export is written by one process, and {world.world_size} were started. Start one.")
            say("data and model")
            config = _that_ranks(config)
            parts = assemble(config, world, resolved or None, vocabularies=run.vocabularies, initialises=False)
            restore_model(checkpoint, parts.model, parts.managed)
        yield ExportPlan(
            run=run,
            config=config,
            tree=loaded.tree,
            checkpoint=checkpoint,
            resolved=resolved,
            metrics=plain(result.get("metrics", {})) if result.get("selected_step") == checkpoint.step else {},
            counted=counted,
            vocabularies=vocabularies,
            index=index,
            formats=formats,
            device=device,
            why_no_towers=why_not,
            changes_hands=changes_hands,
            parts=parts,
        )


def _why_no_towers(config: Config, own: nn.Module | None) -> str:
    """Returns why there are no vectors of users and items; nothing where there are.

    Args:
        config: the run's.
        own: the model where it is the user's own.
    """
    model = config.model
    if isinstance(model, CustomModelConfig):
        if own is None or not has_towers(own):
            return (
                f"There are no vectors of users and items: what {model.factory} returns has not both methods "
                f"encode_queries(batch) and encode_candidates(batch)."
            )
    elif isinstance(model, ItemEmbeddingConfig):
        return ""  # its items are rows of a table
    elif not isinstance(model, TwoTowerConfig | SASRecConfig):
        return f"Vectors of users and items are exported of a two_tower and a sasrec; this is {with_article(model.kind)}."
    for role in ("user_id", "item_id"):
        feature = config.identity(role)
        if feature is None and isinstance(model, SASRecConfig):
            continue  # a user is a history
        if feature is None:
            return f"There are no vectors of users and items: no id feature names the {role.removesuffix('_id')}."
    if config.data.catalogue is None and config.item_features() != [config.identity("item_id")]:
        return (
            "There are no vectors of users and items: the item tower reads more than the id, and there is no data.catalogue."
        )
    return ""


def _that_changes_hands(config: Config) -> str:
    """Returns the table of users or items whose rows change hands, so that nothing ranks by them; nothing where none do."""
    features = [config.features[name] for role in ("user_id", "item_id") if (name := config.identity(role)) is not None]
    tables = [getattr(feature, "table", "") for feature in features]
    return next((name for name in tables if isinstance(config.tables[name].vocabulary, ManagedVocabulary)), "")


def _that_ranks(config: Config) -> Config:
    """Returns the config, with a metric that ranks where it has none: the catalogue is opened for it."""
    if any(parse_metric(name).ranks for name in config.evaluate.metrics):
        return config
    if config.identity("user_id") is None:
        return config  # a list of candidates is all that could be ranked
    metrics = [*config.evaluate.metrics, _RANKING]
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metrics": metrics})})
