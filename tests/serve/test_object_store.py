"""`staging: object_store`: one copy a node, the same text, owners that die, a store too small."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray import serve
from ray.cluster_utils import Cluster

from optimizer.pipeline import optimize
from tests.serve.cluster import (
    STORE_BYTES,
    Client,
    config,
    deploy,
    deployment_message,
    free_port,
    is_running,
    replica_pids,
    serving_on,
    wait_until,
)
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.build import load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.models.artifact import WEIGHTS
from torchweave_ray.models.mapped_file import map_shared

ENGINE = {"max_model_len": 256, "cache": {"kv_memory": 1 << 23}}
PROMPTS = ("What is gravity?", "The sun is", "A star")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed for the native kernels, which then compute on the object store's memory."""
    folder = tmp_path_factory.mktemp("object-store")
    make_checkpoint(folder / "tiny", num_hidden_layers=1)
    recipe = folder / "tiny.yaml"
    recipe.write_text("source: tiny\ndtype: bfloat16\nverify: none\n")
    return optimize(recipe, folder / "store")


def test_weights_that_others_map_are_not_written(artifact: Path) -> None:
    """In a process of its own: its memory stays protected, and it dies of the attempt."""
    path = artifact / WEIGHTS
    code = (
        "import mmap, numpy, sys\n"
        "from torchweave_ray.models.mapped_file import map_shared\n"
        f"file = open({str(path)!r}, 'r+b')\n"
        "memory = numpy.frombuffer(mmap.mmap(file.fileno(), 0), numpy.uint8)\n"
        "whole = map_shared(memory)\n"
        "print(int(whole[5000]), flush=True)\n"
        "whole[5000] = 7\n"
    )
    before = path.read_bytes()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGSEGV, ran.stderr
    assert int(ran.stdout) == before[5000]
    assert path.read_bytes() == before


def test_a_buffer_off_the_cache_lines_is_copied() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 3 * mmap.PAGESIZE), np.uint8)
    for offset in range(8, 64, 8):
        whole = map_shared(memory[offset:])
        assert whole.data_ptr() % 64 == 0
        assert whole.data_ptr() != memory.ctypes.data + offset
        assert len(whole) == len(memory) - offset


def test_a_model_of_a_buffer_is_the_model_of_the_file(artifact: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "documents"
    elsewhere.mkdir()
    for path in artifact.glob("*.json"):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    with (artifact / WEIGHTS).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    engine = EngineConfig.from_dict(ENGINE)
    shared = load_model(elsewhere, engine, "m", np.frombuffer(memory, np.uint8))
    mapped = load_model(artifact, engine, "m")
    assert shared.info == mapped.info


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def nodes(port: int) -> Iterator[Cluster]:
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    try:
        with serving_on(cluster.address, port):
            yield cluster
    finally:
        cluster.shutdown()


def _args(artifact: Path, name: str, target: str, num_replicas: int = 1) -> dict[str, object]:
    model = {
        "id": name,
        "artifact": str(artifact),
        "num_replicas": num_replicas,
        "num_cpus": 1,
        "threads": 1,
        "engine": ENGINE,
    }
    return {"models": [model], "staging": target, "verify": "full"}


def _texts(client: Client) -> list[str]:
    return [client.text(prompt, max_tokens=24) for prompt in PROMPTS for _ in range(2)]


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_two_nodes_serve_from_one_owner(nodes: Cluster, port: int, artifact: Path) -> None:
    deploy(config(_args(artifact, "files", "files"), name="files"))
    wait_until(lambda: is_running("files"))
    expected = _texts(Client(port))
    serve.delete("files")

    spread = {"name": "ModelReplica:shared", "max_replicas_per_node": 1}
    args = _args(artifact, "shared", "object_store", num_replicas=2)
    deploy(config(args, deployments=[spread]))
    wait_until(lambda: is_running("torchweave"), 90)
    client = Client(port)
    assert _texts(client) == expected
    pids = replica_pids("ModelReplica:shared")
    assert len(pids) == 2
    for pid in pids:
        assert WEIGHTS not in _maps(pid)
        assert [line for line in _maps(pid).splitlines() if "r--s" in line and "plasma" in line]

    (owner,) = replica_pids("Weights:shared")
    os.kill(owner, signal.SIGKILL)
    assert _texts(client) == expected
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: len(set(replica_pids("ModelReplica:shared")) - {pids[0]}) == 2, 90)
    wait_until(lambda: is_running("torchweave"), 90)
    assert replica_pids("Weights:shared") != [owner]
    assert _texts(client) == expected
    serve.delete("torchweave")


@pytest.mark.slow
@pytest.mark.ray
def test_a_store_that_is_too_small_is_refused_with_numbers(nodes: Cluster, tmp_path: Path) -> None:
    wide = make_tiny_artifact(tmp_path / "wide", num_hidden_layers=1, intermediate_size=120_000)
    deploy(config(_args(wide, "wide", "object_store")))
    message = wait_until(
        lambda: (
            json.dumps(deployment_message("torchweave", "ModelReplica:wide"))
            if "MB free of" in deployment_message("torchweave", "ModelReplica:wide")
            else None
        ),
        90,
    )
    assert "MB free of 84, the weights need 92 MB: start Ray with a larger" in message
    serve.delete("torchweave")
