"""Tools through the official client: rendered by every style of template, parsed back, streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.conftest import TOKENIZER, Api, Server
from tests.api.templates import ALL, DEEPSEEK, LLAMA3, MISTRAL, QWEN, QWEN_THINKING, SMOL
from tests.api.test_openai import MESSAGES, chunks_of, connect
from tests.fakes import MODEL, Script
from torchweave_ray.outputs import FinishReason

CHAT = "/v1/chat/completions"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ADD: Any = {"type": "function", "function": {"name": "add"}}
ARGUMENTS = '{"city": "Oslo"}'
CALLS = {
    "smol": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
}
CALLS["qwen"] = CALLS["qwen-thinking"] = CALLS["smol"]


@pytest.fixture(autouse=True)
def long_context(api: Api) -> None:
    fields = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
    api.backend.infos = [type(MODEL)(**fields | {"max_model_len": 20_000})]


@pytest.mark.parametrize("style", ALL)
def test_a_round_trip_in_every_style(api: Api, style: str) -> None:
    """Ask, get the call, send it back with its result: the template takes it all."""
    api.use_template(ALL[style])
    text = CALLS[style]
    api.backend.script = Script(pieces=[text[:7], text[7:30], text[30:]])
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [WEATHER]}
    (choice,) = api.post(CHAT, body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    asked = TOKENIZER.decode(api.backend.requests[-1].prompt_token_ids, False)
    assert "The weather now" in asked
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Rain, 4 degrees"}
    again = api.post(CHAT, body | {"messages": [*MESSAGES, message, result]})
    assert again.status_code == 200, again.text
    told = TOKENIZER.decode(api.backend.requests[-1].prompt_token_ids, False)
    assert told.index("What is gravity") < told.index("Oslo") < told.index("Rain, 4")
    if style != "mistral":
        assert json.dumps(ARGUMENTS) not in told  # an object, not its text
    chunks = chunks_of(api.post(CHAT, body | {"stream": True}).text)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    pieces = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    first = pieces[0]
    assert first["id"]
    assert (first["index"], first["function"]) == (0, {"name": "get_weather", "arguments": ""})
    assert "".join(p["function"]["arguments"] for p in pieces[1:]) == ARGUMENTS
    assert not any(d.get("content") for d in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_official_client(server: Server) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    server.backend.script = Script(pieces=["Let me see. ", call, call])
    server.backend.infos = [_long(MODEL)]
    client = connect(server)
    ask: Any = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER, ADD]}
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.message.content == "Let me see."
    assert [c.function.name for c in choice.message.tool_calls or ()] == ["add", "add"]
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.content == "Let me see."
    calls = [c.function for c in streamed.message.tool_calls or ()]
    assert [(c.name, c.arguments) for c in calls] == [("add", '{"a": 1}')] * 2
    again: Any = [*MESSAGES, choice.message]
    again += [
        {"role": "tool", "tool_call_id": c.id, "content": "2"}
        for c in choice.message.tool_calls or ()
    ]
    assert client.chat.completions.create(model="tiny", messages=again, tools=[ADD]).choices


def _long(model: Any) -> Any:
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    return type(model)(**fields | {"max_model_len": 20_000})


def test_without_tools_nothing_is_parsed(api: Api) -> None:
    api.use_template(QWEN)
    api.backend.script = Script(pieces=[CALLS["qwen"]])
    for change in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = api.post(CHAT, {"messages": MESSAGES} | change).json()["choices"]
        assert choice["message"]["content"] == CALLS["qwen"]
        assert choice["finish_reason"] == "stop"


def test_an_answer_cut_off_in_a_call_says_length(api: Api) -> None:
    api.use_template(QWEN)
    text = CALLS["qwen"][:-20]
    api.backend.script = Script(pieces=[text], finish_reason=FinishReason.LENGTH)
    (choice,) = api.post(CHAT, {"messages": MESSAGES, "tools": [WEATHER]}).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert ARGUMENTS.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_special_tokens_that_mark_calls_stay_in_the_text(api: Api) -> None:
    body = {"messages": MESSAGES, "tools": [WEATHER]}
    api.use_template(MISTRAL)
    assert api.sent(CHAT, body).sampling.skip_special_tokens
    api.use_template(MISTRAL, ["[TOOL_CALLS]"])
    assert not api.sent(CHAT, body).sampling.skip_special_tokens
    assert api.sent(CHAT, {"messages": MESSAGES}).sampling.skip_special_tokens


@pytest.mark.parametrize("style", ALL)
def test_a_call_is_enforced(api: Api, style: str) -> None:
    """Required, by name, and strict where the model chooses: each is a grammar."""
    api.use_template(ALL[style])
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [WEATHER, ADD]}
    has_words = style not in ("llama3", "mistral")
    call = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
    text = f"<tool_call>\n{call}\n</tool_call>" if has_words else call
    api.backend.script = Script(pieces=[text[:20], text[20:]])
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, both in (("required", True), (named, False)):
        (answer,) = api.post(CHAT, body | {"tool_choice": choice}).json()["choices"]
        (made,) = answer["message"]["tool_calls"]
        assert made["function"]["arguments"] == ARGUMENTS
        assert answer["finish_reason"] == "tool_calls"
        grammar = api.backend.requests[-1].grammar
        assert grammar is not None
        assert "get_weather" in grammar
        assert ("add" in grammar.replace("additional", "")) is both
    assert api.sent(CHAT, body).grammar is None
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    response = api.post(CHAT, body | {"tools": [strict]})
    assert (api.backend.requests[-1].grammar is not None) is has_words
    assert ("x-ignored-params" in response.headers) is not has_words


def test_a_mistral_call_has_an_id_that_mistral_takes(api: Api) -> None:
    api.use_template(MISTRAL)
    api.backend.script = Script(pieces=[CALLS["mistral"]])
    answer = api.post(CHAT, {"messages": MESSAGES, "tools": [WEATHER]}).json()
    assert len(answer["choices"][0]["message"]["tool_calls"][0]["id"]) == 9


@pytest.mark.parametrize("template", [SMOL, LLAMA3])
def test_text_stays_text(api: Api, template: str) -> None:
    api.use_template(template)
    api.backend.script = Script(pieces=["Grav", "ity {", "pulls}", " <tool"])
    body = {"messages": MESSAGES, "tools": [WEATHER], "logprobs": True}
    (choice,) = api.post(CHAT, body).json()["choices"]
    assert choice["message"]["content"] == "Gravity {pulls} <tool"
    assert choice["finish_reason"] == "stop"
    chunks = [c["choices"][0] for c in chunks_of(api.post(CHAT, body | {"stream": True}).text)]
    assert "".join(c["delta"].get("content", "") for c in chunks) == "Gravity {pulls} <tool"
    tokens = [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]]
    assert tokens == choice["logprobs"]["content"]


def test_reasoning_is_told_apart_and_streamed(api: Api) -> None:
    for template, pieces in (
        (QWEN_THINKING, ["<thi", "nk>\nhm, ", "so", "\n</think>\n", "\nYes", "."]),
        (DEEPSEEK, ["hm, ", "so</thi", "nk>", "Yes."]),
    ):
        api.use_template(template)
        api.backend.script = Script(pieces=pieces)
        (choice,) = api.post(CHAT, {"messages": MESSAGES}).json()["choices"]
        assert choice["message"]["reasoning_content"] == "hm, so"
        assert choice["message"]["content"] == "Yes."
        chunks = chunks_of(api.post(CHAT, {"messages": MESSAGES, "stream": True}).text)
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm, so"
        assert "".join(d.get("content", "") for d in deltas) == "Yes."


def test_no_reasoning_where_the_template_ends_it(api: Api) -> None:
    api.use_template(QWEN_THINKING)
    request = api.sent(CHAT, {"messages": MESSAGES, "reasoning_effort": "none"})
    assert TOKENIZER.decode(request.prompt_token_ids).endswith("</think>\n\n")
