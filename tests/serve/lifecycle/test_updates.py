"""Updates under closed-loop load: no request fails, be it limits, arguments or an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.serve.lifecycle.closed_loop import ClosedLoop
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPTS = ("the quick brown fox", "the lazy dog")
BODY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}


@dataclass
class Served:
    client: Client
    artifacts: list[Path]

    def deploy(self, artifact: int, max_num_seqs: int = 8, **deployment: Any) -> None:
        scheduler = {"max_num_seqs": max_num_seqs}
        model = tiny_model(self.artifacts[artifact], num_replicas=2, scheduler=scheduler)
        surging = {"name": TINY, "max_surge_percent": 100, **deployment}
        deploy(config({"models": [model]}, deployments=[surging]))

    def texts(self) -> dict[str, str]:
        return {prompt: self.client.text(prompt, **BODY) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = cluster.free_port()
    folder = tmp_path_factory.mktemp("artifacts")
    artifacts = [make_tiny_artifact(folder / str(seed), seed=seed) for seed in (0, 1)]
    served = Served(Client(port), artifacts)
    with cluster.ray_cluster(num_cpus=6, port=port):
        served.deploy(0)
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: served.client.get("/health")[0] == 200)
        yield served


def test_limits_change_under_load(served: Served) -> None:
    before = sorted(cluster.replica_pids(TINY))
    with ClosedLoop(served.client.port, served.texts(), 6, BODY) as clients:
        for limits in ({"max_num_seqs": 2}, {"max_num_seqs": 4}, {"max_num_seq": 1}):
            seen = clients.outcomes["complete"]
            served.deploy(0, user_config=limits)
            wait_until(lambda seen=seen: clients.outcomes["complete"] > seen + 12)
    wait_until(lambda: cluster.is_running("torchweave"))
    assert set(clients.outcomes) == {"complete"}, clients.outcomes
    assert sorted(cluster.replica_pids(TINY)) == before


def test_other_arguments_roll_without_a_failed_request(served: Served) -> None:
    before = set(cluster.replica_pids(TINY))
    with ClosedLoop(served.client.port, served.texts(), 6, BODY) as clients:
        served.deploy(0, max_num_seqs=6)
        _wait_for_others(before)
    assert set(clients.outcomes) == {"complete"}, clients.outcomes


def test_another_artifact_rolls_without_a_failed_request(served: Served) -> None:
    before = set(cluster.replica_pids(TINY))
    old = served.texts()
    with ClosedLoop(served.client.port, old, 6, BODY) as clients:
        served.deploy(1, max_num_seqs=6)
        _wait_for_others(before)
    new = served.texts()
    assert new != old
    # What is not the old text is the new one: each comes from one artifact only.
    assert set(clients.outcomes) <= {"complete", "another text"}, clients.outcomes
    assert clients.others <= {(prompt, text) for prompt, text in new.items()}


def _wait_for_others(before: set[int]) -> None:
    def rolled() -> bool:
        now = set(cluster.replica_pids(TINY))
        return len(now) == 2 and not now & before and cluster.is_running("torchweave")

    wait_until(rolled, 120)
