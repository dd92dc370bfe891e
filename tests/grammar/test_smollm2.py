"""The real model under grammars, through the HTTP API in one process: what it says is valid."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import jsonschema
import pytest

from tests.grammar.schemas import max_bytes, random_schema
from tests.smollm2 import staged_smollm2
from torchweave_ray.batch.local import local_app
from torchweave_ray.config import EngineConfig

pytestmark = pytest.mark.weights
FEW, MANY = 12, 200
LONGEST = 4000
CONTEXT = 4200


def _with_client(act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        config = EngineConfig.from_dict({"max_model_len": CONTEXT})
        async with (
            local_app(staged_smollm2(), config) as app,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://test", timeout=None
            ) as client,
        ):
            await act(client)

    asyncio.run(run())


async def _ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=_body(body))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def _ask_streamed(client: httpx.AsyncClient, **body: Any) -> tuple[str, str]:
    """(text, finish reason), joined from the events."""
    text, reason = "", ""
    response = await client.post("/v1/chat/completions", json={**_body(body), "stream": True})
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
    return text, reason


def _body(body: dict[str, Any]) -> dict[str, Any]:
    question = {"role": "user", "content": "Describe a person in JSON."}
    return {"messages": [question], "max_tokens": 200, "seed": 7, **body}


async def _check_schema(client: httpx.AsyncClient, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    while max_bytes(schema) > LONGEST:
        schema = random_schema(rng)
    body = {
        "seed": seed,
        "max_tokens": LONGEST,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    }
    (choice,) = (await _ask(client, **body))["choices"]
    text = choice["message"]["content"]
    assert choice["finish_reason"] == "stop", (schema, text)
    jsonschema.validate(json.loads(text), schema)
    assert await _ask_streamed(client, **body) == (text, "stop"), schema


async def _check_schemas(client: httpx.AsyncClient, seeds: range) -> None:
    together = asyncio.Semaphore(16)

    async def one(seed: int) -> None:
        async with together:
            await _check_schema(client, seed)

    await asyncio.gather(*(one(seed) for seed in seeds))


def test_answers_validate() -> None:
    _with_client(lambda client: _check_schemas(client, range(FEW)))


@pytest.mark.slow
def test_answers_to_many_schemas_validate() -> None:
    _with_client(lambda client: _check_schemas(client, range(FEW, FEW + MANY)))


def test_every_kind_of_grammar() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        async def said(**body: Any) -> str:
            (choice,) = (await _ask(client, **body))["choices"]
            assert choice["finish_reason"] == "stop"
            text: str = choice["message"]["content"]
            return text

        choices = ["Ja, bitte", "Nein \u2013 nie", 'so "so"']
        assert await said(structured_outputs={"choice": choices}) in choices
        assert await said(guided_choice=choices, ignore_eos=False) in choices
        assert re.fullmatch("[0-9]{4}-(a|b)+x", await said(guided_regex="[0-9]{4}-(a|b){1,9}x"))
        lark = 'start: greeting " " NAME "!"\ngreeting: "Hi" | "Ho"\nNAME: /[A-Z][a-z]{1,8}/\n'
        said_lark = await said(structured_outputs={"grammar": lark})
        assert re.fullmatch(r"H[io] [A-Z][a-z]{1,8}!", said_lark)
        gbnf = 'root ::= "a" digits\ndigits ::= [0-9] [0-9]? "." \n'
        assert re.fullmatch(r"a[0-9]{1,2}\.", await said(guided_grammar=gbnf))
        longer = await said(structured_outputs={"choice": ["no"]}, min_tokens=6)
        assert longer == "no", "min_tokens is filled up with end tokens"
        assert await said(guided_regex="(ab){1,50}", stop="bab") == "a"

    _with_client(act)


def test_choices_are_single_runs_with_following_seeds() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"enum": [1, 2, 3]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }

    async def act(client: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"guided_json": schema, "max_tokens": 300}
        together = await _ask(client, **body, n=4, seed=40)
        alone = [await _ask(client, **body, seed=40 + i) for i in range(4)]
        texts = [choice["message"]["content"] for choice in together["choices"]]
        assert texts == [answer["choices"][0]["message"]["content"] for answer in alone]
        assert len(set(texts)) > 1
        for text in texts:
            jsonschema.validate(json.loads(text), schema)

    _with_client(act)
