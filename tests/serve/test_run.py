"""Ray's own `serve run` twice on one configuration: adapters, sleep, and a cache that survives."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.lora.adapters import make_adapter
from tests.serve import cluster
from tests.serve.cluster import CONFIG, Client, wait_until
from tests.tiny import make_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = "the quick brown fox jumps over the lazy dog " * 4


@contextmanager
def running(config: Path, port: int, log: Path) -> Iterator[Client]:
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    client = Client(port)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return client.get("/health")[0] == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(client: Client, model: str) -> tuple[str, int]:
    status, answer, _ = client.post(
        "/v1/completions", model=model, prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True
    )
    assert status == 200, answer
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], cached


def test_adapters_sleep_and_a_cache_that_survives(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny", dtype=torch.bfloat16)
    for seed, name in enumerate(("red", "blue")):
        make_adapter(tmp_path / "adapters" / name, artifact, seed=seed)
    model: dict[str, Any] = {"id": "tiny", "artifact": str(artifact), "threads": 1}
    model["lora"] = {"source": str(tmp_path / "adapters")}
    model["sleep_after_s"] = 3
    spill = {"path": str(tmp_path / "spill"), "max_bytes": 1 << 24}
    model["engine"] = {"cache": {"kv_memory": 4 << 20, "spill": spill}}
    values = yaml.safe_load(CONFIG.read_text())
    values["http_options"] |= {"host": "127.0.0.1", "port": cluster.free_port()}
    values["applications"][0]["args"]["models"] = [model]
    config, log = tmp_path / "serve.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(values))
    names = ("tiny", "tiny:red", "tiny:blue")
    with running(config, values["http_options"]["port"], log) as client:
        assert [each["id"] for each in client.get("/v1/models")[1]["data"]] == [
            "tiny", "tiny:blue", "tiny:red",
        ]  # fmt: skip
        cold = [ask(client, name) for name in names]
        assert len({text for text, _ in cold}) == 3
        assert {cached for _, cached in cold} == {0}
        wait_until(lambda: client.get("/health")[1].get("asleep") == ["tiny"], 60)
        woken = [ask(client, name) for name in names]
        assert [text for text, _ in woken] == [text for text, _ in cold]
        assert all(cached > 100 for _, cached in woken)
    with running(config, values["http_options"]["port"], log) as client:
        assert [ask(client, name) for name in names] == woken
