"""Every kind of bad input: a 4xx in one shape that names the field; the engine sees nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import Api
from tests.fakes import MODEL

GENERATE, NOBATCH = "/v1/generate", "/v1/generate_nobatch"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VALID: dict[str, dict[str, Any]] = {
    GENERATE: {"prompt": "hi"},
    NOBATCH: {"prompt": "hi"},
    COMPLETIONS: {"model": "tiny", "prompt": "hi"},
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
}
ASK = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = {**CALL, "function": {"name": "f", "arguments": "[1]"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAN, INF = float("nan"), float("inf")

EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": NAN}, "temperature"),
    ({"temperature": INF}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"temperature": 10**400}, "temperature"),
    ({"stop_token_ids": [10**30]}, "stop_token_ids"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": NAN}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"3": 101}}, "logit_bias"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 511}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["a", " "]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"bad_words": "x"}, "bad_words"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"model": 5}, "model"),
    ({"temprature": 1}, "temprature"),
]
ONE: list[tuple[str, dict[str, Any], str]] = [
    (GENERATE, {"max_new_tokens": 0}, "max_new_tokens"),
    (GENERATE, {"max_new_tokens": -5}, "max_new_tokens"),
    (GENERATE, {"max_new_tokens": "9"}, "max_new_tokens"),
    (GENERATE, {"max_new_tokens": 511}, "max_new_tokens"),
    (GENERATE, {"min_tokens": 5, "max_new_tokens": 4}, "min_tokens"),
    (GENERATE, {"prompt": ""}, "prompt"),
    (GENERATE, {"prompt": []}, "prompt"),
    (GENERATE, {"prompt": None}, "prompt"),
    (GENERATE, {"prompt": 7}, "prompt"),
    (GENERATE, {"prompt": "x" * 600}, "prompt"),
    (GENERATE, {"prompt": [300]}, "prompt"),
    (NOBATCH, {"prompt": "x" * 20_000}, "prompt"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 511}, "max_tokens"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 129}, "n"),
    (COMPLETIONS, {"seed": 2**63 - 1, "n": 2}, "seed"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
    (COMPLETIONS, {"best_of": 3, "stream": True}, "best_of"),
    (COMPLETIONS, {"best_of": 65, "prompt": ["a", "b"]}, "prompt"),
    (COMPLETIONS, {"echo": 1}, "echo"),
    (COMPLETIONS, {"echo": True, "prompt": [10**30]}, "prompt"),
    (COMPLETIONS, {"echo": True, "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"priority": 2**31}, "priority"),
    (COMPLETIONS, {"stream_interval": 3}, "stream_interval"),
    (COMPLETIONS, {"stream_interval": 0, "stream": True}, "stream_interval"),
    (
        COMPLETIONS,
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (
        COMPLETIONS,
        {"stream": True, "stream_options": {"include_usages": True}},
        "stream_options.include_usages",
    ),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
    ),
    *[
        (CHAT, {"messages": [*ASK, message]}, param)
        for message, param in (
            ({"role": "tool", "content": "x"}, "messages[1]"),
            ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[1]"),
            ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1]"),
            (
                {"role": "assistant", "tool_calls": [BAD_CALL]},
                "messages[1].tool_calls[0].function.arguments",
            ),
        )
    ],
    (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"tools": [TOOL] * 129}, "tools"),
    (CHAT, {"tools": [{**TOOL, "type": "retrieval"}]}, "tools[0].type"),
    (CHAT, {"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice",
    ),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 600}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 6, "max_tokens": 5}, "max_tokens"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]


def check_error(response: Any, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert body["error"]["param"] == param, response.text
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    message: str = body["error"]["message"]
    return message


def post_raw(api: Api, path: str, body: Any) -> Any:
    """Unlike httpx's json=, this can send NaN."""
    return api.request("POST", path, content=json.dumps(body).encode())


@pytest.mark.parametrize("path", VALID)
def test_a_wrong_value_names_its_field_everywhere(api: Api, path: str) -> None:
    for change, param in EVERYWHERE:
        check_error(post_raw(api, path, VALID[path] | change), 400, param)
    assert api.backend.requests == []


@pytest.mark.parametrize(("path", "change", "param"), ONE)
def test_a_wrong_value_names_its_field(
    api: Api, path: str, change: dict[str, Any], param: str
) -> None:
    check_error(post_raw(api, path, VALID[path] | change), 400, param)
    assert api.backend.requests == []


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"top_k": ' + b"9" * 5_000 + b"}",
    ],
)
def test_malformed_json(api: Api, path: str, raw: bytes) -> None:
    assert check_error(api.request("POST", path, content=raw), 400, None)


@pytest.mark.parametrize("depth", [100, 400, 800, 900, 950, 1_200])
def test_a_deep_body_is_never_a_server_error(api: Api, depth: int) -> None:
    nested = "[" * depth + '"\\u0041"' + "]" * depth
    for field in ("chat_template_kwargs", "messages", "tools", "metadata", "nonsense"):
        value = f'{{"x": {nested}}}' if field == "chat_template_kwargs" else nested
        body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": {value}}}'
        response = api.request("POST", CHAT, content=body.encode())
        assert response.status_code in (200, 400), response.text


def test_half_a_surrogate_pair_is_refused(api: Api) -> None:
    raw = b'{"prompt": "a\\ud800", "temperature": 1}'
    check_error(api.request("POST", GENERATE, content=raw), 400, "prompt")
    raw = b'{"messages": [{"role": "user", "content": "\\udfff"}]}'
    check_error(api.request("POST", CHAT, content=raw), 400, "messages")
    raw = b'{"\\ud800": 1}'
    check_error(api.request("POST", CHAT, content=raw), 400, "?")
    raw = b'{"prompt": "\\ud83d\\ude00"}'
    assert api.request("POST", GENERATE, content=raw).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" + "0" * 400 + ".5"])
def test_a_number_that_is_none_is_refused_wherever_it_stands(api: Api, number: str) -> None:
    tool = '{"type": "function", "name": "f", "parameters": {"enum": [%s]}}'
    raw = '{"input": "hi", "tools": [' + tool + "]}"
    check_error(api.request("POST", "/v1/responses", content=(raw % number).encode()), 400, "tools")
    assert api.request("POST", "/v1/responses", content=(raw % "1e30").encode()).status_code == 200
    raw = '{"input": "%s"}'
    assert api.request("POST", "/v1/responses", content=(raw % number).encode()).status_code == 200


@pytest.mark.parametrize("path", VALID)
def test_an_unknown_field_hints_at_the_known_one(api: Api, path: str) -> None:
    message = check_error(api.post(path, VALID[path] | {"top_pp": 1}), 400, "top_pp")
    assert "did you mean 'top_p'?" in message


@pytest.mark.parametrize("path", VALID)
def test_an_unknown_model_lists_what_there_is(api: Api, path: str) -> None:
    response = api.post(path, VALID[path] | {"model": "gpt-9"})
    assert "tiny" in check_error(response, 404, "model")
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_prompt_over_the_context_has_openais_code(api: Api) -> None:
    response = api.post(COMPLETIONS, {"prompt": [7] * 512})
    message = check_error(response, 400, "prompt")
    assert str(MODEL.max_model_len) in message
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert api.sent(COMPLETIONS, {"prompt": [7] * 511, "max_tokens": 1})


def test_a_body_over_the_limit(api: Api) -> None:
    api.configure(max_body_bytes=1_000)
    check_error(api.post(GENERATE, {"prompt": "x" * 1_000}), 413, None)

    async def unannounced() -> Any:
        for _ in range(100):
            yield b" " * 100

    response = api.request("POST", GENERATE, content=unannounced())
    check_error(response, 413, None)


def test_nothing_to_serve_yet(api: Api) -> None:
    api.backend.infos = []
    response = api.post(GENERATE, VALID[GENERATE])
    check_error(response, 503, None)
    assert int(response.headers["retry-after"]) >= 1


def test_other_paths_and_methods_have_the_same_shape(api: Api) -> None:
    check_error(api.get("/v2/x"), 404, None)
    check_error(api.get("/v1/completions/"), 404, None)
    check_error(api.get("/v1/models/none"), 404, "model")
    response = api.get(GENERATE)
    check_error(response, 405, None)
    assert response.headers["allow"] == "POST"
    check_error(api.post("/health"), 405, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = ("prompt", "messages", "model", "stop", "n", "stream", "stream_options", "logit_bias")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(sorted(VALID)),
    change=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
def test_no_body_whatever_makes_a_server_error(api: Api, path: str, change: dict[str, Any]) -> None:
    response = post_raw(api, path, VALID[path] | change)
    assert response.status_code in (200, 400, 404), response.text
