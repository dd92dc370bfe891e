"""A replica of two ranks behind Ray Serve: placed in order, one that loses a rank is replaced, and
its streams go on elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
RANK = "ray::Rank"
PROMPT = "the quick brown fox"
LENGTH = 900
BUNDLES = [{"CPU": 1}, {"CPU": 0.5}]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    return make_tiny_artifact(folder, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def port(artifact: Path) -> Iterator[int]:
    port = cluster.free_port()
    model = {
        "id": "tiny",
        "artifact": str(artifact),
        "num_replicas": 2,
        "threads": 2,
        "placement_group": {"bundles": BUNDLES, "strategy": "STRICT_PACK"},
        "engine": {"tensor_parallel_size": 2, "cache": {"kv_memory": 16 << 20}},
    }
    with cluster.ray_cluster(num_cpus=5, port=port):
        deploy(config({"models": [model]}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: Client(port).get("/health")[0] == 200)
        yield port


@pytest.fixture(scope="module")
def text(artifact: Path) -> str:
    """What one process says."""
    with LLM(artifact, runner={"executor": "torch", "threads": 1}) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
        return llm.generate(PROMPT, params)[0].text


def groups() -> list[dict[str, Any]]:
    found = ray.util.placement_group_table().values()
    return [group for group in found if group["state"] == "CREATED"]


def read(port: int) -> str:
    return Client(port).text(PROMPT, max_tokens=LENGTH, ignore_eos=True)


def test_it_answers_as_one_process_does(port: int, text: str) -> None:
    assert read(port) == text
    assert "'executor': 'torch tp2'" in str(Client(port).get("/model")[1])


def test_each_rank_has_the_bundle_of_its_number(port: int) -> None:
    wait_until(lambda: len(cluster.pids_of(RANK)) == 2)
    assert len(groups()) == 2
    for group in groups():
        assert [group["bundles"][index] for index in range(2)] == BUNDLES
        assert group["strategy"] == "STRICT_PACK"
        assert len(set(group["bundles_to_node_id"].values())) == 1
        (free,) = ray._private.state.available_resources_per_node().values()
        for index in range(2):
            name = f"CPU_group_{index}_{group['placement_group_id']}"
            assert name in ray.cluster_resources()
            assert free.get(name, 0) == 0, "the rank of this number has all of it"


def test_a_replica_that_loses_a_rank_is_replaced_and_its_streams_go_on(
    port: int, text: str
) -> None:
    replicas, ranks = cluster.replica_pids(TINY), cluster.pids_of(RANK)
    assert (len(replicas), len(ranks)) == (2, 2)
    streams = [Client(port).stream(PROMPT, max_tokens=LENGTH, ignore_eos=True) for _ in range(4)]
    pieces = [stream.pieces() for stream in streams]
    texts = [next(each) for each in pieces]
    os.kill(ranks[0], signal.SIGKILL)
    for index, each in enumerate(pieces):
        texts[index] += "".join(each)
    assert texts == [text] * 4
    wait_until(lambda: len(set(cluster.replica_pids(TINY)) - set(replicas)) == 1)
    wait_until(lambda: cluster.is_running("torchweave") and len(cluster.pids_of(RANK)) == 2)
    said = cluster.logged("torchweave", TINY, "rank 1 died")
    assert any("its actor's process is gone" in str(line) for line in said)
    assert read(port) == text


def test_an_idle_replica_that_loses_a_rank_is_replaced(port: int) -> None:
    """By its health: no request had to find out. A rank that is stopped counts as dead, too."""
    replicas = cluster.replica_pids(TINY)
    (victim, _) = cluster.pids_of(RANK)
    os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: len(set(cluster.replica_pids(TINY)) - set(replicas)) == 1)
    wait_until(lambda: cluster.is_running("torchweave") and len(cluster.pids_of(RANK)) == 2)
    assert victim not in cluster.pids_of(RANK)
    assert cluster.logged("torchweave", TINY, "no sign of life")


def test_ranks_end_with_their_replica(port: int) -> None:
    """Also when nobody could tell them."""
    ranks = cluster.pids_of(RANK)
    for pid in cluster.replica_pids(TINY):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not set(ranks) & set(cluster.pids_of(RANK)))
    wait_until(lambda: cluster.is_running("torchweave") and len(cluster.pids_of(RANK)) == 2)
