"""Two ingresses that share the limits of keys, behind HTTP, while their ledger is killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PER_MINUTE = 120
SLOTS = 4


@dataclass
class Served:
    port: int

    def ask(self, key: str) -> int:
        """The status of a short call, over a connection of its own, so that any ingress gets it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = json.dumps({"prompt": "fox", "max_tokens": 2})
        headers = {"Authorization": f"Bearer {key}"}
        try:
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    def open_stream(self, key: str) -> http.client.HTTPConnection | None:
        """None: it was refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = {"prompt": "fox", "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 8}
        headers = {"Authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status == 200:
            response.read(10)
            connection.response = response  # type: ignore[attr-defined]
            return connection
        connection.close()
        return None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("keys")
    keys = [
        ApiKey(id=name, sha256=digest_of(name), tenant="us", requests_per_minute=PER_MINUTE)
        for name in ("before", "meanwhile", "after")
    ]
    keys += [
        ApiKey(id=name, sha256=digest_of(name), tenant="us", max_concurrent_requests=SLOTS)
        for name in ("few", "few-after")
    ]
    write_keys(folder / "keys.yaml", keys)
    artifact = make_tiny_artifact(folder / "tiny", max_position_embeddings=1024)
    args = {
        "models": [tiny_model(artifact, kv_memory=8 << 20)],
        "ingress": {"num_replicas": 2, "num_cpus": 0.5},
        "api": {"keys_file": str(folder / "keys.yaml")},
    }
    port = cluster.free_port()
    with cluster.ray_cluster(num_cpus=4, port=port):
        deploy(config(args))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: Client(port).get("/health")[0] == 200)
        assert len(cluster.replica_pids("Ingress")) == 2
        yield Served(port)


def ledger() -> int:
    (pid,) = cluster.replica_pids("Ledger")
    return pid


def asked(served: Served, key: str, times: int) -> tuple[Counter[int], float]:
    """Statuses, and the seconds from the first answer on: the limit is full until then."""
    first = served.ask(key)
    began = time.monotonic()
    statuses = Counter(served.ask(key) for _ in range(times - 1)) + Counter([first])
    assert set(statuses) <= {200, 429}, statuses
    return statuses, time.monotonic() - began


def assert_limited(served: Served, key: str) -> None:
    statuses, seconds = asked(served, key, 2 * PER_MINUTE)
    expected = PER_MINUTE * (1 + seconds / 60)
    assert statuses[200] == pytest.approx(expected, rel=0.05, abs=2)
    assert statuses[429]


def places(served: Served, key: str) -> int:
    streams = [served.open_stream(key) for _ in range(3 * SLOTS)]
    is_open = [stream for stream in streams if stream is not None]
    for stream in is_open:
        stream.close()
    return len(is_open)


def test_both_ingresses_together_let_in_what_a_key_may(served: Served) -> None:
    assert_limited(served, "before")


def test_places_are_shared(served: Served) -> None:
    assert places(served, "few") == SLOTS
    wait_until(lambda: served.ask("few") == 200, 10)


def test_a_ledger_that_is_killed_keeps_nobody_waiting(served: Served) -> None:
    old = ledger()
    os.kill(old, signal.SIGKILL)
    began = time.monotonic()
    statuses, _ = asked(served, "meanwhile", 20)
    assert statuses == {200: 20}, "each ingress has its part of the limit"
    assert time.monotonic() - began < 10
    wait_until(lambda: [pid for pid in cluster.replica_pids("Ledger") if pid != old], 60)
    wait_until(lambda: cluster.is_running("torchweave"))
    time.sleep(2.5)  # each ingress has told the new one what it has open
    assert_limited(served, "after")
    assert places(served, "few-after") == SLOTS
