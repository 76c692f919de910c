"""Where requests go: the address that the user named, and nowhere else."""

from typing import NamedTuple
from urllib.parse import urlsplit

from policies.shown import shown

_EXAMPLE = "http://localhost:8000"


class Address(NamedTuple):
    """A server's base URL, which ends in its version (`/v1`)."""

    base: str

    def of(self, path: str) -> str:
        """The URL of one of its paths."""
        return f"{self.base}/{path}"


def address(url: str) -> Address:
    """The server that a URL names; `/v1` is added where the URL has no path.

    ValueError for what is no URL of http or https, and for one with a user's name, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown(url)} is no URL: {error}; write one such as {_EXAMPLE}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{shown(url)} is no URL of http or https; write one such as {_EXAMPLE}")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError(f"{shown(url)} has spaces or control characters; write a URL such as {_EXAMPLE}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds a user's name or a password; leave it out, and name a key with --api-key-env")
    if parts.query or parts.fragment:
        raise ValueError(f"{shown(url)} has a query or a fragment; end it with the server's path, such as /v1")
    path = parts.path.rstrip("/") or "/v1"
    for ending in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(ending)
    return Address(f"{parts.scheme}://{parts.netloc}{path}")
