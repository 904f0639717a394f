"""A program's file, read so that nothing in it is unpickled or evaluated but what a program needs.

`torch.export.load` unpickles what an archive says is pickled (example inputs, tensors of subclasses, objects), looks
functions up by name in all of `torch`, and evaluates text as Python (sizes by `sympy`, guards by `exec`). What `export`
writes has raw tensors alone, calls `aten` operators alone, and its texts are sizes and comparisons of them. Here an archive
is compared with that; one that has more is refused. A zip can be two archives, one for a reader that looks for the directory
where it ends and one for a reader that goes where it is said to be. So torch is not given the file, but a new archive of the
members that were compared.
"""

from __future__ import annotations

__all__ = ["Program", "check_archive", "load_program"]

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from embedshard.errors import ExportError
from embedshard.storage import Location

Program = Callable[..., dict[str, torch.Tensor]]
"""Takes tensors by keyword."""

_PLAIN: Final = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
_EXAMPLES: Final = "data/sample_inputs/model.pt"
_CONFIGS: Final = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_OPERATOR: Final = re.compile(
    r"torch\.ops\.aten\.[a-z0-9_]+\.[A-Za-z0-9_]+"
    r"|torch\.sym_(max|min|not|ite|int)|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|le|lt|ge|gt|getitem|and_|or_)"
)
_SYMBOL: Final = re.compile(r"[su]\d+")
_FUNCTIONS: Final = frozenset(
    [
        "Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "CleanDiv", "CeilDiv", "PythonMod",
        "Identity", "Eq", "Ne", "Le", "Lt", "Ge", "Gt", "And", "Or", "Not",
    ]
)  # fmt: skip
_OF_TENSORS: Final = frozenset(["size", "stride", "storage_offset"])
_NODES: Final = (
    ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.boolop, ast.unaryop, ast.operator, ast.cmpop,
    ast.Load, ast.keyword,
)  # fmt: skip


def load_program(place: Location) -> Program:
    """Reads a program whose hash was compared, and returns what runs it.

    Raises:
        ExportError: if it is none, or has more than a program needs.
        StorageError: if it cannot be read.
    """
    checked = check_archive(place.read_bytes(), place.uri)
    try:
        module = torch.export.load(io.BytesIO(checked)).module()
    except (RuntimeError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise ExportError(f"{place.uri} is no program that torch {torch.__version__} reads: {error}. {_AGAIN}") from error

    def run(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return module(**inputs)

    return run


_AGAIN: Final = "Export the run again."


def check_archive(content: bytes, uri: str) -> bytes:
    """Compares an archive with what `export` writes.

    Returns:
        An archive of what was compared and nothing else, for torch to read.

    Raises:
        ExportError: naming what it has more.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            problem = _problem_of_names(infos)
            members = {} if problem else {info.filename: archive.read(info) for info in infos}
        problem = problem or _problem(members)
    except (zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise ExportError(f"{uri} is no program of torch.export: {error}. {_AGAIN}") from error
    if problem:
        raise ExportError(f"{uri} {problem}, which no program of an export has; it is not loaded. {_AGAIN}")
    return _packed(members)


def _problem_of_names(infos: list[zipfile.ZipInfo]) -> str:
    """Returns which files an archive has that a program doesn't need; nothing if there is none."""
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        return "holds a file twice"
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1:
        return "holds several folders"
    for info in infos:
        name = info.filename.partition("/")[2]
        if name != _EXAMPLES and not _PLAIN.fullmatch(name):
            return f"holds '{name}'"
        if info.compress_type != zipfile.ZIP_STORED:  # a few bytes could be made of more than the memory holds
            return f"holds '{name}' compressed"
    return ""


def _problem(members: dict[str, bytes]) -> str:
    """Returns what the files of an archive have that a program doesn't need; nothing if there is nothing."""
    folder = next(iter(members)).partition("/")[0]
    if members.get(f"{folder}/{_EXAMPLES}"):
        return "holds pickled example inputs"
    for name in _CONFIGS:
        for tensor, meta in json.loads(members[f"{folder}/{name}"])["config"].items():
            if meta["use_pickle"] is not False:
                return f"holds '{tensor}' pickled"
    return next(_met(json.loads(members[f"{folder}/models/model.json"])), "")


def _packed(members: dict[str, bytes]) -> bytes:
    """Returns an archive of files, in their order, as they are."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def _met(value: Any) -> Iterator[str]:
    """Yields what is met in a program's graph and does not belong there."""
    if isinstance(value, list):
        for one in value:
            yield from _met(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key == "target" and isinstance(one, str) and "inputs" in value and not _OPERATOR.fullmatch(one):
                yield f"calls '{one}'"
            texts = [one] if key == "expr_str" else one if key == "guards_code" else []
            for text in texts:
                if not _is_of_sizes(text):
                    yield f"evaluates '{text}'"
            if key in ("in_spec", "out_spec") and isinstance(one, str) and "__enum__" in one:
                yield "names an enumeration, whose module is imported"
            if key == "as_operator" and isinstance(one, str) and not _OPERATOR.fullmatch(one):
                yield f"names the operator '{one}'"
            yield from _met(one)


def _is_of_sizes(text: str) -> bool:
    """Whether a text is arithmetic of sizes of tensors, or compares them."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name == "L" or name in _FUNCTIONS or _SYMBOL.fullmatch(name) is not None
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float | str)
        case ast.Attribute(attr=attribute):
            return attribute in _OF_TENSORS
        case ast.Subscript(value=whole, slice=part):
            return isinstance(whole, ast.Name | ast.Subscript | ast.Call) and isinstance(part, ast.Constant)
        case ast.Call(func=ast.Name(id=name), args=args):
            strings = [one.value for one in args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            return name in _FUNCTIONS and all(_SYMBOL.fullmatch(one) for one in strings)
        case ast.Call(func=ast.Attribute(), args=[], keywords=[]):
            return True
        case _:
            return isinstance(node, _NODES)
