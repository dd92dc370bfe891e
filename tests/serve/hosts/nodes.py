"""Several Ray nodes on this machine, each a process tree that can be killed or frozen whole. No
test in here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.serve.cluster import STORE_BYTES, Client, free_port, serving_on
from torchweave_ray.bench.process_tree import ProcessTree

CPUS = 3
"""Of a node: a replica of two, and room for an ingress."""


@dataclass
class Nodes:
    cluster: Cluster
    client: Client
    folder: Path
    all: list[Any] = field(default_factory=list)
    """But for the head, which has room for an ingress only."""

    def add(self) -> Any:
        """A node with a store of its own: what it has not staged it lacks."""
        store = self.folder / f"store-{len(self.stores())}"
        store.mkdir()
        node = self.cluster.add_node(
            num_cpus=CPUS, object_store_memory=STORE_BYTES, env_vars={"ARTIFACT_DIR": str(store)}
        )
        self.all.append(node)
        return node

    def stores(self) -> list[Path]:
        return sorted(self.folder.glob("store-*"))

    def without_ingress(self) -> list[Any]:
        return [node for node in self.all if not replicas_on(node, "Ingress")]

    def forget(self, node: Any) -> None:
        """Of one that has been killed: Ray hears now that it is gone."""
        self.all.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def several_nodes(folder: Path, num_nodes: int) -> Iterator[Nodes]:
    port = free_port()
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = Nodes(cluster, Client(port), folder)
    try:
        for _ in range(num_nodes):
            nodes.add()
        with serving_on(cluster.address, port):
            yield nodes
    finally:
        cluster.shutdown()


def replicas_on(node: Any, deployment: str) -> list[int]:
    return _tree(node).named("ServeReplica", deployment)


def processes_of(node: Any) -> list[int]:
    return _tree(node).named("")


def _tree(node: Any) -> ProcessTree:
    (raylet,) = node.all_processes["raylet"]
    return ProcessTree([raylet.process.pid])


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
