"""The app over a fake backend: in process through ASGI, or behind a real socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from tests.fakes import FakeBackend
from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.tokenizer import Tokenizer

T = TypeVar("T")
PLAIN = {"stream_keep_s": 0.0}
"""Events without ids: those are protocols/test_streams.py's."""
TEMPLATE = "{{ preface | default('') }}" + CHAT_TEMPLATE
TOKENIZER = Tokenizer(make_tokenizer(), {"chat_template": TEMPLATE})


async def load_tokenizer(model_id: str) -> Tokenizer:
    return TOKENIZER


class Api:
    """A fake backend, the app over it, and one event loop for both."""

    def __init__(self, runner: asyncio.Runner, backend: FakeBackend, settings: ApiSettings) -> None:
        self._runner = runner
        self.backend = backend
        self.app: Starlette = create_app(backend, load_tokenizer, settings)

    def configure(self, **settings: Any) -> None:
        self.app = create_app(self.backend, load_tokenizer, ApiSettings(**PLAIN | settings))

    def use_template(self, template: str, special_tokens: Sequence[str] = ()) -> None:
        backend = make_tokenizer()
        backend.add_special_tokens(list(special_tokens))
        tokenizer = Tokenizer(backend, {"chat_template": template})

        async def load(model_id: str) -> Tokenizer:
            return tokenizer

        self.app = create_app(self.backend, load, ApiSettings(**PLAIN))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **kwargs)

        return self.run(call())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **kwargs)

    def sent(self, path: str, body: Any) -> GenerateRequest:
        """The request that the backend got for this body."""
        self.backend.requests.clear()
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        (request,) = self.backend.requests
        return request


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def api(runner: asyncio.Runner) -> Api:
    return Api(runner, FakeBackend(), ApiSettings(**PLAIN))


class Server:
    """The app behind uvicorn on a free loopback port, in a thread of its own."""

    def __init__(self, log_level: str = "warning", **settings: Any) -> None:
        self.backend = FakeBackend()
        app = create_app(self.backend, load_tokenizer, ApiSettings(**settings))
        config = uvicorn.Config(app, port=0, log_level=log_level, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running_server: Server) -> Server:
    """With a fresh script and memory for each test."""
    running_server.backend.__init__()  # type: ignore[misc]
    return running_server
