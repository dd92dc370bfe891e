"""The endpoints that are measured, and one request to one of them. Knows no schedule."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torchweave_ray.bench.load.dialects import (
    BadAnswer,
    Chat,
    Completions,
    Dialect,
    Native,
    NativeUnbatched,
)
from torchweave_ray.bench.load.http_client import Connection, Exchange, HTTPFailure
from torchweave_ray.bench.report.points import RequestRecord
from torchweave_ray.errors import TorchWeaveError

T = TypeVar("T")

ENDPOINTS = ("completions", "chat")


class BenchmarkError(TorchWeaveError):
    """The benchmark cannot run: no server, no model, nothing to measure."""


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint to measure. `name` is its line in the report."""

    name: str
    url: str
    dialect: Dialect
    api_key: str | None = field(default=None, repr=False)

    def connect(self) -> Connection:
        return Connection(self.url, authorization(self.api_key))


def authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where it is installed: it takes a third off what the client costs."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def native_target(name: str, url: str, api_key: str | None = None) -> Target:
    """A full address of /v1/generate or /v1/generate_nobatch, as the predecessor's flags give."""
    path = urlsplit(url).path or "/"
    dialect = NativeUnbatched(path) if path.endswith("_nobatch") else Native(path)
    return Target(name, url, dialect, api_key)


async def openai_target(
    url: str,
    endpoint: str,
    model: str | None,
    api_key: str | None = None,
    name: str | None = None,
) -> Target:
    """`url` with or without /v1; the model is the server's first unless it is given.

    Raises BenchmarkError.
    """
    base = url.rstrip("/").removesuffix("/v1")
    prefix = urlsplit(base).path
    model = model or await _first_model(base, f"{prefix}/v1/models", api_key)
    dialect: Dialect
    if endpoint == "chat":
        dialect = Chat(model, f"{prefix}/v1/chat/completions")
    else:
        dialect = Completions(model, f"{prefix}/v1/completions")
    return Target(name or endpoint, base, dialect, api_key)


async def _first_model(base: str, path: str, api_key: str | None) -> str:
    connection = Connection(base, authorization(api_key))
    try:
        async with asyncio.timeout(10):
            exchange = await connection.request("GET", path)
        if exchange.status in (401, 403):
            raise BenchmarkError(f"{base} wants an API key: --api-key, or TORCHWEAVE_API_KEY")
        return str(json.loads(exchange.body)["data"][0]["id"])
    except (HTTPFailure, TimeoutError) as error:
        raise BenchmarkError(f"no server at {base}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchmarkError(f"{base}{path} lists no model; name one with --model") from error
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without an answer."""

    sent_at: float
    ended_at: float
    reason: str


async def send(
    target: Target, connection: Connection, body: bytes, timeout_s: float
) -> Exchange | Failure:
    """One request, timed; `read` it when the clock has stopped."""
    sent_at = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            return await connection.request("POST", target.dialect.path, body)
    except (HTTPFailure, TimeoutError) as error:
        reason = str(error) or f"no answer in {timeout_s:g} s"
        return Failure(sent_at, time.perf_counter(), reason)


def read(target: Target, outcome: Exchange | Failure, due_at: float | None = None) -> RequestRecord:
    """`due_at`: when it should have been sent, where a schedule said so."""
    if isinstance(outcome, Failure):
        return RequestRecord(outcome.sent_at, outcome.ended_at, error=outcome.reason, due_at=due_at)
    try:
        answer = target.dialect.read(outcome)
    except BadAnswer as error:
        return RequestRecord(outcome.sent_at, outcome.ended_at, error=str(error), due_at=due_at)
    return RequestRecord(
        outcome.sent_at,
        outcome.ended_at,
        answer.text_times,
        answer.prompt_tokens,
        answer.output_tokens,
        answer.cached_tokens,
        due_at=due_at,
    )
