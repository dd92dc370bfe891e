"""A shared prefix and a long prompt's neighbours, against servers that behave as one would fear."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.bench.fake_server import FakeServer
from torchweave_ray.bench.load.targets import BenchmarkError, openai_target, run_in_loop
from torchweave_ray.bench.scenarios import (
    InterferenceConfig,
    Outcome,
    PrefixConfig,
    measure_interference,
    measure_prefix,
)
from torchweave_ray.cli.app import build_app


class Remembering(FakeServer):
    """Thinks about a prompt only when it has not seen its beginning."""

    def __init__(self) -> None:
        super().__init__(num_pieces=2)
        self._seen: set[str] = set()

    async def think(self, body: dict[str, Any]) -> None:
        beginning = " ".join(body["prompt"].split()[:5])
        if beginning not in self._seen:
            self._seen.add(beginning)
            await asyncio.sleep(0.05)


class OneAtATime(FakeServer):
    """A long prompt stops everything else until it has been thought about."""

    def __init__(self) -> None:
        super().__init__(num_pieces=None)
        self._free = asyncio.Event()
        self._free.set()

    async def think(self, body: dict[str, Any]) -> None:
        if len(body["prompt"].split()) >= 300:
            self._free.clear()
            await asyncio.sleep(0.3)
            self._free.set()
        await self._free.wait()

    async def rest(self) -> None:
        await self._free.wait()
        await asyncio.sleep(0.002)


def _measure(server: FakeServer, config: PrefixConfig | InterferenceConfig) -> Outcome:
    async def main() -> Outcome:
        async with server.listening() as url:
            target = await openai_target(url, "completions", None)
            if isinstance(config, PrefixConfig):
                return await measure_prefix(target, config)
            return await measure_interference(target, config)

    return run_in_loop(main())


def test_a_prefix_is_asked_for_twice_and_never_again() -> None:
    server = Remembering()
    outcome = _measure(server, PrefixConfig(prefix_len=20, input_len=5, rounds=3))
    assert [(p.target, p.requests) for p in outcome.points] == [("uncached", 3), ("cached", 3)]
    prompts = [body["prompt"].split() for _, body in server.requests][1:]
    assert [len(prompt) for prompt in prompts] == [25] * 6
    prefixes = [tuple(prompt[:20]) for prompt in prompts]
    assert prefixes[0::2] == prefixes[1::2]
    assert len(set(prefixes)) == 3
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 6
    assert 0 < outcome.ratios["ttft_cached_over_uncached"] < 1


def test_a_server_that_does_one_thing_at_a_time_is_found_out() -> None:
    server = OneAtATime()
    config = InterferenceConfig(long_len=300, input_len=10, output_len=8, streams=2, rounds=2)
    outcome = _measure(server, config)
    points = {point.target: point for point in outcome.points}
    assert {name: p.requests for name, p in points.items()} == {
        "idle": 4,
        "long alone": 1,
        "short meanwhile": 2,
        "long": 2,
        "streams meanwhile": 4,
    }
    # Everybody waited: the gap of the streams is most of the long prompt's time.
    long, streams, short = (points[n] for n in ("long", "streams meanwhile", "short meanwhile"))
    assert long.ttft_ms
    assert streams.itl_ms
    assert short.ttft_ms
    assert streams.itl_ms.p99 > long.ttft_ms.p50 / 2
    assert min(outcome.ratios.values()) > 3
    # A stream is cut to the long prompt's time: it was asked for far more pieces than count.
    asked = [body["max_tokens"] for _, body in server.requests if body["max_tokens"] > 8]
    assert len(asked) == 4
    assert min(asked) > 20


def test_a_server_that_refuses_is_named() -> None:
    with pytest.raises(BenchmarkError, match="no such field"):
        _measure(FakeServer(fail=True), PrefixConfig(prefix_len=5, input_len=2, rounds=1))
    with pytest.raises(BenchmarkError, match="no usage"):
        _measure(FakeServer(usage=False), InterferenceConfig(long_len=9, input_len=2, rounds=1))


def _run(server: FakeServer, *args: str) -> Result:
    async def main() -> Result:
        async with server.listening() as url:
            command = ["bench", *(arg.replace("URL", url) for arg in args)]
            return await asyncio.to_thread(CliRunner().invoke, build_app(), command)

    return asyncio.run(main())


def test_the_commands_print_points_and_ratios() -> None:
    result = _run(Remembering(), "prefix", "--url", "URL", "--prefix-len", "9", "--rounds", "1")
    assert result.exit_code == 0, result.output
    *points, ratios = (json.loads(line) for line in result.stdout.splitlines())
    assert [p["target"] for p in points] == ["uncached", "cached"]
    assert set(ratios) == {"ttft_cached_over_uncached"}
    work = ("--long-len", "300", "--input-len", "5", "--streams", "1", "--rounds", "1")
    result = _run(OneAtATime(), "interference", "--url", "URL", *work)
    assert result.exit_code == 0, result.output
    ratios = json.loads(result.stdout.splitlines()[-1])
    assert set(ratios) == {"ttft_meanwhile_over_idle", "itl_p99_meanwhile_over_idle"}
    assert "itl_p99_meanwhile_over_idle: " in result.stderr
