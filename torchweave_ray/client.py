"""A streaming client that loses nothing: when its server is gone it goes on at another one.

Standard library only. Yields the events of any of the API's streams; knows no protocol.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from torchweave_ray.errors import TorchWeaveError

logger = logging.getLogger(__name__)

_BROKEN = (OSError, http.client.HTTPException)
_PAUSE_S = 0.2
_WORTH_ANOTHER = (500, 502, 503)
_MORE_TRIES = 2
"""Than there are servers, while nothing has come: behind one address there may be several."""


class StreamFailed(TorchWeaveError):
    """The server refused, or no server went on in time."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status
        """0: there was no answer."""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    id: str
    name: str
    data: str


def stream(
    urls: str | Sequence[str],
    path: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    patience_s: float = 30.0,
) -> Iterator[Event]:
    """Events of POST `path`; `body` asks for a stream. Raises StreamFailed.

    `urls` are servers of one application, tried in turn when one is lost. `timeout_s` is the
    longest silence of a live one, `patience_s` how long a lost stream is tried again. A request of
    which nothing has come yet is made anew, at each and twice more.
    """
    servers = [urls] if isinstance(urls, str) else list(urls)
    payload = json.dumps(body).encode()
    head = {"Content-Type": "application/json", **(headers or {})}
    ask = "POST", path, head, payload
    last_id, num_tries, lost_at = "", 0, time.monotonic()
    most_tries = len(servers) - 1 + _MORE_TRIES
    while True:
        server = servers[num_tries % len(servers)]
        try:
            for event in _events(server, ask, timeout_s):
                last_id, lost_at = event.id or last_id, 0.0
                yield event
            return
        except StreamFailed as error:
            is_full = bool(last_id) and error.status == 429  # its place is there in a while
            if not is_full and (
                error.status not in _WORTH_ANOTHER or (not last_id and num_tries >= most_tries)
            ):
                raise
            reason = error.message
        except _BROKEN as error:
            reason = f"{type(error).__name__}: {error}"
        now = time.monotonic()
        lost_at = lost_at or now
        # Without an id nothing has come: there is nothing to go on with but the request itself.
        if now - lost_at > patience_s or (not last_id and num_tries >= most_tries):
            raise StreamFailed(f"the stream was lost: {reason}")
        if last_id:
            ask = "POST", path, head | {"Last-Event-ID": last_id}, payload
        num_tries += 1
        logger.warning("[Stream] %s was lost (%s); going on", last_id[:32], reason)
        time.sleep(_PAUSE_S)


def _events(
    server: str, ask: tuple[str, str, Mapping[str, str], bytes], timeout_s: float
) -> Iterator[Event]:
    """Of one answer; raises an error of _BROKEN when it is cut off."""
    url = urlsplit(server)
    is_secure = url.scheme == "https"
    connect = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    connection = connect(url.hostname or "", url.port, timeout=timeout_s)
    method, path, headers, body = ask
    try:
        connection.request(method, url.path.rstrip("/") + path, body or None, dict(headers))
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode("utf-8", "replace")
            raise StreamFailed(f"HTTP {response.status}: {text[:500]}", response.status)
        rest = b""
        # Unlike readline, read1 tells the end of an answer from that of its connection.
        while chunk := response.read1(1 << 16):
            *blocks, rest = (rest + chunk).split(b"\n\n")
            yield from (_event(block.decode()) for block in blocks if not block.startswith(b":"))
    finally:
        connection.close()


def _event(block: str) -> Event:
    fields: dict[str, list[str]] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        fields.setdefault(name, []).append(value.removeprefix(" "))
    names, ids = fields.get("event", ["message"]), fields.get("id", [""])
    return Event(ids[-1], names[-1], "\n".join(fields.get("data", ())))
