"""Spans of a real run: the ingress's, and queue, prefill and decode below the client's trace."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny import make_tiny_artifact
from torchweave_ray.batch.local import local_app
from torchweave_ray.config import EngineConfig
from torchweave_ray.tracing import FILE

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = "00f067aa0ba902b7"


async def _spans(folder: Path, out: Path) -> list[dict[str, Any]]:
    artifact = make_tiny_artifact(folder / "tiny")
    config = EngineConfig.from_dict({"max_model_len": 128, "runner": {"threads": 1}})
    async with local_app(artifact, config) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "tiny", "prompt": "the fox", "max_tokens": 6, "temperature": 0.5}
            headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
            answer = await client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
        lines: list[str] = []
        async with asyncio.timeout(10):
            while len(lines) < 5:
                await asyncio.sleep(0.1)
                lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines]


def test_a_request_is_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "spans.jsonl"
    monkeypatch.setenv(FILE, str(out))
    spans = {span["name"]: span for span in asyncio.run(_spans(tmp_path, out))}
    assert spans.keys() == {"POST /v1/completions", "generate tiny", "queue", "prefill", "decode"}
    assert {span["context"]["trace_id"] for span in spans.values()} == {f"0x{TRACE}"}
    ids = {name: span["context"]["span_id"] for name, span in spans.items()}
    http, whole = spans["POST /v1/completions"], spans["generate tiny"]
    assert http["parent_id"] == f"0x{CLIENT}"
    assert whole["parent_id"] == ids["POST /v1/completions"]
    assert {spans[p]["parent_id"] for p in ("queue", "prefill", "decode")} == {ids["generate tiny"]}
    assert http["attributes"]["http.response.status_code"] == 200
    attributes = whole["attributes"]
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert 1 <= attributes["gen_ai.usage.output_tokens"] <= 6
    assert spans["queue"]["end_time"] <= spans["prefill"]["end_time"] <= whole["end_time"]
    assert "the fox" not in out.read_text()


def test_off_it_imports_nothing() -> None:
    code = (
        "import sys; from torchweave_ray.tracing import tracing_from_environment as t;"
        "assert t() is None; print(*[m for m in sys.modules if 'opentelemetry' in m])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""
