"""How full the server's batch was while it was measured, from its own `/metrics`.

Samples are kept as bytes while the clock runs. Knows our names and those of other servers.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from torchweave_ray.bench.load.http_client import HTTPFailure
from torchweave_ray.bench.load.targets import Target

INTERVAL_S = 0.5
NAMES = {
    "running": (
        "torchweave_requests_running",
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "llamacpp:requests_processing",
    ),
    "waiting": (
        "torchweave_requests_waiting",
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "llamacpp:requests_deferred",
    ),
}
"""Gauges by what they say; the first one that a server has counts."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """One entry a sample: seconds since the measurement began, and the sums over replicas."""

    at_s: tuple[float, ...]
    running: tuple[float, ...]
    waiting: tuple[float, ...]


class OccupancyWatch:
    """`async with`: samples the target's server until it is left, and then once more, so that short
    work has a sample, too. Then `read()`."""

    def __init__(self, target: Target) -> None:
        self._path = urlsplit(target.url).path.rstrip("/") + "/metrics"
        self._connection = target.connect()
        self._samples: list[tuple[float, bytes]] = []
        self._started = 0.0
        self._left = asyncio.Event()

    async def __aenter__(self) -> OccupancyWatch:
        self._started = time.perf_counter()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._left.set()
        await asyncio.gather(self._task, return_exceptions=True)
        self._connection.close()

    def read(self) -> Occupancy | None:
        """None: the server has no such metrics."""
        found = [(at, _sums(text.decode())) for at, text in self._samples]
        good = [(at, sums) for at, sums in found if "running" in sums]
        if not good:
            return None
        return Occupancy(
            tuple(round(at - self._started, 2) for at, _ in good),
            tuple(sums["running"] for _, sums in good),
            tuple(sums.get("waiting", 0.0) for _, sums in good),
        )

    async def _sample(self) -> None:
        while True:
            is_last = self._left.is_set()
            if not await self._take() or is_last:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), INTERVAL_S)

    async def _take(self) -> bool:
        """False: there is none to be had."""
        try:
            async with asyncio.timeout(5):
                exchange = await self._connection.request("GET", self._path)
        except (HTTPFailure, TimeoutError):
            return False
        if exchange.status == 200:
            self._samples.append((exchange.ended_at, exchange.body))
        return exchange.status == 200


def _sums(text: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return {
        what: totals[next(name for name in names if name in totals)]
        for what, names in NAMES.items()
        if any(name in totals for name in names)
    }
