"""The endpoints that are measured, and one request to one of them. Knows no schedule."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass
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


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where it is installed: it takes a third off what the client costs."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def native_target(name: str, url: str) -> Target:
    """A full address of /v1/generate or /v1/generate_nobatch, as the predecessor's flags give."""
    path = urlsplit(url).path or "/"
    dialect = NativeUnbatched(path) if path.endswith("_nobatch") else Native(path)
    return Target(name, url, dialect)


async def openai_target(url: str, endpoint: str, model: str | None) -> Target:
    """`url` with or without /v1; the model is the server's first unless it is named."""
    base = url.rstrip("/").removesuffix("/v1")
    prefix = urlsplit(base).path
    name = model or await _first_model(base, f"{prefix}/v1/models")
    if endpoint == "chat":
        return Target("chat", base, Chat(name, f"{prefix}/v1/chat/completions"))
    return Target("completions", base, Completions(name, f"{prefix}/v1/completions"))


async def _first_model(base: str, path: str) -> str:
    connection = Connection(base)
    try:
        async with asyncio.timeout(10):
            exchange = await connection.request("GET", path)
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


def read(target: Target, outcome: Exchange | Failure) -> RequestRecord:
    if isinstance(outcome, Failure):
        return RequestRecord(outcome.sent_at, outcome.ended_at, error=outcome.reason)
    try:
        answer = target.dialect.read(outcome)
    except BadAnswer as error:
        return RequestRecord(outcome.sent_at, outcome.ended_at, error=str(error))
    return RequestRecord(
        outcome.sent_at,
        outcome.ended_at,
        answer.text_times,
        answer.prompt_tokens,
        answer.output_tokens,
        answer.cached_tokens,
    )
