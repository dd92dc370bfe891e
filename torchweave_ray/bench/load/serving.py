"""The serving benchmark: every load on every target, in rounds that take turns.

Works against any OpenAI-compatible address and the native endpoints. Reading and counting happen
after the clock has stopped. Knows nothing of the engine: the server is another process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torchweave_ray.bench.load.http_client import Connection
from torchweave_ray.bench.load.loops import (
    closed_loop,
    open_loop,
    poisson_arrivals,
    prepare,
)
from torchweave_ray.bench.load.occupancy import Occupancy, OccupancyWatch
from torchweave_ray.bench.load.targets import BenchmarkError, Target, read
from torchweave_ray.bench.load.workloads import Script, Workload
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.report.points import Point, RequestRecord, ServiceLevel, summarize

WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """Work W1 of docs/performance.md unless said otherwise."""

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    """Clients of the closed loops."""
    rates: tuple[float, ...] = ()
    """Arrivals a second of the open loops, which then take the place of the closed ones."""
    workload: Workload = field(default_factory=Workload)
    requests: int | None = None
    """Scripts of a point and round; None: three a client, at least eight, or `duration_s`."""
    duration_s: float = 30.0
    """Of an open loop's arrivals."""
    level: ServiceLevel = field(default_factory=ServiceLevel)
    rounds: int = 1
    """Each load on every target; the next one takes the targets the other way round."""
    warmup: int | None = None
    """Short requests before the clock starts; None: one a client, at least one a prefix."""
    seed: int = 0
    timeout_s: float = 600.0
    cpu_of: tuple[int, ...] = ()
    """Process ids whose trees' CPU is counted."""
    occupancy: bool = False
    """Ask the server for its batch meanwhile."""

    @property
    def loads(self) -> tuple[Load, ...]:
        if self.rates:
            return tuple(Load(rate=rate) for rate in self.rates)
        return tuple(Load(clients=clients) for clients in self.concurrency)

    def num_scripts(self, load: Load) -> int:
        if self.requests is not None:
            return self.requests
        if load.rate is not None:
            return max(8, round(load.rate * self.duration_s))
        return max(8, 3 * (load.clients or 1))

    def num_warmup(self, load: Load) -> int:
        if self.warmup is not None:
            return self.warmup
        clients = load.clients or min(32, math.ceil(load.rate or 1))
        is_shared = self.workload.kind == "shared-prefix"
        return max(clients, self.workload.prefixes if is_shared else 0)


@dataclass(frozen=True, slots=True)
class Load:
    """So many clients, or so many arrivals a second."""

    clients: int | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    point: Point
    records: tuple[RequestRecord, ...]
    occupancy: tuple[Occupancy, ...]
    """Of each round; () where it was not asked for, or the server does not say."""

    def to_dict(self) -> dict[str, Any]:
        """The point, every TTFT, and the batch over time: for plots."""
        ttft_ms = [round(1e3 * r.ttft_s, 1) for r in self.records if r.ttft_s is not None]
        occupancy = [asdict(each) for each in self.occupancy]
        found = {"ttft_ms_each": ttft_ms, "occupancy": occupancy}
        return self.point.to_dict() | {name: value for name, value in found.items() if value}


@dataclass(frozen=True, slots=True)
class _Round:
    records: list[RequestRecord]
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float | None
    occupancy: Occupancy | None


async def run_benchmark(
    targets: Sequence[Target], config: ServingConfig, report: Callable[[Point], None]
) -> list[Measured]:
    """Every load on every target; `report` gets each point when its rounds are done.

    Raises BenchmarkError when nothing of a warm-up is answered.
    """
    tree = ProcessTree(list(config.cpu_of)) if config.cpu_of else None
    measured = []
    for index, load in enumerate(config.loads):
        rounds: list[list[_Round]] = [[] for _ in targets]
        for number in range(config.rounds):
            order = list(enumerate(targets))
            for which, target in order if number % 2 == 0 else reversed(order):
                # New words each time: a server remembers prefixes. Equal arrivals for all targets.
                run = index * config.rounds + number
                seeds = (config.seed + 7919 * (run * len(targets) + which), config.seed + run)
                rounds[which].append(await _measure(target, load, config, seeds, tree))
        for target, each in zip(targets, rounds, strict=True):
            measured.append(_pooled(target, load, config, each))
            report(measured[-1].point)
    return measured


async def _measure(
    target: Target,
    load: Load,
    config: ServingConfig,
    seeds: tuple[int, int],
    tree: ProcessTree | None,
) -> _Round:
    """`seeds`: of the words, and of the arrivals."""
    scripts = config.workload.scripts(seeds[0])
    warmup = list(islice(scripts, config.num_warmup(load)))
    num = config.num_scripts(load)
    output_len = config.workload.output_len
    work = [prepare(target, s, output_len, config.timeout_s) for s in islice(scripts, num)]
    connections = [target.connect() for _ in range(load.clients or 1)]
    async with AsyncExitStack() as stack:
        for connection in connections:
            stack.callback(connection.close)
        await _warm_up(target, connections, config, warmup)
        watch = OccupancyWatch(target) if config.occupancy else None
        if watch:
            await stack.enter_async_context(watch)
        server_cpu = tree.cpu_seconds() if tree else 0.0
        client_cpu = time.process_time()
        started = time.perf_counter()
        if load.rate is not None:
            sent = await open_loop(target, poisson_arrivals(load.rate, num, seeds[1]), work)
        else:
            sent = await closed_loop(target, connections, work)
        wall_s = time.perf_counter() - started
        client_cpu = time.process_time() - client_cpu
        server_cpu = tree.cpu_seconds() - server_cpu if tree else 0.0
    records = [read(target, s.outcome, s.due_at if load.rate else None) for s in sent]
    occupancy = watch.read() if watch else None
    return _Round(records, wall_s, client_cpu, server_cpu if tree else None, occupancy)


async def _warm_up(
    target: Target, connections: Sequence[Connection], config: ServingConfig, scripts: list[Script]
) -> None:
    """First turns, a few tokens each."""
    short = min(WARMUP_TOKENS, config.workload.output_len)
    work = [prepare(target, script[:1], short, config.timeout_s) for script in scripts]
    sent = await closed_loop(target, connections, work)
    records = [read(target, s.outcome) for s in sent]
    if records and all(r.error is not None for r in records):
        raise BenchmarkError(f"{target.name} at {target.url}: {records[0].error}")


def _pooled(
    target: Target, load: Load, config: ServingConfig, rounds: Sequence[_Round]
) -> Measured:
    records = tuple(record for each in rounds for record in each.records)
    server_cpu = [each.server_cpu_s for each in rounds if each.server_cpu_s is not None]
    point = summarize(
        target.name,
        load.clients,
        records,
        sum(each.wall_s for each in rounds),
        sum(each.client_cpu_s for each in rounds),
        sum(server_cpu) if server_cpu else None,
        rate=load.rate,
        level=config.level or None,
    )
    return Measured(point, records, tuple(o for each in rounds if (o := each.occupancy)))
