"""Fields to grammars over the fake backend: what is sent, what is refused and under which name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import TOKENIZER, Api
from tests.fakes import MODEL, FakeBackend
from torchweave_ray.api.grammar import tool_grammar
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.tokenizer.grammar import GrammarCompiler, make_vocabulary

CHAT = "/v1/chat/completions"
PATHS = ("/v1/generate_nobatch", "/v1/completions", CHAT)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VOCABULARY = make_vocabulary(TOKENIZER.to_json(), MODEL.vocab_size, MODEL.eos_token_ids)
COMPILER = GrammarCompiler(lambda: VOCABULARY)


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """One for all: its worker starts once."""
    with asyncio.Runner() as runner:
        yield Api(runner, FakeBackend(), ApiSettings())


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "hi"}], **fields}
    return {"prompt": "hi", **fields}


def allows(grammar: str | None, text: str) -> bool:
    """Whether the whole text is one of the grammar."""
    assert grammar is not None
    matcher = COMPILER.compile(grammar).deep_copy()
    ids = VOCABULARY.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def named(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


TAG = {"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}
GRAMMARS = [
    ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
    ({"response_format": named(SCHEMA)}, '{"a": 3}', '{"a": "3"}'),
    ({"structured_outputs": {"json": SCHEMA}}, '{\n  "a":3\n}', "{}"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":3}', '{"a":    3}'),
    ({"structured_outputs": {"json_object": True}}, "{}", "3"),
    ({"structured_outputs": {"regex": "a+b"}}, "aab", "aabb"),
    ({"structured_outputs": {"choice": ["yes", "nö"]}}, "nö", "no"),
    ({"structured_outputs": {"grammar": 'start: "x" start | "y"'}}, "xxy", "xx"),
    ({"guided_json": SCHEMA}, '{"a":1}', "1"),
    ({"guided_regex": "[0-9]{2}"}, "42", "4"),
    ({"guided_choice": ["a b"]}, "a b", "a"),
    ({"guided_grammar": 'root ::= "a" | "(" root ")"'}, "((a))", "((a)"),
    (
        {
            "response_format": {
                "type": "structural_tag",
                "structures": [TAG],
                "triggers": ["<f>"],
            }
        },
        "so <f>12</f> is",
        "so <f>x</f>",
    ),
]


@pytest.mark.parametrize(("fields", "good", "bad"), GRAMMARS)
@pytest.mark.parametrize("path", PATHS)
def test_a_grammar_goes_with_the_request(
    api: Api, path: str, fields: dict[str, Any], good: str, bad: str
) -> None:
    grammar = api.sent(path, body_of(path, **fields)).grammar
    assert allows(grammar, good)
    assert not allows(grammar, bad)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_plain_requests_have_none(api: Api, fields: dict[str, Any]) -> None:
    assert api.sent(CHAT, body_of(CHAT, **fields)).grammar is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = [
    ({"response_format": named({"type": "thing"})}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"response_format": named("x")}, "response_format.json_schema.schema"),
    ({"response_format": named({"if": {}, "then": {}})}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"jsno": {}}}, "structured_outputs.jsno"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(?=a)a"}}, "structured_outputs.regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_grammar": "start: missing"}, "guided_grammar"),
    ({"guided_grammar": "root ::= missing"}, "guided_grammar"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
]
BOMBS = [
    ({"guided_json": nested(100)}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"),
    ({"guided_json": {"type": "integer", "multipleOf": 999983, "maximum": 10**30}}, "guided_json"),
    ({"guided_grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000}, "guided_grammar"),
    ({"guided_grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, "guided_grammar"),
    (
        {
            "guided_grammar": "start: A0\n"
            + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60))
            + 'A60: "x"'
        },
        "guided_grammar",
    ),
    ({"guided_grammar": "start: " + "a " * 30_000 + '\na: "x"?'}, "guided_grammar"),
    ({"guided_regex": "(" * 30_000 + "a" + ")" * 30_000}, "guided_regex"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED + BOMBS)
def test_what_cannot_be_used_names_its_field(api: Api, fields: dict[str, Any], param: str) -> None:
    api.backend.requests.clear()
    response = api.post(CHAT, body_of(CHAT, **fields))
    assert response.status_code == 400, response.text[:500]
    error = response.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 600
    assert not api.backend.requests


def test_others_are_answered_while_a_bomb_is_tried(api: Api) -> None:
    bomb = {"type": "integer", "multipleOf": 999979, "maximum": 10**30}

    async def both() -> tuple[int, bool, list[int]]:
        transport = httpx.ASGITransport(api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            bombed = asyncio.create_task(
                client.post(CHAT, json=body_of(CHAT, guided_json=bomb), timeout=60)
            )
            await asyncio.sleep(0.05)
            others = [(await client.post(CHAT, json=body_of(CHAT))).status_code for _ in range(5)]
            was_busy = not bombed.done()
            return (await bombed).status_code, was_busy, others

    status, was_busy, others = api.run(both())
    assert (status, others) == (400, [200] * 5)
    assert was_busy, "the bomb was over before the others came"


def test_the_grammar_of_tool_calls() -> None:
    weather = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city"],
        "$defs": {"unit": {"enum": ["c", "f"]}},
    }
    tools = [{"name": "weather", "parameters": weather}, {"name": "now"}]
    call = '<call>{"name": "weather", "arguments": {"city": "Rome", "unit": "c"}}</call>'
    one = tool_grammar(tools, "<call>", "</call>").llguidance()
    assert allows(one, call)
    assert not allows(one, call.replace('"c"', '"k"'))
    assert not allows(one, call.replace('"weather"', '"whether"'))
    assert not allows(one, call + "\n" + call)
    assert allows(tool_grammar(tools).llguidance(), '{"name":"now","arguments":{}}')
    several = tool_grammar(tools, "<call>", "</call>", parallel=True).llguidance()
    assert allows(several, call + "\n" + call)
    maybe = tool_grammar(tools, "<call>", "</call>", required=False).llguidance()
    assert allows(maybe, "no call")
    assert allows(maybe, f"Well: {call}.")
    assert not allows(maybe, "Well: <call>no</call>")
