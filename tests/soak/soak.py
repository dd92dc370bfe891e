"""Hours in minutes: 32 clients that read, hang up, abort and ask nonsense, while limits and keys
change and blocks run out: `python -m tests.soak.soak --seconds 1800`, which is `make soak`.

The whole application on a Ray of this process, with a small random model, so that there are many
requests. What is looked at: memory by requests, open files, blocks. No test in here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from ray import serve

from tests.serve import cluster
from tests.tiny import make_tiny_artifact
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys
from torchweave_ray.bench.load.http_client import Connection, HTTPFailure
from torchweave_ray.bench.origin import save_results

CLIENTS = 32
SAMPLE_S = 2.0
RELOAD_S = 4.0
WARM_SHARE = 0.4
"""Of the time: allocators and caches fill."""
MAX_SLOPE = 1.0
"""MB of resident memory per 1,000 requests, of any process."""
MAX_MORE_FILES = 8
"""A keep-alive connection or two of Ray's own may come and go."""
TINY = "ModelReplica:tiny"
PARTS = {"replica": TINY, "ingress": "Ingress"}
KEYS = ("first", "second")
PATH = "/v1/completions"
ANSWER_ID = re.compile(rb'"id": ?"([^"]+)"')


@dataclass
class Report:
    seconds: float
    requests: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    reloads: int = 0
    preemptions: int = 0
    mb_per_1000_requests: dict[str, float] = field(default_factory=dict)
    """Of each process, by a line through its samples after the warm-up."""
    mb: dict[str, tuple[float, float]] = field(default_factory=dict)
    """At the end of the warm-up, and last."""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Open ones, after a first short load and at the end, idle both times."""
    taken_blocks: int = 0
    samples: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Requests so far, and MB by process."""

    def problems(self, max_slope: float = MAX_SLOPE) -> list[str]:
        found = [
            f"{part} grows by {slope:.2f} MB per 1,000 requests"
            for part, slope in self.mb_per_1000_requests.items()
            if slope > max_slope
        ]
        found += [
            f"{part} has {last} open files, {first} at first"
            for part, (first, last) in self.files.items()
            if last > first + MAX_MORE_FILES
        ]
        found += [f"{n} times {what}" for what, n in self.outcomes.items() if what.startswith("!")]
        if self.taken_blocks:
            found.append(f"{self.taken_blocks} blocks are still taken")
        for what in ("requests", "reloads", "preemptions"):
            if not getattr(self, what):
                found.append(f"no {what}: this shows nothing")
        return found


class Clients:
    def __init__(self, port: int, seed: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.num = 0

    async def run(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        await asyncio.gather(*(self._client(ends_at) for _ in range(CLIENTS)))

    async def _client(self, ends_at: float) -> None:
        headers = {"Authorization": f"Bearer {self._rng.choice(KEYS)}"}
        connection = Connection(self._url, headers)
        while time.monotonic() < ends_at:
            act = self._rng.choices(
                (self._read, self._whole, self._hang_up, self._abort, self._nonsense),
                (50, 15, 20, 10, 5),
            )[0]
            try:
                async with asyncio.timeout(60):
                    outcome = await act(connection)
            except (HTTPFailure, TimeoutError) as error:
                outcome = f"! {type(error).__name__} {error}"
            self.outcomes[outcome] += 1
            self.num += 1
        connection.close()

    def _body(self, **more: Any) -> bytes:
        words = "".join(self._rng.choices("abcdefgh ", k=self._rng.randint(3, 250)))
        body = {"prompt": words, "max_tokens": self._rng.randint(1, 24), "ignore_eos": True}
        return json.dumps(body | {"n": self._rng.choice((1, 1, 1, 2))} | more).encode()

    async def _read(self, connection: Connection) -> str:
        exchange = await connection.request("POST", PATH, self._body(stream=True))
        if exchange.status != 200:
            return f"! status {exchange.status} {exchange.body[:120]!r}"
        return "read" if b"[DONE]" in exchange.body else "! a stream without its end"

    async def _whole(self, connection: Connection) -> str:
        exchange = await connection.request("POST", PATH, self._body())
        return "whole" if exchange.status == 200 else f"! status {exchange.status}"

    async def _hang_up(self, connection: Connection) -> str:
        """Anywhere: before the first token, or in the middle."""
        asking = asyncio.create_task(connection.request("POST", PATH, self._body(stream=True)))
        await asyncio.wait([asking], timeout=self._rng.choice((0.0, 0.01, 0.1, 0.3)))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        connection.close()
        return "hung up"

    async def _abort(self, connection: Connection) -> str:
        """By its answer's id, from another connection, as a page's stop button does."""
        body = self._body(stream=True, max_tokens=200)
        asked = Connection(self._url, {"Authorization": f"Bearer {KEYS[0]}"})
        asking = asyncio.create_task(asked.request("POST", PATH, body))
        found = None
        while found is None and not asking.done():
            await asyncio.sleep(0.01)
            so_far = b"".join(payload for _, payload in asked._receiver.parser.chunks)
            found = ANSWER_ID.search(so_far)
        status = 404
        if found is not None:
            name = found[1].decode()
            status = (await connection.request("DELETE", f"/v1/requests/{name}")).status
        exchange = await asking
        asked.close()
        if status not in (200, 404) or b"[DONE]" not in exchange.body:
            return f"! status {status} of a stop, {exchange.status} of what it stops"
        return "aborted" if status == 200 else "had ended"

    async def _nonsense(self, connection: Connection) -> str:
        exchange = await connection.request("POST", PATH, self._body(temperature="hot"))
        return "refused" if exchange.status == 400 else f"! status {exchange.status}"


@dataclass
class Sample:
    num_requests: int
    mb: dict[str, float]


class Soak:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # bfloat16: the native executor, which is what serves.
        self._artifact = make_tiny_artifact(folder / "tiny", 0, torch.bfloat16)
        self._keys = folder / "keys.yaml"
        self.num_reloads = 0
        self._write_keys()

    def deploy(self, port: int, **user_config: int) -> None:
        engine = {"cache": {"kv_memory": 1 << 20}, "scheduler": {"max_num_seqs": 32}}
        model = {"id": "tiny", "artifact": str(self._artifact), "threads": 1, "engine": engine}
        model |= {"num_cpus": 1}
        api: dict[str, Any] = {
            "keys_file": str(self._keys),
            "usage_log": str(self._folder / "usage"),
        }
        api["stream_keep_s"] = 10  # what is kept of streams that ended is soon as much as ever
        deployments = [{"name": TINY, "user_config": user_config}] if user_config else []
        args = {"models": [model], "api": api}
        cluster.deploy(cluster.config(args, deployments=deployments))

    def reload(self, port: int, rng: random.Random) -> None:
        """Other limits in place, and the file of keys written anew."""
        self.deploy(port, max_num_seqs=rng.choice((6, 16, 32)))
        self._write_keys()
        self.num_reloads += 1

    def _write_keys(self) -> None:
        note = f"written {self.num_reloads} times"
        keys = [ApiKey(id=k, sha256=digest_of(k), tenant=k, note=note) for k in KEYS]
        write_keys(self._keys, keys)


def soak(folder: Path, seconds: float, seed: int = 0) -> Report:
    application = Soak(folder)
    with _served(application) as port:
        asyncio.run(Clients(port, seed).run(min(10.0, seconds / 4)))
        _wait_until_idle()
        files = {part: _files(pid) for part, pid in _processes().items()}
        clients = Clients(port, seed + 1)
        samples = asyncio.run(_load(application, clients, port, seconds))
        _wait_until_idle()
        stats = _stats()
        report = Report(seconds, clients.num, dict(clients.outcomes), application.num_reloads)
        report.preemptions = stats.num_preemptions
        report.taken_blocks = stats.num_blocks - stats.num_free_blocks
        warm = samples[int(len(samples) * WARM_SHARE) :]
        report.samples = [(s.num_requests, s.mb) for s in samples[:: max(1, len(samples) // 60)]]
        for part in warm[0].mb:
            report.mb_per_1000_requests[part] = round(_slope(warm, part), 3)
            report.mb[part] = round(warm[0].mb[part], 1), round(warm[-1].mb[part], 1)
        report.files = {part: (files[part], _files(pid)) for part, pid in _processes().items()}
    return report


@contextmanager
def _served(application: Soak) -> Iterator[int]:
    port = cluster.free_port()
    with cluster.ray_cluster(num_cpus=4, port=port):
        application.deploy(port)
        cluster.wait_until(lambda: cluster.is_running("torchweave"))
        cluster.wait_until(lambda: cluster.Client(port).get("/health")[0] == 200)
        yield port


async def _load(application: Soak, clients: Clients, port: int, seconds: float) -> list[Sample]:
    rng = random.Random(3)
    running = asyncio.create_task(clients.run(seconds))
    samples: list[Sample] = []
    reload_at = time.monotonic() + RELOAD_S
    processes = _processes()
    while not running.done():
        await asyncio.wait([running], timeout=SAMPLE_S)
        samples.append(
            Sample(clients.num, {part: round(_mb(pid), 1) for part, pid in processes.items()})
        )
        if time.monotonic() > reload_at:
            await asyncio.to_thread(application.reload, port, rng)
            reload_at = time.monotonic() + RELOAD_S
    await running
    return samples


def _processes() -> dict[str, int]:
    found = {part: cluster.replica_pids(name) for part, name in PARTS.items()}
    found["proxy"] = cluster.pids_of("ray::ProxyActor")
    return {part: pid for part, (pid,) in found.items()}


def _slope(samples: list[Sample], part: str) -> float:
    """MB per 1,000 requests: Theil and Sen's line, which single jumps do not turn."""
    slopes = [
        1e3 * (later.mb[part] - sooner.mb[part]) / (later.num_requests - sooner.num_requests)
        for i, sooner in enumerate(samples)
        for later in samples[i + 1 :]
        if later.num_requests > sooner.num_requests
    ]
    return statistics.median(slopes)


def _mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _stats() -> Any:
    (stats,) = (
        serve.get_deployment_handle(TINY, "torchweave").broadcast("stats").results(timeout_s=10)
    )
    return stats


def _wait_until_idle() -> None:
    def is_idle() -> bool:
        stats = _stats()
        return bool(stats.num_running == stats.num_waiting == 0)

    cluster.wait_until(is_idle, 60)
    time.sleep(2.0)  # connections that clients have closed


def main(seconds: float = 1800.0, seed: int = 0, save: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), seconds, seed)
    print(json.dumps(asdict(report), indent=1))
    if save:
        config = {"seconds": seconds, "clients": CLIENTS, "model": "small random Llama"}
        print(save_results("soak", config, [asdict(report)]))
    if problems := report.problems():
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    typer.run(main)
