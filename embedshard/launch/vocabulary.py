"""Counts the ids of a config's training set and writes vocabularies, without training."""

from __future__ import annotations

__all__ = ["Built", "build_here", "parse_memory", "show"]

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from embedshard.config import Config, load_config
from embedshard.config.parts import AutoVocabulary, FileVocabulary
from embedshard.data.tokenizer_training import PreparationProgress
from embedshard.data.vocabulary_building import build_vocabularies
from embedshard.data.vocabulary_file import read_footer
from embedshard.errors import ConfigError, nearest
from embedshard.quantities import parse_size, share
from embedshard.storage import Location, locate, reaching

_LEAST_MEMORY: Final = 256 * 2**20


@dataclass(frozen=True)
class Built:
    """A vocabulary that was written.

    Attributes:
        table: its name.
        file: where it lies.
        distinct: how many different ids were met.
        rows: how many of them have a row.
        lookups: how many ids were met, each as often as it was.
        known_share: of the lookups, by ids that have a row.
    """

    table: str
    file: str
    distinct: int
    rows: int
    lookups: int
    known_share: float


def build_here(
    config_path: Path,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    console: Console,
    *,
    tables: Sequence[str] = (),
    out: str | None = None,
    memory_bytes: int,
    min_count: int | None = None,
    max_size: int | None = None,
    replace: bool = False,
) -> list[Built]:
    """Counts the ids of the tables whose vocabulary is `auto` or `file`, and writes a Parquet of (id, count, row) for each.

    Args:
        config_path: the config.
        overrides: `a.b=value` each.
        environment: gives the config its `${VAR}`.
        console: where a bar of progress is shown.
        tables: which; all that can be where empty.
        out: the folder; None writes a `file` vocabulary where the config says it is, and `auto` ones into `vocabularies`.
        memory_bytes: that may be taken.
        min_count: how often an id is met at least; None: as the `auto` vocabulary says, 1 for a `file`.
        max_size: ids that have a row at most; None: as the `auto` vocabulary says, all for a `file`.
        replace: whether a file that is there already is replaced.

    Raises:
        EmbedshardError: what a user can act on.
    """
    config = load_config(config_path, environment, overrides).config
    wanted = _wanted(config, tables)
    places = {name: _place(config, name, out) for name in wanted}
    for name, place in places.items():
        with reaching(place):
            if place.exists() and not replace:
                raise ConfigError(
                    f"{place.uri} is there already, for table '{name}'. Give --replace to count anew, or --out another "
                    f"folder."
                )
            place.parent.make_dirs()
    counting = _with_auto(config, wanted, min_count, max_size)
    with tempfile.TemporaryDirectory(prefix="embedshard-vocabularies-") as scratch, _bar(console) as progress:
        made = build_vocabularies(counting, locate(scratch), None, progress, memory_bytes, wanted)
        for name, location in made.items():
            with reaching(places[name]):
                places[name].put_file(Path(location.path))
    return [_built(name, place) for name, place in places.items()]


def show(built: Sequence[Built], console: Console) -> None:
    """Prints what was written, and how a config uses it."""
    table = Table(title="Vocabularies", title_justify="left")
    for heading in ("table", "distinct ids", "rows", "lookups", "of ids with a row", "file"):
        table.add_column(heading, justify="left" if heading in ("table", "file") else "right", overflow="fold")
    for one in built:
        numbers = (f"{number:,}" for number in (one.distinct, one.rows, one.lookups))
        table.add_row(one.table, *numbers, share(one.known_share), one.file)
    console.print(table)
    for one in built:
        console.print(
            f"  tables.{one.table}.vocabulary: {{kind: file, path: {one.file}}}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def parse_memory(text: str) -> int:
    """Returns the bytes of `2GB`, `512MiB` or a number.

    Raises:
        ConfigError: if it is none, or too few to count anything in.
    """
    try:
        memory = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--memory {text}: {error}.") from error
    if memory < _LEAST_MEMORY:
        raise ConfigError(f"--memory {text}: counting takes {_LEAST_MEMORY // 2**20} MiB at least. Give as much or more.")
    return memory


def _wanted(config: Config, tables: Sequence[str]) -> list[str]:
    countable = [
        name for name, table in config.tables.items() if isinstance(table.vocabulary, AutoVocabulary | FileVocabulary)
    ]
    for name in tables:
        if name not in config.tables:
            raise ConfigError(f"--table {name}: there is no such table. {nearest(name, config.tables)}")
        if name not in countable:
            raise ConfigError(
                f"--table {name}: its vocabulary is '{config.tables[name].vocabulary.kind}', for which nothing is counted. "
                f"Give the table the vocabulary 'auto', or 'file' with the path that is to be written."
            )
    if not countable:
        raise ConfigError(
            "no table has a vocabulary that is counted. Give one the vocabulary 'auto', or 'file' with the path that is to "
            "be written."
        )
    return list(tables) or countable


def _place(config: Config, table: str, out: str | None) -> Location:
    vocabulary = config.tables[table].vocabulary
    if out is None and isinstance(vocabulary, FileVocabulary):
        if vocabulary.column not in (None, "id"):
            raise ConfigError(
                f"tables.{table}.vocabulary.column is '{vocabulary.column}', and what is written has the columns id, count "
                f"and row. Leave 'column' out, or give --out another folder."
            )
        return locate(vocabulary.path)
    return locate(out or "vocabularies").join(f"{table}.parquet")


def _with_auto(config: Config, wanted: Sequence[str], min_count: int | None, max_size: int | None) -> Config:
    """Returns the config with vocabularies that are counted in place of files that need not be there."""
    tables = {}
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, FileVocabulary):
            vocabulary = AutoVocabulary(kind="auto")
        if isinstance(vocabulary, AutoVocabulary) and name in wanted:
            given = {"min_count": min_count, "max_size": max_size}
            vocabulary = vocabulary.model_copy(update={key: value for key, value in given.items() if value is not None})
        tables[name] = table.model_copy(update={"vocabulary": vocabulary})
    return config.model_copy(update={"tables": tables})


@contextmanager
def _bar(console: Console) -> Iterator[PreparationProgress]:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            description = f"sorting the {what}" if done == total else what
            bar.update(task, description=description, completed=done, total=total)

        yield told


def _built(table: str, place: Location) -> Built:
    rows, counted = read_footer(place)
    assert counted is not None, "it was just written"
    return Built(table, place.uri, counted.distinct, rows, counted.lookups, counted.known / counted.lookups)
