"""Calls of every endpoint that are nearly right, asked in process over the real engine on
EchoRunner: `python -m tests.fuzz.calls --num 20000`. No test in here.

Never a 5xx (but the 504 of a deadline that the call itself set), never a call without an end, and
nothing left in the engine. Some clients leave in the middle, some stop reading for a while.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import typer
from starlette.applications import Starlette

from tests.echo import EOS, EchoRunner, LetterDetokenizer
from tests.fakes import MODEL
from tests.fuzz.mutation import TEXTS, hostile, mutated, mutated_bytes
from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.tokenizer import Tokenizer

LIMITS = RuntimeLimits(512, 16, 2048, MODEL.vocab_size, (EOS,))
CLIENTS = 16
ANSWER_S = 20.0
"""A grammar may take a second of a busy processor, and others wait for it."""

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
SAMPLING = {
    **{"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["ab", "c"]},
    **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2},
    **{"logit_bias": {"5": 3, "7": -100}, "stop_token_ids": [3], "ignore_eos": True},
    **{"allowed_token_ids": [3, 4, 5, 6], "bad_words": ["a b"], "min_tokens": 1},
    **{"deadline_ms": 60_000},
}
OPENAI = {
    **SAMPLING,
    **{"model": "tiny", "max_tokens": 8, "n": 2, "stream": True, "priority": 1, "user": "u"},
    **{"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    **{"cache_salt": "s", "return_token_ids": True, "stream_interval": 2},
}
TALK = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
]
CHAT = {
    **OPENAI,
    **{"messages": TALK, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto"},
    **{"tools": [{"type": "function", "function": FUNCTION}], "parallel_tool_calls": False},
    **{"chat_template_kwargs": {"x": 1}, "max_completion_tokens": 8},
}
MESSAGES = {
    **{"model": "tiny", "max_tokens": 8, "system": [{"type": "text", "text": "x"}]},
    **{"stream": True, "stop_sequences": ["q"], "temperature": 0.1, "top_k": 3, "top_p": 0.5},
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}],
        },
    ],
    **{"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "auto"}},
    **{"thinking": {"type": "disabled"}, "metadata": {"user_id": "u"}},
}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/generate": [{"prompt": "hi", "max_new_tokens": 8, **SAMPLING}, {"prompt": "x"}],
    "/v1/generate_nobatch": [{"prompt": "hi", "max_new_tokens": 8, **SAMPLING}],
    "/v1/completions": [
        {"prompt": "hi", "logprobs": 2, "echo": True, **OPENAI},
        {"prompt": [[3, 4], [5]], "max_tokens": 5, "prompt_logprobs": 1, "best_of": 3},
        {"prompt": ["a", "b"], "guided_regex": "[ab]{1,3}", "max_tokens": 5},
    ],
    "/v1/chat/completions": [
        CHAT,
        {"messages": ASK, "max_tokens": 5},
        {"messages": ASK, "max_tokens": 5, "response_format": {"type": "json_object"}},
        {
            "messages": ASK,
            "max_tokens": 5,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
            },
        },
    ],
    "/v1/responses": [
        {
            "input": "hi",
            "instructions": "x",
            "max_output_tokens": 8,
            "stream": True,
            "store": False,
        },
        {"input": ASK, "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto"},
        {"input": ASK, "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
    ],
    "/v1/messages": [MESSAGES, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}],
    "/v1/messages/count_tokens": [{"messages": MESSAGES["messages"], "tools": MESSAGES["tools"]}],
    "/v1/embeddings": [{"input": ["a", "b"], "model": "tiny", "encoding_format": "base64"}],
    "/tokenize": [{"prompt": "hi", "add_special_tokens": True}, {"messages": ASK}],
    "/detokenize": [{"tokens": [1, 2, 299]}],
    "/render": [{"messages": TALK, "tools": CHAT["tools"]}],
}
GETS = ("/health", "/livez", "/metrics", "/model", "/v1/models", "/openapi.json", "/docs", "/")
HEADERS = (
    *("last-event-id", "x-request-id", "x-deadline-ms", "authorization", "x-api-key", "accept"),
    *("content-type", "content-length", "origin", "cookie", "x-forwarded-for", "host"),
    *("traceparent", "anthropic-version", "if-none-match", "range", "expect"),
)


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    leaves_after: int | None = None
    """Pieces of the answer, then the client is gone."""
    pause_s: float = 0.0
    """Before each piece is taken."""


def make_call(rng: random.Random) -> Call:
    path = rng.choice(list(BODIES))
    body = json.dumps(_mutated_body(rng.choice(BODIES[path]), rng)).encode()
    method = "POST"
    kind = rng.random()
    if kind < 0.08:
        body = mutated_bytes(body, rng, ())
    elif kind < 0.09:
        body = rng.choice((b"[" * 100_000, b"", b"null", b"\xff\xfe{}", body * 2, b"1e999999"))
    elif kind < 0.14:
        method, path, body = rng.choice(("GET", "HEAD", "OPTIONS", "DELETE")), rng.choice(GETS), b""
    elif kind < 0.2:
        method, path = rng.choice(("GET", "DELETE", "PUT", "POST")), _odd_path(rng)
    headers = [(b"content-type", b"application/json"), (b"host", b"test")]
    if rng.random() < 0.25:
        value = str(hostile(rng, ("0", "Bearer x", "*", "5-7", "text/plain")))[:9_000]
        name = rng.choice(HEADERS)
        headers.append((name.encode(), value.encode("utf-8", "replace").replace(b"\n", b"")))
    leaves_after = rng.randrange(4) if rng.random() < 0.2 else None
    pause_s = 0.01 if rng.random() < 0.02 else 0.0
    return Call(method, path, headers, body, leaves_after, pause_s)


class Fuzzed:
    """The API over an engine of its own."""

    def __init__(self, **settings: Any) -> None:
        engine = Engine(
            EchoRunner(LIMITS),
            LetterDetokenizer(),
            CacheConfig(),
            SchedulerConfig(max_num_seqs=16),
            MODEL.artifact_id,
        )
        self.engine = AsyncEngine(engine, replace(MODEL, max_model_len=LIMITS.max_model_len))
        backend = make_tokenizer()
        tokenizer = Tokenizer(backend, {"chat_template": CHAT_TEMPLATE}, (2,))

        async def load(model_id: str) -> Tokenizer:
            return tokenizer

        short: dict[str, Any] = {"max_new_tokens": 32, "stream_keep_s": 0.2}
        api = ApiSettings(**short | settings)
        self.app: Starlette = create_app(self.engine, load, api)

    def is_empty(self) -> bool:
        stats = self.engine.snapshot()
        idle = stats.num_running == stats.num_waiting == stats.num_waiting_tokens == 0
        return idle and stats.num_free_blocks == stats.num_blocks

    async def problem_of(self, call: Call) -> str | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                status, _ = await self.ask(call)
        except TimeoutError:
            return f"no answer in {ANSWER_S} s"
        except Exception as error:
            if call.leaves_after is not None and isinstance(error, OSError):
                return None
            return f"{type(error).__name__}: {error}"
        if status >= 500 and status != 504:
            return f"status {status}"
        return None if status or call.leaves_after is not None else "no answer at all"

    async def ask(self, call: Call) -> tuple[int, bytes]:
        """Status and body; status 0: there was none before the client left."""
        path, _, query = call.path.partition("?")
        scope = {
            **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}},
            **{"http_version": "1.1", "method": call.method, "scheme": "http", "root_path": ""},
            **{"path": path, "raw_path": quote(path).encode(), "query_string": query.encode()},
            **{"headers": call.headers, "client": ("1.2.3.4", 5), "server": ("test", 80)},
        }
        gone = asyncio.Event()
        status = num_pieces = 0
        content = b""
        has_body = False

        async def receive() -> dict[str, Any]:
            nonlocal has_body
            if not has_body:
                has_body = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal num_pieces, status, content
            status = message.get("status", status)
            content += message.get("body", b"")
            if call.pause_s:
                await asyncio.sleep(call.pause_s)
            num_pieces += 1
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last or (call.leaves_after is not None and num_pieces > call.leaves_after):
                gone.set()

        await self.app(scope, receive, send)
        return status, content


async def ask_all(seed: int, numbers: range, report: Callable[[str], None] = print) -> int:
    """Returns how many calls failed. A call depends on nothing but the seed and its number."""
    fuzzed = Fuzzed()
    fuzzed.engine.start()
    left = iter(numbers)
    num_failed = 0

    async def client() -> None:
        nonlocal num_failed
        for number in left:
            call = make_call(random.Random(f"calls {seed} {number}"))
            if (problem := await fuzzed.problem_of(call)) is not None:
                num_failed += 1
                shown = call.body[:400].decode(errors="replace")
                report(
                    f"--seed {seed} --only {number}: {problem}: {call.method} {call.path} {shown}"
                )

    try:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        deadline = time.monotonic() + 5.0  # streams that can be opened again are let go
        while not fuzzed.is_empty() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if not fuzzed.is_empty():
            num_failed += 1
            report(f"--seed {seed}: left in the engine: {fuzzed.engine.snapshot()}")
    finally:
        fuzzed.engine.close()
    return num_failed


def _mutated_body(body: dict[str, Any], rng: random.Random) -> Any:
    """A tenth of them right, so that there is always work; else some fields, and of those some
    changed."""
    if rng.random() < 0.1:
        return body
    if rng.random() < 0.6:
        keep = rng.random()
        needed = ("prompt", "messages", "input", "tokens")
        body = {k: v for k, v in body.items() if k in needed or rng.random() < keep}
    return mutated(body, rng)


def _odd_path(rng: random.Random) -> str:
    start = rng.choice(
        ("/v1/models/", "/v1/requests/", "/v1/streams/", "/playground/", "/", "/v1/")
    )
    return (start + rng.choice(TEXTS)).encode("utf-8", "replace").decode()


def main(seed: int = 0, num: int = 1000, only: int | None = None) -> None:
    numbers = range(num) if only is None else range(only, only + 1)
    if num_failed := asyncio.run(ask_all(seed, numbers)):
        raise SystemExit(f"{num_failed} of {len(numbers)} failed")
    print(f"{len(numbers)} calls")


if __name__ == "__main__":
    typer.run(main)
