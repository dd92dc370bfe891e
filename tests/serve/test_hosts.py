"""Several nodes on this machine: replicas spread, each node stages for itself, a node that is lost
in the middle of streams (killed, or just silent) changes no text.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_checkpoint
from torchweave_ray.bench.process_tree import ProcessTree

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}
STORE_BYTES = 80 << 20


@dataclass
class Hosts:
    cluster: Cluster
    client: Client
    folder: Path
    nodes: list[Any]

    def add(self) -> Any:
        """A node for one replica, with a store of its own: what it has not staged it lacks."""
        store = self.folder / f"store-{len(self.stores())}"
        store.mkdir()
        node = self.cluster.add_node(
            num_cpus=3, object_store_memory=STORE_BYTES, env_vars={"ARTIFACT_DIR": str(store)}
        )
        self.nodes.append(node)
        return node

    def stores(self) -> list[Path]:
        return sorted(self.folder.glob("store-*"))

    def replicas_of(self, node: Any) -> list[int]:
        return ProcessTree([raylet(node)]).named("ServeReplica", TINY)

    def has_ingress(self, node: Any) -> bool:
        return bool(ProcessTree([raylet(node)]).named("ServeReplica:torchweave:Ingress"))


def raylet(node: Any) -> int:
    (info,) = node.all_processes["raylet"]
    pid: int = info.process.pid
    return pid


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    source = make_checkpoint(folder / "tiny", max_position_embeddings=1024)
    port = cluster.free_port()
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    hosts = Hosts(nodes, Client(port), folder, [])
    try:
        hosts.add()
        hosts.add()
        ray.init(address=nodes.address, namespace="serve", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        model = {"id": "tiny", "recipe": str(source), "num_replicas": 2, "num_cpus": 2}
        engine = {"cache": {"kv_memory": 4 << 20}}
        deploy(config({"models": [model | {"threads": 1, "engine": engine}]}))
        wait_until(lambda: cluster.is_running("torchweave"), 120)
        wait_until(lambda: hosts.client.get("/health")[0] == 200)
        yield hosts
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()


def test_replicas_spread_and_each_node_stages_for_itself(hosts: Hosts) -> None:
    assert [len(hosts.replicas_of(node)) for node in hosts.nodes] == [1, 1]
    artifacts = [[p.name for p in store.glob("tiny-*")] for store in hosts.stores()]
    assert len(artifacts) == 2
    assert artifacts[0] == artifacts[1] != []


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_node_is_lost_in_the_middle_of_streams(hosts: Hosts, how: str) -> None:
    expected = hosts.client.text(PROMPT, **LONG)
    victim = next(node for node in hosts.nodes if not hosts.has_ingress(node))
    streams = [hosts.client.stream(PROMPT, **LONG) for _ in range(8)]
    readers = [stream.pieces() for stream in streams]
    texts = [next(reader) for reader in readers]
    tree = ProcessTree([raylet(victim)]).named("")
    assert len(hosts.replicas_of(victim)) == 1
    send(tree, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    with ThreadPoolExecutor(len(readers)) as pool:
        rest = [pool.submit("".join, reader) for reader in readers]
        _, late = wait(rest, timeout=60)
        send(tree, signal.SIGKILL)  # whoever still waits for it hears now that it is gone
    hosts.nodes.remove(victim)
    hosts.cluster.remove_node(victim, allow_graceful=False)
    assert not late
    assert [a + b.result() for a, b in zip(texts, rest, strict=True)] == [expected] * 8
    assert all(stream.usage and stream.usage["completion_tokens"] == 900 for stream in streams)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    said = "".join(path.read_text() for path in logs.glob("*Ingress*.log"))
    assert "goes on elsewhere" in said
    if how == "silent":
        assert "silent for 4 s" in said
    node = hosts.add()
    wait_until(lambda: hosts.replicas_of(node), 90)
    wait_until(lambda: cluster.is_running("torchweave"), 90)
    assert list(hosts.stores()[-1].glob("tiny-*"))
