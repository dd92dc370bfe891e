"""Who answers a batch's requests: an ASGI app in this process, or a server by its URL.

Both take a body exactly as HTTP would. Knows nothing of files.
"""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from torchweave_ray.batch.lines import Answer, BatchRequest
from torchweave_ray.errors import ConfigError, TorchWeaveError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

Ask = Callable[[BatchRequest], Awaitable[Answer]]
MAX_TRIES = 12
MAX_WAIT_S = 30.0
TIMEOUT_S = 3600.0
"""Of a request that a server is computing."""


class NoServer(TorchWeaveError):
    """It cannot be reached: the run stops, and another one goes on from there."""


def of_app(app: ASGIApp) -> Ask:
    async def ask(request: BatchRequest) -> Answer:
        sent: list[Message] = []
        body: list[Message] = [{"type": "http.request", "body": request.body}]

        async def receive() -> Message:
            if not body:
                await asyncio.get_running_loop().create_future()  # the client stays
            return body.pop()

        async def send(message: Message) -> None:
            sent.append(dict(message))

        await app(scope_of(request.url, request.body), receive, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        whole = b"".join(message.get("body", b"") for message in sent[1:])
        return _answer(sent[0]["status"], headers, whole)

    return ask


def of_server(url: str, concurrency: int) -> Ask:
    """A connection a request; `concurrency` of them at once. Raises ConfigError for a bad URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"not the URL of a server: {url}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host, port, prefix = parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
    pool = ThreadPoolExecutor(concurrency, "batch")

    def post(request: BatchRequest) -> Answer:
        connection = kind(host, port, timeout=TIMEOUT_S)
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", prefix + request.url, request.body, headers)
            response = connection.getresponse()
            got = {name.lower(): value for name, value in response.getheaders()}
            return _answer(response.status, got, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise NoServer(f"{url} does not answer: {error}") from error
        finally:
            connection.close()

    async def ask(request: BatchRequest) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(pool, post, request)

    return ask


async def insist(ask: Ask, request: BatchRequest) -> Answer:
    """Again while the answer is "not now" (429, 503), or nobody answers."""
    for attempt in range(1, MAX_TRIES + 1):
        wait_s = min(0.5 * 2**attempt, MAX_WAIT_S)
        try:
            answer = await ask(request)
        except NoServer:
            if attempt == MAX_TRIES // 2:
                raise
        else:
            if answer.status not in (429, 503) or attempt == MAX_TRIES:
                return answer
            if answer.retry_after is not None:
                wait_s = min(answer.retry_after, MAX_WAIT_S)
        await asyncio.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def scope_of(path: str, body: bytes) -> dict[str, object]:
    """Of a POST, as ASGI says it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": ("local", 80),
    }


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    wait = headers.get("retry-after", "")
    retry_after = float(wait) if wait.replace(".", "", 1).isdecimal() else None
    return Answer(status, headers.get("x-request-id", ""), body, retry_after)
