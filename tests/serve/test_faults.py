"""What breaks around a running application: Ray's object store, the volume of the artifacts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
LONG: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}


@dataclass
class Served:
    client: Client
    artifact: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    artifact = make_tiny_artifact(tmp_path_factory.mktemp("volume") / "tiny")
    model = {"id": "tiny", "artifact": str(artifact), "num_replicas": 2, "num_cpus": 1}
    model |= {"threads": 1, "engine": {"cache": {"kv_memory": 4 << 20}}}
    served = Served(Client(cluster.free_port()), artifact)
    with cluster.ray_cluster(num_cpus=4, port=served.client.port):
        deploy(config({"models": [model]}))
        wait_until(is_whole)
        wait_until(lambda: served.client.get("/health")[0] == 200)
        yield served


def is_whole() -> bool:
    return cluster.is_running("torchweave") and len(cluster.replica_pids(TINY)) == 2


def test_streams_need_no_room_in_the_object_store(served: Served) -> None:
    expected = served.client.text(PROMPT, **LONG)
    megabytes = ray.cluster_resources()["object_store_memory"] / 2**20
    refs = [ray.put(np.ones(8 << 20, np.uint8)) for _ in range(int(megabytes / 8) + 2)]
    free = ray.available_resources().get("object_store_memory", 0)
    assert free < 8 << 20, "it is full"
    assert served.client.text(PROMPT, **LONG) == expected
    assert len(refs) > 0


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
