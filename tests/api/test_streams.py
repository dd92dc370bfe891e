"""A stream opened again at every event: the same bytes go on, in every dialect, at any ingress."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import pytest

from tests.api.conftest import TEMPLATE
from tests.api.test_fields import MESSAGES, WEATHER
from tests.fakes import FakeBackend, Script
from tests.tiny import make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.api.streams.records import StreamRecords
from torchweave_ray.outputs import GenerateRequest, RequestOutput, merge_outputs
from torchweave_ray.tokenizer import Tokenizer

PIECES = ("Gra", "vity", "\n\n", "pulls", " 😀", "", " us.")
CALL = ("Well", ' <tool_call>\n{"name": "get_', 'weather", "argu', 'ments": {"city": "Pa', 'ris"}}')
CALLS = (*CALL, "\n</tool_call>", '\n<tool_call>{"name":"get_weather","arguments":{}}</tool_call>')
MARKERS = "{# <tool_call></tool_call><think></think> #}{% if tools %}{{ tools }}{% endif %}"
THOUGHT = ("<thi", "nk>so it ", "must</th", "ink>\n\nYes", ", it", " does.")
LOGPROBS = {"logprobs": True, "top_logprobs": 1}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGE, NATIVE = "/v1/responses", "/v1/messages", "/v1/generate"
TWICE = {"prompt": ["abc", "de"], "n": 2}
ANTHROPIC_TOOL = {"name": "get_weather", "input_schema": {"type": "object"}}
OPENAI_TOOL = {"type": "function", **WEATHER["function"]}

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (NATIVE, {"prompt": "abc"}, PIECES),
    (NATIVE, {"prompt": "abc", "structured_outputs": {"choice": ["x", "y"]}}, PIECES),
    (COMPLETIONS, {"prompt": "abc"}, PIECES),
    (COMPLETIONS, {"prompt": "abc", "stream_interval": 4}, PIECES),
    (COMPLETIONS, TWICE | {"logprobs": 1, "stream_options": {"include_usage": True}}, PIECES),
    (COMPLETIONS, TWICE | {"echo": True, "logprobs": 1, "return_token_ids": True}, PIECES),
    (COMPLETIONS, {"prompt": "abc", "echo": True, "max_tokens": 0}, PIECES),
    (CHAT, {"messages": MESSAGES, "stop": "x"}, PIECES),
    (CHAT, {"messages": MESSAGES, "n": 3, **USAGE, **LOGPROBS}, PIECES),
    (CHAT, {"messages": MESSAGES, "n": 2, "tools": [WEATHER]}, CALLS),
    (CHAT, {"messages": MESSAGES}, THOUGHT),
    (RESPONSES, {"input": "abc"}, PIECES),
    (RESPONSES, {"input": "abc", "tools": [OPENAI_TOOL]}, THOUGHT + CALLS),
    (MESSAGE, {"messages": MESSAGES, "max_tokens": 99}, PIECES),
    (
        MESSAGE,
        {"messages": MESSAGES, "max_tokens": 99, "tools": [ANTHROPIC_TOOL]},
        THOUGHT + CALLS,
    ),
]
_TTFT = re.compile(rb"event: ttft\ndata: [\d.]+")


class Cluster(FakeBackend):
    """Replicas that keep records, and as many ingresses as there are calls."""

    def __init__(self, pieces: Sequence[str], runner: asyncio.Runner) -> None:
        super().__init__(Script(pieces=pieces))
        self.records = StreamRecords()
        self.merged = 1
        """Outputs of the engine that reach an ingress as one: what a slow reader gets."""
        self.stopped: list[str] = []
        self._runner = runner
        self._ingresses: dict[str, httpx.ASGITransport] = {}
        template = TEMPLATE if pieces is PIECES else TEMPLATE + MARKERS
        self.tokenizer = Tokenizer(make_tokenizer(), {"chat_template": template})

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        with self.records.keep(request):
            held: list[RequestOutput] = []
            async for output in super().generate(request):
                held.append(output)
                if len(held) == self.merged or output.is_last:
                    yield merge_outputs(held)
                    held.clear()

    async def stop(self, call_id: str) -> bool:
        self.stopped.append(call_id)
        return False

    async def recall(self, call_id: str) -> list[GenerateRequest]:
        return self.records.recall(call_id)

    async def load(self, model_id: str) -> Tokenizer:
        return self.tokenizer

    def ingress(self, **settings: Any) -> httpx.ASGITransport:
        app = create_app(self, self.load, ApiSettings(**settings), recall=self.recall)
        return httpx.ASGITransport(app)

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """One ingress opens streams, another one goes on with them."""
        ingress = self._ingresses.get(method) or self.ingress()
        self._ingresses[method] = ingress
        return self._runner.run(ask(ingress, method, path, **kwargs))

    def open(self, path: str, body: dict[str, Any]) -> bytes:
        response = self.call("POST", path, json=body | ({} if path == NATIVE else {"stream": True}))
        assert response.status_code == 200, response.text
        return response.content

    def resume(self, event_id: str, **kwargs: Any) -> httpx.Response:
        headers = {"Last-Event-ID": event_id}
        return self.call("GET", f"/v1/streams/{event_id[:32]}", headers=headers, **kwargs)


async def ask(
    ingress: httpx.ASGITransport, method: str, path: str, **kwargs: Any
) -> httpx.Response:
    request = httpx.Request(method, f"http://test{path}", **kwargs)
    response = await ingress.handle_async_request(request)
    await response.aread()
    return response


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def events_of(body: bytes) -> list[tuple[str, bytes]]:
    """(id, event) of each."""
    events = []
    for block in body.split(b"\n\n")[:-1]:
        head, _, rest = block.partition(b"\n")
        assert head.startswith(b"id: "), block
        events.append((head[4:].decode(), _TTFT.sub(b"event: ttft", rest)))
    return events


@pytest.mark.parametrize("merged", [1, 3])
@pytest.mark.parametrize(("path", "body", "pieces"), CASES)
def test_exactly_what_comes_after_each_event(
    runner: asyncio.Runner, path: str, body: dict[str, Any], pieces: tuple[str, ...], merged: int
) -> None:
    cluster = Cluster(pieces, runner)
    cluster.merged = merged
    whole = events_of(cluster.open(path, body))
    assert len(whole) >= 3
    assert [int(event_id.split(":")[1]) for event_id, _ in whole] == [*range(1, len(whole) + 1)]
    again = cluster.call("GET", f"/v1/streams/{whole[0][0][:32]}")
    assert events_of(again.content) == whole
    assert again.headers["x-stream-id"] == whole[0][0][:32]
    for had, (event_id, _) in enumerate(whole, 1):
        resumed = cluster.resume(event_id)
        assert resumed.status_code == 200, (event_id, resumed.text)
        assert events_of(resumed.content) == whole[had:], event_id


def said(path: str, events: Sequence[tuple[str, bytes]]) -> Any:
    """What the events of a stream come to, however it was cut into them."""
    texts: dict[Any, str] = {}
    rest = []
    for _, event in events:
        data = b"\n".join(line[6:] for line in event.split(b"\n") if line.startswith(b"data: "))
        if path == NATIVE and b"event:" not in event:
            texts[0] = texts.get(0, "") + data.decode()
        elif not data.startswith(b"{"):
            rest.append(event)
        else:
            for key, value in _leaves(json.loads(data)):
                if key[-1] in ("sequence_number", "text_offset", "completion_tokens"):
                    continue
                if isinstance(value, str) and key[-1] in _GROWING:
                    texts[key] = texts.get(key, "") + value
                elif "usage" not in key and "logprobs" not in key and "token_ids" not in key:
                    rest.append((key, value))
    return texts, {str(each) for each in rest}


def _leaves(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        mark = (*key, value["index"]) if "index" in value else key
        for name, inner in value.items():
            yield from _leaves(inner, (*mark, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


_GROWING = ("text", "content", "reasoning_content", "arguments", "delta", "thinking", "partial_json")


@pytest.mark.parametrize(("merged", "then"), [(1, 2), (1, 99), (3, 1), (2, 3), (99, 1)])
@pytest.mark.parametrize(("path", "body", "pieces"), CASES)
def test_a_second_run_in_other_steps_says_the_same(
    runner: asyncio.Runner,
    path: str,
    body: dict[str, Any],
    pieces: tuple[str, ...],
    merged: int,
    then: int,
) -> None:
    cluster = Cluster(pieces, runner)
    cluster.merged = merged
    whole = events_of(cluster.open(path, body))
    cluster.merged = then
    for had, (event_id, _) in enumerate(whole, 1):
        resumed = cluster.resume(event_id)
        assert resumed.status_code == 200, (event_id, resumed.text)
        rest = events_of(resumed.content)
        one, two = said(path, whole[:had] + rest), said(path, whole)
        assert one[0] == two[0]
        assert one[1] ^ two[1] == set(), (event_id, had)
        numbers = [int(event_id.split(":")[1]) for event_id, _ in rest]
        assert numbers == [*range(had + 1, had + 1 + len(rest))]
        if path == RESPONSES:
            data = [json.loads(event.partition(b"data: ")[2]) for _, event in rest]
            assert [each["sequence_number"] for each in data] == [n - 1 for n in numbers]
