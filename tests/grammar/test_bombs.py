"""Grammar bombs while others stream on the real model: refused, and the streams keep their pace."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.smollm2 import staged_smollm2

pytestmark = [pytest.mark.ray, pytest.mark.weights, pytest.mark.slow]

STREAMS, TOKENS, ATTEMPTS = 3, 150, 3
MAX_FACTOR = 10.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _deep(levels: int) -> str:
    """A schema as text: Python's own JSON would not write it."""
    return '{"properties":{"a":' * levels + '{"type":"integer"}' + "}}" * levels


def _bombs(attempt: int) -> list[dict[str, Any]]:
    """Fresh ones each time: a refusal is remembered."""
    huge = {"enum": [f"{attempt}-{i}" for i in range(20_000)]}
    return [
        {"guided_json": {"type": "integer", "multipleOf": 999_979 - attempt, "maximum": 10**30}},
        {"guided_regex": f"(a?){{{4000 + attempt}}}(a|b|ab)*c{{{4000 + attempt}}}"},
        {"guided_json": _deep(900 + attempt)},
        {"guided_json": huge},
        {"guided_grammar": f'start: a{attempt}\na{attempt}: ("x" | "xx"){{1,99999}}\n'},
        {"guided_regex": f".*a.{{{3000 + attempt}}}"},
    ]


async def _gaps(client: httpx.AsyncClient, seed: int) -> list[float]:
    """Seconds between the chunks of one stream."""
    body = {"prompt": "Once upon a time", "stream": True, "seed": seed, "ignore_eos": True}
    times = []
    async with client.stream("POST", COMPLETIONS, json=body | {"max_tokens": TOKENS}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:])
                times.append(time.perf_counter())
    return [later - sooner for sooner, later in pairwise(times)]


async def _p99(client: httpx.AsyncClient) -> float:
    gaps = await asyncio.gather(*(_gaps(client, seed) for seed in range(STREAMS)))
    every = sorted(gap for each in gaps for gap in each)
    return every[len(every) * 99 // 100]


async def _bombard(client: httpx.AsyncClient, attempt: int, is_over: asyncio.Event) -> list[int]:
    """Statuses of bombs, two at a time, until the streams are over."""
    statuses: list[int] = []
    num = 0
    while not is_over.is_set():
        bombs = _bombs(1000 * attempt + num)
        num += 1
        for pair in zip(bombs[::2], bombs[1::2], strict=True):
            bodies = [
                {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **bomb}
                for bomb in pair
            ]
            answers = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
            statuses += [answer.status_code for answer in answers]
            if is_over.is_set():
                break
    return statuses


async def _measure(client: httpx.AsyncClient, attempt: int) -> tuple[float, float, list[int]]:
    """(p99 of the pace alone, p99 under bombs, the bombs' statuses)"""
    alone = await _p99(client)
    is_over = asyncio.Event()
    bombing = asyncio.create_task(_bombard(client, attempt, is_over))
    bombed = await _p99(client)
    is_over.set()
    return alone, bombed, await bombing


def test_streams_keep_their_pace() -> None:
    async def run(port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await _p99(client)  # warm
            for attempt in range(1, ATTEMPTS + 1):
                alone, bombed, statuses = await _measure(client, attempt)
                print(f"ITL p99 {1e3 * alone:.1f} ms alone, {1e3 * bombed:.1f} ms under bombs,")
                print(f"{len(statuses)} bombs, {statuses.count(400)} refused")
                assert set(statuses) <= {200, 400}
                assert statuses.count(400) >= 3
                if bombed < MAX_FACTOR * alone:
                    return
        raise AssertionError(f"{bombed:.3f} s between tokens under bombs, {alone:.3f} s without")

    port = cluster.free_port()
    model = {"id": "smollm2", "artifact": str(staged_smollm2()), "num_cpus": 1}
    with cluster.ray_cluster(num_cpus=3, port=port):
        deploy(config({"models": [model]}))
        client = Client(port)
        wait_until(lambda: client.get("/health")[0] == 200)
        asyncio.run(run(port))
