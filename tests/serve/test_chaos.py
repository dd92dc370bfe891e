"""Load while replicas are killed and frozen and the application is deployed anew, by a seed.

Every stream's text is what it is undisturbed, no block of KV cache stays taken, memory stays flat.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import serve

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEED = 20261122
TINY = "ModelReplica:tiny"
NUM_REPLICAS = 3
NUM_CLIENTS = 6
MIN_STREAMS = 100
RSS_SLACK = 24 << 20

Body = dict[str, Any]


@dataclass
class Served:
    client: Client
    artifact: Path
    kv_memory: int = 4 << 20

    def config(self, **deployment: Any) -> Any:
        model = {
            "id": "tiny",
            "artifact": str(self.artifact),
            "num_replicas": NUM_REPLICAS,
            "num_cpus": 1,
            "threads": 1,
            "engine": {"cache": {"kv_memory": self.kv_memory}},
        }
        deployments = [{"name": TINY, **deployment}] if deployment else []
        return config({"models": [model]}, deployments=deployments)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("artifact")
    # bfloat16: what the native executor computes does not depend on the batch, bit for bit.
    artifact = make_tiny_artifact(folder / "tiny", 0, torch.bfloat16, max_position_embeddings=1024)
    served = Served(Client(cluster.free_port()), artifact)
    with cluster.ray_cluster(num_cpus=NUM_REPLICAS + 2, port=served.client.port):
        deploy(served.config())
        wait_until(is_whole)
        wait_until(lambda: served.client.get("/health")[0] == 200)
        yield served


def is_whole() -> bool:
    return cluster.is_running("torchweave") and len(cluster.replica_pids(TINY)) == NUM_REPLICAS


def is_idle() -> bool:
    each = serve.get_deployment_handle(TINY, "torchweave").broadcast("stats").results(timeout_s=10)
    return len(each) == NUM_REPLICAS and all(
        s.num_running == s.num_waiting == 0 and s.num_blocks == s.num_free_blocks for s in each
    )


def bodies(dice: random.Random, count: int) -> list[Body]:
    """Seeded draws of some length, greedy ones, two choices: all that resumes."""
    return [
        {
            "prompt": "".join(dice.choices("abcdefgh ", k=dice.randint(3, 200))),
            "max_tokens": dice.randint(150, 500),
            "ignore_eos": True,
            "seed": dice.randrange(2**31),
            "temperature": dice.choice([0, 0.7, 1.0]),
            "n": dice.choice([1, 1, 1, 2]),
        }
        for _ in range(count)
    ]


def read(client: Client, body: Body) -> tuple[list[str], float]:
    """The text of every choice, and the longest wait for a next piece in seconds."""
    texts, pause = [""] * body["n"], 0.0
    stream = client.stream(**body)
    last = time.monotonic()
    for index, text in stream.indexed_pieces():
        texts[index] += text
        now = time.monotonic()
        last, pause = now, max(pause, now - last)
    assert stream.usage is not None
    assert stream.usage["completion_tokens"] == body["n"] * body["max_tokens"]
    return texts, pause


@dataclass
class Load:
    """Clients that read streams one after the other and compare each with the undisturbed one."""

    client: Client
    expected: list[tuple[Body, list[str]]]
    pauses: list[float] = field(default_factory=list)
    """Of each stream that has been read, its longest."""
    faults: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for i in range(NUM_CLIENTS):
            thread = threading.Thread(target=self._run, args=(random.Random(SEED + i),))
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    @property
    def num_streams(self) -> int:
        return len(self.pauses)

    def go_on(self, num_streams: int) -> None:
        """Until so many more have been read."""
        reached = self.num_streams + num_streams
        wait_until(lambda: self.num_streams >= reached, 120)

    def _run(self, dice: random.Random) -> None:
        while not self._stop.is_set():
            body, expected = dice.choice(self.expected)
            try:
                texts, pause = read(self.client, body)
                self.pauses.append(pause)
                if texts != expected:
                    self.faults.append(f"other text: {texts} for {expected}: {body}")
            except Exception as error:
                self.faults.append(f"{error!r}: {body}")
                self.pauses.append(0.0)


def kill(dice: random.Random, load: Load) -> None:
    wait_until(lambda: len(cluster.replica_pids(TINY)) >= 2)
    _signal(dice.choice(cluster.replica_pids(TINY)), signal.SIGKILL)


def freeze(dice: random.Random, load: Load) -> None:
    """Until every client has got on; then it is killed, for Serve takes a minute to give it up."""
    wait_until(lambda: len(cluster.replica_pids(TINY)) >= 2)
    victim = dice.choice(cluster.replica_pids(TINY))
    _signal(victim, signal.SIGSTOP)
    try:
        load.go_on(2 * NUM_CLIENTS)
    finally:
        _signal(victim, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def rss(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def expected(served: Served) -> list[tuple[Body, list[str]]]:
    return [(body, read(served.client, body)[0]) for body in bodies(random.Random(SEED), 12)]


def test_replicas_are_killed_and_frozen(
    served: Served, expected: list[tuple[Body, list[str]]]
) -> None:
    dice = random.Random(SEED)
    (ingress,) = cluster.replica_pids("Ingress")
    with Load(served.client, expected) as load:
        load.go_on(30)
        before = rss(ingress)
        for action in (kill, kill, freeze, kill, kill, freeze, kill):
            action(dice, load)
            load.go_on(8)
        load.go_on(MIN_STREAMS - load.num_streams)
    print(f"{load.num_streams} streams, longest pauses in s: {sorted(load.pauses)[-12:]}")
    assert not load.faults, load.faults[:3]
    wait_until(is_whole, 90)
    wait_until(is_idle, 20)
    assert cluster.replica_pids("Ingress") == [ingress]
    assert rss(ingress) - before < RSS_SLACK


def test_the_application_is_deployed_anew(
    served: Served, expected: list[tuple[Body, list[str]]]
) -> None:
    """First limits in place, then arguments: every process of the application is another one."""
    old = set(cluster.replica_pids(TINY)) | set(cluster.replica_pids("Ingress"))
    with Load(served.client, expected) as load:
        for limit in (2, 16, 4):
            load.go_on(10)
            deploy(served.config(user_config={"max_num_seqs": limit}))
            wait_until(lambda: cluster.is_running("torchweave"))
        assert old == set(cluster.replica_pids(TINY)) | set(cluster.replica_pids("Ingress"))
        for megabytes in (5, 4):
            served.kv_memory = megabytes << 20
            deploy(served.config())
            load.go_on(30)
            wait_until(is_whole, 120)
    assert not load.faults, load.faults[:3]
    assert not old & set(cluster.replica_pids(TINY))
    wait_until(is_idle, 20)


def test_clients_that_vanish_leave_nothing(served: Served) -> None:
    """At every stage of a stream; memory of every process is what it was."""
    dice = random.Random(SEED)

    def churn(count: int) -> None:
        for body in bodies(dice, count):
            stream = served.client.stream(**body)
            pieces = stream.pieces()
            for _ in range(dice.randint(0, 5)):
                next(pieces)
            stream.hang_up()

    pids = cluster.replica_pids(TINY) + cluster.replica_pids("Ingress")
    churn(100)
    wait_until(is_idle, 20)
    before = {pid: rss(pid) for pid in pids}
    churn(300)
    wait_until(is_idle, 20)
    grown = {pid: rss(pid) - before[pid] for pid in pids}
    assert max(grown.values()) < RSS_SLACK, grown
