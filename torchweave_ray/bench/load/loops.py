"""Who sends when. Closed loop: c clients, each sends when its last answer is there. Open loop:
arrivals by a schedule that no answer holds up.

What an arrival of the open loop waits here, for a timer or a connection, counts as its latency: it
is measured from when it was due (no coordinated omission). Reading happens when the clock stands.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torchweave_ray.bench.load.dialects import BadAnswer, Prompt
from torchweave_ray.bench.load.http_client import Connection, Exchange
from torchweave_ray.bench.load.targets import Failure, Target, send
from torchweave_ray.bench.load.workloads import Script


@dataclass(frozen=True, slots=True)
class Sent:
    outcome: Exchange | Failure
    due_at: float | None = None
    """None: nobody but the sender said when."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A script, its first turn encoded before the clock starts."""

    script: Script
    first_body: bytes
    output_len: int
    timeout_s: float


def prepare(target: Target, script: Script, output_len: int, timeout_s: float) -> Prepared:
    body = _body(target, [script[0].words], output_len)
    return Prepared(script, body, output_len, timeout_s)


def poisson_arrivals(rate: float, num: int, seed: int) -> list[float]:
    """Seconds of `num` arrivals within num / rate: a Poisson process, given its count, so that
    every run offers the same load."""
    source = random.Random(seed)
    return sorted(source.uniform(0.0, num / rate) for _ in range(num))


async def closed_loop(
    target: Target, connections: Sequence[Connection], work: Sequence[Prepared]
) -> list[Sent]:
    left = iter(work)
    sent: list[Sent] = []

    async def client(connection: Connection) -> None:
        for prepared in left:
            sent.extend(await converse(target, connection, prepared))

    await asyncio.gather(*(client(connection) for connection in connections))
    return sent


async def open_loop(
    target: Target, arrivals: Sequence[float], work: Sequence[Prepared]
) -> list[Sent]:
    """One script an arrival. A connection is used again when its script is through."""
    idle: list[Connection] = []
    every: list[Connection] = []

    async def arrive(due_at: float, prepared: Prepared) -> list[Sent]:
        if not idle:
            every.append(target.connect())
            idle.append(every[-1])
        connection = idle.pop()
        try:
            return await converse(target, connection, prepared, due_at)
        finally:
            idle.append(connection)

    started = time.perf_counter()
    tasks = []
    try:
        for offset, prepared in zip(arrivals, work, strict=True):
            due_at = started + offset
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            tasks.append(asyncio.create_task(arrive(due_at, prepared)))
        return [sent for found in await asyncio.gather(*tasks) for sent in found]
    finally:
        for task in tasks:
            task.cancel()
        for connection in every:
            connection.close()


async def converse(
    target: Target, connection: Connection, prepared: Prepared, due_at: float | None = None
) -> list[Sent]:
    """Each turn when its pause after the answer before it is over; a failure ends the script."""
    said: list[Prompt] = [prepared.script[0].words]
    body = prepared.first_body
    sent = [Sent(await send(target, connection, body, prepared.timeout_s), due_at)]
    for turn in prepared.script[1:]:
        answer = sent[-1].outcome
        if isinstance(answer, Failure):
            break
        try:
            said += [target.dialect.read(answer).text, turn.words]
        except BadAnswer:
            break
        due_at = answer.ended_at + turn.pause_s
        await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        body = _body(target, said, prepared.output_len)
        sent.append(Sent(await send(target, connection, body, prepared.timeout_s), due_at))
    return sent


def _body(target: Target, said: Sequence[Prompt], output_len: int) -> bytes:
    return json.dumps(target.dialect.body(said, output_len)).encode()
