"""From a YAML file to a checked `Config`: interpolation, overrides, and errors that teach.

A saved config keeps `${VAR}` unexpanded, so that a run directory holds no secrets and no machine's paths: `Loaded`
carries both the tree as written and the config that it means.
"""

from __future__ import annotations

__all__ = [
    "Loaded",
    "build_config",
    "differences",
    "dump_tree",
    "load_config",
    "parse_config",
    "schema_json",
    "variable_values",
    "variables",
]

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from embedshard.config.root import Config
from embedshard.errors import ConfigError, nearest, sentence

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Loaded:
    """A config and the tree that it was read from.

    Attributes:
        config: checked, with variables expanded.
        tree: as written, overrides applied, variables unexpanded; what a run saves.
        source: where it was read, for messages.
    """

    config: Config
    tree: dict[str, Any]
    source: str


def load_config(path: str | Path, environment: Mapping[str, str], overrides: Sequence[str] = ()) -> Loaded:
    """Reads, overrides, expands and checks a config file.

    Args:
        path: the YAML file.
        environment: where `${VAR}` is looked up.
        overrides: `a.b=value` each, the value in YAML.

    Raises:
        ConfigError: naming the place, the value and what is allowed.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = Path(path).parent
        found = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        hint = nearest(Path(path).name, found) if found else f"The folder {folder} has no YAML files."
        raise ConfigError(f"{source}: there is no such file. {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}. It must be a YAML file in UTF-8.") from error
    return parse_config(text, source, environment, overrides)


def parse_config(text: str, source: str, environment: Mapping[str, str], overrides: Sequence[str] = ()) -> Loaded:
    """Overrides, expands and checks the text of a config file.

    Args:
        text: YAML.
        source: where it was read, for messages.
        environment: where `${VAR}` is looked up.
        overrides: `a.b=value` each, the value in YAML.

    Raises:
        ConfigError: naming the place, the value and what is allowed.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        met = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{source} holds {met}; a config is a mapping with 'data', 'features', 'tables', 'model' ...")
    for override in overrides:
        _apply_override(tree, override)
    return Loaded(build_config(tree, environment, source), tree, source)


def variables(tree: Any) -> set[str]:
    """Returns the names of the variables that a config refers to."""
    return {name for name, _ in _VARIABLE.findall(json.dumps(tree, default=str))}


def variable_values(loaded: Loaded, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns, by dotted path, the text of each value of a config that holds a variable, expanded."""
    return dict(_texts(loaded.tree, _expand(loaded.tree, environment, loaded.source, ()), ()))


def _texts(node: Any, expanded: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _texts(value, expanded[key], (*path, str(key)))
    if isinstance(node, str) and _VARIABLE.search(node):
        yield ".".join(path), expanded


def build_config(tree: Mapping[str, Any], environment: Mapping[str, str], source: str) -> Config:
    """Expands variables and checks a tree.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    expanded = _expand(tree, environment, source, ())
    try:
        return Config.model_validate(expanded)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(detail) for detail in error.errors()))
        count = "1 thing" if len(lines) == 1 else f"{len(lines)} things"
        raise ConfigError(f"{source}: {count} to change:\n" + "\n".join(f"  {line}" for line in lines)) from error


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Returns a config tree as YAML, in the order it was written."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=120)


def schema_json() -> str:
    """Returns the JSON schema of a config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def differences(ours: Any, theirs: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Returns each (path, ours, theirs) in which two plain trees differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = list(dict.fromkeys((*ours, *theirs)))
        return [
            difference
            for key in keys
            for difference in differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if ours == theirs else [(path, ours, theirs)]


# ------------------------------------------------------------------------------------------------- reading the tree
class _Loader(yaml.SafeLoader):
    """YAML in which a key `null` is that word, a policy's name, and no key may stand twice in a mapping."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value == "null":
                key.tag = "tag:yaml.org,2002:str"
            if key.value in lines:
                first = f"'{key.value}' is in line {lines[key.value]} already; a key stands once in a mapping"
                raise yaml.MarkedYAMLError(problem=first, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: not of the form a.b=value, for example --set train.epochs=3")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    *parents, last = path.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, override)]
    child = node.setdefault(name, {})
    if child is None or isinstance(child, str):  # a short form such as `vocabulary: hash`
        child = {} if child is None else {"kind": child}
        node[name] = child
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override}: '{name}' is {child!r}, which has nothing inside it to set")
    return child


def _index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"--set {override}: '{name}' is no place in a list of {len(node)}")
    return int(name)


def _expand(node: Any, environment: Mapping[str, str], source: str, path: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
        return {key: _expand(value, environment, source, (*path, str(key))) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value, environment, source, (*path, str(i))) for i, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> str:
        name, default = match.groups()
        value = environment.get(name) or default
        if value is None:
            raise ConfigError(
                f"{source}: {'.'.join(path)} is {node!r}, and the environment has no {name}. "
                f"Set it, or write ${{{name}:-default}}"
            )
        return value

    return _VARIABLE.sub(value_of, node)


# ------------------------------------------------------------------------------------------------- telling what is wrong
def _describe(detail: ErrorDetails) -> str:
    location = [part for part in detail["loc"]]
    kind, met = detail["type"], detail["input"]
    path, known = _walk(location)
    if kind == "extra_forbidden":
        return f"{path}: unknown key. {nearest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{path}: is missing. It is needed."
    if kind == "union_tag_not_found":
        return f"{path}: needs a 'kind': {_allowed_tags(detail)}."
    if kind == "union_tag_invalid":
        tag = str(detail.get("ctx", {}).get("tag"))
        tags = re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected_tags", "")))
        return f"{path}: there is no kind '{tag}'. {nearest(tag, tags)}"
    if kind == "value_error":
        message = str(detail.get("ctx", {}).get("error", detail["msg"]))
        shown = "" if isinstance(met, Mapping | list | BaseModel) else f"{met!r}: "
        return sentence(f"{path}: {shown}{message}" if path else message)
    if kind == "literal_error" and isinstance(met, str):
        allowed = re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected", "")))
        return f"{path}: {met!r} is not allowed. {nearest(met, allowed)} Allowed: {', '.join(allowed)}."
    return f"{path}: {met!r} does not fit. {detail['msg']}."


def _allowed_tags(detail: ErrorDetails) -> str:
    return str(detail.get("ctx", {}).get("discriminator", "kind")) + " as the documentation of the config lists them"


def _walk(location: Iterable[int | str]) -> tuple[str, list[str]]:
    """Turns pydantic's location into the path that a user writes, and returns the keys known at its last parent."""
    parts: list[str] = []
    annotation: Any = Config
    known: list[str] = list(Config.model_fields)
    for part in location:
        models = _models_in(annotation)
        tagged = [model for model in models if part in _tags(model)]
        if tagged and isinstance(part, str) and not any(part in model.model_fields for model in models):
            annotation, known = tagged[0], list(tagged[0].model_fields)
            continue  # the name of a union's member, which the user does not write
        if isinstance(part, str) and part.startswith(("function-", "constrained-", "list[", "dict[", "literal[", "int")):
            continue
        parts.append(str(part))
        holder = next((model for model in models if part in model.model_fields), None)
        if models:
            known = list(dict.fromkeys(name for model in models for name in model.model_fields))
        annotation = _element_of(annotation) if holder is None else holder.model_fields[str(part)].annotation
    return ".".join(parts), known


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if getattr(annotation, "__origin__", None) in (dict, list):
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()


def _element_of(annotation: Any) -> Any:
    arguments = get_args(annotation)
    if getattr(annotation, "__origin__", None) in (dict, list) and arguments:
        return arguments[-1]
    for argument in arguments:
        inner = _element_of(argument)
        if inner is not None:
            return inner
    return None
