"""The official clients against the application on a real Ray, with the real SmolLM2.

What random weights cannot show: answers that mean something, calls that parse, text that is scored.
"""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.smollm2 import staged_smollm2

pytestmark = [pytest.mark.ray, pytest.mark.weights]

MODEL = "smollm2"
ASK: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather now", "parameters": CITY},
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": CITY}}
PARIS: Any = [{"role": "user", "content": "How warm is it in Paris, in celsius?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Client]:
    port = cluster.free_port()
    model = {"id": MODEL, "artifact": str(staged_smollm2()), "num_cpus": 1, "threads": 2}
    engine = {"max_model_len": 2048, "cache": {"kv_memory": 128 << 20}}
    with cluster.ray_cluster(num_cpus=3, port=port):
        deploy(config({"models": [model | {"engine": engine}]}))
        client = Client(port)
        wait_until(lambda: client.get("/health")[0] == 200)
        yield client


@pytest.fixture(scope="module")
def client(served: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none")


def test_chat_streamed_with_usage_scores_and_choices(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, max_tokens=24, logprobs=True, top_logprobs=2, n=2)
    first, second = whole.choices
    assert "Paris" in (first.message.content or "")
    assert second.message.content == first.message.content  # greedy
    assert first.logprobs is not None
    scores = first.logprobs.content or []
    assert whole.usage is not None
    assert len(scores) * 2 == whole.usage.completion_tokens
    for score in scores:
        assert score.top_logprobs[0].logprob == pytest.approx(score.logprob)  # the likeliest
        assert sum(math.exp(top.logprob) for top in score.top_logprobs) <= 1.001
    chunks = list(
        client.chat.completions.create(
            **ASK, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == first.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(scores)
    assert usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_time"}}]
)
def test_a_call_that_must_be_made_is_valid(client: openai.OpenAI, choice: Any) -> None:
    ask: Any = {
        "model": MODEL,
        "messages": PARIS,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "seed": 3,
    }
    answer = client.chat.completions.create(**ask).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function"
    allowed = ("get_weather", "get_time") if choice == "required" else ("get_time",)
    assert call.function.name in allowed
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    pieces = [
        piece.function.arguments or ""
        for chunk in client.chat.completions.create(**ask, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or ()
        if piece.function is not None
    ]
    assert "".join(pieces) == call.function.arguments


def test_a_tools_result_is_read(client: openai.OpenAI) -> None:
    """The model may choose; whatever it does, call and result go back and it answers."""
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    ask: Any = {"model": MODEL, "tools": [strict], "temperature": 0, "max_tokens": 100}
    message = client.chat.completions.create(**ask, messages=PARIS).choices[0].message
    for call in message.tool_calls or ():
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), CITY)
    function = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]}
    called["tool_calls"][0]["function"] = function  # type: ignore[index]
    result = {"role": "tool", "tool_call_id": "c", "content": "It is 31 degrees celsius in Paris."}
    ask["tool_choice"] = "none"
    answer = client.chat.completions.create(**ask, messages=[*PARIS, called, result])
    assert "31" in (answer.choices[0].message.content or "")


def test_a_schema_streamed(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    stream = client.chat.completions.create(
        **ASK, response_format=form, max_tokens=120, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), CITY)


def test_tokens_there_and_back_and_the_prompt(served: Client) -> None:
    text = "The capital of Österreich is Wien 😀."
    status, tokens, _ = served.post("/tokenize", prompt=text)
    assert status == 200
    assert tokens["count"] == len(tokens["tokens"])
    assert served.post("/detokenize", tokens=tokens["tokens"])[1]["prompt"] == text
    shown = served.post("/render", messages=ASK["messages"])[1]
    assert shown["prompt"].endswith(
        "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = served.post("/tokenize", messages=ASK["messages"])[1]
    assert chat["tokens"] == shown["tokens"]
    by_prompt = served.post("/v1/completions", prompt=shown["tokens"], max_tokens=8, temperature=0)[
        1
    ]
    by_chat = served.post("/v1/chat/completions", **ASK | {"max_tokens": 8})[1]
    assert by_prompt["choices"][0]["text"] == by_chat["choices"][0]["message"]["content"]


def test_a_text_is_scored_and_embedded(client: openai.OpenAI) -> None:
    totals = []
    for text in ("The capital of France is Paris.", "The capital of France is banana."):
        scored = client.completions.create(
            model=MODEL, prompt=text, echo=True, logprobs=1, max_tokens=0
        )
        assert scored.choices[0].text == text
        logprobs = scored.choices[0].logprobs
        assert logprobs is not None
        assert "".join(logprobs.tokens or ()) == text
        values = logprobs.token_logprobs or []
        assert values[0] is None
        totals.append(sum(value for value in values[1:] if value is not None))
    assert totals[0] > totals[1] + 1
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten naps on the couch.",
        "Stocks fell 3% on Monday.",
    ]
    data = client.embeddings.create(
        model=MODEL, input=texts, extra_body={"pooling": "mean"}, encoding_format="float"
    ).data
    one, near, far = (each.embedding for each in data)
    assert math.hypot(*one) == pytest.approx(1, abs=1e-3)
    assert _dot(one, near) > _dot(one, far)


def _dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_other_protocols_streamed(served: Client, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**ASK, max_tokens=16).choices[0].message.content
    claude = anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="none")
    with claude.messages.stream(
        model=MODEL, messages=ASK["messages"], max_tokens=16, extra_body={"temperature": 0}
    ) as events:
        message = events.get_final_message()
    assert message.content[0].type == "text"
    assert message.content[0].text == chat
    assert message.usage.output_tokens <= 16
    with client.responses.stream(
        model=MODEL, input=ASK["messages"][0]["content"], temperature=0, max_output_tokens=16
    ) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert response.output_text == chat
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds


def test_a_running_stream_is_stopped(served: Client, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        **ASK,
        stream=True,
        max_tokens=1500,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunk = next(stream)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("DELETE", f"/v1/requests/{chunk.id}")
    assert connection.getresponse().status == 200
    connection.close()
    rest = list(stream)
    reasons = [choice.finish_reason for c in rest for choice in c.choices if choice.finish_reason]
    assert reasons == ["abort"]
    assert rest[-1].usage is not None
    assert rest[-1].usage.completion_tokens < 1500
