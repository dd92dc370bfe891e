"""Every field of every schema reaches the engine's request: none is accepted and forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import TOKENIZER, Api
from tests.api.templates import DEEPSEEK
from tests.fakes import Script
from torchweave_ray.api.native.schema import GenerateBody
from torchweave_ray.api.openai.schema import ChatBody, CompletionBody
from torchweave_ray.api.schema import Body
from torchweave_ray.deadline import Deadline
from torchweave_ray.outputs import GenerateRequest, OutputKind
from torchweave_ray.sampling_params import SamplingParams

GENERATE, COMPLETIONS, CHAT = "/v1/generate", "/v1/completions", "/v1/chat/completions"
SCHEMAS: dict[str, type[Body]] = {
    GENERATE: GenerateBody,
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
}
MESSAGES = [{"role": "user", "content": "hi"}]
VALID: dict[str, dict[str, Any]] = {
    GENERATE: {"prompt": "hi"},
    COMPLETIONS: {"prompt": "hi"},
    CHAT: {"messages": MESSAGES},
}


def _forms(*texts: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(TOKENIZER.encode(text, False)) for text in texts)


SAMPLING: dict[str, tuple[Any, Any]] = {
    "temperature": (0.25, 0.25),
    "top_k": (7, 7),
    "top_p": (0.5, 0.5),
    "min_p": (0.125, 0.125),
    "repetition_penalty": (1.5, 1.5),
    "presence_penalty": (-1, -1.0),
    "frequency_penalty": (0.75, 0.75),
    "logit_bias": ({"5": -100, "007": 2}, {5: -100.0, 7: 2.0}),
    "allowed_token_ids": ([4, 9], (4, 9)),
    "bad_words": (["star", "a"], _forms("star", " star", "a", " a")),
    "seed": (11, 11),
    "min_tokens": (3, 3),
    "ignore_eos": (True, True),
    "stop": (["a", "b"], ("a", "b")),
    "stop_token_ids": ([4, 9], (4, 9)),
    "include_stop_str_in_output": (True, True),
    "skip_special_tokens": (False, False),
}
"""Field to (what a client sends, what the engine gets)."""


def rendered(messages: list[dict[str, str]], **kwargs: Any) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(TOKENIZER.render_chat(messages, **kwargs), False))


def check_field(api: Api, path: str, name: str) -> None:
    """Send one field on its own and find it in the request."""
    if name in SAMPLING:
        value, expected = SAMPLING[name]
        assert getattr(api.sent(path, VALID[path] | {name: value}).sampling, name) == expected
        return
    OTHER[name](api, path)


def _max_tokens(name: str) -> Any:
    def check(api: Api, path: str) -> None:
        assert api.sent(path, VALID[path] | {name: 17}).sampling.max_tokens == 17

    return check


def _model(api: Api, path: str) -> None:
    request = api.sent(path, VALID[path] | {"model": "tiny"})
    assert (request.model, request.artifact_id) == ("tiny", "artifact-1")


def _n(api: Api, path: str) -> None:
    assert api.sent(path, VALID[path] | {"n": 3}).n == 3


def _cache_salt(api: Api, path: str) -> None:
    assert api.sent(path, VALID[path] | {"cache_salt": "mine"}).cache_salt == "mine"


def _priority(api: Api, path: str) -> None:
    assert api.sent(path, VALID[path] | {"priority": -3}).priority == -3


def _prompt_logprobs(api: Api, path: str) -> None:
    request = api.sent(path, VALID[path] | {"prompt_logprobs": 2})
    assert request.sampling.prompt_logprobs == 2
    assert request.output_kind is OutputKind.PROMPT_LOGPROBS


def _return_token_ids(api: Api, path: str) -> None:
    answer = api.post(path, VALID[path] | {"return_token_ids": True}).json()
    assert TOKENIZER.decode(answer["choices"][0]["token_ids"]) == "Gravity pulls."


def _stream_interval(api: Api, path: str) -> None:
    body = VALID[path] | {"stream": True}
    num_chunks = [
        api.post(path, body | {"stream_interval": interval}).text.count("data: ")
        for interval in (1, 1024)
    ]
    assert num_chunks[0] - num_chunks[1] == 1  # the first of three pieces is not delayed


def _best_of(api: Api, path: str) -> None:
    request = api.sent(path, VALID[path] | {"best_of": 4})
    assert (request.n, request.sampling.logprobs) == (4, 0)


def _echo(api: Api, path: str) -> None:
    answer = api.post(path, {"prompt": "hi", "echo": True}).json()
    assert answer["choices"][0]["text"] == "hiGravity pulls."


def _prompt(api: Api, path: str) -> None:
    request = api.sent(path, {"prompt": "What is a star?"})
    assert request.prompt_token_ids == tuple(TOKENIZER.encode("What is a star?"))


def _messages(api: Api, path: str) -> None:
    assert api.sent(path, {"messages": MESSAGES}).prompt_token_ids == rendered(MESSAGES)


def _logprobs(api: Api, path: str) -> None:
    if path == COMPLETIONS:
        assert api.sent(path, VALID[path] | {"logprobs": 2}).sampling.logprobs == 2
    else:
        assert api.sent(path, VALID[path] | {"logprobs": True}).sampling.logprobs == 0
        assert api.sent(path, VALID[path] | {"logprobs": False}).sampling.logprobs is None


def _top_logprobs(api: Api, path: str) -> None:
    body = VALID[path] | {"logprobs": True, "top_logprobs": 4}
    assert api.sent(path, body).sampling.logprobs == 4


def _stream(api: Api, path: str) -> None:
    assert api.post(path, VALID[path] | {"stream": True}).text.endswith("data: [DONE]\n\n")
    assert api.post(path, VALID[path] | {"stream": False}).json()["choices"]


def _stream_options(api: Api, path: str) -> None:
    for wanted in (True, False):
        options = {"include_usage": wanted, "include_obfuscation": False}
        text = api.post(path, VALID[path] | {"stream": True, "stream_options": options}).text
        assert ('"total_tokens"' in text) is wanted


def _chat_template_kwargs(api: Api, path: str) -> None:
    request = api.sent(path, VALID[path] | {"chat_template_kwargs": {"preface": "Hear!"}})
    assert request.prompt_token_ids == rendered(MESSAGES, preface="Hear!") != rendered(MESSAGES)


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


def _tools(api: Api, path: str) -> None:
    request = api.sent(path, {"messages": MESSAGES, "tools": [WEATHER]})
    assert "get_weather" in TOKENIZER.decode(request.prompt_token_ids)


def _tool_choice(api: Api, path: str) -> None:
    body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "none"}
    assert api.sent(path, body).prompt_token_ids == rendered(MESSAGES)


def _parallel_tool_calls(api: Api, path: str) -> None:
    call = '<tool_call>{"name": "get_weather"}</tool_call>'
    api.backend.script = Script(pieces=[call, call])
    body = {"messages": MESSAGES, "tools": [WEATHER]}
    for parallel, num in ((True, 2), (False, 1)):
        answer = api.post(path, body | {"parallel_tool_calls": parallel}).json()
        assert len(answer["choices"][0]["message"]["tool_calls"]) == num


def _reasoning_effort(api: Api, path: str) -> None:
    template = "{{ reasoning_effort | default('so') }}{{ messages[0].content }}"
    api.use_template(template)
    request = api.sent(path, {"messages": MESSAGES, "reasoning_effort": "high"})
    assert TOKENIZER.decode(request.prompt_token_ids) == "highhi"


def _include_reasoning(api: Api, path: str) -> None:
    api.use_template(DEEPSEEK)
    api.backend.script = Script(pieces=["hm</think>", "Yes"])
    for wanted in (True, False):
        answer = api.post(path, {"messages": MESSAGES, "include_reasoning": wanted}).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == "Yes"
        assert ("reasoning_content" in message) is wanted


def _thinking_token_budget(api: Api, path: str) -> None:
    api.use_template(DEEPSEEK)
    thinking = api.sent(path, {"messages": MESSAGES, "thinking_token_budget": 5}).sampling.thinking
    assert thinking is not None
    assert thinking.max_tokens == 5


def _continue_final_message(api: Api, path: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    request = api.sent(path, {"messages": messages, "continue_final_message": True})
    assert TOKENIZER.decode(request.prompt_token_ids, False).endswith("assistant\nWell")


def _deadline_ms(api: Api, path: str) -> None:
    assert isinstance(api.sent(path, VALID[path] | {"deadline_ms": 60_000}).deadline, Deadline)


def _grammar(name: str, value: Any) -> Any:
    """What each comes to is tests/grammar's."""

    def check(api: Api, path: str) -> None:
        assert api.sent(path, VALID[path] | {name: value}).grammar is not None

    return check


OTHER: dict[str, Any] = {
    "response_format": _grammar("response_format", {"type": "json_object"}),
    "structured_outputs": _grammar("structured_outputs", {"regex": "a"}),
    "guided_json": _grammar("guided_json", {"type": "null"}),
    "guided_regex": _grammar("guided_regex", "a"),
    "guided_choice": _grammar("guided_choice", ["a"]),
    "guided_grammar": _grammar("guided_grammar", 'start: "a"'),
    "deadline_ms": _deadline_ms,
    "model": _model,
    "prompt": _prompt,
    "messages": _messages,
    "max_new_tokens": _max_tokens("max_new_tokens"),
    "max_tokens": _max_tokens("max_tokens"),
    "max_completion_tokens": _max_tokens("max_completion_tokens"),
    "n": _n,
    "cache_salt": _cache_salt,
    "priority": _priority,
    "prompt_logprobs": _prompt_logprobs,
    "return_token_ids": _return_token_ids,
    "stream_interval": _stream_interval,
    "best_of": _best_of,
    "echo": _echo,
    "logprobs": _logprobs,
    "top_logprobs": _top_logprobs,
    "stream": _stream,
    "stream_options": _stream_options,
    "chat_template_kwargs": _chat_template_kwargs,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _parallel_tool_calls,
    "reasoning_effort": _reasoning_effort,
    "include_reasoning": _include_reasoning,
    "thinking_token_budget": _thinking_token_budget,
    "continue_final_message": _continue_final_message,
}


@pytest.mark.parametrize(
    ("path", "name"), [(p, name) for p, s in SCHEMAS.items() for name in s.model_fields]
)
def test_a_field_reaches_the_request(api: Api, path: str, name: str) -> None:
    check_field(api, path, name)


@pytest.mark.parametrize("path", SCHEMAS)
def test_a_null_is_as_good_as_nothing(api: Api, path: str) -> None:
    plain = api.sent(path, VALID[path] | {"seed": 1})
    nulls = {name: None for name in SCHEMAS[path].model_fields if name not in VALID[path]}
    withnull = api.sent(path, VALID[path] | nulls | {"seed": 1})
    assert withnull.sampling == plain.sampling
    assert withnull.n == plain.n


def test_every_sampling_parameter_can_be_asked_for() -> None:
    offered = set(CompletionBody.model_fields) & set(ChatBody.model_fields)
    assert set(SamplingParams.__dataclass_fields__) - {"thinking"} <= offered
    assert "thinking_token_budget" in ChatBody.model_fields


def test_a_single_stop_string(api: Api) -> None:
    for path in SCHEMAS:
        assert api.sent(path, VALID[path] | {"stop": "END"}).sampling.stop == ("END",)


def test_the_operators_defaults_apply_where_the_client_says_nothing(api: Api) -> None:
    api.configure(max_new_tokens=40, temperature=0.5, top_k=3, top_p=0.9, seed=42)
    for path in SCHEMAS:
        sampling = api.sent(path, VALID[path]).sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.9)
        assert (sampling.max_tokens, sampling.seed) == (40, 42)
        assert api.sent(path, VALID[path] | {"temperature": 0}).sampling.temperature == 0
        assert api.sent(path, VALID[path] | {"min_tokens": 60}).sampling.max_tokens == 60
    long = api.sent(COMPLETIONS, {"prompt": [7] * 500})
    assert long.sampling.max_tokens == 12


def test_without_a_seed_every_request_draws_its_own(api: Api) -> None:
    seeds = {api.sent(path, VALID[path]).sampling.seed for path in SCHEMAS for _ in range(20)}
    assert len(seeds) == 60
    assert max(seeds) > 2**60


def test_several_prompts(api: Api) -> None:
    body = {"prompt": ["a star", "a star"], "n": 2}
    choices = api.post(COMPLETIONS, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    first, second = api.backend.requests
    assert first.prompt_token_ids == second.prompt_token_ids == tuple(TOKENIZER.encode("a star"))
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed
    api.backend.requests.clear()
    api.post(COMPLETIONS, body | {"seed": 3})
    assert [request.sampling.seed for request in api.backend.requests] == [3, 3]
    api.backend.requests.clear()
    api.post(COMPLETIONS, {"prompt": [[5, 6], [7]]})
    assert [request.prompt_token_ids for request in api.backend.requests] == [(5, 6), (7,)]


def test_request_ids_are_ours_and_never_repeat(api: Api) -> None:
    headers = {"x-request-id": "client-chosen"}
    for _ in range(3):
        api.post(COMPLETIONS, VALID[COMPLETIONS], headers=headers)
    ids = {request.request_id for request in api.backend.requests}
    assert len(ids) == 3
    assert not any("client-chosen" in request_id for request_id in ids)


def test_what_no_body_can_set_is_left_alone(api: Api) -> None:
    request = api.sent(CHAT, VALID[CHAT])
    assert request.request_id.startswith("chatcmpl-")
    untouched = GenerateRequest("", "", (), request.sampling)
    for name in ("output_token_ids", "tenant", "priority", "deadline", "grammar", "delivery"):
        assert getattr(request, name) == getattr(untouched, name)


def test_a_long_text_is_encoded_like_a_short_one(api: Api) -> None:
    api.backend.infos = [type(api.backend.infos[0])(**_fields(api, max_model_len=100_000))]
    text = "a star " * 3_000
    request = api.sent(GENERATE, {"prompt": text})
    assert request.prompt_token_ids == tuple(TOKENIZER.encode(text))


def _fields(api: Api, **changes: Any) -> dict[str, Any]:
    info = api.backend.infos[0]
    return {name: getattr(info, name) for name in info.__dataclass_fields__} | changes


def test_noise_is_listed_and_harmless_values_pass(api: Api) -> None:
    body = VALID[CHAT] | {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "tools": None,
        "tool_choice": "auto",
        "response_format": {"type": "text"},
    }
    response = api.post(CHAT, body)
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-params"] == "user, metadata, store, service_tier"
    streamed = api.post(CHAT, body | {"stream": True})
    assert streamed.headers["x-ignored-params"] == response.headers["x-ignored-params"]
    assert "x-ignored-params" not in api.post(CHAT, VALID[CHAT]).headers


def test_messages_become_what_templates_read(api: Api) -> None:
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}],
        },
        {"role": "user", "content": "hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": "yo",
            "refusal": None,
            "tool_calls": [],
            "annotations": [],
        },
        {"role": "user", "content": "bye"},
    ]
    expected = rendered(
        [
            {"role": "system", "content": "Be\nkind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo"},
            {"role": "user", "content": "bye"},
        ]
    )
    assert api.sent(CHAT, {"messages": messages}).prompt_token_ids == expected
