"""A stream opened again at every event: the same bytes go on, in every dialect, at any ingress."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from tests.api.conftest import TEMPLATE, Server
from tests.api.test_fields import MESSAGES, WEATHER
from tests.fakes import FakeBackend, Script
from tests.tiny import make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.api.streams.records import StreamRecords
from torchweave_ray.errors import Unavailable
from torchweave_ray.outputs import FinishReason, GenerateRequest, RequestOutput, merge_outputs
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
_CREATED = re.compile(rb'"created(_at)?":\d+')
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

    def repeat(self, event_id: str, path: str, body: dict[str, Any]) -> httpx.Response:
        """By the request itself, at an ingress beside which nobody knows the stream."""
        body = ({} if path == NATIVE else {"stream": True}) | body
        known, self.records = self.records, StreamRecords()
        headers = {"Last-Event-ID": event_id}
        response = self._runner.run(ask(self.ingress(), "POST", path, json=body, headers=headers))
        self.records = known
        return response

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
        repeated = cluster.repeat(event_id, path, body)
        assert repeated.status_code == 200, (event_id, repeated.text)
        assert timeless(events_of(repeated.content)) == timeless(whole[had:]), event_id


def timeless(events: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Without the time at which the call was made."""
    return [(event_id, _CREATED.sub(b"", event)) for event_id, event in events]


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


_GROWING = (
    "text",
    "content",
    "reasoning_content",
    "arguments",
    "delta",
    "thinking",
    "partial_json",
)


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


def test_the_official_client_passes_over_ids(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "Gravity pulls."
    body = {"prompt": "abc", "stream": True}
    raw = httpx.post(f"{server.url}/v1/completions", json=body).content
    assert len(events_of(raw)) == raw.count(b"data: ")


def test_what_does_not_fit_is_refused(runner: asyncio.Runner) -> None:
    cluster = Cluster(PIECES, runner)
    whole = events_of(cluster.open(COMPLETIONS, {"prompt": "abc"}))
    (first, _), (second, _), *_ = whole
    stream_id, number, place = second.split(":")
    tokens, chars, checksum = place.split(".")
    cases = {
        "rubbish": None,
        f"{'0' * 32}:{number}:{place}": None,
        f"{stream_id}:{number}:{place},{place}": "does_not_fit",
        f"{stream_id}:{number}:{tokens}.{chars}.{int(checksum) + 1}": "does_not_fit",
        f"{stream_id}:{number}:{tokens}.{int(chars) + 1}.{checksum}": "does_not_fit",
        f"{stream_id}:{number}:9999.{chars}.{checksum}": "does_not_fit",
        f"{stream_id}:{number}:{place}e": "does_not_fit",
        f"{stream_id}:{number}:{place}:end.1": "does_not_fit",
        f"{stream_id}:1:{place}:0.1.1.2": "does_not_fit",
        f"{stream_id}:{number}:{place}:7.1.1.1": "does_not_fit",
    }
    for event_id, code in cases.items():
        headers = {"Last-Event-ID": event_id}
        refused = cluster.call("GET", f"/v1/streams/{stream_id}", headers=headers)
        assert refused.status_code == 400, event_id
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("Last-Event-ID", code), event_id
    by_query = cluster.call("GET", f"/v1/streams/{stream_id}?last_event_id={second}")
    assert events_of(by_query.content) == whole[2:]
    headers = {"Last-Event-ID": first}
    both = cluster.call("GET", f"/v1/streams/{stream_id}?last_event_id={second}", headers=headers)
    assert both.status_code == 400
    for unknown in ("0" * 32, "x", stream_id[:31]):
        missing = cluster.call("GET", f"/v1/streams/{unknown}")
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "stream_id")
        assert unknown in missing.json()["error"]["message"]


def test_another_text_is_not_joined_to_what_the_client_has(runner: asyncio.Runner) -> None:
    cluster = Cluster(PIECES, runner)
    event_id = events_of(cluster.open(COMPLETIONS, {"prompt": "abc"}))[3][0]
    cluster.script = Script(pieces=("Gra", "vita", "\n\n", "pulls", " 😀", "", " us."))
    refused = cluster.resume(event_id)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "does_not_fit")


def test_a_client_comes_again_while_its_stream_still_runs(runner: asyncio.Runner) -> None:
    """The run that it has lost is ended, and the other is whole; at either ingress."""

    async def run(cluster: Cluster, is_same: bool) -> None:
        gate = asyncio.Event()
        cluster.script = Script(pieces=PIECES, gates={3: gate})
        first = cluster.ingress()
        second = first if is_same else cluster.ingress()
        body = {"prompt": "abc", "stream": True}
        old = asyncio.create_task(ask(first, "POST", COMPLETIONS, json=body))
        await cluster.on_request.wait()
        stream_id = cluster.requests[0].request_id.removeprefix("cmpl-")
        new = asyncio.create_task(ask(second, "GET", f"/v1/streams/{stream_id}"))
        while len(cluster.requests) < 2:
            await asyncio.sleep(0)
        assert cluster.stopped == ([] if is_same else [stream_id])
        gate.set()
        text = (await new).content
        again, had = events_of(text), (await old).content
        assert b'"finish_reason":"stop"' in again[-2][1]
        assert (b'"finish_reason":"abort"' in had) == is_same
        assert cluster.requests[0].request_id in cluster.requests[1].request_id
        assert cluster.requests[0].request_id != cluster.requests[1].request_id

    for is_same in (True, False):
        runner.run(run(Cluster(PIECES, runner), is_same))


def test_an_aborted_or_failed_stream_goes_on_behind_its_last_id(runner: asyncio.Runner) -> None:
    for script in (
        Script(pieces=PIECES[:3], finish_reason=FinishReason.ABORT),
        Script(pieces=PIECES[:3], failure=Unavailable("the replica was lost")),
    ):
        cluster = Cluster(PIECES, runner)
        cluster.script = script
        body = cluster.open(COMPLETIONS, {"prompt": "abc"})
        last = [line[4:].decode() for line in body.split(b"\n") if line.startswith(b"id: ")][-1]
        cluster.script = Script(pieces=PIECES)
        text = "".join(
            choice["text"]
            for _, event in events_of(cluster.resume(last).content)
            if b"[DONE]" not in event
            for choice in json.loads(event.removeprefix(b"data: "))["choices"]
        )
        assert text == "".join(PIECES[3:])


def test_a_repeated_request_is_checked(runner: asyncio.Runner) -> None:
    cluster = Cluster(PIECES, runner)
    body = {"prompt": "abc", "stream": True}
    event_id = events_of(cluster.open(COMPLETIONS, body))[3][0]
    cases: list[tuple[str, dict[str, Any], str | None]] = [
        (event_id, {"stream": False}, None),
        (event_id, {"n": 2}, "does_not_fit"),
        ("rubbish", {}, None),
    ]
    for last, more, code in cases:
        refused = cluster.repeat(last, COMPLETIONS, {"prompt": "abc"} | more)
        assert refused.status_code == 400, more
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("Last-Event-ID", code), more
    off = cluster.ingress(stream_keep_s=0.0)
    headers = {"Last-Event-ID": event_id}
    refused = runner.run(ask(off, "POST", COMPLETIONS, json=body, headers=headers))
    assert "stream_keep_s is 0" in refused.json()["error"]["message"]


def test_streams_may_be_switched_off(runner: asyncio.Runner) -> None:
    cluster = Cluster(PIECES, runner)
    ingress = cluster.ingress(stream_keep_s=0.0)
    body = {"prompt": "abc", "stream": True}
    response = runner.run(ask(ingress, "POST", COMPLETIONS, json=body))
    assert b"id: " not in response.content
    assert "x-stream-id" not in response.headers
    assert cluster.requests[0].origin is None


def test_a_call_is_whole_or_unknown(runner: asyncio.Runner) -> None:
    cluster = Cluster(PIECES, runner)
    whole = events_of(cluster.open(COMPLETIONS, TWICE))
    stream_id = whole[0][0][:32]
    kept = cluster.records.recall(stream_id)
    assert len(kept) == 2

    async def half(call_id: str) -> list[GenerateRequest]:
        return kept[1:]

    cluster.recall = half  # type: ignore[method-assign]
    assert cluster.call("GET", f"/v1/streams/{stream_id}").status_code == 404
