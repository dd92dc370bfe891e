"""A real server under several times what it can do: goodput, refusals, and whether Retry-After is
right. Starts `torchweave serve` with a short queue; all options are of `overload.py --help`.

Capacity is what a closed loop gets. Then arrivals that no answer holds up, at three times that;
what ends in time is goodput. Retry-After is right if the queue has room for the refused request so
long after, when nobody else comes: the load is stopped, and the request sent again and again.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from torchweave_ray.bench.load.dialects import BadAnswer, Completions
from torchweave_ray.bench.load.http_client import Connection, HTTPFailure
from torchweave_ray.bench.load.loops import poisson_arrivals
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.load.targets import run_in_loop
from torchweave_ray.bench.origin import save_results
from torchweave_ray.bench.server_process import application_file, started_server

PATH = "/v1/completions"
MODEL = "overloaded"
IN_TIME_S = 10.0
"""A first token later than that is for a client that has left."""
POLL_S = 0.05
PROBES = (400, 800, 1200, 1500, 400, 800, 1200, 1500)
"""Prompts that are refused; the shortest that takes a second is the least that the header says."""


@dataclass(frozen=True, slots=True)
class Load:
    factor: float = 3.0
    seconds: float = 120.0
    capacity_s: float = 60.0
    clients: int = 48
    """Of the closed loop."""
    prompt_len: int = 100
    output_lens: tuple[int, int] = (64, 192)
    """From and to, evenly: requests that all end at once would come in waves."""
    max_waiting_tokens: int = 1600
    """Of the server's queue: about two seconds of prompts."""
    surge_s: float = 8.0
    """Before each look at a Retry-After."""
    probe_lens: tuple[int, ...] = PROBES


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    due_at: float
    first_at: float
    ended_at: float
    num_tokens: int
    retry_s: float | None
    retry_ms: float | None

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.first_at - self.due_at <= IN_TIME_S


class Clients:
    """Connections that are used again, and prompts that no cache has."""

    def __init__(self, url: str, load: Load) -> None:
        self._url = url
        self._load = load
        self._idle: list[Connection] = []
        self._rng = random.Random(5)
        self._dialect = Completions(MODEL)
        self._words = {
            length: PromptSource(length, seed=length)
            for length in {load.prompt_len, *load.probe_lens}
        }

    def body(self, num_prompt: int, num_output: int | None = None) -> bytes:
        num_output = num_output or self._rng.randint(*self._load.output_lens)
        return json.dumps(
            self._dialect.body([self._words[num_prompt].next_prompt()], num_output)
        ).encode()

    async def ask(self, body: bytes, due_at: float | None = None) -> Answer:
        connection = self._idle.pop() if self._idle else Connection(self._url)
        began = time.perf_counter() if due_at is None else due_at
        try:
            exchange = await connection.request("POST", PATH, body)
        except HTTPFailure:
            now = time.perf_counter()
            return Answer(0, began, now, now, 0, None, None)
        self._idle.append(connection)
        try:
            answer = self._dialect.read(exchange)
            first_at, num_tokens = answer.text_times[0], answer.output_tokens
        except BadAnswer:
            first_at, num_tokens = exchange.ended_at, 0
        said = (exchange.headers.get(name) for name in ("retry-after", "retry-after-ms"))
        seconds, milliseconds = (None if each is None else float(each) for each in said)
        return Answer(
            exchange.status, began, first_at, exchange.ended_at, num_tokens, seconds, milliseconds
        )


async def capacity_of(clients: Clients, load: Load) -> tuple[float, float]:
    """Requests and tokens a second of a closed loop."""
    warm_s = load.capacity_s / 2  # the first requests begin together, and nothing ends for long
    started = time.perf_counter()
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < started + load.capacity_s:
            answers.append(await clients.ask(clients.body(load.prompt_len)))
            if answers[-1].status == 429:
                await asyncio.sleep(0.1)

    await _cancelled_after(load.capacity_s, [client() for _ in range(load.clients)])
    window = started + warm_s, started + load.capacity_s
    return _rates(answers, *window)


async def surge(
    clients: Clients, load: Load, rate: float, seconds: float, seed: int
) -> tuple[list[Answer], list[asyncio.Task[None]]]:
    """What was answered meanwhile, and what is still under way."""
    answers: list[Answer] = []
    tasks: list[asyncio.Task[None]] = []

    async def arrive(due_at: float) -> None:
        answers.append(await clients.ask(clients.body(load.prompt_len), due_at))

    started = time.perf_counter()
    for offset in poisson_arrivals(rate, round(rate * seconds), seed):
        await asyncio.sleep(max(0.0, started + offset - time.perf_counter()))
        tasks.append(asyncio.create_task(arrive(started + offset)))
    return answers, [task for task in tasks if not task.done()]


async def retry_after(clients: Clients, num_prompt: int) -> dict[str, float] | None:
    """Of a request that is refused now: what was said, and when there was room. None: it was let
    in at once."""
    body = clients.body(num_prompt, 1)
    refused = await clients.ask(body)
    if refused.status != 429 or refused.retry_s is None:
        return None
    at = refused.ended_at
    while True:
        sent_at = time.perf_counter()
        if (await clients.ask(body)).status == 200:
            break
        await asyncio.sleep(POLL_S)
    said_s = refused.retry_s if refused.retry_ms is None else refused.retry_ms / 1e3
    found = {"prompt_len": num_prompt, "header_s": refused.retry_s, "said_s": said_s}
    return found | {"room_after_s": round(sent_at - at, 3)}


async def measure(url: str, load: Load) -> list[dict[str, Any]]:
    clients = Clients(url, load)
    requests_s, tokens_s = await capacity_of(clients, load)
    points: list[dict[str, Any]] = [
        {"what": "capacity", "requests_s": round(requests_s, 2), "tokens_s": round(tokens_s, 1)}
    ]
    print(json.dumps(points[-1]), flush=True)
    rate = load.factor * requests_s
    started = time.perf_counter()
    answers, left = await surge(clients, load, rate, load.seconds, seed=1)
    points.append(_overload(answers, started, load, tokens_s))
    print(json.dumps(points[-1]), flush=True)
    looks = []
    for number, num_prompt in enumerate(load.probe_lens):
        if number:
            _, left = await surge(clients, load, rate, load.surge_s, seed=1 + number)
        if (look := await retry_after(clients, num_prompt)) is not None:
            looks.append(look)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.sleep(1.0)
    points.append({"what": "retry after", "looks": looks, **_rightness(looks)})
    print(json.dumps(points[-1]), flush=True)
    return points


def _overload(
    answers: Sequence[Answer], started: float, load: Load, tokens_s: float
) -> dict[str, Any]:
    warm_s = min(10.0, load.seconds / 3)
    _, good_s = _rates([a for a in answers if a.is_good], started + warm_s, started + load.seconds)
    refused_ms = sorted(1e3 * (a.ended_at - a.due_at) for a in answers if a.status == 429)
    ttft_ms = sorted(1e3 * (a.first_at - a.due_at) for a in answers if a.status == 200)
    others = [a.status for a in answers if a.status not in (200, 429)]
    return {
        "what": f"{load.factor:g} times that",
        "goodput_tokens_s": round(good_s, 1),
        "goodput_share": round(good_s / tokens_s, 3),
        "served": len(ttft_ms),
        "ttft_p50_ms": round(_percentile(ttft_ms, 50), 1),
        "ttft_p99_ms": round(_percentile(ttft_ms, 99), 1),
        "refused": len(refused_ms),
        "refused_p50_ms": round(_percentile(refused_ms, 50), 1),
        "refused_p99_ms": round(_percentile(refused_ms, 99), 1),
        "refused_max_ms": round(max(refused_ms, default=0.0), 1),
        "within_100_ms": round(sum(ms <= 100 for ms in refused_ms) / max(1, len(refused_ms)), 4),
        "other_statuses": {str(status): others.count(status) for status in sorted(set(others))},
    }


def _rightness(looks: Sequence[dict[str, float]]) -> dict[str, Any]:
    ratios = [look["said_s"] / max(look["room_after_s"], 1e-3) for look in looks]
    if not ratios:
        return {"within_factor_2": None}
    return {
        "median_ratio": round(statistics.median(ratios), 2),
        "within_factor_2": f"{sum(0.5 <= ratio <= 2 for ratio in ratios)} of {len(ratios)}",
    }


def _rates(answers: Sequence[Answer], start: float, end: float) -> tuple[float, float]:
    """Requests and tokens a second of those that ended well within the window."""
    ended = [a for a in answers if a.status == 200 and start <= a.ended_at <= end]
    return len(ended) / (end - start), sum(a.num_tokens for a in ended) / (end - start)


def _percentile(values: Sequence[float], percent: int) -> float:
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


async def _cancelled_after(seconds: float, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.create_task(each) for each in work]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run(recipe: str, load: Load) -> list[dict[str, Any]]:
    scheduler = {"max_waiting_tokens": load.max_waiting_tokens}
    model = {"id": MODEL, "recipe": recipe, "engine": {"scheduler": scheduler}}
    with tempfile.TemporaryDirectory() as folder:
        config = application_file(Path(folder), {"models": [model]})
        with started_server([str(config), "--no-dashboard"]) as server:
            return run_in_loop(measure(server.url, load))


def main(
    recipe: str = "smollm2-135m",
    seconds: Annotated[float, typer.Option(min=5)] = 120.0,
    factor: Annotated[float, typer.Option(min=1.5)] = 3.0,
    capacity_s: Annotated[float, typer.Option(min=5)] = 60.0,
    looks: Annotated[int, typer.Option(help="At Retry-After.", min=0)] = len(PROBES),
    save: bool = False,
) -> None:
    """One JSON line for each part."""
    load = Load(factor, seconds, capacity_s, probe_lens=PROBES[:looks])
    points = run(recipe, load)
    if save:
        config = {"recipe": recipe, **asdict(load)}
        print(save_results("overload", config, points))


if __name__ == "__main__":
    typer.run(main)
