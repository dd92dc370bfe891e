"""Who is let in, and what his key allows: through the whole app, over a fake backend."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tests.api.conftest import Api, load_tokenizer
from tests.fakes import MODEL, FakeBackend, Script
from torchweave_ray.api.access import keyring, quota
from torchweave_ray.api.access.guard import HEALTH
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys
from torchweave_ray.api.app import create_app
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.errors import Overloaded

GOOD = "tw-good"
BODY = {"prompt": "Gravity", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
OTHER = "bigger"


class Guarded(Api):
    """With a keys file that holds one key, `GOOD`."""

    def __init__(self, runner: asyncio.Runner, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.write(ApiKey(id="good", sha256=digest_of(GOOD), tenant="us", **settings))
        backend = FakeBackend(models=[MODEL, replace(MODEL, id=OTHER)])
        super().__init__(runner, backend, ApiSettings(keys_file=str(path)))

    def write(self, *keys: ApiKey) -> None:
        write_keys(self.path, keys)

    def change(self, **values: Any) -> None:
        self.write(ApiKey(id="good", sha256=digest_of(GOOD), tenant="us", **values))
        os.utime(self.path, ns=(0, self.path.stat().st_mtime_ns + 1_000_000_000))

    def ask(self, path: str = "/v1/completions", body: Any = BODY, key: str = GOOD) -> Any:
        return self.post(path, body, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def guarded(runner: asyncio.Runner, tmp_path: Path, request: pytest.FixtureRequest) -> Guarded:
    return Guarded(runner, tmp_path / "keys.yaml", getattr(request, "param", {}))


def with_limits(**values: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("guarded", [values], indirect=True)


def test_every_route_but_health_wants_a_key(guarded: Guarded) -> None:
    paths = [
        (r.path, m) for r in guarded.app.routes if isinstance(r, Route) for m in r.methods or ()
    ]
    assert len(paths) > 20
    for path, method in paths:
        path = path.replace("{model_id:path}", "health").replace("{name}", "main.js")
        for written in (path, f"{path}/", f"{path}?x=/health"):
            response = guarded.request(method, written, json={})
            if written in HEALTH or (path in HEALTH and "?" in written):
                assert response.status_code == 200, written
            else:
                assert response.status_code == 401, written
    assert guarded.get("/no/such/path").status_code == 401
    assert guarded.request("OPTIONS", "/v1/completions").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {GOOD}"},
        {"authorization": f"bearer  {GOOD} "},
        {"x-api-key": GOOD},
        {"x-api-key": GOOD, "authorization": "Basic cHJveHk6cHJveHk="},
    ],
)
def test_a_key_comes_as_bearer_or_x_api_key(guarded: Guarded, headers: dict[str, str]) -> None:
    assert guarded.post("/v1/completions", BODY, headers=headers).status_code == 200
    (request,) = guarded.backend.requests
    assert request.tenant == "us"


@pytest.mark.parametrize("key", ["", "tw-bad", "good", digest_of(GOOD), "a\u00e9", GOOD + "x"])
def test_a_wrong_key_is_refused_in_each_protocols_shape(guarded: Guarded, key: str) -> None:
    header = {"authorization": f"Bearer {key}".encode()}
    response = guarded.post("/v1/chat/completions", CHAT, headers=header)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "authentication_error"
    assert key == "" or key not in response.text
    response = guarded.post("/v1/messages", CHAT, headers={"x-api-key": key.encode()})
    assert response.status_code == 401
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["x-request-id"]
    assert not guarded.backend.requests


@with_limits(expires="2020-01-01T00:00:00Z")
def test_an_expired_key_says_so_to_its_holder_only(guarded: Guarded) -> None:
    assert guarded.ask().json()["error"]["code"] == "expired_api_key"
    assert guarded.ask(key="x").json()["error"]["code"] == "invalid_api_key"


def test_keys_are_read_again_when_their_file_changes(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keyring, "LOOK_S", 0.0)
    guarded.write(ApiKey(id="new", sha256=digest_of("new"), tenant="them"))
    assert guarded.ask(key="new").status_code == 200
    assert guarded.ask().status_code == 401
    guarded.path.write_text("keys: [{id: broken}]")
    assert guarded.ask(key="new").status_code == 200, "the old keys stay"
    assert "keys[0].sha256 is required" in caplog.text
    guarded.path.unlink()
    assert guarded.ask(key="new").status_code == 200
    guarded.write()
    assert guarded.ask(key="new").status_code == 401


def test_metrics_want_an_operators_key(guarded: Guarded) -> None:
    as_user = guarded.get("/metrics", headers={"x-api-key": GOOD})
    assert as_user.status_code == 403
    assert as_user.json()["error"]["type"] == "permission_error"
    guarded.write(ApiKey(id="o", sha256=digest_of("op"), tenant="ops", operator=True))
    settings = ApiSettings(keys_file=str(guarded.path))
    operated = Api(guarded._runner, guarded.backend, settings)
    assert operated.get("/metrics", headers={"x-api-key": "op"}).status_code == 200
    settings = ApiSettings(
        keys_file=str(guarded.path), metrics_need_key=False, pages_need_key=False
    )
    opened = Api(guarded._runner, guarded.backend, settings)
    for path in ("/metrics", "/", "/playground/main.js", "/docs", "/openapi.json"):
        assert opened.get(path).status_code == 200, path
    assert opened.get("/v1/models").status_code == 401


def test_only_an_operator_lets_replicas_sleep(guarded: Guarded) -> None:
    operator = ApiKey(id="o", sha256=digest_of("op"), tenant="ops", operator=True)
    guarded.write(operator, ApiKey(id="good", sha256=digest_of(GOOD), tenant="us"))
    operated = Api(guarded._runner, guarded.backend, ApiSettings(keys_file=str(guarded.path)))
    for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
        refused = operated.request(method, path, headers={"x-api-key": GOOD})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
        assert operated.request(method, path, headers={"x-api-key": "op"}).status_code == 200


def test_a_browser_asks_for_the_key_as_a_password(guarded: Guarded) -> None:
    page = guarded.get("/")
    assert page.status_code == 401
    assert page.headers["www-authenticate"].startswith("Basic")
    assert guarded.get("/v1/models").headers["www-authenticate"] == "Bearer"
    for user_and_password in (f"me:{GOOD}", f"{GOOD}:"):
        word = base64.b64encode(user_and_password.encode()).decode()
        basic = {"authorization": f"Basic {word}"}
        assert guarded.get("/", headers=basic).status_code == 200
        same = basic | {"origin": "http://test"}
        assert guarded.post("/v1/completions", BODY, headers=same).status_code == 200
        for origin in ({}, {"origin": "http://evil"}, {"origin": "null"}):
            crossed = guarded.post("/v1/completions", BODY, headers=basic | origin)
            assert crossed.status_code == 401, "a browser sends it along by itself"
    assert guarded.get("/", headers={"authorization": "Basic ???"}).status_code == 401


@with_limits(models=("tin*",), max_context=20, max_priority=2)
def test_a_key_limits_models_context_and_priority(guarded: Guarded) -> None:
    listed = guarded.get("/v1/models", headers={"x-api-key": GOOD}).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [("tiny", 20)]
    for name in (OTHER, "no-such-model"):
        refused = guarded.ask(body=BODY | {"model": name})
        assert refused.status_code == 403
        assert refused.json()["error"]["param"] == "model"
        assert "tin*" in refused.text
    long = guarded.ask(body=BODY | {"max_tokens": 20})
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert guarded.ask(body=BODY | {"priority": 2}).status_code == 200
    eager = guarded.ask(body=BODY | {"priority": 3})
    assert eager.status_code == 403
    assert eager.json()["error"]["param"] == "priority"


@with_limits(models=(OTHER,))
def test_the_default_model_is_one_that_the_key_may_use(guarded: Guarded) -> None:
    assert guarded.ask().json()["model"] == OTHER


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clocked(guarded: Guarded) -> Clock:
    """The app again, on a clock that stands still."""
    clock = Clock()
    settings = ApiSettings(keys_file=str(guarded.path), stream_keep_s=0)
    accounts = quota.LocalAccounts(clock)
    guarded.app = create_app(guarded.backend, load_tokenizer, settings, accounts=accounts)
    return clock


@with_limits(requests_per_minute=3)
def test_requests_a_minute(guarded: Guarded) -> None:
    clock = clocked(guarded)
    for left in (2, 1, 0):
        response = guarded.ask()
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert response.headers["x-ratelimit-reset-requests"] == f"{20.0 * (3 - left):.3f}s"
        assert "x-ratelimit-limit-tokens" not in response.headers
    for path, body in (("/v1/completions", BODY), ("/v1/messages", CHAT), ("/tokenize", BODY)):
        refused = guarded.ask(path, body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "20"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "3 requests a minute" in refused.json()["error"]["message"]
    assert guarded.get("/v1/models", headers={"x-api-key": GOOD}).status_code == 200
    clock.now += 20.001
    assert guarded.ask().status_code == 200
    assert guarded.ask().status_code == 429


@with_limits(tokens_per_minute=600)
def test_tokens_a_minute_are_those_that_calls_came_to(guarded: Guarded) -> None:
    clock = clocked(guarded)
    first = guarded.ask(body=BODY | {"max_tokens": 100})
    usage = first.json()["usage"]
    spent = usage["total_tokens"]
    assert 0 < spent < 50, "not the 100 that were reserved"
    reserved = 100 + usage["prompt_tokens"]
    assert first.headers["x-ratelimit-remaining-tokens"] == str(600 - spent)
    assert guarded.ask(body=BODY | {"max_tokens": 200}).status_code == 200
    streamed = guarded.ask(body=BODY | {"max_tokens": 100, "stream": True})
    # Its headers go out before its tokens: what it reserved counts.
    assert streamed.headers["x-ratelimit-remaining-tokens"] == str(600 - 2 * spent - reserved)
    guarded.backend.script = Script(["word "] * 400)  # it says more than was bounded
    assert guarded.ask(body={"prompt": "Gravity"}).status_code == 200
    refused = guarded.ask()
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_s = int(refused.headers["retry-after"])
    clock.now += wait_s
    assert guarded.ask(body={"prompt": "x", "max_tokens": 1}).status_code == 200


@with_limits(tokens_per_minute=60)
def test_what_no_minute_holds_needs_a_rested_key_and_is_paid_for(guarded: Guarded) -> None:
    clock = clocked(guarded)
    assert guarded.ask(body=BODY | {"max_tokens": 200}).status_code == 200
    assert guarded.ask(body=BODY | {"max_tokens": 200}).status_code == 429
    clock.now += 60
    assert guarded.ask(body=BODY | {"max_tokens": 200}).status_code == 200


@with_limits(tokens_per_minute=600)
def test_a_call_that_the_engine_refuses_costs_no_tokens(guarded: Guarded) -> None:
    clocked(guarded)
    guarded.backend.script = Script(refusal=Overloaded("full", None, "queue_full", 2.0))
    refused = guarded.ask()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "2"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "600"


@with_limits(max_concurrent_requests=2)
def test_requests_at_once(guarded: Guarded) -> None:
    gate = asyncio.Event()
    guarded.backend.script = Script(gates={1: gate})

    async def scene() -> list[int]:
        transport = httpx.ASGITransport(guarded.app)
        headers = {"x-api-key": GOOD}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask() -> int:
                answer = await client.post("/v1/completions", json=BODY, headers=headers)
                return answer.status_code

            held = [asyncio.create_task(ask()) for _ in range(2)]
            while len(guarded.backend.requests) < 2:
                await asyncio.sleep(0)
            third = await ask()
            gate.set()
            return [third, *await asyncio.gather(*held), await ask()]

    assert guarded.run(scene()) == [429, 200, 200, 200]


def test_a_changed_limit_holds_at_once_and_forgets_nothing(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "LOOK_S", 0.0)
    guarded.change(requests_per_minute=3)
    assert [guarded.ask().status_code for _ in range(3)] == [200, 200, 200]
    guarded.change(requests_per_minute=4)
    assert [guarded.ask().status_code for _ in range(2)] == [200, 429]
    guarded.change()
    assert guarded.ask().status_code == 200


def test_a_stream_is_opened_again_by_its_own_tenant_only(guarded: Guarded) -> None:
    guarded.write(
        ApiKey(id="good", sha256=digest_of(GOOD), tenant="us"),
        ApiKey(id="bad", sha256=digest_of("bad"), tenant="them"),
    )
    api = Api(guarded._runner, guarded.backend, ApiSettings(keys_file=str(guarded.path)))
    streamed = api.post("/v1/completions", BODY | {"stream": True}, headers={"x-api-key": GOOD})
    path = f"/v1/streams/{streamed.headers['x-stream-id']}"
    assert api.get(path, headers={"x-api-key": "bad"}).status_code == 404
    again = api.get(path, headers={"x-api-key": GOOD})
    assert again.status_code == 200
    assert "data: [DONE]" in again.text
    assert [json.loads(line[6:]) for line in again.text.splitlines() if line[:7] == "data: {"]
