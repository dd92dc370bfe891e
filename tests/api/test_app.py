"""Health, models, request ids, refusals: what surrounds a generation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.api.conftest import TOKENIZER, Api, load_tokenizer
from tests.fakes import MODEL, FakeBackend, Script
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import (
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    Overloaded,
    RequestError,
    RequestTooLarge,
    Unavailable,
)
from torchweave_ray.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_health(api: Api) -> None:
    for path in ("/health", "/readyz", "/livez"):
        response = api.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Unavailable("all replicas are starting"), "all replicas are starting"),
        (ZeroDivisionError("secret"), "the health check failed; the server's log says why"),
        (None, "the backend does not answer"),
    ],
)
def test_ill_health_says_why_and_lives_on(api: Api, failure: Exception | None, reason: str) -> None:
    async def check() -> None:
        if failure is not None:
            raise failure
        await asyncio.Event().wait()

    settings = ApiSettings(health_timeout_s=0.05)
    api.app = create_app(api.backend, load_tokenizer, settings, check_health=check)
    for path in ("/health", "/readyz"):
        response = api.get(path)
        assert response.status_code == 503
        assert response.json() == {"status": "unavailable", "reason": reason}
    assert api.get("/livez").status_code == 200


def test_no_model_is_ill_health(api: Api) -> None:
    api.backend.infos = []
    assert api.get("/health").status_code == 503


def test_model(api: Api) -> None:
    assert api.get("/model").json() == {
        "model": "tiny",
        "vocab_size": 300,
        "eos": 2,
        "eos_token_ids": [2],
        "device": "cpu",
        "dtype": "float32",
        "kv_dtype": "float32",
        "quantization": {},
        "speculation": "none",
        "max_batch_size": 8,
        "context_length": 512,
        "block_size": 16,
        "architecture": "LlamaForCausalLM",
        "executor": "torch",
        "artifact_id": "artifact-1",
        "numerics_id": "numerics-1",
        "asleep": False,
    }


def test_several_models(api: Api) -> None:
    api.backend.infos = [MODEL, replace(MODEL, id="org/big", eos_token_ids=())]
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "org/big"]
    assert api.get("/v1/models/org/big").json() == listed["data"][1]
    assert api.get("/model?model=org/big").json()["eos"] is None
    assert api.sent("/v1/generate", {"prompt": "hi"}).model == "tiny"
    assert api.sent("/v1/generate", {"prompt": "hi", "model": "org/big"}).model == "org/big"
    api.configure(default_model="org/big")
    assert api.sent("/v1/generate", {"prompt": "hi"}).model == "org/big"


@pytest.mark.parametrize(
    ("given", "is_echoed"),
    [
        ("req-1.a:B_2", True),
        ("", False),
        ("x" * 129, False),
        ("a b", False),
        ("a,b", False),
        ("<script>", False),
    ],
)
def test_request_id(api: Api, given: str, is_echoed: bool) -> None:
    for path in ("/health", "/nowhere"):
        answered = api.get(path, headers={"x-request-id": given}).headers["x-request-id"]
        assert (answered == given) is is_echoed
        assert answered
    answer = api.post("/v1/chat/completions", CHAT)
    assert answer.json()["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert api.get("/health").headers["x-request-id"] != api.get("/health").headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (InvalidRequest("too long", "prompt"), 400, None),
        (RequestTooLarge("needs more blocks than there are"), 413, None),
        (Overloaded("12,000 tokens wait", None, None, 3.2), 429, "4"),
        (Overloaded("full"), 429, "1"),
        (Unavailable("draining", None, "draining", 0.1), 503, "1"),
        (DeadlineExceeded("too late"), 504, None),
        (EngineDead("gone"), 500, None),
        (RuntimeError("secret"), 500, None),
    ],
)
def test_a_refusal_is_a_real_status(
    api: Api, refusal: Exception, status: int, retry_after: str | None, stream: bool
) -> None:
    api.backend.script = Script(refusal=refusal)
    response = api.post("/v1/chat/completions", CHAT | {"stream": stream})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == retry_after
    assert ("retry-after-ms" in response.headers) == (retry_after is not None)
    if isinstance(refusal, RequestError):
        assert response.json() == refusal.body()
    else:
        assert str(refusal) not in response.text
        assert response.json()["error"]["type"] == "server_error"


def test_an_answer_that_ends_early_is_an_error(api: Api) -> None:
    class Cut(FakeBackend):
        async def generate(self, request: Any) -> Any:
            async for output in super().generate(request):
                if not output.is_last:
                    yield output

    api.backend = Cut()
    api.configure()
    assert api.post("/v1/generate_nobatch", {"prompt": "hi"}).status_code == 503
    assert "event: error" in api.post("/v1/generate", {"prompt": "hi"}).text


def test_a_tokenizer_is_loaded_once_per_artifact_and_again_after_a_failure(api: Api) -> None:
    loads: list[str] = []
    failures = [OSError("no replica yet")]

    async def load(model_id: str) -> Tokenizer:
        loads.append(model_id)
        await asyncio.sleep(0)
        if failures:
            raise failures.pop()
        return TOKENIZER

    api.app = create_app(api.backend, load)
    assert api.post("/v1/generate", {"prompt": "hi"}).status_code == 500
    assert api.post("/v1/completions", {"prompt": ["hi"] * 3}).status_code == 200
    assert api.post("/v1/generate", {"prompt": "hi"}).status_code == 200
    assert loads == ["tiny", "tiny"]
    api.backend.infos = [replace(MODEL, artifact_id="artifact-2")]
    assert api.sent("/v1/generate", {"prompt": "hi"}).artifact_id == "artifact-2"
    assert loads == ["tiny"] * 3


def test_a_model_without_a_chat_template_completes_only(api: Api) -> None:
    async def load(model_id: str) -> Tokenizer:
        return FakeBackend().tokenizer

    api.app = create_app(api.backend, load)
    response = api.post("/v1/chat/completions", CHAT)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    assert api.post("/v1/completions", {"prompt": "hi"}).status_code == 200


def test_the_app_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import torchweave_ray.api.app, sys;"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
