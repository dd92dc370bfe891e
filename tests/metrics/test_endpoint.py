"""GET /metrics: what the HTTP side counts, and the application's replicas without a cluster."""

from __future__ import annotations

import asyncio

import httpx

from tests.api.conftest import load_tokenizer
from tests.fakes import FakeBackend
from tests.metrics.test_engine_metrics import Samples, samples_of
from torchweave_ray.api.app import create_app

BODY = {"prompt": "Gravity is", "max_new_tokens": 4}


def test_answers_are_counted_by_path_status_and_kind() -> None:
    async def run() -> tuple[Samples, Samples, str]:
        app = create_app(FakeBackend(), load_tokenizer)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.post("/v1/generate", json=BODY)).status_code == 200
            assert (await client.post("/v1/generate", json={"promt": "x"})).status_code == 400
            for path in ("/nowhere", "/else"):
                assert (await client.get(path)).status_code == 404
            assert (await client.get("/health")).status_code == 200
            answer = await client.get("/metrics")
        kind = answer.headers["content-type"]
        return samples_of(answer.text, "path", "status"), samples_of(answer.text, "kind"), kind

    by_path, by_kind, content_type = asyncio.run(run())
    assert content_type.startswith("text/plain; version=0.0.4")
    counted = {k: v for (name, k), v in by_path.items() if name == "torchweave_http_requests_total"}
    happened = {key: value for key, value in counted.items() if value}
    assert happened == {"/v1/generate,200": 1, "/v1/generate,400": 1, "other,404": 2}
    assert counted["/v1/generate,429"] == 0, "what a burst of refusals grows from"
    assert by_kind["torchweave_http_errors_total", "invalid_request"] == 1
    assert by_kind["torchweave_http_errors_total", "not_found"] == 2
    assert by_kind["torchweave_http_errors_total", "overloaded"] == 0
    assert by_path["torchweave_http_first_byte_seconds_count", ","] == 4
