"""A node whose packets stop: a Ray node in a network namespace of its own, whose cable is pulled in
the middle of streams. Nothing is closed, nobody is told; needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deployments.bus.listener import DEAD_AFTER_S
from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, free_port, wait_until
from tests.serve.hosts.nodes import send
from tests.tiny import make_checkpoint
from torchweave_ray.bench.process_tree import ProcessTree

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}
HERE, THERE = "10.213.7.1", "10.213.7.2"
STORE_BYTES = 80 << 20


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def namespace() -> Iterator[tuple[str, str]]:
    """(its name, our end of its only cable)"""
    name = f"tw{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", f"{HERE}/24", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{THERE}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, name
    finally:
        ip("netns", "delete", name)  # takes the cable along


@contextmanager
def node_in(name: str, address: str, store: Path, log: Path) -> Iterator[int]:
    """The pid of a Ray node's first process."""
    ray_program = str(Path(sys.executable).with_name("ray"))
    command = [ray_program, "start", "--block", f"--address={address}", "--num-cpus=2"]
    command += [f"--node-ip-address={THERE}", f"--object-store-memory={STORE_BYTES}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"ARTIFACT_DIR": str(store)},
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        send(ProcessTree([process.pid]).named(""), signal.SIGKILL)
        process.wait()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Client, str, int]]:
    """A client, the cable of one of two nodes, and the process of that node."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip program")
    source = make_checkpoint(tmp_path / "tiny", max_position_embeddings=1024, dtype="bfloat16")
    port = free_port()
    with namespace() as (name, cable):
        head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": HERE}
        nodes = Cluster(True, head_node_args=head | {"object_store_memory": STORE_BYTES})
        try:
            nodes.add_node(num_cpus=2, node_ip_address=HERE, object_store_memory=STORE_BYTES)
            with node_in(name, nodes.address, tmp_path / "store", tmp_path / "node.log") as pid:
                ray.init(address=nodes.address, namespace="serve", log_to_driver=False)
                wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 3)
                http = {"host": "127.0.0.1", "port": port}
                serve.start(proxy_location="HeadOnly", http_options=http)
                model = {"id": "tiny", "recipe": str(source), "num_replicas": 2, "num_cpus": 2}
                engine = {"cache": {"kv_memory": 4 << 20}}
                deploy(config({"models": [model | {"threads": 1, "engine": engine}]}))
                wait_until(lambda: cluster.is_running("torchweave"), 90)
                client = Client(port)
                wait_until(lambda: client.get("/health")[0] == 200)
                yield client, cable, pid
                serve.shutdown()
        finally:
            ray.shutdown()
            nodes.shutdown()


def test_a_node_without_packets_is_left(served: tuple[Client, str, int]) -> None:
    client, cable, pid = served
    there = ProcessTree([pid]).named("ServeReplica", TINY)
    assert len(there) == 1
    expected = client.text(PROMPT, **LONG)
    streams = [client.stream(PROMPT, **LONG) for _ in range(8)]
    readers = [stream.pieces() for stream in streams]
    texts = [next(reader) for reader in readers]
    ip("link", "set", cable, "down")
    cut_at = time.monotonic()
    with ThreadPoolExecutor(len(readers)) as pool:
        rest = list(pool.map("".join, readers))
    print(f"all streams ended {time.monotonic() - cut_at:.1f} s after the cut")
    assert [a + b for a, b in zip(texts, rest, strict=True)] == [expected] * 8
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    said = "".join(path.read_text() for path in logs.glob("*Ingress*.log"))
    assert f"silent for {DEAD_AFTER_S:g} s" in said
    assert "goes on elsewhere" in said
    assert client.text(PROMPT, **LONG) == expected, "and whoever comes next"
