"""/v1/responses through the official client: whole, streamed, with tools, with reasoning."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.api.conftest import TOKENIZER, Api, Server
from tests.api.templates import DEEPSEEK
from tests.api.test_fields import rendered
from tests.api.test_openai import connect
from tests.api.test_tools import CALLS, _long
from tests.fakes import MODEL, Script
from torchweave_ray.errors import Unavailable
from torchweave_ray.outputs import FinishReason

PATH = "/v1/responses"
ASK: Any = "What is gravity?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather now",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}


def test_a_response(server: Server) -> None:
    answer = connect(server).responses.create(
        model="tiny", input=ASK, instructions="Be kind", max_output_tokens=50, temperature=0.5
    )
    assert answer.output_text == "Gravity pulls."
    assert answer.status == "completed"
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (9, 1)
    (request,) = server.backend.requests
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": ASK}]
    assert request.prompt_token_ids == rendered(messages)
    assert (request.sampling.max_tokens, request.sampling.temperature) == (50, 0.5)


def test_a_response_streamed(server: Server) -> None:
    with connect(server).responses.stream(model="tiny", input=ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Gravity pulls."
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Gravity pulls."
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"


def test_a_function_is_called_and_answered(server: Server) -> None:
    server.backend.infos = [_long(MODEL)]
    server.backend.script = Script(pieces=["Let me see.", CALLS["qwen"][:40], CALLS["qwen"][40:]])
    client = connect(server)
    ask: Any = {"model": "tiny", "tools": [WEATHER]}
    whole = client.responses.create(**ask, input=ASK)
    with client.responses.stream(**ask, input=ASK) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        text, call = response.output
        assert text.type == "message"
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    call = whole.output[1]
    again: Any = [{"role": "user", "content": ASK}, *whole.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    assert client.responses.create(**ask, input=[*again, result]).output
    told = TOKENIZER.decode(server.backend.requests[-1].prompt_token_ids, False)
    assert told.index("Let me see") < told.index("Oslo") < told.index("Rain")


def test_reasoning_is_an_item_of_its_own(api: Api) -> None:
    api.use_template(DEEPSEEK)
    api.backend.script = Script(pieces=["hm", "</think>", "Yes"])
    answer = api.post(PATH, {"input": ASK}).json()
    thought, message = answer["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "hm")
    assert message["content"][0]["text"] == "Yes"
    again = [{"role": "user", "content": ASK}, *answer["output"], {"role": "user", "content": "So"}]
    assert api.post(PATH, {"input": again}).status_code == 200
    text = api.post(PATH, {"input": ASK, "stream": True}).text
    assert "event: response.reasoning_text.delta" in text


def test_a_format_is_enforced(server: Server) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "name": "person", "schema": schema}
    answer = connect(server).responses.create(model="tiny", input=ASK, text={"format": form})
    assert answer.text is not None
    (request,) = server.backend.requests
    assert request.grammar is not None
    assert "age" in request.grammar


def test_events_in_their_order(api: Api) -> None:
    text = api.post(PATH, {"input": ASK, "stream": True}).text
    names = [e.split("\n")[0].removeprefix("event: ") for e in text.split("\n\n")[:-1]]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_ends(api: Api) -> None:
    api.backend.script = Script(finish_reason=FinishReason.LENGTH)
    answer = api.post(PATH, {"input": ASK}).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    api.backend.script = Script(pieces=["a"], failure=Unavailable("lost"))
    text = api.post(PATH, {"input": ASK, "stream": True}).text
    assert text.split("\n\n")[-2].startswith("event: response.failed")
    assert '"message":"lost"' in text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 600}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_bad_input(server: Server, change: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        connect(server).responses.create(model="tiny", extra_body={"input": ASK} | change)
    assert caught.value.param == param
