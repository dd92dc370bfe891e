"""Arrivals by a schedule: who sends when, from when latencies count, and what is good."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fake_server import FakeServer
from tests.bench.test_cli import _run, _run_against
from torchweave_ray.bench.load.loops import poisson_arrivals
from torchweave_ray.bench.load.serving import Measured, ServingConfig, run_benchmark
from torchweave_ray.bench.load.targets import openai_target, run_in_loop
from torchweave_ray.bench.load.workloads import Workload
from torchweave_ray.bench.report.points import RequestRecord, ServiceLevel, summarize
from torchweave_ray.errors import ConfigError

SHORT = Workload(input_len=4, output_len=2)


def _measure(servers: list[FakeServer], config: ServingConfig) -> list[Measured]:
    async def main() -> list[Measured]:
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(s.listening()) for s in servers]
            named = enumerate(urls)
            targets = [await openai_target(u, "chat", None, name=f"s{i}") for i, u in named]
            return await run_benchmark(targets, config, lambda point: None)

    return run_in_loop(main())


def test_arrivals_are_as_many_as_the_rate_says_and_random() -> None:
    arrivals = poisson_arrivals(5.0, 2000, seed=3)
    assert arrivals == poisson_arrivals(5.0, 2000, seed=3) != poisson_arrivals(5.0, 2000, seed=4)
    assert arrivals[0] >= 0
    assert arrivals[-1] <= 400
    gaps = sorted(b - a for a, b in pairwise(arrivals))
    # Exponential gaps of mean 0.2 s: the median is ln 2 of it, and 5 % are above 3 of it.
    assert gaps[len(gaps) // 2] == pytest.approx(0.2 * 0.693, rel=0.1)
    assert sum(gap > 0.6 for gap in gaps) / len(gaps) == pytest.approx(0.05, abs=0.02)


class _OneAtATime(FakeServer):
    """A queue in front of a server that takes 20 ms a request."""

    def __init__(self) -> None:
        super().__init__(num_pieces=2)
        self._lock = asyncio.Lock()

    async def think(self, body: dict[str, Any]) -> None:
        async with self._lock:
            await asyncio.sleep(0.02)


def test_no_answer_holds_up_an_arrival() -> None:
    """20 arrivals within 0.1 s at a server that takes 0.4 s for them: all wait there."""
    server = _OneAtATime()
    config = ServingConfig(rates=(200.0,), requests=20, workload=SHORT, warmup=1)
    (measured,) = _measure([server], config)
    assert server.max_at_once >= 10
    point = measured.point
    assert (point.concurrency, point.rate, point.requests, point.failed) == (None, 200.0, 20, 0)
    assert point.peak_concurrency >= 10
    assert point.ttft_ms
    assert point.ttft_ms.p99 > 150  # a closed loop would say 20


class _Freezing(FakeServer):
    """It shares the client's loop, and stops it for 50 ms a request."""

    async def think(self, body: dict[str, Any]) -> None:
        time.sleep(0.05)


def test_what_cannot_be_sent_in_time_counts_as_latency() -> None:
    config = ServingConfig(rates=(200.0,), requests=10, workload=SHORT, warmup=0)
    (measured,) = _measure([_Freezing(num_pieces=2)], config)
    point = measured.point
    assert point.send_lag_ms
    assert point.ttft_ms
    assert point.send_lag_ms.p99 > 50
    assert point.ttft_ms.p99 > point.send_lag_ms.p99
    for record in measured.records:
        assert record.due_at is not None
        assert record.ttft_s == record.text_times[0] - record.due_at


def test_what_is_good_by_hand() -> None:
    def record(ttft: float, *gaps: float, error: str | None = None) -> RequestRecord:
        times = [10 + ttft]
        for gap in gaps:
            times.append(times[-1] + gap)
        num = len(times)
        return RequestRecord(10.2, times[-1], tuple(times), 5, num, error=error, due_at=10.0)

    fast, slow_start = record(0.3, 0.1, 0.1), record(0.6, 0.1, 0.1)
    stalls, failed = record(0.3, 0.1, 0.5), record(0.1, 0.1, error="cut off")
    records = [fast, slow_start, stalls, failed]

    def good(**limits: float) -> list[bool]:
        return [ServiceLevel(**limits).is_met_by(r) for r in records]

    assert good(ttft_ms=500) == [True, False, True, False]
    assert good(itl_ms=200) == [True, True, False, False]
    assert good(tpot_ms=299) == [True, True, False, False]
    assert good(request_ms=750) == [True, False, False, False]
    assert good(ttft_ms=500, itl_ms=200) == [True, False, False, False]
    whole = RequestRecord(10.0, 11.0, (), 5, 5)
    assert not ServiceLevel(ttft_ms=500).is_met_by(whole)
    point = summarize("t", None, records, 2.0, rate=2.0, level=ServiceLevel(ttft_ms=500))
    assert (point.goodput_s, point.good_share) == (1.0, 0.5)
    assert point.peak_concurrency == 3  # the failed one ended as the others were sent
    assert point.send_lag_ms
    assert point.send_lag_ms.p50 == pytest.approx(200.0)
    assert not ServiceLevel()


def test_servers_take_turns_and_get_the_same_arrivals() -> None:
    order: list[str] = []

    class Noting(FakeServer):
        def __init__(self, name: str) -> None:
            super().__init__(num_pieces=2)
            self.name = name

        async def think(self, body: dict[str, Any]) -> None:
            order.append(self.name)

    config = ServingConfig(rates=(500.0, 1000.0), requests=2, rounds=2, workload=SHORT, warmup=0)
    first, second = Noting("s0"), Noting("s1")
    measured = _measure([first, second], config)
    assert order == 2 * ["s0", "s0", "s1", "s1", "s1", "s1", "s0", "s0"]
    lines = [(m.point.target, m.point.rate, m.point.requests) for m in measured]
    assert lines == [("s0", 500.0, 4), ("s1", 500.0, 4), ("s0", 1000.0, 4), ("s1", 1000.0, 4)]
    due = [sorted(r.due_at or 0.0 for r in m.records) for m in measured[:2]]
    assert due[0][1] - due[0][0] == pytest.approx(due[1][1] - due[1][0])
    prompts = [json.dumps(body["messages"]) for s in (first, second) for _, body in s.requests]
    assert len(set(prompts)) == 16


def test_prefixes_are_shared_and_warm() -> None:
    server = FakeServer()
    work = Workload("shared-prefix", input_len=3, prefix_len=20, prefixes=2, output_len=2)
    _measure([server], ServingConfig(concurrency=(1,), requests=4, workload=work))
    prompts = [body["messages"][0]["content"].split() for _, body in server.requests]
    assert [len(prompt) for prompt in prompts] == [23] * 6
    prefixes = [tuple(prompt[:20]) for prompt in prompts]
    assert prefixes == 3 * [prefixes[0], prefixes[1]]
    assert prefixes[0] != prefixes[1]
    assert len({tuple(prompt) for prompt in prompts}) == 6


@pytest.mark.parametrize("rates", [(), (200.0,)])
def test_a_conversation_says_all_that_was_said(rates: tuple[float, ...]) -> None:
    server = FakeServer(num_pieces=2)
    work = Workload("multi-turn", input_len=5, turn_len=2, turns=3, pause_s=0.002, output_len=2)
    config = ServingConfig((2,), rates, work, requests=4, warmup=1)
    (measured,) = _measure([server], config)
    assert (measured.point.requests, measured.point.failed) == (12, 0)
    asked = [body["messages"] for _, body in server.requests][1:]
    assert sorted(map(len, asked)) == [1] * 4 + [3] * 4 + [5] * 4
    for messages in asked:
        roles = [m["role"] for m in messages]
        assert roles == ["user", "assistant", "user", "assistant", "user"][: len(roles)]
        assert {m["content"] for m in messages[1::2]} <= {" word word"}
        assert messages[:-2] in [[], *asked]
    assert (measured.point.send_lag_ms is not None) == bool(rates)


def test_the_batch_is_watched() -> None:
    config = ServingConfig(concurrency=(2,), requests=4, workload=SHORT, occupancy=True)
    (measured,) = _measure([FakeServer()], config)
    (occupancy,) = measured.occupancy
    assert len(occupancy.at_s) == len(occupancy.running) == len(occupancy.waiting) >= 1
    assert max(occupancy.running) <= 2
    assert measured.to_dict()["occupancy"][0]["running"]
    assert len(measured.to_dict()["ttft_ms_each"]) == 4


def test_the_command_line_measures_rates_and_keeps_the_key_to_itself(tmp_path: Path) -> None:
    server = FakeServer()
    args = ["--url", "ours=URL", "--url", "theirs=URL/v1", "--rates", "100,200", "--requests", "3"]
    args += ["--slo-ttft-ms", "9999", "--slo-itl-ms", "9999", "--api-key", "sesame"]
    args += ["--save", "--results", str(tmp_path)]
    result = _run_against(server, "bench", "serving", *args)
    assert result.exit_code == 0, result.output
    points = [json.loads(line) for line in result.stdout.splitlines()]
    lines = [(p["target"], p["rate"], p["good_share"]) for p in points]
    assert lines == [(n, r, 1.0) for r in (100.0, 200.0) for n in ("ours", "theirs")]
    assert all(p["goodput_s"] == p["requests_s"] for p in points)
    assert "good/s" in result.stderr
    assert all("Authorization: Bearer sesame\r\n" in head for head in server.heads)
    (saved,) = tmp_path.glob("serving-*.json")
    assert "sesame" not in saved.read_text()
    config = json.loads(saved.read_text())["config"]
    assert config["level"] == {"ttft_ms": 9999.0, "itl_ms": 9999.0}
    assert config["rates"] == [100.0, 200.0]
    assert "concurrency" not in config


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--rates", "0"), "--rates"),
        (("--rates", "nan"), "--rates"),
        (("--url", "http://127.0.0.1:9", "--endpoint", "chats"), "completions, chat"),
        (("--requests", "0"), "--requests"),
    ],
)
def test_bad_options_are_named(args: tuple[str, ...], said: str) -> None:
    result = _run("bench", "serving", *args)
    assert result.exit_code == 2
    assert said in result.stderr


def test_bad_work_is_named() -> None:
    with pytest.raises(ConfigError, match="random, shared-prefix, multi-turn"):
        Workload("zufall")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no tokenizer"):
        Workload("multi-turn", tokenizer=Path("tokenizer.json"))
