"""Two questions that a closed loop does not ask: what a shared prefix saves, and what a long
prompt costs everybody else. Both end in points and in ratios to an idle server.

Works against any OpenAI-compatible address. Knows nothing of the engine.
"""

from __future__ import annotations

import asyncio
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from torchweave_ray.bench.load.dialects import Prompt
from torchweave_ray.bench.load.http_client import Exchange
from torchweave_ray.bench.load.prompts import PromptSource, joined
from torchweave_ray.bench.load.targets import BenchmarkError, Failure, Target, read, send
from torchweave_ray.bench.report.points import Point, RequestRecord, summarize

FIRST_CHUNKS = 4
"""A stream runs once so many pieces of it have arrived."""
POLL_S = 0.005
ARRIVES_AFTER = 0.25
"""The short request comes after this share of the long prompt's own TTFT."""


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """`rounds` pairs of requests that share `prefix_len` tokens, each with `input_len` fresh."""

    prefix_len: int = 1000
    input_len: int = 64
    output_len: int = 8
    rounds: int = 5
    seed: int = 0
    timeout_s: float = 600.0
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class InterferenceConfig:
    """`streams` requests run, a long prompt arrives, and while it is computed a short one does."""

    long_len: int = 4000
    input_len: int = 100
    """Of the short request and of the streams."""
    output_len: int = 128
    """Of the idle requests; streams are as long as the long prompt takes."""
    streams: int = 4
    rounds: int = 3
    seed: int = 0
    timeout_s: float = 600.0
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    points: tuple[Point, ...]
    ratios: dict[str, float]


async def measure_prefix(target: Target, config: PrefixConfig) -> Outcome:
    """Each prefix is asked for twice: first it is computed, then it is in the cache."""
    prefixes = PromptSource(config.prefix_len, config.seed, config.tokenizer)
    fresh = PromptSource(config.input_len, config.seed + 1, config.tokenizer)
    client = _Client(target, config.timeout_s)
    await client.ask(fresh.next_prompt(), config.output_len)  # connections, lazy set-up
    records: dict[str, list[RequestRecord]] = {"uncached": [], "cached": []}
    for _ in range(config.rounds):
        prefix = prefixes.next_prompt()
        for found in records.values():
            prompt = joined(prefix, fresh.next_prompt())
            found.append(await client.ask(prompt, config.output_len))
    client.close()
    points = tuple(_point(name, 1, found) for name, found in records.items())
    uncached, cached = (_ttft(point) for point in points)
    return Outcome(points, {"ttft_cached_over_uncached": cached / uncached})


async def measure_interference(target: Target, config: InterferenceConfig) -> Outcome:
    """Raises BenchmarkError where the long prompt was done before the short request came."""
    short = PromptSource(config.input_len, config.seed, config.tokenizer)
    long = PromptSource(config.long_len, config.seed + 1, config.tokenizer)
    client = _Client(target, config.timeout_s)
    await client.ask(short.next_prompt(), 8)
    work = [short.next_prompt() for _ in range(config.rounds + 2)]
    idle = _point("idle", 1, [await client.ask(prompt, config.output_len) for prompt in work])
    alone = _point("long alone", 1, [await client.ask(long.next_prompt(), 1)])
    client.close()
    assert idle.itl_ms is not None
    rounds = []
    for _ in range(config.rounds):
        num_tokens = FIRST_CHUNKS + math.ceil(1.5 * _ttft(alone) / idle.itl_ms.mean)
        streams = [(short.next_prompt(), num_tokens) for _ in range(config.streams)]
        delay_s = ARRIVES_AFTER * _ttft(alone) / 1e3
        rounds.append(
            await _round(
                target, config, streams, (long.next_prompt(), short.next_prompt()), delay_s
            )
        )
    streams_at_work = [clipped for r in rounds for clipped in r.streams]
    points = (
        idle,
        alone,
        _point("short meanwhile", config.streams + 2, [r.short for r in rounds]),
        _point("long", config.streams + 2, [r.long for r in rounds]),
        _point("streams meanwhile", config.streams + 2, streams_at_work),
    )
    worst = median(max(map(_itl_p99, r.streams)) for r in rounds)
    ratios = {
        "ttft_meanwhile_over_idle": _ttft(points[2]) / _ttft(idle),
        "itl_p99_meanwhile_over_idle": worst / idle.itl_ms.p99,
    }
    return Outcome(points, ratios)


@dataclass(frozen=True, slots=True)
class _Round:
    long: RequestRecord
    short: RequestRecord
    streams: tuple[RequestRecord, ...]
    """Cut to the time that the long prompt took."""


async def _round(
    target: Target,
    config: InterferenceConfig,
    streams: Sequence[tuple[Prompt, int]],
    prompts: tuple[Prompt, Prompt],
    delay_s: float,
) -> _Round:
    """`prompts`: the long one and the short one."""
    running = [_Client(target, config.timeout_s) for _ in streams]
    others = [_Client(target, config.timeout_s) for _ in prompts]
    tasks = [
        asyncio.create_task(client.exchange(prompt, num_tokens))
        for client, (prompt, num_tokens) in zip(running, streams, strict=True)
    ]
    while any(
        c.num_chunks < FIRST_CHUNKS and not t.done() for c, t in zip(running, tasks, strict=True)
    ):
        await asyncio.sleep(POLL_S)
    long_task = asyncio.create_task(others[0].exchange(prompts[0], 1))
    await asyncio.sleep(delay_s)
    outcomes = [await others[1].exchange(prompts[1], 8), await long_task]
    outcomes += await asyncio.gather(*tasks)
    for client in (*running, *others):
        client.close()
    short, long, *stream_records = (_good(target, outcome) for outcome in outcomes)
    if short.sent_at >= long.text_times[0]:
        raise BenchmarkError("the long prompt was done before the short one arrived: take longer")
    window = (long.sent_at, long.text_times[0])
    return _Round(long, short, tuple(_clip(record, window) for record in stream_records))


class _Client:
    """One connection to the target."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._connection = target.connect()
        self.close = self._connection.close

    @property
    def num_chunks(self) -> int:
        return self._connection.num_chunks

    async def exchange(self, prompt: Prompt, output_len: int) -> Exchange | Failure:
        body = json.dumps(self._target.dialect.body([prompt], output_len)).encode()
        return await send(self._target, self._connection, body, self._timeout_s)

    async def ask(self, prompt: Prompt, output_len: int) -> RequestRecord:
        """Raises BenchmarkError with the reason when it is not answered with text."""
        return _good(self._target, await self.exchange(prompt, output_len))


def _good(target: Target, outcome: Exchange | Failure) -> RequestRecord:
    record = read(target, outcome)
    if record.error is not None or not record.text_times:
        raise BenchmarkError(f"{target.name} at {target.url}: {record.error or 'no text'}")
    return record


def _clip(record: RequestRecord, window: tuple[float, float]) -> RequestRecord:
    """With the arrivals of the window and the one on either side: gaps that reach into it."""
    first = bisect_left(record.text_times, window[0])
    end = bisect_right(record.text_times, window[1])
    return replace(record, text_times=record.text_times[max(0, first - 1) : end + 1])


def _itl_p99(record: RequestRecord) -> float:
    point = _point("stream", 1, [record])
    if point.itl_ms is None:
        raise BenchmarkError("a stream ended before the long prompt arrived")
    return point.itl_ms.p99


def _point(name: str, concurrency: int, records: Sequence[RequestRecord]) -> Point:
    wall_s = sum(r.ended_at - r.sent_at for r in records)
    return summarize(name, concurrency, records, wall_s)


def _ttft(point: Point) -> float:
    assert point.ttft_ms is not None
    return point.ttft_ms.p50
