"""The closed-loop benchmark: c clients, each sends its next request when the last one is answered.

Works against any OpenAI-compatible address and the native endpoints. Reading and counting happen
after the clock has stopped. Knows nothing of the engine: the server is another process.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torchweave_ray.bench.dialects import (
    BadAnswer,
    Chat,
    Completions,
    Dialect,
    Native,
    NativeUnbatched,
    Prompt,
)
from torchweave_ray.bench.http_client import Connection, Exchange, HTTPFailure
from torchweave_ray.bench.points import Point, RequestRecord, summarize
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.prompts import PromptSource
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


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """Work W1 of docs/performance.md unless said otherwise."""

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    requests: int | None = None
    """Requests of a point; None: three a client, at least eight."""
    input_len: int = 100
    output_len: int = 128
    warmup: int | None = None
    """Short requests before the clock starts; None: one a client."""
    seed: int = 0
    timeout_s: float = 600.0
    tokenizer: Path | None = None
    """tokenizer.json: prompts go as exactly `input_len` token ids."""
    cpu_of: tuple[int, ...] = ()
    """Process ids whose trees' CPU is counted."""

    def num_requests(self, concurrency: int) -> int:
        return self.requests if self.requests is not None else max(8, 3 * concurrency)


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


async def run_benchmark(
    targets: list[Target], config: ServingConfig, report: Callable[[Point], None]
) -> list[Point]:
    """Measure every target at every concurrency; `report` gets each point as it is done."""
    tree = ProcessTree(list(config.cpu_of)) if config.cpu_of else None
    points: list[Point] = []
    for target in targets:
        for concurrency in config.concurrency:
            # A new seed a point: a prompt seen before would be answered from the prefix cache.
            prompts = PromptSource(
                config.input_len, config.seed + 7919 * len(points), config.tokenizer
            )
            point = await _run_point(target, concurrency, config, prompts, tree)
            points.append(point)
            report(point)
    return points


async def _run_point(
    target: Target,
    concurrency: int,
    config: ServingConfig,
    prompts: PromptSource,
    tree: ProcessTree | None,
) -> Point:
    connections = [Connection(target.url) for _ in range(concurrency)]
    warmup = concurrency if config.warmup is None else config.warmup
    num_requests = config.num_requests(concurrency)
    try:
        short = min(8, config.output_len)
        warmed = await _closed_loop(
            target, connections, [prompts.next_prompt() for _ in range(warmup)], short, config
        )
        _refuse_if_all_failed(target, [read(target, outcome) for outcome in warmed])
        work = [prompts.next_prompt() for _ in range(num_requests)]
        server_cpu = tree.cpu_seconds() if tree else 0.0
        client_cpu = time.process_time()
        started = time.perf_counter()
        outcomes = await _closed_loop(target, connections, work, config.output_len, config)
        wall_s = time.perf_counter() - started
        client_cpu = time.process_time() - client_cpu
        server_cpu = tree.cpu_seconds() - server_cpu if tree else 0.0
    finally:
        for connection in connections:
            connection.close()
    records = [read(target, outcome) for outcome in outcomes]
    return summarize(
        target.name, concurrency, records, wall_s, client_cpu, server_cpu if tree else None
    )


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


async def _closed_loop(
    target: Target,
    connections: list[Connection],
    prompts: list[Prompt],
    output_len: int,
    config: ServingConfig,
) -> list[Exchange | Failure]:
    bodies = iter([json.dumps(target.dialect.body(p, output_len)).encode() for p in prompts])
    outcomes: list[Exchange | Failure] = []

    async def client(connection: Connection, work: Iterator[bytes]) -> None:
        for body in work:
            outcomes.append(await send(target, connection, body, config.timeout_s))

    await asyncio.gather(*(client(connection, bodies) for connection in connections))
    return outcomes


def _refuse_if_all_failed(target: Target, warmed: list[RequestRecord]) -> None:
    if warmed and all(r.error is not None for r in warmed):
        raise BenchmarkError(f"{target.name} at {target.url}: {warmed[0].error}")
