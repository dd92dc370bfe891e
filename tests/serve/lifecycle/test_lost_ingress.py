"""An ingress is killed under its streams: their clients go on at another one, and miss nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.client import Event, stream

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STREAMS = 6
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/generate", {"prompt": "the quick", "seed": 1, "max_new_tokens": 900}),
    ("/v1/completions", {"prompt": "brown fox", "seed": 2, "max_tokens": 900, "n": 2}),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    # bfloat16, so the native executor: only its texts depend on nobody else in the batch.
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    artifact = make_tiny_artifact(folder, 0, torch.bfloat16, max_position_embeddings=1024)
    model = tiny_model(artifact, kv_memory=8 << 20)
    client = Client(cluster.free_port())
    with cluster.ray_cluster(num_cpus=4, port=client.port):
        deploy(config({"models": [model], "ingress": {"num_replicas": 2}}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: client.get("/health")[0] == 200)
        yield client


def text_of(path: str, events: list[Event]) -> list[str]:
    """By choice."""
    if path == "/v1/generate":
        assert events[-1].name == "done"
        pieces = (event for event in events if event.name in ("message", "json"))
        return ["".join(json.loads(e.data)["text"] if e.name == "json" else e.data for e in pieces)]
    assert events[-1].data == "[DONE]"
    texts = ["", ""]
    for event in events[:-1]:
        for choice in json.loads(event.data)["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_streams_go_on_at_the_other_ingress(
    served: Client, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    calls = [BODIES[i % len(BODIES)] for i in range(NUM_STREAMS)]

    def read(path: str, body: dict[str, Any], under_way: threading.Barrier | None) -> list[str]:
        more = {"ignore_eos": True} | ({} if path == "/v1/generate" else {"stream": True})
        events = []
        for event in stream(url, path, body | more):
            events.append(event)
            if len(events) == 5 and under_way is not None:
                under_way.wait(30)
        numbers = [int(event.id.split(":")[1]) for event in events]
        assert numbers == [*range(1, len(numbers) + 1)]
        return text_of(path, events)

    undisturbed = [read(path, body, None) for path, body in calls]
    with caplog.at_level(logging.WARNING, "torchweave_ray.client"):
        for _ in range(4):  # chance may have put no stream on the one that is killed
            under_way = threading.Barrier(NUM_STREAMS + 1)
            with ThreadPoolExecutor(NUM_STREAMS) as pool:
                reads = [pool.submit(read, path, body, under_way) for path, body in calls]
                under_way.wait(30)
                os.kill(cluster.replica_pids("Ingress")[0], signal.SIGKILL)
                assert [each.result(60) for each in reads] == undisturbed
            if "going on" in caplog.text:
                break
            wait_until(lambda: len(cluster.replica_pids("Ingress")) == 2)
    assert "going on" in caplog.text
