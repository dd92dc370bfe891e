"""Conversations that grow turn by turn, over several replicas: what the choice of a replica gains.

Starts `torchweave serve` for each router in turn, some rounds, and gives both the same words at the
same pauses. The balance is that of the replicas' CPU time. Nothing else may run meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchweave_ray.bench.load.loops import converse, prepare
from torchweave_ray.bench.load.prompts import PromptSource
from torchweave_ray.bench.load.targets import (
    BenchmarkError,
    Target,
    openai_target,
    read,
    run_in_loop,
)
from torchweave_ray.bench.load.workloads import Script, Turn
from torchweave_ray.bench.process_tree import ProcessTree, wait_until_calm
from torchweave_ray.bench.report.points import Point, RequestRecord, summarize
from torchweave_ray.bench.server_process import application_file, started_server
from torchweave_ray.bench.startup import serve_options

ROUTERS = ("prefix", "default")
"""Ours, and Ray Serve's own: the less busy of two replicas taken by chance."""
KV_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True)
class ConversationsConfig:
    replicas: int = 3
    threads: int = 1
    """Of a replica."""
    conversations: int = 12
    """Held at once, each by a reader of its own."""
    turns: int = 5
    first_len: int = 150
    """Words of a first turn."""
    turn_len: int = 40
    """Words that a later turn adds to what was said."""
    output_len: int = 16
    pause_s: float = 1.0
    """Mean of a reader's pauses, which are exponential."""
    rounds: int = 1
    """Each with new servers and words; the routers change places between two."""
    seed: int = 0
    timeout_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Round:
    """What one server answered."""

    conversations: list[list[RequestRecord]]
    wall_s: float
    replica_cpu_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    router: str
    first: Point
    """The first turns."""
    later: Point
    hit_rate: float
    """Share of the later turns' prompt tokens that came from a cache."""
    replica_cpu_s: tuple[tuple[float, ...], ...]
    """Of each round."""

    @property
    def balance(self) -> float:
        """CPU time of the busiest replica over their mean, as a mean of the rounds: 1 is even."""
        each = [max(cpu_s) * len(cpu_s) / sum(cpu_s) for cpu_s in self.replica_cpu_s]
        return sum(each) / len(each)

    def to_dict(self) -> dict[str, Any]:
        return {
            "router": self.router,
            "hit_rate": round(self.hit_rate, 3),
            "balance": round(self.balance, 3),
            "replica_cpu_s": [[round(s, 2) for s in cpu_s] for cpu_s in self.replica_cpu_s],
            "points": [self.first.to_dict(), self.later.to_dict()],
        }


def measure_routers(model: str, config: ConversationsConfig) -> Iterator[Measured]:
    """One for each of ROUTERS. `model`: a recipe, or the folder of a staged artifact.

    Raises BenchmarkError.
    """
    rounds: dict[str, list[Round]] = {router: [] for router in ROUTERS}
    for number in range(config.rounds):
        own = replace(config, seed=config.seed + 3 * number)
        for router in ROUTERS if number % 2 == 0 else reversed(ROUTERS):
            rounds[router].append(_round(router, model, own))
    for router, each in rounds.items():
        yield _measured(router, each)


def _round(router: str, model: str, config: ConversationsConfig) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        file = application_file(Path(folder), {"models": [_served(router, model, config)]})
        with started_server((str(file), "--no-dashboard")) as server:
            pids = ProcessTree([server.pid]).named("ServeReplica", "ModelReplica")
            if len(pids) != config.replicas:
                raise BenchmarkError(f"{len(pids)} replicas found, not {config.replicas}")
            wait_until_calm(server.pid)
            before = [ProcessTree([pid]).cpu_seconds() for pid in pids]
            started = time.perf_counter()
            conversations = run_in_loop(_all(server.url, config))
            wall_s = time.perf_counter() - started
            after = [ProcessTree([pid]).cpu_seconds() for pid in pids]
    cpu_s = tuple(b - a for a, b in zip(before, after, strict=True))
    return Round(conversations, wall_s, cpu_s)


async def hold(target: Target, config: ConversationsConfig) -> list[list[RequestRecord]]:
    """The turns of each conversation. Equal seeds give equal words and pauses."""
    firsts = PromptSource(config.first_len, config.seed)
    rest = PromptSource(config.turn_len, config.seed + 1)
    pauses = random.Random(config.seed + 2)
    conversations = []
    for _ in range(config.conversations):
        said = [firsts.next_prompt(), *(rest.next_prompt() for _ in range(config.turns - 1))]
        waits = [pauses.expovariate(1 / config.pause_s) for _ in said]
        script = tuple(Turn(words, wait) for wait, words in zip(waits, said, strict=True))
        conversations.append(_hold_one(target, config, script))
    return list(await asyncio.gather(*conversations))


async def _all(url: str, config: ConversationsConfig) -> list[list[RequestRecord]]:
    return await hold(await openai_target(url, "completions", None), config)


async def _hold_one(
    target: Target, config: ConversationsConfig, script: Script
) -> list[RequestRecord]:
    connection = target.connect()
    prepared = prepare(target, script, config.output_len, config.timeout_s)
    try:
        await asyncio.sleep(script[0].pause_s)
        records = [read(target, s.outcome) for s in await converse(target, connection, prepared)]
    finally:
        connection.close()
    if records[-1].error is not None:
        raise BenchmarkError(f"{target.name} at {target.url}: {records[-1].error}")
    return records


def _measured(router: str, rounds: Sequence[Round]) -> Measured:
    held = [turns for each in rounds for turns in each.conversations]
    first = [turns[0] for turns in held]
    later = [turn for turns in held for turn in turns[1:]]
    wall_s = sum(each.wall_s for each in rounds)
    points = [
        summarize(f"{router}, {name}", len(rounds[0].conversations), records, wall_s)
        for name, records in (("first turns", first), ("later turns", later))
    ]
    hit_rate = points[1].cached_tokens / max(1, points[1].prompt_tokens)
    cpu_s = tuple(each.replica_cpu_s for each in rounds)
    return Measured(router, points[0], points[1], hit_rate, cpu_s)


def _served(router: str, model: str, config: ConversationsConfig) -> dict[str, Any]:
    return {
        serve_options(model)[0].removeprefix("--"): model,
        "id": "measured",
        "num_replicas": config.replicas,
        "num_cpus": 0.2,
        "threads": config.threads,
        "router": router,
        "engine": {"cache": {"kv_memory": KV_MEMORY}},
    }
