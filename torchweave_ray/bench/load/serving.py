"""The closed-loop benchmark: c clients, each sends its next request when the last one is answered.

Works against any OpenAI-compatible address and the native endpoints. Reading and counting happen
after the clock has stopped. Knows nothing of the engine: the server is another process.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchweave_ray.bench.load.dialects import Prompt
from torchweave_ray.bench.load.http_client import Connection, Exchange
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.load.targets import BenchmarkError, Failure, Target, read, send
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.report.points import Point, RequestRecord, summarize


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
