"""Every limit of a call, through the HTTP app: what is over it is an error that names it, and what
is at it passes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Api, Server
from tests.fakes import Script
from tests.overload.server import connect, until
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import ConfigError

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def nested(levels: int) -> Any:
    schema: Any = {"type": "object"}
    for _ in range(levels // 2):
        schema = {"properties": {"a": schema}}
    return schema


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# (setting, its value, path, a body at the limit, a body over it, status, param)
LIMITS = [
    ("max_body_bytes", 200, COMPLETION, {"prompt": "a"}, {"prompt": "a" * 200}, 413, None),
    (
        "max_json_depth",
        10,
        CHAT,
        {"messages": MESSAGES, "response_format": format_of(nested(6))},
        {"messages": MESSAGES, "response_format": format_of(nested(8))},
        400,
        "response_format",
    ),
    (
        "max_prompt_tokens",
        3,
        COMPLETION,
        {"prompt": [5, 6, 7]},
        {"prompt": [[5], [5, 6, 7, 8]]},
        400,
        "prompt",
    ),
    ("max_choices", 4, COMPLETION, {"prompt": "a", "n": 4}, {"prompt": "a", "n": 5}, 400, "n"),
    (
        "max_choices",
        4,
        COMPLETION,
        {"prompt": ["a"] * 4},
        {"prompt": ["a"] * 5},
        400,
        "prompt",
    ),
    (
        "max_stop_strings",
        2,
        COMPLETION,
        {"prompt": "a", "stop": ["x", "y"]},
        {"prompt": "a", "stop": ["x", "y", "z"]},
        400,
        "stop",
    ),
    (
        "max_logit_bias",
        2,
        COMPLETION,
        {"prompt": "a", "logit_bias": {"5": 1, "6": 1}},
        {"prompt": "a", "logit_bias": {"5": 1, "6": 1, "7": 1}},
        400,
        "logit_bias",
    ),
    (
        "max_logit_bias",
        2,
        "/v1/generate",
        {"prompt": "a", "stop_token_ids": [5, 6]},
        {"prompt": "a", "stop_token_ids": [5, 6, 7]},
        400,
        "stop_token_ids",
    ),
    (
        "max_grammar_chars",
        60,
        CHAT,
        {"messages": MESSAGES, "response_format": format_of({"type": "object"})},
        {"messages": MESSAGES, "response_format": format_of({"enum": ["x" * 60]})},
        400,
        "response_format",
    ),
]


@pytest.mark.parametrize(
    ("setting", "value", "path", "fits", "exceeds", "status", "param"),
    LIMITS,
    ids=[f"{row[0]}-{row[6]}" for row in LIMITS],
)
def test_a_limit_of_a_call(
    api: Api,
    setting: str,
    value: int,
    path: str,
    fits: Any,
    exceeds: Any,
    status: int,
    param: str | None,
) -> None:
    api.configure(**{setting: value})
    passed = api.post(path, fits)
    assert passed.status_code == 200, passed.text
    api.backend.requests.clear()
    refused = api.post(path, exceeds)
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert str(value) in error["message"]
    assert error["param"] == param
    assert not api.backend.requests


def test_headers(api: Api) -> None:
    api.configure(max_header_bytes=2000)
    assert api.get("/v1/models", headers={"x-filler": "a" * 1700}).status_code == 200
    for headers, path in (({"x-filler": "a" * 2000}, "/v1/models"), ({}, "/?" + "a" * 2000)):
        refused = api.get(path, headers=headers)
        assert refused.status_code == 431
        assert refused.json()["error"]["code"] == "headers_too_large"
    refused = api.post("/v1/messages", {}, headers={"x-filler": "a" * 2000})
    assert refused.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_choices", 0), ("max_stop_strings", 17), ("body_timeout_s", 0.0), ("max_choices", 129)],
)
def test_a_limit_that_cannot_be_is_refused_at_start(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"api\.{setting} must be"):
        ApiSettings(**{setting: value})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    with Server("critical", body_timeout_s=0.2, write_timeout_s=0.4) as server:
        yield server


def head_of(length: int) -> bytes:
    return f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_body_that_does_not_come(impatient: Server) -> None:
    with connect(impatient.port) as connection:
        connection.sendall(head_of(100) + b'{"prompt": ')
        answer = connection.recv(4096)
    assert b"408" in answer.split(b"\r\n")[0]
    assert b"body_timeout" in answer


def test_a_client_that_stops_reading_is_let_go(impatient: Server) -> None:
    """Its request is aborted, though the engine would have had more to say."""
    impatient.backend.script = Script(["word " * 4000] * 500)
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    with connect(impatient.port, receive_buffer=4096) as connection:
        connection.sendall(head_of(len(body)) + body)
        assert connection.recv(100)
        until(lambda: bool(impatient.backend.aborted), 20)


def test_a_slow_engine_is_no_slow_client(impatient: Server) -> None:
    """What counts is the client's time, not the time between tokens."""
    gate = asyncio.Event()
    impatient.backend.script = Script(gates={1: gate})
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    with connect(impatient.port) as connection:
        connection.sendall(head_of(len(body)) + body)
        assert connection.recv(4096)
        time.sleep(1.0)  # more than twice the patience
        gate._loop.call_soon_threadsafe(gate.set)  # type: ignore[attr-defined]
        text = b""
        while b"[DONE]" not in text:
            text += connection.recv(4096)


def test_each_limit_has_a_row_in_operations() -> None:
    page = Path(__file__).parents[3].joinpath("docs/operations.md").read_text()
    table = page.split("### Limits")[1].split("###")[0]
    tested = {row[0] for row in LIMITS} | {
        "max_header_bytes",
        "body_timeout_s",
        "write_timeout_s",
    }
    for field in fields(ApiSettings):
        if field.name.startswith("max_") and field.name != "max_new_tokens":
            assert f"`api.{field.name}`" in table, field.name
            assert field.name in tested
    for name in tested:
        assert f"`api.{name}`" in table, name
