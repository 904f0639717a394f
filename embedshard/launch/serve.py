"""`embedshard serve`: checks what it was given, serves until it is told to stop, and says where."""

from __future__ import annotations

__all__ = ["ServeRequest", "serve_here"]

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType

from embedshard.errors import ConfigError, ExportError
from embedshard.export.manifest import open_export
from embedshard.export.recommend import ranking_parts
from embedshard.serve.live import candidates
from embedshard.serve.settings import TOKEN_VARIABLE, Settings, is_loopback, token_digests

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class ServeRequest:
    """What `embedshard serve` was told.

    Attributes:
        settings: of the service, without tokens.
        host: address to listen on.
        port: to listen on.
        token_file: holds a token a line.
        asks_no_token: whether everyone who reaches it is let in.
    """

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: str | None = None
    asks_no_token: bool = False


def serve_here(request: ServeRequest, environment: Mapping[str, str], say: Callable[[str], None]) -> str:
    """Serves an export on a Ray cluster of its own until a signal; returns its name.

    Args:
        request: what to serve.
        environment: may hold the token.
        say: is told what is being done.

    Raises:
        EmbedshardError: what a user can act on.
    """
    settings = _with_tokens(request, environment)
    _check_address(request.host, request.port)
    _check_export(settings.out)
    serving = _import_serving()
    stopped = threading.Event()
    signals: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(signal.Signals(number).name)
        stopped.set()

    def catch() -> None:
        for number in _SIGNALS:
            signal.signal(number, stop)

    former = {number: signal.getsignal(number) for number in _SIGNALS}
    catch()
    try:
        num_cpus = max(os.cpu_count() or 1, int(settings.replicas * settings.cpus_per_replica + 0.999))
        say(f"Starts {settings.replicas} replica{'s' * (settings.replicas > 1)} for {settings.out}")
        with serving(settings, request.host, request.port, num_cpus, catch):
            host = f"[{request.host}]" if ":" in request.host else request.host
            who = "with a token" if settings.token_digests else "no token is asked for"
            if not stopped.is_set():
                say(f"Serves at http://{host}:{request.port} ({who}); the API: http://{host}:{request.port}/docs")
            while not stopped.wait(1.0):
                pass
            say(f"Stops after {signals[0]}: no new requests; those that are under way are answered")
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return signals[0]


def _with_tokens(request: ServeRequest, environment: Mapping[str, str]) -> Settings:
    digests = () if request.asks_no_token else token_digests(request.token_file, environment)
    if request.asks_no_token and (request.token_file is not None or environment.get(TOKEN_VARIABLE)):
        raise ConfigError(f"--no-token and a token ({TOKEN_VARIABLE} or --token-file) were given. Leave one of them out.")
    if not digests and not request.asks_no_token and not is_loopback(request.host):
        raise ConfigError(
            f"--host {request.host} is reached by other machines, and there is no token. Give one with --token-file or "
            f"{TOKEN_VARIABLE}, or say --no-token if something else keeps strangers out."
        )
    return request.settings.model_copy(update={"token_digests": digests})


def _check_export(out: str) -> None:
    """Finds out at once whether there is an export that could be served; replicas then look at its files."""
    first: ExportError | None = None
    for candidate in candidates(out):
        try:
            ranking_parts(open_export(candidate.folder))
            return
        except ExportError as error:
            first = first or error
    assert first is not None, "there is a candidate, or an error"
    raise first


def _check_address(host: str, port: int) -> None:
    """Finds out at once whether an address can be listened on; Ray would tell later, and less."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error}. Name another.") from error


def _import_serving() -> Callable[..., AbstractContextManager[None]]:
    try:
        from embedshard.serve.deployment import serving
    except ImportError as error:
        raise ConfigError(
            f"embedshard serve needs Ray Serve, which cannot be imported here ({error}). Install it: "
            f"pip install 'embedshard[ray]'."
        ) from error
    return serving
