"""An ingress's gate: what is open is counted and finished, what comes too late is told so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.middleware import Middleware

from deployments.drain.gate import Gate, GatedApp
from deployments.ingress import SaidByServe
from tests.fakes import FakeBackend, Script
from torchweave_ray.api.app import create_app
from torchweave_ray.errors import Unavailable
from torchweave_ray.outputs import GenerateRequest, RequestOutput
from torchweave_ray.tokenizer import Tokenizer


def test_open_streams_end_and_late_requests_are_refused() -> None:
    async def body() -> None:
        gate, second = Gate(), asyncio.Event()
        backend = FakeBackend(Script(gates={1: second}))

        async def load(model: str) -> Tokenizer:
            return backend.tokenizer

        app = create_app(backend, load)
        app.user_middleware.append(Middleware(GatedApp, gate=gate))
        transport = httpx.ASGITransport(app)
        wanted = {"prompt": "hi", "max_tokens": 5}
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
            open_one = asyncio.create_task(client.post("/v1/completions", json=wanted))
            await backend.on_request.wait()
            assert gate.num_open == 1
            gate.is_closed = True
            for call in (
                client.post("/v1/completions", json=wanted),
                client.post("/v1/generate", json=wanted),
                client.get("/v1/models"),
            ):
                late = await call
                assert (late.status_code, late.headers["connection"]) == (503, "close")
                assert late.json()["error"]["code"] == "draining"
                assert int(late.headers["retry-after"]) >= 1
                assert late.headers["x-request-id"]
            assert (await client.get("/livez")).status_code == 200
            assert gate.num_open == 1
            second.set()
            answer = await open_one
            assert answer.json()["choices"][0]["text"] == "Gravity pulls."
            assert answer.headers["connection"] == "close"
            assert gate.num_open == 0

    asyncio.run(asyncio.wait_for(body(), 10))


def test_python_calls_pass_it_too() -> None:
    gate = Gate()
    with gate.passing():
        assert gate.num_open == 1
        gate.is_closed = True
    assert gate.num_open == 0
    with pytest.raises(Unavailable, match="shutting down"), gate.passing():
        raise AssertionError("nothing passes a closed gate")


class Moved(FakeBackend):
    """Its streams go on under other numerics after their first output."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        outputs = super().generate(request)
        yield await anext(outputs)
        yield RequestOutput(request.request_id, numerics_id="numerics-2")
        async for output in outputs:
            yield output


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/generate"])
def test_a_stream_says_that_its_numerics_have_changed(path: str) -> None:
    body_of: dict[str, dict[str, Any]] = {"/v1/completions": {"stream": True}, "/v1/generate": {}}

    async def body() -> None:
        backend = Moved()

        async def load(model: str) -> Tokenizer:
            return backend.tokenizer

        transport = httpx.ASGITransport(create_app(backend, load))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
            answer = await client.post(path, json={"prompt": "hi"} | body_of[path])
        lines = answer.text.splitlines()
        (said,) = (i for i, line in enumerate(lines) if line.startswith(":"))
        assert (
            lines[said] == ": goes on under numerics numerics-2, its text may differ from here on"
        )
        assert "Gravity" in "".join(lines[:said])
        assert "pulls" in "".join(lines[said:])

    asyncio.run(asyncio.wait_for(body(), 10))


@pytest.mark.parametrize(("given", "num_ids"), [("", 1), ("mine-1", 1), ("not one of ours", 2)])
def test_serve_and_we_say_one_request_id(given: str, num_ids: int) -> None:
    """Clients join headers of one name; an id that we would not log is answered beside ours."""

    async def body() -> None:
        backend = FakeBackend()

        async def load(model: str) -> Tokenizer:
            return backend.tokenizer

        app = create_app(backend, load)
        app.user_middleware.insert(0, Middleware(SaidByServe))
        transport = httpx.ASGITransport(RequestIdMiddleware(app))
        headers = {"x-request-id": given} if given else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
            for path in ("/v1/models", "/nowhere"):
                said = (await client.get(path, headers=headers)).headers.get_list("x-request-id")
                assert len(said) == num_ids
                assert not given or given in said

    asyncio.run(asyncio.wait_for(body(), 10))
