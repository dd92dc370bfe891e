"""schemathesis over /openapi.json: no server error, no status that the document does not name."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from tests.api.conftest import load_tokenizer
from tests.fakes import FakeBackend
from torchweave_ray.api.app import create_app

schemathesis: Any = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow

APP = create_app(FakeBackend(), load_tokenizer)


def ask(method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(call())


SCHEMA = schemathesis.openapi.from_dict(ask("GET", "/openapi.json").json())


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_a_documented_one(case: Any) -> None:
    kwargs = case.as_transport_kwargs(base_url="http://test")
    sent = {key: kwargs[key] for key in ("json", "content", "headers", "params") if key in kwargs}
    if "data" in kwargs:
        sent["content"] = kwargs["data"]
    response = ask(case.method, kwargs["url"], **sent)
    is_late = response.status_code == 504 and "the deadline passed" in response.text  # of 1 ms
    assert response.status_code < 500 or is_late, response.text
    methods = SCHEMA.raw_schema["paths"][case.path]
    if case.method.lower() not in methods:  # it tries the others too
        assert response.status_code == 405
        return
    assert str(response.status_code) in methods[case.method.lower()]["responses"], response.text
