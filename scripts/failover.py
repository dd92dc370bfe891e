"""Seconds from a kill to the next token of the streams that it hit, and requests that fail while
the application is deployed anew.

python scripts/failover.py [--recipe smollm2-135m-int8] [--kills 10] [--updates 3] [--save]

One Ray in the profile of `torchweave serve`, with three replicas and two ingresses; the streams are
read by `torchweave_ray.client`, the requests beside an update by clients that never ask again.
Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from served_app import (
    INGRESS,
    NUM_INGRESSES,
    NUM_REPLICAS,
    REPLICA,
    SETTLE_S,
    TIMEOUT_S,
    Application,
    application,
    wait_until,
)

from torchweave_ray.bench.origin import save_results
from torchweave_ray.client import stream

PROMPTS = ("Gravity is", "The sun is", "Once upon a time", "A list of colours:")
NUM_STREAMS = 6
NUM_TOKENS = 120
KILL_AFTER = 16
"""Events that every stream has shown then."""
NUM_CLIENTS = 6
UPDATE_TOKENS = 48


class Resumptions(logging.Handler):
    """Ids of the streams that our client has opened again."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.ids.add(str(record.args[0]) if isinstance(record.args, tuple) else "")


@dataclass
class Read:
    stream_id: str = ""
    call_id: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)


def read(url: str, number: int, under_way: Callable[[], object] | None = None) -> Read:
    got = Read()
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "max_tokens": NUM_TOKENS}
    for event in stream(url, "/v1/completions", body | {"ignore_eos": True, "stream": True}):
        got.times.append(time.monotonic())
        got.stream_id = event.id.partition(":")[0]
        if event.data != "[DONE]":
            chunk = json.loads(event.data)
            got.call_id = chunk["id"]
            got.text += chunk["choices"][0]["text"]
        if len(got.times) == KILL_AFTER and under_way is not None:
            under_way()
    return got


def wait_after(got: Read, kill: float) -> float:
    """From the kill to the end of the longest silence since: what was on its way still came."""
    gaps = [(b - a, b) for a, b in zip(got.times, got.times[1:], strict=False) if b > kill]
    return max(gaps)[1] - kill


def measure_kills(app: Application, title: str, number: signal.Signals, kills: int) -> Any:
    """Each under NUM_STREAMS streams, of which those count that the victim carried."""
    dice = random.Random(1)
    undisturbed = [read(app.url, i).text for i in range(NUM_STREAMS)]
    resumptions = Resumptions()
    logging.getLogger("torchweave_ray.client").addHandler(resumptions)
    waits, altered = [], 0
    for _ in range(kills):
        app.settle()
        under_way = threading.Semaphore(0)
        victim = dice.choice(app.pids(title))
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            reads = [pool.submit(read, app.url, i, under_way.release) for i in range(NUM_STREAMS)]
            for _ in reads:
                under_way.acquire(timeout=TIMEOUT_S)
            at = time.monotonic()
            os.kill(victim, number)
            got = [each.result() for each in reads]
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        hit = app.hit_by_a_lost_replica() if title == REPLICA else resumptions.ids
        of_victim = [r for r in got if any(r.stream_id and r.stream_id in h for h in hit)]
        waits += [wait_after(each, at) for each in of_victim]
        altered += sum(each.text != undisturbed[i] for i, each in enumerate(got))
    logging.getLogger("torchweave_ray.client").removeHandler(resumptions)
    return {
        "kills": kills,
        "streams": kills * NUM_STREAMS,
        "streams_hit": len(waits),
        "altered_texts": altered,
        "p50_s": round(statistics.median(waits), 3) if waits else None,
        "max_s": round(max(waits), 3) if waits else None,
        "waits_s": sorted(round(wait, 3) for wait in waits),
    }


class ClosedLoop:
    """Clients over kept connections that ask again at once and forgive nothing."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._stop = threading.Event()
        self._expected = [self._ask(self._connect(), i)[1] for i in range(len(PROMPTS))]
        self.faults: list[str] = []
        self.seconds: list[float] = []

    def __enter__(self) -> ClosedLoop:
        self._pool = ThreadPoolExecutor(NUM_CLIENTS)
        self._runs = [self._pool.submit(self._run, i) for i in range(NUM_CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._app.url.removeprefix("http://"), timeout=TIMEOUT_S)

    def _run(self, number: int) -> None:
        connection = self._connect()
        while not self._stop.is_set():
            number = (number + 1) % len(PROMPTS)
            start = time.monotonic()
            try:
                status, text = self._ask(connection, number)
                if status != 200 or text != self._expected[number]:
                    self.faults.append(f"HTTP {status}: {text[:200]}")
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.faults.append(repr(error))
                connection.close()
            self.seconds.append(time.monotonic() - start)

    def _ask(self, connection: http.client.HTTPConnection, number: int) -> tuple[int, str]:
        body = {"prompt": PROMPTS[number], "max_tokens": UPDATE_TOKENS, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}))
        response = connection.getresponse()
        raw = response.read().decode()
        if response.status != 200:
            return response.status, raw
        text: str = json.loads(raw)["choices"][0]["text"]
        return 200, text


def measure_updates(app: Application, updates: int) -> Iterator[dict[str, Any]]:
    """Limits in place, then other arguments: every replica and ingress is another process."""
    app.settle()
    with ClosedLoop(app) as clients:
        for i in range(updates):
            app.deploy(user_config={"max_num_seqs": 8 + i})
            time.sleep(SETTLE_S)
    yield _told("limits in place", updates, clients)
    with ClosedLoop(app) as clients:
        for i in range(updates):
            old = {*app.pids(REPLICA), *app.pids(INGRESS)}
            app.deploy(max_num_seqs=31 - i)
            wait_until(partial(app.is_replaced, old))
            time.sleep(SETTLE_S)
    yield _told("other arguments", updates, clients)


def _told(name: str, updates: int, clients: ClosedLoop) -> dict[str, Any]:
    return {
        "update": name,
        "updates": updates,
        "requests": len(clients.seconds),
        "failed": len(clients.faults),
        "faults": clients.faults[:5],
        "p50_s": round(statistics.median(clients.seconds), 3),
        "max_s": round(max(clients.seconds), 3),
    }


FAULTS = {
    "replica killed": (REPLICA, signal.SIGKILL),
    "replica silent": (REPLICA, signal.SIGSTOP),
    "ingress killed": (INGRESS, signal.SIGKILL),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--updates", type=int, default=3, help="of each kind")
    parser.add_argument("--save", action="store_true", help="write a results file")
    options = parser.parse_args()
    points: list[dict[str, Any]] = []
    with application(options.recipe) as app:
        for name, (title, number) in FAULTS.items():
            if options.kills:
                points.append({"fault": name, **measure_kills(app, title, number, options.kills)})
                print(json.dumps(points[-1]), flush=True)
        for point in measure_updates(app, options.updates) if options.updates else ():
            points.append(point)
            print(json.dumps(point), flush=True)
    if options.save:
        values = {**vars(options), "replicas": NUM_REPLICAS, "ingresses": NUM_INGRESSES}
        values |= {"streams": NUM_STREAMS, "tokens": NUM_TOKENS, "kill_after": KILL_AFTER}
        print(save_results("failover", values, points))
    bad = sum(point.get("failed", 0) + point.get("altered_texts", 0) for point in points)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
