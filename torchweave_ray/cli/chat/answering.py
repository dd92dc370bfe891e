"""Who answers in a chat: a server by its URL, or an engine in this process behind the same API.

Both take a body of /v1/chat/completions and give its chunks. Closing the iterator early, as a
Ctrl-C does, stops the answer where it is made.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import threading
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from torchweave_ray.client import StreamFailed, stream
from torchweave_ray.errors import ConfigError, TorchWeaveError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

    from torchweave_ray.config import EngineConfig

PATH = "/v1/chat/completions"
Chunk = dict[str, Any]


class ChatFailed(TorchWeaveError):
    """This answer could not be had; the next one may."""


class Answering(Protocol):
    model: str

    def chunks(self, body: dict[str, Any]) -> Generator[Chunk, None, None]:
        """Raises ChatFailed with what the server said."""
        ...

    def close(self) -> None: ...


class OverServer:
    """Raises ConfigError where no server answers."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"not the http:// or https:// address of a server: {url!r}")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = model or self._first_model()

    def chunks(self, body: dict[str, Any]) -> Generator[Chunk, None, None]:
        try:
            # Closed early, this generator lets go of the stream, which hangs up.
            for event in stream(self._url, PATH, body, headers=self._headers):
                if event.data and event.data != "[DONE]":
                    yield _chunk(event.data)
        except StreamFailed as error:
            reason = error.message.partition(": ")[2] if error.status else error.message
            raise ChatFailed(_message(reason) or error.message) from error

    def close(self) -> None:
        """Nothing is kept open."""

    def _first_model(self) -> str:
        url = urlsplit(self._url)
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=10)
        try:
            connection.request("GET", f"{url.path}/v1/models", headers=self._headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"no server at {self._url}: {error}") from error
        finally:
            connection.close()
        if response.status in (401, 403):
            raise ConfigError(f"{self._url} wants an API key: --api-key, or TORCHWEAVE_API_KEY")
        try:
            return str(json.loads(text)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self._url} lists no model: name one with --model") from error


class InProcess:
    """An engine and its API on a loop of their own thread; this one only waits for chunks."""

    def __init__(self, artifact: Path, config: EngineConfig) -> None:
        from torchweave_ray.batch.local import local_app

        self.model = artifact.name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._closing = ExitStack()
        self._closing.callback(self._stop)
        self._serving = local_app(artifact, config, self.model)
        try:
            self._app: ASGIApp = self._wait(self._serving.__aenter__())
        except BaseException:
            self._closing.close()
            raise
        self._closing.callback(lambda: self._wait(self._serving.__aexit__(None, None, None)))

    def chunks(self, body: dict[str, Any]) -> Generator[Chunk, None, None]:
        sent: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        call = asyncio.run_coroutine_threadsafe(
            self._call(json.dumps(body).encode(), sent), self._loop
        )
        status, text = 200, b""
        try:
            while (message := sent.get()) is not None:
                status = message.get("status", status)
                *blocks, text = (text + message.get("body", b"")).split(b"\n\n")
                for block in blocks if status == 200 else ():
                    for line in block.decode().split("\n"):
                        if line.startswith("data: ") and line != "data: [DONE]":
                            yield _chunk(line.removeprefix("data: "))
            if status != 200:
                raise ChatFailed(_message(text.decode()) or f"HTTP {status}")
        finally:
            call.cancel()

    def close(self) -> None:
        self._closing.close()

    async def _call(self, body: bytes, sent: queue.SimpleQueue[Message | None]) -> None:
        """Cancelled when its reader is gone, which aborts the request."""
        from torchweave_ray.batch.answering import scope_of

        asked: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if not asked:
                await asyncio.get_running_loop().create_future()
            return asked.pop()

        async def send(message: Message) -> None:
            sent.put(message)

        try:
            await self._app(scope_of(PATH, body), receive, send)
        finally:
            sent.put(None)

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _chunk(data: str) -> Chunk:
    chunk: Chunk = json.loads(data)
    if "error" in chunk:
        raise ChatFailed(_message(data) or data)
    return chunk


def _message(body: str) -> str:
    """Of an error of the API; "" where the body is none."""
    try:
        error = json.loads(body)["error"]
        return f"{error['message']}" + (f" ({error['param']})" if error.get("param") else "")
    except (ValueError, LookupError, TypeError):
        return ""
