"""Replicas are killed under seeded streams: each client reads what it would have read anyway.

`pytest -s` shows the seconds from a kill to the next token of the streams that it hit.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
import torch

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.bench.process_tree import ProcessTree

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPTS = ("the quick brown fox", "jumps over", "the lazy dog")
NUM_STREAMS = 100
NUM_SEEDS = 25
AT_ONCE = 10
MIN_KILLS = 4


@dataclass
class Read:
    """What one client got, and when."""

    seed: int
    call_id: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = cluster.free_port()
    # bfloat16, so the native executor: only its texts depend on nobody else in the batch.
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    artifact = make_tiny_artifact(folder, 0, torch.bfloat16, max_position_embeddings=1024)
    model = tiny_model(artifact, num_replicas=3, kv_memory=16 << 20)
    with cluster.ray_cluster(num_cpus=6, port=port):
        deploy(config({"models": [model]}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: Client(port).get("/health")[0] == 200)
        yield port


def read(port: int, seed: int) -> Read:
    got = Read(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed, "stream": True}
    body |= {"max_tokens": 800, "ignore_eos": True, "temperature": 1.0}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        has_ended = False
        for raw in response:
            line = raw.decode().strip()
            has_ended = has_ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                got.call_id = chunk["id"]
                got.text += chunk["choices"][0]["text"]
                got.times.append(time.monotonic())
        assert has_ended, "the stream was cut"
    finally:
        connection.close()
    return got


def hit_by_kills() -> set[str]:
    """Call ids of the streams that lost their replica, from the ingress's log."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    text = "".join(log.read_text() for log in logs.glob("*torchweave_Ingress*.log"))
    return set(re.findall(r"\[Request\] (\S+) goes on elsewhere", text))


def test_killed_replicas_change_no_text(port: int) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        undisturbed = dict(enumerate(pool.map(lambda s: read(port, s).text, range(NUM_SEEDS))))
        kills: list[float] = []
        done = threading.Event()
        left = iter(range(NUM_STREAMS))
        lock = threading.Lock()

        def client(_: int) -> list[Read]:
            """Streams until all are read, and on while replicas are still to be killed."""
            reads = []
            while True:
                with lock:
                    number = next(left, None)
                if number is None and (len(kills) >= MIN_KILLS or done.is_set()):
                    return reads
                reads.append(read(port, (number or 0) % NUM_SEEDS))

        readers = [pool.submit(client, number) for number in range(AT_ONCE)]
        try:
            while not all(reader.done() for reader in readers):
                pids = cluster.replica_pids(TINY)
                if len(pids) == 3 and cluster.is_running("torchweave"):
                    victim = random.Random(len(kills)).choice(sorted(pids))
                    kills.append(time.monotonic())
                    os.kill(victim, signal.SIGKILL)
                time.sleep(0.5)
        finally:
            done.set()
        reads = [each for reader in readers for each in reader.result()]
    assert len(reads) >= NUM_STREAMS
    assert len(kills) >= MIN_KILLS
    for each in reads:
        assert each.text == undisturbed[each.seed], each.call_id
    hit = hit_by_kills()
    waits = sorted(wait for each in reads if _is_hit(each, hit) for wait in _waits(each, kills))
    assert waits, "no stream was hit: this shows nothing"
    print(
        f"\n{len(reads)} streams, {len(kills)} kills, {len(waits)} streams hit; seconds to the "
        f"next token: p50 {statistics.median(waits):.2f}, max {waits[-1]:.2f}"
    )


def _is_hit(each: Read, hit: set[str]) -> bool:
    return any(call_id in each.call_id or each.call_id in call_id for call_id in hit)


def _waits(each: Read, kills: list[float]) -> Iterator[float]:
    """Of the kills in its time, the one that it waited longest after: that hit it."""
    after = [
        next(at for at in each.times if at > kill) - kill
        for kill in kills
        if each.times[0] < kill < each.times[-1]
    ]
    if after:
        yield max(after)


def test_streams_that_were_resumed_leave_a_frozen_replica_too(port: int) -> None:
    """By the handle, where nothing but its own signs of life tells of a replica that is silent."""
    wait_until(lambda: len(cluster.replica_pids(TINY)) == 3 and cluster.is_running("torchweave"))
    expected = {seed: read(port, seed).text for seed in range(3)}
    replicas = cluster.replica_pids(TINY)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reads = [pool.submit(read, port, number % 3) for number in range(AT_ONCE)]
        before = hit_by_kills()
        cpu_s = {pid: ProcessTree([pid]).cpu_seconds() for pid in replicas}
        time.sleep(0.3)
        # The busiest first: it has streams, whatever the router made of three prompts.
        pids = sorted(replicas, key=lambda pid: cpu_s[pid] - ProcessTree([pid]).cpu_seconds())
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: hit_by_kills() > before or all(each.done() for each in reads))
        assert not all(each.done() for each in reads), "they ended before the kill"
        os.kill(pids[1], signal.SIGSTOP)
        try:
            for each in reads:
                assert each.result(60).text == expected[each.result().seed]
        finally:
            os.kill(pids[1], signal.SIGKILL)
