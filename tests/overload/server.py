"""The HTTP API over a real engine on EchoRunner, behind uvicorn on a loopback port. No test."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import uvicorn

from tests.echo import EOS, EchoRunner, LetterDetokenizer
from tests.fakes import MODEL
from tests.tiny import make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import PendingStep, RuntimeLimits, StepPlan
from torchweave_ray.tokenizer import Tokenizer

LIMITS = RuntimeLimits(1024, 16, 8192, MODEL.vocab_size, (EOS,))


@dataclass
class PacedRunner(EchoRunner):
    """A step takes so long: what runs is still running when a test looks."""

    step_s: float = 0.001

    def submit(self, plan: StepPlan) -> PendingStep:
        time.sleep(self.step_s)
        return super().submit(plan)


class Server:
    def __init__(self, **scheduler: Any) -> None:
        self.runner = PacedRunner(LIMITS)
        engine = Engine(
            self.runner,
            LetterDetokenizer(),
            CacheConfig(),
            SchedulerConfig(**scheduler),
            MODEL.artifact_id,
        )
        self.engine = AsyncEngine(engine, replace(MODEL, max_model_len=LIMITS.max_model_len))
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(20)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    def is_idle(self) -> bool:
        """Nothing runs, waits or holds a block, and the prefix cache counts as free."""
        stats = self.engine.snapshot()
        idle = stats.num_running == stats.num_waiting == stats.num_waiting_tokens == 0
        return idle and stats.num_free_blocks == stats.num_blocks

    async def _run(self) -> None:
        tokenizer = Tokenizer(make_tokenizer(), {})

        async def load(model_id: str) -> Tokenizer:
            return tokenizer

        self.engine.start()
        app = create_app(self.engine, load, ApiSettings())
        config = uvicorn.Config(app, log_level="error", lifespan="off", backlog=2048)
        self._server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        # Of every connection: a reader that stands still is felt after this, not after megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        self.port: int = listener.getsockname()[1]
        self._started.set()
        await serving
        self.engine.close()


@contextmanager
def running_server(**scheduler: Any) -> Iterator[Server]:
    server = Server(**scheduler)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, f"not within {timeout_s} s"
        time.sleep(0.005)


def request_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


def reset(client: socket.socket) -> None:
    """Hang up at once, as a process that dies does, with no farewell."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@contextmanager
def idle_connections(port: int, num: int, request: bytes) -> Iterator[None]:
    """Open meanwhile; half of them have begun the request. Skips where files are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * num:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * num), hard))
    try:
        with ExitStack() as stack:
            for index in range(num):
                client = stack.enter_context(connect(port))
                if index % 2:
                    client.sendall(request[: 20 + index % 60])
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def send_zeros(client: socket.socket, path: str, size: int, is_announced: bool) -> None:
    """A body of so many bytes, by Content-Length or in chunks."""
    piece = b"0" * 65536
    how = f"Content-Length: {size}" if is_announced else "Transfer-Encoding: chunked"
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: test\r\n{how}\r\n\r\n".encode())
    for _ in range(size // len(piece)):
        client.sendall(piece if is_announced else b"10000\r\n" + piece + b"\r\n")
    if not is_announced:
        client.sendall(b"0\r\n\r\n")


def read_response(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a response with a Content-Length."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += _some(client)
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += _some(client)
    return int(first.split()[1]), headers, body


def _some(client: socket.socket) -> bytes:
    data = client.recv(65536)
    assert data, "the server hung up"
    return data
