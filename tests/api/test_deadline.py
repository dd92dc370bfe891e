"""x-deadline-ms and deadline_ms: on every endpoint that generates, 504 before, an event after."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.api.conftest import Api
from tests.api.test_disconnect import Client
from tests.fakes import Script
from torchweave_ray.deadline import Late
from torchweave_ray.outputs import FinishReason

USER = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "hi"},
    "/v1/generate_nobatch": {"prompt": "hi"},
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": USER},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/v1/embeddings": {"input": "hi"},
}
EVERYWHERE = pytest.mark.parametrize("path", BODIES)
STREAMS = ["/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"]
STREAMS += ["/v1/messages"]


@EVERYWHERE
@pytest.mark.parametrize("by", ["header", "body", "both"])
def test_it_reaches_the_engine(api: Api, path: str, by: str) -> None:
    header = {"header": 60_000, "both": 90_000}.get(by)
    body = BODIES[path] | ({} if by == "header" else {"deadline_ms": 60_000})
    before = time.monotonic()
    headers = {"x-deadline-ms": str(header)} if header else {}
    assert api.post(path, body, headers=headers).status_code == 200
    (request,) = api.backend.requests
    assert request.deadline is not None
    assert before + 60 <= request.deadline <= time.monotonic() + 60
    api.backend.requests.clear()
    api.post(path, BODIES[path])
    assert api.backend.requests[0].deadline is None


@EVERYWHERE
@pytest.mark.parametrize("value", [0, -1, 1.5, "100", True, 2**31])
def test_a_wrong_field_is_named(api: Api, path: str, value: object) -> None:
    response = api.post(path, BODIES[path] | {"deadline_ms": value})
    assert response.status_code == 400
    assert "deadline_ms" in response.json()["error"]["message"]
    assert api.backend.requests == []


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "soon", "99999999999", "1e3", "٣", "1 2"])
def test_a_wrong_header_is_named(api: Api, value: str) -> None:
    headers = {"x-deadline-ms": value.encode()}
    response = api.post("/v1/completions", {"prompt": "hi"}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-deadline-ms"
    assert api.backend.requests == []


@EVERYWHERE
@pytest.mark.parametrize("at", [0, 1])
def test_a_whole_answer_that_is_late_is_504(api: Api, path: str, at: int) -> None:
    """Though the backend says nothing; and the request is given up there."""
    if path == "/v1/generate" and at:
        pytest.skip("always a stream")
    api.backend.script = Script(gates={at: asyncio.Event()})
    if path == "/v1/embeddings":  # which asks for one output, that waits for no gate
        api.backend.generate = _never(api)  # type: ignore[method-assign]
    response = api.post(path, BODIES[path], headers={"x-deadline-ms": "250"})
    assert response.status_code == 504
    assert "the deadline passed" in response.text
    assert "x-request-id" in response.headers
    if path != "/v1/messages":
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    begun = [request.request_id for request in api.backend.requests]
    assert api.backend.aborted == begun  # on a loaded machine it may be late before it begins
    assert len(begun) <= 1


def _never(api: Api) -> Any:
    async def generate(request: Any) -> Any:
        api.backend.requests.append(request)
        try:
            await asyncio.Event().wait()
            yield
        finally:
            api.backend.aborted.append(request.request_id)

    return generate


def _streamed(path: str) -> dict[str, Any]:
    return BODIES[path] | ({} if path == "/v1/generate" else {"stream": True})


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_has_begun_ends_with_an_error_event(api: Api, path: str) -> None:
    api.backend.script = Script(gates={1: asyncio.Event()})
    response = api.post(path, _streamed(path) | {"deadline_ms": 500})
    assert response.status_code == 200
    assert "Gravity" in response.text
    assert "pulls" not in response.text
    last = [line for line in response.text.splitlines() if line.startswith("data: {")][-1]
    assert "the deadline passed" in json.dumps(json.loads(last[6:]))
    assert len(api.backend.aborted) == 1


@pytest.mark.parametrize("path", STREAMS)
def test_one_that_has_not_begun_is_a_real_504(api: Api, path: str) -> None:
    api.backend.script = Script(gates={0: asyncio.Event()})
    response = api.post(path, _streamed(path), headers={"x-deadline-ms": "250"})
    assert response.status_code == 504
    assert len(api.backend.aborted) == 1


@pytest.mark.parametrize("late", Late)
def test_the_engines_own_word_for_it_is_504_too(api: Api, late: Late) -> None:
    """As plain text: the bus carries no types."""
    api.backend.script = Script(error=str(late.value), finish_reason=FinishReason.ERROR)
    response = api.post("/v1/completions", {"prompt": "hi"})
    assert response.status_code == 504
    assert response.json()["error"]["message"] == late
    api.backend.script = Script(error="out of memory", finish_reason=FinishReason.ERROR)
    assert api.post("/v1/completions", {"prompt": "hi"}).status_code == 500


def test_several_prompts_have_one_deadline(api: Api) -> None:
    api.backend.script = Script(gates={1: asyncio.Event()})
    response = api.post("/v1/completions", {"prompt": ["a", "b", "c"], "deadline_ms": 40})
    assert response.status_code == 504
    assert len(api.backend.aborted) == 3


def test_a_client_that_leaves_before_the_deadline_only_leaves(api: Api) -> None:
    api.backend.script = Script(gates={1: asyncio.Event()})

    async def call() -> None:
        client = Client(api, "/v1/generate", {"prompt": "hi", "deadline_ms": 100})
        await client.on_send.wait()
        client.leave()
        await asyncio.wait_for(client.task, 5)
        assert "error" not in client.text
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in others if not task.done()]

    api.run(call())


class StuckClient(Client):
    """Takes no ping until it is told to."""

    stuck: asyncio.Event

    async def _send(self, message: Any) -> None:
        if message.get("body", b"").startswith(b": ping"):
            await self.stuck.wait()
        await super()._send(message)


def test_a_deadline_that_passes_while_a_ping_waits_for_its_reader(api: Api) -> None:
    api.configure(ping_interval_s=0.01)
    gate = asyncio.Event()
    api.backend.script = Script(gates={1: gate})

    async def call() -> None:
        StuckClient.stuck = asyncio.Event()
        client = StuckClient(api, "/v1/generate", {"prompt": "hi", "deadline_ms": 80})
        await asyncio.sleep(0.04)
        gate.set()
        await asyncio.sleep(0.1)
        StuckClient.stuck.set()
        await asyncio.wait_for(client.task, 5)
        assert client.text.count("event: error") == 1
        assert "event: done" not in client.text

    api.run(call())


def test_openapi_names_the_header(api: Api) -> None:
    document = api.get("/openapi.json").json()
    for path in BODIES:
        (parameter,) = document["paths"][path]["post"]["parameters"]
        assert (parameter["name"], parameter["in"]) == ("x-deadline-ms", "header")
