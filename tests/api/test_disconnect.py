"""A client that leaves aborts its request, streamed or not; silent streams are kept alive.

Drives the ASGI app by hand: httpx's transport hands a stream over only when it is whole.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.conftest import Api
from tests.fakes import Script
from torchweave_ray.errors import Overloaded, Unavailable

STREAMED = {"/v1/generate": {}, "/v1/completions": {"stream": True}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/generate", {"prompt": "hi"}),
    ("/v1/generate_nobatch", {"prompt": "hi"}),
    ("/v1/completions", {"prompt": "hi", "stream": True}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/completions", {"prompt": ["hi", "ho"], "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
]


class Client:
    """One HTTP call whose other end a test holds in its hands."""

    def __init__(self, api: Api, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.on_send = asyncio.Event()
        self._leave = asyncio.Event()
        self._body = [{"type": "http.request", "body": json.dumps(body).encode()}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [],
        }
        self.task = asyncio.ensure_future(api.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return self._body.pop()
        await self._leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.on_send.set()

    def leave(self) -> None:
        self._leave.set()

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


def check_nothing_is_left() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if not task.done()]


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("after_first_piece", [False, True])
def test_leaving_aborts_the_request(
    api: Api, path: str, body: dict[str, Any], after_first_piece: bool
) -> None:
    backend = api.backend
    backend.script = Script(gates={int(after_first_piece): asyncio.Event()})

    async def call() -> None:
        client = Client(api, path, body)
        await backend.on_request.wait()
        await asyncio.sleep(0.01)
        client.leave()
        await asyncio.wait_for(client.task, 5)
        assert len(backend.aborted) == len(backend.requests) >= 1
        assert not any("done" in str(m) or "[DONE]" in str(m) for m in client.sent)
        if after_first_piece and (body.get("stream") or path == "/v1/generate"):
            assert "Gravity" in client.text
        else:
            assert client.sent == []
        await asyncio.sleep(0)
        check_nothing_is_left()

    api.run(call())


def test_leaving_after_the_end_aborts_nothing(api: Api) -> None:
    async def call() -> None:
        client = Client(api, "/v1/generate", {"prompt": "hi"})
        await asyncio.wait_for(client.task, 5)
        client.leave()
        await asyncio.sleep(0)
        assert "event: done" in client.text
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        check_nothing_is_left()

    api.run(call())
    assert api.backend.aborted == []


def test_the_server_cancelling_a_call_aborts_it_and_stays_a_cancel(api: Api) -> None:
    backend = api.backend
    backend.script = Script(gates={1: asyncio.Event()})

    async def call() -> None:
        client = Client(api, "/v1/generate", {"prompt": "hi"})
        await client.on_send.wait()
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
        assert len(backend.aborted) == 1

    api.run(call())


def test_one_prompts_failure_aborts_the_others(api: Api) -> None:
    api.backend.script = Script(pieces=(), refusal=Overloaded("full"))
    response = api.post("/v1/completions", {"prompt": ["a", "b"]})
    assert response.status_code == 429
    assert len(api.backend.aborted) == len(api.backend.requests)


def test_pieces_arrive_one_by_one(api: Api) -> None:
    gates = {i: asyncio.Event() for i in range(4)}
    api.backend.script = Script(gates=gates)

    async def call() -> None:
        client = Client(api, "/v1/generate", {"prompt": "hi"})
        for i, piece in enumerate(["Gravity", " pulls", "."]):
            assert f"data: {piece}\n" not in client.text
            client.on_send.clear()
            gates[i].set()
            await asyncio.wait_for(client.on_send.wait(), 5)
            await asyncio.sleep(0)
            assert f"data: {piece}\n" in client.text
        gates[3].set()
        await client.task

    api.run(call())


@pytest.mark.parametrize("end", ["answer", "failure", "leave"])
def test_a_queued_stream_is_kept_alive(api: Api, end: str) -> None:
    gate = asyncio.Event()
    failure = Unavailable("lost") if end == "failure" else None
    api.configure(ping_interval_s=0.02)
    api.backend.script = Script(gates={0: gate}, refusal=None, failure=failure)

    async def call() -> None:
        client = Client(api, "/v1/completions", {"prompt": "hi", "stream": True})
        while client.text.count(": ping\n\n") < 2:
            client.on_send.clear()
            await asyncio.wait_for(client.on_send.wait(), 5)
        assert client.sent[0]["status"] == 200
        if end == "leave":
            client.leave()
        else:
            gate.set()
        await asyncio.wait_for(client.task, 5)
        assert [m["type"] for m in client.sent].count("http.response.start") == 1
        assert ("Gravity" in client.text) is (end != "leave")
        assert ('"error"' in client.text) is (end == "failure")
        check_nothing_is_left()

    api.run(call())
    assert len(api.backend.aborted) == (end != "answer")


def test_a_stream_that_talks_gets_no_ping(api: Api) -> None:
    api.configure(ping_interval_s=0.2)
    api.backend.script = Script(pieces=["x"] * 50)
    assert ": ping" not in api.post("/v1/generate", {"prompt": "hi"}).text
