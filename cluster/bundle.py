"""What of a folder goes to the cluster with a job: the config and a user's modules, and neither data nor secrets."""

from __future__ import annotations

__all__ = ["Bundle", "bundle"]

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from embedshard.errors import ConfigError
from embedshard.quantities import size

MOST_BYTES: Final = 100 * 1024**2
"""What is sent at most. Ray's own limit is 500 MiB; a config and modules are thousandths of it."""

_NOT_AT_THE_TOP: Final = ("data", "runs", "build", "dist", "shared")
_NOWHERE: Final = (
    ".git", ".venv", "venv", "__pycache__", "node_modules", ".*_cache", ".hypothesis", "*.egg-info", "*.pyc",
    "*.parquet", "*.safetensors",
    ".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "auth_token", ".netrc", ".ssh", ".aws", ".azure",
    ".config", ".gnupg", ".kube", ".docker", ".ray", ".cache",
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """A ZIP archive that Ray takes as a working directory.

    Attributes:
        path: the archive.
        files: what is in it, relative to the folder.
        size_bytes: before compression.
    """

    path: Path
    files: tuple[Path, ...]
    size_bytes: int


def bundle(folder: Path, path: Path, exclude: Sequence[str] = ()) -> Bundle:
    """Packs a folder. Equal contents give equal archives, so Ray uploads them once.

    Args:
        folder: what is packed.
        path: of the archive.
        exclude: patterns of names or of paths below the folder, beside those that are always left out.

    Raises:
        ConfigError: if it is larger than what is sent.
    """
    found: dict[Path, int] = {}
    total = 0
    for file in _files(folder, folder, exclude):
        found[file] = file.stat().st_size
        total += found[file]
        if total > MOST_BYTES:
            largest = sorted(found, key=lambda file: found[file], reverse=True)[:5]
            listed = ", ".join(f"{file.relative_to(folder)} ({size(found[file])})" for file in largest)
            raise ConfigError(
                f"--working-dir {folder} holds more than {size(MOST_BYTES)}, too much to send with a job. The largest found "
                f"so far: {listed}. Leave them out with --exclude PATTERN, or give a folder with the config and your "
                f"modules alone. Data belong where all nodes reach them."
            )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in found:
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # of 1980: times do not change the archive
            entry.external_attr = (file.stat().st_mode & 0o777) << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return Bundle(path, tuple(file.relative_to(folder) for file in found), total)


def _files(folder: Path, top: Path, exclude: Sequence[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        below = entry.relative_to(top).as_posix()
        patterns = (*_NOWHERE, *exclude, *(_NOT_AT_THE_TOP if folder == top else ()))
        if any(fnmatch(entry.name, pattern) or fnmatch(below, pattern) for pattern in patterns):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _files(entry, top, exclude)
        elif entry.is_file():
            yield entry
