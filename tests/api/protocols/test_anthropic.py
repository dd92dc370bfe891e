"""/v1/messages through Anthropic's own client, and its events to the byte."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from tests.api.conftest import TOKENIZER, Api, Server
from tests.api.templates import DEEPSEEK, QWEN
from tests.api.test_fields import rendered
from tests.api.test_tools import CALLS, _long
from tests.fakes import MODEL, Script
from torchweave_ray.errors import Overloaded, Unavailable
from torchweave_ray.outputs import FinishReason

ASK: Any = [{"role": "user", "content": "What is gravity?"}]
BASE: Any = {"model": "tiny", "max_tokens": 50, "messages": ASK}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather now",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def connect(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=20)


def test_a_message(server: Server) -> None:
    message = connect(server).messages.create(
        **BASE,
        system="Be kind",
        stop_sequences=["x"],
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9},
    )
    assert [(block.type, block.text) for block in message.content] == [("text", "Gravity pulls.")]
    assert (message.role, message.stop_reason) == ("assistant", "end_turn")
    assert message.usage.output_tokens == 9
    assert message.usage.cache_read_input_tokens == 1
    (request,) = server.backend.requests
    assert message.usage.input_tokens == len(request.prompt_token_ids) - 1
    expected = rendered([{"role": "system", "content": "Be kind"}, *ASK])
    assert request.prompt_token_ids == expected
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.9)
    assert (sampling.max_tokens, sampling.stop) == (50, ("x",))


def test_a_message_streamed(server: Server) -> None:
    with connect(server).messages.stream(**BASE) as stream:
        assert "".join(stream.text_stream) == "Gravity pulls."
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 9


def test_a_tool_is_used_and_answered(server: Server) -> None:
    server.backend.infos = [_long(MODEL)]
    server.backend.script = Script(pieces=["Let me see.", CALLS["qwen"][:40], CALLS["qwen"][40:]])
    client = connect(server)
    whole = client.messages.create(**BASE, tools=[WEATHER])
    with client.messages.stream(**BASE, tools=[WEATHER]) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        text, use = message.content
        assert text.text == "Let me see."
        assert (use.type, use.name, use.input) == ("tool_use", "get_weather", {"city": "Oslo"})
    use_id: Any = whole.content[1].id
    result = {"type": "tool_result", "tool_use_id": use_id, "content": "Rain"}
    again = [*ASK, {"role": "assistant", "content": whole.content}]
    again.append({"role": "user", "content": [result, {"type": "text", "text": "So?"}]})
    assert client.messages.create(**BASE | {"messages": again}, tools=[WEATHER]).content
    told = TOKENIZER.decode(server.backend.requests[-1].prompt_token_ids, False)
    assert told.index("Oslo") < told.index("Rain") < told.index("So?")


def test_stop_reasons(api: Api) -> None:
    for script, expected in (
        (Script(finish_reason=FinishReason.LENGTH), ("max_tokens", None)),
        (Script(stop_reason="END"), ("stop_sequence", "END")),
        (Script(), ("end_turn", None)),
    ):
        api.backend.script = script
        answer = api.post("/v1/messages", BASE).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == expected


def test_thinking_is_a_block_of_its_own(api: Api) -> None:
    api.use_template(DEEPSEEK)
    api.backend.script = Script(pieces=["hm", "</think>", "Yes"])
    content = api.post("/v1/messages", BASE).json()["content"]
    assert [(b["type"], b.get("thinking") or b.get("text")) for b in content] == [
        ("thinking", "hm"),
        ("text", "Yes"),
    ]


def test_a_begun_answer_goes_on(api: Api) -> None:
    messages = [*ASK, {"role": "assistant", "content": "It"}]
    request = api.sent("/v1/messages", BASE | {"messages": messages})
    assert TOKENIZER.decode(request.prompt_token_ids, False).endswith("assistant\nIt")


def test_tokens_are_counted(server: Server) -> None:
    counted = connect(server).messages.count_tokens(model="tiny", messages=ASK, system="Be kind")
    assert counted.input_tokens == len(rendered([{"role": "system", "content": "Be kind"}, *ASK]))


def test_errors(server: Server) -> None:
    client = connect(server)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**BASE, extra_body={"temperature": -1})
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
        client.messages.create(**BASE, stop_sequences=[""])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**BASE | {"model": "none"})
    server.backend.script = Script(refusal=Overloaded("full", None, None, 2.0))
    with pytest.raises(anthropic.RateLimitError) as full:
        client.messages.create(**BASE)
    assert full.value.response.headers["retry-after"] == "2"
    assert full.value.body == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "full"},
    }
    server.backend.script = Script(pieces=["a"], failure=Unavailable("lost"))
    with (
        pytest.raises(anthropic.APIStatusError, match="lost"),
        client.messages.stream(**BASE) as stream,
    ):
        list(stream)


def test_events_to_the_byte(api: Api) -> None:
    api.use_template(QWEN)
    api.backend.infos = [_long(MODEL)]
    api.backend.script = Script(pieces=["Hi", CALLS["qwen"]])
    body = BASE | {"stream": True, "tools": [WEATHER]}
    events = api.post("/v1/messages", body).text.split("\n\n")
    assert events.pop() == ""
    names = [event.split("\n")[0].removeprefix("event: ") for event in events]
    data = [json.loads(event.split("\ndata: ")[1]) for event in events]
    assert [each["type"] for each in data] == names
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert events[1] == (
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":"","citations":null}}'
    )
    assert events[2] == (
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"Hi"}}'
    )
    assert data[4]["content_block"]["input"] == {}
    assert data[5]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": "Oslo"}'}
    assert data[7]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
