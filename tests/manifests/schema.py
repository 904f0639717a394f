"""Validates manifests as an API server would: KubeRay's kinds by its CRDs, the others by Kubernetes' own schemas."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.32"
_QUANTITY = re.compile(r"^([+-]?(\d+(\.\d*)?|\.\d+))([numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?$")


class StrictLoader(yaml.CSafeLoader):
    """YAML in which no key may be given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def load_all(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, StrictLoader) if document]


@cache
def crd_validator(folder: Path, version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    """A strict validator of a KubeRay kind: a field that its CRD does not name is an error. None for an unknown kind."""
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        return None
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)  # 25,000 lines: too many for Python's own
    schemas = {
        f"{crd['spec']['group']}/{entry['name']}": entry["schema"]["openAPIV3Schema"] for entry in crd["spec"]["versions"]
    }
    return jsonschema.Draft202012Validator(strict(schemas[version])) if version in schemas else None


def strict(schema: dict[str, Any], is_root: bool = True) -> dict[str, Any]:
    """Returns a JSON Schema for a CRD's OpenAPI schema: unknown fields refused, null allowed where nullable."""
    result = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-") and key not in ("description", "default", "format")
    }
    if "properties" in schema:
        result["properties"] = {name: strict(part, False) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            result["additionalProperties"] = False
        if is_root:
            result["properties"]["metadata"] = {"type": "object"}
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"], False)
    if "items" in schema:
        result["items"] = strict(schema["items"], False)
    for word in ("anyOf", "allOf", "oneOf"):
        if word in schema:
            result[word] = [strict(part, False) for part in schema[word]]
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["type"] = ["integer", "string"]
    if schema.get("nullable"):
        result = {"anyOf": [{"type": "null"}, result]}
    return result


def schema_errors(document: dict[str, Any], crds: Path | None) -> list[str]:
    """Returns what the schema of a document's kind finds wrong; a kind without a schema is an error too.

    Args:
        document: a manifest.
        crds: the folder of KubeRay's CRDs; where absent, KubeRay's kinds pass unchecked.
    """
    version, kind = document["apiVersion"], document["kind"]
    if version.startswith("ray.io/"):
        if crds is None:
            return []
        validator = crd_validator(crds, version, kind)
        if validator is None:
            return [f"{kind} of {version}: no CRD here knows it"]
        found = [f"{_where(error)}: {error.message[:300]}" for error in validator.iter_errors(document)]
        return found + embedded_metadata_errors(document)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{_where(error)}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def embedded_metadata_errors(document: dict[str, Any]) -> list[str]:
    """Checks what CRDs leave open: the metadata, which an API server knows by itself."""
    return [
        f"metadata.{name}: not a field of metadata"
        for name in document["metadata"]
        if name not in {"name", "generateName", "namespace", "labels", "annotations", "finalizers"}
    ]


def quantity(value: Any) -> float:
    """Returns a Kubernetes quantity as a number.

    Raises:
        ValueError: if it is none.
    """
    match = _QUANTITY.match(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no quantity")
    suffix = match[4] or ""
    if suffix[:1] in "eE" and suffix[1:]:
        return float(str(value))
    binary = {letter + "i": 1024**power for power, letter in enumerate("KMGTPE", 1)}
    decimal = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, **{letter: 1000.0**power for power, letter in enumerate("kMGTPE", 1)}}
    return float(match[1]) * {**binary, **decimal}[suffix]


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every node of a document, with its path."""
    yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{path}[{index}]")


def _where(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "(root)"
