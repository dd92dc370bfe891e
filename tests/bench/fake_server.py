"""A server of four routes with known answers, for the load generator's tests. Not a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class FakeServer:
    """Answers each prompt with `num_pieces` words (None: as many as it is asked for) and keeps
    what it was asked."""

    def __init__(self, num_pieces: int | None = 4, fail: bool = False, usage: bool = True) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.heads: list[str] = []
        self.max_at_once = 0
        self.num_connections = 0
        self._num_pieces = num_pieces
        self._fail = fail
        self._usage = usage
        self._at_once = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()[:2]
            yield f"http://{host}:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(size) or b"{}")
                path = head.split(" ")[1]
                self.heads.append(head)
                if path not in ("/v1/models", "/metrics"):
                    self.requests.append((path, body))
                self._at_once += path != "/metrics"
                self.max_at_once = max(self.max_at_once, self._at_once)
                await asyncio.sleep(0)
                if body:
                    await self.think(body)
                num_pieces = self._num_pieces or body.get("max_tokens", 1)
                await self._answer(path, writer, num_pieces)
                self._at_once -= path != "/metrics"
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def think(self, body: dict[str, Any]) -> None:
        """Before the first piece."""

    async def rest(self) -> None:
        """Before every piece."""

    async def _answer(self, path: str, writer: asyncio.StreamWriter, num_pieces: int) -> None:
        usage = {"prompt_tokens": 100, "completion_tokens": num_pieces, "cached_tokens": 16}
        if path == "/metrics":
            text = f"torchweave_requests_running {self._at_once}\ntorchweave_requests_waiting 0\n"
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(text))
            writer.write(text.encode())
        elif self._fail and path != "/v1/models":
            writer.write(_whole(400, {"error": {"message": "no such field", "param": "seed"}}))
        elif path == "/v1/models":
            writer.write(_whole(200, {"data": [{"id": "tiny"}]}))
        elif path == "/v1/generate_nobatch":
            writer.write(_whole(200, {"text": " word" * num_pieces, "usage": usage}))
        else:
            await self._stream(path, writer, usage, num_pieces)
        await writer.drain()

    async def _stream(
        self, path: str, writer: asyncio.StreamWriter, usage: dict[str, Any], num_pieces: int
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in self._events(path, usage if self._usage else None, num_pieces):
            await self.rest()
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    def _events(self, path: str, usage: dict[str, Any] | None, num_pieces: int) -> list[bytes]:
        if path == "/v1/generate":
            done = json.dumps({"finish_reason": "length", "usage": usage})
            pieces = [b"data:  word\n\n"] * num_pieces
            return [
                b"event: ttft\ndata: 0.1\n\n",
                *pieces,
                f"event: done\ndata: {done}\n\n".encode(),
            ]
        if path.endswith("/chat/completions"):
            first = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
            piece = {"choices": [{"index": 0, "delta": {"content": " word"}}], "usage": None}
        else:
            first, piece = [], {"choices": [{"index": 0, "text": " word"}]}
        chunks = [*first, *[piece] * num_pieces, {"choices": [], "usage": usage}]
        return [*(f"data: {json.dumps(c)}\n\n".encode() for c in chunks), b"data: [DONE]\n\n"]


def _whole(status: int, value: dict[str, Any]) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
