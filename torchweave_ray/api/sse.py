"""Server-sent events: framing of text, and the ASGI answer that streams them.

`EventStream` knows nothing of tokens: a `Writer` turns outputs into bytes.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Protocol

from starlette.types import Receive, Scope, Send

from torchweave_ray.api.endpoint import Call
from torchweave_ray.api.errors import INTERNAL_ERROR
from torchweave_ray.api.streams.resume import numbered
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import RequestOutput

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
_MOVED = b": goes on under numerics %s, its text may differ from here on\n\n"
"""A comment: no client takes it for text."""
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_SEPARATORS = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""What clients that split with str.splitlines take for a line's end, besides the line feed."""

Outputs = AsyncIterator[tuple[int, RequestOutput]]
"""(index of the prompt, news of it)"""


def data_event(text: str) -> str:
    """One event whose data is exactly `text`; what no data line can hold goes as JSON."""
    if _SEPARATORS.search(text):
        return f'event: json\ndata: {{"text":{encode_basestring_ascii(text)}}}\n\n'
    return "data: " + text.replace("\n", "\ndata: ") + "\n\n"


def json_string(text: str) -> str:
    """`text` as a JSON string on one line, readable unless it holds a separator."""
    if _SEPARATORS.search(text):
        return encode_basestring_ascii(text)
    return encode_basestring(text)


class Writer(Protocol):
    """The bytes of one stream, in its protocol's shape."""

    def output(self, prompt_index: int, output: RequestOutput) -> bytes:
        """b"" when this output shows nothing."""
        ...

    def end(self) -> bytes: ...

    def error(self, error: RequestError) -> bytes:
        """The last event of a stream that failed after it had begun."""
        ...


class EventStream:
    """An ASGI answer that begins with the first event, so that a refusal keeps its HTTP status.

    A stream silent for `ping_interval_s` begins anyway, with a comment; from then on a failure is
    an event. One timer serves the whole stream: a token costs no task.
    """

    def __init__(
        self,
        call: Call,
        outputs: Outputs,
        writer: Writer,
        ping_interval_s: float,
    ) -> None:
        self._call = call
        self._outputs = outputs
        self._writer = numbered(call, writer)
        self._ping_interval_s = ping_interval_s
        own = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in call.headers.items()
        ]
        self._headers = [*_HEADERS, *own]
        self._has_begun = False
        self._last_sent = 0.0
        self._ping: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        self._send = send
        self._timer = loop.call_later(self._ping_interval_s, self._on_timer)
        try:
            await self._run()
        finally:
            self._timer.cancel()
            if self._ping is not None and not self._ping.cancel():
                self._ping.exception()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self) -> None:
        try:
            async with self._call.in_time():
                async for prompt_index, output in self._outputs:
                    if output.numerics_id:
                        await self._write(_MOVED % output.numerics_id.encode())
                    if chunk := self._writer.output(prompt_index, output):
                        await self._write(chunk)
            await self._write(self._writer.end())
        except RequestError as error:
            if not self._has_begun:
                raise
            await self._write(self._writer.error(error))
        except Exception:
            if not self._has_begun:
                raise
            logger.exception("x-request-id %s failed in its stream", self._call.request_id)
            await self._write(self._writer.error(RequestError(INTERNAL_ERROR)))

    async def _write(self, chunk: bytes) -> None:
        if self._ping is not None:
            try:
                await self._ping
            finally:  # a deadline that passes here must not meet it again
                self._ping = None
        self._last_sent = asyncio.get_running_loop().time()
        await self._begin()
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": self._headers}
            )

    def _on_timer(self) -> None:
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._last_sent
        wait = self._ping_interval_s - silent
        if wait <= 0 and (self._ping is None or self._ping.done()):
            self._ping = loop.create_task(self._send_ping())
        self._timer = loop.call_later(wait if wait > 0 else self._ping_interval_s, self._on_timer)

    async def _send_ping(self) -> None:
        await self._begin()
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})
