"""What one tenant can learn of another, and of the server: through the whole app over the real
engine on EchoRunner."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.fuzz.calls import BODIES, GETS, Fuzzed
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys
from torchweave_ray.errors import RequestNotFound

SECRET = "heliotrope"
PROMPT = [5 + i % 200 for i in range(320)]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Shared(Fuzzed):
    """Of several tenants: "a" and "b" have nothing to do with each other, "c" and "d" are a group
    that is called like the first."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        groups = {"a": None, "b": None, "c": "a", "d": "a"}
        keys = [
            ApiKey(id=name, sha256=digest_of(name), tenant=name, cache_group=group)
            for name, group in groups.items()
        ]
        write_keys(folder / "keys.yaml", keys)
        usage = folder / "usage"
        super().__init__(keys_file=str(folder / "keys.yaml"), usage_log=str(usage))
        self._runner = runner

    def ask(self, key: str, method: str, path: str, body: Any = None) -> httpx.Response:  # type: ignore[override]
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                headers = {"Authorization": f"Bearer {key}", "Origin": "https://evil.example"}
                return await client.request(method, path, json=body, headers=headers)

        return self._runner.run(call())


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        shared = Shared(runner, tmp_path)

        async def start() -> None:
            shared.engine.start()

        runner.run(start())
        yield shared
        shared.engine.close()


def cached(shared: Shared, key: str, **body: Any) -> int:
    answer = shared.ask(key, "POST", COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    num: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return num


def test_the_time_of_an_answer_does_not_tell_what_another_tenant_asked(shared: Shared) -> None:
    """What takes the time is what is computed: as much as if nobody had asked before."""
    computed = []
    for key, expected in (("a", 0), ("b", 0), ("a", 304), ("b", 304)):
        before = shared.engine.snapshot().num_computed_tokens
        assert cached(shared, key) == expected
        computed.append(shared.engine.snapshot().num_computed_tokens - before)
    assert computed[0] == computed[1] > 10 * computed[2]
    assert cached(shared, "a", cache_salt="own") == 0


def test_a_group_shares_what_its_tenants_ask_and_nobody_elses(shared: Shared) -> None:
    assert cached(shared, "a") == 0
    assert cached(shared, "c") == 0, "the group is called like this tenant"
    assert cached(shared, "d") == 304


def test_another_tenants_request_can_be_neither_read_nor_guessed(shared: Shared) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    answer = shared.ask("a", "POST", COMPLETIONS, body)
    event = next(line for line in answer.text.splitlines() if line.startswith("id: "))
    stream_id = event.removeprefix("id: ").partition(":")[0]
    assert len(stream_id) >= 32
    mine = shared.ask("a", "GET", f"/v1/streams/{stream_id}")
    assert mine.status_code == 200
    others = shared.ask("b", "GET", f"/v1/streams/{stream_id}")
    unknown = shared.ask("b", "GET", f"/v1/streams/{'0' * len(stream_id)}")
    assert (others.status_code, others.json()["error"]["code"]) == (
        unknown.status_code,
        unknown.json()["error"]["code"],
    )
    assert others.status_code == RequestNotFound("").status


@pytest.mark.parametrize("path", BODIES)
def test_no_content_gets_into_logs_metrics_or_the_usage_log(
    shared: Shared, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Right calls and wrong ones, at the most talkative level."""
    caplog.set_level(logging.DEBUG)
    body = json.loads(
        json.dumps(BODIES[path][0]).replace('"hi"', f'"{SECRET}"').replace('"x"', f'"{SECRET}"')
    )
    for wrong in ({}, {"temperature": SECRET}, {SECRET: 1}, {"guided_regex": f"{SECRET}(" * 3}):
        shared.ask("a", "POST", path, body | wrong)
    shared.ask("a", "POST", COMPLETIONS, {"prompt": SECRET, "user": SECRET, "max_tokens": 2})
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert SECRET not in "".join(record.getMessage() for record in ours)
    shared.ask("a", "GET", "/metrics")
    assert SECRET not in "".join(f.read_text() for f in (tmp_path / "usage").iterdir())
    metrics = asyncio.run(_metrics(shared))
    assert SECRET not in metrics


async def _metrics(shared: Shared) -> str:
    from prometheus_client import generate_latest

    return generate_latest(shared.app.state.metrics.registry).decode()


def test_other_sites_pages_may_read_nothing(shared: Shared) -> None:
    for path in (*GETS, *BODIES):
        for method in ("GET", "OPTIONS"):
            answer = shared.ask("a", method, path)
            if method == "OPTIONS":
                assert answer.status_code in (403, 405), "nobody's preflight is answered"
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_pages_run_nothing_from_outside(shared: Shared) -> None:
    for path in ("/", "/docs"):
        page = shared.ask("a", "GET", path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"


NAMES = (
    *("../../../etc/passwd", "/etc/passwd", "tiny:../../x", "tiny:/etc", "..", "tiny:..%2f"),
    *("http://169.254.169.254/latest", "file:///etc/passwd", "s3://bucket/x", "hf://org/name"),
    *("tiny@main", "tiny:http://localhost:1/", "org/name", "pypi:x==1#y.gguf", "tiny\0"),
)


def test_a_models_name_opens_no_file_and_no_connection(shared: Shared) -> None:
    """Whatever it looks like: only what the operator has set is ever fetched."""
    touched: list[str] = []
    is_on = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if is_on and event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
            touched.append(f"{event} {args}")
        if is_on and event == "open" and not str(args[0]).endswith((".py", ".pyc")):
            touched.append(f"{event} {args}")

    assert shared.ask("a", "POST", CHAT, BODIES[CHAT][1]).status_code == 200  # all is loaded
    sys.addaudithook(audit)
    try:
        for name in NAMES:
            for path, (body, *_) in BODIES.items():
                answer = shared.ask("a", "POST", path, body | {"model": name})
                assert answer.status_code in (400, 404), (path, name, answer.text)
            assert shared.ask("a", "GET", f"/v1/models/{quote(name)}").status_code == 404
    finally:
        is_on = False
    assert not [each for each in touched if "keys.yaml" not in each and "usage" not in each]
