"""What breaks around a running application: Ray's object store, the volume of the artifacts, the
port of the bus, the memory of a replica."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray._private.internal_api import memory_summary

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
LONG: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}


@dataclass
class Served:
    client: Client
    artifact: Path

    def args(self, num_replicas: int = 2) -> dict[str, Any]:
        return {"models": [tiny_model(self.artifact, num_replicas=num_replicas)]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("volume")
    artifact = make_tiny_artifact(folder / "tiny", 0, torch.bfloat16)
    served = Served(Client(cluster.free_port()), artifact)
    with cluster.ray_cluster(num_cpus=6, port=served.client.port):
        deploy(config(served.args()))
        wait_until(is_whole)
        wait_until(lambda: served.client.get("/health")[0] == 200)
        yield served


def is_whole() -> bool:
    return cluster.is_running("torchweave") and len(cluster.replica_pids(TINY)) == 2


def test_streams_need_no_room_in_the_object_store(served: Served) -> None:
    expected = served.client.text(PROMPT, **LONG)
    megabytes = ray.cluster_resources()["object_store_memory"] / 2**20
    # Views of them, too: what is looked at is never spilled to disk.
    held = [ray.get(ray.put(np.ones(8 << 20, np.uint8))) for _ in range(int(megabytes / 8) + 2)]
    used = re.search(r"([\d.]+)% full", memory_summary(stats_only=True))
    assert used is not None
    assert float(used[1]) > 100
    assert served.client.text(PROMPT, **LONG) == expected
    assert all(array[0] == 1 for array in held)


def test_the_artifacts_volume_goes_and_comes_back(served: Served) -> None:
    """Replicas that run have their weights mapped; one that starts says what it misses."""
    expected = served.client.text(PROMPT, **LONG)
    away = served.artifact.parent.rename(served.artifact.parent.with_name("unmounted"))
    try:
        victim, survivor = cluster.replica_pids(TINY)
        os.kill(victim, signal.SIGKILL)
        assert served.client.text(PROMPT, **LONG) == expected
        wait_until(
            lambda: (
                f"no artifact in {served.artifact}"
                in cluster.deployment_message("torchweave", TINY)
            )
        )
        assert served.client.text(PROMPT, **LONG) == expected
        assert served.client.get("/health")[0] == 200
        assert survivor in cluster.replica_pids(TINY)
    finally:
        away.rename(served.artifact.parent)
    wait_until(is_whole, 90)
    assert served.client.text(PROMPT, **LONG) == expected


def test_the_bus_port_is_blocked(served: Served) -> None:
    """The first stream waits for it once, then all go by the handle, with the same text."""
    expected = served.client.text(PROMPT, **LONG)
    client = Client(served.client.port, "/blocked")
    builder = "tests.serve.lifecycle.blocked_bus:build"
    args = served.args(num_replicas=1)
    blocked = config(args, name="blocked", route_prefix="/blocked", import_path=builder)
    deploy(config(served.args()), blocked)
    wait_until(lambda: cluster.is_running("blocked"))
    wait_until(lambda: client.get("/health")[0] == 200)
    start = time.monotonic()
    pieces = client.stream(PROMPT, **LONG).pieces()
    first = next(pieces)
    assert 1.5 < time.monotonic() - start < 4, "it was tried for 2 s"
    assert first + "".join(pieces) == expected
    start = time.monotonic()
    pieces = client.stream(PROMPT, **LONG).pieces()
    first = next(pieces)
    assert time.monotonic() - start < 1.5, "a port that is blocked is not tried again at once"
    assert first + "".join(pieces) == expected
    deploy(config(served.args()))
    wait_until(lambda: not cluster.replica_pids("", "blocked"))


def test_the_kernel_kills_a_replica_for_its_memory(served: Served, tmp_path: Path) -> None:
    """Its streams go on at the other one, and Serve replaces it."""
    wait_until(is_whole)
    expected = served.client.text(PROMPT, **LONG)
    victim, survivor = cluster.replica_pids(TINY)
    with memory_limited(victim) as num_killed:
        streams = [served.client.stream(PROMPT, **LONG) for _ in range(6)]
        with ThreadPoolExecutor(len(streams)) as pool:
            texts = list(pool.map(lambda stream: "".join(stream.pieces()), streams))
        wait_until(lambda: victim not in cluster.replica_pids(TINY))
        assert num_killed() > 0, "it died of something else"
    assert texts == [expected] * len(streams)
    wait_until(lambda: is_whole() and survivor in cluster.replica_pids(TINY), 90)


@contextmanager
def memory_limited(pid: int) -> Iterator[Callable[[], int]]:
    """A control group of its own with room for nothing more; yields how often it has killed."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, limit, events = (
        (v1, "memory.limit_in_bytes", "memory.oom_control")
        if v1.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max", "memory.events")
    )
    group = root / f"torchweave-test-{pid}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups to be made here: {error}")
    try:
        (group / limit).write_text(str(1 << 20))
        (group / "cgroup.procs").write_text(str(pid))
        yield lambda: int(re.findall(r"oom_kill (\d+)", (group / events).read_text())[0])
    finally:
        with suppress(OSError):
            group.rmdir()
