"""The limit of reasoning in each protocol: it reaches the engine, or the client is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.api.conftest import TOKENIZER, Api
from tests.api.templates import DEEPSEEK, LLAMA3, QWEN, QWEN_THINKING
from tests.fakes import MODEL

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"messages": MESSAGES}
MESSAGE: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8}
LIMIT = {"thinking_token_budget": 5}
TOOL = {"name": "f", "parameters": {"type": "object"}, "strict": True}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | LIMIT,
    "/v1/responses": {"input": "hi"} | LIMIT,
    "/v1/messages": MESSAGE | {"thinking": {"type": "enabled", "budget_tokens": 5}},
}


@pytest.mark.parametrize("path", ASKED)
def test_it_reaches_the_engine(api: Api, path: str) -> None:
    api.use_template(DEEPSEEK)  # its prompt ends within the reasoning
    begun = api.sent(path, ASKED[path]).sampling.thinking
    assert begun is not None
    assert (begun.max_tokens, begun.openers) == (5, ((),))
    assert begun.closers[0] == tuple(TOKENIZER.encode("</think>", False))
    api.use_template(QWEN_THINKING)
    opened = api.sent(path, ASKED[path]).sampling.thinking
    assert opened is not None
    assert tuple(TOKENIZER.encode("<think>\n", False)) in opened.openers
    assert () not in opened.openers
    for fields in ({"thinking_token_budget": None}, {"thinking": None}):
        if set(fields) & set(ASKED[path]):
            assert api.sent(path, ASKED[path] | fields).sampling.thinking is None


def test_a_tag_of_one_token_has_one_spelling(api: Api) -> None:
    api.backend.infos = [replace(MODEL, vocab_size=400)]
    api.use_template(DEEPSEEK, ["</think>"])
    thinking = api.sent("/v1/chat/completions", CHAT | LIMIT).sampling.thinking
    assert thinking is not None
    assert len(thinking.closers[0]) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_without_reasoning_it_is_refused(api: Api, path: str) -> None:
    body = ASKED.get(path, {"prompt": "hi"} | LIMIT)
    error = api.post(path, body).json()["error"]
    assert (error["param"], error["code"]) == ("thinking_token_budget", "unsupported_parameter")


@pytest.mark.parametrize("value", [-1, 1.5, "5", 2**31])
def test_its_range(api: Api, value: Any) -> None:
    api.use_template(DEEPSEEK)
    response = api.post("/v1/chat/completions", CHAT | {"thinking_token_budget": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "thinking_token_budget"


def test_anthropics_clients_are_told_that_it_changes_nothing(api: Api) -> None:
    response = api.post("/v1/messages", ASKED["/v1/messages"])
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "thinking.budget_tokens"
    api.use_template(QWEN_THINKING)
    off = MESSAGE | {"thinking": {"type": "disabled", "budget_tokens": 5}}
    response = api.post("/v1/messages", off)
    assert response.headers["x-ignored-params"] == "thinking.budget_tokens"


def test_an_answer_with_a_grammar_has_no_reasoning_to_limit(api: Api) -> None:
    api.use_template(QWEN_THINKING)
    body = CHAT | LIMIT | {"response_format": {"type": "json_object"}}
    assert api.sent("/v1/chat/completions", body).sampling.thinking is None


def test_strict_functions_that_are_not_enforced_are_listed(api: Api) -> None:
    body = {"input": "hi", "tools": [{"type": "function", **TOOL}]}
    for template, ignored in ((LLAMA3, "tools.strict"), (QWEN, None)):
        api.use_template(template)
        response = api.post("/v1/responses", body)
        assert response.status_code == 200, response.text
        assert response.headers.get("x-ignored-params") == ignored
