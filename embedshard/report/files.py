"""Reads the files of a run's folder. One that is missing is empty; what is damaged is added to `problems`, for a person."""

from __future__ import annotations

__all__ = ["committed_steps", "read_config", "read_json", "read_json_lines", "read_quarantine", "read_tree"]

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embedshard.config import Config, build_config
from embedshard.errors import ConfigError
from embedshard.report.run import QuarantinedRow, integer
from embedshard.storage import Location

_SHOWN_ROWS = 10
"""Quarantined rows that a report shows; all are counted."""
_VARIABLE_WITHOUT_DEFAULT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_tree(place: Location) -> dict[str, Any]:
    """Returns a config as it is written.

    Raises:
        ConfigError: if it is no YAML, or no mapping.
    """
    try:
        tree = yaml.safe_load(place.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{place.uri} cannot be read as YAML: {_one_line(error)}. A run's folder holds its config there."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{place.uri} holds no mapping, so it is no run's config. Give another folder, or put the file back."
        )
    return tree


def read_config(tree: dict[str, Any], place: Location, problems: list[str]) -> Config | None:
    """Returns what a config means. The environment is not asked: a variable without a default stands for itself."""
    names = _VARIABLE_WITHOUT_DEFAULT.findall(json.dumps(tree, default=str))
    try:
        return build_config(tree, {name: f"${{{name}}}" for name in names}, place.uri)
    except ConfigError as error:
        first, *rest = str(error).splitlines()
        detail = rest[0].strip() if rest else first
        problems.append(f"config.yaml does not fit this version, so tables and planned steps are not told: {detail}")
        return None


def read_json(place: Location, problems: list[str]) -> Any:
    """Returns what a JSON file holds; None where there is none, or a damaged one."""
    if not place.exists():
        return None
    try:
        return json.loads(place.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{place.name} cannot be read: {_one_line(error)}")
        return None


def read_json_lines(place: Location, problems: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines. A kill may have cut a line off: it is counted and left out."""
    if not place.exists():
        return []
    found, broken = [], 0
    for text in place.read_text().splitlines():
        try:
            line = json.loads(text) if text.strip() else None
        except ValueError:
            line = text
        if isinstance(line, dict):
            found.append(line)
        else:
            broken += line is not None
    if broken:
        lines = "1 line was cut off by a kill and is" if broken == 1 else f"{broken} lines were cut off by kills and are"
        problems.append(f"{place.name}: {lines} left out.")
    return found


def read_quarantine(folder: Location, problems: list[str]) -> tuple[tuple[QuarantinedRow, ...], dict[tuple[str, str], int]]:
    """Returns the first rows that were set aside, and how many were by (column, reason)."""
    rows: list[QuarantinedRow] = []
    reasons: Counter[tuple[str, str]] = Counter()
    for name in folder.list_names():
        if not name.endswith(".parquet"):
            continue
        try:
            with folder.join(name).open_input() as opened, pq.ParquetFile(opened) as file:
                for batch in file.iter_batches():
                    table = pa.Table.from_batches([batch])
                    counts = table.group_by(["column", "reason"]).aggregate([([], "count_all")]).to_pylist()
                    reasons.update({(str(line["column"]), str(line["reason"])): line["count_all"] for line in counts})
                    rows += map(_quarantined_row, table.slice(0, _SHOWN_ROWS - len(rows)).to_pylist())
        except (OSError, KeyError, pa.ArrowException) as error:
            problems.append(f"quarantine/{name} cannot be read: {_one_line(error)}")
    return tuple(rows), dict(reasons.most_common())


def committed_steps(folder: Location) -> tuple[int, ...]:
    """Returns the steps of the checkpoints whose manifest is there."""
    names = [name for name in folder.list_names() if name.startswith("step-") and name[5:].isdigit()]
    return tuple(sorted(int(name[5:]) for name in names if folder.join(name, "manifest.json").exists()))


def _quarantined_row(line: Mapping[str, Any]) -> QuarantinedRow:
    return QuarantinedRow(
        file=str(line.get("file")),
        row_group=integer(line.get("row_group")),
        row=integer(line.get("row")),
        column=str(line["column"]),
        value=str(line.get("value")),
        reason=str(line["reason"]),
        step=integer(line.get("step")),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
