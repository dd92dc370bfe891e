"""Clients of every bad manner in front of `torchweave serve`, so of HAProxy and a real engine: they
read a byte a second, vanish at every stage, send too much or nothing at all."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.overload.server import (
    connect,
    idle_connections,
    read_response,
    request_bytes,
    reset,
    send_zeros,
)
from tests.serve.cluster import wait_until
from tests.serve.test_launch import Server
from tests.tiny import make_tiny_artifact
from torchweave_ray.bench.process_tree import ProcessTree, memory_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "stream": True}
SHORT: dict[str, Any] = {"prompt": "abc", "max_tokens": 5}
NUM_READERS = 24
SLACK_BYTES = 24 << 20


class Served:
    def __init__(self, server: Server) -> None:
        self.port = server.client.port
        self.tree = ProcessTree([server.process.pid])
        (self.replica,) = self.tree.named("ServeReplica", "ModelReplica")
        (self.ingress,) = self.tree.named("ServeReplica", "Ingress")

    def ask(self, body: dict[str, Any] = SHORT) -> tuple[int, Any]:
        with connect(self.port) as client:
            client.sendall(request_bytes(PATH, body))
            status, _, content = read_response(client)
            return status, json.loads(content)

    def is_idle(self) -> bool:
        """The engine's process: with a stream it takes most of a core."""
        replica = ProcessTree([self.replica])
        before = replica.cpu_seconds()
        time.sleep(1.0)
        return replica.cpu_seconds() - before < 0.15

    def memory(self) -> dict[str, int]:
        haproxies = [pid for pid in self.tree.named("haproxy") if "ray::" not in _title(pid)]
        return {
            f"{name} {pid}": memory_of(pid).uss
            for name, pids in (
                ("ingress", [self.ingress]),
                ("replica", [self.replica]),
                ("haproxy", haproxies),
            )
            for pid in pids
        }


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients")
    artifact = make_tiny_artifact(folder / "tiny", 0, torch.bfloat16, max_position_embeddings=4096)
    server = Server(folder, artifact)
    try:
        wait_until(lambda: server.says("[Serve] try:"), 90)
        assert server.process.poll() is None, server.log.read_text()[-2000:]
        served = Served(server)
        wait_until(served.is_idle, 30)
        yield served
    finally:
        server.stop()


def test_slow_readers_are_waited_for_and_hold_little(served: Served) -> None:
    """A byte a second each: the engine ends its work, others are answered, nothing piles up."""
    with ExitStack() as stack:
        readers = [stack.enter_context(connect(served.port, 4096)) for _ in range(NUM_READERS)]
        for reader in readers[:2]:  # what a first request brings in is not theirs
            reader.sendall(request_bytes(PATH, LONG, Connection="close"))
        wait_until(served.is_idle, 60)
        before = served.memory()
        for reader in readers[2:]:
            reader.sendall(request_bytes(PATH, LONG, Connection="close"))
        for _ in range(5):
            assert all(len(reader.recv(1)) == 1 for reader in readers)
            assert served.ask()[0] == 200
            time.sleep(1.0)
        wait_until(served.is_idle, 120)
        grown = {name: size - before.get(name, 0) for name, size in served.memory().items()}
        print({name: f"{size / 2**20:.1f} MB" for name, size in grown.items()})
        assert max(grown.values()) < SLACK_BYTES
        for reader in readers:
            received = b"".join(iter(lambda reader=reader: reader.recv(1 << 16), b""))
            assert b"data: [DONE]" in received
            assert b'"finish_reason":"length"' in received.replace(b" ", b"")


def _after(num_bytes: int | None) -> Callable[[Served], socket.socket]:
    def leave(served: Served) -> socket.socket:
        client = connect(served.port)
        client.sendall(request_bytes(PATH, LONG)[:num_bytes])
        return client

    return leave


def _in_the_answer(served: Served) -> socket.socket:
    client = _after(None)(served)
    assert client.recv(1)
    return client


STAGES = {
    "before a byte": _after(0),
    "inside the headers": _after(40),
    "inside the body": _after(-10),
    "when all is sent": _after(None),
    "in the answer": _in_the_answer,
}


@pytest.mark.parametrize("hang_up", [reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize("stage", STAGES)
def test_clients_that_vanish_leave_no_work(
    served: Served, stage: str, hang_up: Callable[[socket.socket], None]
) -> None:
    for client in [STAGES[stage](served) for _ in range(8)]:
        hang_up(client)
    wait_until(served.is_idle, 5)
    assert served.ask()[0] == 200


@pytest.mark.parametrize("is_announced", [True, False], ids=["announced", "chunked"])
def test_ten_megabytes_are_refused(served: Served, is_announced: bool) -> None:
    before = served.memory()
    with connect(served.port) as client:
        send_zeros(client, PATH, 10 << 20, is_announced)
        status, _, content = read_response(client)
    assert (status, json.loads(content)["error"]["code"]) == (413, "body_too_large")
    grown = served.memory()[f"ingress {served.ingress}"] - before[f"ingress {served.ingress}"]
    assert grown < SLACK_BYTES


def test_a_thousand_idle_connections(served: Served) -> None:
    """Half of them have begun a request. The others are answered, and a stream runs."""
    with idle_connections(served.port, 1000, request_bytes(PATH, LONG)):
        start = time.monotonic()
        assert served.ask()[0] == 200
        assert time.monotonic() - start < 2
        with connect(served.port) as client:
            client.sendall(request_bytes(PATH, {**LONG, "max_tokens": 50}, Connection="close"))
            received = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert b"data: [DONE]" in received
    assert served.ask()[0] == 200
