"""What calls came to: in the log, which outlives its process, and in the metrics."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Api
from tests.fakes import FakeBackend, Script
from torchweave_ray.api.access import usage
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys
from torchweave_ray.api.access.usage_log import UsageLog
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import ConfigError, Overloaded

BODY = {"prompt": "Gravity", "max_tokens": 64}
SECRET = "the quick brown fox of nobody's business"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("usage-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def sums(lines: list[dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in lines:
        total.update({k: v for k, v in line.items() if k.endswith("_tokens")})
    return total


class Metered(Api):
    def __init__(self, runner: asyncio.Runner, folder: Path, tenants: int = 1) -> None:
        keys = [
            ApiKey(id=f"k{i}", sha256=digest_of(f"tw-{i}"), tenant=f"t{i}") for i in range(tenants)
        ]
        write_keys(folder / "keys.yaml", keys)
        settings = ApiSettings(
            keys_file=str(folder / "keys.yaml"),
            usage_log=str(folder / "usage"),
            metrics_need_key=False,
        )
        super().__init__(runner, FakeBackend(), settings)
        self.folder = folder / "usage"

    def ask(self, path: str, body: Any, key: int = 0) -> httpx.Response:
        return self.post(path, body, headers={"x-api-key": f"tw-{key}"})


@pytest.fixture
def metered(tmp_path: Path) -> Any:
    with asyncio.Runner() as runner:
        yield Metered(runner, tmp_path)


def test_every_kind_of_call_has_one_line_that_equals_its_usage(metered: Metered) -> None:
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 64}
    calls = [
        ("/v1/completions", {**BODY, "prompt": SECRET, "n": 2}),
        ("/v1/completions", {**BODY, "prompt": ["a b", "c"], "stream": True}),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/messages", chat),
        ("/v1/responses", {"input": SECRET}),
        ("/v1/generate", {"prompt": SECRET}),
        ("/v1/generate_nobatch", {"prompt": SECRET}),
        ("/v1/embeddings", {"input": SECRET}),
    ]
    expected = Counter[str]()
    for path, body in calls:
        assert metered.ask(path, body).status_code == 200, path
        texts = 1 if path == "/v1/embeddings" else sum(r.n for r in metered.backend.requests)
        assert texts
        for request in metered.backend.requests:
            expected["prompt_tokens"] += len(request.prompt_token_ids)
            if path != "/v1/embeddings":
                pieces = metered.backend.script.pieces
                per_text = sum(len(metered.backend.tokenizer.encode(p)) for p in pieces)
                expected["completion_tokens"] += per_text * request.n
                expected["cached_tokens"] += 1
        metered.backend.requests.clear()
    lines = lines_of(metered.folder)
    assert [line["path"] for line in lines] == [path for path, _ in calls]
    assert {line["outcome"] for line in lines} == {"completed"}
    assert {(line["tenant"], line["key"], line["model"]) for line in lines} == {
        ("t0", "k0", "tiny")
    }
    assert sums(lines) == expected
    text = "".join(file.read_text() for file in metered.folder.iterdir())
    assert "fox" not in text
    assert "Gravity" not in text
    metrics = metered.get("/metrics").text
    for kind in ("prompt", "cached", "completion"):
        line = f'torchweave_tenant_tokens_total{{kind="{kind}",tenant="t0"}}'
        assert f"{line} {expected[f'{kind}_tokens']:.1f}" in metrics
    assert 'torchweave_tenant_requests_total{outcome="completed",tenant="t0"} 8.0' in metrics
    assert "fox" not in metrics


def test_outcomes(metered: Metered) -> None:
    metered.backend.script = Script(refusal=Overloaded("full", None, "queue_full", 1.0))
    assert metered.ask("/v1/completions", BODY).status_code == 429
    metered.backend.script = Script(failure=Overloaded("lost", None, None, 1.0))
    metered.ask("/v1/completions", BODY | {"stream": True})
    metered.backend.script = Script(failure=RuntimeError("a bug"))
    metered.ask("/v1/completions", BODY | {"stream": True})
    refused, *failed = lines_of(metered.folder)
    assert refused["outcome"] == "refused"
    assert sums([refused]).total() == 0
    assert [line["outcome"] for line in failed] == ["failed", "failed"]
    assert all(line["completion_tokens"] and line["prompt_tokens"] for line in failed)


def test_an_open_call_is_noted_as_it_goes(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "NOTE_S", 0.01)
    gate = asyncio.Event()
    metered.backend.script = Script(gates={2: gate})

    async def scene() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        transport = httpx.ASGITransport(metered.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"x-api-key": "tw-0"}
            call = asyncio.create_task(client.post("/v1/completions", json=BODY, headers=headers))
            while not (early := lines_of(metered.folder)) or not early[-1]["completion_tokens"]:
                await asyncio.sleep(0.005)
            gate.set()
            await call
            return early, lines_of(metered.folder)

    early, lines = metered.run(scene())
    assert all("outcome" not in line for line in early)
    assert lines[-1]["outcome"] == "completed"
    assert {line["request_id"] for line in lines} == {lines[0]["request_id"]}
    pieces = [len(metered.backend.tokenizer.encode(p)) for p in metered.backend.script.pieces]
    assert sums(early)["completion_tokens"] == sum(pieces[:2])
    assert sums(lines)["completion_tokens"] == sum(pieces)
    assert sums(lines)["prompt_tokens"] == sums(early)["prompt_tokens"] > 0


def test_labels_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_TENANTS", 2)
    with asyncio.Runner() as runner:
        metered = Metered(runner, tmp_path, tenants=5)
        for key in range(5):
            assert metered.ask("/v1/completions", BODY, key).status_code == 200
        metrics = metered.get("/metrics").text
    assert set(re.findall(r'tenant="(\w+)"', metrics)) == {"t0", "t1", "other"}
    assert 'torchweave_tenant_requests_total{outcome="completed",tenant="other"} 3.0' in metrics


def test_a_full_file_is_followed_by_another(tmp_path: Path) -> None:
    log = UsageLog(tmp_path, max_bytes=100)
    for number in range(20):
        log.write({"number": number, "text": "x" * 20})
    log.close()
    assert [line["number"] for line in lines_of(tmp_path)] == list(range(20))
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 10
    assert max(sizes) <= 100


def test_a_folder_that_cannot_be_written_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"usage_log .*file/usage cannot be written"):
        UsageLog(tmp_path / "file" / "usage", 100)


WRITER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.api.access.killed_server import serve
asyncio.run(serve(Path({folder!r})))
"""


def test_sigkill_takes_at_most_the_last_second(tmp_path: Path) -> None:
    """A server in a process of its own streams a token every 10 ms; what its client had, less a
    second of it, is in the log of the dead."""
    root = str(Path(__file__).resolve().parents[3])
    code = WRITER.format(root=root, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        arrivals: list[float] = []
        body = {"prompt": "Gravity", "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    arrivals.append(time.monotonic())
                if arrivals and arrivals[-1] > arrivals[0] + 1.8:
                    process.send_signal(signal.SIGKILL)
                    break
        process.wait()
    num_before = sum(1 for at in arrivals if at < arrivals[-1] - 1.0)
    lines = lines_of(tmp_path)
    assert lines
    assert "outcome" not in lines[-1]
    assert num_before > 5
    assert num_before <= sums(lines)["completion_tokens"]
    assert sums(lines)["prompt_tokens"] > 0
