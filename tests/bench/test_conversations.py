"""Conversations against a server with known answers: they grow by what it said."""

from __future__ import annotations

from typing import Any

from tests.bench.fake_server import FakeServer
from torchweave_ray.bench.conversations import ConversationsConfig, Round, _measured, hold
from torchweave_ray.bench.load.targets import openai_target, run_in_loop
from torchweave_ray.bench.report.points import RequestRecord

CONFIG = ConversationsConfig(
    conversations=3, turns=4, first_len=8, turn_len=3, output_len=2, pause_s=0.001, seed=5
)


def _hold(server: FakeServer) -> list[list[RequestRecord]]:
    async def main() -> list[list[RequestRecord]]:
        async with server.listening() as url:
            return await hold(await openai_target(url, "completions", None), CONFIG)

    return run_in_loop(main())


def _prompts(server: FakeServer) -> list[str]:
    bodies: list[dict[str, Any]] = [body for path, body in server.requests if "prompt" in body]
    return [body["prompt"] for body in bodies]


def test_a_turn_begins_with_all_that_was_said() -> None:
    server = FakeServer(num_pieces=2)
    records = _hold(server)
    assert [len(turns) for turns in records] == [4, 4, 4]
    prompts = _prompts(server)
    lengths = sorted(len(prompt.split()) for prompt in prompts)
    assert lengths == [8] * 3 + [13] * 3 + [18] * 3 + [23] * 3
    for prompt in prompts:
        longer = [other for other in prompts if other.startswith(f"{prompt} word word ")]
        assert len(longer) == (23 - len(prompt.split())) // 5
    again = FakeServer(num_pieces=2)
    _hold(again)
    assert sorted(_prompts(again)) == sorted(prompts)


def test_hit_rate_is_that_of_later_turns_and_balance_that_of_the_busiest() -> None:
    def turn(prompt: int, cached: int) -> RequestRecord:
        return RequestRecord(0.0, 1.0, (0.5,), prompt, 1, cached)

    turns = [[turn(100, 90), turn(200, 100)], [turn(100, 0), turn(300, 150)]]
    rounds = [Round([turns[0]], 1.0, (3.0, 1.0, 2.0)), Round([turns[1]], 1.0, (2.0, 2.0, 2.0))]
    measured = _measured("prefix", rounds)
    assert measured.hit_rate == 0.5
    assert measured.balance == 1.25
    assert (measured.first.requests, measured.later.requests) == (2, 2)
    assert measured.to_dict()["router"] == "prefix"
