"""Several nodes on this machine: replicas spread, each node stages for itself, a node that is lost
in the middle of streams (killed, or just silent) changes no text.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.serve import cluster
from tests.serve.cluster import config, deploy, wait_until
from tests.serve.hosts.nodes import Nodes, processes_of, replicas_on, send, several_nodes
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("hosts")
    source = make_checkpoint(folder / "tiny", max_position_embeddings=1024, dtype="bfloat16")
    with several_nodes(folder, 2) as nodes:
        model = {"id": "tiny", "recipe": str(source), "num_replicas": 2, "num_cpus": 2}
        engine = {"cache": {"kv_memory": 4 << 20}}
        deploy(config({"models": [model | {"threads": 1, "engine": engine}]}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: nodes.client.get("/health")[0] == 200)
        yield nodes


def test_replicas_spread_and_each_node_stages_for_itself(nodes: Nodes) -> None:
    assert [len(replicas_on(node, TINY)) for node in nodes.all] == [1, 1]
    artifacts = [[p.name for p in store.glob("tiny-*")] for store in nodes.stores()]
    assert len(artifacts) == 2
    assert artifacts[0] == artifacts[1] != []


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_node_is_lost_in_the_middle_of_streams(nodes: Nodes, how: str) -> None:
    expected = nodes.client.text(PROMPT, **LONG)
    victim = nodes.without_ingress()[0]
    streams = [nodes.client.stream(PROMPT, **LONG) for _ in range(8)]
    readers = [stream.pieces() for stream in streams]
    texts = [next(reader) for reader in readers]
    tree = processes_of(victim)
    assert len(replicas_on(victim, TINY)) == 1
    send(tree, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    with ThreadPoolExecutor(len(readers)) as pool:
        rest = [pool.submit("".join, reader) for reader in readers]
        _, late = wait(rest, timeout=60)
        send(tree, signal.SIGKILL)  # whoever still waits for it hears now that it is gone
    nodes.forget(victim)
    assert not late
    assert [a + b.result() for a, b in zip(texts, rest, strict=True)] == [expected] * 8
    assert all(stream.usage and stream.usage["completion_tokens"] == 900 for stream in streams)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    said = "".join(path.read_text() for path in logs.glob("*Ingress*.log"))
    assert "goes on elsewhere" in said
    if how == "silent":
        assert "silent for 4 s" in said
    node = nodes.add()
    wait_until(lambda: replicas_on(node, TINY), 90)
    wait_until(lambda: cluster.is_running("torchweave"), 90)
    assert list(nodes.stores()[-1].glob("tiny-*"))
