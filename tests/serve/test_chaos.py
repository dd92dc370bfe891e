"""Load while replicas, nodes and ingresses are killed or frozen and the application is deployed
anew, in an order drawn from a seed.

Every stream's text is what it is undisturbed, no block of KV cache stays taken, memory stays flat.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve

from deployments.bus.listener import DEAD_AFTER_S, HEARTBEAT_S
from tests.serve import cluster
from tests.serve.cluster import config, deploy, tiny_model, wait_until
from tests.serve.hosts.nodes import Nodes, processes_of, replicas_on, send, several_nodes
from tests.serve.lifecycle.load import Body, Load, bodies, read
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEED = 20261122
TINY = "ModelReplica:tiny"
NUM_REPLICAS = 3
NUM_INGRESSES = 2
NUM_CLIENTS = 6
MIN_STREAMS = 120
RSS_SLACK = 24 << 20
WHOLE_S = 180.0


@dataclass
class Served:
    nodes: Nodes
    artifact: Path
    kv_memory: int = 4 << 20

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.nodes.client.port}"

    def deploy(self, **deployment: Any) -> None:
        sizes = {"num_replicas": NUM_REPLICAS, "num_cpus": 2, "kv_memory": self.kv_memory}
        model = tiny_model(self.artifact, **sizes)
        args = {"models": [model], "ingress": {"num_replicas": NUM_INGRESSES}}
        deployments = [{"name": TINY, **deployment}] if deployment else []
        deploy(config(args, deployments=deployments))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("nodes")
    # bfloat16: what the native executor computes does not depend on the batch, bit for bit.
    artifact = make_tiny_artifact(folder / "tiny", 0, torch.bfloat16, max_position_embeddings=1024)
    with several_nodes(folder, NUM_REPLICAS) as nodes:
        served = Served(nodes, artifact)
        served.deploy()
        wait_until(is_whole, WHOLE_S)
        wait_until(lambda: nodes.client.get("/health")[0] == 200)
        assert nodes.client.get("/model")[1]["executor"].startswith("native")
        yield served


def is_whole() -> bool:
    return (
        cluster.is_running("torchweave")
        and len(cluster.replica_pids(TINY)) == NUM_REPLICAS
        and len(cluster.replica_pids("Ingress")) == NUM_INGRESSES
    )


def is_idle() -> bool:
    each = serve.get_deployment_handle(TINY, "torchweave").broadcast("stats").results(timeout_s=10)
    return len(each) == NUM_REPLICAS and all(
        s.num_running == s.num_waiting == 0 and s.num_blocks == s.num_free_blocks for s in each
    )


def kill_replica(served: Served, load: Load, dice: random.Random) -> None:
    send([dice.choice(cluster.replica_pids(TINY))], signal.SIGKILL)


def kill_ingress(served: Served, load: Load, dice: random.Random) -> None:
    send([dice.choice(cluster.replica_pids("Ingress"))], signal.SIGKILL)


def freeze_replica(served: Served, load: Load, dice: random.Random) -> None:
    _freeze([dice.choice(cluster.replica_pids(TINY))], load)


def kill_node(served: Served, load: Load, dice: random.Random) -> None:
    _kill(dice.choice(served.nodes.without_ingress()), served, load)


def kill_node_with_ingress(served: Served, load: Load, dice: random.Random) -> None:
    """Streams lose both at once, where there is such a node."""
    others = served.nodes.without_ingress()
    both = [node for node in served.nodes.all if node not in others]
    _kill(dice.choice(both or others), served, load)


def _kill(node: Any, served: Served, load: Load) -> None:
    send(processes_of(node), signal.SIGKILL)
    served.nodes.forget(node)
    load.go_on(NUM_CLIENTS)
    served.nodes.add()


def freeze_node(served: Served, load: Load, dice: random.Random) -> None:
    node = dice.choice(served.nodes.without_ingress())
    _freeze(processes_of(node), load)
    served.nodes.forget(node)
    served.nodes.add()


def _freeze(pids: list[int], load: Load) -> None:
    """Until every client has got on; then it is killed, for Serve takes a minute to give it up."""
    send(pids, signal.SIGSTOP)
    try:
        time.sleep(DEAD_AFTER_S + 2 * HEARTBEAT_S)
        load.go_on(2 * NUM_CLIENTS)
    finally:
        send(pids, signal.SIGKILL)


def change_limits(served: Served, load: Load, dice: random.Random) -> None:
    served.deploy(user_config={"max_num_seqs": dice.choice([2, 4, 16])})


def deploy_anew(served: Served, load: Load, dice: random.Random) -> None:
    """Other arguments: every process of the application becomes another one."""
    old = set(cluster.replica_pids(TINY)) | set(cluster.replica_pids("Ingress"))
    served.kv_memory += 1 << 20
    served.deploy()

    def is_replaced() -> bool:
        now = set(cluster.replica_pids(TINY)) | set(cluster.replica_pids("Ingress"))
        return not now & old and is_whole()

    wait_until(is_replaced, WHOLE_S)


Action = Callable[[Served, Load, random.Random], None]
ACTIONS: dict[Action, int] = {
    kill_replica: 4,
    kill_ingress: 4,
    freeze_replica: 1,
    kill_node: 1,
    kill_node_with_ingress: 2,
    freeze_node: 1,
    change_limits: 2,
    deploy_anew: 2,
}


def rss(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processes() -> list[int]:
    return [
        *cluster.replica_pids(TINY),
        *cluster.replica_pids("Ingress"),
        *cluster.pids_of("ray::ProxyActor"),
        *cluster.pids_of("ray::ServeController"),
    ]


@pytest.fixture(scope="module")
def expected(served: Served) -> list[tuple[Body, list[str]]]:
    return [(body, read(served.url, body)[0]) for body in bodies(random.Random(SEED), 12)]


def test_everything_is_killed_and_replaced(
    served: Served, expected: list[tuple[Body, list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    dice = random.Random(SEED)
    order = [action for action, times in ACTIONS.items() for _ in range(times)]
    dice.shuffle(order)
    with (
        caplog.at_level(logging.WARNING, "torchweave_ray.client"),
        Load(served.url, NUM_CLIENTS, expected, SEED) as load,
    ):
        for action in order:
            wait_until(is_whole, WHOLE_S)
            load.go_on(NUM_CLIENTS)
            action(served, load, dice)
            load.go_on(NUM_CLIENTS)
            assert not load.faults, (action.__name__, load.faults[:3])
        wait_until(is_whole, WHOLE_S)
        load.go_on(max(NUM_CLIENTS, MIN_STREAMS - load.num_streams))
    by_client = sum("going on" in record.getMessage() for record in caplog.records)
    said = said_by_ingresses()
    print(
        f"{load.num_streams} streams; went on by client {by_client}, by ingress "
        f"{said.count('goes on elsewhere')}, bus silent {said.count('silent for')}; "
        f"longest pauses in s: {[round(each, 2) for each in sorted(load.pauses)[-8:]]}"
    )
    assert not load.faults, load.faults[:3]
    assert by_client, "no ingress died under a stream: this shows nothing"
    assert "goes on elsewhere" in said, "no replica died under a stream: this shows nothing"
    assert f"silent for {DEAD_AFTER_S:g} s" in said, "no silence was noticed"
    wait_until(is_idle, 20)


def said_by_ingresses() -> str:
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    return "".join(path.read_text() for path in logs.glob("*Ingress*.log"))


def test_afterwards_memory_stays_flat(
    served: Served, expected: list[tuple[Body, list[str]]]
) -> None:
    """Of every process of Serve, under load, with a part of the clients hanging up anywhere."""
    wait_until(is_whole, WHOLE_S)
    dice = random.Random(SEED)

    def churn(num_streams: int) -> None:
        with Load(served.url, NUM_CLIENTS, expected, SEED) as load:
            for body in bodies(dice, num_streams):
                stream = served.nodes.client.stream(**body)
                pieces = stream.pieces()
                for _ in range(dice.randint(0, 5)):
                    next(pieces, None)
                stream.hang_up()
            load.go_on(num_streams // 4)
        assert not load.faults, load.faults[:3]

    churn(100)
    wait_until(is_idle, 20)
    before = {pid: rss(pid) for pid in processes()}
    churn(240)
    wait_until(is_idle, 20)
    grown = {pid: rss(pid) - was for pid, was in before.items()}
    print(f"{len(grown)} processes, grown by MB: {sorted(g >> 20 for g in grown.values())}")
    assert max(grown.values()) < RSS_SLACK, grown
    assert all(replicas_on(node, TINY) for node in served.nodes.all)
