"""The closed loop against a server with known answers: what is sent, counted and reported."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.bench.fake_server import FakeServer
from torchweave_ray.bench.load.dialects import BadAnswer, Completions, events
from torchweave_ray.bench.load.http_client import Exchange
from torchweave_ray.bench.load.prompts import WORDS, PromptSource
from torchweave_ray.bench.load.serving import ServingConfig, run_benchmark
from torchweave_ray.bench.load.targets import (
    BenchmarkError,
    native_target,
    openai_target,
    run_in_loop,
)
from torchweave_ray.bench.load.workloads import Workload
from torchweave_ray.bench.report.points import Point


def _measure(server: FakeServer, config: ServingConfig, kind: str = "completions") -> list[Point]:
    async def main() -> list[Point]:
        async with server.listening() as url:
            if kind in ("completions", "chat"):
                target = await openai_target(url, kind, None)
            else:
                target = native_target(kind, f"{url}/v1/{kind}")
            measured = await run_benchmark([target], config, lambda point: None)
            return [m.point for m in measured]

    return run_in_loop(main())


@pytest.mark.parametrize("kind", ["completions", "chat", "generate"])
def test_every_dialect_is_timed_and_counted(kind: str) -> None:
    server = FakeServer(num_pieces=4)
    config = ServingConfig(
        concurrency=(1, 3), requests=6, workload=Workload(output_len=4), warmup=2
    )
    points = _measure(server, config, kind)
    assert [(p.concurrency, p.requests, p.failed) for p in points] == [(1, 6, 0), (3, 6, 0)]
    for point in points:
        assert (point.prompt_tokens, point.output_tokens, point.cached_tokens) == (600, 24, 96)
        assert point.output_tok_s == pytest.approx(24 / point.wall_s)
        assert point.ttft_ms
        assert point.request_ms
        assert point.itl_ms
        assert point.tpot_ms
        assert 0 < point.ttft_ms.p50 <= point.request_ms.p99
    assert len(server.requests) == 2 * (6 + 2)


def test_the_closed_loop_keeps_c_requests_open_on_c_connections() -> None:
    server = FakeServer()
    _measure(server, ServingConfig(concurrency=(3,), requests=12, warmup=3))
    assert server.max_at_once == 3
    assert server.num_connections == 1 + 3  # one asks for the model's name


def test_the_unbatched_answer_has_no_first_token() -> None:
    (point,) = _measure(FakeServer(), ServingConfig((1,), requests=2), "generate_nobatch")
    assert point.output_tokens == 8
    assert point.ttft_ms is None
    assert point.request_ms is not None
    assert "ttft_ms" not in point.to_dict()


def test_what_is_sent_is_work_w1() -> None:
    server = FakeServer()
    _measure(server, ServingConfig(concurrency=(1,), requests=3, warmup=0))
    bodies = [body for _, body in server.requests]
    assert len({body["prompt"] for body in bodies}) == 3
    for body in bodies:
        assert len(body["prompt"].split()) == 100
        assert body["max_tokens"] == 128
        assert (body["model"], body["temperature"], body["ignore_eos"]) == ("tiny", 0, True)
        assert body["stream_options"] == {"include_usage": True}


def test_an_answer_that_cannot_be_counted_is_a_failure() -> None:
    config = ServingConfig(concurrency=(1,), requests=2, warmup=0)
    (point,) = _measure(FakeServer(usage=False), config)
    assert (point.failed, point.output_tokens) == (2, 0)
    assert "no usage" in point.errors[0]


def test_refusals_are_reported_with_their_reason() -> None:
    with pytest.raises(BenchmarkError, match=r"HTTP 400: .*no such field"):
        _measure(FakeServer(fail=True), ServingConfig(concurrency=(1,)))


def test_no_server_is_one_clear_line() -> None:
    with pytest.raises(BenchmarkError, match="no server at"):
        asyncio.run(openai_target("http://127.0.0.1:9", "completions", None))


def test_events_are_joined_over_chunk_borders() -> None:
    body = (
        b"event: ttft\r\ndata: 0.5\r\n\r\n"
        b"data: one\ndata: two\n\n: keep-alive\n\ndata: \xe2\x82\xac\n\n"
    )
    chunks = tuple((float(i), body[i : i + 1]) for i in range(len(body)))
    found = list(events(Exchange(200, 0.0, chunks, 99.0)))
    assert [(e.name, e.data) for e in found] == [
        ("ttft", "0.5"),
        ("message", "one\ntwo"),
        ("message", ""),
        ("message", "€"),
    ]
    assert [e.at for e in found] == sorted(e.at for e in found)


def test_an_error_in_the_stream_fails_the_request() -> None:
    chunk = b'data: {"error": {"message": "engine died"}}\n\n'
    with pytest.raises(BadAnswer, match="engine died"):
        Completions("tiny").read(Exchange(200, 0.0, ((1.0, chunk),), 1.0))


def test_prompts_repeat_with_their_seed_only() -> None:
    assert PromptSource(5, seed=1).next_prompt() == PromptSource(5, seed=1).next_prompt()
    assert PromptSource(5, seed=1).next_prompt() != PromptSource(5, seed=2).next_prompt()
    assert len(set(WORDS)) == len(WORDS)


def test_a_tokenizer_file_gives_exact_token_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = PromptSource(7, 0, tmp_path / "tokenizer.json").next_prompt()
    assert isinstance(prompt, list)
    assert len(prompt) == 7
