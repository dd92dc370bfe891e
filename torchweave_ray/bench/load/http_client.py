"""The load generator's HTTP/1.1 client: one keep-alive connection, every chunk stamped on arrival.

It shares the machine with the server that it measures, so it only stores bytes while the clock
runs; httpx would cost five times as much CPU a chunk (docs/performance.md). Knows nothing of what
the bytes mean.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from torchweave_ray.errors import TorchWeaveError


class HTTPFailure(TorchWeaveError):
    """No usable answer: refused, cut off, or not HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer. Times are `time.perf_counter()` seconds."""

    status: int
    sent_at: float
    chunks: tuple[tuple[float, bytes], ...]
    """(arrival, payload) of the body, transfer encoding removed."""
    ended_at: float
    headers: Mapping[str, str] = field(default_factory=dict)
    """By lower-case name."""

    @property
    def body(self) -> bytes:
        return b"".join(payload for _, payload in self.chunks)


class ResponseParser:
    """One response, fed as it arrives; the body is chunked, has a length, or ends the stream."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[tuple[float, bytes]] = []
        self.keep_alive = True
        self._buffer = bytearray()
        self._chunked = False
        self._remaining: int | None = None
        """Body bytes still to come; None: until the stream ends."""

    def feed(self, data: bytes, now: float) -> bool:
        """True once the response is complete. Raises HTTPFailure on what is not HTTP."""
        self._buffer += data
        if not self.status and not self._read_head():
            return False
        if self._chunked:
            return self._read_chunks(now)
        if self._buffer:
            self.chunks.append((now, bytes(self._buffer)))
            if self._remaining is not None:
                self._remaining -= len(self._buffer)
            self._buffer.clear()
        return self._remaining is not None and self._remaining <= 0

    def feed_eof(self) -> bool:
        """True if the end of the stream completes the response."""
        return bool(self.status) and not self._chunked and self._remaining is None

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise HTTPFailure(f"not an HTTP/1 answer: {lines[0][:80]!r}")
        headers = {
            k.strip().lower(): v.strip() for k, _, v in (n.partition(":") for n in lines[1:])
        }
        if rest[0] == "1":  # 100 Continue and its like: the real head follows
            return self._read_head()
        self.status = int(rest[:3])
        self.headers = headers
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self.keep_alive = headers.get("connection", "").lower() != "close"
        if "content-length" in headers:
            self._remaining = int(headers["content-length"])
        return True

    def _read_chunks(self, now: float) -> bool:
        while True:
            end = self._buffer.find(b"\r\n")
            if end < 0:
                return False
            size = int(bytes(self._buffer[:end]).split(b";")[0], 16)
            if len(self._buffer) < end + size + 4:
                return False
            if size == 0:
                return True
            self.chunks.append((now, bytes(self._buffer[end + 2 : end + 2 + size])))
            del self._buffer[: end + size + 4]


class _Receiver(asyncio.Protocol):
    """Feeds the parser of the exchange under way and wakes its waiter."""

    def __init__(self) -> None:
        self.parser = ResponseParser()
        self.done: asyncio.Future[float] | None = None
        self.closed = False

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            if self.parser.feed(data, now):
                self._finish(now)
        except (HTTPFailure, ValueError) as error:
            self._fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.parser.feed_eof():
            self._finish(time.perf_counter())
        else:
            self._fail(f"the server closed the connection ({exc or 'end of stream'})")

    def _finish(self, now: float) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(now)

    def _fail(self, reason: str) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(HTTPFailure(reason))


class Connection:
    """One client of the closed loop: requests one after the other, reconnecting when it must."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._url: SplitResult = urlsplit(url)
        self._host = self._url.hostname or ""
        if self._url.scheme not in ("http", "https") or not self._host:
            raise HTTPFailure(f"not an http:// or https:// address: {url!r}")
        self._transport: asyncio.Transport | None = None
        self._receiver = _Receiver()

    async def request(self, method: str, path: str, body: bytes = b"") -> Exchange:
        """Send and wait for the whole answer. `path` is absolute on the host."""
        transport = await self._connect()
        receiver = self._receiver
        receiver.parser = ResponseParser()
        receiver.done = asyncio.get_running_loop().create_future()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{self._headers}\r\n"
        )
        sent_at = time.perf_counter()
        transport.write(head.encode("latin-1") + body)
        try:
            ended_at = await receiver.done
        except BaseException:
            self.close()
            raise
        parser = receiver.parser
        if not parser.keep_alive:
            self.close()
        chunks = tuple(parser.chunks)
        return Exchange(parser.status, sent_at, chunks, ended_at, parser.headers)

    @property
    def num_chunks(self) -> int:
        """Pieces of the answer under way that have arrived."""
        return len(self._receiver.parser.chunks)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    async def _connect(self) -> asyncio.Transport:
        if self._transport is not None and not self._receiver.closed:
            return self._transport
        secure = self._url.scheme == "https"
        port = self._url.port or (443 if secure else 80)
        context = ssl.create_default_context() if secure else None
        loop = asyncio.get_running_loop()
        try:
            self._transport, self._receiver = await loop.create_connection(
                _Receiver, self._host, port, ssl=context
            )
        except OSError as error:
            raise HTTPFailure(f"cannot connect to {self._url.netloc}: {error}") from error
        return self._transport
