"""What does not generate: tokens and prompts shown, a request stopped, the API described."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tests.api.conftest import TOKENIZER, Api
from tests.api.test_fields import MESSAGES, WEATHER, rendered
from tests.fakes import Script

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_tokenize_and_back(api: Api) -> None:
    text = "größe 😀 star"
    answer = api.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert len(answer["token_strs"]) == answer["count"]
    assert api.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    special = api.post("/detokenize", {"tokens": [1, 2], "skip_special_tokens": True})
    assert special.json() == {"prompt": ""}


def test_a_chat_is_shown_as_it_would_be_sent(api: Api) -> None:
    shown = api.post("/render", {"messages": MESSAGES, "max_tokens": 5, "user": "me"})
    assert shown.headers["x-ignored-params"] == "user"
    ids = shown.json()["tokens"]
    assert (
        tuple(ids) == rendered(MESSAGES) == api.sent(CHAT, {"messages": MESSAGES}).prompt_token_ids
    )
    assert shown.json()["prompt"] == TOKENIZER.decode(ids, False)
    assert api.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == ids
    with_tools = api.post("/render", {"messages": MESSAGES, "tools": [WEATHER]}).json()
    assert "get_weather" in with_tools["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/render", {"messages": []}, "messages"),
    ],
)
def test_bad_input(api: Api, path: str, body: Any, param: str) -> None:
    response = api.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_request_is_stopped_by_its_id(api: Api, stream: bool, prompts: int) -> None:
    async def run() -> tuple[httpx.Response, httpx.Response]:
        gate = asyncio.Event()
        api.backend.script = Script(pieces=["Gravity", " never"], gates={1: gate})
        transport = httpx.ASGITransport(api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": ["a"] * prompts, "stream": stream, "n": 2}
            asked = asyncio.create_task(client.post(COMPLETIONS, json=body))
            while len(api.backend.requests) < prompts:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            (call_id,) = {r.request_id.split("-")[1] for r in api.backend.requests}
            stopped = await client.delete(f"/v1/requests/cmpl-{call_id}")
            return stopped, await asked

    stopped, answer = api.run(run())
    assert stopped.json()["stopped"] is True
    assert answer.status_code == 200
    assert len(api.backend.aborted) == prompts
    if stream:
        events = [e.split("data: ", 1)[1] for e in answer.text.split("\n\n")[:-1]]
        assert events[-1] == "[DONE]"
        choices = [choice for e in events[:-1] for choice in json.loads(e)["choices"]]
        text = "".join(choice["text"] for choice in choices)
        assert text == "Gravity" * 2 * prompts
        reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
    else:
        reasons = [c["finish_reason"] for c in answer.json()["choices"]]
        num = len(TOKENIZER.encode("Gravity"))
        assert answer.json()["usage"]["completion_tokens"] == num * 2 * prompts
    assert reasons == ["abort"] * 2 * prompts
    gone = api.request("DELETE", "/v1/requests/cmpl-0")
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "request_id")


def test_a_finished_request_is_not_there_any_more(api: Api) -> None:
    answer = api.post(COMPLETIONS, {"prompt": "a"}).json()
    assert api.request("DELETE", f"/v1/requests/{answer['id']}").status_code == 404


def test_a_request_of_another_ingress_is_stopped_by_its_whole_id(api: Api) -> None:
    call_id = uuid.uuid4().hex
    api.backend.elsewhere.add(call_id)
    for path, status in (
        (f"chatcmpl-{call_id}", 200),
        (f"msg_{call_id}", 200),
        (f"chatcmpl-{uuid.uuid4().hex}", 404),
        (call_id[:31], 404),
        ("chatcmpl-", 404),
    ):
        assert api.request("DELETE", f"/v1/requests/{path}").status_code == status, path


def test_openapi_has_every_path_and_field(api: Api) -> None:
    document = api.get("/openapi.json").json()
    described = {
        (path, method.upper()) for path, methods in document["paths"].items() for method in methods
    }
    routed = {
        (re.sub(":path}", "}", route.path), method)
        for route in api.app.routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    pages = {"/openapi.json", "/docs", "/", "/playground/{name}"}
    assert routed - described == {(page, "GET") for page in pages}
    assert described <= routed
    schemas = document["components"]["schemas"]
    assert {"prompt", "echo", "best_of"} <= schemas["CompletionBody"]["properties"].keys()
    assert schemas["ChatBody"]["additionalProperties"] is False
    references = set(re.findall('"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= schemas.keys()


def test_the_page_needs_nothing_from_outside(api: Api) -> None:
    page = api.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "openapi.json" in page.text
    assert not re.search(r"(?:https?:)?//[a-z]", page.text)


def test_replicas_sleep_and_wake_up(api: Api) -> None:
    assert api.get("/is_sleeping").json() == {
        "is_sleeping": False,
        "models": {"tiny": {"replicas": 1, "sleeping": 0}},
    }
    assert api.post("/sleep").json()["is_sleeping"] is True
    assert api.get("/is_sleeping?model=tiny").json()["is_sleeping"] is True
    assert api.get("/health").json() == {"status": "ok", "asleep": ["tiny"]}
    assert api.get("/model").json()["asleep"] is True
    assert api.post("/wake_up").json()["models"] == {"tiny": {"replicas": 1, "sleeping": 0}}
    assert api.get("/health").json() == {"status": "ok"}
    answer = api.post("/sleep?model=other")
    assert answer.status_code == 404
    assert api.get("/sleep").status_code == 405
