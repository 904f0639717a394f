"""Whether code may be sent to a Ray dashboard: asked before anything is, without Ray.

Whoever reaches the jobs API of a dashboard that asks for no token runs code on the cluster. So an open one is refused,
unless it is on this machine's loopback, where it may be the end of a port-forward.
"""

from __future__ import annotations

__all__ = ["Token", "check_dashboard", "find_token", "is_loopback"]

import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import requests

from embedshard.errors import ConfigError

_TIMEOUT_S: Final = 30.0
_READ: Final = "cluster/README.md, 'Tokens'"


@dataclass(frozen=True)
class Token:
    """A token for a cluster.

    Attributes:
        text: the secret itself.
        origin: where it was found.
    """

    text: str
    origin: str

    def __repr__(self) -> str:
        return f"Token(of {self.origin})"


def find_token(environment: Mapping[str, str]) -> Token | None:
    """Returns the token that Ray's own client would send, from where it looks, in its order.

    Raises:
        ConfigError: if RAY_AUTH_TOKEN_PATH names no file that can be read.
    """
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(text, "RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    if named is None and not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path} cannot be read: {error.strerror}. See {_READ}.") from error
    return Token(text, str(path)) if text else None


def is_loopback(url: str) -> bool:
    """Returns whether all addresses of a URL's host are this machine's loopback.

    Raises:
        ConfigError: if the host has no address.
    """
    host = urlsplit(url).hostname or ""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"--address {url}: the host '{host}' has no address ({error}).") from error
    addresses = [ipaddress.ip_address(text) for text in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def check_dashboard(url: str, token: Token | None, *, anyone_may_run_code: bool, say: Callable[[str], None]) -> Token | None:
    """Returns the token to send: None to a dashboard that asks for none.

    Args:
        url: `http://HOST:PORT`, or https.
        token: what there is to send. It is sent only if one is asked for.
        anyone_may_run_code: accepts an open dashboard anywhere.
        say: is told what is allowed but should be known.

    Raises:
        ConfigError: if no dashboard answers, the token is missing or wrong, or none is asked for.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(
            f"--address {url}: it must be the dashboard's URL, such as http://127.0.0.1:8265. (The address of drivers, "
            f"IP:6379, is another.)"
        )
    here = is_loopback(url)
    if _ask(url, None) == requests.codes.ok:
        if not here and not anyone_may_run_code:
            raise ConfigError(
                f"{url} is open: it asks for no token and is not on this machine's loopback, so everybody who reaches it "
                f"can run code on that cluster, and may have done so. Start the cluster with RAY_AUTH_MODE=token ({_READ}), "
                f"or bind its dashboard to loopback and come by 'ray dashboard', 'kubectl port-forward' or 'ssh -L'. To "
                f"send the job all the same: --anyone-may-run-code."
            )
        who = "everybody who reaches it" if not here else "every user of this machine, and who else reaches the cluster,"
        say(f"Note: {url} asks for no token: {who} can run code on that cluster. See {_READ}.")
        return None
    if token is None:
        raise ConfigError(
            f"{url} asks for a token (401) and there is none here: neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH is set, "
            f"nor is there a ~/.ray/auth_token. Take the cluster's into a file of mode 0600 and export "
            f"RAY_AUTH_TOKEN_PATH=FILE. Where each kind of cluster keeps it: {_READ}."
        )
    if not here and urlsplit(url).scheme == "http":
        say(f"Note: the token goes to {url} unencrypted. On a network that is not yours, use a port-forward or https.")
    if _ask(url, token) != requests.codes.ok:
        raise ConfigError(
            f"{url} refuses the token (403) of {token.origin}: it is another cluster's, or this cluster was started anew "
            f"with another. Take the present one. Where each kind of cluster keeps it: {_READ}."
        )
    return token


def _ask(url: str, token: Token | None) -> int:
    """Returns 200, 401 or 403.

    Raises:
        ConfigError: if something else answers, or nothing.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token.text}"}
    try:
        answer = requests.get(f"{url}/api/version", headers=headers, timeout=_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        raise ConfigError(
            f"--address {url}: nothing answers there ({type(error).__name__}). Is the cluster up, and the port-forward? Try "
            f"'python cluster/local.py status', 'ray dashboard cluster/aws.yaml', or 'kubectl port-forward'."
        ) from error
    allowed = (requests.codes.unauthorized,) if token is None else (requests.codes.forbidden,)
    is_ray = answer.status_code in allowed or (answer.ok and "ray_version" in answer.text)
    if not is_ray:
        raise ConfigError(
            f"--address {url}: what answers there (HTTP {answer.status_code}) is not the dashboard of a Ray cluster of 2.52 "
            f"or newer. Give the dashboard's address; its port is 8265 where nobody changed it."
        )
    return int(answer.status_code)
