"""What a service is told: where the export is, its limits, its token. Plain data that Ray may keep: no secret is in it."""

from __future__ import annotations

__all__ = ["TOKEN_VARIABLE", "Settings", "is_loopback", "token_digests"]

import hashlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from embedshard.errors import ConfigError

TOKEN_VARIABLE: Final = "EMBEDSHARD_SERVE_TOKEN"
"""Environment variable: the token that clients must send."""
_SHORTEST_TOKEN: Final = 16


class Settings(BaseModel):
    """A service.

    Attributes:
        out: an export, or a folder of exports.
        metadata: a Parquet file with the items' ids and what is known of them.
        replicas: processes that answer, each with the export in its memory.
        cpus_per_replica: that Ray reserves for each, and threads that it searches with.
        poll_s: between two looks for a newer export.
        max_batch: requests that are answered together.
        batch_wait_ms: for which a request waits for others.
        max_k: longest list.
        max_users: in one request; items in one request to `/similar`.
        max_items: in one request: to be scored, excluded, or a history.
        max_body_bytes: of a request.
        max_pending: requests that a replica has at a time; more are refused at once.
        request_timeout_s: after which a request is given up.
        token_digests: SHA-256 of each token that is let in; with none, no token is asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    metadata: str | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    poll_s: Annotated[float, Field(gt=0)] = 10.0
    max_batch: Annotated[int, Field(ge=1)] = 32
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    max_k: Annotated[int, Field(ge=1)] = 1000
    max_users: Annotated[int, Field(ge=1)] = 100
    max_items: Annotated[int, Field(ge=1)] = 1000
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20
    max_pending: Annotated[int, Field(ge=1)] = 256
    request_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    token_digests: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


def token_digests(token_file: str | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the SHA-256 of each token of a file, one a line, else of that in the environment; none where there is none.

    Raises:
        ConfigError: if the file cannot be read or is empty, or a token is so short that it could be guessed.
    """
    where = TOKEN_VARIABLE if token_file is None else f"--token-file {token_file}"
    if token_file is None:
        tokens = [environment[TOKEN_VARIABLE]] if environment.get(TOKEN_VARIABLE) else []
    else:
        try:
            tokens = [line.strip() for line in Path(token_file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}. It holds a token a line.") from error
        if not tokens:
            raise ConfigError(f"{where} holds no token. Put one into it: openssl rand -hex 32")
    for token in tokens:
        if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"{where}: a token has {len(token)} characters; it must have at least {_SHORTEST_TOKEN}, of ASCII, without "
                f"spaces. Make one: openssl rand -hex 32"
            )
    return tuple(hashlib.sha256(token.encode()).hexdigest() for token in tokens)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
