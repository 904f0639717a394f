"""What stands before the routes: counts and times requests, asks for the token, refuses what is too large or too much."""

from __future__ import annotations

__all__ = ["Guard"]

import hashlib
import hmac
import json
import time
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedshard.serve.replica import Replica

ENDPOINTS: Final = {"/recommend", "/similar", "/score", "/healthz", "/metrics", "/reload", "/docs", "/openapi.json"}
"""Names under which requests are counted; the others are `other`."""
_OPEN: Final = {"/healthz", "/docs", "/openapi.json"}
"""No token is asked for: whether it serves, and how it is called."""
_ALWAYS: Final = {"/healthz", "/metrics"}
"""Answered however much there is to do."""
_CLIENT_GONE: Final = 499
"""Under which a request is counted whose client went away while its body was read; nginx's, HTTP has none."""


class Guard:
    """ASGI middleware. A body is read whole before the route is called, up to the limit.

    Args:
        app: what it guards.
        replica: whose limits, tokens and metrics they are.
    """

    def __init__(self, app: ASGIApp, replica: Replica) -> None:
        self._app, self._replica, self._settings, self._metrics = app, replica, replica.settings, replica.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        endpoint, status, began = path if path in ENDPOINTS else "other", 500, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._replica.pending += 1
        try:
            await self._answer(path, scope, receive, sending)
        except ClientDisconnect:
            status = _CLIENT_GONE
        finally:
            self._replica.pending -= 1
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - began)

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._settings
        is_let_in = not settings.token_digests or self._has_token(scope)
        if not is_let_in and path not in _OPEN:
            told = "no valid token. Send it as 'Authorization: Bearer TOKEN'."
            await _refuse(send, 401, told, [(b"www-authenticate", b"Bearer")])
            return
        if self._replica.is_ending and path not in _ALWAYS:
            await _refuse(send, 503, "the service ends, and takes no more requests.", [(b"connection", b"close")])
            return
        if self._replica.pending > settings.max_pending and path not in _ALWAYS:
            told = (
                f"{settings.max_pending:,} requests are being answered here, and no more are taken. Try again in a second."
            )
            await _refuse(send, 503, told, [(b"retry-after", b"1")])
            return
        body, size = [], 0
        announced = _header(scope, b"content-length")
        if announced.isdigit():
            size = int(announced)
        while size <= settings.max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body.append(message.get("body", b""))
            size = max(size, sum(map(len, body)))
            if not message.get("more_body", False):
                break
        if size > settings.max_body_bytes:
            told = f"the request has {size:,} bytes or more, and at most {settings.max_body_bytes:,} are taken. Split it."
            await _refuse(send, 413, told, [(b"connection", b"close")])
            return
        await self._app({**scope, "is_let_in": is_let_in}, _replay(b"".join(body), receive), send)

    def _has_token(self, scope: Scope) -> bool:
        """Returns whether a request has one of the tokens; takes as long whichever it has."""
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        digest = hashlib.sha256(given.strip()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self._settings.token_digests]
        return any(matches) and scheme.lower() == b"bearer"


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns what gives a body that was read, and then whatever comes."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, status: int, told: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"error": told}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
